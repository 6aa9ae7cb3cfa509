"""`Curriculum`: a sampler that follows a strategy and measures progress for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, Subset

from ..curriculum.schedule import EpochSchedule, Record, hold_out_guidance, make_sampling
from ..curriculum.strategies import follows_progress, make_strategy
from ..errors import TrainingError
from ..training.distributed import Processes, current_processes
from .arguments import check_bounds, check_choices, choose_levels, divide_epochs, warn_if_fewer
from .dataset import SpectrumDataset
from .probability import Probability, in_float32, true_class_probability


class Curriculum(Sampler[int]):
    """A sampler over a `SpectrumDataset` that follows a strategy (arXiv 2410.13674).

    Give it to a `DataLoader`; no worker restarts. Before each epoch call `begin(epoch, model)`, or
    `set_epoch(epoch)` alone if the strategy measures nothing. `begin` holds until `end` or the next
    `begin`, whatever a prepared loader passes to `set_epoch`. From `curriculum_epochs` on, epochs
    are real images only.

    - `dataset`: real and synthetic images.
    - `strategy`: name of a strategy, as in a recipe.
    - `curriculum_epochs`: epochs with synthetic images, 0 or more.
    - `samples`: rows of an epoch, 1 or more; default the number of real images.
    - `level`: the level of the strategy `fixed`, in whole per cent.
    - `levels`: the levels to use, in whole per cent; default all in the data set.
    - `synthetic_scale`: synthetic images per hard real image, 0 or more.
    - `undersample`: whether to draw fewer of the images that are not hard, so that the tail keeps
      its fraction of an epoch. Default: yes if whole classes are hard, as in a long tail.
    - `shortage`: where fewer images were kept, `repeat` them or `cap` the class.
    - `missing`: a class without images at a level is an `error` or takes its `nearest` level.
    - `seed`: seed of all draws.
    - `probe_every`: epochs per choice of `adaptive` and `adaptive-per-class`, 2 or more. The first
      draws random real images, around which progress is measured. The others draw the chosen level.
    - `guidance_images`: hard images that strategies which measure progress hold out for V, with all
      their synthetic images. Default 2,000, or a fifth of the images with a spectrum if that is
      less. V has one synthetic image of each at every level.
    - `probability`: `probability(model, batch)` returns the true-class probability, `[batch]` in
      [0, 1]; default the softmax of the model's logits.
    - `collate`: makes a batch of V from a list of samples; default that of `DataLoader`.
    - `batch_size`: images of V per batch, 1 or more.
    - `rank`, `world_size`: process and number of processes; default those of torch.distributed.
      Process k of n draws every n-th row from the k-th on. Pass `rank=0, world_size=1` for a
      framework that divides the rows of any sampler. Every process has to call `begin` and `end`.
      All use the measurements of rank 0.
    - `allow_plugins`: whether a strategy named as `module:attribute` may be imported.

    Raises TrainingError or RecipeError for a wrong value, for a level of which the data set has no
    image, and where no image can be held out for V.

    ```python
    import discl
    from torch.utils.data import DataLoader

    dataset = discl.SpectrumDataset.of_run("runs/fashion-lt", size=32)
    curriculum = discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=4)
    loader = DataLoader(dataset, batch_size=16, sampler=curriculum)
    for epoch in range(6):
        curriculum.begin(epoch)
        for images, labels, levels in loader:
            pass  # a training step
    ```
    """

    def __init__(
        self,
        dataset: SpectrumDataset,
        strategy: str = "diverse-to-specific",
        *,
        curriculum_epochs: int,
        samples: int | None = None,
        level: int | None = None,
        levels: Sequence[int] | None = None,
        synthetic_scale: float = 3.0,
        undersample: bool | None = None,
        shortage: str = "repeat",
        missing: str = "error",
        seed: int = 0,
        probe_every: int = 4,
        guidance_images: int | None = None,
        probability: Probability | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 256,
        rank: int | None = None,
        world_size: int | None = None,
        allow_plugins: bool = False,
    ) -> None:
        check_choices(shortage=shortage, missing=missing)
        check_bounds(
            curriculum_epochs=(curriculum_epochs, 0),
            synthetic_scale=(synthetic_scale, 0),
            batch_size=(batch_size, 1),
            samples=(samples, 1),
            guidance_images=(guidance_images, 1),
            probe_every=(probe_every, 2),
        )
        pool = dataset.pool
        used = choose_levels(strategy, level, levels, pool.levels[pool.synthetic])
        make = partial(
            make_strategy,
            strategy,
            levels=used,
            seed=seed,
            level=level,
            allow_plugins=allow_plugins,
        )
        followed, self._guided, self._span = divide_epochs(make, curriculum_epochs, probe_every)
        self.samples = samples or int((~pool.synthetic).sum())
        guidance = None
        if follows_progress(strategy, followed):
            pool, guidance = hold_out_guidance(pool, used, guidance_images, seed)
            warn_if_fewer(guidance_images, len(guidance) // len(used))
        if undersample is None:
            undersample = strategy != "real-only" and pool.hard_by_class
        sampling = make_sampling(
            pool,
            followed,
            undersample=undersample,
            synthetic_scale=synthetic_scale,
            shortage=shortage,
            missing=missing,
        )
        self.schedule = EpochSchedule(
            pool,
            followed,
            sampling,
            samples=self.samples * self._span,
            seed=seed,
            guidance=guidance,
            probe_samples=self.samples if self._span > 1 else 0,
        )
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size
        self.probability = probability or true_class_probability
        self._measured = dataset if guidance is None else dataset.for_evaluation()
        self.share(rank, world_size)
        self.epoch = 0
        self.history: list[Record] = []
        self._record: Record = {}
        self._before: np.ndarray | None = None
        self._ended = self._begun = self._drawn = self._resumed = False

    @property
    def guidance_rows(self) -> np.ndarray:
        """Rows of V, int64; no epoch draws them or others of their sources. Empty without V."""
        guidance = self.schedule.guidance
        return guidance.rows if guidance is not None else np.empty(0, np.int64)

    def share(self, rank: int | None = None, world_size: int | None = None) -> None:
        """From now on draws the rows of process `rank` of `world_size`.

        Without arguments torch.distributed decides at each epoch. Raises TrainingError for a rank
        outside of [0, world_size).
        """
        if (rank is None) != (world_size is None):
            raise TrainingError(
                f"got rank={rank}, world_size={world_size}; pass both, for example "
                "Curriculum(dataset, ..., rank=0, world_size=2).",
                argument="rank" if rank is None else "world_size",
            )
        self._processes: Processes | None = None
        if rank is not None and world_size is not None:
            if not 0 <= rank < world_size:
                raise TrainingError(
                    f"got {rank} with world_size={world_size}; ranks go from 0 to "
                    f"{max(world_size, 1) - 1}.",
                    argument="rank",
                )
            self._processes = Processes(rank, world_size)

    def begin(self, epoch: int, model: nn.Module | None = None) -> None:
        """Turns to an epoch and measures progress where the strategy needs it.

        - `epoch`: from 0. Epochs follow one another; a strategy that measures nothing may turn to
          any.
        - `model`: needed where progress is measured.

        Raises TrainingError for a missing model, or an epoch that cannot follow.
        """
        if self._before is not None and epoch != self.epoch:
            self.end(model)
        self._turn(epoch)
        self._ended = self._begun = self._drawn = self._resumed = False
        block, part = self._block(epoch)
        if self._before is None and "progress" not in self._record:
            self._before = self.schedule.measure_before(block, part, self._measure(model))
        self._begun = True

    def end(self, model: nn.Module | None = None) -> None:
        """Measures progress after an epoch's last step.

        The next `begin` does it too. Call it to save the state between epochs.
        """
        if self._before is not None:
            self._record |= self.schedule.measure_after(self._before, self._measure(model))
            self._before = None
        self._ended, self._begun = True, False

    def set_epoch(self, epoch: int) -> None:
        """Turns to an epoch without measuring, as frameworks do.

        It has no effect between `begin` and `end`, because a resumed framework may count from 0.
        Raises TrainingError for an epoch before that of a loaded state; `begin` may go back to it.
        """
        if self._begun:
            self._warn_if_left(epoch)
            return
        if self._resumed and epoch < self.epoch:
            raise TrainingError(
                f"set_epoch({epoch}) after a state of epoch {self.epoch} was loaded: a loader that "
                "counts from 0 would start the curriculum again. Call begin(epoch, model) before "
                f"each epoch, begin({epoch}, model) to go back."
            )
        self._turn(epoch)

    def _warn_if_left(self, epoch: int) -> None:
        """Warns where `begin` is followed by `set_epoch` alone, which repeats one epoch."""
        if self._drawn and epoch != self.epoch:
            warnings.warn(
                f"set_epoch({epoch}) has no effect: begin({self.epoch}) holds until end() or the "
                "next begin(). Call begin(epoch, model) before each epoch.",
                stacklevel=3,
            )

    def __len__(self) -> int:
        """Rows of an epoch, of this process."""
        return self.samples // self._current_processes().size

    def __iter__(self) -> Iterator[int]:
        rows = self.rows().tolist()
        self._drawn = True
        return iter(rows)

    def rows(self) -> np.ndarray:
        """The rows that this epoch and process draw, int64 `[samples // world_size]`."""
        processes = self._current_processes()
        drawn, _ = self._draw()
        whole = self.samples - self.samples % processes.size
        return drawn[:whole][processes.rank :: processes.size]

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of this epoch in whole per cent; empty for real images only."""
        return tuple(self._draw()[1].get("levels", ()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON, for `load_state_dict`."""
        before = None if self._before is None else self._before.tolist()
        state = {
            "epoch": self.epoch,
            "history": self.history,
            "record": self._record,
            "before": before,
            "ended": self._ended,
        }
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`: in the same epoch, or in the next one if it was saved after
        `end`, because a loop may request rows before it calls `begin`.

        Raises TrainingError where the state was measured on another guidance validation set.
        """
        held = len(self.guidance_rows)
        if state["before"] is not None and len(state["before"]) != held:
            raise TrainingError(
                f"the state holds measurements on {len(state['before'])} images, and V has {held}. "
                "It was saved with another data set, seed, levels or guidance_images, or by an "
                "earlier version. Pass the same arguments, or begin at epoch 0.",
                argument="state",
            )
        self.epoch, self.history = state["epoch"], list(state["history"])
        self._record = dict(state["record"])
        self._before = None if state["before"] is None else np.asarray(state["before"])
        self._ended, self._begun = state.get("ended", False), False
        if self._ended:
            self._turn(self.epoch + 1)
        self._resumed = True

    def _current_processes(self) -> Processes:
        processes = self._processes or current_processes()
        if self.samples < processes.size:
            raise TrainingError(
                f"{self.samples} leaves no row of an epoch to each of {processes.size} processes; "
                f"use at least {processes.size}.",
                argument="samples",
            )
        return processes

    def _block(self, epoch: int) -> tuple[int, int]:
        """(block, part) of an epoch; the epochs after the curriculum are in blocks of their own."""
        if epoch < self._guided:
            return divmod(epoch, self._span)
        block, part = divmod(epoch - self._guided, self._span)
        return -(-self._guided // self._span) + block, part

    def _draw(self) -> tuple[np.ndarray, Record]:
        block, part = self._block(self.epoch)
        probes = self.schedule.parts(block) > 1
        if probes and part == 0:
            return self.schedule.draw(block, 0, self.history)
        measured = self.schedule.strategy.measures(block)
        if measured == "probe" and "progress" not in self._record:
            raise TrainingError(
                f"epoch {self.epoch} depends on progress that was not measured; call "
                f"begin({self.epoch}, model) first."
            )
        known = [*self.history, self._record] if measured == "probe" else self.history
        rows, chosen = self.schedule.draw(block, 1 if probes else 0, known)
        first = (part - 1 if probes else part) * self.samples
        return rows[first : first + self.samples], chosen

    def _turn(self, epoch: int) -> None:
        """Closes the records of the blocks before this epoch."""
        if epoch == self.epoch:
            return
        if self.schedule.guidance is not None and epoch != self.epoch + 1:
            raise TrainingError(
                f"epoch {epoch} cannot follow epoch {self.epoch}, because this strategy depends on "
                "the progress of each epoch before. To resume, load the curriculum's state_dict.",
                argument="epoch",
            )
        block, _ = self._block(self.epoch)
        if self._block(epoch)[0] > block and self.schedule.guidance is not None:
            measured = self.schedule.strategy.measures(block)
            if measured != "never" and "progress" not in self._record:
                raise TrainingError(
                    f"progress of epoch {self.epoch} was not measured; call begin(epoch, model) "
                    "before each epoch."
                )
            self.history.append({"epoch": block, **self._draw()[1], **self._record})
            self._record = {}
        self.epoch, self._ended = epoch, False

    def _measure(self, model: nn.Module | None) -> Callable[[], np.ndarray] | None:
        """Measures probabilities on V with this model; None where there is no V."""
        if self.schedule.guidance is None:
            return None
        return partial(self._true_class_probabilities, model)

    def _true_class_probabilities(self, model: nn.Module | None) -> np.ndarray:
        """Of every image of V, float64 `[images]`; those of rank 0 in all processes."""
        if model is None:
            raise TrainingError(
                "this strategy follows learning progress; call begin(epoch, model).",
                argument="model",
            )
        processes, size = current_processes(), self._current_processes().size
        if processes.size == 1 < size:
            raise TrainingError(
                f"the {size} processes cannot agree on progress before torch.distributed is "
                "initialised; call init_process_group first."
            )
        rows = self.guidance_rows.tolist()
        loader = DataLoader(Subset(self._measured, rows), self.batch_size, collate_fn=self.collate)
        training = model.training
        model.eval()
        try:
            with torch.inference_mode(), in_float32(model):
                parts = [self.probability(model, batch).cpu().double() for batch in loader]
        finally:
            model.train(training)
        result = torch.cat(parts).numpy()
        if result.shape != (len(rows),):
            raise TrainingError(
                f"it returned {list(result.shape)} values for {len(rows)} images; return one per "
                "image.",
                argument="probability",
            )
        return processes.broadcast(result)
