"""DoCL: a curriculum by learning dynamics (AISTATS 2021).

A sample is drawn more often the more the model's output on it moves towards its label. The state is
four arrays of one row per sample, all in the checkpoint. The score weighs the change of each logit
by current probabilities, so all logits of a sample's last visit are needed. They are kept in
float32. Data sets that need more than `LOGITS_LIMIT` are refused.
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
"""Most bytes of stored logits: samples × classes × 4, in memory and in each checkpoint.

ImageNet-LT takes .5 GB, iNaturalist 2018 14 GB.
"""


@dataclass(frozen=True)
class Dynamics:
    """Learning dynamics of every sample.

    - `score`: exponential moving average, float64 `[samples]`.
    - `logits`: of the last visit, float32 `[samples, classes]`.
    - `rate`: sum of the learning rates before the last visit, `[samples]`.
    - `visited`: whether there was a visit, bool `[samples]`.
    - `rate_sum`: sum of all learning rates.
    """

    score: np.ndarray
    logits: np.ndarray
    rate: np.ndarray
    visited: np.ndarray
    rate_sum: float

    @staticmethod
    def start(samples: int, classes: int) -> Dynamics:
        """No sample visited, all scores 0."""
        return Dynamics(
            np.zeros(samples),
            np.zeros((samples, classes), np.float32),
            np.zeros(samples),
            np.zeros(samples, bool),
            0.0,
        )


def update_dynamics(
    state: Dynamics,
    rows: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    learning_rate: float,
) -> Dynamics:
    """The state after a step, written in place (a copy would take longer than the step).

    a ← ½ a + ½ ⟨onehot(y) − p, z_now − z_last⟩ / (Σ η)^0.1, where Σ η sums the learning rates of
    the updates between the two outputs. A first visit stores the logits only. With Σ η = 0 the gain
    is 0.

    - `rows`: distinct samples of the step, `[rows]`.
    - `labels`: `[rows]`.
    - `logits`: the model's outputs, `[rows, classes]`.
    - `learning_rate`: of the step.
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


def draw_rows(score: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct rows with probability ∝ exp(0.1 (a − max a)), without replacement.

    Raises ValueError where `count` exceeds the rows.
    """
    if count > len(score):
        raise ValueError(f"{count} of {len(score)} samples cannot be drawn without replacement.")
    # Gumbel top-k is sequential sampling without replacement
    keys = TEMPERATURE * (score - score.max()) + rng.gumbel(size=len(score))
    return np.argsort(-keys, kind="stable")[:count]


def draw_epoch_rows(
    state: Dynamics,
    epoch: int,
    warm_up_epochs: int,
    samples: int,
    *,
    rng: np.random.Generator,
    rows: Sequence[int] | np.ndarray | None = None,
    share: float = 0.5,
) -> np.ndarray:
    """Rows of an epoch in passes, `[samples]`.

    - `warm_up_epochs`: epochs whose passes take all rows in random order.
    - `rows`: the rows to draw from; default all.
    - `share`: fraction of the rows that a later pass draws by score, in (0, 1].
    """
    known = np.arange(len(state.score)) if rows is None else np.asarray(rows)
    parts: list[np.ndarray] = []
    while (left := samples - sum(len(part) for part in parts)) > 0:
        if epoch < warm_up_epochs:
            parts.append(rng.permutation(known)[:left])
        else:
            parts.append(
                known[
                    draw_rows(state.score[known], min(left, max(round(share * len(known)), 1)), rng)
                ]
            )
    return np.concatenate(parts)


class Docl(TrainingHook):
    """DoCL in training: draws samples by their dynamics after a warm-up.

    It draws among the distinct samples of the strategy: all real images and, with a spectrum, those
    of the epoch's level. The paper shrinks its subsets over time, which has no counterpart at equal
    numbers of updates. A training no longer than the warm-up logs a warning, because DoCL then
    changes only the order of samples.

    - `warm_up`: epochs before the first draw by score, 0 or more.
    - `share`: fraction of the samples in a pass, in (0, 1].

    Raises TrainingError where the logits of all samples take more than `LOGITS_LIMIT`.
    """

    takes_mixed = False  # it stores the output on single images

    def __init__(self, *, warm_up: int = 5, share: float = 0.5) -> None:
        self.warm_up = whole_within("warm_up", warm_up, 0, 100_000)
        self.share = number_within("share", share, 1e-6, 1)
        self.dynamics = Dynamics.start(0, 0)

    def begin(self, context: TrainingContext) -> None:
        samples, classes = len(context.pool.labels), context.pool.num_classes
        if samples * classes * 4 > LOGITS_LIMIT:
            raise TrainingError(
                f"system docl stores the logits of every sample: {samples:,} samples of "
                f"{classes:,} classes take {samples * classes * 4 / 1e9:.1f} GB, and the limit is "
                f"{LOGITS_LIMIT / 1e9:.0f} GB. Leave out this method."
            )
        if self.warm_up >= context.epochs and context.state.processes.first:
            logger.warning(
                f"system docl: warm_up {self.warm_up} leaves none of the {context.epochs} epochs "
                "to draw samples by their dynamics. Write "
                f"{{name: docl, warm_up: {context.epochs // 3}}} or train for longer."
            )
        self.dynamics = Dynamics.start(samples, classes)

    def draw(self, context: TrainingContext, epoch: int, rows: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(derive_seed("docl", context.seed, epoch))
        return draw_epoch_rows(
            self.dynamics,
            epoch,
            self.warm_up,
            len(rows),
            rng=rng,
            rows=np.unique(rows),
            share=self.share,
        )

    def learn(self, rows: np.ndarray, labels: Tensor, logits: Tensor, learning_rate: float) -> None:
        # a batch across two passes may hold a row twice
        first = np.unique(rows, return_index=True)[1]
        self.dynamics = update_dynamics(
            self.dynamics,
            rows[first],
            labels.cpu().numpy()[first],
            logits.cpu().numpy()[first],
            learning_rate=learning_rate,
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
