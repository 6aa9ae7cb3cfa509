"""Low-rank weights of a network (arXiv 2106.09685): where they are, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..utils.hashing import derive_seed
from ..utils.stored import read_header, read_tensors, save_tensors, write_text
from .models.interface import LatentModel

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
MOST_LOSSES = 50
"""Mean losses in the record of a training."""
LOSSES = "losses"
"""The tensor of a state with the loss of every step so far."""


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


def _layers(settings: AdapterSettings) -> tuple[str, ...]:
    return ATTENTION + (CONVOLUTIONS if settings.layers != "attention" else ())


@contextmanager
def low_rank_weights(network: Any, settings: AdapterSettings) -> Iterator[dict[str, nn.Parameter]]:
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


def record_of(adapter: Path) -> Path:
    """The JSON file beside an adapter with the settings, losses and seconds of its training.

    `losses` are `[last step, mean loss]` of up to 50 parts of the training.
    """
    return adapter.with_suffix(".json")


def write_record(
    adapter: Path, facts: Mapping[str, Any], losses: Sequence[float], seconds: float
) -> None:
    """Writes the record of a training; `facts` are settings and counts."""
    record = {**facts, "seconds": seconds, "losses": _mean_losses(losses)}
    write_text(record_of(adapter), json.dumps(record, indent=2) + "\n")


def _mean_losses(losses: Sequence[float]) -> list[tuple[int, float]]:
    parts = np.array_split(np.asarray(losses), min(MOST_LOSSES, len(losses)))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return [(end, float(part.mean())) for end, part in zip(ends, parts, strict=True)]


def save_adapter(model: LatentModel, target: Path) -> None:
    """Writes the adapter as diffusers names its tensors: `unet.` or `transformer.` first."""
    from peft.utils import get_peft_model_state_dict

    part = "unet" if hasattr(model, "unet") else "transformer"
    tensors = get_peft_model_state_dict(model.network, adapter_name="adapted")
    named = {f"{part}.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(named, target)


def save_state(
    file: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
    seconds: float,
) -> None:
    tensors = {LOSSES: torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors[f"value.{name}"] = parameter.detach().cpu()
        tensors[f"first.{name}"] = moments["exp_avg"].cpu()
        tensors[f"second.{name}"] = moments["exp_avg_sq"].cpu()
    save_tensors(tensors, file, {"step": str(len(losses)), "seconds": repr(seconds)})


def load_state(
    file: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[list[float], float]:
    """(losses of the finished steps, their seconds) of a killed training; none without a state."""
    if not file.exists() or LOSSES not in read_header(file)[0]:
        return [], 0.0
    wanted = {
        f"{kind}.{name}": tuple(parameter.shape)
        for name, parameter in trained.items()
        for kind in ("value", "first", "second")
    }

    def fits(found: Mapping[str, Sequence[int]]) -> bool:
        shapes = {name: tuple(shape) for name, shape in found.items()}
        return shapes == {**wanted, LOSSES: shapes.get(LOSSES, ())}

    tensors = read_tensors(file, fits=fits)
    losses, header = tensors[LOSSES].tolist(), read_header(file)[1]
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"value.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"first.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
        }
    return losses, float(header.get("seconds", 0))
