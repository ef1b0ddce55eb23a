"""Maximum a posteriori weights by L-BFGS on the whole task, for tasks that fit in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import extract
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED, NOT_FINITE, MapProblem, MapResult, norm

__all__ = ["Lbfgs"]

Array = Any


@dataclass(frozen=True)
class Lbfgs:
    """optax's L-BFGS with its zoom line search, in coordinates ``z = R d``, ``Lambda' = R^T R``, where the prior is round.

    Cheaper than Gauss-Newton wherever the task's columns are many; it needs values and gradients alone.

    Args:
        max_steps: steps at most.
        tolerance: converged when the gradient's norm in z, which is the distance to the minimum in prior standard
            deviations were there no data, is below ``tolerance * sqrt(P)``.
    """

    max_steps: int = 1000
    tolerance: float = 1e-3

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
            shift, steps, status, value = minimise(problem, start)
            return MapResult(shift, int(steps), int(status), float(value))

        return run

    def _minimise(self, program: Any, problem: MapProblem, start: Array) -> tuple[Array, Array, Array, Array]:
        space = extract(program, problem.task, problem.hypers)
        whitening = problem.precision.whitening()
        limit = self.tolerance * jnp.sqrt(float(start.shape[0]))
        optimizer = optax.lbfgs()

        def objective(z):
            log_likelihood = space.log_likelihood(problem.mean + whitening.colour(z), problem.task)
            return 0.5 * jnp.sum(jnp.square(z)) - problem.power * log_likelihood

        value_and_gradient = optax.value_and_grad_from_state(objective)

        def unfinished(carry):
            _, _, count, size, value = carry
            return (count == 0) | ((size > limit) & (count < self.max_steps) & jnp.isfinite(value))

        def iterate(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            z, state, count, _, _ = carry
            value, gradient = value_and_gradient(z, state=state)
            change, state = optimizer.update(gradient, state, z, value=value, grad=gradient, value_fn=objective)
            return z + change, state, count + 1, norm(gradient), value

        z: Any = whitening.whiten(start)
        infinite = jnp.asarray(jnp.inf, start.dtype)
        z, _, steps, size, value = jax.lax.while_loop(
            unfinished, iterate, (z, optimizer.init(z), jnp.asarray(0), infinite, jnp.zeros((), start.dtype))
        )
        status = jnp.where(size <= limit, CONVERGED, NOT_CONVERGED)
        status = jnp.where(jnp.isfinite(value) & jnp.all(jnp.isfinite(z)), status, NOT_FINITE)
        return whitening.colour(z), steps, status, value
