"""The page of `discl pilot`: what was measured, the recommendation, and the images themselves."""

from __future__ import annotations

from pathlib import Path

from ..data import ImageTable
from ..run_folder import paths
from ..utils.stored import read_json, write_text
from .gallery import MAX_BYTES, Trials, make_gallery
from .pilot_section import AGAIN, read_pilot
from .templates import make_environment


def write_pilot(folder: Path, train: ImageTable, store: Path | str) -> Path:
    """Writes `pilot/pilot.html` from the pilot of a run folder; returns its path.

    - `train`: the real training images.
    - `store`: folder of the pilot's images.

    Every candidate shows the same hard images, marked at its chosen threshold. All pictures take at
    most about 2 MB. The page is written atomically. Raises RunError if there is no pilot.
    """
    place = folder / paths.PILOT
    keys = ("name", "trials", "outcomes")
    found = read_json(place / paths.PILOT_DATA, *keys, advice=AGAIN)
    thresholds = {each["candidate"]: each["threshold"] for each in found["outcomes"]}
    galleries = {}
    for name, trials in found["trials"].items():
        made = Trials(
            [place / each for each in trials],
            train.class_names,
            train.class_counts,
            thresholds[name],
        )
        galleries[name] = make_gallery(made, train, store, MAX_BYTES // len(found["trials"]))
    page = make_environment().get_template("pilot_page.html.j2")
    text = page.render(
        name=found["name"], pilot=read_pilot(folder), galleries=galleries, thresholds=thresholds
    )
    path = place / paths.PILOT_PAGE
    write_text(path, text)
    return path
