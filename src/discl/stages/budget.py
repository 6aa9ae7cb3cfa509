"""The budget of a run, in images or UNet rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.draws import Cap, DrawRule, SpreadOrder
from ..spectrum.plan import Request, step_rows, unet_rows
from ..utils.counts import count_of
from ..utils.hashing import digest
from ..utils.stored import broken, read_json, write_text

AGAIN = "Delete it and run the command again; the speed is then measured again."


def count_rows(run: Run, requests: Sequence[Request]) -> int:
    """Rows that the network computes for these requests with the recipe's settings."""
    sampling = run.sampling
    scale = 1 if run.generator.distilled else sampling.guidance_scale
    return unet_rows(
        requests,
        sampling.num_inference_steps,
        scale,
        fixed=sampling.fixed,
        guidance_interval=sampling.guidance_interval,
    )


def rows_of_steps(run: Run, level: int) -> list[int]:
    """Rows of each step of a level with the recipe's settings."""
    sampling = run.sampling
    return step_rows(
        level,
        sampling.num_inference_steps,
        1 if run.generator.distilled else sampling.guidance_scale,
        fixed=sampling.fixed,
        guidance_interval=sampling.guidance_interval,
    )


def rows_by_level(run: Run) -> dict[int, int]:
    """`{level: rows of one image}` for the levels of the spectrum."""
    return {
        level: count_rows(run, [Request.of("", level, "", 8)])
        for level in sorted(run.recipe.spectrum.levels)
    }


def draw_rule(run: Run) -> DrawRule:
    """How many draws each source gets at a level."""
    return DrawRule(run.recipe.spectrum.tries, run.recipe.spectrum.wanted)


def spread_order(run: Run, sources: Iterable[Mapping[str, Any]]) -> SpreadOrder:
    """The order in which a budget takes draws; `sources` have `id` and `label`."""
    return SpreadOrder(
        [(source["id"], source["label"]) for source in sources], run.recipe.spectrum.levels
    )


def count_first(run: Run, sources: Sequence[object]) -> int:
    """Draws that the plan holds before any score is known, if no budget cuts it."""
    return len(sources) * len(run.recipe.spectrum.levels) * first_seeds(run)


def first_seeds(run: Run) -> int:
    """Seeds of each source and level in the plan."""
    return run.recipe.spectrum.wanted or run.recipe.spectrum.seeds


def find_cap(run: Run, sources: Iterable[Mapping[str, Any]]) -> Cap | None:
    """The budget of the recipe, None without one.

    Raises BrokenFileError if `budget.json` is broken, or missing for a budget in hours.
    """
    budget = run.recipe.spectrum.budget
    if budget is None:
        return None
    order, prices = spread_order(run, sources), rows_by_level(run)
    if budget.images is not None:
        return Cap(budget.images, dict.fromkeys(prices, 1), order)
    amount = budget.unet_rows if budget.unet_rows is not None else known_rows(run)
    return Cap(amount, prices, order)


def _hours_key(run: Run) -> str:
    budget = run.recipe.spectrum.budget
    return digest(budget.hours if budget else None, run.sampling.identity())


def has_rows(run: Run) -> bool:
    """Whether the hours of the budget are turned into UNet rows already."""
    path = run.path(paths.BUDGET)
    return path.exists() and read_json(path, "key", advice=AGAIN)["key"] == _hours_key(run)


def known_rows(run: Run) -> int:
    """The UNet rows that the budget's hours buy, as measured once."""
    path = run.path(paths.BUDGET)
    rows = read_json(path, "unet_rows", advice=AGAIN)["unet_rows"]
    if type(rows) is not int or rows < 0:
        raise broken(path, "does not state unet_rows as a whole number", AGAIN)
    return rows


def keep_rows(run: Run, rows_per_second: float, devices: int) -> None:
    """Writes the UNet rows that the budget's hours buy at a measured speed of one device."""
    budget = run.recipe.spectrum.budget
    hours = budget.hours if budget and budget.hours else 0.0
    values = {
        "key": _hours_key(run),
        "hours": hours,
        "rows_per_second": rows_per_second,
        "devices": devices,
        "unet_rows": int(hours * 3600 * rows_per_second * devices),
    }
    write_text(run.path(paths.BUDGET), json.dumps(values, indent=2) + "\n")


def unit_of(run: Run, count: int) -> str:
    """A number of the budget's unit: `1,200 UNet rows`."""
    budget = run.recipe.spectrum.budget
    images = budget is not None and budget.images is not None
    return count_of(count, "image" if images else "UNet row")


def describe_cap(run: Run, cap: Cap) -> str:
    """The budget in words: `the budget of 5,000 UNet rows`."""
    budget = run.recipe.spectrum.budget
    text = f"the budget of {unit_of(run, cap.amount)}"
    hours = budget.hours if budget else None
    return text if hours is None else f"{text} ({hours:g} h at the measured speed)"
