"""Shares and pieces of a plan: every request once, whatever the workers do."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from discl.errors import RecipeError
from discl.spectrum.plan import WHOLE_PLAN, PlanShard, Request, parse_shard
from discl.stages.workers.dispatcher import Dispatcher, cut


def make_requests(sources: int, each: int = 4, sizes: tuple[int, ...] = (32,)) -> list[Request]:
    """`each` requests for every source, those of a shape together."""
    return [
        Request(
            f"{size}-{source}-{number}", f"{size}-{source}", "", 0, 0, number, 0, "", "", size, 32
        )
        for size in sizes
        for source in range(sources)
        for number in range(each)
    ]


@pytest.mark.parametrize("of", [1, 2, 3, 7, 20])
def test_shares_divide_a_plan(of: int) -> None:
    requests = make_requests(11)
    shares = [PlanShard(number, of).select(requests) for number in range(1, of + 1)]
    assert sorted(request.id for share in shares for request in share) == sorted(
        request.id for request in requests
    )
    sources = [{request.source_id for request in share} for share in shares]
    assert sum(map(len, sources)) == 11  # no source in two shares
    assert max(map(len, sources)) - min(map(len, sources)) <= 1
    assert all(share == [request for request in requests if request in share] for share in shares)


def test_more_seeds_or_levels_divide_a_plan_the_same_way() -> None:
    few, many = (
        {r.source_id for r in PlanShard(2, 3).select(make_requests(11, each))} for each in (2, 9)
    )
    assert few == many


@pytest.mark.parametrize("text", ["5/4", "0/4", "0/0", "1/0"])
def test_a_share_that_there_is_not(text: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"there is no shard {text}: shards go from 1/. to .*--array=1-"
    ):
        parse_shard(text)


@pytest.mark.parametrize("text", ["", "5", "/", "1/", "/4", "a/b", "1/2/3", "-1/4", "1.5/4"])
def test_what_is_no_share_at_all(text: str) -> None:
    with pytest.raises(RecipeError, match="a shard is written k/n, for example 2/8"):
        parse_shard(text)


def test_a_share_is_read() -> None:
    assert (parse_shard("2/8"), str(PlanShard(2, 8)), WHOLE_PLAN) == (
        PlanShard(2, 8),
        "2/8",
        PlanShard(1, 1),
    )


def test_pieces_keep_sources_whole_and_shapes_apart() -> None:
    requests = make_requests(5, each=3, sizes=(16, 32))
    pieces = list(cut(requests, 4))
    assert [request for piece in pieces for request in piece] == requests
    assert [len(piece) for piece in pieces] == [6, 6, 3] * 2
    assert all(len({request.width for request in piece}) == 1 for piece in pieces)
    assert (
        max(
            Counter(
                source for piece in pieces for source in {request.source_id for request in piece}
            ).values()
        )
        == 1
    )


def test_workers_that_come_and_die_make_everything_once() -> None:
    """A simulation: workers hold what they took, then write it; some die with a part written."""
    for seed in range(20):
        chance = random.Random(seed)
        requests = make_requests(40)
        dispatcher = Dispatcher(3)
        dispatcher.plan(requests)
        written: list[str] = []
        unwritten: dict[str, list[str]] = {f"worker {number}": [] for number in range(3)}
        for turn in range(10_000):
            name = chance.choice(list(unwritten))
            if chance.random() < 0.05:
                saved = unwritten.pop(name)
                written += saved[: chance.randrange(len(saved) + 1)]
                assert dispatcher.lost(name, set(written)) == len(saved) - len(
                    [each for each in saved if each in written]
                )
                unwritten[f"worker {turn + 3}"] = []
            elif piece := dispatcher.take(name, written=False):
                unwritten[name] += [request.id for request in piece]
            else:
                written += unwritten[name]
                unwritten[name] = []
                piece = dispatcher.take(name, written=True)
                assert piece is not None
                unwritten[name] += [request.id for request in piece]
            if dispatcher.progress()[1]:
                break
        assert Counter(written) == Counter(request.id for request in requests)
        dispatcher.stop()
        assert dispatcher.take("worker 1", written=True) is None and not dispatcher.advance()


def test_pieces_are_small_enough_for_an_even_end() -> None:
    dispatcher = Dispatcher(4)
    dispatcher.plan(make_requests(1000))
    assert {len(piece) for piece in dispatcher.waiting} == {4000 // 32 + 3, 4000 % 128}
    dispatcher = Dispatcher(2)
    dispatcher.plan(make_requests(100_000, each=1))
    assert {len(piece) for piece in dispatcher.waiting} == {512, 100_000 % 512}


def test_what_two_plans_ask_for_is_counted_together() -> None:
    dispatcher = Dispatcher(1)
    dispatcher.plan(make_requests(2))
    assert dispatcher.progress() == (0, False)
    while dispatcher.take("worker", written=True):
        dispatcher.advance()
    assert dispatcher.progress()[1] and dispatcher.known() == {"worker"}
    dispatcher.plan(make_requests(1))
    assert not dispatcher.progress()[1]
    assert dispatcher.take("worker", written=False) and len(dispatcher.held("worker")) == 4


def test_what_a_dead_worker_held_is_handed_out_in_pieces_as_large_as_the_others() -> None:
    dispatcher = Dispatcher(2)
    dispatcher.plan(make_requests(64))
    size = len(dispatcher.waiting[0])
    assert size == 64 * 4 // 16
    taken = [dispatcher.take("dead", written=False) or [] for _ in range(3)]
    written = {request.id for request in taken[0][:4]}  # one source
    assert dispatcher.lost("dead", written) == 3 * size - 4
    lost = [request for piece in taken for request in piece if request.id not in written]
    again = [dispatcher.take("other", written=False) or [] for _ in range(3)]
    assert [request for piece in again for request in piece] == lost  # before all others
    assert [len(piece) for piece in again] == [size, size, size - 4]


def test_what_a_dead_worker_held_is_divided_if_nothing_else_waits() -> None:
    dispatcher = Dispatcher(3)
    dispatcher.plan(make_requests(24))
    while dispatcher.take("dead", written=False):
        pass
    assert dispatcher.lost("dead", ()) == 24 * 4
    assert [len(piece) for piece in dispatcher.waiting] == [24 * 4 // 3] * 3


def test_a_dead_worker_that_held_little_leaves_a_piece_of_one_source() -> None:
    dispatcher = Dispatcher(8)
    dispatcher.plan(make_requests(1))
    assert dispatcher.take("dead", written=False)
    assert dispatcher.lost("dead", ()) == 4
    assert [len(piece) for piece in dispatcher.waiting] == [4]
