"""CUDA: augmentation strength per class (arXiv 2302.05499).

Every class has a level from 0 to 10. A training image is augmented at the level of its class with
probability ½. Before each epoch the level rises if the model still recognises images augmented up
to it, and falls otherwise.

Posterise, solarise and solarise-add have two forms; `operations` selects one for all three.

- `gradual` (default): the change grows with the strength. Posterise keeps 8 − int(v) bits, solarise
  inverts values from 256 − v on, solarise-add adds v to values below 128.
- `released`: the form of the authors' code, much stronger at the strengths that levels reach.
  Posterise keeps max(1, int(v)) bits, which is one bit up to strength 14. Solarise inverts values
  from v on, so it weakens as the strength grows. Solarise-add adds v to every value and then
  inverts those from 128 on.

Mean change of a uniform random image, in grey levels of 255, at strengths 1 / 5 / 10:

| | posterise | solarise | solarise-add |
|---|---|---|---|
| gradual | 0 / 0 / .5 | 8 / 35 / 56 | 1 / 9 / 18 |
| released | 63 / 63 / 63 | 119 / 92 / 71 | 67 / 80 / 95 |

Colour, contrast, brightness and sharpness are factors from .1 on, as published, and a factor of 1
changes nothing: at the strengths that levels reach, factors of .1 to .7, they weaken as the
strength grows. The authors' code rotates, shears and moves without interpolation; here it is
bilinear. Eight operations have no magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from ..errors import shorten
from ..models.classifier import normalise
from ..training.augmentation import centre
from ..training.hooks import TrainingContext, TrainingHook, number_within
from ..training.image_cache import EpochLoader
from ..utils.hashing import derive_seed

MAX_LEVEL = 10
STRENGTH_SCALE = 30
BATCH_SIZE = 512
Recognised = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]

Operation = tuple[float, float, bool, Callable[[Image.Image, float], Image.Image]]
"""(lo, hi, either sign, apply)."""


def _affine(
    *matrix: Callable[[float, Image.Image], float],
) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, v: picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        tuple(entry(v, picture) for entry in matrix),
        Image.Resampling.BILINEAR,
    )


def _constant(value: float) -> Callable[[float, Image.Image], float]:
    return lambda v, picture: value


def _resize_crop(picture: Image.Image, factor: float) -> Image.Image:
    """Enlarged by `factor` and cut back to its size around the middle."""
    width, height = picture.size
    half_width, half_height = width / factor / 2, height / factor / 2
    box = (
        width / 2 - half_width,
        height / 2 - half_height,
        width / 2 + half_width,
        height / 2 + half_height,
    )
    return picture.resize((width, height), Image.Resampling.BILINEAR, box)


def _solarize(picture: Image.Image, threshold: float) -> Image.Image:
    return ImageOps.solarize(picture, threshold)  # type: ignore[arg-type]


def _solarize_add(picture: Image.Image, amount: float) -> Image.Image:
    """Adds `amount` to every value below 128."""
    return picture.point(
        [min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3
    )


def _solarize_add_to_all(picture: Image.Image, amount: float) -> Image.Image:
    """Adds `amount` to every value, then inverts those from 128 on."""
    added = [min(255, value + int(amount)) for value in range(256)]
    return picture.point([value if value < 128 else 255 - value for value in added] * 3)


def _enhanced(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, v: kind(picture).enhance(v)


def _plain(change: Callable[[Image.Image], Image.Image]) -> Operation:
    return 0.0, 0.0, False, lambda picture, v: change(picture)


_ZERO, _ONE = _constant(0.0), _constant(1.0)
OPERATIONS: Mapping[str, Operation] = {
    "vertical-flip": _plain(ImageOps.flip),
    "mirror": _plain(ImageOps.mirror),
    "edge-enhance": _plain(lambda picture: picture.filter(ImageFilter.EDGE_ENHANCE)),
    "detail": _plain(lambda picture: picture.filter(ImageFilter.DETAIL)),
    "smooth": _plain(lambda picture: picture.filter(ImageFilter.SMOOTH)),
    "auto-contrast": _plain(ImageOps.autocontrast),
    "equalise": _plain(ImageOps.equalize),
    "invert": _plain(ImageOps.invert),
    "blur": (0, 2, False, lambda picture, v: picture.filter(ImageFilter.GaussianBlur(v))),
    "resize-crop": (1, 1.5, False, _resize_crop),
    "rotate": (0, 30, True, lambda picture, v: picture.rotate(v, Image.Resampling.BILINEAR)),
    "posterise": (0, 4, False, lambda picture, v: ImageOps.posterize(picture, 8 - int(v))),
    "solarise": (0, 256, False, lambda picture, v: ImageOps.solarize(picture, 256 - int(v))),
    "solarise-add": (0, 110, False, _solarize_add),
    "colour": (0.1, 1.9, False, _enhanced(ImageEnhance.Color)),
    "contrast": (0.1, 1.9, False, _enhanced(ImageEnhance.Contrast)),
    "brightness": (0.1, 1.9, False, _enhanced(ImageEnhance.Brightness)),
    "sharpness": (0.1, 1.9, False, _enhanced(ImageEnhance.Sharpness)),
    "shear-x": (0, 0.3, True, _affine(_ONE, lambda v, picture: v, _ZERO, _ZERO, _ONE, _ZERO)),
    "shear-y": (0, 0.3, True, _affine(_ONE, _ZERO, _ZERO, lambda v, picture: v, _ONE, _ZERO)),
    "translate-x": (0, 100, True, _affine(_ONE, _ZERO, lambda v, picture: v, _ZERO, _ONE, _ZERO)),
    "translate-y": (0, 100, True, _affine(_ONE, _ZERO, _ZERO, _ZERO, _ONE, lambda v, picture: v)),
}
NAMES = tuple(OPERATIONS)
RELEASED: Mapping[str, Operation] = {
    "posterise": (0, 4, False, lambda picture, v: ImageOps.posterize(picture, max(1, int(v)))),
    "solarise": (0, 256, False, _solarize),
    "solarise-add": (0, 110, False, _solarize_add_to_all),
}
"""Operations that the authors' code defines differently."""
FORMS: Mapping[str, Mapping[str, Operation]] = {"gradual": {}, "released": RELEASED}
"""Operations that replace those of the same name, by form."""


def magnitude(name: str, strength: int) -> float:
    """|v| = lo + (s / 30)(hi − lo) at strength s; translation in pixels, rotation in degrees."""
    lo, hi, _, _ = OPERATIONS[name]
    return lo + strength / STRENGTH_SCALE * (hi - lo)


def augment(
    picture: Image.Image, strength: int, rng: np.random.Generator, operations: str = "gradual"
) -> Image.Image:
    """The RGB image after `strength` random operations of 22, each at that strength.

    - `strength`: 0 to 10; operations are drawn with replacement.
    - `operations`: `gradual` or `released`.
    """
    replaced = FORMS[operations]
    for choice in rng.integers(len(NAMES), size=strength):
        name = NAMES[choice]
        _, _, either_sign, apply = replaced.get(name) or OPERATIONS[name]
        value = magnitude(name, strength)
        picture = apply(picture, -value if either_sign and rng.random() < 0.5 else value)
    return picture


def augment_batch(
    pictures: np.ndarray,
    strengths: Sequence[int],
    seed: int,
    *,
    threads: ThreadPoolExecutor | None = None,
    operations: str = "gradual",
) -> np.ndarray:
    """Each image augmented at its strength, uint8 `[batch, 3, h, w]`.

    The result is a function of `seed`, whatever the number of threads.

    - `pictures`: uint8 `[batch, 3, h, w]`.
    - `strengths`: 0 to 10, `[batch]`.
    """

    def augment_row(row: int) -> np.ndarray:
        if not strengths[row]:
            return pictures[row]
        picture = Image.fromarray(np.ascontiguousarray(pictures[row].transpose(1, 2, 0)))
        rng = np.random.default_rng([seed, row])
        return np.asarray(augment(picture, strengths[row], rng, operations)).transpose(2, 0, 1)

    rows = range(len(pictures))
    return np.stack(list(threads.map(augment_row, rows) if threads else map(augment_row, rows)))


def training_strengths(
    levels: np.ndarray, labels: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """The level of each row's class with `probability`, else 0; int64 `[batch]`."""
    return np.where(rng.random(len(labels)) < probability, levels[labels], 0)


def update_levels(
    levels: np.ndarray,
    rows_of_class: Sequence[np.ndarray],
    recognised: Recognised,
    *,
    threshold: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The levels of the next epoch, int64 `[classes]` in 0 … 10 (arXiv 2302.05499, algorithm 1).

    For each class and each strength s up to its level, 10·(s + 1) of its rows are drawn with
    replacement. The level rises by one if the accuracy exceeds `threshold` at every s, and falls by
    one otherwise. A class without rows keeps its level.

    - `levels`: current levels, `[classes]`.
    - `rows_of_class`: training rows of each class.
    - `recognised`: `recognised(rows, s, rng)` returns whether the model, in evaluation mode,
      predicts each row augmented at strength s, bool `[rows]`.
    - `threshold`: γ; .6 on CIFAR, .4 on large sets.
    """
    result = levels.copy()
    drawn: list[tuple[int, int, np.ndarray]] = []
    known = np.asarray([len(rows) > 0 for rows in rows_of_class])
    for label in np.flatnonzero(known).tolist():
        for strength in range(int(levels[label]) + 1):
            drawn.append((label, strength, rng.choice(rows_of_class[label], 10 * (strength + 1))))
    passed = np.ones(len(levels), bool)
    for strength in sorted(
        {strength for _, strength, _ in drawn}
    ):  # all classes of a strength in one call: full batches
        parts = [(label, rows) for label, each, rows in drawn if each == strength]
        right = recognised(np.concatenate([rows for _, rows in parts]), strength, rng)
        for part, (label, _) in zip(right.reshape(len(parts), -1), parts, strict=True):
            passed[label] &= part.mean() > threshold
    result += np.where(known, np.where(passed, 1, -1), 0)
    return result.clip(0, MAX_LEVEL)


class Cuda(TrainingHook):
    """CUDA in training: updates levels before each epoch, augments images at their class's level.

    Images are augmented after crop and flip in the main process, so that no data worker needs the
    levels.

    - `threshold`: γ, in [0, 1].
    - `probability`: probability that an image is augmented, in [0, 1].
    - `operations`: form of three operations, `gradual` or `released`.

    Raises ValueError for a value out of range.
    """

    def __init__(
        self, *, threshold: float = 0.6, probability: float = 0.5, operations: str = "gradual"
    ) -> None:
        if not isinstance(operations, str) or operations not in FORMS:
            raise ValueError(f"operations is {' or '.join(FORMS)}; got {shorten(operations)}.")
        self.operations = operations
        self.threshold = number_within("threshold", threshold, 0, 1)
        self.probability = number_within("probability", probability, 0, 1)
        self.levels = np.zeros(0, np.int64)
        self.threads = ThreadPoolExecutor()
        self.batches: EpochLoader | None = None

    def begin(self, context: TrainingContext) -> None:
        self.batches = EpochLoader(context.pixels, BATCH_SIZE, context.workers)
        self.levels = np.zeros(context.pool.num_classes, np.int64)

    def begin_epoch(self, context: TrainingContext, epoch: int) -> None:
        pool = context.pool
        usable = ~pool.held_out & ~pool.synthetic
        rows_of_class = [
            np.flatnonzero(usable & (pool.labels == label)) for label in range(pool.num_classes)
        ]
        rng = np.random.default_rng(derive_seed("cuda", context.seed, epoch))

        def recognised(rows: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
            return self._recognised(context, rows, strength, int(rng.integers(2**62)))

        # rank 0 decides for all, because roundings may differ between processes
        self.levels = context.state.processes.on_main(
            lambda: update_levels(
                self.levels, rows_of_class, recognised, threshold=self.threshold, rng=rng
            )
        )

    @torch.inference_mode()
    def _recognised(
        self, context: TrainingContext, rows: np.ndarray, strength: int, seed: int
    ) -> np.ndarray:
        """In float32, because in bfloat16 ties would go to the first class."""
        batches = self.batches or EpochLoader(context.pixels, BATCH_SIZE)
        state, right = context.state, []
        training = state.model.training
        state.model.eval()
        for number, (part, stored) in enumerate(batches.of(rows)):
            middle = centre(stored, state.config.image_size, batches.aspects_of(part))
            pictures, own = middle.numpy(), derive_seed(seed, number * BATCH_SIZE)
            altered = torch.from_numpy(self._augment(pictures, [strength] * len(part), own))
            images = normalise(altered.to(state.device).float() / 255, state.config)
            logits = state.model(images.contiguous(memory_format=torch.channels_last))
            right.append(logits.argmax(1).cpu().numpy() == context.pool.labels[part])
        state.model.train(training)
        return np.concatenate(right)

    def _augment(self, pictures: np.ndarray, strengths: Sequence[int], seed: int) -> np.ndarray:
        return augment_batch(
            pictures, strengths, seed, threads=self.threads, operations=self.operations
        )

    def alter(self, images: Tensor, labels: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, ()).item())
        strengths = training_strengths(
            self.levels, labels.cpu().numpy(), np.random.default_rng(seed), self.probability
        )
        rows = np.flatnonzero(strengths)
        if not len(rows):
            return images
        index = torch.from_numpy(rows).to(images.device)
        pictures = (images[index] * 255).round().to(torch.uint8).cpu().numpy()
        altered = torch.from_numpy(self._augment(pictures, strengths[rows].tolist(), seed)).to(
            images.device
        )
        return images.index_copy(0, index, altered.to(images.dtype) / 255)

    def state(self) -> dict[str, Tensor]:
        return {"levels": torch.from_numpy(self.levels.copy())}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.levels = tensors["levels"].numpy().copy()
