"""The curriculum as a sampler: which rows of a data set the next epoch of anybody's loop draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, Subset

from ..curriculum.course import Course, Record, hold_out_guidance, make_mixing
from ..curriculum.strategies import follows_progress, make_strategy
from ..errors import TrainingError
from ..levels import REAL, GuidanceLevel
from .dataset import SpectrumDataset

Probability = Callable[[nn.Module, Any], Tensor]
"""True-class probabilities `[batch]` of a batch as the loader gives it, by a model in evaluation mode."""


class Curriculum(Sampler[int]):
    """A sampler over a `SpectrumDataset` that follows a strategy (arXiv 2410.13674): give it to a `DataLoader`, no worker restarts.

    Before each epoch call `begin(epoch, model)`, or `set_epoch(epoch)` alone where the strategy measures nothing. Every epoch draws
    `samples` rows (default: as many as there are real images), by default with the tail's share kept (`undersample`) and
    `synthetic_scale` synthetic images per hard real one; from `curriculum_epochs` on they are real only.

    `adaptive` and `adaptive-per-class` take `probe_every` epochs at a time: one of random real images around which progress is
    measured, the others at the level that it chose; the last time as many as are left of `curriculum_epochs`. They,
    and `bandit`, hold `guidance_images` back as V (`guidance_rows`), on which `probability(model, batch)` measures; batches of V are made
    by `collate`, `batch_size` at a time. The choice of `strategy`, `shortage` and `missing` is a recipe's.
    """

    def __init__(
        self, dataset: SpectrumDataset, strategy: str = "diverse-to-specific", *, curriculum_epochs: int, samples: int | None = None,
        level: int | None = None, levels: Sequence[int] | None = None, synthetic_scale: float = 3.0, undersample: bool = True,
        shortage: str = "repeat", missing: str = "error", seed: int = 0, probe_every: int = 4, guidance_images: int | None = None,
        probability: Probability | None = None, collate: Callable[[list[Any]], Any] | None = None, batch_size: int = 256,
    ) -> None:  # fmt: skip
        pool = dataset.pool
        there = sorted(set(pool.levels[pool.synthetic].tolist()))
        asked = _check_levels(strategy, level, levels, there)
        if probe_every < 2:
            raise TrainingError(f"probe_every = {probe_every} leaves no epoch for the level that a probe chooses; use 2 or more.")
        samples = samples or int((~pool.synthetic).sum())
        make = partial(make_strategy, strategy, levels=asked, seed=seed, level=GuidanceLevel(level) if level is not None else None)
        followed = make(curriculum_epochs=curriculum_epochs)
        probes = followed.measures(0) == "probe"
        if probes and curriculum_epochs == 1:
            raise TrainingError("curriculum_epochs = 1 leaves no epoch for the level that a probe chooses; use 2 or more.")
        self.span = probe_every if probes else 1
        self.guided = curriculum_epochs
        if probes:
            self.guided -= curriculum_epochs % self.span == 1  # a probe with no epoch after it would be for nothing
            followed = make(curriculum_epochs=-(-self.guided // self.span))
        guidance = None
        if follows_progress(strategy, followed):
            pool, guidance = hold_out_guidance(pool, asked, guidance_images, seed)
        mixing = make_mixing(pool, followed, undersample and strategy != "real-only", synthetic_scale, shortage, missing)
        self.course = Course(pool, followed, mixing, samples * self.span, seed, guidance, samples if probes else 0)
        self.dataset, self.samples, self.probability = dataset, samples, probability or true_class_probability
        self.collate, self.batch_size = collate, batch_size
        self.number = 0
        self.history: list[Record] = []
        self._record: Record = {}
        self._before: np.ndarray | None = None
        self._ended = False

    @property
    def guidance_rows(self) -> np.ndarray:
        """Rows of V, which no epoch draws; empty where the strategy measures nothing."""
        return self.course.guidance.rows if self.course.guidance is not None else np.empty(0, np.int64)

    def begin(self, epoch: int, model: nn.Module | None = None) -> None:
        """Turns to an epoch; measures progress where the strategy asks for it, for which it needs the model.

        Epochs follow one another; a strategy that measures nothing may turn to any. Raises TrainingError otherwise.
        """
        if self._before is not None and epoch != self.number:
            self.end(model)
        self._turn(epoch)
        self._ended = False
        block, part = self._place(epoch)
        if self._before is None and "progress" not in self._record:
            self._before = self.course.before(block, part, self._judge(model))

    def end(self, model: nn.Module | None = None) -> None:
        """After an epoch's last step: measures what it brought. The next `begin` does it too; call it to save the state in between."""
        if self._before is not None:
            self._record |= self.course.progress(self._before, self._judge(model))
            self._before = None
        self._ended = True

    def set_epoch(self, epoch: int) -> None:
        """Turns to an epoch without measuring; the frameworks call it by themselves."""
        if self._before is None or epoch == self.number:
            self._turn(epoch)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows().tolist())

    def rows(self) -> np.ndarray:
        """The rows that this epoch draws, int64 `[samples]`."""
        drawn, _ = self._draw()
        return drawn

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of this epoch as whole per cents; none where it draws real images only."""
        return tuple(self._draw()[1].get("levels", ()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values (as JSON has them) from which `load_state_dict` goes on: at the same epoch, at the next one after `end`."""
        before = None if self._before is None else self._before.tolist()
        state = {"epoch": self.number, "history": self.history, "record": self._record, "before": before, "ended": self._ended}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        After an epoch's end it turns to the next one at once: a loop may ask its data workers for rows before it calls `begin`.
        """
        self.number, self.history, self._record = state["epoch"], list(state["history"]), dict(state["record"])
        self._before = None if state["before"] is None else np.asarray(state["before"])
        self._ended = state.get("ended", False)
        if self._ended:
            self._turn(self.number + 1)

    def _place(self, epoch: int) -> tuple[int, int]:
        """(block, part) of an epoch; blocks begin anew where the curriculum is over."""
        if epoch < self.guided:
            return divmod(epoch, self.span)
        block, part = divmod(epoch - self.guided, self.span)
        return -(-self.guided // self.span) + block, part

    def _draw(self) -> tuple[np.ndarray, Record]:
        block, part = self._place(self.number)
        probes = self.course.parts(block) > 1
        if probes and part == 0:
            return self.course.draw(block, 0, self.history)
        measured = self.course.strategy.measures(block)
        if measured == "probe" and "progress" not in self._record:
            raise TrainingError(f"epoch {self.number} depends on progress that was not measured; call begin({self.number}, model) first.")
        known = [*self.history, self._record] if measured == "probe" else self.history
        rows, chosen = self.course.draw(block, 1 if probes else 0, known)
        first = (part - 1 if probes else part) * self.samples
        return rows[first : first + self.samples], chosen

    def _turn(self, epoch: int) -> None:
        """Closes the records of the blocks before this epoch."""
        if epoch == self.number:
            return
        if self.course.guidance is not None and epoch != self.number + 1:
            raise TrainingError(
                f"epoch {epoch} cannot follow epoch {self.number}: this strategy goes by what each epoch before has brought. "
                "To resume, load the curriculum's state_dict."
            )
        block, _ = self._place(self.number)
        if self._place(epoch)[0] > block and self.course.guidance is not None:
            if self.course.strategy.measures(block) != "never" and "progress" not in self._record:
                raise TrainingError(f"progress of epoch {self.number} was not measured; call begin(epoch, model) before each epoch.")
            self.history.append({"epoch": block, **self._draw()[1], **self._record})
            self._record = {}
        self.number, self._ended = epoch, False

    def _judge(self, model: nn.Module | None) -> Callable[[], np.ndarray] | None:
        guidance = self.course.guidance
        if guidance is None:
            return None

        def judge() -> np.ndarray:
            if model is None:
                raise TrainingError("this strategy follows learning progress: call begin(epoch, model) with the model.")
            loader = DataLoader(Subset(self.dataset, guidance.rows.tolist()), self.batch_size, collate_fn=self.collate)
            training = model.training
            model.eval()
            with torch.inference_mode():
                found = [self.probability(model, batch).double().cpu() for batch in loader]
            model.train(training)
            result = torch.cat(found).numpy()
            if result.shape != (len(guidance),):
                raise TrainingError(f"probability gave {list(result.shape)} values for {len(guidance)} images; give one per image.")
            return result

        return judge


def true_class_probability(model: nn.Module, batch: Any) -> Tensor:
    """Softmax of the model's logits at the true class, `[batch]`.

    A batch is `(images, labels, …)`, or a mapping with `labels` of which the rest goes to the model by name.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}
        labels, answered = batch["labels"].to(device), model(**inputs)
    else:
        labels, answered = batch[1].to(device), model(batch[0].to(device))
    logits = getattr(answered, "logits", answered)
    return torch.softmax(logits.double(), 1).gather(1, labels[:, None])[:, 0]


def _check_levels(strategy: str, level: int | None, levels: Sequence[int] | None, there: Sequence[int]) -> tuple[GuidanceLevel, ...]:
    """The levels to go through. Raises TrainingError for one of which the data set holds no image."""
    if (strategy == "fixed") != (level is not None):
        raise TrainingError("strategy 'fixed' and level= go together, for example Curriculum(dataset, 'fixed', level=50, ...).")
    named: dict[str, list[int]] = {"text-only": [0], "fixed": [level or 0], "real-only": []}
    wanted = named.get(strategy, list(there if levels is None else levels))
    lacking = [percent for percent in wanted if percent not in there and percent != REAL.percent]
    if lacking or (not wanted and strategy != "real-only"):
        raise TrainingError(
            f"strategy '{strategy}' asks for level {', '.join(map(str, lacking)) or '(none)'}, of which this data set holds no synthetic "
            f"image; it has {', '.join(map(str, there)) or 'none at all'}."
        )
    return tuple(GuidanceLevel(int(percent)) for percent in wanted)
