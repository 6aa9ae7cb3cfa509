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
from .errors import CheckpointError, shorten
from .utils.atomic import is_regular, path_exists
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
    """The local folder of a checkpoint.

    - `address`: a folder, `embedded:NAME/...`, or a hub name such as `owner/name`. Hub names are
      downloaded without pickled files.

    Raises CheckpointError if the folder does not exist, has no safetensors weights, or refers to
    files outside it.
    """
    if address.startswith("embedded:"):
        return _checked(embedded(address), address)
    path = local_path(address)
    if path_exists(path):
        return _checked(path, address)
    if is_hub_name(address):
        return _checked(_download(address), address)
    raise CheckpointError(
        f"there is no checkpoint folder '{_shown(address)}'. Give a folder, a hub name such as "
        "owner/name, or embedded:fashion-mnist/diffusion."
    )


def find_stored_checkpoint(address: str) -> Path:
    """As `find_checkpoint`, but nothing is downloaded.

    For addresses that a trained classifier names, which may come from others: only a folder with a
    config.json is opened.

    Raises CheckpointError for a checkpoint that is not on this machine.
    """
    path = local_path(address)
    if is_regular(path / "config.json"):
        return _checked(path, address)
    if address.startswith("embedded:"):
        return find_checkpoint(address)
    if is_hub_name(address):
        from huggingface_hub import snapshot_download

        with suppress(Exception):
            return _checked(Path(snapshot_download(address, local_files_only=True)), address)
    raise CheckpointError(f"no checkpoint '{_shown(address)}' on this machine")


def _shown(address: str) -> str:
    return shorten(address, 300, quoted=False)


def local_path(address: str) -> Path:
    """The address as a path, with `~` expanded if that user exists."""
    try:
        return Path(address).expanduser()
    except RuntimeError:
        return Path(address)


def is_hub_name(address: str) -> bool:
    """Whether an address without a local file has the form `owner/name` of the hub."""
    return (
        len(address) <= 200 and address.count("/") == 1 and not address.startswith((".", "/", "~"))
    )


def how_to_convert(address: str | Path) -> str:
    """Advice: the command that converts pickled weights to safetensors, and the path of the result.

    - `address`: a folder, a pickled file, or a hub name.
    """
    path = local_path(str(address))
    if path.parent.name == "snapshots":  # the hub's cache, which holds no pickled weights
        address = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        path = Path(address)
    single = path.suffix in PICKLED
    folder = f"{path.stem if single else path.name}-safetensors"
    result = f"{folder}/{path.stem}.safetensors" if single else folder
    return (
        f"convert them once with `discl convert {shlex.quote(str(address))} {shlex.quote(folder)}` "
        f"and use {result} instead"
    )


def find_weights(address: str) -> Path:
    """The local path of a single safetensors file.

    - `address`: a path, or `owner/name/FILE.safetensors` on the hub, which is downloaded.

    Raises CheckpointError for pickled weights, and if the file does not exist.
    """
    path = local_path(address)
    if path.suffix in PICKLED:
        raise CheckpointError(
            f"'{address}' holds pickled weights, which are refused because unpickling runs code. "
            f"To use them, {how_to_convert(address)}."
        )
    if is_regular(path) and path.suffix == ".safetensors":
        return path
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    if (
        path_exists(path)
        or path.suffix != ".safetensors"
        or not file
        or address.startswith((".", "/", "~"))
    ):
        raise CheckpointError(
            f"there is no file '{_shown(address)}'. Give a *.safetensors file, or "
            "owner/name/FILE.safetensors on the hub."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        raise CheckpointError(
            f"'{address}' is not a local file and could not be downloaded: {error}"
        ) from error


def find_beside(address: str, file: Path, name: str) -> Path:
    """The local path of a file in the folder of a weights file, downloaded if necessary.

    - `address`: the address that `find_weights` resolved.
    - `file`: the result of `find_weights`.
    - `name`: name of the other file.

    Raises CheckpointError if the file does not exist.
    """
    beside = file.with_name(name)
    if not beside.is_file() and not local_path(address).exists():
        from huggingface_hub import hf_hub_download

        owner, repository, path = address.split("/", 2)
        with suppress(Exception):
            folder = path.rpartition("/")[0]
            return Path(hf_hub_download(f"{owner}/{repository}", f"{folder}/{name}".lstrip("/")))
    if not beside.is_file():
        raise CheckpointError(
            f"'{address}' needs the {name} of its folder. Put it in the same folder."
        )
    return beside


def find_settings(address: str) -> Path:
    """The local folder of configurations and vocabularies, without weights.

    - `address`: a folder, or a hub name, which is downloaded without weights.

    Raises CheckpointError if the folder does not exist or refers to files outside it.
    """
    path = local_path(address)
    if path_exists(path) and path.is_dir():
        check_folder(path)
        return path
    if path_exists(path) or not is_hub_name(address):
        raise CheckpointError(
            f"there is no folder of configurations '{_shown(address)}'. Give a folder or a hub "
            "name such as owner/name."
        )
    return _download(address, [pattern for pattern in WANTED if "safetensors" not in pattern])


@functools.cache
def settings_digest(folder: Path) -> str:
    """Digest of the configurations and vocabularies of a folder."""
    return digest_files(
        (file for file in folder.rglob("*") if file.suffix in {".json", ".txt", ".model"}), folder
    )


@functools.cache
def weights_digest(file: Path) -> str:
    """Digest of the contents of a file."""
    return digest_file(file)


def public_name(address: str) -> str:
    """The address without local folders: of a local path only the last component."""
    local = Path(address).is_absolute() or address.startswith((".", "~"))
    return Path(address).name if local else address


@functools.cache
def checkpoint_digest(folder: Path) -> str:
    """Digest of configurations, vocabularies and weights.

    Two folders with the same digest generate the same pixels.
    """
    return digest_files(
        (
            file
            for file in folder.rglob("*")
            if file.suffix in {".json", ".txt", ".safetensors", ".model", ".jinja"}
        ),
        folder,
    )


def _download(name: str, wanted: Sequence[str] = WANTED) -> Path:
    """Downloads a hub name and returns its folder."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": UNWANTED}
    if size := _size_to_fetch(name, options):
        logger.info(f"fetching {size / 1e9:.2g} GB of {name} from the hub, this once")
        from .utils.console import shows_bars

        if shows_bars():
            from tqdm import tqdm

            # The hub's own bars are off, because they also appear when nothing is downloaded.
            options["tqdm_class"] = tqdm
    try:
        folder = Path(snapshot_download(name, **options))
        if (
            half := [f"{part}/*.fp16*.safetensors" for part in _weightless(folder)]
            if any("safetensors" in pattern for pattern in wanted)
            else []
        ):
            folder = Path(snapshot_download(name, allow_patterns=half))
        return folder
    except Exception as error:
        raise CheckpointError(
            f"checkpoint '{name}' is not a local folder and could not be downloaded: {error}"
        ) from error


def fetch_pickled(name: str) -> Path:
    """Downloads a hub name for conversion and returns its folder.

    Components without safetensors are downloaded with their pickled weights.

    - `name`: a hub name such as `owner/name`.

    Raises CheckpointError if the download fails.
    """
    from huggingface_hub import snapshot_download

    files = _hub_files(name)
    safe = {file.rpartition("/")[0] for file in files if file.endswith(".safetensors")}
    skipped = [
        f"{folder}/{ending}" if folder else ending
        for folder in safe
        for ending in (f"*{suffix}" for suffix in PICKLED)
    ]
    pickled = ["pytorch_model*.bin", "open_clip_pytorch_model.bin", "*/*.bin"]
    unwanted = [pattern.replace(".safetensors", ".bin") for pattern in UNWANTED]
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
    """File names in a hub repository; none if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name)
    except Exception:
        return []


def _size_to_fetch(name: str, options: Mapping[str, Any]) -> int:
    """Bytes to download; 0 if the hub does not answer, because the download reports it better."""
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
    """Components without weights: some repositories hold them only in half precision."""
    parts = sorted(file.parent for file in folder.glob("*/config.json"))
    return [
        part.name
        for part in parts
        if part.name != "safety_checker" and not any(part.glob("*.safetensors"))
    ]


def _checked(folder: Path, address: str) -> Path:
    """The folder. Raises CheckpointError if it is unsafe or has no safetensors weights."""
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint '{folder}' is a file. Give a folder in the format of diffusers or "
            "transformers."
        )
    check_folder(folder)
    if not any(folder.rglob("*.safetensors")):
        pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLED)
        if not pickled and is_hub_name(address) and not local_path(address).exists():
            pickled = sorted(file for file in _hub_files(address) if file.endswith(PICKLED))
        if pickled:
            raise CheckpointError(
                f"checkpoint '{address}' holds only pickled weights ({', '.join(pickled[:3])}), "
                "which are refused because unpickling runs code. To use them, "
                f"{how_to_convert(address)}."
            )
        raise CheckpointError(
            f"checkpoint '{folder}' holds no weights: no *.safetensors file in it. Download it "
            "again."
        )
    return folder
