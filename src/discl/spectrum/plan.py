"""The plan: hard images × levels × seeds → requests whose ids say everything that determines the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..digests import digest
from ..levels import GuidanceLevel
from ..prompts import draw_prompt


@dataclass(frozen=True)
class Sampling:
    """What determines the pixels besides the request itself.

    `guidance_scale` is s = 1 + w of eq. 2; `size` is in pixels a side; `model` and `scheduler` are digests.
    """

    model: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    size: int
    dtype: str
    encoding: str


@dataclass(frozen=True)
class Request:
    """One synthetic image to make. ε is keyed by (source_id, seed, attempt), so the levels of a spectrum share it."""

    id: str
    source_id: str
    source_digest: str
    label: int
    level: int
    seed: int
    attempt: int
    prompt: str
    negative_prompt: str

    def steps(self, num_inference_steps: int) -> int:
        """t(λ), the denoising steps that this request takes."""
        return GuidanceLevel(self.level).start_step(num_inference_steps)


def plan_requests(
    sources: Sequence[Mapping[str, Any]],
    levels: Sequence[GuidanceLevel],
    seeds: int,
    prompts: Mapping[int, Sequence[str]],
    negative_prompt: str,
    sampling: Sampling,
) -> list[Request]:
    """Requests for every source (`id`, `digest`, `label`), level and seed; `prompts` maps a label to its texts.

    The same arguments give the same ids in every process; more levels or seeds only add requests.
    """
    requests = []
    for source in sources:
        for seed in range(seeds):
            prompt = draw_prompt(prompts[source["label"]], source["id"], seed, 0)
            for level in sorted(levels):
                pixels = {
                    "source_digest": source["digest"], "source_id": source["id"], "prompt": prompt, "negative_prompt": negative_prompt,
                    "level": level.percent, "seed": seed, "attempt": 0, **asdict(sampling),
                }  # fmt: skip
                requests.append(
                    Request(
                        digest(pixels),
                        source["id"],
                        source["digest"],
                        int(source["label"]),
                        level.percent,
                        seed,
                        0,
                        prompt,
                        negative_prompt,
                    )
                )
    return requests


def unet_rows(requests: Sequence[Request], num_inference_steps: int, guidance_scale: float) -> int:
    """Σ 2·t(λ): rows that the UNet has to compute (Σ t(λ) without guidance, s = 1)."""
    per_step = 1 if guidance_scale == 1 else 2
    return per_step * sum(request.steps(num_inference_steps) for request in requests)


def write_plan(requests: Sequence[Request], path: Path) -> None:
    """Writes the plan as Parquet, one row per request."""
    columns = {field.name: [getattr(request, field.name) for request in requests] for field in fields(Request)}
    pq.write_table(pa.table(columns), path)


def read_plan(path: Path) -> list[Request]:
    """The requests of a plan, in the order in which they were planned."""
    return [Request(**row) for row in pq.read_table(path).to_pylist()]
