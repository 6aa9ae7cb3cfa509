"""What `discl audit` found, as a table with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..audit.findings import KINDS, SYNTHETIC, Finding
from ..data import ImageTable
from ..errors import DataError
from ..utils.counts import list_some
from .gallery import to_uri
from .run_summary import read_pictures

SHOWN = 4
"""Findings of a kind that are shown with their pictures, at most."""
SHOWN_CLASSES = 6
WITHOUT_PICTURES = ("unreadable",)


@dataclass(frozen=True)
class AuditPicture:
    """A finding with its picture, and with that of the image that it copies.

    - `uris`: one or two data URIs.
    """

    caption: str
    uris: tuple[str, ...]


@dataclass(frozen=True)
class AuditRow:
    """The findings of one kind.

    - `counts`: number of images, or of classes, by split.
    - `note`: the classes of findings about classes.
    """

    kind: str
    text: str
    counts: Mapping[str, int]
    note: str
    pictures: tuple[AuditPicture, ...]


def audit_rows(
    findings: Sequence[Finding], tables: Mapping[str, ImageTable], store: Path | str
) -> list[AuditRow]:
    """A row per kind of finding, the severest first.

    - `tables`: real images by split.
    - `store`: folder of the synthetic images.
    """
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    shown = {
        kind: [each for each in groups.get(kind, ())[:SHOWN] if each.id]
        for kind in KINDS
        if kind not in WITHOUT_PICTURES
    }
    uris = _read_uris([each for chosen in shown.values() for each in chosen], tables, store)
    names = next(iter(tables.values())).class_names
    rows = []
    for kind in (kind for kind in KINDS if kind in groups):
        found = groups[kind]
        counts: dict[str, int] = {}
        for finding in found:
            counts[finding.split] = counts.get(finding.split, 0) + 1
        pictures = [_picture(finding, uris) for finding in shown.get(kind, ())]
        rows.append(
            AuditRow(
                kind,
                KINDS[kind],
                counts,
                _describe_classes(found, names),
                tuple(picture for picture in pictures if picture.uris),
            )
        )
    return rows


def _describe_classes(findings: Sequence[Finding], names: Sequence[str]) -> str:
    """The classes with the smallest values; empty for findings about images."""
    about = sorted((each for each in findings if not each.id), key=lambda each: each.value)
    shown = [f"{names[each.label]} at {each.level} %: {each.value:.2f}" for each in about]
    return list_some(shown, SHOWN_CLASSES)


def _picture(finding: Finding, uris: Mapping[tuple[str, str], str]) -> AuditPicture:
    wanted = [(finding.split, finding.id)]
    caption = f"{finding.split} '{finding.id}', {finding.value:.2f}"
    if finding.other:
        wanted.append((finding.other_split, finding.other))
        caption = f"{caption}; {finding.other_split} '{finding.other}'"
    return AuditPicture(caption, tuple(uris[each] for each in wanted if each in uris))


def _read_uris(
    findings: Sequence[Finding], tables: Mapping[str, ImageTable], store: Path | str
) -> dict[tuple[str, str], str]:
    """Pictures by (split, id), at most 160 pixels a side; those that cannot be read are missing."""
    wanted = {(each.split, each.id) for each in findings}
    wanted |= {(each.other_split, each.other) for each in findings if each.other}
    made = {name for split, name in wanted if split == SYNTHETIC}
    pictures = {
        (SYNTHETIC, name): image
        for name, image in (read_pictures(store, made) if made else {}).items()
    }
    for split, table in tables.items():
        names = {name for each, name in wanted if each == split}
        for row, name in enumerate(table.ids if names else ()):
            if name in names:
                try:
                    pictures[split, name] = table.image(row)
                except DataError:
                    continue
    return {key: to_uri(image) for key, image in pictures.items()}
