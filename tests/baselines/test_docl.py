"""DoCL's score and its draws, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from discl.baselines.docl import Dynamics, draw_epoch_rows, draw_rows, update_dynamics


def test_score_by_hand():
    state = Dynamics.start(3, 2)
    row, label = np.asarray([1]), np.asarray([0])
    state = update_dynamics(
        state, row, label, np.asarray([[0.0, 0.0]], np.float32), learning_rate=0.1
    )
    assert state.score.tolist() == [0, 0, 0]
    state = update_dynamics(
        state, np.asarray([2]), label, np.asarray([[0.0, 0.0]], np.float32), learning_rate=0.1
    )
    state = update_dynamics(
        state, row, label, np.asarray([[2.0, 0.0]], np.float32), learning_rate=0.3
    )
    p = np.exp(2) / (np.exp(2) + 1)
    first = (
        0.5 * (1 - p) * 2 / 0.2**0.1
    )  # two updates of rate .1 lie between; this step's own is still to come
    assert state.score[1] == pytest.approx(first)
    state = update_dynamics(
        state, row, label, np.asarray([[1.0, 0.0]], np.float32), learning_rate=0.1
    )
    p = np.exp(1) / (np.exp(1) + 1)
    assert state.score[1] == pytest.approx(0.5 * first + 0.5 * (1 - p) * -1 / 0.3**0.1)
    assert state.visited.tolist() == [False, True, True]
    state = update_dynamics(
        Dynamics.start(1, 2),
        np.asarray([0]),
        label,
        np.asarray([[0.0, 0.0]], np.float32),
        learning_rate=0.0,
    )
    state = update_dynamics(
        state, np.asarray([0]), label, np.asarray([[9.0, 0.0]], np.float32), learning_rate=0.1
    )
    assert state.score.tolist() == [
        0
    ]  # no update in between: whatever moved the logits was not learning


def test_draws_are_distinct_and_follow_the_weights():
    score = np.asarray([0.0, 10.0, 20.0])
    rng = np.random.default_rng(0)
    first = [draw_rows(score, 1, rng)[0] for _ in range(20_000)]
    weights = np.exp([-2.0, -1.0, 0.0])
    assert np.bincount(first) / 20_000 == pytest.approx(weights / weights.sum(), abs=0.015)
    assert sorted(draw_rows(score, 3, rng)) == [0, 1, 2]


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match="4 of 3 samples"):
        draw_rows(np.zeros(3), 4, np.random.default_rng(0))


def test_warm_up_takes_everything_once_a_pass():
    state = Dynamics(
        np.asarray([0.0, 1e6, 0.0, 0.0]), np.zeros((4, 2)), np.zeros(4), np.zeros(4, bool), 0.0
    )
    rng = np.random.default_rng(0)
    assert sorted(draw_epoch_rows(state, 0, 1, 4, rng=rng)) == [0, 1, 2, 3]
    assert np.bincount(draw_epoch_rows(state, 0, 1, 10, rng=rng)).tolist() != [0, 10, 0, 0]
    assert draw_epoch_rows(state, 1, 1, 1, rng=rng).tolist() == [1]
    assert (
        np.bincount(draw_epoch_rows(state, 1, 1, 8, rng=rng, share=0.25), minlength=4)
        == [0, 8, 0, 0]
    ).all()
    assert (
        np.bincount(draw_epoch_rows(state, 1, 1, 8, rng=rng, share=1.0), minlength=4) == 2
    ).all()
    assert set(draw_epoch_rows(state, 0, 1, 6, rng=rng, rows=[0, 2])) == {0, 2}
