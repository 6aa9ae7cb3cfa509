"""Hard images × levels × seeds to requests with content ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import RecipeError, shorten
from ..levels import check_level, noise_fractions, start_step
from ..prompts import draw_prompt, fill_caption
from ..utils.hashing import digest
from ..utils.stored import read_table, write_table


@dataclass(frozen=True)
class Sampling:
    """What determines the pixels of an image besides its request.

    - `model`, `scheduler`: digests, as `describe_generator` gives them.
    - `num_inference_steps`: T.
    - `guidance_scale`: s = 1 + w of classifier-free guidance (arXiv 2410.13674, eq. 2).
    - `size`: pixels a side.
    - `dtype`: of the networks; `encoding`: of the stored image, for example `webp`.
    - `resize`: `square` or `keep-aspect`.
    - `steps`: `per-level` (level λ takes the last t(λ) of T steps) or `fixed` (T finer steps).
    - `guidance_from`, `guidance_to`: noise fractions in [0, 1] between which steps are guided, the
      lower end excluded.
    - `loras`: digests and scales of LoRA files.
    - `sampler`: `ddim`, `dpm-solver++`, `euler`, `lcm` or `tcd`.
    - `timestep_spacing`: of the sampler's grid; empty for the checkpoint's own.
    - `class_tokens`: digest of the generator's class tokens; empty without any.

    Fields with a default enter an id only where they differ from it. So images that were made
    before a field existed keep their ids.

    ```python
    import discl

    generator = discl.describe_generator("embedded:fashion-mnist/diffusion")
    sampling = discl.Sampling(
        generator.model,
        generator.scheduler,
        num_inference_steps=10,
        guidance_scale=3.0,
        size=32,
        dtype="float32",
        encoding="webp",
    )
    ```
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
    sampler: str = "ddim"
    timestep_spacing: str = ""
    class_tokens: str = ""

    @property
    def fixed(self) -> bool:
        """Whether every level takes T steps."""
        return self.steps == "fixed"

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """Noise fractions between which steps are guided."""
        return self.guidance_from, self.guidance_to

    def identity(self) -> dict[str, Any]:
        """The values that enter an id: all fields without a default, and others that differ."""
        options = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in options or value != options[name]
        }


@dataclass(frozen=True)
class Request:
    """One synthetic image to make.

    - `id`: a digest of everything that determines the pixels.
    - `source_id`, `source_digest`: the real image that it is made from.
    - `label`: its class.
    - `level`: λ, a whole per cent from 0 to 99.
    - `seed`, `attempt`: which draw. ε is keyed by (source_id, seed, attempt), so the levels of a
      spectrum share it.
    - `prompt`, `negative_prompt`: plain texts, without class tokens.
    - `width`, `height`: in pixels.

    ```python
    import discl

    request = discl.Request.of("a photo of a bag", 30, "000.png", 32)
    request.steps(10)  # 7
    ```
    """

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
        cls,
        prompt: str,
        level: int,
        source_id: str,
        width: int,
        *,
        height: int | None = None,
        seed: int = 0,
        attempt: int = 0,
        negative_prompt: str = "",
        label: int = 0,
    ) -> Request:
        """A single request of `width` × `height` pixels (default square), outside any plan.

        At level 0 `source_id` only keys ε. The id is a digest of these values and does not depend
        on the generator. Stores need the ids of `plan_requests` or of a `Planner`.

        Raises RecipeError for an invalid level.
        """
        height = width if height is None else height
        values = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "level": check_level(level),
            "source_id": source_id,
            "width": width,
            "height": height,
            "seed": seed,
            "attempt": attempt,
            "label": label,
        }
        return cls(id=digest(values), source_digest="", **values)  # type: ignore[arg-type]

    def steps(self, num_inference_steps: int) -> int:
        """t(λ), the number of denoising steps of this request."""
        return start_step(self.level, num_inference_steps)


@dataclass(frozen=True)
class PlanShard:
    """The k-th of n shards of a plan, k from 1: every n-th source with all its images.

    - `number`: k; `of`: n.

    No source is in two shards, so none is encoded twice. Raises RecipeError for k outside 1–n.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            last = max(self.of, 1)
            raise RecipeError(
                f"there is no shard {self.number}/{self.of}: shards go from 1/{last} to "
                f"{last}/{last}, which a SLURM array writes as --array=1-{last}."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def select(self, plan: Sequence[Request]) -> list[Request]:
        """The requests of this shard, in their order.

        It depends on the plan's sources alone: more levels or seeds divide them the same way.
        """
        sources = {
            source: index
            for index, source in enumerate(dict.fromkeys(request.source_id for request in plan))
        }
        return [
            request for request in plan if sources[request.source_id] % self.of == self.number - 1
        ]


WHOLE_PLAN = PlanShard(1, 1)


def parse_shard(text: str) -> PlanShard:
    """`2/8` to `PlanShard(2, 8)`. Raises RecipeError for anything else."""
    number, slash, of = text.partition("/")
    if not slash or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", each) for each in (number, of)):
        raise RecipeError(
            f"a shard is written k/n, for example 2/8 for the second of eight; got {shorten(text)}."
        )
    return PlanShard(int(number), int(of))


@dataclass(frozen=True)
class Planner:
    """Makes the requests of a run.

    - `prompts`: texts of each label. `{caption}` in a text becomes the source's `caption`.
    - `negative_prompt`: what guidance leads away from.
    - `sampling`: what determines the pixels besides a request.

    A source is a mapping with `id`, `digest` and `label`. It may have the `width` and `height` of
    its synthetic images; by default they are squares of `sampling.size`.

    ```python
    import discl

    sampling = discl.Sampling("model", "scheduler", 10, 3.0, 32, "float32", "webp")
    planner = discl.Planner({0: ["a photo of a bag"]}, "", sampling)
    planner.request({"id": "000.png", "digest": "0123", "label": 0}, level=30, seed=0)
    ```
    """

    prompts: Mapping[int, Sequence[str]]
    negative_prompt: str
    sampling: Sampling

    def request(
        self, source: Mapping[str, Any], level: int, seed: int, attempt: int = 0
    ) -> Request:
        """The request for one image, with the same id in every process.

        Each attempt draws another prompt and other noise.
        """
        prompt = draw_prompt(self.prompts[source["label"]], source["id"], seed, attempt)
        prompt = fill_caption(prompt, source.get("caption", ""))
        pixels = {
            "source_digest": source["digest"],
            "source_id": source["id"],
            "prompt": prompt,
            "negative_prompt": self.negative_prompt,
            "level": level,
            "seed": seed,
            "attempt": attempt,
        }
        return Request(
            id=digest({**pixels, **self.sampling.identity()}),
            label=int(source["label"]),
            width=source.get("width", self.sampling.size),
            height=source.get("height", self.sampling.size),
            **pixels,
        )


def plan_requests(
    sources: Sequence[Mapping[str, Any]],
    levels: Sequence[int],
    seeds: int,
    prompts: Mapping[int, Sequence[str]],
    *,
    negative_prompt: str,
    sampling: Sampling,
) -> list[Request]:
    """The first attempt of every source, seed and level. More levels or seeds only add requests.

    - `sources`: the hard images, as a `Planner` takes them.
    - `levels`: λ in whole per cents.
    - `seeds`: images per source and level.
    - `prompts`, `negative_prompt`, `sampling`: as a `Planner` takes them.

    Raises RecipeError for an invalid level.

    ```python
    import discl

    sampling = discl.Sampling("model", "scheduler", 10, 3.0, 32, "float32", "webp")
    sources = [{"id": "000.png", "digest": "0123", "label": 0}]
    prompts = {0: ["a photo of a bag"]}
    plan = discl.plan_requests(
        sources, [0, 50], 2, prompts, negative_prompt="", sampling=sampling
    )
    len(plan)  # 4
    ```
    """
    planner = Planner(prompts, negative_prompt, sampling)
    order = sorted(map(check_level, levels))
    return [
        planner.request(source, level, seed)
        for source in sources
        for seed in range(seeds)
        for level in order
    ]


def unet_rows(
    requests: Sequence[Request],
    num_inference_steps: int,
    guidance_scale: float,
    *,
    fixed: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Rows that the network computes for these requests: Σ 2·t(λ).

    A step without guidance (s = 1, or outside of the interval) takes one row instead of two.

    - `requests`: the images to make.
    - `num_inference_steps`: T.
    - `guidance_scale`: s.
    - `fixed`: whether every level takes T steps.
    - `guidance_interval`: noise fractions between which steps are guided, the lower end excluded.

    ```python
    import discl

    requests = [discl.Request.of("a photo of a bag", 50, "000.png", 32)]
    discl.unet_rows(requests, 10, 3.0)  # 10
    ```
    """
    rows = {
        level: sum(
            step_rows(
                level,
                num_inference_steps,
                guidance_scale,
                fixed=fixed,
                guidance_interval=guidance_interval,
            )
        )
        for level in {request.level for request in requests}
    }
    return sum(rows[request.level] for request in requests)


def step_rows(
    level: int,
    num_inference_steps: int,
    guidance_scale: float,
    *,
    fixed: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> list[int]:
    """Rows of each step of a level; arguments as in `unet_rows`."""
    low, high = guidance_interval
    fractions = noise_fractions(level, num_inference_steps, fixed)
    return [1 + (guidance_scale != 1 and low < fraction <= high) for fraction in fractions]


def write_plan(
    requests: Sequence[Request], path: Path, **more: Sequence[int] | Sequence[str]
) -> None:
    """Writes the plan as Parquet, atomically; one row per request, `more` are further columns."""
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64()}
    columns = {
        field.name: pa.array(
            [getattr(request, field.name) for request in requests], kinds[str(field.type)]
        )
        for field in fields(Request)
    }
    write_table(pa.table({**columns, **more}), path)


def read_plan(path: Path) -> list[Request]:
    """The requests of a plan, in their order.

    Raises BrokenFileError for a file that is missing, cut off, or no plan.
    """
    columns = [field.name for field in fields(Request)]
    return [Request(**row) for row in read_table(path, columns).to_pylist()]
