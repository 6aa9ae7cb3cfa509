"""Quality of the generator of the CIFAR benchmarks, and whether it recites training images.

    python -m benchmarks.generator --cifar100 DIR --cifar10 DIR \\
        --json benchmarks/results/generator.json --grid docs/cifar_generator.png
    python -m benchmarks.generator --cifar100 DIR --cifar10 DIR \\
        --run build/cifar100_lt/spectrum --json benchmarks/results/recitation.json

The engine generates text-only images of all 100 classes of CIFAR-100 at the setting of
cifar100_lt.yaml. They are compared with the test images. The feature network is the image tower of
checkpoints/cifar/clip. It was trained on the generator's training images, so distances are smaller
than those of an unrelated network. The rows of real images show the best possible figures.

- Fréchet distance of Gaussians fitted to the features (arXiv 1706.08500, with this network instead
  of Inception).
- Precision and recall by balls around the third-nearest neighbour (arXiv 1904.06991).
- Nearest neighbour: the cosine distance to the nearest training image of the generator, and the
  fraction that is closer than 99 % of the test images. It is large for a generator that recites.

With `--run`, the kept images of a run of cifar100_lt.py are compared per level, pixel by pixel:

- the root mean squared difference in [0, 1] to the nearest image of the same class that the
  generator has seen;
- the fraction that is closer than 99 % of the test images of its class;
- the mean step between neighbouring pixels, which measures blur.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.checkpoints.make_cifar import read_images
from PIL import Image

from discl.data import decode_image, read_tables
from discl.recipe import load_recipe
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.engine import Engine
from discl.spectrum.models import Address, load_generator
from discl.spectrum.plan import Sampling, plan_requests

HERE = Path(__file__).parent
NEIGHBOURS = 3


def make_images(per_class: int, checkpoint: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 `[n, 32, 32, 3]`, labels `[n]`): text-only images, in the order of the plan."""
    asked = load_recipe(HERE / "cifar100_lt.yaml").spectrum
    model = load_generator(Address(checkpoint), asked.dtype, torch.device("cpu"))
    sampling = Sampling(
        "", "", asked.num_inference_steps, asked.guidance_scale, 32, asked.dtype, "png"
    )
    sources = [
        {"id": f"{name}-{number}", "digest": "", "label": label}
        for label, name in enumerate(names)
        for number in range(per_class)
    ]
    prompts = {label: [f"a photo of a {name}"] for label, name in enumerate(names)}
    requests = plan_requests(sources, [0], 1, prompts, negative_prompt="", sampling=sampling)
    engine = Engine(
        model,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        slots=64,
    )
    pictures = {
        request.id: picture
        for request, picture in engine.generate(
            requests, lambda source: np.zeros((32, 32, 3), np.uint8)
        )
    }
    return np.stack([pictures[request.id] for request in requests]), np.array(
        [request.label for request in requests]
    )


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of features `[n, d]`."""
    means, covariances = zip(
        *((each.mean(0), np.cov(each, rowvar=False)) for each in (first, second)), strict=True
    )
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    return float(
        ((means[0] - means[1]) ** 2).sum()
        + np.trace(covariances[0])
        + np.trace(covariances[1])
        - 2 * cross
    )


def covered(points: np.ndarray, manifold: np.ndarray) -> float:
    """Fraction of the points that are in a ball around a point of the manifold.

    The radius of a ball is the distance to the third-nearest other point of the manifold.
    """
    radii = np.sort(1 - manifold @ manifold.T, axis=1)[:, NEIGHBOURS]
    return float(((1 - points @ manifold.T) <= radii).any(1).mean())


def nearest(points: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosine distance, row) of the nearest training image of each point."""
    parts = [points[first : first + 512] @ training.T for first in range(0, len(points), 512)]
    return 1 - np.concatenate([part.max(1) for part in parts]), np.concatenate(
        [part.argmax(1) for part in parts]
    )


def pixel_distances(
    images: np.ndarray, labels: np.ndarray, seen: np.ndarray, seen_labels: np.ndarray
) -> np.ndarray:
    """Root mean squared difference, in [0, 1], of each uint8 image to the nearest in `seen`.

    Only images of the same class count; infinite without one.
    """
    found = np.full(len(images), np.inf)
    for label in np.unique(labels).tolist():
        ours, theirs = (
            each[of == label].astype(np.float64) / 255
            for each, of in ((images, labels), (seen, seen_labels))
        )
        if len(theirs):
            ours, theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
            squared = (ours**2).sum(1)[:, None] + (theirs**2).sum(1) - 2 * ours @ theirs.T
            found[labels == label] = np.sqrt(squared.min(1).clip(0) / ours.shape[1])
    return found


def steepness(images: np.ndarray) -> float:
    """Mean absolute step between neighbouring pixels of uint8 `[n, h, w, 3]`, in [0, 1]."""
    values = images.astype(np.float64) / 255
    return float(np.mean([np.abs(np.diff(values, axis=axis)).mean() for axis in (1, 2)]))


def check_recitation(
    run: Path, test: Any, seen: np.ndarray, seen_labels: np.ndarray
) -> dict[str, Any]:
    """Figures of each level of what a run kept, and of the test images."""
    import pyarrow.parquet as pq

    from discl.spectrum.store import spectrum_shards

    pictures = np.stack([np.asarray(test.image(row)) for row in range(len(test))])
    distances = pixel_distances(pictures, test.labels, seen, seen_labels)
    limits = {
        label: float(np.quantile(distances[test.labels == label], 0.01)) for label in range(100)
    }
    figures: dict[str, Any] = {
        "test": {
            "images": len(pictures),
            "median": float(np.median(distances)),
            "closer": 0.01,
            "steepness": steepness(pictures),
        }
    }
    kept = [
        verdict for verdict in pq.read_table(run / "filter.parquet").to_pylist() if verdict["keep"]
    ]
    stored = spectrum_shards(run / "spectrum", test.class_names).rows(
        [verdict["id"] for verdict in kept], ["id", "image"]
    )
    for level in sorted({verdict["level"] for verdict in kept}):
        part = [verdict for verdict in kept if verdict["level"] == level]
        made = np.stack(
            [
                np.asarray(decode_image(each))
                for each in (stored[verdict["id"]]["image"] for verdict in part)
            ]
        )
        labels = np.array([verdict["label"] for verdict in part])
        own = pixel_distances(made, labels, seen, seen_labels)
        figures[str(level)] = {
            "images": len(made),
            "median": float(np.median(own)),
            "smallest": float(own.min()),
            "steepness": steepness(made),
            "closer": float((own < np.array([limits[label] for label in labels.tolist()])).mean()),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar100", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, default=HERE / "checkpoints" / "cifar")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument(
        "--run",
        type=Path,
        help="a folder of cifar100_lt.py: only compare its kept images, pixel by pixel",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--grid",
        type=Path,
        help="also write sample pictures of twenty classes, and their nearest training images",
    )
    arguments = parser.parse_args()
    tables = read_tables(str(arguments.cifar100))
    names = [name.replace("_", " ") for name in tables["test"].class_names]
    test = np.stack([np.asarray(tables["test"].image(row)) for row in range(len(tables["test"]))])
    training, training_labels, _ = read_images(arguments.cifar100, arguments.cifar10)
    training, training_labels = (
        training[training_labels < 100],
        training_labels[training_labels < 100],
    )
    if arguments.run:
        figures = check_recitation(arguments.run, tables["test"], training, training_labels)
        print(json.dumps(figures, indent=1))
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        return
    made, labels = make_images(arguments.per_class, str(arguments.checkpoints / "diffusion"), names)
    scorer = ClipScorer(
        str(arguments.checkpoints / "clip"),
        {label: f"a photo of a {name}" for label, name in enumerate(names)},
    )

    def features(pictures: np.ndarray) -> np.ndarray:
        pixels = (
            torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        )  # as the CLIP's own preprocessing, without its loop
        with torch.inference_mode():
            parts = [
                scorer.model.get_image_features(pixel_values=part) for part in pixels.split(256)
            ]
        outputs = torch.cat(
            [part if isinstance(part, torch.Tensor) else part.pooler_output for part in parts]
        )
        return torch.nn.functional.normalize(outputs, dim=1).numpy()

    rng = np.random.default_rng(0)
    seen = features(training)
    groups = {
        "text-only": features(made),
        "training images": seen[rng.choice(len(seen), len(made), replace=False)],
        "test images": features(test[rng.choice(len(test), len(made), replace=False)]),
    }
    reference = features(test)
    limit = float(np.quantile(nearest(reference, seen)[0], 0.01))
    figures: dict[str, Any] = {}
    print(
        "| images | Fréchet distance | precision | recall | nearest training image, median "
        "| closer than 99 % of test images |"
    )
    print("|---|---|---|---|---|---|")
    others = reference[rng.permutation(len(reference))[: len(made)]]
    for name, found in groups.items():
        distance = nearest(found, seen)[0]
        figures[name] = {
            "frechet_distance": frechet_distance(found, reference),
            "precision": covered(found, others),
            "recall": covered(others, found),
            "nearest_median": float(np.median(distance)),
            "closer_than_test": float((distance < limit).mean()),
        }
        each = figures[name]
        print(
            f"| {name} | {each['frechet_distance']:.4f} | {each['precision']:.2f} "
            f"| {each['recall']:.2f} | {each['nearest_median']:.3f} "
            f"| {each['closer_than_test']:.1%} |"
        )
    recognised = scorer.text_embeddings.numpy() @ groups["text-only"].T
    figures["recognised_by_clip"] = float((recognised.argmax(0) == labels).mean())
    figures["test_recognised_by_clip"] = float(
        ((scorer.text_embeddings.numpy() @ reference.T).argmax(0) == tables["test"].labels).mean()
    )
    recognised, at_best = (
        f"{figures[name]:.1%}" for name in ("recognised_by_clip", "test_recognised_by_clip")
    )
    print(f"The CLIP recognises {recognised} of the text-only and {at_best} of the test images.")
    if arguments.grid:
        where = nearest(groups["text-only"], seen)[1]
        columns = [np.flatnonzero(labels == label)[:8] for label in range(0, 100, 5)]
        pictures = [
            np.concatenate(
                [np.concatenate([made[row], training[where[row]]], 0) for row in rows], 0
            )
            for rows in columns
        ]
        arguments.grid.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures, 1)).save(arguments.grid)
    if arguments.json:
        arguments.json.write_text(json.dumps({"images": len(made), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
