"""A stand-in for timm: `create_model` of one vision transformer, with timm's argument names.

timm needs torchvision, which some test environments do not have. The tests use timm if they can.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, init_values: float | None) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, 1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = Mlp(width)
        scaled = init_values is not None
        self.ls1 = LayerScale(width, init_values) if scaled else nn.Identity()
        self.ls2 = LayerScale(width, init_values) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        init_values: float | None = None,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        if img_size % patch_size or global_pool not in {"token", "avg"}:
            raise ValueError(f"img_size {img_size}, global_pool {global_pool}")
        self.global_pool, self.default_cfg = global_pool, {"classifier": "head"}
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        places = (img_size // patch_size) ** 2 + 1
        self.pos_embed = nn.Parameter(torch.randn(1, places, embed_dim) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, init_values) for _ in range(depth))
        )
        pooled = global_pool == "avg"
        self.norm = nn.Identity() if pooled else nn.LayerNorm(embed_dim, 1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, 1e-6) if pooled else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        pooled = x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 0]
        return self.head(self.fc_norm(pooled))


def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """As timm's: a fresh model by name. Raises RuntimeError for an unknown one."""
    if name != "vit_tiny_patch16_224" or pretrained:
        raise RuntimeError(f"Unknown model ({name})")
    return VisionTransformer(**{key: value for key, value in options.items() if value is not None})


def import_or_stand_in(monkeypatch: Any) -> Any:
    """timm where it can be imported, else this module under its name."""
    try:
        import timm
    except ImportError:
        module = ModuleType("timm")
        module.__dict__.update(vars(SimpleNamespace(create_model=create_model)))
        monkeypatch.setitem(sys.modules, "timm", module)
        return module
    return timm


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
OPTIONS = SMALL | {"init_values": 0.1, "global_pool": "avg"}


def save(timm: Any, folder: Path, options: dict[str, Any] = OPTIONS, **changed: Any) -> Any:
    """A folder as written by timm's `save_for_hf`, of a model of three classes."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    preprocessing = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
    }
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": options,
        "pretrained_cfg": preprocessing,
    }
    config["global_pool"] = options.get("global_pool", "token")
    (folder / "config.json").write_text(json.dumps(config | changed))
    return model
