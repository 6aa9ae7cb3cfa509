"""LoRA files of every layout: checks them and merges them into a pipeline."""

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

OTHER_ADAPTERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA³",
    "vera_lambda": "VeRA",
}
"""Words in tensors' names, and the kind of adapter that has them."""
PEFT_PREFIX = "base_model.model."
"""Prefix of the names in peft's layout: `adapter_model.safetensors` and `adapter_config.json`."""
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def describe_loras(loras: Sequence[tuple[str, float]]) -> str:
    """What LoRA files add to an image's id: digest and scale of each; empty without any.

    - `loras`: (file or hub name, scale) of each.

    Raises CheckpointError for a missing file, and for other kinds of adapters.
    """
    return " ".join(f"{_identity(path)}*{scale:g}" for path, scale in loras)


def _identity(address: str) -> str:
    file = find_weights(address)
    if not _names(file)[0].startswith(PEFT_PREFIX):
        return weights_digest(file)
    return digest(weights_digest(file), sorted(_peft_settings(address, file).items(), key=str))


def _names(file: Path) -> list[str]:
    """Names of a LoRA's tensors. Raises CheckpointError for a file of another kind of adapter."""
    with loading(file, "a LoRA"), safe_open(file, "pt") as stored:
        names = sorted(stored.keys())
    for sign, kind in OTHER_ADAPTERS.items():
        if found := next((name for name in names if sign in name), None):
            raise CheckpointError(
                f"'{file}' is a {kind} (it holds {found:.100}); only LoRA is read. Merge it into a "
                "checkpoint, or use a LoRA."
            )
    if not any("lora" in name.lower() for name in names):
        raise CheckpointError(
            f"'{file}' is no LoRA: it holds {', '.join(names[:3])[:200] or 'no tensor'}; name the "
            "file of a LoRA."
        )
    return names


def _peft_settings(address: str, file: Path) -> dict[str, Any]:
    """The settings of a LoRA in peft's layout that change an image.

    Raises CheckpointError for settings that are not supported.
    """
    config = read_json(find_beside(address, file, "adapter_config.json"))
    unsupported = [
        key
        for key in ("use_dora", "alpha_pattern", "modules_to_save", "layer_replication")
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        unsupported.append(
            f"peft_type {config.get('peft_type')!r:.40}, bias {config.get('bias')!r:.40}"
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        unsupported.append(f"lora_alpha {alpha!r:.40}")
    if unsupported:
        raise CheckpointError(
            f"'{file}' is an adapter of peft with unsupported settings: {', '.join(unsupported)}. "
            "Merge it into a checkpoint, or save it with save_lora_weights of diffusers."
        )
    return {"lora_alpha": alpha, "use_rslora": bool(config.get("use_rslora"))}


def _read_peft(address: str, file: Path, pipeline: Any) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA in peft's layout, named as in diffusers.

    The scale α / r (arXiv 2106.09685, section 4.1), or α / √r for rsLoRA (arXiv 2312.03732), is
    multiplied into B.
    """
    settings = _peft_settings(address, file)
    stored = {
        name.removeprefix(PEFT_PREFIX): tensor.clone() for name, tensor in load_file(file).items()
    }
    layers = {name.rpartition(".lora_")[0] for name in stored}
    networks = {
        name: part for name in NETWORKS if (part := getattr(pipeline, name, None)) is not None
    }
    found = {
        name: len(layers & {layer for layer, _ in part.named_modules()})
        for name, part in networks.items()
    }
    part = max(found, key=lambda name: found[name])
    if found[part] < len(layers):
        raise CheckpointError(
            f"the LoRA '{file}' has weights for {len(layers)} layers, of which this checkpoint's "
            f"{part} has {found[part]}; it belongs to another family or version."
        )
    for layer in layers:
        rank = stored[f"{layer}.lora_A.weight"].shape[0]
        divisor = math.sqrt(rank) if settings["use_rslora"] else rank
        stored[f"{layer}.lora_B.weight"] *= settings["lora_alpha"] / divisor
    return {f"{part}.{name}": tensor for name, tensor in stored.items()}


def check_peft() -> None:
    """Raises CheckpointError without the package peft, which low-rank weights need."""
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            "LoRA weights need the package peft; install it with pip install 'discl[lora]'."
        )


def add_loras(pipeline: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Merges LoRA weights, each times its scale, into those of a pipeline.

    - `pipeline`: of diffusers; it is changed.
    - `loras`: (file or hub name, scale) of each.

    Raises CheckpointError for a file that does not fit the checkpoint, and where peft is not
    installed.
    """
    if not loras:
        return
    check_peft()
    names = []
    for number, (address, _) in enumerate(loras):
        file, name = find_weights(address), f"lora{number}"
        stored = _names(file)
        with loading(file, "a LoRA"):
            if stored[0].startswith(PEFT_PREFIX):
                converted = _read_peft(address, file, pipeline)
                stored = list(converted)
                pipeline.load_lora_weights(converted, adapter_name=name)
            else:
                pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name
                )
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise CheckpointError(
                f"the LoRA '{file}' fits no layer of this checkpoint; it belongs to another family."
            )
        _check_fit(pipeline.components, file, name, stored)
        names.append(name)
    pipeline.set_adapters(names, [scale for _, scale in loras])
    for part, present in pipeline.get_list_adapters().items():
        # not every file has weights for the network and for each text encoder
        pipeline.fuse_lora(
            components=[part], adapter_names=[name for name in names if name in present]
        )
    pipeline.unload_lora_weights()


def _check_fit(components: Mapping[str, Any], file: Path, name: str, stored: Sequence[str]) -> None:
    """Raises CheckpointError where the network lacks layers that a LoRA has weights for.

    Layers that a text encoder lacks are only reported: a checkpoint may have fewer text encoders
    than the one that a LoRA was trained with, as the SDXL refiner has.
    """
    downward = ("lora_A.weight", "lora.down.weight", "lora_down.weight")
    for texts in (False, True):
        wanted = [
            key
            for key in stored
            if key.endswith(downward) and ("text_encoder" in key or "lora_te" in key) == texts
        ]
        loaded = sum(
            name in getattr(layer, "lora_A", ())
            for part, network in components.items()
            if isinstance(network, torch.nn.Module) and part.startswith("text_encoder") == texts
            for layer in network.modules()
        )
        if loaded >= len(wanted):
            continue
        message = (
            f"the LoRA '{file.name}' has weights for {len(wanted)} layers, {loaded} of which this "
            "checkpoint has"
        )
        if not texts:
            raise CheckpointError(f"{message}; it belongs to another family or version ({file}).")
        logger.warning(f"{message}; the others, of a text encoder, have no effect")
