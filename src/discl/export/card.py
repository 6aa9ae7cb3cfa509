"""The data-set card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..escaping import for_markdown

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
CITATION = "arXiv 2410.13674 (Diffusion Curriculum, ICCV 2025)"


def make_card(
    name: str,
    kind: str,
    images: int,
    class_names: Sequence[str],
    levels: Mapping[int, tuple[int, int]],
    facts: Mapping[str, Any],
) -> str:
    """Markdown with a YAML header. `levels` maps a level to (images kept, images planned); `facts` are lines of the table, what: value."""
    header: dict[str, Any] = {
        "pretty_name": f"{name}: synthetic images", "license": "other", "license_name": "see-licence-section",
        "task_categories": ["image-classification"], "tags": ["synthetic", "diffusion", "discl", "arxiv:2410.13674"],
        "size_categories": [next((size for bound, size in SIZES if images < bound), "1M<n<10M")],
    }  # fmt: skip
    if kind == "hub-folder":
        header["configs"] = [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ]
    title = f"# {for_markdown(name)}: synthetic images"
    made = [
        f"| {for_markdown(what)} | {for_markdown(str(value))} |" for what, value in facts.items()
    ]
    kept, planned = (sum(pair[place] for pair in levels.values()) for place in (0, 1))
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "", title, "",
        f"{images:,} images, made by a text-to-image model from hard training images of a data set of {len(class_names)} classes: a "
        f"spectrum over the level λ of image guidance, from text only (0) towards the real image (100), as in {CITATION}. No real image is "
        "among them.",
        "", "## How they were made", "", "| | |", "|---|---|", *made,
        "", f"The filter kept {kept:,} of {planned:,} images ({kept / planned:.1%}):" if planned else "", "",
        "| level λ, % | kept | made | share |", "|---:|---:|---:|---:|",
        *(f"| {level} | {pair[0]:,} | {pair[1]:,} | {pair[0] / pair[1]:.1%} |" for level, pair in sorted(levels.items())),
        "", "## Columns", "",
        "`label` is the class; `level` λ in per cent; `prompt` and `negative_prompt` the texts; `seed` and `attempt` determine, with the "
        "source, the noise, which all levels share; `source_id` names the real image that it was made from; `clip_similarity` is the "
        "filter's raw cosine, `keep` its verdict. The other columns are the settings of the sampler, with digests of the checkpoints.",
        "", "## Licence", "",
        "None is given here. Each image derives from the generator's checkpoint and, above level 0, from one image of the source data set: "
        "the licences of both apply to it. Check them before you share this folder, and write the result into the header above.", "",
    ]  # fmt: skip
    return "\n".join(lines)
