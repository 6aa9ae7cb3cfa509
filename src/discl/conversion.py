"""`discl convert`: pickled checkpoints to safetensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from .checkpoints import PICKLED, fetch_pickled, is_hub_name, local_path
from .errors import CheckpointError
from .utils.counts import count_of
from .utils.logging import get_logger

logger = get_logger(__name__)

COPIED = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""Suffixes of files copied with the pickled weights; Python modules are not among them."""
NO_WEIGHTS = (
    "training_args*", "optimizer*", "scheduler*", "rng_state*", "random_states*", "scaler*",
)  # fmt: skip
"""Patterns of pickled training state, which holds no weights of the network."""
USUAL = ("pytorch_model", "diffusion_pytorch_model")
SECONDS, SECONDS_PER_GB = 600.0, 120.0
"""Default time limit of the process that unpickles, in seconds and in seconds per GB."""


def convert_checkpoint(address: str, out: Path, seconds: float | None = None) -> Path:
    """Writes a checkpoint with pickled weights as safetensors and returns its folder.

    Files are read by `torch.load(..., weights_only=True)` in a separate process with bounded time
    and memory. Configurations and vocabularies are copied.

    - `address`: a folder in transformers' or diffusers' layout, one pickled file, or a hub name, of
      which the pickled files are downloaded.
    - `out`: the folder to write, new or empty. It is written atomically.
    - `seconds`: time limit for unpickling in seconds; default 600 s plus 120 s per GB.

    Raises CheckpointError if `out` holds files, if no file is pickled, if a file is refused, or if
    the time limit is exceeded.

    ```python
    from pathlib import Path

    import discl

    discl.convert_checkpoint("style.ckpt", Path("style"))  # writes style/style.safetensors
    ```
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CheckpointError(
            f"'{out}' exists and is not an empty folder. Name another folder for the checkpoint."
        )
    path = local_path(address)
    if path.is_file():
        if path.suffix not in PICKLED:
            raise CheckpointError(
                f"'{address}' is not a pickled file ({', '.join(PICKLED)}). There is nothing to "
                "convert."
            )
        root, pickled = path.parent, [path]
        copied: list[Path] = []
    else:
        root = _root(address, path)
        pickled, copied = _files_of(root)
    if not pickled:
        raise CheckpointError(
            f"'{address}' holds no pickled weights. There is nothing to convert. Use it as it is."
        )
    targets = {file: target_name(file.relative_to(root)) for file in pickled}
    if taken := {str(target) for target in targets.values()} & {
        str(file.relative_to(root)) for file in copied
    }:
        raise CheckpointError(
            f"'{address}' holds pickled weights and their safetensors file {sorted(taken)[0]}. "
            "Remove one of the two."
        )
    size = sum(file.stat().st_size for file in pickled)
    with _whole_folder(out) as folder:
        for file in copied:
            (folder / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(root))
        for target in targets.values():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
        logger.info(
            f"converting {count_of(len(pickled), 'pickled file')} of {address} "
            f"({size / 1e9:.2g} GB)"
        )
        jobs = [(file, folder / target) for file, target in targets.items()]
        _unpickle(address, jobs, seconds or SECONDS + SECONDS_PER_GB * size / 1e9)
        _write_indices([folder / target for target in targets.values()])
    return out


def target_name(file: Path) -> Path:
    """The path of the safetensors file of a pickled file, as transformers and diffusers expect it.

    - `file`: path of the pickled file. `pytorch_model.bin` becomes `model.safetensors`.
    """
    stem = file.stem
    if stem == "pytorch_model" or stem.startswith(("pytorch_model-", "pytorch_model.")):
        stem = stem.removeprefix("pytorch_")
    return file.with_name(f"{stem}.safetensors")


def _root(address: str, path: Path) -> Path:
    """The local folder of an address; a hub name is downloaded."""
    if path.is_dir():
        return path
    if path.exists() or not is_hub_name(address):
        raise CheckpointError(
            f"there is no checkpoint '{address}'. Give a folder, a pickled file, or a hub name "
            "such as owner/name."
        )
    return fetch_pickled(address)


def _files_of(root: Path) -> tuple[list[Path], list[Path]]:
    """(pickled files to convert, files to copy) of a folder."""
    folders: dict[Path, list[Path]] = {}
    whole_pipeline = (root / "model_index.json").is_file()
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if hidden or "safety_checker" in file.relative_to(root).parts or file.is_dir():
            continue
        if file.suffix in (*COPIED, *PICKLED):
            _check_own(file, root)
            folders.setdefault(file.parent, []).append(file)
    pickled, copied = [], []
    for folder, files in folders.items():
        weights = not (whole_pipeline and folder == root)  # the root holds single-file copies
        safe = [file for file in files if file.suffix == ".safetensors"] if weights else []
        pickles = [] if safe or not weights else choose_pickled(files)
        pickled += pickles
        copied += [
            *safe,
            *(
                file
                for file in files
                if file.suffix not in (*PICKLED, ".safetensors")
                and not file.name.endswith(".bin.index.json")
            ),
        ]
    return pickled, copied


def choose_pickled(files: Sequence[Path]) -> list[Path]:
    """The pickled weights among the files of one folder.

    Optimizer states, half-precision copies of full weights, and shards of a whole file are left
    out.

    - `files`: paths in the same folder.

    Raises CheckpointError if a shard is missing.
    """
    weights = [
        file
        for file in files
        if file.suffix in PICKLED and not any(fnmatch(file.name, name) for name in NO_WEIGHTS)
    ]
    weights = [file for file in weights if file.name.startswith(USUAL)] or weights
    plain = [file for file in weights if ".fp16" not in file.name and ".non_ema" not in file.name]
    weights = plain or [file for file in weights if ".non_ema" not in file.name]
    shards = [file for file in weights if "-of-" in file.stem]
    if shards and len(shards) < len(weights):
        return [file for file in weights if file not in shards]
    for file in shards[:1]:
        count = file.stem.rpartition("-of-")[2]
        if not count.isdecimal() or int(count) != len(shards):
            raise CheckpointError(
                f"'{file.parent}' holds {len(shards)} of the {count} pickled files of its weights. "
                "Download the others."
            )
    return weights


def _check_own(file: Path, root: Path) -> None:
    """Raises CheckpointError for links to outside the folder and its hub cache, and non-files."""
    own, target = root.resolve(), file.resolve()
    cache = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    if not file.is_file():
        raise CheckpointError(f"checkpoint '{root}': {file.relative_to(root)} is not a file.")
    if not target.is_relative_to(own) and not target.is_relative_to(cache):
        raise CheckpointError(
            f"checkpoint '{root}': {file.relative_to(root)} links to {target}, outside the folder. "
            "Replace the link by the file."
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` at the end, or removed on failure."""
    final = out.resolve()
    unfinished = final.with_name(f".{final.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(final)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint to '{out}': {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unpickle(address: str, jobs: Sequence[tuple[Path, Path]], seconds: float) -> None:
    """Converts (source, target) files in a separate process with a time limit."""
    request = json.dumps([[str(source.absolute()), str(target)] for source, target in jobs])
    env = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_FORCE")}
    # -P keeps modules of the current folder from being imported.
    command = [sys.executable, "-P", "-m", "discl.unpickling"]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, env=env, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"the pickled weights of '{address}' were not read within {seconds:g} seconds. Pass "
            "more seconds to convert_checkpoint."
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        reason = last.removeprefix("discl: ") if done.returncode == 3 else last[:300]
        raise CheckpointError(
            f"the pickled weights of '{address}' cannot be converted: {reason}. Use files that "
            "hold only tensors, as save_pretrained writes them."
        )


def _write_indices(targets: Sequence[Path]) -> None:
    """Writes the index of each sharded network, as transformers and diffusers read it."""
    from safetensors import safe_open

    shards: dict[Path, list[Path]] = {}
    for target in targets:
        base, is_shard, _ = target.stem.rpartition("-of-")
        if is_shard:
            name = f"{base.rpartition('-')[0]}.safetensors.index.json"
            shards.setdefault(target.with_name(name), []).append(target)
    for index, files in shards.items():
        where: dict[str, str] = {}
        size = 0
        for file in files:
            with safe_open(file, "pt") as stored:
                where |= dict.fromkeys(stored.keys(), file.name)
            size += file.stat().st_size
        text = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        index.write_text(json.dumps(text, indent=2))
