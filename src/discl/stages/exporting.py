"""`discl export`: the kept images of a run as a data set for other tools, with a card that says how they were made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..checkpoints import public_name
from ..console import progress, say
from ..digests import digest
from ..errors import RecipeError, StoreError, unknown
from ..export import FORMATS, export_images, make_card
from ..export.writing import is_there
from ..spectrum.models.stable_diffusion import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from ..workspace import Run, stored_images

VERDICT = ("clip_similarity", "keep", "reason")
LIMIT_OF_LISTED_CLASSES = 20


def export(run: Run, kind: str, out: Path, everything: bool = False) -> Path:
    """Writes the kept images, or with `everything` all of them, in one of `FORMATS` into the folder `out` and returns it.

    `run` is filtered already. The export appears whole or not at all, and again does nothing where it is there. Raises RecipeError for an
    unknown format, StoreError where nothing was kept or `out` holds something else.
    """
    if kind not in FORMATS:
        raise RecipeError(unknown("format", kind, FORMATS))
    verdicts = pq.read_table(run.path("filter.parquet"))
    chosen = verdicts if everything else verdicts.filter(verdicts["keep"])
    if not len(chosen):
        raise StoreError(
            f"the filter kept none of the {len(verdicts)} images; lower filter.threshold ({run.recipe.filter.threshold:g}) or use --all."
        )
    names = run.train.class_names
    card = make_card(run.recipe.name, kind, len(chosen), names, _levels(verdicts), describe_making(run, everything))
    fingerprint = digest(kind, chosen["id"].to_pylist(), chosen["keep"].to_pylist(), card)
    if is_there(out, fingerprint):
        say(f"export: {out} holds these {len(chosen)} images already")
        return out
    with progress("export", len(chosen)) as advance:

        def images() -> Iterator[dict[str, Any]]:
            for image in _images(run, chosen):
                yield image
                advance(1)

        return export_images(out, kind, images(), names, card, fingerprint)


def describe_making(run: Run, everything: bool) -> dict[str, str]:
    """How the images were made, in lines for the card; folders of this machine are left out of names."""
    recipe, sampling = run.recipe, run.sampling
    asked, names = recipe.spectrum, run.train.class_names
    listed = ", ".join(names[:LIMIT_OF_LISTED_CLASSES])
    more = f" and {len(names) - LIMIT_OF_LISTED_CLASSES} more" if len(names) > LIMIT_OF_LISTED_CLASSES else ""
    facts = {
        "source data set": f"{public_name(recipe.data.root)}, its training split",
        "classes": listed + more,
        "hard images": _hard_rule(run),
        "generator": f"{public_name(asked.checkpoint)} (digest {sampling.model}), {run.generator.family}",
        "levels λ": ", ".join(f"{level.percent} %" for level in sorted(asked.levels)),
        "seeds": f"{asked.seeds} per hard image and level" + (f", each drawn up to {asked.tries} times" if asked.tries > 1 else ""),
        "sampler": f"{run.generator.sampler}; {_steps(run)}",
        "guidance scale": _guidance(run),
        "pixels": _pixels(run),
        "precision and encoding": f"{asked.dtype}, {asked.encoding}",
        "prompts": _prompts(run),
        **_options(run),
        "filter": _filter(run),
        "in this folder": "all images; `keep` says which ones the filter kept" if everything else "only images that the filter kept",
    }
    return facts


def _steps(run: Run) -> str:
    steps = run.sampling.num_inference_steps
    if run.sampling.fixed:
        return f"{steps} inference steps at every level, finer ones over the last (1 − λ) of the noise schedule"
    return f"{steps} inference steps, of which a level λ takes the last ⌊(1 − λ) · {steps}⌋"


def _guidance(run: Run) -> str:
    scale = f"{run.sampling.guidance_scale:g} (as diffusers counts it)"
    if run.generator.distilled:
        return f"{scale}, told to the network, whose guidance is distilled"
    return scale if _is_guided(run) else "1, no guidance"


def _is_guided(run: Run) -> bool:
    return run.sampling.guidance_scale != 1 and not run.generator.distilled


def _pixels(run: Run) -> str:
    size = run.sampling.size
    if run.sampling.resize == "square":
        return f"{size} × {size}, sources cut to their centre squares"
    return f"about {size} × {size} at the source's own aspect, to 4 : 1"


def _options(run: Run) -> dict[str, str]:
    """Lines of what only some runs ask for."""
    recipe, facts = run.recipe, {}
    if recipe.prompts.negative:
        unused = "" if _is_guided(run) else "; without effect, for there is no guidance that leads away from it"
        facts["negative prompt"] = f"“{recipe.prompts.negative}”{unused}"
    if recipe.prompts.names:
        facts["names in prompts"] = f"{len(recipe.prompts.names)} classes have other names in prompts than in this data set"
    if run.sampling.guidance_interval != (0.0, 1.0):
        low, high = run.sampling.guidance_interval
        facts["guidance interval"] = f"guided only at noise shares in ({low:g}, {high:g}], 1 being pure noise"
    if run.generator.aesthetic:
        facts["aesthetic score"] = f"{AESTHETIC_SCORE:g}, and {NEGATIVE_AESTHETIC_SCORE:g} for what guidance leads away from"
    if recipe.spectrum.loras:
        facts["LoRA"] = ", ".join(f"{public_name(lora.path)} × {lora.scale:g}" for lora in recipe.spectrum.loras)
    return facts


def _filter(run: Run) -> str:
    asked = run.recipe.filter
    clip = public_name(asked.checkpoint)
    if asked.rule == "alia":
        return (
            f"ALIA's two (arXiv 2305.16289): images that {clip} finds nearer to a text that fits any picture than to “{asked.template}”, "
            "and images that a classifier of the real ones finds too easy or mislabelled, are dropped"
        )
    return f"clip_similarity ≥ {asked.threshold:g} with “{asked.template}”, by {clip}"


def _hard_rule(run: Run) -> str:
    rule, count = run.recipe.hard, pq.read_metadata(run.path("hard.parquet")).num_rows
    if rule.rule == "tail":
        return f"{count:,}: all training images of classes with fewer than {rule.fewer_than}"
    return f"{count:,}: training images whose true class gets a probability below {rule.below:g}"


def _prompts(run: Run) -> str:
    asked = run.recipe.prompts
    if asked.endpoint is not None:
        return f"descriptions of each class by {asked.endpoint.model}, perhaps edited; one drawn per source and seed"
    if asked.phrases is not None:
        return f"phrase list {public_name(asked.phrases)}; one drawn per source and seed"
    texts = "; ".join(f"“{template}”" for template in asked.templates)
    if asked.settings is not None:
        return f"{texts}, settings by {asked.settings.endpoint.model}, perhaps edited; one drawn per source and seed"
    return texts if asked.captions is None else f"{texts}, captions by {public_name(asked.captions.checkpoint)}"


def _levels(verdicts: pa.Table) -> dict[int, tuple[int, int]]:
    """`{level: (kept, planned)}`."""
    counted = verdicts.group_by("level").aggregate([("keep", "sum"), ("keep", "count")]).to_pylist()
    return {row["level"]: (row["keep_sum"], row["keep_count"]) for row in counted}


def _images(run: Run, chosen: pa.Table) -> Iterator[dict[str, Any]]:
    """Every chosen image with its facts, in the order of the plan; pictures are read one by one from the store."""
    pictures = stored_images(run, chosen["id"].to_pylist())
    columns = [name for name in run.spectrum.schema.names if name not in {"image", "label"}]
    table = run.spectrum.read(columns)
    table = table.select([name for name in columns if table[name].null_count < len(table)])
    place = {name: row for row, name in enumerate(table["id"].to_pylist())}
    for row, verdict in enumerate(chosen.to_pylist()):
        facts = table.slice(place[verdict["id"]], 1).to_pylist()[0]
        yield {**facts, "label": verdict["label"], **{key: verdict[key] for key in VERDICT}, "bytes": pictures[row]["image"]["bytes"]}
