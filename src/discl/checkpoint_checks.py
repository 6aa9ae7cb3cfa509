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
from .utils.counts import list_some

LARGEST_JSON = 64 << 20
"""Maximum size of a configuration or index, in bytes."""
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
HARMLESS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|inv_freq|relative_position_index)$")
"""Surplus tensors to ignore: counters, and tables that a network computes itself."""
SPARE_VALUES = 1 << 26
"""Allowance of values beyond those in the files, for heads, prompts and position tables."""
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
"""Quantisation methods and the packages that they need."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    - `file`: path of a configuration or index, at most 64 MB.

    Raises CheckpointError if the file is missing, too large, or not a JSON object.
    """
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MB")
        if not file.is_file():
            raise OSError("it is not a file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint '{file.parent}': {file.name} is missing or not valid JSON: {error}. "
            "Download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint '{file.parent}': {file.name} is a {type(content).__name__}, not a JSON "
            "object. Download it again."
        )
    return content


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Converts exceptions raised inside to CheckpointError.

    - `folder`: the checkpoint, named in the message.
    - `what`: what the checkpoint is loaded as, for example `a CLIP`.

    Errors of discl other than CheckpointError pass unchanged. Of all other exceptions the message
    keeps the first three lines.
    """
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
            reason = "it needs custom Python code, which is never run"
            hint = ". Use a checkpoint of a family built into transformers or diffusers"
        raise CheckpointError(f"'{folder}' cannot be loaded as {what}: {reason}{hint}.") from error


def check_folder(folder: Path) -> None:
    """Checks that a checkpoint refers to nothing outside its folder.

    - `folder`: the checkpoint, in the layout of transformers or diffusers.

    Links to files are followed, because the hub's cache consists of links.

    Raises CheckpointError for:

    - links without a target, pipes and devices,
    - weight indices that name files in other folders,
    - adapters, which name another checkpoint,
    - configurations that name kernels on the hub, which are code,
    - quantised weights whose method is unknown or whose package is not installed.
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        try:
            kind = file.stat().st_mode
        except OSError as error:
            if not file.is_symlink():
                raise CheckpointError(f"checkpoint '{folder}': {name}: {error}.") from error
            raise CheckpointError(
                f"checkpoint '{folder}': {name} links to {file.readlink()}, which does not exist. "
                "Copy the folder together with the targets of its links (cp -rL)."
            ) from error
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise CheckpointError(
                f"checkpoint '{folder}': {name} is a pipe or device, not a file. Remove it."
            )
        if file.name.endswith(".safetensors.index.json"):
            _check_index(file)
    for part in _parts(folder):
        if (part / "adapter_config.json").exists():
            raise CheckpointError(
                f"checkpoint '{part}' holds adapter_config.json, so it is an adapter of another "
                "checkpoint. Merge the two (merge_and_unload of peft), or load its weights as a "
                "LoRA of that checkpoint."
            )
        if (part / "config.json").is_file():
            config = read_json(part / "config.json")
            check_configuration(part, config)
            _check_quantised(part, config)


def _parts(folder: Path) -> list[Path]:
    """The folder, and the component folders of a pipeline in diffusers' layout."""
    if not (folder / "model_index.json").is_file():
        return [folder]
    index = read_json(folder / "model_index.json")
    return [folder, *(folder / name for name, kind in index.items() if isinstance(kind, list))]


def _check_index(file: Path) -> None:
    """Raises CheckpointError if a weight index names anything but files in the same folder."""
    files = read_json(file).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(
            f"checkpoint '{file.parent}': weight_map in {file.name} must map tensor names to file "
            "names. Download the file again."
        )
    for name in sorted(set(files.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"checkpoint '{file.parent}': {file.name} names '{name:.80}'; expected "
                "*.safetensors files in the same folder. Download it again."
            )


def check_configuration(folder: Path, value: Any, key: str = "") -> None:
    """Raises CheckpointError if a configuration names kernels on the hub, which are code.

    - `folder`: the checkpoint, named in the message.
    - `value`: the configuration, or a part of it.
    - `key`: the nearest key above `value` that names an implementation; empty if there is none.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            inherited = key if "implementation" in key else ""
            check_configuration(folder, item, name if "implementation" in name else inherited)
    elif isinstance(value, list):
        for item in value:
            check_configuration(folder, item, key)
    elif key and isinstance(value, str) and ("/" in value or ":" in value):
        raise CheckpointError(
            f"checkpoint '{folder}': {key} in config.json names '{value:.80}', external code, "
            "which is never run. Remove that line."
        )


def _check_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the quantisation is unknown or its package is not installed."""
    if "quantization_config" not in config:
        return
    package = QUANTISERS.get(method := quantisation(config))
    if package is None:
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {method!r:.80}, which is not supported. "
            f"Supported are {', '.join(QUANTISERS)}. Use the checkpoint with full weights."
        )
    try:
        installed = importlib.util.find_spec(package) is not None
    except ImportError:
        installed = False
    if not installed:
        name = package.replace(".", "-").replace("_", "-")
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {method}, which needs the package {name}: pip "
            f"install {name}, or use the checkpoint with full weights."
        )


def quantisation(config: Mapping[str, Any]) -> str:
    """Name of the quantisation method in a configuration.

    - `config`: content of a config.json with the key `quantization_config`.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return str(settings)
    loaded = any(str(key).startswith(("load_in_4bit", "load_in_8bit")) for key in settings)
    method = str(settings.get("quant_method", "bitsandbytes" if loaded else "an unnamed method"))
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def check_unquantised(folder: Path) -> None:
    """Raises CheckpointError if the weights are quantised: a CLIP or classifier needs full ones.

    - `folder`: a folder with config.json.
    """
    if "quantization_config" in (config := read_json(folder / "config.json")):
        raise CheckpointError(
            f"checkpoint '{folder}' is quantised by {quantisation(config)}. A CLIP or classifier "
            "needs full weights. Use the checkpoint that it was made from."
        )


def check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError if a tokenizer's vocabulary or its settings are missing.

    - `folder`: a folder with the files of a tokenizer of transformers.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"checkpoint '{folder}' has no vocabulary for a tokenizer: neither tokenizer.json nor "
            "vocab.json with merges.txt. Download these files."
        )
    if (
        not (folder / "tokenizer.json").is_file()
        and (folder / "vocab.json").is_file()
        and not (folder / "merges.txt").is_file()
    ):
        raise CheckpointError(
            f"checkpoint '{folder}' has vocab.json but no merges.txt. Download merges.txt."
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"checkpoint '{folder}' has no tokenizer_config.json, which defines truncation and "
            "padding of texts. Download it."
        )


def check_tokens(ids: Any, network: Any) -> Any:
    """The token ids unchanged, after a check against the vocabulary.

    - `ids`: integer tensor of any shape.
    - `network`: a text encoder with `get_input_embeddings()`.

    Raises CheckpointError for a token outside the network's vocabulary.
    """
    size = network.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise CheckpointError(
            f"the tokenizer returned token {int(ids.max())}, but the vocabulary of "
            f"{type(network).__name__} has {size} tokens. The tokenizer and the weights belong to "
            "different models. Download both again from the same source."
        )
    return ids


def check_complete(folder: Path, missing: Collection[str]) -> None:
    """Raises CheckpointError if weights of the network are missing: they would be random.

    - `folder`: the checkpoint, named in the message.
    - `missing`: names of tensors of the network that are not in the files.
    """
    if missing:
        raise CheckpointError(
            f"checkpoint '{folder}' has no {list_some(sorted(missing), 3)}: {len(missing)} weights "
            "of its configuration are missing. The files are incomplete or belong to another "
            "configuration. Download them again."
        )


def check_surplus(
    folder: Path, surplus: Collection[str], allowed: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises CheckpointError if files hold tensors that the network does not have.

    Counters, and tables that networks compute themselves, are ignored.

    - `folder`: the checkpoint, named in the message.
    - `surplus`: names of tensors in the files that the network does not have.
    - `allowed`: whether a tensor of this name may be surplus; default none.
    """
    names = [name for name in surplus if not HARMLESS.search(name) and not allowed(name)]
    if names:
        raise CheckpointError(
            f"checkpoint '{folder}' holds {len(names)} tensors that the network of its "
            f"configuration does not have: {list_some(sorted(names), 3)}. The configuration "
            "belongs to another network. Download both again from the same source."
        )


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError for missing or surplus tensors, or tensors of another shape.

    - `folder`: the checkpoint, named in the message.
    - `info`: loading information of transformers or diffusers (`output_loading_info=True`).
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    check_complete(folder, [*info["missing_keys"], *mismatched])
    check_surplus(folder, info["unexpected_keys"])


def check_extent(
    folder: Path,
    config: Mapping[str, Any],
    build: Callable[[], Any],
    weights: str = "*.safetensors",
) -> None:
    """Raises CheckpointError if a configuration describes a far larger network than its files.

    The check runs before memory is allocated. It assumes at least one tensor per layer, and half a
    byte per value. An allowance of 2²⁶ values covers heads with more classes.

    - `folder`: the checkpoint.
    - `config`: content of its config.json.
    - `build`: creates the network; called on the `meta` device.
    - `weights`: glob pattern of the weight files in `folder`.
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
            return  # loading reports files that cannot be read
    for key, value in _numbers(config):
        if ("layer" in key or "depth" in key) and value > max(tensors, 64):
            raise CheckpointError(
                f"checkpoint '{folder}': {key} of config.json is {value!s:.20}, but the files hold "
                f"{tensors} tensors. Download both again from the same source."
            )
    most = 2 * sum(file.stat().st_size for file in files) + SPARE_VALUES
    try:
        with torch.device("meta"):
            network = build()
        wanted = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    except DisclError:
        raise
    except Exception:
        return  # loading reports networks that cannot be built
    if wanted > most:
        raise CheckpointError(
            f"checkpoint '{folder}': config.json describes a network of {wanted:.3g} values, but "
            f"the files hold at most {most:.3g}. Download both again from the same source."
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(nearest key, number) for all numbers in a configuration."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def read_preprocessing(folder: Path) -> dict[str, Any] | None:
    """Image preprocessing settings of a checkpoint; None if the folder has none.

    transformers 5 writes them to `processor_config.json` under `image_processor`, older versions to
    `preprocessor_config.json`. The newer file has priority.

    - `folder`: the checkpoint.

    Raises CheckpointError for a file that is not a JSON object.
    """
    if (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(settings, dict):
            return settings
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    return None
