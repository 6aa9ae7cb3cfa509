"""LDMLR: diffusion over features (arXiv 2404.04517).

A classifier is trained on the long tail; a small class-conditional diffusion model learns its penultimate features; features that
it makes are added to the real ones and only the last layer is trained on. Features are standardised in each dimension (the released
code clamps them to [−1, 1], which cuts off what lies beyond).
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
"""Ways to train the denoiser, each with its learning rate."""
CLASS_GROUPS = ("many", "medium", "few")


def cosine_alphas(steps: int = TRAIN_STEPS, offset: float = 0.008) -> Tensor:
    """ᾱ_1 … ᾱ_T, float64 `[steps]`, of the cosine schedule with β ≤ .999 (arXiv 2102.09672, eq. 17)."""
    progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    level = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


class FeatureDenoiser(nn.Module):
    """Predicts x0 from noisy standardised features `[batch, features]`, times `[batch]` and labels `[batch]`: a residual MLP."""

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
        """Clean features `[batch, features]`."""
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
    """(standardised features `[rows, features]`, mean, standard deviation `[features]`); a dimension that never varies keeps scale 1."""
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return (features - mean) / std, mean, std


def train_denoiser(
    features: Tensor, labels: Tensor, classes: int, *, epochs: int = 201, batch_size: int = 256, optimizer: str = "adam",
    lr: float | None = None, seed: int = 0, on_epoch: Callable[[float], None] = lambda loss: None,
) -> FeatureDenoiser:  # fmt: skip
    """The denoiser of standardised `features` `[rows, features]`, trained to predict x0 at uniformly drawn times (mean squared error).

    `optimizer` is adam or sgd, `lr` its rate, by default that of `DIFFUSION_RATES`. Published is SGD at 1e-4; Adam at 1e-3 is the
    default: on made-up features of 20 clusters in 64 dimensions, 201 epochs of SGD at 1e-4 take the loss from 1.34 to 1.09 and Adam to .15.
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
    """max(round(.20 · n_c), 5) features for each class, int64 `[classes]`; 0 for classes that are not in `only` or have no image."""
    known = np.asarray(class_counts)
    counts = np.where(
        known > 0, np.maximum(np.floor(share * known + 0.5).astype(np.int64), at_least), 0
    )
    return counts if only is None else np.where(np.isin(np.arange(len(counts)), only), counts, 0)


@torch.inference_mode()
def sample_features(
    model: FeatureDenoiser, labels: Tensor, features: int, steps: int = 50, seed: int = 0
) -> Tensor:
    """Standardised features `[rows, features]` of `labels`, by DDIM (η = 0) over `steps` of the 1,000 times."""
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
    layer: nn.Linear, features: Tensor, labels: Tensor, *, epochs: int = 400, batch_size: int = 1024, lr: float = 1e-3,
    weight_decay: float = 1e-5, seed: int = 0, on_epoch: Callable[[nn.Linear], None] = lambda layer: None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Linear:  # fmt: skip
    """The last layer, trained in place by Adam on `features` `[rows, features]`, real and made ones together.

    `loss` is of logits `[batch, classes]` and labels `[batch]`.
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
    """LDMLR after training: diffusion over the features of the real images, made features beside them, the last layer trained anew on both.

    It goes on from the trained last layer, with the method's own loss, whose class counts are those of real and made features together.
    `share` and `at_least` say how many features are made of a class, `only` for which groups of classes: of `many`, `medium` and `few`,
    bounded by more than `many` and fewer than `few` images (null: for all). `diffusion_epochs`, `diffusion_optimizer` (adam or sgd) and
    `diffusion_lr` (null: the optimizer's own, see `train_denoiser`) say how the denoiser, `epochs` and `lr` how the last layer is trained.
    No search varies them unless `compare.tune.methods` names them, as `system.diffusion_lr`.
    """

    def __init__(
        self, *, share: float = 0.2, at_least: int = 5, only: str | Sequence[str] | None = None, many: int = 100, few: int = 20,
        diffusion_epochs: int = 201, diffusion_optimizer: str = "adam", diffusion_lr: float | None = None, epochs: int = 400,
        lr: float = 1e-3,
    ) -> None:  # fmt: skip
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
            return f"it trains the last layer, which objective {FLYP} makes anew from the texts of the classes"
        if objective == "ldam":
            return "it trains a linear last layer, and that of objective ldam is cosines"
        return super().objection(objective)

    def begin(self, context: TrainingContext) -> None:
        """Raises TrainingError where there is nothing that it could do after training."""
        last_layer(context.learner.model)
        counts = _real_counts(context)
        if not self.features(counts).any():
            raise TrainingError(
                f"system ldmlr would make no feature of classes with {counts.min()} to {counts.max()} images: share {self.share:g}, "
                f"at_least {self.at_least}, only {self.only} (many: more than {self.many} images, few: fewer than {self.few})."
            )

    def features(self, class_counts: np.ndarray) -> np.ndarray:
        """How many to make of each class, int64 `[classes]`."""
        groups = class_groups(class_counts.tolist(), self.many, self.few)
        only = (
            None
            if self.only is None
            else [label for group in self.only for label in groups.get(group, [])]
        )
        return features_to_make(class_counts, self.share, self.at_least, only)

    def finish(self, context: TrainingContext, model: nn.Module) -> np.ndarray:
        layer, pool = last_layer(model), context.pool
        rows = np.flatnonzero(~pool.synthetic & ~pool.held_out)
        features = penultimate(context, model, layer, rows)
        labels = torch.from_numpy(pool.labels[rows]).to(features.device)
        plain, mean, std = standardise(features)
        with torch.enable_grad():
            denoiser = train_denoiser(
                plain, labels, pool.num_classes, epochs=self.diffusion_epochs, optimizer=self.diffusion_optimizer, lr=self.diffusion_lr,
                seed=context.seed % 2**31,
            )  # fmt: skip
            counts = _real_counts(context)
            wanted = self.features(counts)
            made_labels = torch.from_numpy(np.repeat(np.arange(pool.num_classes), wanted)).to(
                features.device
            )
            made = (
                sample_features(
                    denoiser, made_labels, features.shape[1], seed=context.seed % 2**31
                ).clone()
                * std
                + mean
            )
            shown = counts + wanted
            class_counts = torch.as_tensor(
                shown, dtype=context.learner.counts.dtype, device=features.device
            )

            def loss(logits: Tensor, labels: Tensor) -> Tensor:
                return context.learner.objective.loss(logits, labels, class_counts, 1.0)

            train_last_layer(
                layer.requires_grad_(True), torch.cat([features, made]), torch.cat([labels, made_labels]), epochs=self.epochs, lr=self.lr,
                seed=context.seed % 2**31, loss=loss,
            )  # fmt: skip
        return shown


def last_layer(model: nn.Module) -> nn.Linear:
    """The linear last layer of a classifier. Raises TrainingError for one that has none."""
    layer = getattr(model, "head", None)
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"system ldmlr trains a linear last layer, which a {type(model).__name__} has not; use head: linear."
        )
    return layer


def _real_counts(context: TrainingContext) -> np.ndarray:
    """Real training images of each class, int64 `[classes]`, without those that are held out."""
    pool = context.pool
    return np.bincount(pool.labels[~pool.synthetic & ~pool.held_out], minlength=pool.num_classes)


@torch.no_grad()
def penultimate(
    context: TrainingContext, model: nn.Module, layer: nn.Module, rows: np.ndarray
) -> Tensor:
    """What enters the last layer, float32 `[rows, features]`, for the centre crops of these rows."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].float()))
    model.eval()
    config, device = context.learner.config, context.learner.device
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
