"""The one module that reads pickled weights, run as a process of its own: `python -P -m discl.unpickling < jobs`.

Standard input is a JSON list of `[pickled file, safetensors file to write]`. torch's restricted unpickler
(`weights_only=True`) knows tensors and plain containers only. Memory and size of what is written are bounded by the size
of the files, so that a small file cannot fill a machine. A failure is one line on standard error and exit status 3.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGEST_GROWTH = 4
"""Bytes of tensors per byte of their file, at most: shared tensors are written once for each of their names."""
SPARE = 1 << 30
"""Bytes of memory beyond the multiples of the file's size."""
NESTED = ("state_dict", "model_state_dict", "model", "module", "params")
"""Keys under which trainers put the tensors beside other things."""


class Refused(Exception):
    """A pickled file that is no plain set of tensors."""


def read_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a pickled file by their names, each with memory of its own.

    Raises Refused for a file that asks for code, holds anything but named dense tensors, or unpacks to far more than it is.
    """
    import torch

    size = file.stat().st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > size:
            raise Refused(f"it unpacks to {unpacked:,} bytes, more than its own {size:,}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(_reason(error)) from error
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found:
        raise Refused(f"it holds a {type(found).__name__}, no mapping of names to tensors")
    total, taken, tensors = 0, set(), {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"its entry {name!r:.80} is a {type(tensor).__name__}, no tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise Refused(f"its tensor '{name}' is sparse, quantised or empty of values")
        total += tensor.numel() * tensor.element_size()
        if total > LARGEST_GROWTH * size:
            raise Refused(f"its tensors are more than {LARGEST_GROWTH} times as large as it is")
        plain = tensor.detach().contiguous()
        memory = plain.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() > plain.numel() * plain.element_size():
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors


def _reason(error: Exception) -> str:
    """What torch says of a file in one line; its own advice is how to switch the safety off."""
    text = " ".join(str(error).split())
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {refused.group(1)}, which is code and no weight"
    return f"{type(error).__name__}: {text[:200]}"


def limit_resources(largest: int) -> None:
    """Bounds memory, files and core dumps of this process, where the system can, for files of at most `largest` bytes."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * os.sysconf("SC_PAGE_SIZE") + 2 * LARGEST_GROWTH * largest + SPARE
        written = LARGEST_GROWTH * largest + SPARE
        for kind, most in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, written),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (wanted, hard))


def main() -> None:
    """Converts the files that standard input names."""
    jobs = [(Path(source), Path(target)) for source, target in json.load(sys.stdin)]
    from safetensors.torch import save_file

    limit_resources(max(source.stat().st_size for source, _ in jobs))
    for source, target in jobs:
        try:
            unfinished = target.with_name(f".{target.name}.part")
            save_file(read_tensors(source), unfinished, {"format": "pt"})
            unfinished.replace(target)
        except Exception as error:
            reason = str(error) if isinstance(error, Refused) else _reason(error)
            sys.stderr.write(f"discl: {source.name}: {reason}\n")
            sys.exit(3)


if __name__ == "__main__":
    main()
