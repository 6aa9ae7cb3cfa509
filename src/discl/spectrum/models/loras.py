"""LoRA files of every layout: check, and add to a pipeline."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ...checkpoint_checks import loading, read_json
from ...checkpoints import find_beside, find_weights, weights_digest
from ...errors import CheckpointError
from ...utils.hashing import digest
from ...utils.logging import get_logger

logger = get_logger(__name__)

OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT", "ia3_": "IA³", "vera_lambda": "VeRA",
}  # fmt: skip
"""Parts of tensors' names, and the kind of adapter that has them."""
OF_PEFT = "base_model.model."
"""Beginning of the names in peft's own layout, `adapter_model.safetensors` beside an `adapter_config.json`."""
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def describe_loras(loras: Sequence[tuple[str, float]]) -> str:
    """What LoRA weights add to an id: digest and scale of each; empty without any.

    Raises CheckpointError for a missing file, or one of another kind than LoRA.
    """
    return " ".join(f"{_identity(path)}*{scale:g}" for path, scale in loras)


def _identity(address: str) -> str:
    file = find_weights(address)
    if not _names(file)[0].startswith(OF_PEFT):
        return weights_digest(file)
    return digest(weights_digest(file), sorted(_peft_settings(address, file).items(), key=str))


def _names(file: Path) -> list[str]:
    """Names of a LoRA's tensors. Raises CheckpointError for a file of another kind of adapter."""
    with loading(file, "a LoRA"), safe_open(file, "pt") as stored:
        names = sorted(stored.keys())
    for sign, kind in OTHER_KINDS.items():
        if found := next((name for name in names if sign in name), None):
            raise CheckpointError(
                f"'{file}' is a {kind} (it holds {found:.100}); only LoRA is read. Merge it into a checkpoint, or take the LoRA of it."
            )
    if not any("lora" in name.lower() for name in names):
        raise CheckpointError(
            f"'{file}' is no LoRA: it holds {', '.join(names[:3])[:200] or 'no tensor'}; name the file of one."
        )
    return names


def _peft_settings(address: str, file: Path) -> dict[str, Any]:
    """The settings of a LoRA in peft's layout that change a picture. Raises CheckpointError for those that are not read."""
    config = read_json(find_beside(address, file, "adapter_config.json"))
    unread = [
        key
        for key in ("use_dora", "alpha_pattern", "modules_to_save", "layer_replication")
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        unread.append(f"peft_type {config.get('peft_type')!r:.40}, bias {config.get('bias')!r:.40}")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        unread.append(f"lora_alpha {alpha!r:.40}")
    if unread:
        raise CheckpointError(
            f"'{file}' is an adapter of peft with settings that are not read: {', '.join(unread)}. "
            "Merge it into a checkpoint, or save it with save_lora_weights of diffusers."
        )
    return {"lora_alpha": alpha, "use_rslora": bool(config.get("use_rslora"))}


def _of_peft(address: str, file: Path, pipeline: Any) -> dict[str, torch.Tensor]:
    """A LoRA in peft's layout as diffusers names it, its scale α / r (α / √r for rsLoRA) multiplied into the upward half."""
    settings = _peft_settings(address, file)
    stored = {
        name.removeprefix(OF_PEFT): tensor.clone() for name, tensor in load_file(file).items()
    }
    layers = {name.rpartition(".lora_")[0] for name in stored}
    networks = {name: part for name in PARTS if (part := getattr(pipeline, name, None)) is not None}
    found = {
        name: len(layers & {layer for layer, _ in part.named_modules()})
        for name, part in networks.items()
    }
    part = max(found, key=lambda name: found[name])
    if found[part] < len(layers):
        raise CheckpointError(
            f"the LoRA '{file}' has weights for {len(layers)} layers, of which this checkpoint's {part} has {found[part]}; it belongs to "
            "another family or version."
        )
    for layer in layers:
        rank = stored[f"{layer}.lora_A.weight"].shape[0]
        divisor = math.sqrt(rank) if settings["use_rslora"] else rank
        stored[f"{layer}.lora_B.weight"] *= settings["lora_alpha"] / divisor
    return {f"{part}.{name}": tensor for name, tensor in stored.items()}


def add_loras(pipeline: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Adds LoRA weights, each times its scale, to those of a pipeline.

    Raises CheckpointError where a file fits nothing of this checkpoint, or its network only in part, or where peft is
    not installed.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            "LoRA weights need the package peft; install it with pip install 'discl[lora]'."
        )
    names = []
    for number, (address, _) in enumerate(loras):
        file, name = find_weights(address), f"lora{number}"
        held = _names(file)
        with loading(file, "a LoRA"):
            if held[0].startswith(OF_PEFT):
                converted = _of_peft(address, file, pipeline)
                held = list(converted)
                pipeline.load_lora_weights(converted, adapter_name=name)
            else:
                pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name
                )
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise CheckpointError(
                f"the LoRA '{file}' fits nothing of this checkpoint; it belongs to another family."
            )
        _check_fit(pipeline.components, file, name, held)
        names.append(name)
    pipeline.set_adapters(names, [scale for _, scale in loras])
    for part, there in pipeline.get_list_adapters().items():
        # a network, or a text encoder: not every file has weights for each
        pipeline.fuse_lora(
            components=[part], adapter_names=[name for name in names if name in there]
        )
    pipeline.unload_lora_weights()


def _check_fit(components: Mapping[str, Any], file: Path, name: str, held: Sequence[str]) -> None:
    """Raises CheckpointError where the network lacks layers that a LoRA is for; says where a text encoder does.

    A checkpoint may have fewer text encoders than the one that a LoRA was trained with, as the SDXL refiner does.
    """
    downward = ("lora_A.weight", "lora.down.weight", "lora_down.weight")
    for texts in (False, True):
        there = [
            key
            for key in held
            if key.endswith(downward) and ("text_encoder" in key or "lora_te" in key) == texts
        ]
        taken = sum(
            name in getattr(layer, "lora_A", ())
            for part, network in components.items()
            if isinstance(network, torch.nn.Module) and part.startswith("text_encoder") == texts
            for layer in network.modules()
        )
        if taken >= len(there):
            continue
        message = f"the LoRA '{file.name}' has weights for {len(there)} layers, {taken} of which this checkpoint has"
        if not texts:
            raise CheckpointError(f"{message}; it belongs to another family or version ({file}).")
        logger.warning(f"{message}; the others, of a text encoder, have no effect")
