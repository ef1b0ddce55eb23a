"""The evidence by covariances in the space of the tasks' outputs, where all tasks together have no more of them than weights.

    belief     theta ~ N(m, diag(v) - U U^T)                            v the variances were there no data, U (P, T K)
    predict    m' = a m + b,   v' = a^2 v + q,   U' = a U               elementwise, after a permutation
    update     W = Sigma' V,   L L^T = I + V^T W,   U = [U', W L^-T]    V (P, K) the task's columns, G = V V^T
    log Z_t  = power log p(D_t | m' + d) - 1/2 beta . d - log det L,    beta = Lambda' d = power grad log p(D_t | m' + d)

The evidence of ``Dense()``, and of ``LowRank`` where nothing is cut off, to rounding; no matrix (P, P) is made, factorised or
inverted. O(P T K^2) a task in the place of O(P^3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ssm_nn.extraction import StateSpace, extract
from ssm_nn.inference.automatic import AutomaticEstimator
from ssm_nn.inference.batches import counted_copies
from ssm_nn.inference.conjugate_gradients import conjugate_gradients
from ssm_nn.inference.curvature import columns
from ssm_nn.inference.diagnosis.known_scales import informative_columns
from ssm_nn.inference.differentiable import MOST_STEPS, PROBING_STEPS
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED, NOT_FINITE, MapProblem
from ssm_nn.inference.structures import Dense, LowRank
from ssm_nn.moments import Moments
from ssm_nn.precision import step_mean_vector
from ssm_nn.precision_low_rank import cholesky_of_identity_plus, times_inverse_transposed
from ssm_nn.tasks import Task, Tasks

__all__ = ["Covariance", "OutputSpace", "Spread"]

Array = Any

_HALVINGS = 12  # as GaussNewton
# of the tolerance, for a decrease that is expected by the curvature of the last step: that of this one may be smaller
_LAST_CURVATURE = 1e-2
# roundings of a task's information, in units of its noise, above which differences of covariances are wrong: on networks
# whose outputs a prior spreads a hundred times as far as the noise, no search converges in float32
_RESOLVED = 1e-4


class Covariance(NamedTuple):
    """``diag(variance) - factor factor^T``, positive definite; variance (P,), factor (P, R)."""

    variance: Array
    factor: Array

    def __matmul__(self, x: Array) -> Array:
        """``Sigma x`` for x (P,) or (P, K)."""
        scaled = self.variance * x if x.ndim == 1 else self.variance[:, None] * x
        return scaled - self.factor @ (self.factor.T @ x)

    def quadratic(self, x: Array) -> Array:
        """``x^T Sigma x``."""
        return jnp.sum(self.variance * jnp.square(x)) - jnp.sum(jnp.square(self.factor.T @ x))

    def predict(self, moments: Moments) -> Covariance:
        """``A O Sigma O^T A + Q``, O a permutation or None."""
        variance, factor = self
        if moments.permutation is not None:
            order = moments.permutation.indices(variance.shape[0])
            variance, factor = variance[order], factor[order]
        return Covariance(jnp.square(moments.gain) * variance + moments.noise, moments.gain[:, None] * factor)


class Spread(NamedTuple):
    """What columns V (P, K) of information do to a covariance: ``(Sigma'^-1 + V V^T)^-1 = Sigma' - narrowing narrowing^T``.

    Attributes:
        columns: V.
        narrowing: ``W L^-T`` (P, K).
        half_logdet: ``log det L = 1/2 log det(I + V^T Sigma' V)``.
    """

    columns: Array
    narrowing: Array
    half_logdet: Array

    @classmethod
    def of(cls, covariance: Covariance, new: Array) -> Spread:
        """By one Cholesky factor of (K, K), whose eigenvalues are at least 1."""
        wide = covariance @ new
        root = cholesky_of_identity_plus(new.T @ wide)
        return cls(new, times_inverse_transposed(wide, root), jnp.sum(jnp.log(jnp.diagonal(root))))

    def step(self, covariance: Covariance, x: Array) -> Array:
        """``z = Sigma x`` and ``Lambda' z``, as rows (2, P); Sigma with the columns' information, Lambda' without."""
        z = covariance @ x - self.narrowing @ (self.narrowing.T @ x)
        return jnp.stack([z, x - self.columns @ (self.columns.T @ z)])


class OutputSpace:
    """``OutputSpace(engine)(hypers, tasks, key)``: the log evidence of each task (T,), and which searches did not converge."""

    def __init__(self, engine: LaplaceFilter):
        self.engine = engine

    def serves(self, space: StateSpace, task: Task, num_tasks: int, hypers: Any) -> bool:
        """Whether the evidence is the engine's, and the outputs of ``num_tasks`` tasks like this no more than the weights."""
        structure = self.engine.structure
        if not isinstance(structure, Dense | LowRank):
            return False
        outputs = num_tasks * task.num_examples * len(informative_columns(space, task))
        kept = space.layout.size if isinstance(structure, Dense) else min(structure.rank, space.layout.size)
        turned = space.moments.permutation
        by_steps = isinstance(self._estimator(space.prior_mean, task, hypers), GaussNewton)
        return outputs <= kept and by_steps and (turned is None or turned.is_permutation)

    def resolves(self, tasks: Tasks) -> bool:
        """Whether rounding leaves enough of a covariance that the tasks have narrowed; at the engine's own hyper-parameters.

        In float64 always; else where ``eps trace(V^T diag(v) V)`` is small for every task, V at the network's own weights.
        Of traced tasks nothing is known.
        """
        space = extract(self.engine.program, counted_copies(tasks.at(0)), self.engine.hypers)
        epsilon = float(jnp.finfo(space.prior_mean.dtype).eps)
        if epsilon < jnp.finfo(jnp.float32).eps:
            return True
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tasks)):
            return False

        def spread(task: Task) -> Array:
            here = extract(self.engine.program, task, self.engine.hypers)
            return jnp.sum(jnp.square(self._columns(here, here.initial, task)) * here.prior_variance[:, None])

        largest = max(float(spread(counted_copies(tasks.at(t)))) for t in range(len(tasks)))
        return epsilon * largest <= _RESOLVED

    def _estimator(self, mean: Array, task: Task, hypers: Any) -> Any:
        estimator, problem = self.engine.estimator, MapProblem(mean, None, task, hypers, jnp.ones((), mean.dtype))
        return (
            estimator.choice(self.engine.program, problem) if isinstance(estimator, AutomaticEstimator) else estimator
        )

    def __call__(self, hypers: Any, tasks: Tasks, key: Array) -> tuple[Array, Array]:
        """At ``hypers``, for a stack of tasks that it serves; ``key`` as ``engine.run`` takes it."""
        first = counted_copies(tasks.at(0))
        space = extract(self.engine.program, first, hypers)
        outputs = first.num_examples * len(informative_columns(space, first))
        factor = jnp.zeros((space.layout.size, len(tasks) * outputs), space.prior_mean.dtype)

        def step(carry: tuple[_Belief, Array, Array], parts: Any) -> tuple[Any, tuple[Array, Array]]:
            belief, index, key = carry
            task = counted_copies(Task.tree_unflatten(None, parts))
            next_key, map_key, probe_key = jax.random.split(key, 3)
            found, status = jax.lax.stop_gradient(self._search(hypers, belief, index, task, map_key, outputs))
            belief, value, saddle = self._revised(hypers, belief, index, task, found, probe_key)
            return (belief, index + 1, next_key), (value, (status != CONVERGED) | saddle)

        masked = tasks.mask if tasks.mask is not None else jnp.ones((len(tasks), first.num_examples), bool)
        prior = _Belief(space.prior_mean, Covariance(space.prior_variance, factor))
        carry = (prior, jnp.zeros((), jnp.int32), key)
        return jax.lax.scan(step, carry, (tasks.data, tasks.context, masked))[1]

    def _predicted(self, space: StateSpace, belief: _Belief, index: Array) -> _Belief:
        """The prior itself for the first task."""
        mean, covariance = belief
        moved = lambda: _Belief(step_mean_vector(space.moments, mean), covariance.predict(space.moments))  # noqa: E731
        return jax.lax.cond(index == 0, lambda: belief, moved)

    def _columns(self, space: StateSpace, theta: Array, task: Task) -> Array:
        every = columns(space, theta, task).reshape(theta.shape[0], task.num_examples, -1)
        new = every[..., np.asarray(informative_columns(space, task))].reshape(theta.shape[0], -1)
        return (jnp.sqrt(self.engine.power) * new).astype(theta.dtype)

    def _log_likelihood(self, space: StateSpace, task: Task) -> Callable[[Array], Array]:
        """As often as the engine counts it."""
        return lambda theta: self.engine.power * space.log_likelihood(theta, task)

    def _search(
        self, hypers: Any, belief: _Belief, index: Array, task: Task, key: Array, outputs: int
    ) -> tuple[_Found, Array]:
        """The steps of ``GaussNewton``, each with its image ``Lambda' step``; nothing here is differentiated."""
        hypers, belief = jax.lax.stop_gradient((hypers, belief))
        space = extract(self.engine.program, task, hypers)
        mean, covariance = self._predicted(space, belief, index)
        estimator = self._estimator(mean, task, hypers)
        fit = jax.value_and_grad(self._log_likelihood(space, task))

        def judged(position: Array) -> tuple[Array, Array]:
            """The objective, and its gradient."""
            value, pull = fit(mean + position[0])
            return 0.5 * position[0] @ position[1] - value, position[1] - pull

        def iterate(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            position, _, count, _ = carry
            value, slope = judged(position)
            spread = Spread.of(covariance, self._columns(space, mean + position[0], task))
            step = spread.step(covariance, slope)
            expected = slope @ step[0] / 2

            def worse(halving: tuple[Array, Array, Array]) -> Array:
                return ~(halving[1] <= value) & (halving[2] < _HALVINGS)

            def half(halving: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                size, _, halvings = halving
                return size / 2, judged(position - size / 2 * step)[0], halvings + 1

            whole = (jnp.ones_like(value), judged(position - step)[0], jnp.asarray(0))
            size, trial, _ = jax.lax.while_loop(worse, half, whole)
            accepted = trial <= value
            position = jnp.where(accepted, position - size * step, position)
            # a second step by the same curvature, which on programs linear in their weights is nothing but rounding
            value, slope = judged(position)
            last = spread.step(covariance, slope)
            still, allowed = slope @ last[0] / 2, estimator.tolerance * (1 + jnp.abs(value))
            position = jnp.where(judged(position - last)[0] <= value, position - last, position)
            rounding = ~accepted & (expected <= 100 * allowed)
            small = (expected <= allowed) | rounding | (still <= _LAST_CURVATURE * allowed)
            status = jnp.where(small, CONVERGED, NOT_CONVERGED)
            status = jnp.where(jnp.isfinite(value) & jnp.isfinite(expected), status, NOT_FINITE)
            stuck = ~accepted & (status == NOT_CONVERGED)
            return position, spread, jnp.where(stuck, estimator.max_steps, count + 1), status

        def unfinished(carry: tuple[Any, ...]) -> Array:
            return (carry[3] == NOT_CONVERGED) & (carry[2] < estimator.max_steps)

        start = self._start(space, mean, covariance, index, key)
        none = jnp.zeros((*mean.shape, outputs), mean.dtype)
        nothing = Spread(none, none, jnp.zeros((), mean.dtype))
        carry = (start, nothing, jnp.asarray(0), jnp.asarray(NOT_CONVERGED))
        position, spread, _, status = jax.lax.while_loop(unfinished, iterate, carry)
        return _Found(position[0], position[1], spread), status

    def _start(self, space: StateSpace, mean: Array, covariance: Covariance, index: Array, key: Array) -> Array:
        """As LaplaceFilter: the network's own weights, or a prior draw where these are zero; later the prediction. (2, P)."""

        def first() -> Array:
            drawn = self.engine.structure.prior(covariance.variance).sample(key)
            shift = jnp.where(jnp.any(space.initial != 0), space.initial - mean, drawn)
            return jnp.stack([shift, shift / covariance.variance])

        return jax.lax.cond(index == 0, first, lambda: jnp.zeros((2, *mean.shape), mean.dtype))

    def _revised(
        self, hypers: Any, belief: _Belief, index: Array, task: Task, found: _Found, key: Array
    ) -> tuple[_Belief, Array, Array]:
        """The belief after the task, its log evidence, and whether the shift is at a saddle."""
        space = extract(self.engine.program, task, hypers)
        mean, covariance = self._predicted(space, belief, index)
        likelihood = self._log_likelihood(space, task)
        # d = Sigma' grad log p(m' + d)
        residual = found.shift - covariance @ jax.grad(likelihood)(mean + found.shift)
        still = jax.lax.stop_gradient((hypers, mean, covariance))
        theta = mean + self._settled(residual, found, task, *still)
        saddle = self._saddle(found, task, *still, key)
        spread = Spread.of(covariance, self._columns(space, theta, task))
        # where the objective is least its own change with d does not count; that of its square is by beta, not by Lambda'
        square = covariance.quadratic(found.pull)
        square = found.shift @ found.pull - (square - jax.lax.stop_gradient(square))
        value = likelihood(mean + found.shift) - 0.5 * square - spread.half_logdet
        place = (jnp.zeros_like(index), index * spread.narrowing.shape[1])
        factor = jax.lax.dynamic_update_slice(covariance.factor, spread.narrowing, place)
        return _Belief(theta, Covariance(covariance.variance, factor)), value, saddle

    def _bend(self, found: _Found, task: Task, hypers: Any, mean: Array) -> Callable[[Array], Array]:
        """Products with the Hessian of the log likelihood where the search ended."""
        likelihood = self._log_likelihood(extract(self.engine.program, task, hypers), task)
        return jax.linearize(jax.grad(likelihood), mean + found.shift)[1]

    def _settled(
        self, residual: Array, found: _Found, task: Task, hypers: Any, mean: Array, covariance: Covariance
    ) -> Array:
        """The shift with the derivative of the solution of ``residual = 0``.

        ``(I - Sigma' B) d d = -d residual``, B the Hessian of the log likelihood. The transpose ``(I - B Sigma') y = c`` has
        the solution ``y = c + B x`` with ``(Lambda' - B) x = c``, by conjugate gradients.
        """
        bend = self._bend(found, task, hypers, mean)

        def back(_: Any, right: Array) -> Array:
            def conditioned(x: Array) -> Array:
                return found.spread.step(covariance, x)

            return right + bend(conjugate_gradients(lambda z: z[1] - bend(z[0]), right, conditioned, MOST_STEPS)[0])

        def forth(_: Any, right: Array) -> Array:
            return right + covariance @ back(None, bend(right))

        moved = residual - jax.lax.stop_gradient(residual)
        return found.shift - jax.lax.custom_linear_solve(
            lambda x: x - covariance @ bend(x), moved, forth, transpose_solve=back
        )

    def _saddle(self, found: _Found, task: Task, hypers: Any, mean: Array, covariance: Covariance, key: Array) -> Array:
        """Whether random numbers meet a direction of negative curvature."""
        bend, probe = self._bend(found, task, hypers, mean), jax.random.normal(key, mean.shape, mean.dtype)
        return ~conjugate_gradients(
            lambda z: z[1] - bend(z[0]), probe, lambda x: found.spread.step(covariance, x), PROBING_STEPS
        )[1]


class _Belief(NamedTuple):
    mean: Array
    covariance: Covariance


class _Found(NamedTuple):
    """``shift`` d, ``pull`` Lambda' d, and what the columns of the last step do to the prediction."""

    shift: Array
    pull: Array
    spread: Spread
