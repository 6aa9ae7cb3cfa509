"""What a checkpoint folder may hold."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DisclError

LARGEST_JSON = 64 << 20
"""Bytes of the largest configuration or index that is read."""
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
HARMLESS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|inv_freq|relative_position_index)$")
"""Surplus tensors that say nothing: counters, and tables that a network makes by itself."""
SPARE_VALUES = 1 << 26
"""Values of a network beyond those that its files can hold: heads, prompts, tables of positions."""
QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "quanto": "optimum.quanto",
    "torchao": "torchao",
    "hqq": "hqq",
    "compressed-tensors": "compressed_tensors",
    "aqlm": "aqlm",
    "vptq": "vptq",
    "auto-round": "auto_round",
}
"""Methods of quantisation, and the package that each needs."""


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a checkpoint. Raises CheckpointError where it is missing, too large or holds none."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MB")
        if not file.is_file():
            raise OSError("it is no file")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint '{file.parent}': {file.name} is missing or no JSON: {error}; fetch it anew."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"checkpoint '{file.parent}': {file.name} holds no mapping; fetch it anew."
        )
    return found


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Whatever a library raises for a folder that it cannot load as `what`, as CheckpointError with the first lines of it."""
    try:
        yield
    except CheckpointError as error:
        if str(folder) in str(error) or str(error).startswith(("checkpoint '", "'")):
            raise
        raise CheckpointError(
            f"checkpoint '{folder}': {error.args[0]}", argument=error.argument
        ) from error
    except DisclError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3])[:500] or type(error).__name__
        hint = ""
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        if "trust_remote_code" in str(error) or "custom code" in reason:
            reason = "it asks for Python code of its own, which is never run"
            hint = "; take a checkpoint of a family that transformers or diffusers know"
        raise CheckpointError(f"'{folder}' cannot be loaded as {what}: {reason}{hint}.") from error


def check_folder(folder: Path) -> None:
    """Raises CheckpointError where a folder's files lead elsewhere, are no files, or name code or weights outside of it.

    That is links to nowhere, pipes and devices, indices of weights with paths in them, adapters, which name another
    checkpoint, and configurations that ask for kernels of the hub. Links to other files are followed: the hub's cache
    consists of them.
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        try:
            kind = file.stat().st_mode
        except OSError as error:
            if not file.is_symlink():
                raise CheckpointError(f"checkpoint '{folder}': {name}: {error}.") from error
            raise CheckpointError(
                f"checkpoint '{folder}': {name} links to {file.readlink()}, which is not there; "
                "copy the folder with what its links lead to (cp -rL)."
            ) from error
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise CheckpointError(
                f"checkpoint '{folder}': {name} is a pipe or device, no file; take it out."
            )
        if file.name.endswith(".safetensors.index.json"):
            _check_index(file)
    for part in _parts(folder):
        if (part / "adapter_config.json").exists():
            raise CheckpointError(
                f"checkpoint '{part}' holds adapter_config.json: it is an adapter of another checkpoint. Merge the two "
                "(merge_and_unload of peft), or name its weights in spectrum.loras."
            )
        if (part / "config.json").is_file():
            config = read_json(part / "config.json")
            check_configuration(part, config)
            _check_quantised(part, config)


def _parts(folder: Path) -> list[Path]:
    """The folder itself and, of a generator in diffusers' layout, the folders of its parts."""
    if not (folder / "model_index.json").is_file():
        return [folder]
    index = read_json(folder / "model_index.json")
    return [folder, *(folder / name for name, kind in index.items() if isinstance(kind, list))]


def _check_index(file: Path) -> None:
    """Raises CheckpointError where an index of weights names anything but files beside it."""
    found = read_json(file).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise CheckpointError(
            f"checkpoint '{file.parent}': the weight_map of {file.name} is no mapping of names to files; fetch it anew."
        )
    for name in sorted(set(found.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"checkpoint '{file.parent}': {file.name} names '{name:.80}', which is no *.safetensors file beside it; fetch it anew."
            )


def check_configuration(folder: Path, value: Any, key: str = "") -> None:
    """Raises CheckpointError where a configuration asks for kernels of the hub, which are code."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            inherited = key if "implementation" in key else ""
            check_configuration(folder, each, name if "implementation" in name else inherited)
    elif isinstance(value, list):
        for each in value:
            check_configuration(folder, each, key)
    elif key and isinstance(value, str) and ("/" in value or ":" in value):
        raise CheckpointError(
            f"checkpoint '{folder}': {key} of config.json names '{value:.80}', code from elsewhere, which is never run; "
            "take that line out."
        )


def _check_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for quantised weights whose package is not installed, or whose method is not known."""
    if "quantization_config" not in config:
        return
    package = QUANTISERS.get(method := quantisation(config))
    if package is None:
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {method!r:.80}, which is not supported ({', '.join(QUANTISERS)} are); "
            "take the checkpoint with its full weights."
        )
    try:
        there = importlib.util.find_spec(package) is not None
    except ImportError:
        there = False
    if not there:
        installed = package.replace(".", "-").replace("_", "-")
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {method}, which needs the package {installed}: pip install {installed}, "
            "or take the checkpoint with its full weights."
        )


def quantisation(config: Mapping[str, Any]) -> str:
    """The method that a configuration's weights are quantised by."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return str(found)
    loaded = any(str(key).startswith(("load_in_4bit", "load_in_8bit")) for key in found)
    method = str(found.get("quant_method", "bitsandbytes" if loaded else "an unnamed method"))
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def check_unquantised(folder: Path) -> None:
    """Raises CheckpointError for a folder whose weights are quantised, where they are to be trained or compared."""
    if "quantization_config" in (config := read_json(folder / "config.json")):
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {quantisation(config)}; a CLIP or a classifier needs full weights, "
            "so take the checkpoint that it was made from."
        )


def check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError for a folder without a vocabulary, or without the settings that say how it is used."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"checkpoint '{folder}' holds no vocabulary for a tokenizer (tokenizer.json, or vocab.json with merges.txt); fetch it."
        )
    if (
        not (folder / "tokenizer.json").is_file()
        and (folder / "vocab.json").is_file()
        and not (folder / "merges.txt").is_file()
    ):
        raise CheckpointError(
            f"checkpoint '{folder}' holds a vocab.json without its merges.txt; fetch that."
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"checkpoint '{folder}' lacks tokenizer_config.json, which says how texts are cut and filled up; fetch it."
        )


def check_tokens(ids: Any, network: Any) -> Any:
    """Tokens as they are. Raises CheckpointError for one beyond the network's vocabulary, as of another model's tokenizer."""
    known = network.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise CheckpointError(
            f"the tokenizer gives the token {int(ids.max())}, while the {type(network).__name__} knows {known}; "
            "tokenizer and weights belong to different models, so fetch both anew from one place."
        )
    return ids


def _listed(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_complete(folder: Path, missing: Collection[str]) -> None:
    """Raises CheckpointError where weights that the network has are `missing` in the folder's files: they would be random ones."""
    if missing:
        raise CheckpointError(
            f"checkpoint '{folder}' lacks weights that its configuration asks for: {_listed(missing)}. The files are incomplete "
            "or belong to another configuration; fetch them anew."
        )


def check_surplus(
    folder: Path, surplus: Collection[str], allowed: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises CheckpointError where files hold tensors that the network has no place for, so that it is another one.

    Counters and tables that networks make by themselves are no surplus, nor what `allowed` says.
    """
    names = [name for name in surplus if not HARMLESS.search(name) and not allowed(name)]
    if names:
        raise CheckpointError(
            f"checkpoint '{folder}' holds {len(names)} tensors that the network of its configuration has no place for: {_listed(names)}. "
            "The configuration is another network's; fetch both anew, from one place."
        )


def check_loaded(folder: Path, told: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the loading information of transformers or diffusers tells of missing, misfitting or surplus tensors."""
    misfits = [key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]]
    check_complete(folder, [*told["missing_keys"], *misfits])
    check_surplus(folder, told["unexpected_keys"])


def check_extent(
    folder: Path,
    config: Mapping[str, Any],
    build: Callable[[], Any],
    weights: str = "*.safetensors",
) -> None:
    """Raises CheckpointError where a configuration asks for far more than the files hold, before memory is taken for it.

    `build` makes the network, here without memory. A layer has at least one tensor, and half a byte holds at most one
    value; some room is left for heads of more classes.
    """
    import torch
    from safetensors import safe_open

    files = list(folder.glob(weights))
    tensors = 0
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                tensors += len(stored.keys())
        except Exception:
            return  # what cannot be read is told where it is loaded
    for key, value in _numbers(config):
        if ("layer" in key or "depth" in key) and value > max(tensors, 64):
            raise CheckpointError(
                f"checkpoint '{folder}': {key} of config.json is {value!s:.20}, while the files hold {tensors} tensors; "
                "fetch both anew, from one place."
            )
    most = 2 * sum(file.stat().st_size for file in files) + SPARE_VALUES
    try:
        with torch.device("meta"):
            network = build()
        wanted = sum(each.numel() for each in (*network.parameters(), *network.buffers()))
    except DisclError:
        raise
    except Exception:
        return  # what cannot be built without memory is told where it is built
    if wanted > most:
        raise CheckpointError(
            f"checkpoint '{folder}': config.json describes a network of {wanted:.3g} values, while the files hold at most {most:.3g}; "
            "fetch both anew, from one place."
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration under the nearest key above it."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, str(name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def read_preprocessing(folder: Path) -> dict[str, Any] | None:
    """How a checkpoint's pictures are prepared; None where the folder does not say.

    transformers 5 writes it into `processor_config.json`, under `image_processor`, which then comes first; before, it
    was `preprocessor_config.json`. Raises CheckpointError for files that hold no mapping.
    """
    if (folder / "processor_config.json").is_file():
        found = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(found, dict):
            return found
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    return None
