"""Checkpoint and history of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..curriculum.schedule import Record
from ..errors import BrokenFileError, TrainingError
from ..models.classifier import TRAINED_AGAIN, first_cause
from ..run_folder import paths
from ..utils.stored import read_header, read_lines, read_tensors, save_tensors, write_text
from .step import TrainState


def save_checkpoint(
    path: Path, state: TrainState, history: Sequence[Record], fingerprint: str
) -> None:
    """Writes weights, optimizer state and history into one file, atomically.

    Raises WriteError where the disk refuses; the previous checkpoint is then intact.
    """
    metadata = {"history": json.dumps(history), "fingerprint": fingerprint}
    save_tensors(state.state_dict(), path, metadata)
    write_history(history, path.parent / paths.HISTORY)


def load_checkpoint(path: Path, state: TrainState, fingerprint: str) -> list[Record]:
    """Restores the state in place and returns the history.

    Raises TrainingError for the checkpoint of another model or training.
    """
    try:
        _, metadata = read_header(path)
        if metadata.get("fingerprint", fingerprint) != fingerprint:
            raise ValueError("it was saved while something else was trained.")
        history: list[Record] = json.loads(metadata["history"])
        state.load_state_dict(read_tensors(path))
    except (BrokenFileError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"checkpoint {path} does not belong to this model: {first_cause(error)} Delete its "
            "folder to train again."
        ) from error
    return history


def copy_checkpoint(path: Path, to: Path, fingerprint: str) -> None:
    """Copies a checkpoint to the folder of another training, which goes on from it.

    - `fingerprint`: of that training.
    """
    _, metadata = read_header(path)
    save_tensors(read_tensors(path), to, {**metadata, "fingerprint": fingerprint})
    write_history(json.loads(metadata["history"]), to.parent / paths.HISTORY)


def finished_epochs(path: Path, fingerprint: str) -> int:
    """Epochs that a checkpoint has behind it; 0 if it does not exist.

    It is -1 for a checkpoint that cannot be read, or that belongs to another training.
    """
    if not path.exists():
        return 0
    try:
        _, metadata = read_header(path)
        own = metadata["fingerprint"] == fingerprint
        return len(json.loads(metadata["history"])) if own else -1
    except (BrokenFileError, KeyError, TypeError, ValueError):
        return -1


def write_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one JSON line per epoch."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in history))


def read_history(path: Path) -> list[Record]:
    """Returns the records that `write_history` wrote; raises BrokenFileError for a broken file."""
    return read_lines(path, "epoch", advice=TRAINED_AGAIN)
