"""LDMLR: diffusion over features (arXiv 2404.04517).

A classifier is trained on the long tail. A small class-conditional diffusion model learns its
penultimate features. The last layer is then trained on real and generated features together.
Features are standardised in each dimension; the released code clamps them to [−1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import class_groups
from ..errors import TrainingError, unknown
from ..models.classifier import normalise
from ..training.augmentation import centre
from ..training.hooks import TrainingContext, TrainingHook, number_within, whole_within
from ..training.image_cache import aspects_of
from ..training.objectives import FLYP

TRAIN_STEPS = 1000
DIFFUSION_RATES = {"adam": 1e-3, "sgd": 1e-4}
"""Default learning rate of each optimizer of the denoiser."""
CLASS_GROUPS = ("many", "medium", "few")


def cosine_alphas(steps: int = TRAIN_STEPS, offset: float = 0.008) -> Tensor:
    """ᾱ_1 … ᾱ_T of the cosine schedule, β ≤ .999 (arXiv 2102.09672, eq. 17), float64 `[steps]`."""
    progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    level = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


class FeatureDenoiser(nn.Module):
    """A residual MLP that predicts x0 from noisy standardised features, times and labels."""

    def __init__(self, features: int, classes: int, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features))

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Clean features `[batch, features]`.

        - `noisy`: `[batch, features]`.
        - `times`, `labels`: `[batch]`.
        """
        half = self.width // 2
        angles = times.float()[:, None] * torch.exp(
            -math.log(10_000) * torch.arange(half, device=noisy.device) / half
        )
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(labels)
        hidden = self.enter(noisy)
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return self.leave(hidden)


def standardise(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(standardised `[rows, features]`, mean `[features]`, standard deviation `[features]`).

    A constant dimension has the standard deviation 1.
    """
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return (features - mean) / std, mean, std


def train_denoiser(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int = 201,
    batch_size: int = 256,
    optimizer: str = "adam",
    lr: float | None = None,
    seed: int = 0,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> FeatureDenoiser:
    """Trains a denoiser to predict x0 at uniform times, by mean squared error.

    The paper uses SGD at 1e-4. The default is Adam at 1e-3: on synthetic features of 20 clusters in
    64 dimensions, 201 epochs of SGD at 1e-4 take the loss from 1.34 to 1.09, and Adam to .15.

    - `features`: standardised, `[rows, features]`.
    - `labels`: `[rows]`.
    - `optimizer`: `adam` or `sgd`.
    - `lr`: learning rate; default that of `DIFFUSION_RATES`.
    - `on_epoch`: called with the mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FeatureDenoiser(features.shape[1], classes).to(features.device)
    rate = DIFFUSION_RATES[optimizer] if lr is None else lr
    stepper: torch.optim.Optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](
        model.parameters(), lr=rate
    )
    alphas = cosine_alphas().float().to(features.device)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            clean = features[rows]
            times = torch.randint(TRAIN_STEPS, (len(rows),), generator=generator).to(
                features.device
            )
            noise = torch.randn(clean.shape, generator=generator).to(features.device)
            alpha = alphas[times, None]
            loss = F.mse_loss(
                model(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, times, labels[rows]), clean
            )
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            total += loss.item() * len(rows)
        on_epoch(total / len(features))
    return model.eval()


def features_to_make(
    class_counts: Sequence[int] | np.ndarray,
    share: float = 0.2,
    at_least: int = 5,
    only: Sequence[int] | None = None,
) -> np.ndarray:
    """Features to generate for each class: max(round(share · n_c), at_least), int64 `[classes]`.

    - `class_counts`: n_c, `[classes]`; 0 gives 0.
    - `only`: labels; the others get 0. Default all.
    """
    known = np.asarray(class_counts)
    counts = np.where(
        known > 0, np.maximum(np.floor(share * known + 0.5).astype(np.int64), at_least), 0
    )
    return counts if only is None else np.where(np.isin(np.arange(len(counts)), only), counts, 0)


@torch.inference_mode()
def sample_features(
    model: FeatureDenoiser, labels: Tensor, features: int, *, steps: int = 50, seed: int = 0
) -> Tensor:
    """Standardised features of `labels` by DDIM (η = 0), `[rows, features]`.

    - `labels`: `[rows]`.
    - `features`: dimensions.
    - `steps`: number of the 1,000 times to use.
    """
    generator = torch.Generator().manual_seed(seed)
    alphas = cosine_alphas().float().to(labels.device)
    x = torch.randn(len(labels), features, generator=generator).to(labels.device)
    times = torch.linspace(TRAIN_STEPS - 1, 0, steps).round().long().tolist()
    for now, following in zip(times, [*times[1:], -1], strict=True):
        clean = model(x, torch.full((len(labels),), now, device=labels.device), labels)
        noise = (x - alphas[now].sqrt() * clean) / (1 - alphas[now]).sqrt()
        alpha = alphas[following] if following >= 0 else torch.ones_like(alphas[0])
        x = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return x


def train_last_layer(
    layer: nn.Linear,
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int = 400,
    batch_size: int = 1024,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    seed: int = 0,
    on_epoch: Callable[[nn.Linear], None] = lambda layer: None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Linear:
    """Trains the last layer in place by Adam and returns it.

    - `features`: real and generated ones together, `[rows, features]`.
    - `labels`: `[rows]`.
    - `loss`: of logits `[batch, classes]` and labels `[batch]`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
        on_epoch(layer)
    return layer


class Ldmlr(TrainingHook):
    """LDMLR after training: trains the last layer further, on real and generated features.

    The loss is the method's, with the class counts of real and generated features together. A
    search varies these arguments only where it names them, as `system.diffusion_lr`.

    - `share`: generated features as a fraction of a class's images, 0 or more.
    - `at_least`: least generated features of a class, 0 or more.
    - `only`: groups of classes, of `many`, `medium` and `few`; default all.
    - `many`, `few`: a class has many images above `many`, and few below `few`.
    - `diffusion_epochs`: epochs of the denoiser, 1 or more.
    - `diffusion_optimizer`: `adam` or `sgd`.
    - `diffusion_lr`: its learning rate; default that of `train_denoiser`.
    - `epochs`: epochs of the last layer, 1 or more.
    - `lr`: its learning rate.

    Raises ValueError for a value out of range.
    """

    def __init__(
        self,
        *,
        share: float = 0.2,
        at_least: int = 5,
        only: str | Sequence[str] | None = None,
        many: int = 100,
        few: int = 20,
        diffusion_epochs: int = 201,
        diffusion_optimizer: str = "adam",
        diffusion_lr: float | None = None,
        epochs: int = 400,
        lr: float = 1e-3,
    ) -> None:
        self.only = None if only is None else [only] if isinstance(only, str) else list(only)
        for group in self.only or []:
            if not isinstance(group, str) or group not in CLASS_GROUPS:
                raise ValueError(unknown("group of classes", str(group), CLASS_GROUPS))
        if not isinstance(diffusion_optimizer, str) or diffusion_optimizer not in DIFFUSION_RATES:
            raise ValueError(
                unknown("diffusion_optimizer", str(diffusion_optimizer), DIFFUSION_RATES)
            )
        self.share = number_within("share", share, 0, 1000)
        self.at_least = whole_within("at_least", at_least, 0, 10**6)
        self.many = whole_within("many", many, 1, 10**8)
        self.few = whole_within("few", few, 1, 10**8)
        self.diffusion_epochs = whole_within("diffusion_epochs", diffusion_epochs, 1, 100_000)
        self.diffusion_optimizer = diffusion_optimizer
        self.diffusion_lr = (
            None
            if diffusion_lr is None
            else number_within("diffusion_lr", diffusion_lr, 1e-12, 1e4)
        )
        self.epochs = whole_within("epochs", epochs, 1, 100_000)
        self.lr = number_within("lr", lr, 1e-12, 1e4)

    def objection(self, objective: str) -> str | None:
        if objective == FLYP:
            return (
                f"it trains the last layer, which objective {FLYP} rebuilds from the texts of the "
                "classes"
            )
        if objective == "ldam":
            return "it trains a linear last layer, and objective ldam has a cosine layer"
        return super().objection(objective)

    def begin(self, context: TrainingContext) -> None:
        """Raises TrainingError where no feature would be generated or no last layer is linear."""
        last_layer(context.state.model)
        counts = _real_counts(context)
        if not self.features(counts).any():
            raise TrainingError(
                f"system ldmlr would generate no feature for classes with {counts.min()} to "
                f"{counts.max()} images: share {self.share:g}, at_least {self.at_least}, only "
                f"{self.only} (many: more than {self.many} images, few: fewer than {self.few})."
            )

    def features(self, class_counts: np.ndarray) -> np.ndarray:
        """Features to generate for each class, int64 `[classes]`."""
        groups = class_groups(class_counts.tolist(), self.many, self.few)
        only = (
            None
            if self.only is None
            else [label for group in self.only for label in groups.get(group, [])]
        )
        return features_to_make(class_counts, self.share, self.at_least, only)

    def finish(self, context: TrainingContext, model: nn.Module) -> np.ndarray:
        layer, pool, seed = last_layer(model), context.pool, context.seed % 2**31
        rows = np.flatnonzero(~pool.synthetic & ~pool.held_out)
        features = read_features(context, model, layer, rows)
        labels = torch.from_numpy(pool.labels[rows]).to(features.device)
        plain, mean, std = standardise(features)
        counts = _real_counts(context)
        wanted = self.features(counts)
        with torch.enable_grad():
            denoiser = train_denoiser(
                plain,
                labels,
                pool.num_classes,
                epochs=self.diffusion_epochs,
                optimizer=self.diffusion_optimizer,
                lr=self.diffusion_lr,
                seed=seed,
            )
            new_labels = torch.from_numpy(np.repeat(np.arange(pool.num_classes), wanted))
            new_labels = new_labels.to(features.device)
            sampled = sample_features(denoiser, new_labels, features.shape[1], seed=seed)
            generated = sampled.clone() * std + mean
            class_counts = torch.as_tensor(
                counts + wanted, dtype=context.state.counts.dtype, device=features.device
            )

            def loss(logits: Tensor, labels: Tensor) -> Tensor:
                return context.state.objective.loss(logits, labels, class_counts, 1.0)

            train_last_layer(
                layer.requires_grad_(True),
                torch.cat([features, generated]),
                torch.cat([labels, new_labels]),
                epochs=self.epochs,
                lr=self.lr,
                seed=seed,
                loss=loss,
            )
        return counts + wanted


def last_layer(model: nn.Module) -> nn.Linear:
    """The linear last layer of a classifier. Raises TrainingError where there is none."""
    layer = getattr(model, "head", None)
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"system ldmlr trains a linear last layer, and a {type(model).__name__} has none; "
            "use head: linear."
        )
    return layer


def _real_counts(context: TrainingContext) -> np.ndarray:
    """Real training images of each class that are not held out, int64 `[classes]`."""
    pool = context.pool
    return np.bincount(pool.labels[~pool.synthetic & ~pool.held_out], minlength=pool.num_classes)


@torch.no_grad()
def read_features(
    context: TrainingContext, model: nn.Module, layer: nn.Module, rows: np.ndarray
) -> Tensor:
    """Inputs of the last layer for the centre crops of rows, float32 `[rows, features]`."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].float()))
    model.eval()
    config, device = context.state.config, context.state.device
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        stored, aspects = (
            context.pixels.__getitems__(part.tolist()),
            aspects_of(context.pixels, part),
        )
        middle = centre(stored.to(device).float() / 255, config.image_size, aspects)
        images = normalise(middle, config)
        model(images.contiguous(memory_format=torch.channels_last))
    hook.remove()
    return torch.cat(caught)
