"""Which draws a plan takes: until enough are kept, within a budget, in an order that spreads."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from discl.spectrum.draws import Cap, DrawRule, SpreadOrder, count_further, follow_draws
from discl.spectrum.plan import Request

SOURCES = [*((f"a{n}", 0) for n in range(7)), *((f"b{n}", 1) for n in range(3)), ("c0", 4)]
LEVELS = (0, 30, 50)
PRICES = {0: 20, 30: 14, 50: 10}
LABELS = dict(SOURCES)


def request(source: str, level: int, seed: int, attempt: int = 0) -> Request:
    name = f"{source}/{level}/{seed}/{attempt}"
    return Request(name, source, "", LABELS[source], level, seed, attempt, "", "", 8, 8)


def plan(seeds: int) -> list[Request]:
    return [
        request(source, level, seed)
        for source, _ in SOURCES
        for seed in range(seeds)
        for level in LEVELS
    ]


def cap(amount: int, prices: dict[int, int] = PRICES) -> Cap:
    return Cap(amount, prices, SpreadOrder(SOURCES, LEVELS))


def test_every_beginning_is_spread_over_sources_levels_and_classes() -> None:
    ordered = sorted(plan(3), key=SpreadOrder(SOURCES, LEVELS))
    assert {each.label for each in ordered[:3]} == {0, 1, 4}
    for end in range(1, len(ordered) + 1):
        sources = Counter(each.source_id for each in ordered[:end])
        counts = [sources[source] for source, _ in SOURCES]
        assert max(counts) - min(counts) <= 1
        levels = Counter(each.level for each in ordered[:end])
        assert max(levels.values()) - min(levels[level] for level in LEVELS) <= len(LEVELS)
    first_pass = ordered[: len(SOURCES)]
    assert {each.level for each in first_pass if each.label == 0} == set(LEVELS)


@pytest.mark.parametrize("amount", [9, 10, 33, 100, 101, 500, 10**6])
def test_a_budget_buys_a_beginning_and_a_larger_one_only_adds(amount: int) -> None:
    everything = plan(2)
    bought = cap(amount).buy(reversed(everything))
    assert cap(amount).cost(bought) <= amount
    assert bought == sorted(everything, key=cap(0).order)[: len(bought)]
    assert bought == cap(amount + 57).buy(everything)[: len(bought)]
    assert (cap(10**6).cost(everything) <= amount) == (len(bought) == len(everything))


def outcome(rule: DrawRule, within: Cap | None, rng: random.Random) -> list[str]:
    """Ids of all draws, where random parts of what is missing get their score first."""
    first = plan(rule.goal if rule.wanted else 2)
    planned = first if within is None else within.buy(first)
    planned = [each for each in first if each in planned]
    cosines: dict[str, float] = {}
    while True:
        drawn, missing = follow_draws(
            planned,
            lambda of, seed, attempt: request(of.source_id, of.level, seed, attempt),
            cosines,
            lambda cosine: cosine >= 0.6,
            rule=rule,
            cap=within,
            cut=len(planned) < len(first),
        )
        if not missing:
            return [each.id for each in drawn]
        for each in rng.sample(missing, rng.randint(1, len(missing))):
            cosines[each.id] = random.Random(each.id).random()


RULES = (DrawRule(1), DrawRule(4), DrawRule(3, wanted=2), DrawRule(2, wanted=5))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("amount", [None, 300, 900, 2500])
def test_the_draws_are_the_same_in_every_order_of_work(rule: DrawRule, amount: int | None) -> None:
    within = None if amount is None else cap(amount)
    found = outcome(rule, within, random.Random(0))
    assert len(set(found)) == len(found)
    assert all(outcome(rule, within, random.Random(seed)) == found for seed in (1, 2))
    if amount is not None:
        spent = sum(PRICES[int(name.split("/")[1])] for name in found)
        assert spent <= amount
        assert set(found) <= set(outcome(rule, cap(amount + 400), random.Random(3)))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_budget_that_is_not_reached_changes_nothing(rule: DrawRule) -> None:
    assert outcome(rule, cap(10**9), random.Random(0)) == outcome(rule, None, random.Random(1))


def test_seeds_are_drawn_until_enough_are_kept_and_no_further() -> None:
    rule = DrawRule(3, wanted=2)
    chains: dict[str, list[str]] = {}
    for name in outcome(rule, None, random.Random(0)):
        source, level, seed, attempt = name.split("/")
        assert attempt == "0"
        chains.setdefault(f"{source}/{level}", []).append(seed)
    assert len(chains) == len(SOURCES) * len(LEVELS)
    lengths = set()
    for chain, seeds in chains.items():
        assert seeds == [str(number) for number in range(len(seeds))]
        kept = [random.Random(f"{chain}/{seed}/0").random() >= 0.6 for seed in seeds]
        assert sum(kept) == 2 or len(seeds) == rule.most
        assert sum(kept[:-1]) < 2
        lengths.add(len(seeds))
    assert len(lengths) > 2


def test_further_draws_are_counted_up_to_the_most() -> None:
    drawn = [request("a0", 0, 0), request("a0", 0, 1), request("b0", 50, 0)]
    found = count_further(drawn, drawn[1:], DrawRule(3, wanted=2))
    assert Counter(each.source_id for each in found) == {"a0": 4, "b0": 5}
    assert len(count_further(drawn, drawn, DrawRule(3))) == 6
