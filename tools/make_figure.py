"""Draws the figure of the README: the spectra of three images, and the curriculum below them.

    discl filter fashion-lt --set 'spectrum.levels=[0,10,30,50,70,90]' --set spectrum.seeds=1 \\
        --out runs/figure
    python tools/make_figure.py runs/figure docs/spectrum.png

Sources are hard images with a fully kept spectrum, one per class. The curriculum is that of the
recipe's `discl` method: the level that each epoch draws.
"""

from __future__ import annotations

import argparse
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import discl

CELL, GAP, LEFT, TOP = 128, 10, 150, 64
INK, SOFT = (32, 33, 36), (110, 113, 118)
COLOURS = {0: "#5e4fa2", 10: "#3288bd", 30: "#66c2a5", 50: "#abdda4", 70: "#e6f598", 90: "#fee08b"}
REAL = "#d9d9d9"
BAR = 34


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Synthetic images with verdict, class name and level."""
    kept = {row["id"]: row for row in pq.read_table(folder / "filter.parquet").to_pylist()}
    columns = ["id", "image", "level", "source_id", "label"]
    rows: list[dict[str, Any]] = []
    for shard in sorted((folder / "spectrum").glob("*.parquet")):
        rows += pq.read_table(shard, columns=columns, partitioning=None).to_pylist()
    return [{**row, **kept[row["id"]]} for row in rows if row["id"] in kept]


def choose(rows: list[dict[str, Any]], levels: list[int]) -> list[dict[int, dict[str, Any]]]:
    """Per class the source with a fully kept spectrum and the highest minimum similarity."""
    by_source: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(row["source_id"], {})[row["level"]] = row
    best: dict[int, tuple[float, dict[int, dict[str, Any]]]] = {}
    for spectrum in by_source.values():
        if set(spectrum) != set(levels):
            continue
        similarity = min(row["clip_similarity"] for row in spectrum.values())
        label = spectrum[levels[0]]["label"]
        if label not in best or similarity > best[label][0]:
            best[label] = similarity, spectrum
    return [spectrum for _, (_, spectrum) in sorted(best.items())]


def draw(run: discl.Run, out: Path) -> Path:
    """Writes the figure to `out`."""
    levels = [int(str(level).rstrip("%")) for level in run.recipe.spectrum.levels]
    spectra = choose(rows_of(run.folder), levels)
    table = run.train
    row_of = {name: row for row, name in enumerate(table.ids)}
    width = LEFT + (len(levels) + 1) * (CELL + GAP) + GAP
    height = TOP + len(spectra) * (CELL + GAP) + 110
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    big, small = ImageFont.load_default(22), ImageFont.load_default(17)
    names = ["text only", *(f"level {level} %" for level in levels[1:]), "real"]
    for column, name in enumerate(names):
        middle = LEFT + column * (CELL + GAP) + CELL / 2
        pen.text((middle, TOP - 34), name, INK, big, anchor="mm")
    for number, spectrum in enumerate(spectra):
        y = TOP + number * (CELL + GAP)
        label = spectrum[levels[0]]["label"]
        pen.text((LEFT - 16, y + CELL / 2), table.class_names[label], INK, big, anchor="rm")
        images = [Image.open(io.BytesIO(spectrum[level]["image"]["bytes"])) for level in levels]
        images.append(table.image(row_of[spectrum[levels[0]]["source_id"]]))
        for column, image in enumerate(images):
            square = image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            picture.paste(square, (LEFT + column * (CELL + GAP), y))
    draw_curriculum(pen, run, levels, (LEFT, height - 88, width - 2 * GAP), (big, small))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)
    return out


def draw_curriculum(
    pen: ImageDraw.ImageDraw,
    run: discl.Run,
    levels: list[int],
    box: tuple[int, int, int],
    fonts: tuple[Any, Any],
) -> None:
    """A band of epochs, coloured by the level that each draws: equal stages, then real images."""
    train = run.recipe.train
    left, top, right = box
    big, small = fonts
    pen.text((left - 16, top + BAR / 2), "curriculum", INK, big, anchor="rm")
    edges = [stage * train.curriculum_epochs / len(levels) for stage in range(len(levels) + 1)]
    edges.append(train.epochs)
    for stage, (first, last) in enumerate(pairwise(edges)):
        x0, x1 = (left + (right - left) * edge / train.epochs for edge in (first, last))
        level = levels[stage] if stage < len(levels) else None
        pen.rectangle((x0, top, x1 - 2, top + BAR), fill=REAL if level is None else COLOURS[level])
        caption = "real" if level is None else f"{level} %"
        dark = level is not None and level < 30
        pen.text(
            ((x0 + x1) / 2, top + BAR / 2), caption, "white" if dark else INK, small, anchor="mm"
        )
    caption = "epochs: each draws real images and the synthetic images of one level"
    pen.text((left, top + BAR + 20), caption, SOFT, small, anchor="lm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    recipe = given.run / "recipe.yaml"
    print(draw(discl.open_run(discl.load_recipe(recipe), given.run), given.out))
