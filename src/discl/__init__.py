"""Diffusion Curriculum (arXiv 2410.13674): learn from scarce or poor images with a spectrum of diffusion-made ones.

    import discl
    report = discl.run("fashion-lt")

Importing this module loads nothing heavy; each name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chain import run, run_until
    from .curriculum.models import load_classifier
    from .errors import (
        CheckpointError,
        DataError,
        DisclError,
        RecipeError,
        RunError,
        StoreError,
        TrainingError,
    )
    from .levels import GuidanceLevel
    from .loops.curriculum import Curriculum
    from .loops.dataset import SpectrumDataset
    from .recipe import Recipe, load_recipe
    from .stages.predicting import predict
    from .workspace import Run, open_run

__version__ = "0.1.0"

_HOMES = {
    "chain": ("run", "run_until"),
    "curriculum.models": ("load_classifier",),
    "errors": (
        "CheckpointError",
        "DataError",
        "DisclError",
        "RecipeError",
        "RunError",
        "StoreError",
        "TrainingError",
    ),
    "levels": ("GuidanceLevel",),
    "loops.curriculum": ("Curriculum",),
    "loops.dataset": ("SpectrumDataset",),
    "recipe": ("Recipe", "load_recipe"),
    "stages.predicting": ("predict",),
    "workspace": ("Run", "open_run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError", "Curriculum", "DataError", "DisclError", "GuidanceLevel", "Recipe", "RecipeError", "Run", "RunError",
    "SpectrumDataset", "StoreError", "TrainingError", "load_classifier", "load_recipe", "open_run", "predict", "run", "run_until",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'discl' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
