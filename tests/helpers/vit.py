"""Tiny classifiers of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_vit_config(layers: int, **more: Any) -> Any:
    """A ViT for 32×32 pixels, with a head of two classes."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        **more,
    )


def train_from(folder: Path, architecture: str, objective: str = "cross-entropy") -> Any:
    """The network that training on two classes starts with, from a checkpoint for 32×32 pixels."""
    from discl.recipe import Train
    from discl.stages.classifiers import describe_classifier, starter_of

    model = {"architecture": architecture, "checkpoint": str(folder), "templates": ["{class}"]}
    train = Train.model_validate({"image_size": 32, "model": model})
    return starter_of(describe_classifier(train, ("a", "b"), None, objective), train)()
