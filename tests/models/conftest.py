"""Checkpoints of image classifiers that several files of tests tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.vit import make_vit_config


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A ViT of two layers for 32×32 pixels, with a head of two classes."""
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(make_vit_config(2)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"
