"""`discl export`: the kept images as a data set for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ..checkpoints import public_name
from ..errors import RecipeError, RunError, StoreError, arguments_named, unknown
from ..export import FORMATS, export_images, holds_export, make_card
from ..recipe import Filter
from ..run_folder import paths
from ..run_folder.images import stored_images
from ..run_folder.run import Run
from ..utils.console import progress
from ..utils.counts import count_of, list_some
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.stored import read_table
from .provenance import describe_making

if TYPE_CHECKING:
    from ..export.signing import ContentSigner

logger = get_logger(__name__)

VERDICT = ("clip_similarity", "keep", "reason")
MOST_CLASSES = 20
"""Classes that a card names at most."""
MARKED = (
    "the XMP of each image says that it is synthetic (IPTC DigitalSourceType "
    "trainedAlgorithmicMedia), by which software and version, and its id"
)


def check_format(kind: str) -> None:
    """Raises RecipeError unless `kind` is one of `FORMATS`."""
    if kind not in FORMATS:
        raise RecipeError(unknown("format", kind, FORMATS), argument="--to")


def open_signer(certificate: Path, key: Path) -> ContentSigner:
    """What signs images as C2PA content credentials.

    - `certificate`, `key`: PEM files; see `ContentSigner`.

    Raises RunError without the packages of `discl[c2pa]`, and RecipeError for files that cannot be
    used.
    """
    try:
        from ..export.signing import ContentSigner
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("c2pa", "cryptography"):
            raise
        raise RunError(
            f"`--c2pa` needs the package {package}: pip install 'discl[c2pa]'."
        ) from error
    with arguments_named(certificate="--c2pa", key="--c2pa"):
        return ContentSigner(certificate, key)


def export(
    run: Run,
    kind: str,
    out: Path,
    everything: bool = False,
    *,
    marks: bool = True,
    signer: ContentSigner | None = None,
) -> Path:
    """Writes the kept images as a data set into a folder; returns the folder.

    - `run`: a filtered run.
    - `kind`: one of `FORMATS`.
    - `out`: the folder, which is written atomically. An identical export is left as it is.
    - `everything`: whether to write all images.
    - `marks`: whether each image says in its XMP that it is synthetic.
    - `signer`: signs each image; see `open_signer`.

    Raises RecipeError for an unknown format. Raises StoreError where nothing was kept, or where
    `out` holds anything else.
    """
    check_format(kind)
    verdicts = read_table(run.path(paths.FILTER))
    finished = verdicts.filter(pc.is_finite(verdicts["clip_similarity"]))
    chosen = finished if everything else verdicts.filter(verdicts["keep"])
    if not len(chosen):
        raise _none_kept(run.recipe.filter, len(verdicts))
    names, hard = run.train.class_names, len(read_table(run.path(paths.HARD), ["id"]))
    making = describe_making(run.recipe, run.generator, run.size)
    facts = describe_export(making, run.recipe.data.root, names, hard, everything, marks=marks)
    if signer is not None:
        facts["signature"] = (
            f"C2PA content credentials of {signer.name}, SHA-256 of the certificate {signer.digest}"
        )
    card = make_card(
        run.recipe.name,
        kind,
        len(chosen),
        class_names=names,
        levels=_levels(verdicts),
        facts=facts,
    )
    fingerprint = digest(kind, chosen["id"].to_pylist(), chosen["keep"].to_pylist(), card)
    if holds_export(out, fingerprint):
        logger.info(f"export: {out} holds {count_of(len(chosen), 'image')} already")
        return out
    with progress("export", len(chosen)) as advance:

        def images() -> Iterator[dict[str, Any]]:
            for image in _images(run, chosen):
                yield image
                advance(1)

        return export_images(
            out,
            kind,
            images(),
            class_names=names,
            card=card,
            fingerprint=fingerprint,
            marks=marks,
            sign=None if signer is None else signer.sign,
        )


def _none_kept(config: Filter, images: int) -> StoreError:
    remedies = ["use --all"]
    if config.rule == "difficulty":
        remedies.insert(0, "widen filter.band")
    if config.rule != "alia":
        remedies.insert(0, f"lower filter.threshold ({config.threshold:g})")
    return StoreError(f"the filter kept none of the {images} images; {' or '.join(remedies)}.")


def describe_export(
    making: Mapping[str, str],
    root: str,
    class_names: Sequence[str],
    hard: int,
    everything: bool,
    *,
    marks: bool = True,
) -> dict[str, str]:
    """Describes the images for the card: where they come from, how they were made, which are here.

    - `making`: from `describe_making`.
    - `root`, `hard`: the data set, and its number of hard images.
    - `marks`: whether the images say that they are synthetic.
    """
    return {
        "source data set": f"{public_name(root)}, its training split",
        "classes": list_some(class_names, MOST_CLASSES),
        **making,
        "hard images": f"{hard:,}: {making['hard images']}",
        "in this folder": "all images; `keep` says which ones the filter kept"
        if everything
        else "only images that the filter kept",
        "marks": MARKED if marks else "none: the image files do not say that they are synthetic",
    }


def _levels(verdicts: pa.Table) -> dict[int, tuple[int, int]]:
    """`{level: (kept, planned)}`."""
    counted = verdicts.group_by("level").aggregate([("keep", "sum"), ("keep", "count")]).to_pylist()
    return {row["level"]: (row["keep_sum"], row["keep_count"]) for row in counted}


def _images(run: Run, chosen: pa.Table) -> Iterator[dict[str, Any]]:
    """Every chosen image with its facts, in the order of the plan; the store is read lazily."""
    pictures = stored_images(run, chosen["id"].to_pylist())
    columns = [
        name for name in run.spectrum.schema.names if name not in {"image", "label", "image_digest"}
    ]
    table = run.spectrum.read(columns)
    table = table.select([name for name in columns if table[name].null_count < len(table)])
    place = {name: row for row, name in enumerate(table["id"].to_pylist())}
    for row, verdict in enumerate(chosen.to_pylist()):
        facts = table.slice(place[verdict["id"]], 1).to_pylist()[0]
        yield {
            **facts,
            "label": verdict["label"],
            **{key: verdict[key] for key in VERDICT},
            "bytes": pictures[row]["image"]["bytes"],
        }
