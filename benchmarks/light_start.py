"""How a light CLIP ranks classes before its first step, and what its forward pass keeps.

    python -m benchmarks.light_start --cifar100 DIR --json benchmarks/results/light_start.json

Both use the texts of the classes. They differ in the place of the normalisation: before the
projection P for light tuning (LIFT, arXiv 2309.10019), after it for CLIP. Every second test image
is ranked, by the checkpoint of the CIFAR benchmarks and by the shipped one of Fashion-MNIST.

What a forward pass keeps for the backward pass is counted for the image tower of a CLIP ViT-B/16
in float32, with random weights and the head of 1,000 classes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discl.data import ImageTable, read_tables
from discl.models.light import LightClassifier
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, starter_of
from discl.training.footprint import KeptActivations
from discl.training.image_cache import ImageCache
from discl.training.inference import predict_logits

CIFAR = Path(__file__).parent / "checkpoints" / "cifar" / "clip"
FASHION = "embedded:fashion-mnist"
FIRST = 5
GROUPS = {"many": 35, "few": 30}
"""Classes of CIFAR100-LT with more than 100 and fewer than 20 images, at imbalance ratio 100."""


def compare(checkpoint: str, table: ImageTable, many: int = 0, few: int = 0) -> dict[str, float]:
    """Fractions of the images: same first class, zero-shot's first among light's five, correct.

    - `many`, `few`: numbers of first and last classes that also have a figure of their own.
    """
    model = {"architecture": "clip", "checkpoint": checkpoint}
    train = Train.model_validate(
        {"image_size": 32, "model": {**model, "templates": ["a photo of a {class}."]}}
    )
    names = {name: name.replace("_", " ") for name in table.class_names}
    rows = np.arange(0, len(table), 2)
    logits = {}
    for kind in ("light", "zero-shot"):
        config = describe_classifier(train, table.class_names, names, fine_tune=kind)
        pixels = ImageCache([table], config.resize)
        logits[kind] = predict_logits(starter_of(config, train, names)(), pixels, rows, config)
    labels = torch.from_numpy(table.labels[rows])
    first = {kind: each.argmax(1) for kind, each in logits.items()}
    best = logits["light"].topk(FIRST, 1).indices
    found: dict[str, Any] = {
        "same_first": first["light"] == first["zero-shot"],
        "zero_shot_first_in_light_first_five": (best == first["zero-shot"][:, None]).any(1),
        "light_correct": first["light"] == labels,
        "zero_shot_correct": first["zero-shot"] == labels,
    }
    for name, chosen in {"many": labels < many, "few": labels >= len(names) - few}.items():
        if chosen.any():
            found[f"zero_shot_correct_{name}"] = found["zero_shot_correct"][chosen]
    figures = {name: float(each.double().mean()) for name, each in found.items()}
    return {"images": len(rows), "classes": len(table.class_names), **figures}


def kept_per_image(adapter: str) -> float:
    """Megabytes that a forward pass keeps per image; adapter `all`: every weight is trained."""
    vision = {"patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    light = {"adapter": adapter, "width": 32, "head": "cosine", "scale": 25.0}
    model = LightClassifier("clip", {"vision_config": vision}, light, 1000).train()
    if adapter == "all":
        model.requires_grad_(True)
    images, kept = torch.randn(2, 3, 224, 224), KeptActivations(model)
    with kept.counting():
        model(images)
    return kept.bytes / len(images) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar100", required=True, help="folder with CIFAR-100 as Parquet")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = {
        "cifar": compare(str(CIFAR), read_tables(arguments.cifar100)["test"], **GROUPS),
        "fashion": compare(f"{FASHION}/clip", read_tables(f"{FASHION}/data")["test"]),
    }
    for name, each in figures.items():
        print(name, ", ".join(f"{key} {value:.4g}" for key, value in each.items()))
    kept = {each: kept_per_image(each) for each in ("none", "adaptformer", "lora", "all")}
    print("megabytes kept per image:", kept)
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "kept": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
