"""Checkpoints of image classifiers that several files of tests tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A ViT of two layers for 32×32 pixels, with a head of two classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"
