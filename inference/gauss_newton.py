"""Maximum a posteriori weights by damped Gauss-Newton, for problems whose columns fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import extract
from ssm_nn.inference.curvature import columns
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED, NOT_FINITE, MapProblem, MapResult

__all__ = ["GaussNewton"]

Array = Any

_MOST_NUMBERS = 2**27  # 512 MiB of columns for one output in float32
_HALVINGS = 12  # a step of 2^-12 that does not lower the objective says that rounding, not the step, decides


@dataclass(frozen=True)
class GaussNewton:
    """``d <- d - s (Lambda' + V V^T)^-1 gradient``, s halved from 1 until the objective falls.

    V, all columns of all examples, is formed at once: P N C numbers. On a model that is linear in its weights with a
    Gaussian likelihood one step is exact, and more do not move it: only the point of linearisation moves, never
    the prior.

    Args:
        max_steps: steps at most.
        tolerance: converged when half the Newton decrement, the decrease still expected, is below
            ``tolerance * (1 + |objective|)``.
    """

    max_steps: int = 200
    tolerance: float = 1e-5

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; a whole number >= 1 is accepted")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; a number > 0 is accepted")

    def bind(self, program: Any) -> Callable[[MapProblem, Array, Array], MapResult]:
        """The compiled minimiser for ``program``; the key is not used."""
        minimise = jax.jit(lambda problem, start: self._minimise(program, problem, start))

        def run(problem: MapProblem, start: Array, key: Array) -> MapResult:
            del key
            numbers = start.shape[0] * problem.task.num_examples
            if numbers > _MOST_NUMBERS:
                raise ValueError(
                    f"GaussNewton would form {start.shape[0]} x {problem.task.num_examples} columns at once for each "
                    "output; use Lbfgs() or Minibatch(...) for tasks of this size"
                )
            shift, steps, status, value = minimise(problem, start)
            return MapResult(shift, int(steps), int(status), float(value))

        return run

    def _minimise(self, program: Any, problem: MapProblem, start: Array) -> tuple[Array, Array, Array, Array]:
        space = extract(program, problem.task, problem.hypers)

        objective = problem.objective(space)
        value_and_gradient = jax.value_and_grad(objective)

        def newton(shift):
            value, gradient = value_and_gradient(shift)
            new = jnp.sqrt(problem.power) * columns(space, problem.mean + shift, problem.task)
            step = problem.precision.add_columns(new).solve(gradient)
            return value, step, gradient @ step / 2

        def halved(shift, value, step):
            def worse(carry):
                _, trial, count = carry
                return ~(trial <= value) & (count < _HALVINGS)

            def half(carry):
                size, _, count = carry
                return size / 2, objective(shift - size / 2 * step), count + 1

            one = jnp.ones((), shift.dtype)
            size, trial, _ = jax.lax.while_loop(worse, half, (one, objective(shift - step), 0))
            accepted = trial <= value
            return jnp.where(accepted, shift - size * step, shift), jnp.where(accepted, trial, value), accepted

        def unfinished(carry):
            _, count, status, _ = carry
            return (status == NOT_CONVERGED) & (count < self.max_steps)

        def iterate(carry):
            shift, count, _, _ = carry
            value, step, expected = newton(shift)
            moved, lowered, accepted = halved(shift, value, step)
            small = expected <= self.tolerance * (1 + jnp.abs(value))
            # a step that cannot lower the objective although little is expected of it: rounding has been reached
            rounding = ~accepted & (expected <= 100 * self.tolerance * (1 + jnp.abs(value)))
            status = jnp.where(small | rounding, CONVERGED, NOT_CONVERGED)
            status = jnp.where(jnp.isfinite(value) & jnp.isfinite(expected), status, NOT_FINITE)
            stuck = ~accepted & (status == NOT_CONVERGED)
            return moved, jnp.where(stuck, self.max_steps, count + 1), status, lowered

        first = (start, jnp.asarray(0), jnp.asarray(NOT_CONVERGED), jnp.asarray(jnp.inf, start.dtype))
        return jax.lax.while_loop(unfinished, iterate, first)
