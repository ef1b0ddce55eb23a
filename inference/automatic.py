"""The MAP estimator by the size of the problem, where the user has not chosen one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from ssm_nn.extraction import extract
from ssm_nn.inference.curvature import factor_columns
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.map_problem import MapProblem, MapResult
from ssm_nn.inference.minibatch import Minibatch

__all__ = ["AutomaticEstimator"]

Array = Any

_SMALL_COLUMNS = 2**18  # P N C up to which Gauss-Newton, exact in one step on linear-Gaussian programs, is the quickest
_ONE_BATCH = 5_000  # examples up to which a pass over the whole task for each step is cheap


@dataclass(frozen=True)
class AutomaticEstimator:
    """Gauss-Newton for small problems, L-BFGS up to 5,000 examples a task, mini-batches of Adam beyond.

    Args:
        small, medium, large: the three estimators.
    """

    small: GaussNewton = field(default_factory=GaussNewton)
    medium: Lbfgs = field(default_factory=Lbfgs)
    large: Minibatch = field(default_factory=Minibatch)

    def bind(self, program: Any) -> Callable[[MapProblem, Array, Array], MapResult]:
        """The minimiser for ``program``; which one runs depends on the shapes of the problem alone."""
        bound = {one: one.bind(program) for one in (self.small, self.medium, self.large)}

        def run(problem: MapProblem, start: Array, key: Array) -> MapResult:
            return bound[self.choice(program, problem)](problem, start, key)

        return run

    def choice(self, program: Any, problem: MapProblem) -> GaussNewton | Lbfgs | Minibatch:
        """The estimator for a problem of this shape."""
        examples = problem.task.num_examples
        if problem.mean.shape[0] * examples * _columns(program, problem) <= _SMALL_COLUMNS:
            return self.small
        return self.medium if examples <= _ONE_BATCH else self.large


def _columns(program: Any, problem: MapProblem) -> int:
    """C, by abstract evaluation."""
    found: list[int] = []

    def trace(task, hypers):
        found.append(factor_columns(extract(program, task, hypers), task))

    jax.eval_shape(trace, problem.task, problem.hypers)
    return found[0]
