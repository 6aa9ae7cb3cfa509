"""DoCL, a curriculum by learning dynamics (Zhou, Wang and Bilmes, AISTATS 2021).

A sample is drawn the more often the more the model's output on it moves towards its label. The state is three arrays of one row per
sample; it is passed in and handed back, so a checkpoint holds all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECAY = 0.5
RATE_POWER = 0.1
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Dynamics:
    """Of each sample: `score` (an exponential moving average), `logits` `[samples, classes]` and summed `rate` at its last visit.

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
        return Dynamics(np.zeros(samples), np.zeros((samples, classes), np.float32), np.zeros(samples), np.zeros(samples, bool), 0.0)


def visit(state: Dynamics, rows: np.ndarray, labels: np.ndarray, logits: np.ndarray, learning_rate: float) -> Dynamics:
    """The state after a step at `learning_rate` on `rows` (distinct), whose model outputs were `logits` `[rows, classes]`.

    a ← ½ a + ½ ⟨onehot(y) − p, z_now − z_last⟩ / (learning rates summed since the last visit)^0.1; a first visit only remembers.
    """
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    towards = -probabilities
    towards[np.arange(len(rows)), labels] += 1
    rate_sum = state.rate_sum + learning_rate
    since = np.maximum(rate_sum - state.rate[rows], np.finfo(float).tiny)
    gain = (towards * (logits - state.logits[rows])).sum(1) / since**RATE_POWER
    score, stored, rate, visited = state.score.copy(), state.logits.copy(), state.rate.copy(), state.visited.copy()
    score[rows] = np.where(state.visited[rows], DECAY * state.score[rows] + (1 - DECAY) * gain, 0.0)
    stored[rows], rate[rows], visited[rows] = logits, rate_sum, True
    return Dynamics(score, stored, rate, visited, rate_sum)


def draw(score: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct rows with probability ∝ exp(0.1 (a − max a)), one after the other without replacement.

    Raises ValueError where more rows are asked for than there are.
    """
    if count > len(score):
        raise ValueError(f"{count} of {len(score)} samples cannot be drawn without replacement.")
    keys = TEMPERATURE * (score - score.max()) + rng.gumbel(size=len(score))  # Gumbel top-k is sequential sampling without replacement
    return np.argsort(-keys, kind="stable")[:count]


def epoch_rows(
    state: Dynamics, epoch: int, warm_up_epochs: int, samples: int, rng: np.random.Generator, rows: Sequence[int] | None = None
) -> np.ndarray:
    """Rows `[samples]` of an epoch: all in random order while warming up, then by score; passes follow one another."""
    known = np.arange(len(state.score)) if rows is None else np.asarray(rows)
    parts: list[np.ndarray] = []
    while sum(len(part) for part in parts) < samples:
        wanted = min(samples - sum(len(part) for part in parts), len(known))
        parts.append(rng.permutation(known)[:wanted] if epoch < warm_up_epochs else known[draw(state.score[known], wanted, rng)])
    return np.concatenate(parts)
