"""Allocations: against brute force, and in their limits."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from ssm_nn.inference.perturbation.allocation import (
    Evidence,
    ExactQuadratic,
    FixedRank,
    PaperShare,
    Scores,
    dropped_loss,
)
from ssm_nn.inference.perturbation.directions import Whitened


@pytest.fixture
def scores(rng):
    layer = np.repeat([0, 1], [4, 3])
    root = rng.normal(size=(7, 9))
    sigma = np.concatenate([np.sort(rng.gamma(1, size=n))[::-1] for n in (4, 3)])
    return Scores(
        sigma, layer, np.array([10, 6])[layer], rng.gamma(1, size=2), rng.normal(size=7), root @ root.T / 9, 50
    )


def greedy_by_definition(scores, budget):
    """Each step re-computes the loss change from the whole quadratic."""
    keep = np.ones(7, bool)
    while budget is None or scores.cost[keep].sum() > budget:
        now = dropped_loss(scores, keep)
        options = {}
        for a in np.flatnonzero(keep):
            without = keep.copy()
            without[a] = False
            options[a] = (dropped_loss(scores, without) - now) / scores.cost[a]
        if not options:
            return keep
        best = min(options, key=options.get)
        if budget is None and options[best] >= 0:
            return keep
        keep[best] = False
    return keep


def test_alpha_one_keeps_all_directions(scores):
    assert PaperShare(1.0).choose(scores, None).all()


def test_paper_share_keeps_the_largest_scores_up_to_the_first_share_above_alpha(scores):
    score = scores.sigma**2 * scores.sensitivity[scores.layer]
    for alpha in (0.3, 0.6, 0.9):
        keep = PaperShare(alpha, least=0).choose(scores, None)
        assert score[keep].min() >= score[~keep].max()
        assert score[keep].sum() > alpha * score.sum()
        assert score[keep].sum() - score[keep].min() <= alpha * score.sum()


def test_paper_share_leaves_each_layer_a_direction(scores):
    keep = PaperShare(0.1).choose(scores._replace(sensitivity=np.array([1.0, 1e-12])), None)
    assert keep[4]
    assert not keep[5:].any()


@pytest.mark.parametrize("budget", [0, 6, 17, 30, 58, 1000, None])
def test_exact_allocation_is_the_greedy_descent_of_the_quadratic(scores, budget):
    assert np.array_equal(ExactQuadratic().choose(scores, budget), greedy_by_definition(scores, budget))


@pytest.mark.parametrize("budget", [0, 6, 17, 30])
def test_exact_candidates_fit_and_hold_the_sets_of_the_quadratic_and_of_the_paper(scores, budget):
    gains = ExactQuadratic().candidates(scores, budget)
    assert all(scores.cost[row != 0].sum() <= budget for row in gains)
    untouched = [row.astype(bool).tolist() for row in gains if np.isin(row, [0, 1]).all()]
    assert ExactQuadratic().choose(scores, budget).tolist() in untouched
    assert PaperShare(1.0).choose(scores, budget).tolist() in untouched


def test_a_whole_step_ends_at_the_minimum_of_the_quadratic_given_what_is_dropped(scores):
    rule = ExactQuadratic(damping=1e-12)
    _, half, whole = rule.candidates(scores, None)
    kept = whole != 0
    assert np.array_equal(kept, rule.choose(scores, None))
    lowest = minimize(lambda z: dropped_loss(scores, np.where(kept, z, 0)), np.ones(7))
    assert dropped_loss(scores, whole) == pytest.approx(lowest.fun, abs=1e-8)
    np.testing.assert_allclose(half[kept], (1 + whole[kept]) / 2)


def test_where_everything_fits_nothing_is_read_and_nothing_is_dropped(scores):
    total = int(scores.cost.sum())
    blank = scores._replace(linear=scores.linear * np.nan, matrix=scores.matrix * np.nan)
    gains = ExactQuadratic().candidates(blank, total)
    assert gains.tolist() == [[1.0] * 7]
    assert dropped_loss(blank, gains[0]) == 0
    assert ExactQuadratic().reads(total, total) == (False, False)
    assert ExactQuadratic().reads(total, total - 1) == (True, True)


def test_additive_increments_make_the_greedy_choice_the_best_one(scores, rng):
    plain = scores._replace(matrix=np.diag(rng.gamma(1, size=7)), linear=np.zeros(7), cost=np.full(7, 3))
    keep = ExactQuadratic().choose(plain, 9)
    best = min(itertools.combinations(range(7), 3), key=lambda c: dropped_loss(plain, np.isin(np.arange(7), c)))
    assert set(np.flatnonzero(keep)) == set(best)


def test_evidence_keeps_what_the_data_tell_from_zero(scores):
    diagonal = np.array([0.5, 0.021, 0.019, 0.0, 3.0, 0.02, 0.0201])
    keep = Evidence().choose(scores._replace(matrix=np.diag(diagonal)), None)
    assert keep.tolist() == [True, True, False, False, True, False, True]
    assert (
        Evidence().choose(scores._replace(matrix=np.diag(diagonal)), 6).tolist() == [False] * 4 + [True] + [False] * 2
    )


def test_fixed_rank_takes_the_first_of_each_layer(scores):
    assert FixedRank(2).choose(scores, None).tolist() == [True, True, False, False, True, True, False]


@pytest.mark.parametrize("allocation", [PaperShare(), ExactQuadratic(), Evidence(), FixedRank(3)], ids=repr)
@pytest.mark.parametrize("budget", [0, 7, 20, 40])
def test_no_allocation_exceeds_its_budget(scores, allocation, budget):
    assert scores.cost[allocation.choose(scores, budget)].sum() <= budget


@pytest.mark.parametrize("alpha", [0, -0.1, 1.1, float("nan"), "0.9"])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*\(0, 1\]"):
        PaperShare(alpha)


@pytest.mark.parametrize("damping", [0, -1.0, "1", None])
def test_bad_dampings_are_refused(damping):
    with pytest.raises(ValueError, match="damping is"):
        ExactQuadratic(damping=damping)
    with pytest.raises(ValueError, match="damping is"):
        Whitened(damping)


def test_bad_ranks_are_refused():
    with pytest.raises(ValueError, match="rank is -1"):
        FixedRank(-1)
