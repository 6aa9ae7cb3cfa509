"""What the parts of `gpu.py` share: device, sizes, and the one large model of a process."""

from __future__ import annotations

import gc
from typing import Any

import torch


class Bench:
    """Device and sizes of a run.

    - `smoke`: tiny networks on the CPU.

    `sources` images at six levels of `steps` denoising steps are made with `slots` images a call.
    Guesses about memory are for 80 GB.
    """

    def __init__(self, smoke: bool) -> None:
        if not smoke and not torch.cuda.is_available():
            raise SystemExit("this machine has no NVIDIA GPU; --smoke runs tiny networks on a CPU.")
        self.smoke, self.device = smoke, "cpu" if smoke else "cuda"
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.steps, self.sources, self.slots = (10, 1, 4) if smoke else (10, 16, 16)
        if smoke:
            torch.set_num_threads(1)  # processes are forked, which threads do not survive
        self.known: dict[str, Any] = {}
        """What earlier parts of the process have measured or built, by name."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.model.size

    @property
    def model(self) -> Any:
        """SDXL with random weights, built when it is first used."""
        if "model" not in self.known:
            import sdxl

            shape = sdxl.TINY if self.smoke else sdxl.TRUE
            self.known["model"] = sdxl.build(shape, self.device, self.dtype)
        return self.known["model"]

    def begin(self) -> None:
        """Frees what earlier parts left, and starts to watch the memory."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> dict[str, float]:
        """Peak memory of the part, of tensors and of the allocator."""
        if self.device != "cuda":
            return {}
        return {
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
