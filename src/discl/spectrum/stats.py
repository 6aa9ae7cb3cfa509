"""Counters of the work that an engine does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Work:
    """What the engine did. Useful rows are those of an unfinished image; the rest of a call is padding.

    `out_of_memory` counts calls that failed and were done again with half as many images.
    """

    unet_calls: int = 0
    unet_rows: int = 0
    unet_rows_computed: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0
    text_encodes: int = 0
    out_of_memory: int = 0

    @property
    def slot_fill(self) -> float:
        """Useful UNet rows ÷ rows computed, in [0, 1]."""
        return self.unet_rows / self.unet_rows_computed if self.unet_rows_computed else 1.0
