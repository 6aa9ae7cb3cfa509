"""DoCL: a curriculum by learning dynamics (AISTATS 2021).

A sample is drawn the more often the more the model's output on it moves towards its label. The state is four arrays of one row per
sample; it is passed in and handed back, so a checkpoint holds all of it. The score weighs how each logit has moved by probabilities
of now, so no summary of a sample's last logits would do: all are kept, in float32, and data sets where that takes more than
`LOGITS_LIMIT` are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from ..training.hooks import TrainingContext, TrainingHook, number_within, whole_within
from ..utils.hashing import derive_seed
from ..utils.logging import get_logger

logger = get_logger(__name__)

DECAY = 0.5
RATE_POWER = 0.1
TEMPERATURE = 0.1
LOGITS_LIMIT = 2 * 10**9
"""Bytes of remembered logits, in memory and in each checkpoint: samples × classes × 4. ImageNet-LT has .5 GB, iNaturalist 2018 14 GB."""


@dataclass(frozen=True)
class Dynamics:
    """Of each sample: `score` (an exponential moving average), `logits` `[samples, classes]` and summed `rate` before its last visit.

    `visited` says whether there was one; `rate_sum` is the sum of all learning rates so far.
    """

    score: np.ndarray
    logits: np.ndarray
    rate: np.ndarray
    visited: np.ndarray
    rate_sum: float

    @staticmethod
    def start(samples: int, classes: int) -> Dynamics:
        """Nothing visited, all scores 0."""
        return Dynamics(
            np.zeros(samples),
            np.zeros((samples, classes), np.float32),
            np.zeros(samples),
            np.zeros(samples, bool),
            0.0,
        )


def visit(
    state: Dynamics, rows: np.ndarray, labels: np.ndarray, logits: np.ndarray, learning_rate: float
) -> Dynamics:
    """The state after a step at `learning_rate` on `rows` (distinct), whose model outputs were `logits` `[rows, classes]`.

    a ← ½ a + ½ ⟨onehot(y) − p, z_now − z_last⟩ / (learning rates summed from the last visit's own step to the one before this)^0.1,
    which are the updates that lie between the two outputs; a first visit only remembers, and rates of 0 move nothing.
    The arrays are written to, for with a thousand classes a copy at each step would take longer than the step.
    """
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    towards = -probabilities
    towards[np.arange(len(rows)), labels] += 1
    since = state.rate_sum - state.rate[rows]
    gain = np.where(
        since > 0,
        (towards * (logits - state.logits[rows])).sum(1)
        / np.where(since > 0, since, 1) ** RATE_POWER,
        0.0,
    )
    state.score[rows] = np.where(
        state.visited[rows], DECAY * state.score[rows] + (1 - DECAY) * gain, 0.0
    )
    state.logits[rows], state.rate[rows], state.visited[rows] = logits, state.rate_sum, True
    return replace(state, rate_sum=state.rate_sum + learning_rate)


def draw(score: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct rows with probability ∝ exp(0.1 (a − max a)), one after the other without replacement.

    Raises ValueError where more rows are asked for than there are.
    """
    if count > len(score):
        raise ValueError(f"{count} of {len(score)} samples cannot be drawn without replacement.")
    keys = TEMPERATURE * (score - score.max()) + rng.gumbel(
        size=len(score)
    )  # Gumbel top-k is sequential sampling without replacement
    return np.argsort(-keys, kind="stable")[:count]


def epoch_rows(
    state: Dynamics, epoch: int, warm_up_epochs: int, samples: int, rng: np.random.Generator,
    rows: Sequence[int] | np.ndarray | None = None, share: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """Rows `[samples]` of an epoch in passes: all in random order while warming up, then a `share` of them drawn by score in each."""
    known = np.arange(len(state.score)) if rows is None else np.asarray(rows)
    parts: list[np.ndarray] = []
    while (left := samples - sum(len(part) for part in parts)) > 0:
        if epoch < warm_up_epochs:
            parts.append(rng.permutation(known)[:left])
        else:
            parts.append(
                known[draw(state.score[known], min(left, max(round(share * len(known)), 1)), rng)]
            )
    return np.concatenate(parts)


class Docl(TrainingHook):
    """DoCL in training: after `warm_up` epochs samples are drawn by their dynamics.

    It chooses among the distinct samples that the strategy has drawn: all real images, or with a spectrum those of the epoch's level too.
    A pass takes a `share` of them, in (0, 1]; the paper shrinks its subsets over time, which has no counterpart at equal numbers of
    updates. Where the training is no longer than the warm-up, it says so: nothing but the order of the samples is then its own.
    Raises TrainingError where the samples' logits take more than `LOGITS_LIMIT`.
    """

    takes_mixed = False  # what it remembers is the output on one image

    def __init__(self, *, warm_up: int = 5, share: float = 0.5) -> None:
        self.warm_up = whole_within("warm_up", warm_up, 0, 100_000)
        self.share = number_within("share", share, 1e-6, 1)
        self.dynamics = Dynamics.start(0, 0)

    def begin(self, context: TrainingContext) -> None:
        samples, classes = len(context.pool.labels), context.pool.num_classes
        if samples * classes * 4 > LOGITS_LIMIT:
            raise TrainingError(
                f"system docl remembers the logits of every sample: {samples:,} samples of {classes:,} classes take "
                f"{samples * classes * 4 / 1e9:.1f} GB, more than its {LOGITS_LIMIT / 1e9:.0f} GB; leave this method out."
            )
        if self.warm_up >= context.epochs and context.learner.processes.first:
            logger.warning(
                f"system docl: warm_up {self.warm_up} leaves none of the {context.epochs} epochs to draw samples by their dynamics; "
                f"write {{name: docl, warm_up: {context.epochs // 3}}} or train for longer."
            )
        self.dynamics = Dynamics.start(samples, classes)

    def draw(self, context: TrainingContext, epoch: int, rows: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(derive_seed("docl", context.seed, epoch))
        return epoch_rows(
            self.dynamics, epoch, self.warm_up, len(rows), rng, np.unique(rows), self.share
        )

    def learn(self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float) -> None:
        first = np.unique(rows, return_index=True)[
            1
        ]  # a batch between two passes may hold a row twice
        outputs = logits.cpu().numpy()
        self.dynamics = visit(
            self.dynamics, rows[first], labels.cpu().numpy()[first], outputs[first], learning_rate
        )

    def state(self) -> dict[str, Tensor]:
        now = self.dynamics
        arrays = {
            "score": now.score,
            "logits": now.logits,
            "rate": now.rate,
            "visited": now.visited,
            "rate_sum": np.asarray(now.rate_sum),
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        self.dynamics = Dynamics(
            arrays["score"],
            arrays["logits"],
            arrays["rate"],
            arrays["visited"],
            float(arrays["rate_sum"]),
        )
