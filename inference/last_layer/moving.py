"""A head that walks between batches: filtering, smoothing and sweeping over the points that are kept.

    V_t = A V_{t-1} + b + noise,  noise ~ N(0, Q);     point n of batch t:  N(V_t phi_n; f_n + Lambda_n^-1 g_n, Lambda_n^-1)

With the points' factors fixed this is a linear Gaussian model: the filter and the Rauch-Tung-Striebel smoother are exact.
A sweep linearises every point anew where its smoothed head stands; where that settles is the mode of the whole path.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.laplace import FilterWarning
from ssm_nn.inference.last_layer.diagonal_head import DiagonalInformation
from ssm_nn.inference.last_layer.full_covariance import FullCovariance
from ssm_nn.inference.last_layer.head_states import HeadState, UpdateInfo
from ssm_nn.inference.last_layer.heads import Head
from ssm_nn.inference.last_layer.map_search import NEARLY, tolerance, weighted
from ssm_nn.inference.last_layer.shared_covariance import SharedCovariance
from ssm_nn.inference.last_layer.sites import Sites, padded, padded_size
from ssm_nn.inference.last_layer.square_root import SquareRootInformation
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED, NOT_FINITE, all_finite

__all__ = ["HeadPath", "refiltered", "smooth_head", "swept"]

Array = Any


class Walking(Protocol):
    """The engine, as far as it is read here."""

    head: Head
    keep_sites: bool

    @property
    def largest_few(self) -> int:
        """Points that go through the dual at a time."""
        ...

    def init(self) -> HeadState:
        """The prior."""
        ...

    def step_moments(self) -> tuple[Array, Array, Array]:
        """Gain (D,), shift (K, D), noise (D,)."""
        ...


class HeadPath(NamedTuple):
    """Beliefs of all T steps given all points.

    Attributes:
        means: (T, K, D), whitened.
        beliefs: T covariances.
    """

    means: Array
    beliefs: tuple[Any, ...]


class _Pass(NamedTuple):
    predicted: list[tuple[Array, Any]]
    filtered: list[tuple[Array, Any]]


def smooth_head(engine: Walking, state: HeadState) -> HeadPath:
    """The heads of all steps in the light of all points, from the sites alone.

    Raises:
        ValueError: an engine that keeps no sites, no step.
    """
    if not engine.keep_sites:
        raise ValueError("keep_sites is False: this engine knows of no single point; make it with keep_sites=True")
    if not state.step:
        raise ValueError("the state has seen no batch; there is nothing to smooth")
    return _smoothed(engine, _filter(engine, state.sites, state.step))


def refiltered(engine: Walking, state: HeadState) -> HeadState:
    """The last step's belief from the sites as they are linearised."""
    mean, belief = _filter(engine, state.sites, state.step).filtered[-1]
    return state._replace(mean=mean, belief=belief)


def swept(engine: Walking, state: HeadState, max_steps: int) -> tuple[HeadState, UpdateInfo]:
    """Sites linearised along the smoothed path, until it stands still."""
    began = time.perf_counter()
    sites, change, steps = state.sites, float("inf"), 0
    limit = float(tolerance(sites.outputs.dtype))
    while steps < max_steps and change > limit:
        path = _smoothed(engine, _filter(engine, sites, state.step))
        outputs = np.einsum("nd,nkd->nk", sites.features, np.asarray(path.means)[sites.steps])
        moved = float(np.max(np.abs(outputs - sites.outputs) / (1 + np.abs(outputs))))
        steps += 1
        if not np.isfinite(moved):
            change = moved
            break
        # rounding, and not Newton, where the change is small and does not shrink
        change = limit if NEARLY * limit > moved > 0.5 * change else moved
        sites = sites._replace(outputs=outputs.astype(sites.outputs.dtype))
    after = refiltered(engine, state._replace(sites=sites))
    finite = bool(all_finite((after.mean, after.belief))) and np.isfinite(change)
    status = NOT_FINITE if not finite else CONVERGED if change <= limit or steps == max_steps != 100 else NOT_CONVERGED
    nan = float("nan")
    info = UpdateInfo(sites.num_points, nan, nan, steps, change, status, time.perf_counter() - began)
    if status != CONVERGED:
        warnings.warn(info.message, FilterWarning, stacklevel=4)
    return (after if finite else state), info


def _filter(engine: Walking, sites: Sites, num_steps: int) -> _Pass:
    gain, shift, noise = engine.step_moments()
    first = engine.init()
    mean, belief = first.mean, first.belief
    passed = _Pass([], [])
    for t in range(num_steps):
        if t:
            mean, belief = gain * mean + shift, _step(belief, gain, noise)
        passed.predicted.append((mean, belief))
        points = sites.at(sites.steps == t)
        largest = engine.largest_few
        for start in range(0, points.num_points, largest):
            part = points.at(np.arange(start, min(start + largest, points.num_points)))
            size = padded_size(part.num_points)
            weight = np.zeros(size, part.weights.dtype)
            weight[: part.num_points] = part.weights
            arrays = [jnp.asarray(padded(array, size)) for array in (part.features, part.outputs, part.labels)]
            mean, belief = _condition_linear(belief, mean, engine.head.likelihood, *arrays, jnp.asarray(weight))
        passed.filtered.append((mean, belief))
    return passed


@jax.jit
def _condition_linear(
    belief: Any, mean: Array, likelihood: Any, phi: Array, f: Array, y: Any, weight: Array
) -> tuple[Array, Any]:
    """``m' = m + S' J^T [Lambda (f - J m) + g]``: points with their factors as they stand."""
    after = belief.absorb(phi, likelihood, f, y, weight)
    pull = likelihood.weigh(f, y, f - phi @ mean.T) + likelihood.gradient(f, y)
    return mean + after.lift(phi, weighted(weight, pull)), after


_step = jax.jit(lambda belief, gain, noise: belief.step(gain, noise))


def _smoothed(engine: Walking, passed: _Pass) -> HeadPath:
    gain, _, noise = engine.step_moments()
    mean, belief = passed.filtered[-1]
    means, beliefs = [mean], [belief]
    for t in range(len(passed.filtered) - 2, -1, -1):
        own_mean, own = passed.filtered[t]
        predicted_mean, predicted = passed.predicted[t + 1]
        pulled, belief = _back(own, predicted, mean - predicted_mean, belief, gain, noise)
        mean = own_mean + pulled
        means.append(mean)
        beliefs.append(belief)
    return HeadPath(jnp.stack(means[::-1]), tuple(beliefs[::-1]))


@jax.jit
def _back(own: Any, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array) -> tuple[Array, Any]:
    return _smoother_step(own, predicted, shift, after, gain, noise)


@singledispatch
def _smoother_step(own: Any, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array) -> tuple[Array, Any]:
    """``G shift`` with ``G = S A S_pred^-1``, and ``(I - G A) S (I - G A)^T + G (S_after + Q) G^T``."""
    raise ValueError(
        f"{type(own).__name__} is not smoothed; Full(), SquareRoot(), Shared() and DiagonalHead() are accepted"
    )


def _matrices(own: Array, predicted: Array, after: Array, gain: Array, noise: Array) -> tuple[Array, Array]:
    pull = jax.scipy.linalg.solve(predicted, gain[:, None] * own, assume_a="pos").T
    left = jnp.eye(len(own), dtype=own.dtype) - pull * gain
    return pull, left @ own @ left.T + pull @ (after + jnp.diag(noise)) @ pull.T


@_smoother_step.register
def _(own: FullCovariance, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array) -> tuple[Array, Any]:
    gain, noise = (jnp.tile(part, own.num_outputs) for part in (gain, noise))
    pull, covariance = _matrices(own.matrix, predicted.matrix, after.matrix, gain, noise)
    return (pull @ shift.ravel()).reshape(shift.shape), replace(own, matrix=covariance)


@_smoother_step.register
def _(
    own: SquareRootInformation, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array
) -> tuple[Array, Any]:
    return own.smoothed(shift, after, gain, noise)


@_smoother_step.register
def _(own: SharedCovariance, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array) -> tuple[Array, Any]:
    pull, covariance = _matrices(own.covariance, predicted.covariance, after.covariance, gain, noise)
    return shift @ pull.T, replace(own, covariance=covariance, precision=jnp.linalg.inv(covariance))


@_smoother_step.register
def _(
    own: DiagonalInformation, predicted: Any, shift: Array, after: Any, gain: Array, noise: Array
) -> tuple[Array, Any]:
    pull = gain * predicted.precision / own.precision
    variance = jnp.square(1 - pull * gain) / own.precision + jnp.square(pull) * (1 / after.precision + noise)
    return pull * shift, DiagonalInformation(1 / variance)
