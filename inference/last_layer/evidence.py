"""Prior precision and noise of a head, by the evidence of the points that it has seen.

Gaussian outputs, closed form: with lambda_i the eigenvalues of phi phi^T and y~ = Q^T (y - m phi) in its eigenvectors,

    log p(y | c, s) = -1/2 sum_i [ K log(2 pi s^2 (1 + rho lambda_i)) + |y~_i|^2 / (s^2 (1 + rho lambda_i)) ],   rho = c^2 / s^2

whose best noise for a given rho is s^2 = mean_i |y~_i|^2 / (1 + rho lambda_i) / K; one number is left to search.

Other likelihoods: MacKay's fixed point c^2 = |V - m|^2 / (K D - tr S), the mode found anew each time; from there a search along
log c on Laplace's evidence itself, whose curvature moves with c too. Here c multiplies the prior's standard deviations.
Source: MacKay 1992, "Bayesian interpolation".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from ssm_nn.inference.last_layer.head_likelihoods import Gaussian
from ssm_nn.inference.last_layer.last_layer_filter import HeadState, LastLayerFilter

__all__ = ["TunedHead", "tune_head"]

_RANGE = 30.0  # of log rho, either side: 13 decimal orders of the signal-to-noise ratio
_STEPS = 100
_SMALL = 1e-2  # change of log c^2 at which the fixed point hands over to the search
_WIDTH = (
    3.0  # of the search along log c, either side; the fixed point is off by a factor of two at most in what was tried
)


class TunedHead(NamedTuple):
    """The best prior, and the belief under it.

    Attributes:
        engine, state: with that prior (and noise), swept.
        factor: c, what the prior's standard deviations were multiplied by.
        prior_precision: 1 / scale^2 (D,) after.
        noise_scale: of Gaussian outputs, else None.
        log_evidence: of all points, there.
        steps: of the fixed point; 0 for a closed form.
        converged: whether the evidence has its maximum there; it has none where the features say nothing of the
            labels, and the best scale is 0.
    """

    engine: LastLayerFilter
    state: HeadState
    factor: float
    prior_precision: np.ndarray
    noise_scale: float | None
    log_evidence: float
    steps: int
    converged: bool


def tune_head(engine: LastLayerFilter, state: HeadState) -> TunedHead:
    """The prior scale (and the noise of Gaussian outputs) with the largest evidence, from the points in the sites.

    Raises:
        ValueError: no points, an engine that keeps none, a head that moves.
    """
    if not engine.keep_sites or not state.sites.num_points:
        raise ValueError("the state holds no points; update it first, with an engine that has keep_sites=True")
    if engine.head.moving:
        raise ValueError("the head moves between batches; tune_head is for a head that does not")
    if isinstance(engine.head.likelihood, Gaussian):
        return _closed_form(engine, state)
    return _fixed_point(engine, state)


def _rescaled(engine: LastLayerFilter, state: HeadState, factor: float) -> tuple[LastLayerFilter, HeadState]:
    """The same points and the same weights W under the scale c times the old."""
    other = engine.with_scale(engine.head.scale * factor)
    sites = state.sites._replace(features=(state.sites.features * factor).astype(state.sites.features.dtype))
    return other, state._replace(mean=state.mean / factor, sites=sites)


def _fixed_point(engine: LastLayerFilter, state: HeadState) -> TunedHead:
    total, steps, change = 1.0, 0, np.inf
    state, _ = engine.sweep(state)
    size = engine.head.num_outputs * engine.head.num_features
    while steps < _STEPS and abs(change) > _SMALL and abs(np.log(total)) < _RANGE / 2:
        informed = max(size - float(state.belief.trace()), np.finfo(float).eps * size)
        square = float(np.sum(np.square(np.asarray(state.mean - engine.prior_mean, float))))
        # one step by at most a factor of 100: far from the mode the fixed point may overshoot
        change = float(np.clip(np.log(max(square, np.finfo(float).tiny) / informed), -4.6, 4.6))
        engine, state = _rescaled(engine, state, float(np.exp(change / 2)))
        total *= float(np.exp(change / 2))
        state, _ = engine.sweep(state)
        steps += 1
    converged = abs(change) <= _SMALL

    def at(log_factor: float) -> tuple[LastLayerFilter, HeadState, float]:
        other, moved = _rescaled(engine, state, float(np.exp(log_factor)))
        moved, made = other.sweep(moved)
        return other, moved, made.log_evidence

    found: Any = minimize_scalar(
        lambda point: -at(point)[2], bounds=(-_WIDTH, _WIDTH), method="bounded", options={"xatol": 1e-3}
    )
    other, moved, log_evidence = at(float(found.x))
    converged &= abs(float(found.x)) < 0.99 * _WIDTH
    total *= float(np.exp(found.x))
    return TunedHead(other, moved, total, 1 / np.square(other.head.scale), None, log_evidence, steps, converged)


def _closed_form(engine: LastLayerFilter, state: HeadState) -> TunedHead:
    sites = state.sites
    root = np.sqrt(sites.weights.astype(float))[:, None]  # a point of weight w is w points: as many in the sums below
    phi = sites.features.astype(float) * root
    residual = (sites.labels - sites.features @ np.asarray(engine.prior_mean).T).astype(float) * root
    left, values, _ = np.linalg.svd(phi, full_matrices=False)
    eigenvalues, turned = np.square(values), np.square(left.T @ residual).sum(axis=1)
    outside = max(float(np.square(residual).sum() - turned.sum()), 0.0)
    count = float(sites.weights.sum()) * residual.shape[1]

    def noise_at(log_rho: float) -> float:
        return (outside + float(np.sum(turned / (1 + np.exp(log_rho) * eigenvalues)))) / count

    def loss(log_rho: float) -> float:
        shrunk = np.log1p(np.exp(log_rho) * eigenvalues).sum() * residual.shape[1]
        return 0.5 * (count * (np.log(2 * np.pi * noise_at(log_rho)) + 1) + shrunk)

    grid = np.linspace(-_RANGE, _RANGE, 121)
    best = float(grid[int(np.argmin([loss(point) for point in grid]))])
    width = float(grid[1] - grid[0])
    found: Any = minimize_scalar(loss, bounds=(best - width, best + width), method="bounded", options={"xatol": 1e-10})
    log_rho, evidence = float(found.x), -float(found.fun)
    noise = float(np.sqrt(noise_at(log_rho)))
    factor = float(np.exp(log_rho / 2)) * noise
    likelihood = Gaussian(noise, engine.head.num_outputs)
    noisy = engine.with_head(replace(engine.head, likelihood=likelihood))
    other, moved = _rescaled(noisy, state, factor)
    moved, _ = other.sweep(moved)
    inside = abs(log_rho) < _RANGE
    return TunedHead(other, moved, factor, 1 / np.square(other.head.scale), noise, evidence, 0, inside)
