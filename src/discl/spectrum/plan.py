"""Hard images × levels × seeds to requests with content ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RecipeError, shorten
from ..levels import check_level, noise_fractions, start_step
from ..prompts import CAPTION, draw_prompt
from ..utils.hashing import digest
from ..utils.stored import read_table


@dataclass(frozen=True)
class Sampling:
    """What determines the pixels besides the request itself.

    `guidance_scale` is s = 1 + w of eq. 2; `size` is in pixels a side; `model` and `scheduler` are digests. Fields with a
    default are options that came later: they enter an id only where they are used, so that older images keep theirs.
    `guidance_from` and `guidance_to` bound the noise fractions at which a step is guided (`levels.noise_fractions`), the first excluded.
    """

    model: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    size: int
    dtype: str
    encoding: str
    resize: str = "square"
    steps: str = "per-level"
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    loras: str = ""

    @property
    def fixed(self) -> bool:
        """Whether every level takes T steps."""
        return self.steps == "fixed"

    @property
    def guidance_interval(self) -> tuple[float, float]:
        return self.guidance_from, self.guidance_to

    def identity(self) -> dict[str, Any]:
        """What enters the ids: all fields but the options that are not used."""
        options = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in options or value != options[name]
        }


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
    width: int
    height: int

    @classmethod
    def of(
        cls, prompt: str, level: int, source_id: str, width: int, height: int | None = None, *, seed: int = 0, attempt: int = 0,
        negative_prompt: str = "", label: int = 0,
    ) -> Request:  # fmt: skip
        """A request by itself, of `width` × `height` pixels (default square). At level 0 `source_id` only keys ε.

        Its id is a digest of these values and says nothing of the generator, so it is none for a store: there `plan_requests` or a
        `Planner` gives the ids.
        """
        height = width if height is None else height
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "level": check_level(level),
            "source_id": source_id,
            "width": width,
        }
        number = digest(
            {**given, "height": height, "seed": seed, "attempt": attempt, "label": label}
        )
        return cls(
            number,
            source_id,
            "",
            label,
            level,
            seed,
            attempt,
            prompt,
            negative_prompt,
            width,
            height,
        )

    def steps(self, num_inference_steps: int) -> int:
        """t(λ), the denoising steps that this request takes."""
        return start_step(self.level, num_inference_steps)


@dataclass(frozen=True)
class Share:
    """The k-th of n shares of a plan, k from 1: every n-th source with all that is made of it, so that no two shares encode it."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            last = max(self.of, 1)
            raise RecipeError(
                f"there is no share {self.number}/{self.of}: shares go from 1/{last} to {last}/{last}, and a SLURM array that fits is "
                f"--array=1-{last}."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def of_plan(self, plan: Sequence[Request]) -> list[Request]:
        """The requests of this share, in their order. Pure in the plan's sources, so more levels or seeds divide it the same way."""
        sources = {
            source: place
            for place, source in enumerate(dict.fromkeys(request.source_id for request in plan))
        }
        return [
            request for request in plan if sources[request.source_id] % self.of == self.number - 1
        ]


WHOLE = Share(1, 1)


def parse_share(text: str) -> Share:
    """`2/8` -> Share(2, 8). Raises RecipeError for what is no share."""
    number, slash, of = text.partition("/")
    if not slash or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", each) for each in (number, of)):
        raise RecipeError(
            f"a share is written k/n, for example 2/8 for the second of eight; got {shorten(text)}."
        )
    return Share(int(number), int(of))


@dataclass(frozen=True)
class Planner:
    """Requests of a run; `prompts` maps a label to its texts.

    A text may hold `{caption}`, which the source's `caption` replaces. A source is a mapping with `id`, `digest` and `label`; it may name
    the `width` and `height` of what is made of it, which follow from its own size and the sampling.
    """

    prompts: Mapping[int, Sequence[str]]
    negative_prompt: str
    sampling: Sampling

    def request(
        self, source: Mapping[str, Any], level: int, seed: int, attempt: int = 0
    ) -> Request:
        """The request for one image; its id is the same in every process. Prompt and noise are drawn anew for each try."""
        prompt = draw_prompt(self.prompts[source["label"]], source["id"], seed, attempt)
        prompt = prompt.replace(CAPTION, source.get("caption", "")).strip(" ,")
        pixels = {
            "source_digest": source["digest"], "source_id": source["id"], "prompt": prompt, "negative_prompt": self.negative_prompt,
            "level": level, "seed": seed, "attempt": attempt, **self.sampling.identity(),
        }  # fmt: skip
        size = self.sampling.size
        return Request(
            digest(pixels), source["id"], source["digest"], int(source["label"]), level, seed, attempt, prompt, self.negative_prompt,
            source.get("width", size), source.get("height", size),
        )  # fmt: skip


def plan_requests(
    sources: Sequence[Mapping[str, Any]],
    levels: Sequence[int],
    seeds: int,
    prompts: Mapping[int, Sequence[str]],
    negative_prompt: str,
    sampling: Sampling,
) -> list[Request]:
    """The first try of every source, seed and level; arguments as `Planner` takes them. More levels or seeds only add requests."""
    planner = Planner(prompts, negative_prompt, sampling)
    order = sorted(map(check_level, levels))
    return [
        planner.request(source, level, seed)
        for source in sources
        for seed in range(seeds)
        for level in order
    ]


def follow_tries(
    plan: Iterable[Request],
    again: Callable[[Request, int], Request],
    cosines: Mapping[str, float],
    keep: Callable[[float], bool],
    tries: int,
) -> tuple[list[Request], list[Request]]:
    """(every try that a plan of first tries has come to, in its order; those among them that have no score yet).

    Where the filter drops an image the next try, `again(first, attempt)`, takes its place, until one is kept or `tries` were made. Pure
    in its arguments: `cosines` maps ids to the scores that are known, whoever made the images, and before or after a kill.
    """
    tried, unscored = [], []
    for first in plan:
        for attempt in range(tries):
            request = again(first, attempt) if attempt else first
            tried.append(request)
            if request.id not in cosines:
                unscored.append(request)
                break
            if keep(cosines[request.id]):
                break
    return tried, unscored


def unet_rows(
    requests: Sequence[Request],
    num_inference_steps: int,
    guidance_scale: float,
    fixed: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Σ 2·t(λ): rows that the network has to compute; one a step without guidance, s = 1 or outside of the interval."""
    low, high = guidance_interval
    rows = {}
    for percent in {request.level for request in requests}:
        fractions = noise_fractions(percent, num_inference_steps, fixed)
        rows[percent] = sum(
            1 + (guidance_scale != 1 and low < fraction <= high) for fraction in fractions
        )
    return sum(rows[request.level] for request in requests)


def write_plan(requests: Sequence[Request], path: Path) -> None:
    """Writes the plan as Parquet, one row per request."""
    kinds = {"str": pa.string(), "int": pa.int64()}
    columns = {
        field.name: pa.array(
            [getattr(request, field.name) for request in requests], kinds[str(field.type)]
        )
        for field in fields(Request)
    }
    pq.write_table(pa.table(columns), path)


def read_plan(path: Path) -> list[Request]:
    """The requests of a plan, in the order in which they were planned.

    Raises BrokenFileError where the file is missing, cut off, or another one.
    """
    columns = [field.name for field in fields(Request)]
    return [Request(**row) for row in read_table(path, columns).to_pylist()]
