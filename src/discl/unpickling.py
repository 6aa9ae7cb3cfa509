"""Reads pickled weights in a separate process: `python -P -m discl.unpickling < jobs`.

- Standard input: a JSON list of `[pickled file, safetensors file to write]`.
- Reader: torch's restricted unpickler (`weights_only=True`), for tensors and plain containers only.
- Limits: memory and output size are bounded by the size of the pickled files.
- Failure: one line on standard error and exit status 3.

No other module reads pickled files.
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
"""Maximum bytes of tensors per byte of their file; tensors with several names are repeated."""
SPARE = 1 << 30
"""Bytes of memory and output allowed beyond multiples of the file size."""
NESTED = ("state_dict", "model_state_dict", "model", "module", "params")
"""Keys under which trainers store the tensors."""


class Refused(Exception):
    """A pickled file that holds anything but named tensors."""


def read_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a pickled file by name; they share no memory.

    - `file`: path of the pickled file.

    Raises Refused for a file that needs code, holds anything but named dense tensors, or unpacks to
    more than the allowed size.
    """
    import torch

    size = file.stat().st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > size:
            raise Refused(f"it unpacks to {unpacked:,} bytes, but the file has {size:,}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(_reason(error)) from error
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise Refused(f"it holds a {type(content).__name__}; expected tensors by name")
    total, taken, tensors = 0, set(), {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"its entry {name!r:.80} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise Refused(f"its tensor '{name}' is sparse, quantised or without values")
        total += tensor.numel() * tensor.element_size()
        if total > LARGEST_GROWTH * size:
            raise Refused(f"its tensors exceed {LARGEST_GROWTH} times its file size")
        plain = tensor.detach().contiguous()
        memory = plain.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() > plain.numel() * plain.element_size():
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors


def _reason(error: Exception) -> str:
    """The error of torch in one line, without its advice to switch off the restriction."""
    text = " ".join(str(error).split())
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it needs {refused.group(1)}, which is code, not a weight"
    return f"{type(error).__name__}: {text[:200]}"


def limit_resources(largest: int) -> None:
    """Limits memory, file sizes and core dumps of this process, where the system supports it.

    - `largest`: size of the largest pickled file, in bytes.
    """
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
    """Converts the files named on standard input."""
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
