"""What a last-layer engine carries from batch to batch, and what it says of each."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from ssm_nn.inference.last_layer.conditioning import Conditioned
from ssm_nn.inference.last_layer.map_search import NEARLY, tolerance
from ssm_nn.inference.last_layer.sites import Sites
from ssm_nn.inference.last_layer.structures import HeadBelief
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED, NOT_FINITE, all_finite

__all__ = ["HeadState", "UpdateInfo", "info_of", "no_change"]

Array = Any

_MESSAGES = {
    CONVERGED: "the climb to the mode converged",
    NOT_CONVERGED: "the climb to the mode did not converge: allow more steps, or compute in float64",
    NOT_FINITE: "the result is not finite, and the state was left as it was: look for outliers in the features",
}


class HeadState(NamedTuple):
    """All that the next update needs.

    Attributes:
        step: number of batches so far.
        mean: (K, D), whitened; ``engine.weights(state)`` has it in units of W.
        belief: the covariance of the whitened weights, in the engine's structure.
        sites: of each point; none where the engine keeps none.
    """

    step: int
    mean: Array
    belief: HeadBelief
    sites: Sites


class UpdateInfo(NamedTuple):
    """What an update, a removal or a sweep says of itself.

    Attributes:
        num_points: that it was about.
        log_evidence: ``log p(y | points before)`` of an update, of all points for a sweep; nan for a removal.
        log_likelihood: at the mean reached.
        steps: of Newton.
        decrement: what was left to climb, in standard deviations of the posterior.
        status: CONVERGED, NOT_CONVERGED or NOT_FINITE of ``ssm_nn.inference.map_problem``.
        seconds: wall clock.
    """

    num_points: int
    log_evidence: float
    log_likelihood: float
    steps: int
    decrement: float
    status: int
    seconds: float

    @property
    def message(self) -> str:
        """The status in words."""
        return _MESSAGES[self.status]


def no_change(began: float) -> UpdateInfo:
    """Of what needed no climb; ``began`` is a reading of ``time.perf_counter``."""
    nan = float("nan")
    return UpdateInfo(0, 0.0, nan, 0, 0.0, CONVERGED, time.perf_counter() - began)


def info_of(made: Conditioned, num_points: int, began: float, max_steps: int | None = None) -> UpdateInfo:
    """Of a climb that ended, or was cut short by the user's own ``max_steps``."""
    finite = bool(all_finite((made.mean, made.belief, made.log_evidence)))
    decrement, steps = float(made.found.decrement), int(made.found.steps)
    # what a user's own bound cut short is what was asked for; else rounding may leave somewhat more than aimed at
    done = steps == max_steps or decrement <= NEARLY * tolerance(made.found.decrement.dtype)
    status = NOT_FINITE if not finite else CONVERGED if done else NOT_CONVERGED
    return UpdateInfo(
        num_points,
        float(made.log_evidence),
        float(made.found.log_likelihood),
        steps,
        decrement,
        status,
        time.perf_counter() - began,
    )
