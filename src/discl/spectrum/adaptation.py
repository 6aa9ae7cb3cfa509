"""Low-rank weights that teach a generator the domain of the real images (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError, TrainingError
from ..utils.hashing import derive_seed
from ..utils.stored import read_header, read_tensors, save_tensors
from .models.interface import Conditioning, LatentModel
from .models.loras import check_peft

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""Projections of attention, in UNets and in transformers."""
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "time_emb_proj")
"""Further layers of a UNet's blocks."""
FLUX_GUIDANCE = 3.5
"""Guidance scale that a guidance-distilled network is trained with; the default of diffusers."""
SAVE_EVERY = 50


@dataclass(frozen=True)
class AdapterSettings:
    """How low-rank weights are trained.

    - `rank`: rank r of each update, 1 or more; α equals it, so its scale is 1.
    - `steps`: gradient steps, 1 or more.
    - `learning_rate`: of AdamW, constant after the first 5 % of the steps.
    - `batch_size`: images of a step.
    - `layers`: `attention`, or also the convolutions of a UNet's blocks.
    - `flip`: mirror every second image.
    - `prior_weight`: weight of the loss on images of the unadapted generator (DreamBooth,
      arXiv 2208.12242, eq. 2); 0 leaves them out.
    - `gradient_checkpointing`: less memory, about a third slower.
    """

    rank: int = 8
    steps: int = 500
    learning_rate: float = 1e-4
    batch_size: int = 4
    layers: Literal["attention", "attention-and-convolutions"] = "attention"
    flip: bool = False
    prior_weight: float = 0.0
    gradient_checkpointing: bool = False


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
    """Images with their latents, and the weight of their loss."""

    images: AdapterImages
    latents: _Latents
    weight: float


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
    scheduler: Any = model.scheduler  # type: ignore[attr-defined]
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
    progress: Callable[[int], None] = lambda steps: None,
) -> Path:
    """Trains low-rank weights on real images and writes them in diffusers' layout.

    The state is saved beside `target` every 50 steps, so that a killed training continues; what
    each step draws depends on (`seed`, step) alone. The weights of `model` are left as they were.

    - `model`: a loaded generator, of Stable Diffusion 1.x, 2.x, SDXL, or a flow family.
    - `images`: the real training images. At least two.
    - `target`: the safetensors file to write, for `spectrum.loras` and `load_generator`.
    - `prior`: images of the unadapted generator, where `settings.prior_weight` is above 0.
    - `progress`: is given the number of finished steps.

    Raises DataError for fewer than two images, CheckpointError without the package peft, and
    TrainingError where memory runs out or the loss is not finite.
    """
    if len(images.labels) < 2:
        raise DataError(
            f"{len(images.labels)} image: low-rank weights would learn that one by heart; "
            "give at least two, or train none.",
            argument="images",
        )
    check_peft()
    weighted = [(images, 1.0)]
    if prior is not None and settings.prior_weight:
        weighted.append((prior, settings.prior_weight))
    state = target.with_name(target.stem + "-state.safetensors")
    with _memory(settings), _adapter(model.network, settings) as trained:
        texts = _encode_texts(model, [each for each, _ in weighted])
        sources = [_Source(each, _encode(model, each), weight) for each, weight in weighted]
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate)
        for step in range(_load_state(state, trained, optimizer), settings.steps):
            loss = torch.zeros((), device=model.device)
            for number, source in enumerate(sources):
                rng = torch.Generator().manual_seed(derive_seed("adapt", seed, number, step))
                drawn = _draw(model, source, texts, settings, rng=rng)
                loss = loss + source.weight * adaptation_loss(model, **drawn)
            _take_step(optimizer, loss, step, settings)
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < settings.steps:
                _save_state(state, trained, optimizer, step + 1)
            progress(1)
        _save_adapter(model, target)
    state.unlink(missing_ok=True)
    return target


def _take_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, step: int, settings: AdapterSettings
) -> None:
    """One step of the optimizer. The rate rises over the first 5 % of the steps."""
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss of the low-rank weights is {loss.item()} at step {step}; lower the learning "
            "rate, or use float32.",
            argument="learning_rate",
        )
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.steps // 20))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def count_adapter(model: LatentModel, settings: AdapterSettings) -> int:
    """Number of trained values of an adapter for this model."""
    wanted = _layers(settings)
    total = 0
    for name, layer in model.network.named_modules():
        if any(name == end or name.endswith("." + end) for end in wanted):
            if isinstance(layer, nn.Linear):
                total += settings.rank * (layer.in_features + layer.out_features)
            elif isinstance(layer, nn.Conv2d):
                size = layer.kernel_size[0] * layer.kernel_size[1]
                total += settings.rank * (layer.in_channels * size + layer.out_channels)
    return total


def _layers(settings: AdapterSettings) -> tuple[str, ...]:
    return ATTENTION + (CONVOLUTIONS if settings.layers != "attention" else ())


@contextmanager
def _adapter(network: Any, settings: AdapterSettings) -> Iterator[dict[str, nn.Parameter]]:
    """The trained parameters, float32, by name; the network is itself again afterwards."""
    from peft import LoraConfig

    required = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("adapter"))
        network.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.rank,
                init_lora_weights="gaussian",
                target_modules=list(_layers(settings)),
            ),
            adapter_name="adapted",
        )
    trained = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained[name] = parameter
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
        network.train()
    try:
        yield trained
    finally:
        network.unload_lora()
        if settings.gradient_checkpointing:
            network.disable_gradient_checkpointing()
        for parameter, wanted in zip(network.parameters(), required, strict=True):
            parameter.requires_grad_(wanted)
        network.eval()


@torch.no_grad()
def _encode(model: LatentModel, images: AdapterImages) -> _Latents:
    """Posteriors of all images, each encoded once."""
    means, stds = [], []
    for row in range(len(images.labels)):
        pixels = torch.from_numpy(np.ascontiguousarray(images.load(row))).permute(2, 0, 1)[None]
        autoencoder: Any = model.autoencoder  # type: ignore[attr-defined]
        mean, std = autoencoder.posterior(pixels.float() / 127.5 - 1)
        means.append(mean.cpu())
        stds.append(std.cpu())
    return _Latents(torch.cat(means), torch.cat(stds))


@torch.no_grad()
def _encode_texts(
    model: LatentModel, sources: Sequence[AdapterImages]
) -> Mapping[str, Conditioning]:
    """Conditioning of every text, one row each."""
    wanted = sorted({text for source in sources for texts in source.texts for text in texts})
    return {text: model.encode_texts([text]) for text in wanted}


def _draw(
    model: LatentModel,
    source: _Source,
    texts: Mapping[str, Conditioning],
    settings: AdapterSettings,
    *,
    rng: torch.Generator,
) -> dict[str, Any]:
    """The arguments of `adaptation_loss` for one batch. Classes are drawn equally often."""
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
        own_texts = images.texts[row]
        picked.append(own_texts[int(torch.randint(len(own_texts), (), generator=rng))])
    rows_of = [texts[text] for text in picked]
    conditioning = {name: torch.cat([each[name] for each in rows_of]) for name in rows_of[0]}
    if model.distilled:
        conditioning["guidance_scale"] = torch.full((len(rows),), FLUX_GUIDANCE).to(model.device)
    noise = torch.randn(shape, generator=rng).to(model.device)
    scheduler: Any = model.scheduler  # type: ignore[attr-defined]
    if hasattr(scheduler, "add_noise"):
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(rows),), generator=rng)
    else:
        timesteps = 1000 * torch.sigmoid(torch.randn(len(rows), generator=rng))
    return {
        "latents": clean,
        "conditioning": conditioning,
        "noise": noise,
        "timesteps": timesteps.to(model.device),
    }


def _save_adapter(model: LatentModel, target: Path) -> None:
    """Writes the adapter as diffusers names its tensors: `unet.` or `transformer.` first."""
    from peft.utils import get_peft_model_state_dict

    part = "unet" if hasattr(model, "unet") else "transformer"
    tensors = get_peft_model_state_dict(model.network, adapter_name="adapted")
    named = {f"{part}.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(named, target)


def _save_state(
    file: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors = {}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors[f"value.{name}"] = parameter.detach().cpu()
        tensors[f"first.{name}"] = moments["exp_avg"].cpu()
        tensors[f"second.{name}"] = moments["exp_avg_sq"].cpu()
    save_tensors(tensors, file, {"step": str(step)})


def _load_state(
    file: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """The step at which a killed training continues; 0 without a state."""
    if not file.exists():
        return 0
    step = int(read_header(file)[1].get("step", 0))
    wanted = {
        f"{kind}.{name}": tuple(parameter.shape)
        for name, parameter in trained.items()
        for kind in ("value", "first", "second")
    }
    tensors = read_tensors(
        file, fits=lambda found: {name: tuple(shape) for name, shape in found.items()} == wanted
    )
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"value.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"first.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
        }
    return step


@contextmanager
def _memory(settings: AdapterSettings) -> Iterator[None]:
    """Names the settings that need less memory where it runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = "" if settings.gradient_checkpointing else ", or gradient_checkpointing: true"
        raise TrainingError(
            f"memory ran out at batch size {settings.batch_size}; use "
            f"{max(1, math.ceil(settings.batch_size / 2))}{hint}. The last saved step is kept.",
            argument="batch_size",
        ) from error
