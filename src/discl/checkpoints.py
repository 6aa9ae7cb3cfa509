"""Where a checkpoint lies, whether it can be trusted, and what identifies it."""

from __future__ import annotations

import functools
from pathlib import Path

from .assets import embedded
from .digests import digest_files
from .errors import CheckpointError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

WANTED = ["*.json", "*.txt", "*.model", "model.safetensors", "*/*.safetensors"]  # no single-file copies of a whole pipeline
UNWANTED = ["*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*"]


def find_checkpoint(address: str) -> Path:
    """Local folder of `embedded:NAME/...`, of a path, or of a hub name (downloaded without pickled files).

    Raises CheckpointError if there is no such folder, or if it holds weights only in pickled form or none at all.
    """
    if address.startswith("embedded:"):
        return _checked(embedded(address))
    path = Path(address).expanduser()
    if path.exists():
        return _checked(path)
    if address.count("/") == 1 and not address.startswith((".", "/", "~")):
        return _checked(_download(address))
    raise CheckpointError(
        f"there is no checkpoint folder '{address}'; give a folder, a hub name such as owner/name, or embedded:fashion-mnist/diffusion."
    )


@functools.cache
def checkpoint_digest(folder: Path) -> str:
    """Digest of configurations, vocabularies and weights: two folders with the same digest make the same pixels."""
    return digest_files((file for file in folder.rglob("*") if file.suffix in {".json", ".txt", ".safetensors", ".model"}), folder)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:
        raise CheckpointError(f"checkpoint '{name}' is no local folder and could not be downloaded: {error}") from error


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint '{folder}' is a file; a folder in diffusers' or transformers' format is expected.")
    if not any(folder.rglob("*.safetensors")):
        pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLED)
        if pickled:
            raise CheckpointError(
                f"checkpoint '{folder}' holds only pickled weights ({', '.join(pickled[:3])}), which are refused because "
                "unpickling runs code; convert them with save_pretrained(..., safe_serialization=True)."
            )
        raise CheckpointError(f"checkpoint '{folder}' holds no weights: no *.safetensors file was found in it.")
    return folder
