"""Synthetic images that the filter drops because an audit found that they copy held-out ones."""

from __future__ import annotations

from ..audit.findings import Finding
from ..audit.table import leaked_images, read_findings
from ..errors import BrokenFileError
from ..run_folder import paths
from ..run_folder.run import Run
from ..utils.hashing import digest
from ..utils.stored import read_table


def find_leaks(run: Run) -> dict[str, str]:
    """`{id: reason}`; empty without an audit, and with `audit.leakage: keep`."""
    path = run.path(paths.AUDIT)
    if run.recipe.audit.leakage == "keep" or not path.exists():
        return {}
    return leaked_images(path, key_of_real(run))


def current_findings(run: Run) -> list[Finding] | None:
    """The findings of the last audit; None without one, and for one of other real images."""
    path = run.path(paths.AUDIT)
    if not path.exists():
        return None
    try:
        return read_findings(path, key_of_real(run))
    except BrokenFileError:
        return None


def key_of_real(run: Run) -> str:
    """Digest of the real images and their splits, which an audit belongs to."""
    listed = read_table(run.path(paths.DATA), ["split", "id", "digest"])
    return digest(listed.to_pydict())
