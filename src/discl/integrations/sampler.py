"""`Curriculum`: a sampler that follows a strategy and measures progress for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, Subset

from ..curriculum.schedule import EpochSchedule, Record, hold_out_guidance, make_sampling
from ..curriculum.strategies import follows_progress, make_strategy
from ..errors import RecipeError, TrainingError, unknown
from ..levels import REAL, check_level
from ..recipe import Method
from ..training.distributed import Processes, current_processes
from .dataset import SpectrumDataset
from .probability import Probability, in_float32, true_class_probability

ARGUMENTS = {
    "train.curriculum_epochs": "curriculum_epochs", "methods.*.guidance_images": "guidance_images", "spectrum.levels": "levels",
    "set missing: nearest in the method": "give missing='nearest'", "undersample: false": "undersample=False",
}  # fmt: skip
"""What messages say to a recipe's author, and what stands for it here."""


@contextmanager
def _in_own_words() -> Iterator[None]:
    """Errors that name a recipe's keys name the arguments of `Curriculum` instead."""
    try:
        yield
    except (RecipeError, TrainingError) as error:
        told = str(error)
        for key, argument in ARGUMENTS.items():
            told = told.replace(key, argument)
        if told == str(error):
            raise
        raise type(error)(told) from error


class Curriculum(Sampler[int]):
    """A sampler over a `SpectrumDataset` that follows a strategy (arXiv 2410.13674): give it to a `DataLoader`, no worker restarts.

    Before each epoch call `begin(epoch, model)`, or `set_epoch(epoch)` alone where the strategy
    measures nothing. What `begin` said holds until `end` or the next `begin`, whatever `set_epoch`
    a prepared loader calls with its own count. Every epoch draws `samples` rows (default: as many
    as there are real images), with `synthetic_scale` synthetic images per hard real one; from
    `curriculum_epochs` on they are real only. `undersample` draws fewer of the other images, so
    that the tail keeps its share of an epoch; by default it does where hard classes are hard as a
    whole, as in a long tail, and not where single images are.

    `adaptive` and `adaptive-per-class` take `probe_every` epochs at a time: one of random real
    images around which progress is measured, the others at the level that it chose; the last time
    as many as are left of `curriculum_epochs`. They, and `bandit`, hold `guidance_images` hard
    images back, with all synthetic images of them, as the sources of V (default 2,000, or a fifth
    of those with a spectrum if that is less). V (`guidance_rows`) has one synthetic image of each
    at every level, on which `probability(model, batch)` measures, through the data set's
    `evaluation_transform`; batches of V are made by `collate`, `batch_size` at a time. The choice
    of `strategy`, `shortage` and `missing` is a recipe's; `allow_plugins` gives leave to import a
    strategy that is named as `module:attribute`.

    Where several processes train together each draws its share of an epoch: of n processes the k-th, from 0, every n-th row from the
    k-th on, `samples` being rounded down to a multiple of n; so their batches of b are together those of n · b rows that one process would
    draw. `rank` and `world_size` are torch.distributed's by default, once that is initialised; `rank=0, world_size=1` gives every
    process all rows, for a framework that divides what a sampler draws. Every process has to call `begin` and `end`; what the first
    one measures holds for all.
    """

    def __init__(
        self, dataset: SpectrumDataset, strategy: str = "diverse-to-specific", *, curriculum_epochs: int, samples: int | None = None,
        level: int | None = None, levels: Sequence[int] | None = None, synthetic_scale: float = 3.0, undersample: bool | None = None,
        shortage: str = "repeat", missing: str = "error", seed: int = 0, probe_every: int = 4, guidance_images: int | None = None,
        probability: Probability | None = None, collate: Callable[[list[Any]], Any] | None = None, batch_size: int = 256,
        rank: int | None = None, world_size: int | None = None, allow_plugins: bool = False,
    ) -> None:  # fmt: skip
        _check_choices(shortage=shortage, missing=missing)
        _check_bounds(
            curriculum_epochs=(curriculum_epochs, 0),
            synthetic_scale=(synthetic_scale, 0),
            batch_size=(batch_size, 1),
        )
        _check_bounds(samples=(samples, 1), guidance_images=(guidance_images, 1))
        pool = dataset.pool
        there = sorted(set(pool.levels[pool.synthetic].tolist()))
        asked = _check_levels(strategy, level, levels, there)
        if probe_every < 2:
            raise TrainingError(
                f"probe_every = {probe_every} leaves no epoch for the level that a probe chooses; use 2 or more."
            )
        samples = samples or int((~pool.synthetic).sum())
        make = partial(
            make_strategy,
            strategy,
            levels=asked,
            seed=seed,
            level=level,
            allow_plugins=allow_plugins,
        )
        with _in_own_words():
            followed = make(curriculum_epochs=curriculum_epochs)
        probes = followed.measures(0) == "probe"
        if probes and curriculum_epochs == 1:
            raise TrainingError(
                "curriculum_epochs = 1 leaves no epoch for the level that a probe chooses; use 2 or more."
            )
        self.span = probe_every if probes else 1
        self.guided = curriculum_epochs
        if probes:
            self.guided -= (
                curriculum_epochs % self.span == 1
            )  # a probe with no epoch after it would be for nothing
            followed = make(curriculum_epochs=-(-self.guided // self.span))
        guidance = None
        if follows_progress(strategy, followed):
            with _in_own_words():
                pool, guidance = hold_out_guidance(pool, asked, guidance_images, seed)
            held = len(guidance) // len(asked)
            if guidance_images and held < guidance_images:
                warnings.warn(
                    f"guidance_images = {guidance_images}, but V holds {held}: no more hard images "
                    "have a synthetic image at every "
                    "level and can be spared by their class.",
                    stacklevel=2,
                )
        if undersample is None:
            undersample = strategy != "real-only" and pool.hard_by_class
        with _in_own_words():
            mixing = make_sampling(pool, followed, undersample, synthetic_scale, shortage, missing)
        self.course = EpochSchedule(
            pool, followed, mixing, samples * self.span, seed, guidance, samples if probes else 0
        )
        self.dataset, self.samples, self.probability = (
            dataset,
            samples,
            probability or true_class_probability,
        )
        self.judged = dataset if guidance is None else dataset.for_evaluation()
        self.share(rank, world_size)
        self.collate, self.batch_size = collate, batch_size
        self.number = 0
        self.history: list[Record] = []
        self._record: Record = {}
        self._before: np.ndarray | None = None
        self._ended = False
        self._begun = False
        self._drawn = False
        self._resumed = False

    @property
    def guidance_rows(self) -> np.ndarray:
        """Rows of V, which no epoch draws, nor others of their sources; empty where the strategy
        measures nothing."""
        return (
            self.course.guidance.rows if self.course.guidance is not None else np.empty(0, np.int64)
        )

    def share(self, rank: int | None = None, world_size: int | None = None) -> None:
        """From now on this sampler gives the rows of process `rank` of `world_size`; without them what torch.distributed says then.

        Raises TrainingError for what is no share.
        """
        if (rank is None) != (world_size is None):
            raise TrainingError(
                "rank= and world_size= go together, for example Curriculum(dataset, ..., rank=0, world_size=2)."
            )
        self._asked = None
        if rank is not None and world_size is not None:
            if not 0 <= rank < world_size:
                raise TrainingError(
                    f"there is no rank {rank} of world_size {world_size}; ranks go from 0 to {max(world_size, 1) - 1}."
                )
            self._asked = Processes(rank, world_size)

    def begin(self, epoch: int, model: nn.Module | None = None) -> None:
        """Turns to an epoch; measures progress where the strategy asks for it, for which it needs the model.

        Epochs follow one another; a strategy that measures nothing may turn to any. Raises TrainingError otherwise.
        """
        if self._before is not None and epoch != self.number:
            self.end(model)
        self._turn(epoch)
        self._ended = self._begun = self._drawn = self._resumed = False
        block, part = self._place(epoch)
        if self._before is None and "progress" not in self._record:
            self._before = self.course.before(block, part, self._judge(model))
        self._begun = True

    def end(self, model: nn.Module | None = None) -> None:
        """After an epoch's last step: measures what it brought. The next `begin` does it too; call it to save the state in between."""
        if self._before is not None:
            self._record |= self.course.progress(self._before, self._judge(model))
            self._before = None
        self._ended, self._begun = True, False

    def set_epoch(self, epoch: int) -> None:
        """Turns to an epoch without measuring; the frameworks call it by themselves.

        It has no effect between `begin` and `end`: a resumed framework may count from 0. Raises
        TrainingError for an epoch before the one of a state that was loaded; `begin` may go back to
        it.
        """
        if self._begun:
            self._warn_if_left(epoch)
            return
        if self._resumed and epoch < self.number:
            raise TrainingError(
                f"set_epoch({epoch}) after a state of epoch {self.number} was loaded: a loader "
                "that counts from 0 would start the "
                f"curriculum again. Call begin(epoch, model) before each epoch, begin({epoch}, "
                "model) to go back."
            )
        self._turn(epoch)

    def _warn_if_left(self, epoch: int) -> None:
        """Warns where `begin` was called for one epoch and `set_epoch` alone for those that follow,
        so that it repeats the first."""
        if self._drawn and epoch != self.number:
            warnings.warn(
                f"set_epoch({epoch}) has no effect: begin({self.number}) holds until end() or the "
                "next begin(). "
                "Call begin(epoch, model) before each epoch.",
                stacklevel=3,
            )

    def __len__(self) -> int:
        """Rows of an epoch, of this process."""
        return self.samples // self._processes().size

    def __iter__(self) -> Iterator[int]:
        rows = self.rows().tolist()
        self._drawn = True
        return iter(rows)

    def rows(self) -> np.ndarray:
        """The rows that this epoch draws, int64 `[samples]`; where processes share them those of this one, `[samples // world_size]`."""
        processes = self._processes()
        drawn, _ = self._draw()
        return drawn[: self.samples - self.samples % processes.size][
            processes.rank :: processes.size
        ]

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of this epoch as whole per cents; none where it draws real images only."""
        return tuple(self._draw()[1].get("levels", ()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values (as JSON has them) from which `load_state_dict` goes on: at the same epoch, at the next one after `end`."""
        before = None if self._before is None else self._before.tolist()
        state = {
            "epoch": self.number,
            "history": self.history,
            "record": self._record,
            "before": before,
            "ended": self._ended,
        }
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        After an epoch's end it turns to the next one at once: a loop may ask its data workers for rows before it calls `begin`.
        Raises TrainingError where the state was measured on another guidance validation set.
        """
        held = len(self.guidance_rows)
        if state["before"] is not None and len(state["before"]) != held:
            raise TrainingError(
                f"the state holds measurements on {len(state['before'])} images, and V has {held}: "
                "it was saved with another data set, "
                "seed, levels or guidance_images, or by an earlier version; give those it was made "
                "with, or begin at epoch 0."
            )
        self.number, self.history, self._record = (
            state["epoch"],
            list(state["history"]),
            dict(state["record"]),
        )
        self._before = None if state["before"] is None else np.asarray(state["before"])
        self._ended, self._begun = state.get("ended", False), False
        if self._ended:
            self._turn(self.number + 1)
        self._resumed = True

    def _processes(self) -> Processes:
        """Whose rows are asked for."""
        found = self._asked or current_processes()
        if self.samples < found.size:
            raise TrainingError(
                f"samples = {self.samples} leave no row of an epoch to each of {found.size} processes; raise samples."
            )
        return found

    def _place(self, epoch: int) -> tuple[int, int]:
        """(block, part) of an epoch; blocks begin anew where the curriculum is over."""
        if epoch < self.guided:
            return divmod(epoch, self.span)
        block, part = divmod(epoch - self.guided, self.span)
        return -(-self.guided // self.span) + block, part

    @_in_own_words()
    def _draw(self) -> tuple[np.ndarray, Record]:
        block, part = self._place(self.number)
        probes = self.course.parts(block) > 1
        if probes and part == 0:
            return self.course.draw(block, 0, self.history)
        measured = self.course.strategy.measures(block)
        if measured == "probe" and "progress" not in self._record:
            raise TrainingError(
                f"epoch {self.number} depends on progress that was not measured; call begin({self.number}, model) first."
            )
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
                raise TrainingError(
                    f"progress of epoch {self.number} was not measured; call begin(epoch, model) before each epoch."
                )
            self.history.append({"epoch": block, **self._draw()[1], **self._record})
            self._record = {}
        self.number, self._ended = epoch, False

    def _judge(self, model: nn.Module | None) -> Callable[[], np.ndarray] | None:
        guidance = self.course.guidance
        if guidance is None:
            return None

        def judge() -> np.ndarray:
            if model is None:
                raise TrainingError(
                    "this strategy follows learning progress: call begin(epoch, model) with the model."
                )
            together = current_processes()
            if together.size == 1 < self._processes().size:
                raise TrainingError(
                    f"the {self._processes().size} processes cannot agree on progress before torch.distributed is initialised; call "
                    "init_process_group first."
                )
            loader = DataLoader(
                Subset(self.judged, guidance.rows.tolist()),
                self.batch_size,
                collate_fn=self.collate,
            )
            training = model.training
            model.eval()
            try:
                with torch.inference_mode(), in_float32(model):
                    found = [self.probability(model, batch).cpu().double() for batch in loader]
            finally:
                model.train(training)
            result = torch.cat(found).numpy()
            if result.shape != (len(guidance),):
                raise TrainingError(
                    f"probability gave {list(result.shape)} values for {len(guidance)} images; give one per image."
                )
            return together.broadcast(result)

        return judge


def _check_choices(**given: str) -> None:
    """Raises TrainingError for a value that a recipe's method refuses."""
    for name, value in given.items():
        allowed = get_args(Method.model_fields[name].annotation)
        if value not in allowed:
            raise TrainingError(unknown(name, str(value), allowed))


def _check_bounds(**given: tuple[float | None, int]) -> None:
    """Raises TrainingError for a number below its bound or not finite; None is the default."""
    for name, (value, least) in given.items():
        if value is not None and not least <= value < float("inf"):
            raise TrainingError(f"{name} = {value}; it has to be {least} or more.")


def _check_levels(
    strategy: str, level: int | None, levels: Sequence[int] | None, there: Sequence[int]
) -> tuple[int, ...]:
    """The levels to go through. Raises TrainingError for one of which the data set holds no image."""
    if (strategy == "fixed") != (level is not None):
        raise TrainingError(
            "strategy 'fixed' and level= go together, for example Curriculum(dataset, 'fixed', level=50, ...)."
        )
    named: dict[str, list[int]] = {"text-only": [0], "fixed": [level or 0], "real-only": []}
    wanted = named.get(strategy, list(there if levels is None else levels))
    lacking = [percent for percent in wanted if percent not in there and percent != REAL]
    if lacking or (not wanted and strategy != "real-only"):
        raise TrainingError(
            f"strategy '{strategy}' asks for level {', '.join(map(str, lacking)) or '(none)'}, of which this data set holds no synthetic "
            f"image; it has {', '.join(map(str, there)) or 'none at all'}."
        )
    return tuple(check_level(int(percent)) for percent in wanted)
