"""Finds checkpoints, checks that they are safe, identifies them."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .assets import embedded
from .checkpoint_checks import check_folder
from .errors import CheckpointError
from .utils.console import shows_bars
from .utils.hashing import digest_file, digest_files
from .utils.logging import get_logger

logger = get_logger(__name__)

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

WANTED = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "*/*.safetensors",
]  # no single-file copies of a whole pipeline
UNWANTED = [
    "*.fp16.safetensors",
    "*.fp16-*.safetensors",
    "*.non_ema.safetensors",
    "*.non_ema-*.safetensors",
    "safety_checker/*",
]


def find_checkpoint(address: str) -> Path:
    """Local folder of `embedded:NAME/...`, of a path, or of a hub name (downloaded without pickled files).

    Raises CheckpointError if there is no such folder, or if it holds weights only in pickled form or none at all.
    """
    if address.startswith("embedded:"):
        return _checked(embedded(address), address)
    path = local_path(address)
    if path.exists():
        return _checked(path, address)
    if is_hub_name(address):
        return _checked(_download(address), address)
    raise CheckpointError(
        f"there is no checkpoint folder '{address}'; give a folder, a hub name such as owner/name, or embedded:fashion-mnist/diffusion."
    )


def local_path(address: str) -> Path:
    """The address as a path, `~` replaced where there is such a user."""
    try:
        return Path(address).expanduser()
    except RuntimeError:
        return Path(address)


def is_hub_name(address: str) -> bool:
    """Whether an address that is no path of this machine may be `owner/name` on the hub."""
    return address.count("/") == 1 and not address.startswith((".", "/", "~"))


def how_to_convert(address: str | Path) -> str:
    """The command that makes safetensors of pickled weights, and what to do with its result."""
    path = local_path(str(address))
    if path.parent.name == "snapshots":  # the hub's cache, which holds no pickled weights
        address = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        path = Path(address)
    folder = f"{path.stem if path.suffix in PICKLED else path.name}-safetensors"
    return (
        f"convert them once with `discl convert {shlex.quote(str(address))} {shlex.quote(folder)}` "
        f"and name {folder} in its place"
    )


def find_weights(address: str) -> Path:
    """The single safetensors file at a path, or at `owner/name/FILE.safetensors` on the hub. Raises CheckpointError for others."""
    path = local_path(address)
    if path.suffix in PICKLED:
        raise CheckpointError(
            f"'{address}' holds pickled weights, which are refused because unpickling runs code; "
            f"{how_to_convert(address)}/{path.stem}.safetensors."
        )
    if path.is_file() and path.suffix == ".safetensors":
        return path
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    if (
        path.exists()
        or path.suffix != ".safetensors"
        or not file
        or address.startswith((".", "/", "~"))
    ):
        raise CheckpointError(
            f"there is no file '{address}'; give a *.safetensors file, or owner/name/FILE.safetensors on the hub."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        raise CheckpointError(
            f"'{address}' is no local file and could not be downloaded: {error}"
        ) from error


def find_beside(address: str, file: Path, name: str) -> Path:
    """The file `name` beside one that `find_weights` found, of the hub where that is from there. Raises CheckpointError."""
    beside = file.with_name(name)
    if not beside.is_file() and not local_path(address).exists():
        from huggingface_hub import hf_hub_download

        owner, repository, path = address.split("/", 2)
        with suppress(Exception):
            folder = path.rpartition("/")[0]
            return Path(hf_hub_download(f"{owner}/{repository}", f"{folder}/{name}".lstrip("/")))
    if not beside.is_file():
        raise CheckpointError(f"'{address}' needs the {name} that belongs to it; put it beside.")
    return beside


def find_settings(address: str) -> Path:
    """A folder of configurations and vocabularies, local or a hub name, of which no weights are fetched. Raises CheckpointError."""
    path = local_path(address)
    if path.is_dir():
        check_folder(path)
        return path
    if path.exists() or not is_hub_name(address):
        raise CheckpointError(
            f"there is no folder of configurations '{address}'; give a folder or a hub name such as owner/name."
        )
    return _download(address, [pattern for pattern in WANTED if "safetensors" not in pattern])


@functools.cache
def settings_digest(folder: Path) -> str:
    """Digest of configurations and vocabularies alone."""
    return digest_files(
        (file for file in folder.rglob("*") if file.suffix in {".json", ".txt", ".model"}), folder
    )


@functools.cache
def weights_digest(file: Path) -> str:
    """Digest of one file's contents."""
    return digest_file(file)


def public_name(address: str) -> str:
    """The address without the folders of this machine: of a local path only its last name."""
    local = Path(address).is_absolute() or address.startswith((".", "~"))
    return Path(address).name if local else address


@functools.cache
def checkpoint_digest(folder: Path) -> str:
    """Digest of configurations, vocabularies and weights: two folders with the same digest make the same pixels."""
    return digest_files(
        (
            file
            for file in folder.rglob("*")
            if file.suffix in {".json", ".txt", ".safetensors", ".model", ".jinja"}
        ),
        folder,
    )


def _download(name: str, wanted: Sequence[str] = WANTED) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": UNWANTED}
    if size := _size_to_fetch(name, options):
        logger.info(f"fetching {size / 1e9:.2g} GB of {name} from the hub, this once")
        if shows_bars():
            from tqdm import tqdm

            options["tqdm_class"] = (
                tqdm  # the hub's own bars are off, for they come also where nothing is fetched
            )
    try:
        folder = Path(snapshot_download(name, **options))
        if (
            half := [f"{part}/*.fp16*.safetensors" for part in _weightless(folder)]
            if any("safetensors" in each for each in wanted)
            else []
        ):
            folder = Path(snapshot_download(name, allow_patterns=half))
        return folder
    except Exception as error:
        raise CheckpointError(
            f"checkpoint '{name}' is no local folder and could not be downloaded: {error}"
        ) from error


def fetch_pickled(name: str) -> Path:
    """A hub name's folder with configurations and, where a part has no safetensors, its pickled weights: for conversion only.

    Raises CheckpointError where it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    files = _hub_files(name)
    safe = {file.rpartition("/")[0] for file in files if file.endswith(".safetensors")}
    skipped = [
        f"{folder}/{ending}" if folder else ending
        for folder in safe
        for ending in (f"*{each}" for each in PICKLED)
    ]
    pickled = ["pytorch_model*.bin", "open_clip_pytorch_model.bin", "*/*.bin"]
    unwanted = [each.replace(".safetensors", ".bin") for each in UNWANTED]
    options: dict[str, Any] = {
        "allow_patterns": [*WANTED, *pickled],
        "ignore_patterns": [*UNWANTED, *unwanted, *skipped],
    }
    if size := _size_to_fetch(name, options):
        logger.info(f"fetching {size / 1e9:.2g} GB of {name} from the hub, this once")
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:
        raise CheckpointError(f"checkpoint '{name}' could not be downloaded: {error}") from error


def _hub_files(name: str) -> list[str]:
    """Names of the files of a hub name; none where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name)
    except Exception:
        return []


def _size_to_fetch(name: str, options: Mapping[str, Any]) -> int:
    """Bytes that are not here yet; 0 as well where the hub does not answer, which the download itself tells better."""
    from huggingface_hub import snapshot_download

    try:
        return sum(
            file.file_size
            for file in snapshot_download(name, dry_run=True, **options)
            if file.will_download
        )
    except Exception:
        return 0


def _weightless(folder: Path) -> list[str]:
    """Parts of a generator that were downloaded without weights: some repositories hold them in half precision only."""
    parts = sorted(file.parent for file in folder.glob("*/config.json"))
    return [
        part.name
        for part in parts
        if part.name != "safety_checker" and not any(part.glob("*.safetensors"))
    ]


def _checked(folder: Path, address: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint '{folder}' is a file; a folder in diffusers' or transformers' format is expected."
        )
    check_folder(folder)
    if not any(folder.rglob("*.safetensors")):
        pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLED)
        if not pickled and is_hub_name(address) and not local_path(address).exists():
            pickled = sorted(file for file in _hub_files(address) if file.endswith(PICKLED))
        if pickled:
            raise CheckpointError(
                f"checkpoint '{address}' holds only pickled weights ({', '.join(pickled[:3])}), which are refused because "
                f"unpickling runs code; {how_to_convert(address)}."
            )
        raise CheckpointError(
            f"checkpoint '{folder}' holds no weights: no *.safetensors file was found in it."
        )
    return folder
