"""Rejects images on the way: a bound on the `clip_similarity` of x̂0, learnt from finished images.

At a look, some steps into its chain, x̂0 is decoded and scored by the CLIP of the filter. Below the
bound of its level an image is dropped, and its slot takes the next request.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.hashing import derive_seed
from .plan import Request

FEWEST_STEPS = 5
"""Chains of fewer steps are not looked at: little would be saved."""


def conformal_bound(similarities: np.ndarray, loss: float) -> float:
    """The bound below which a further image is with a probability of at most `loss`.

    It is the k-th smallest of n values, k = ⌊loss · (n + 1)⌋, and −inf where k is 0. The further
    image must be exchangeable with these (conformal prediction, arXiv 2107.07511, section 1).

    - `similarities`: of x̂0 at a look, of finished images that the filter keeps.
    - `loss`: in (0, 1).
    """
    rank = math.floor(loss * (len(similarities) + 1))
    return -math.inf if rank < 1 else float(np.sort(similarities)[rank - 1])


def look_steps(fractions: Sequence[float], steps: int) -> tuple[int, ...]:
    """After how many of a chain's steps its image is looked at; none in chains of few steps.

    - `fractions`: of the chain, in (0, 1).
    - `steps`: of the chain.
    """
    if steps < FEWEST_STEPS:
        return ()
    looks = {max(round(fraction * steps), 1) for fraction in fractions}
    return tuple(sorted(look for look in looks if look < steps))


def is_audited(request_id: str, audit: float) -> bool:
    """Whether an image that is rejected is finished all the same, drawn by its id."""
    return derive_seed("audit", request_id) / 2**63 < audit


@dataclass(frozen=True)
class Learnt:
    """What is known of a level.

    - `key`: names all that the bounds depend on.
    - `bounds`: by look; −inf rejects no image.
    - `teachers`: ids of the images that the bounds are learnt from, which are always finished.
    """

    key: str
    bounds: Mapping[int, float]
    teachers: frozenset[str]


class Inspector:
    """Looks at images in progress for an engine, and says which to drop.

    At a level without bounds no image is dropped; what is seen is kept to learn from.

    - `fractions`: of the chain, at which images are looked at.
    - `audit`: fraction of the rejected images that are finished all the same.
    - `score`: `clip_similarity` `[images]` of requests and their x̂0 `[images, c, h, w]`. It must
      not depend on the other images of a call.
    - `load`: what is known of each level; called before each part of a plan.

    `rows` are the looks to store, and `dropped` the requests that were dropped. Whoever drives the
    engine empties both.
    """

    def __init__(
        self,
        fractions: Sequence[float],
        audit: float,
        score: Callable[[Sequence[Request], Tensor], np.ndarray],
        load: Callable[[], Mapping[int, Learnt]],
    ) -> None:
        self.fractions, self.audit, self.score = tuple(fractions), audit, score
        self.load = load
        self.learnt: Mapping[int, Learnt] = {}
        self.rows: deque[dict[str, Any]] = deque()
        self.dropped: deque[Request] = deque()

    def reload(self) -> None:
        """Takes what is known now."""
        self.learnt = self.load()

    def looks(self, level: int, steps: int) -> tuple[int, ...]:
        """After how many steps of its chain an image of this level is looked at."""
        looks = look_steps(self.fractions, steps)
        if level not in self.learnt:
            return looks
        bounds = self.learnt[level].bounds
        return tuple(look for look in looks if bounds.get(look, -math.inf) > -math.inf)

    def inspect(
        self, requests: Sequence[Request], taken: Sequence[int], clean: Tensor
    ) -> list[bool]:
        """Which of these images to drop.

        - `taken`: the steps that each has taken.
        - `clean`: their x̂0 `[images, c, h, w]`, on the CPU.
        """
        scores = self.score(requests, clean).tolist()
        return [
            self._drops(request, look, similarity)
            for request, look, similarity in zip(requests, taken, scores, strict=True)
        ]

    def _drops(self, request: Request, look: int, similarity: float) -> bool:
        row = {"id": request.id, "level": request.level, "look": look, "similarity": similarity}
        learnt = self.learnt.get(request.level)
        if learnt is None or request.id in learnt.teachers:
            self.rows.append({**row, "bound_key": "", "bound": None, "audited": False})
            return False
        bound = learnt.bounds[look]
        if similarity >= bound:
            return False
        audited = is_audited(request.id, self.audit)
        self.rows.append({**row, "bound_key": learnt.key, "bound": bound, "audited": audited})
        if not audited:
            self.dropped.append(request)
        return not audited
