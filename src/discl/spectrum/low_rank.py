"""Low-rank weights of a network (arXiv 2106.09685): where they are, and the files of adaptation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import BrokenFileError
from ..utils.hashing import derive_seed
from ..utils.stored import read_header, read_json, read_tensors, save_tensors, write_text
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
TOKENS = "-tokens"
"""What the name of a file of class tokens has more than that of the low-rank weights."""
LOSSES = "losses"
"""The tensor of a state with the loss of every step so far."""


class AdapterFiles(NamedTuple):
    """Files of an adaptation: its low-rank weights and its class tokens, None where it has none."""

    weights: Path | None
    tokens: Path | None

    def present(self) -> list[Path]:
        """Those that the adaptation has, the low-rank weights first."""
        return [file for file in self if file is not None]


@dataclass(frozen=True)
class AdapterSettings:
    """How low-rank weights and class tokens are trained.

    - `rank`: rank r of each update; α equals it, so its scale is 1. 0 trains class tokens alone.
    - `steps`: gradient steps, 1 or more.
    - `learning_rate`: of AdamW, constant after the first 5 % of the steps.
    - `batch_size`: images of a step.
    - `layers`: `attention`, or also the convolutions of a UNet's blocks.
    - `flip`: mirror every second image.
    - `prior_weight`: weight of the loss on images of the unadapted generator (DreamBooth,
      arXiv 2208.12242, eq. 2); 0 leaves them out.
    - `gradient_checkpointing`: less memory, about a third slower.
    - `class_tokens`: learned embeddings of each class (arXiv 2208.01618), 0 to 16.
    - `token_learning_rate`: theirs.
    """

    rank: int = 8
    steps: int = 500
    learning_rate: float = 1e-4
    batch_size: int = 4
    layers: Literal["attention", "attention-and-convolutions"] = "attention"
    flip: bool = False
    prior_weight: float = 0.0
    gradient_checkpointing: bool = False
    class_tokens: int = 0
    token_learning_rate: float = 5e-4


def _layers(settings: AdapterSettings) -> tuple[str, ...]:
    return ATTENTION + (CONVOLUTIONS if settings.layers != "attention" else ())


@contextmanager
def low_rank_weights(network: Any, settings: AdapterSettings) -> Iterator[dict[str, nn.Parameter]]:
    """The trained parameters, float32, by name; the network is itself again afterwards.

    With rank 0 the network is frozen, and nothing is added.
    """
    required = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    if settings.rank:
        _add_adapter(network, settings)
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
        if settings.rank:
            network.unload_lora()
        if settings.gradient_checkpointing:
            network.disable_gradient_checkpointing()
        for parameter, wanted in zip(network.parameters(), required, strict=True):
            parameter.requires_grad_(wanted)
        network.eval()


def _add_adapter(network: Any, settings: AdapterSettings) -> None:
    from peft import LoraConfig

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


def adapter_files(target: Path, settings: AdapterSettings) -> AdapterFiles:
    """The files that `train_adapter` writes for `target`."""
    return AdapterFiles(
        target if settings.rank else None, tokens_of(target) if settings.class_tokens else None
    )


def write_adapter(files: AdapterFiles, pointer: Path) -> None:
    """Names the files of an adaptation in a JSON file."""
    names = {"file": files.weights, "tokens": files.tokens}
    present = {kind: file.name for kind, file in names.items() if file is not None}
    write_text(pointer, json.dumps(present) + "\n")


def read_adapter(pointer: Path, folder: Path) -> AdapterFiles:
    """The files that `write_adapter` named.

    - `folder`: where they are.

    Raises BrokenFileError for names of no file of that folder.
    """
    names = read_json(pointer)
    files = {}
    for kind in ("file", "tokens"):
        name = names.get(kind)
        files[kind] = None if name is None else folder / str(name)
        if name is not None and (
            Path(str(name)).name != str(name) or not str(name).endswith(".safetensors")
        ):
            raise BrokenFileError(
                f"{pointer} names '{name!s:.80}', no file of its folder.", pointer
            )
    if not any(files.values()):
        raise BrokenFileError(f"{pointer} names no file.", pointer)
    return AdapterFiles(files["file"], files["tokens"])


def tokens_of(adapter: Path) -> Path:
    """The file beside an adapter with the class tokens that were trained together with it."""
    return adapter.with_name(adapter.stem + TOKENS + adapter.suffix)


def record_of(adapter: Path) -> Path:
    """The JSON file beside an adapter with the settings, losses and seconds of its training.

    - `adapter`: the file of its low-rank weights, or of its class tokens.

    `losses` are `[last step, mean loss]` of up to 50 parts of the training.
    """
    return adapter.with_name(adapter.stem.removesuffix(TOKENS) + ".json")


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
