"""Tiny randomly initialised checkpoints, written offline with fixed seeds."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# before torch is loaded, and for the commands that tests start: tiny tensors need one thread
os.environ["OMP_NUM_THREADS"] = "1"
# until all tests are collected: what is imported stays, so looking for garbage is wasted time
gc.disable()

import pytest
import torch

TEXT_LENGTH = 16


LONGEST = (
    "test_fuzzed_runs.py",
    "test_golden.py",
    "test_recipe_fuzz.py",
    "test_pipeline.py",
    "test_workers.py",
    "test_stories.py",
    "test_loop.py",
    "test_distributed.py",
    "test_shipped.py",
    "test_faults.py",
    "test_train.py",
    "test_readme.py",
    "test_notebook.py",
    "test_cifar100_lt.py",
    "test_lowlight.py",
    "test_check_data.py",
    "test_early_rejection.py",
    "test_gpu_scripts.py",
    "test_page.py",
    "test_docs.py",
)
"""Names of the files that take longest, in about that order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first, so that several processes end at about the same time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not among half a million imported objects."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Reports in UTF-8: hostile names have lone surrogates, which xdist cannot send."""
    report = yield
    report.sections = [(name, _in_utf8(content)) for name, content in report.sections]
    if report.longrepr is not None and report.failed:
        text = str(report.longrepr)
        if text != _in_utf8(text):
            report.longrepr = _in_utf8(text)
    return report


def _in_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="module", autouse=True)
def kept_threads() -> Iterator[None]:
    """Runs set the number of threads of their recipe; other tests get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def kept_imports() -> Iterator[None]:
    """What a file has imported late is not searched for garbage by later files."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def shown_messages() -> Iterator[None]:
    """Messages on standard error, as the command line shows them; a test may silence its own."""
    from discl.utils.console import show_messages

    root = logging.getLogger("discl")
    before = root.level, list(root.handlers)
    show_messages()
    yield
    root.setLevel(before[0])
    root.handlers = before[1]


def make_tokenizer(folder: Path):
    """A CLIP tokenizer of single bytes: the tokens of a word are its letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_settings(tokenizer) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder for 32×32 pixels: 8×8×4 latents, UNet 32-64, epsilon prediction."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny") / "diffusion"
    tokenizer = make_tokenizer(folder.with_name("tokenizer"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        sample_size=32,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer))),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder (model, image processor, tokenizer) for 32×32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("tiny") / "clip"
    tokenizer = make_tokenizer(folder)
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text_settings(tokenizer), vision_config=vision, projection_dim=32)
    ).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def filtered_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> Path:
    """A run folder that has passed the filter, which keeps every image.

    It has 40 real images, of which 8 are hard, and 16 synthetic images at each of the levels 0
    and 50.
    """
    import numpy as np
    from PIL import Image

    from discl.pipeline import run_until
    from discl.run_folder.open import open_run

    root = tmp_path_factory.mktemp("pictures")
    for split, counts in {
        "train": (20, 12, 5, 3),
        "validation": (3, 3, 3, 3),
        "test": (2, 2, 2, 2),
    }.items():
        for label, (name, count) in enumerate(
            zip(("bag", "boot", "coat", "hat"), counts, strict=True)
        ):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (
                    np.random.default_rng([label, len(split), index]).integers(0, 60, (32, 32, 3))
                    + 60 * label
                )
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / split / name / f"{index:02d}.png"
                )
    recipe = {
        "name": "filtered",
        "data": {"root": str(root)},
        "groups": {"many": 15, "few": 6},
        "hard": {"fewer_than": 6},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 4,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {"epochs": 2, "curriculum_epochs": 2, "image_size": 32, "batch_size": 8},
        "methods": {"discl": {"strategy": "diverse-to-specific"}},
        "runtime": {"device": "cpu"},
    }
    run = open_run(recipe, tmp_path_factory.mktemp("runs") / "filtered")
    run_until(run, "filter")
    return run.folder
