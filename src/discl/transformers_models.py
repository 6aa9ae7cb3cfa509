"""Finds models in transformers' format, and loads them without code or missing weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from .checkpoint_checks import check_loaded, check_tokenizer, read_json, read_preprocessing
from .checkpoints import find_checkpoint
from .errors import CheckpointError


def find_model(address: str, families: Collection[str], *, what: str, advice: str) -> Path:
    """Folder of a model that takes images and texts.

    - `address`: a folder, a hub name, or `embedded:...`.
    - `families`: the accepted values of `model_type`.
    - `what`: what the folder is expected to be, for messages.
    - `advice`: what to use instead of a model of another family.

    Raises CheckpointError for a model of another family and for missing files.
    """
    folder = find_checkpoint(address)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if read_preprocessing(folder) is None:
        missing.append("preprocessor_config.json or processor_config.json")
    if missing:
        raise CheckpointError(
            f"'{folder}' is no {what} in transformers' format: it has no "
            f"{' and no '.join(missing)}.",
            argument="address",
        )
    family = read_json(folder / "config.json").get("model_type")
    if not isinstance(family, str) or family not in families:
        raise CheckpointError(
            f"'{folder}' holds a model of the family '{family!s:.80}'; {advice}",
            argument="address",
        )
    check_tokenizer(folder)
    return folder


def load_model(network: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder, from safetensors, with exactly the tensors of its configuration.

    - `network`: a class of transformers with `from_pretrained`.

    Raises CheckpointError for missing, surplus or other tensors.
    """
    model, info = network.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    check_loaded(folder, info)
    return model
