"""Low-rank weights and class tokens that teach a generator the domain of the real images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError, TrainingError
from ..utils.hashing import derive_seed
from .low_rank import (
    AdapterSettings,
    load_state,
    low_rank_weights,
    save_adapter,
    save_state,
    tokens_of,
    write_record,
)
from .models.class_tokens import save_class_tokens, trained_tokens, write_prompts
from .models.interface import Conditioning, LatentModel
from .models.loras import check_peft
from .oom import call_halving, is_out_of_memory

FLUX_GUIDANCE = 3.5
"""Guidance scale that a guidance-distilled network is trained with; the default of diffusers."""
MOST_KNOWN = 1000
"""Texts whose conditioning is held; that of SDXL takes 630 kB in float32."""
SAVE_EVERY = 50


@dataclass(frozen=True)
class AdapterImages:
    """The images to learn from.

    - `load`: uint8 pixels `[height, width, 3]` of row i, all of one size.
    - `labels`: int64 `[rows]`; every class is drawn equally often.
    - `texts`: the prompts of each row; one is drawn each time.
    """

    load: Callable[[int], np.ndarray]
    labels: np.ndarray
    texts: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Latents:
    """Scaled posteriors of images on the CPU: `mean` and `std` `[rows, c, h, w]`."""

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor, noise: Tensor, device: torch.device) -> Tensor:
        return (self.mean[rows] + self.std[rows] * noise).to(device)


@dataclass(frozen=True)
class _Source:
    """Images with their latents, and the weight of their loss.

    - `texts`: of each row, as the text encoders get them.
    - `known`: conditioning of every text, one row each; None where class tokens learn or texts are
      many, so that those drawn are encoded in each step.
    """

    images: AdapterImages
    latents: _Latents
    weight: float
    texts: Sequence[Sequence[str]]
    known: Mapping[str, Conditioning] | None


def adaptation_loss(
    model: LatentModel,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Loss of one batch: that of diffusers' training scripts for the family.

    For diffusion models ‖ε − ε_θ(z_t, t, c)‖² (or v), as in `train_text_to_image_lora.py`; for flow
    models ‖(ε − z) − v_θ‖² with σ = t / 1000, as in `train_dreambooth_lora_flux.py`.

    - `latents`: scaled latents z `[batch, c, h, w]`, float32.
    - `conditioning`: of the prompts, one row each.
    - `noise`: ε, of the shape of `latents`.
    - `timesteps`: `[batch]`, integers from 0 for diffusion, 0 to 1000 for flows.

    Returns the mean over all elements, a scalar.
    """
    scheduler = model.scheduler
    if hasattr(scheduler, "add_noise"):
        noisy = scheduler.add_noise(latents, noise, timesteps)
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = latents
    else:
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
    return F.mse_loss(model.predict(noisy, timesteps, conditioning), target)


def train_adapter(
    model: LatentModel,
    images: AdapterImages,
    settings: AdapterSettings,
    target: Path,
    *,
    seed: int = 0,
    prior: AdapterImages | None = None,
    names: Sequence[str] = (),
    progress: Callable[[int], None] = lambda steps: None,
) -> Path:
    """Trains low-rank weights, class tokens or both on real images; writes them as diffusers does.

    The state is saved beside `target` every 50 steps, so that a killed training continues; what
    each step draws depends on (`seed`, step) alone. The weights of `model` are left as they were.
    Where memory runs out, a batch is computed in halves, with the same gradient up to rounding.

    - `model`: a loaded generator, of Stable Diffusion 1.x, 2.x, SDXL, or a flow family.
    - `images`: the real training images. At least two.
    - `target`: the safetensors file to write, for `spectrum.loras` and `load_generator`. Beside it
      `tokens_of(target)` holds class tokens, and `record_of(target)` settings, losses and seconds.
    - `prior`: images of the unadapted generator, where `settings.prior_weight` is above 0.
    - `names`: the name of each class in prompts, where `settings.class_tokens` is above 0.
    - `progress`: is given the number of finished steps.

    Raises DataError for fewer than two images, a name without tokens and class tokens that a
    prompt has no room for; CheckpointError without the package peft, and for class tokens of a
    family that takes none; TrainingError where memory does not suffice for one image, or the loss
    is not finite.
    """
    check_images(len(images.labels))
    if settings.rank:
        check_peft()
    state = target.with_name(target.stem + "-state.safetensors")
    with (
        _memory(),
        low_rank_weights(model.network, settings) as weights,
        trained_tokens(model, names, settings.class_tokens) as tokens,
    ):
        sources = _make_sources(model, images, prior, settings)
        trained = {**weights, **{f"tokens.{part}": rows for part, rows in tokens.items()}}
        optimizer = _make_optimizer(weights, tokens, settings)
        losses, seconds = load_state(state, trained, optimizer)
        started, rows = time.perf_counter() - seconds, settings.batch_size
        for step in range(len(losses), settings.steps):
            batches = []
            for number, source in enumerate(sources):
                rng = torch.Generator().manual_seed(derive_seed("adapt", seed, number, step))
                batches.append((source, _draw(model, source, settings, rng=rng)))
            loss, rows = _compute_gradients(model, batches, optimizer, settings, rows)
            _take_step(optimizer, loss, step, settings)
            losses.append(float(loss))
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < settings.steps:
                save_state(state, trained, optimizer, losses, time.perf_counter() - started)
            progress(1)
        facts = {
            **asdict(settings),
            "seed": seed,
            "images": len(images.labels),
            "classes": len(np.unique(images.labels)),
            "values": sum(parameter.numel() for parameter in trained.values()),
        }
        write_record(target, facts, losses, time.perf_counter() - started)
        if model.class_tokens is not None:
            save_class_tokens(tokens_of(target), model.class_tokens, tokens)
        if settings.rank:
            save_adapter(model, target)
    state.unlink(missing_ok=True)
    return target


def check_images(count: int) -> None:
    """Raises DataError for fewer than two images."""
    if count < 2:
        raise DataError(
            f"{count} image: the generator would learn that one by heart; "
            "give at least two, or train none.",
            argument="images",
        )


def _make_sources(
    model: LatentModel,
    images: AdapterImages,
    prior: AdapterImages | None,
    settings: AdapterSettings,
) -> list[_Source]:
    """The real images, then those of the generator. Only prompts of the real ones have tokens."""
    texts, known = images.texts, None
    if model.class_tokens is None:
        known = _encode_texts(model, texts)
    else:
        texts = write_prompts(model, texts, images.labels.tolist())
    sources = [_Source(images, _encode(model, images), 1.0, texts, known)]
    if prior is not None and settings.prior_weight:
        known = _encode_texts(model, prior.texts)
        weight = settings.prior_weight
        sources.append(_Source(prior, _encode(model, prior), weight, prior.texts, known))
    return sources


def _make_optimizer(
    weights: Mapping[str, Tensor], tokens: Mapping[str, Tensor], settings: AdapterSettings
) -> torch.optim.Optimizer:
    """AdamW with a `peak` rate for each group. Tokens that are not drawn stay as they are."""
    groups: list[dict[str, Any]] = []
    if weights:
        groups.append({"params": list(weights.values()), "peak": settings.learning_rate})
    if tokens:
        rate = settings.token_learning_rate
        groups.append({"params": list(tokens.values()), "peak": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups)


def _compute_gradients(
    model: LatentModel,
    batches: Sequence[tuple[_Source, dict[str, Any]]],
    optimizer: torch.optim.Optimizer,
    settings: AdapterSettings,
    rows: int,
) -> tuple[Tensor, int]:
    """(loss, rows of a call from now on); leaves the gradients at the parameters.

    - `batches`: each source with what `_draw` drew of it.
    - `rows`: of a call. The mean over a batch is that over its parts, weighted by their rows.
    """

    def compute(size: int) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=model.device)
        for first in range(0, settings.batch_size, size):
            part = slice(first, min(first + size, settings.batch_size))
            loss = torch.zeros((), device=model.device)
            for source, drawn in batches:
                rows_of = {name: values[part] for name, values in drawn.items()}
                conditioning = _condition(model, source, rows_of.pop("texts"))
                batch_loss = adaptation_loss(model, conditioning=conditioning, **rows_of)
                loss = loss + source.weight * batch_loss
            loss = loss * ((part.stop - part.start) / settings.batch_size)
            loss.backward()
            total = total + loss.detach()
        return total

    def on_halved(size: int) -> None:
        nonlocal rows
        rows = size

    checkpointing = "" if settings.gradient_checkpointing else "gradient_checkpointing: true, "
    loss = call_halving(
        compute,
        rows,
        on_halved,
        where="network with gradients",
        advice=f"use {checkpointing}smaller images, dtype bfloat16, or a device with more memory. "
        "The last saved step is kept.",
        error=TrainingError,
    )
    return loss, rows


def _condition(model: LatentModel, source: _Source, texts: Sequence[str]) -> Conditioning:
    """Conditioning of texts of a source, one row each."""
    if source.known is None:
        with torch.set_grad_enabled(model.class_tokens is not None):
            conditioning = model.encode_texts(texts)
    else:
        rows = [source.known[text] for text in texts]
        conditioning = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
    if model.distilled:
        conditioning["guidance_scale"] = torch.full((len(texts),), FLUX_GUIDANCE).to(model.device)
    return conditioning


def _take_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, step: int, settings: AdapterSettings
) -> None:
    """One step of the optimizer. The rate rises over the first 5 % of the steps."""
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss of the adaptation is {loss.item()} at step {step}; lower the learning "
            "rate, or use float32.",
            argument="learning_rate" if settings.rank else "token_learning_rate",
        )
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, settings.steps // 20))
    optimizer.step()


@torch.no_grad()
def _encode(model: LatentModel, images: AdapterImages) -> _Latents:
    """Posteriors of all images, each encoded once."""
    means, stds = [], []
    for row in range(len(images.labels)):
        pixels = torch.from_numpy(np.ascontiguousarray(images.load(row))).permute(2, 0, 1)[None]
        mean, std = model.autoencoder.posterior(pixels.float() / 127.5 - 1)
        means.append(mean.cpu())
        stds.append(std.cpu())
    return _Latents(torch.cat(means), torch.cat(stds))


@torch.no_grad()
def _encode_texts(
    model: LatentModel, texts: Sequence[Sequence[str]]
) -> Mapping[str, Conditioning] | None:
    """Conditioning of every text, one row each; None for more than `MOST_KNOWN`, as of captions."""
    wanted = sorted({text for each in texts for text in each})
    if len(wanted) > MOST_KNOWN:
        return None
    return {text: model.encode_texts([text]) for text in wanted}


def _draw(
    model: LatentModel,
    source: _Source,
    settings: AdapterSettings,
    *,
    rng: torch.Generator,
) -> dict[str, Any]:
    """Texts and the other arguments of `adaptation_loss` for one batch.

    Classes are drawn equally often.
    """
    images, latents = source.images, source.latents
    labels = torch.from_numpy(np.unique(images.labels))
    rows = []
    for label in labels[torch.randint(len(labels), (settings.batch_size,), generator=rng)].tolist():
        own = np.flatnonzero(images.labels == label)
        rows.append(int(own[int(torch.randint(len(own), (), generator=rng))]))
    chosen = torch.tensor(rows)
    shape = (len(rows), *latents.mean.shape[1:])
    clean = latents.draw(chosen, torch.randn(shape, generator=rng), model.device)
    if settings.flip:
        mirrored = torch.rand(len(rows), generator=rng) < 0.5
        clean = torch.where(mirrored.to(clean.device)[:, None, None, None], clean.flip(-1), clean)
    picked = []
    for row in rows:
        own_texts = source.texts[row]
        picked.append(own_texts[int(torch.randint(len(own_texts), (), generator=rng))])
    noise = torch.randn(shape, generator=rng).to(model.device)
    scheduler = model.scheduler
    if hasattr(scheduler, "add_noise"):
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(rows),), generator=rng)
    else:
        timesteps = 1000 * torch.sigmoid(torch.randn(len(rows), generator=rng))
    return {
        "latents": clean,
        "texts": picked,
        "noise": noise,
        "timesteps": timesteps.to(model.device),
    }


@contextmanager
def _memory() -> Iterator[None]:
    """Turns memory that runs out besides the steps, such as in the VAE, into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out while images and texts were encoded; use smaller images, dtype "
            "bfloat16, or a device with more memory."
        ) from error
