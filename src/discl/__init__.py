"""Diffusion Curriculum (arXiv 2410.13674): learn from scarce or poor images with synthetic ones.

    import discl
    report = discl.run("fashion-lt")

Every public name is imported from here. Importing this module loads nothing heavy; each name is
loaded when it is first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert_checkpoint
    from .curriculum.policies import Cell, Policy, Wish
    from .curriculum.progress import GuidanceSet, measure_progress
    from .curriculum.sampling import Pool, SamplingConfig, draw_epoch, sample_weights
    from .curriculum.strategies import Strategy, make_strategy
    from .data import ImageTable, decode_image, inspect_images, read_tables, to_size, to_square
    from .errors import (
        CheckpointError,
        DataError,
        DisclError,
        RecipeError,
        RunError,
        StoreError,
        TrainingError,
    )
    from .export.marks import mark_synthetic
    from .integrations.dataset import SpectrumDataset
    from .integrations.sampler import Curriculum
    from .levels import check_level, start_step
    from .models.classifier import load_classifier
    from .pipeline import run, run_until
    from .recipe import Recipe, load_recipe
    from .run_folder.open import open_run
    from .run_folder.run import Run
    from .spectrum.clip_filter import ClipScorer, judge
    from .spectrum.encoding import encode_image
    from .spectrum.engine import Engine
    from .spectrum.models import describe_generator, load_generator
    from .spectrum.plan import Planner, Request, Sampling, plan_requests, unet_rows
    from .spectrum.store import score_shards, spectrum_shards
    from .spectrum.worker import Worker
    from .stages.predict import predict
    from .training.hooks import TrainingHook

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "conversion": ("convert_checkpoint",),
    "curriculum.policies": ("Cell", "Policy", "Wish"),
    "curriculum.progress": ("GuidanceSet", "measure_progress"),
    "curriculum.sampling": ("Pool", "SamplingConfig", "draw_epoch", "sample_weights"),
    "curriculum.strategies": ("Strategy", "make_strategy"),
    "data": ("ImageTable", "decode_image", "inspect_images", "read_tables", "to_size", "to_square"),
    "errors": (
        "CheckpointError",
        "DataError",
        "DisclError",
        "RecipeError",
        "RunError",
        "StoreError",
        "TrainingError",
    ),
    "export.marks": ("mark_synthetic",),
    "integrations.dataset": ("SpectrumDataset",),
    "integrations.sampler": ("Curriculum",),
    "levels": ("check_level", "start_step"),
    "models.classifier": ("load_classifier",),
    "pipeline": ("run", "run_until"),
    "recipe": ("Recipe", "load_recipe"),
    "run_folder.open": ("open_run",),
    "run_folder.run": ("Run",),
    "spectrum.clip_filter": ("ClipScorer", "judge"),
    "spectrum.encoding": ("encode_image",),
    "spectrum.engine": ("Engine",),
    "spectrum.models": ("describe_generator", "load_generator"),
    "spectrum.plan": ("Planner", "Request", "Sampling", "plan_requests", "unet_rows"),
    "spectrum.store": ("score_shards", "spectrum_shards"),
    "spectrum.worker": ("Worker",),
    "stages.predict": ("predict",),
    "training.hooks": ("TrainingHook",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Cell",
    "CheckpointError",
    "ClipScorer",
    "Curriculum",
    "DataError",
    "DisclError",
    "Engine",
    "GuidanceSet",
    "ImageTable",
    "Planner",
    "Policy",
    "Pool",
    "Recipe",
    "RecipeError",
    "Request",
    "Run",
    "RunError",
    "Sampling",
    "SamplingConfig",
    "SpectrumDataset",
    "StoreError",
    "Strategy",
    "TrainingError",
    "TrainingHook",
    "Wish",
    "Worker",
    "check_level",
    "convert_checkpoint",
    "decode_image",
    "describe_generator",
    "draw_epoch",
    "encode_image",
    "inspect_images",
    "judge",
    "load_classifier",
    "load_generator",
    "load_recipe",
    "make_strategy",
    "mark_synthetic",
    "measure_progress",
    "open_run",
    "plan_requests",
    "predict",
    "read_tables",
    "run",
    "run_until",
    "sample_weights",
    "score_shards",
    "spectrum_shards",
    "start_step",
    "to_size",
    "to_square",
    "unet_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'discl' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
