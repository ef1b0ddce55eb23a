"""Which directions of all layers a task may keep.

    PaperShare       scores sigma_a^2 f_l; the largest first, up to the first cumulative share above alpha; at least one a layer
    ExactQuadratic   drops the direction with the smallest (b_a + M_aa / 2) / cost_a, then b += M[:, a], until the rest fits
    Evidence         keeps a direction while N M_aa > 1: its coefficient is known better than to within itself
    FixedRank        the first of each layer

A choice is a gain for each direction, 0 for one that is dropped. The quadratic is a local model, which far from all directions
foresees changes that do not come true: ``ExactQuadratic`` names candidates of one size, and the filter takes the one with
the smallest loss on examples that the quadratic has not seen, as a trust region accepts no step before it is tried.

An allocation is made on the host, in float64, of a few hundred directions.
Source: PaperShare is section 3.3 of Li et al. 2024 (arXiv 2311.15161).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ssm_nn.inference.checks import check_count, check_positive, is_finite

__all__ = ["Allocation", "Evidence", "ExactQuadratic", "FixedRank", "PaperShare", "Reads", "Scores", "dropped_loss"]

Array = Any

STEPS = (0.0, 0.5, 1.0)  # as shares of the way to the quadratic's minimum


class Scores(NamedTuple):
    """What is known of the directions a = 0 .. A - 1 of all layers.

    Attributes:
        sigma: (A,) singular values, in the metric of the directions.
        layer: (A,) number of the layer; the directions of a layer stand together, the largest sigma first.
        cost: (A,) numbers that a direction takes.
        sensitivity: (L,) mean squared gradient f_l of a layer.
        linear, matrix: b (A,) and M (A, A) of the loss's change by example, nats; nan where no curvature was asked for.
        num_examples: N of the task.
    """

    sigma: np.ndarray
    layer: np.ndarray
    cost: np.ndarray
    sensitivity: np.ndarray
    linear: np.ndarray
    matrix: np.ndarray
    num_examples: int


class Reads(NamedTuple):
    """What an allocation must know beside singular values and costs: b and M, and f."""

    quadratic: bool
    sensitivity: bool


class Allocation(Protocol):
    """A choice of directions; hashable."""

    def reads(self, total: int, budget: int | None) -> Reads:
        """What it must know, where all directions together take ``total`` numbers."""
        ...

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        """Booleans (A,): the directions kept, which take at most ``budget`` numbers together if there is one."""
        ...

    def candidates(self, scores: Scores, budget: int | None) -> np.ndarray:
        """Gains (C, A), 0 for what is dropped: choices among which the loss decides."""
        ...


def dropped_loss(scores: Scores, gains: np.ndarray) -> float:
    """``b.d + 1/2 d^T M d`` with ``d = 1 - gains``: the predicted change of the mean loss, in nats.

    Args:
        scores: of the directions.
        gains: (A,) numbers, or booleans that say what is kept.
    """
    change = 1 - np.asarray(gains, float)
    moved = np.flatnonzero(change)  # where nothing changes, nothing need be known
    change, matrix = change[moved], scores.matrix[np.ix_(moved, moved)].astype(float)
    return float(scores.linear[moved] @ change + 0.5 * change @ matrix @ change)


class _OneChoice:
    """An allocation that leaves nothing to be tried."""

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        raise NotImplementedError

    def candidates(self, scores: Scores, budget: int | None) -> np.ndarray:
        """The choice alone."""
        return self.choose(scores, budget)[None].astype(float)


@dataclass(frozen=True)
class PaperShare(_OneChoice):
    """By ``sigma^2 f_l``, largest first.

    Args:
        alpha: share of the summed scores in (0, 1]; 1 keeps every direction.
        least: directions that a layer keeps in any case.
    """

    alpha: float = 0.9
    least: int = 1

    def __post_init__(self):
        if not (is_finite(self.alpha) and 0 < self.alpha <= 1):
            raise ValueError(f"alpha is {self.alpha!r}; a share in (0, 1] is accepted, 1 keeps every direction")
        check_count(0, least=self.least)

    def reads(self, total: int, budget: int | None) -> Reads:
        """Sensitivities."""
        del total, budget
        return Reads(quadratic=False, sensitivity=True)

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        """Up to the first cumulative share above alpha; what a budget leaves no room for goes, smallest score first."""
        score = np.square(scores.sigma.astype(float)) * scores.sensitivity[scores.layer]
        order = np.argsort(-score, kind="stable")
        keep = np.zeros(len(score), bool)
        if self.alpha == 1 or not score.sum() > 0:
            keep[:] = self.alpha == 1
        else:
            share = np.cumsum(score[order]) / score.sum()
            keep[order[: int(np.searchsorted(share, self.alpha, side="right")) + 1]] = True
        keep |= _place(scores) < self.least
        return _fitted(scores, keep, order, budget)


@dataclass(frozen=True)
class ExactQuadratic:
    """By the change of the loss that dropping a set is worth, gradient and interactions counted.

        d_K(h) = -h (M_KK + damping tr M / A)^-1 (b_K + M_KS 1),    h = 0, 1/2, 1        S is dropped, K kept

    Candidates are three sets K, each with the gains ``1 - d_K`` at three lengths of the step to the quadratic's minimum given
    S: the quadratic's own set, the one without b, and the one by the paper's scores. A gain takes no number.

    Args:
        gradient: count b; without it a direction looks the same however far the weights are from a minimum.
        damping: of the step.
    """

    gradient: bool = True
    damping: float = 1e-3

    def __post_init__(self):
        if not isinstance(self.gradient, bool):
            raise ValueError(f"gradient is {self.gradient!r}; True or False is accepted")
        check_positive(damping=self.damping)

    def reads(self, total: int, budget: int | None) -> Reads:
        """Both where something must go, or the quadratic where something may."""
        return Reads(quadratic=budget is None or budget < total, sensitivity=budget is not None and budget < total)

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        """Greedy, until the rest fits; without a budget a direction is dropped only while that lowers the loss.

        Under a budget nothing is dropped beyond need: that far from all directions the quadratic sees gains that are none.
        """
        matrix = scores.matrix.astype(float)
        slope = scores.linear.astype(float) * self.gradient
        half, cost = np.diag(matrix) / 2, scores.cost.astype(float)
        keep = np.ones(len(cost), bool)
        while keep.any() and (budget is None or cost[keep].sum() > budget):
            change = np.where(keep, slope + half, np.inf)
            dropped = int(np.argmin(change / cost))
            if budget is None and change[dropped] >= 0:
                break
            keep[dropped] = False
            slope = slope + matrix[:, dropped]
        return keep

    def candidates(self, scores: Scores, budget: int | None) -> np.ndarray:
        """The sets with their steps; without a budget the quadratic's own set alone, since sizes would differ."""
        if budget is not None and budget >= scores.cost.sum():
            return np.ones((1, len(scores.cost)))
        sets = [self.choose(scores, budget)]
        if budget is not None:
            sets += [ExactQuadratic(gradient=False).choose(scores, budget), PaperShare(1.0).choose(scores, budget)]
        return np.concatenate([self._steps(scores, keep) for keep in np.unique(sets, axis=0)])

    def _steps(self, scores: Scores, keep: np.ndarray) -> np.ndarray:
        matrix = scores.matrix.astype(float)
        ridge = self.damping * np.trace(matrix) / len(keep) + np.finfo(float).tiny
        slope = scores.linear[keep] + matrix[np.ix_(keep, ~keep)].sum(1)
        step = -np.linalg.solve(matrix[np.ix_(keep, keep)] + ridge * np.eye(keep.sum()), slope)
        gains = np.tile(keep.astype(float), (len(STEPS), 1))
        gains[:, keep] -= np.array(STEPS)[:, None] * step
        return gains


@dataclass(frozen=True)
class Evidence(_OneChoice):
    """By ``N M_aa > 1``, free of thresholds: the data must tell a direction's coefficient from zero."""

    def reads(self, total: int, budget: int | None) -> Reads:
        """The quadratic."""
        del total, budget
        return Reads(quadratic=True, sensitivity=False)

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        """All that pass; where a budget is smaller, the most certain by cost."""
        certain = scores.num_examples * np.diag(scores.matrix).astype(float)
        order = np.argsort(-certain / scores.cost, kind="stable")
        return _fitted(scores, certain > 1, order, budget)


@dataclass(frozen=True)
class FixedRank(_OneChoice):
    """The same number of directions in each layer, as many as it has."""

    rank: int

    def __post_init__(self):
        check_count(0, rank=self.rank)

    def reads(self, total: int, budget: int | None) -> Reads:
        """Neither."""
        del total, budget
        return Reads(quadratic=False, sensitivity=False)

    def choose(self, scores: Scores, budget: int | None) -> np.ndarray:
        """The first ones; a budget takes the last away, layer by layer."""
        place = _place(scores)
        return _fitted(scores, place < self.rank, np.argsort(place, kind="stable"), budget)


def _place(scores: Scores) -> np.ndarray:
    """Number of a direction within its layer."""
    first = np.searchsorted(scores.layer, scores.layer)
    return np.arange(len(scores.layer)) - first


def _fitted(scores: Scores, keep: np.ndarray, order: np.ndarray, budget: int | None) -> np.ndarray:
    """The choice without its last in ``order``, until it fits the budget."""
    keep = keep.copy()
    for a in order[::-1]:
        if budget is None or scores.cost[keep].sum() <= budget:
            break
        keep[a] = False
    return keep
