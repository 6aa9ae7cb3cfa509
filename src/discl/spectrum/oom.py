"""How many images fit in a call; halved when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import CheckpointError, DisclError
from ..utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

AUTO_SLOTS = 64
"""Most images in a call unless a recipe says more; they leave slots empty at the end."""
LATENTS_ON_CPU = 65_536
"""Latent positions in a call on a CPU: 16 images of 512 × 512 pixels, a few gigabytes."""
MEMORY_FRACTION = 0.85
"""Fraction of a GPU's memory for a call; the rest is for VAE, CLIP and allocator gaps."""
ADVICE = "use smaller images, dtype bfloat16 or float16, or a device with more memory."
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def free_cached() -> None:
    """Frees memory that the allocator caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def call_halving(
    call: Callable[[int], T],
    size: int,
    on_halved: Callable[[int], None],
    *,
    what: tuple[str, str] = ("image", "images"),
    where: str,
    advice: str = ADVICE,
    error: type[DisclError] = CheckpointError,
) -> T:
    """Returns `call(size)`, with half the size each time that memory runs out.

    - `call`: does the work with a batch of that many items. It changes nothing where it fails.
    - `on_halved`: gets each new size, for the calls that follow.
    - `what`: the name of one item and of several, for messages; `where`: the name of the network.
    - `advice`: how to fix it where not even one item fits; `error`: what is raised then.

    Raises `error` where memory does not suffice for one item.
    """
    while True:
        try:
            return call(size)
        except RuntimeError as failed:  # outside of this block its traceback holds no tensors
            if not is_out_of_memory(failed):
                raise
        if size == 1:
            raise error(f"out of memory with a single {what[0]} in a call of the {where}; {advice}")
        logger.warning(
            f"out of memory with {size} {what[1]} in a call of the {where}: {size // 2} from now on"
        )
        size //= 2
        on_halved(size)
        free_cached()


def slots_on_cpu(height: int, width: int) -> int:
    """Images in a call for latents of this shape, the same on every CPU.

    64 at most, 16 at 512 × 512 pixels, 4 at 1,024 × 1,024.
    """
    return min(max(LATENTS_ON_CPU // (height * width), 1), AUTO_SLOTS)


def largest_that_fits(call: Callable[[int], None], most: int = AUTO_SLOTS) -> int:
    """The largest power of two up to `most` for which `call` fits into memory; at least 1."""
    fits = 1
    while 2 * fits <= most:
        try:
            call(2 * fits)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        fits *= 2
    free_cached()
    return fits


def limit_memory(call: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """The call, which also counts as out of memory above MEMORY_FRACTION of the memory."""
    free, _ = torch.cuda.mem_get_info(device)
    limit = MEMORY_FRACTION * (free + torch.cuda.memory_reserved(device))

    def watched(size: int) -> None:
        torch.cuda.reset_peak_memory_stats(device)
        call(size)
        torch.cuda.synchronize(device)
        if torch.cuda.max_memory_allocated(device) > limit:
            raise torch.OutOfMemoryError(
                f"a call of {size} took more than {MEMORY_FRACTION:.0%} of the memory"
            )

    return watched
