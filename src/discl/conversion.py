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
"""Endings of what belongs to a checkpoint beside its pickled weights: never a module of Python."""
NO_WEIGHTS = (
    "training_args*", "optimizer*", "scheduler*", "rng_state*", "random_states*", "scaler*",
)  # fmt: skip
"""Pickled files that a training leaves and that no network is made of."""
USUAL = ("pytorch_model", "diffusion_pytorch_model")
SECONDS, SECONDS_PER_GB = 600.0, 120.0
"""How long the process that unpickles may take."""


def convert_checkpoint(address: str, out: Path, seconds: float | None = None) -> Path:
    """Writes a checkpoint with pickled weights as safetensors and returns its folder.

    Files are read by `torch.load(..., weights_only=True)` in a separate process with bounded time
    and memory. Configurations and vocabularies are copied.

    - `address`: a folder in transformers' or diffusers' layout, one pickled file, or a hub name, of
      which the pickled files are downloaded.
    - `out`: the folder to write, new or empty. It is written atomically.
    - `seconds`: most seconds for unpickling; default ten minutes and two for each GB.

    Raises CheckpointError where `out` holds files, where no file is pickled, and for a refused
    file.

    ```python
    from pathlib import Path

    import discl

    discl.convert_checkpoint("style.ckpt", Path("style"))  # writes style/style.safetensors
    ```
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CheckpointError(
            f"'{out}' exists and is no empty folder; name another folder to write the checkpoint to."
        )
    path = local_path(address)
    if path.is_file():
        if path.suffix not in PICKLED:
            raise CheckpointError(
                f"'{address}' is no pickled file ({', '.join(PICKLED)}); there is nothing to convert."
            )
        root, pickled = path.parent, [path]
        copied: list[Path] = []
    else:
        root = _root(address, path)
        pickled, copied = _files_of(root)
    if not pickled:
        raise CheckpointError(
            f"'{address}' holds no pickled weights; there is nothing to convert, so name it as it is."
        )
    targets = {file: target_name(file.relative_to(root)) for file in pickled}
    if taken := {str(each) for each in targets.values()} & {
        str(file.relative_to(root)) for file in copied
    }:
        raise CheckpointError(
            f"'{address}' holds {sorted(taken)[0]} already beside pickled weights."
        )
    size = sum(file.stat().st_size for file in pickled)
    with _whole_folder(out) as folder:
        for file in copied:
            (folder / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(root))
        for target in targets.values():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
        logger.info(
            f"converting {count_of(len(pickled), 'pickled file')} of {address} ({size / 1e9:.2g} GB)"
        )
        jobs = [(file, folder / target) for file, target in targets.items()]
        _unpickle(address, jobs, seconds or SECONDS + SECONDS_PER_GB * size / 1e9)
        _write_indices(folder, [folder / target for target in targets.values()])
    return out


def target_name(file: Path) -> Path:
    """Where the tensors of a pickled file are looked for as safetensors: `pytorch_model.bin` becomes `model.safetensors`."""
    stem = file.stem
    if stem == "pytorch_model" or stem.startswith(("pytorch_model-", "pytorch_model.")):
        stem = stem.removeprefix("pytorch_")
    return file.with_name(f"{stem}.safetensors")


def _root(address: str, path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists() or not is_hub_name(address):
        raise CheckpointError(
            f"there is no checkpoint '{address}'; give a folder, a pickled file, or a hub name such as owner/name."
        )
    return fetch_pickled(address)


def _files_of(root: Path) -> tuple[list[Path], list[Path]]:
    """(pickled files to convert, files to copy) of a folder. Raises CheckpointError for one that links elsewhere."""
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
        weights = not (whole_pipeline and folder == root)  # there lie single-file copies of it
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
    """The pickled weights among the files of one folder: not those of the optimiser, nor a second copy in half precision."""
    found = [
        file
        for file in files
        if file.suffix in PICKLED and not any(fnmatch(file.name, each) for each in NO_WEIGHTS)
    ]
    found = [file for file in found if file.name.startswith(USUAL)] or found
    plain = [file for file in found if ".fp16" not in file.name and ".non_ema" not in file.name]
    found = plain or [file for file in found if ".non_ema" not in file.name]
    shards = [file for file in found if "-of-" in file.stem]
    if shards and len(shards) < len(found):
        return [file for file in found if file not in shards]
    for file in shards[:1]:
        count = file.stem.rpartition("-of-")[2]
        if not count.isdecimal() or int(count) != len(shards):
            raise CheckpointError(
                f"'{file.parent}' holds {len(shards)} of the {count} pickled files of its weights; fetch the others."
            )
    return found


def _check_own(file: Path, root: Path) -> None:
    """Raises CheckpointError for a link out of the folder, but for those of the hub's cache, and for what is no file."""
    own, target = root.resolve(), file.resolve()
    cache = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    if not file.is_file():
        raise CheckpointError(f"checkpoint '{root}': {file.relative_to(root)} is no file.")
    if not target.is_relative_to(own) and not target.is_relative_to(cache):
        raise CheckpointError(
            f"checkpoint '{root}': {file.relative_to(root)} links to {target}, outside of the folder; "
            "put the file itself there."
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; it takes the place of `out` at the end, and nothing is left where anything fails."""
    place = out.resolve()
    unfinished = place.with_name(f".{place.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(place)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint to '{out}': {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unpickle(address: str, jobs: Sequence[tuple[Path, Path]], seconds: float) -> None:
    """Converts files in a process of its own. Raises CheckpointError where it refuses one, fails, or takes too long."""
    named = json.dumps([[str(source.absolute()), str(target)] for source, target in jobs])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_FORCE")}
    command = [
        sys.executable,
        "-P",
        "-m",
        "discl.unpickling",
    ]  # -P: no module of the folder one is in
    try:
        done = subprocess.run(
            command, input=named, capture_output=True, text=True, env=kept, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"the pickled weights of '{address}' were not read within {seconds:g} seconds, so they are given up."
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        told = last.removeprefix("discl: ") if done.returncode == 3 else last[:300]
        raise CheckpointError(
            f"the pickled weights of '{address}' cannot be converted: {told}. Take files of tensors only, "
            "as save_pretrained writes them."
        )


def _write_indices(folder: Path, targets: Sequence[Path]) -> None:
    """An index beside the shards of each network, from what they hold, as transformers and diffusers read it."""
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
