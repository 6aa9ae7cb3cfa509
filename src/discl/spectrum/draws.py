"""Which draws a plan takes: until enough images are kept, within a budget. Pure functions.

A draw is one image of a source at a level. Draws form chains: the tries of a seed, or the seeds of
a source at a level. A chain ends when enough of its draws are kept, or after its last draw. The
scores of one wave of draws decide the next wave, so the result is the same after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .plan import Request


@dataclass(frozen=True)
class DrawRule:
    """When a chain of draws ends: `wanted` of them are kept, or `most` are made.

    - `tries`: draws per wanted image at most, 1 or more.
    - `wanted`: kept images per source and level; a further draw is the next seed. None: one per
      source, level and seed; a further draw is the next attempt of the seed.

    ```python
    from discl.spectrum.draws import DrawRule

    assert DrawRule(tries=3).most == 3
    assert DrawRule(tries=3, wanted=4).most == 12
    ```
    """

    tries: int
    wanted: int | None = None

    @property
    def goal(self) -> int:
        """Kept images that a chain needs."""
        return self.wanted or 1

    @property
    def most(self) -> int:
        """Draws of a chain at most."""
        return self.goal * self.tries

    def chain(self, request: Request) -> tuple[str, int, int]:
        """The chain that a draw belongs to."""
        return request.source_id, request.level, -1 if self.wanted else request.seed

    def following(self, first: Request, number: int) -> tuple[int, int]:
        """(seed, attempt) of the draw `number`, from 0, of the chain of `first`."""
        return (number, 0) if self.wanted else (first.seed, number)


class SpreadOrder:
    """An order of draws in which every beginning is spread over classes, sources and levels.

    Seed after seed, each source gets one level after the other, and sources of all classes take
    turns. The r-th source of class c begins at level r + c, so all levels come equally early.

    - `sources`: `(id, label)` of every source, in the order of the plan.
    - `levels`: the levels of the plan.
    """

    def __init__(self, sources: Iterable[tuple[str, int]], levels: Iterable[int]) -> None:
        self.levels = {level: number for number, level in enumerate(sorted(set(levels)))}
        self.turns: dict[str, tuple[int, int]] = {}
        classes: dict[int, list[str]] = {}
        for source, label in sources:
            classes.setdefault(label, []).append(source)
        for number, label in enumerate(sorted(classes)):
            self.turns |= {source: (rank, number) for rank, source in enumerate(classes[label])}

    def __call__(self, request: Request) -> tuple[int, ...]:
        """The sort key of a draw."""
        rank, number = turn = self.turns[request.source_id]
        step = (self.levels[request.level] - rank - number - request.seed) % len(self.levels)
        return request.attempt, request.seed, step, *turn


@dataclass(frozen=True)
class Cap:
    """A budget: draws are taken in an order, up to the first that it cannot pay.

    - `amount`: what may be spent, in images or UNet rows.
    - `prices`: what an image of each level costs in that unit.
    - `order`: sort key of draws.
    """

    amount: int
    prices: Mapping[int, int]
    order: Callable[[Request], tuple[int, ...]]

    def cost(self, requests: Iterable[Request]) -> int:
        """What these draws cost together."""
        return sum(self.prices[request.level] for request in requests)

    def buy(self, requests: Iterable[Request], spent: int = 0) -> list[Request]:
        """The first of these draws, in the cap's order, that fit beside what is spent."""
        bought: list[Request] = []
        for request in sorted(requests, key=self.order):
            spent += self.prices[request.level]
            if spent > self.amount:
                break
            bought.append(request)
        return bought


def follow_draws(
    plan: Sequence[Request],
    draw: Callable[[Request, int, int], Request],
    cosines: Mapping[str, float],
    keep: Callable[[float], bool],
    *,
    rule: DrawRule,
    cap: Cap | None = None,
    cut: bool = False,
) -> tuple[list[Request], list[Request]]:
    """All draws that a plan has led to, in its order, and those among them without a score.

    A chain that lacks kept images gets as many further draws as it lacks, once all its draws have
    a score. With a cap no chain goes on before all draws of the wave have a score, so the budget
    buys the same draws in every order of work.

    - `plan`: the first draws.
    - `draw`: the request of (a draw of the chain, seed, attempt).
    - `cosines`: known scores by id.
    - `keep`: whether the filter keeps an image of that score.
    - `rule`: when a chain ends.
    - `cap`: the budget of all draws together, those of `plan` included.
    - `cut`: whether the cap has cut the plan already, so that nothing follows.
    """
    chains: dict[tuple[str, int, int], list[Request]] = {}
    for request in plan:
        chains.setdefault(rule.chain(request), []).append(request)
    drawn, wave = list(plan), list(plan)
    while wave and not cut:
        if cap is not None and any(request.id not in cosines for request in wave):
            break
        following: list[Request] = []
        for chain in {rule.chain(request): None for request in wave}:
            made = chains[chain]
            if all(request.id in cosines for request in made):
                lacking = rule.goal - sum(keep(cosines[request.id]) for request in made)
                numbers = range(len(made), min(len(made) + lacking, rule.most))
                following += [draw(made[0], *rule.following(made[0], each)) for each in numbers]
        wave = following if cap is None else cap.buy(following, cap.cost(drawn))
        cut = len(wave) < len(following)
        drawn += wave
        for request in wave:
            chains[rule.chain(request)].append(request)
    places = {
        source: place for place, source in enumerate(dict.fromkeys(r.source_id for r in plan))
    }
    drawn.sort(key=lambda each: (places[each.source_id], each.seed, each.level, each.attempt))
    return drawn, [request for request in drawn if request.id not in cosines]


def count_further(
    drawn: Iterable[Request], missing: Iterable[Request], rule: DrawRule
) -> list[Request]:
    """What may follow at most, if the filter drops all `missing`: one request per further draw."""
    made: dict[tuple[str, int, int], int] = {}
    for request in drawn:
        made[rule.chain(request)] = made.get(rule.chain(request), 0) + 1
    first = {rule.chain(request): request for request in missing}
    return [each for chain, each in first.items() for _ in range(rule.most - made[chain])]
