"""Configurations of tiny ViTs of transformers."""

from __future__ import annotations

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
