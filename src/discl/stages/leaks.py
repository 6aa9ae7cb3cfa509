"""Synthetic images that the filter drops because an audit found that they copy held-out ones."""

from __future__ import annotations

from ..audit.findings import Finding
from ..audit.table import key_of_real, leaked_images, read_findings
from ..errors import BrokenFileError
from ..run_folder import paths
from ..run_folder.run import Run


def find_leaks(run: Run) -> dict[str, str]:
    """`{id: reason}`; empty without an audit, and with `audit.leakage: keep`."""
    path = run.path(paths.AUDIT)
    if run.recipe.audit.leakage == "keep" or not path.exists():
        return {}
    return leaked_images(path, key_of_real(run.path(paths.DATA)))


def current_findings(run: Run) -> list[Finding] | None:
    """The findings of the last audit; None without one, and for one of other real images."""
    path = run.path(paths.AUDIT)
    if not path.exists():
        return None
    try:
        return read_findings(path, key_of_real(run.path(paths.DATA)))
    except BrokenFileError:
        return None
