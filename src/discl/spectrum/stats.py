"""Counters of the work that an engine does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Work:
    """What an engine did.

    - `unet_calls`: calls of the network.
    - `unet_rows`: useful rows of them, those of an unfinished image; the rest is padding.
    - `unet_rows_computed`: all rows of them.
    - `vae_encodes`, `vae_decodes`, `text_encodes`: images and texts.
    - `looks`, `dropped`: images that were looked at on the way, and those dropped there.
    - `out_of_memory`: calls that ran out of memory and were repeated with half the batch.
    """

    unet_calls: int = 0
    unet_rows: int = 0
    unet_rows_computed: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0
    text_encodes: int = 0
    looks: int = 0
    dropped: int = 0
    out_of_memory: int = 0

    @property
    def slot_fill(self) -> float:
        """Useful rows ÷ computed rows, in [0, 1]."""
        return self.unet_rows / self.unet_rows_computed if self.unet_rows_computed else 1.0
