"""Predictions of a linear head: from the Gaussian of its outputs, f_n ~ N(m phi_n, V_n), to the label.

``Probit``       p = softmax(f_k / sqrt(1 + pi/8 v_k)) (MacKay 1992; Gibbs 1997), exact for Gaussian labels
``MeanField``    p_k ~ 1 / sum_j exp(-(f_k - f_j) / sqrt(1 + pi/8 var(f_k - f_j))) (Lu, Ie, Sha 2020, arXiv 2006.07584)
``MonteCarlo``   the mean over draws of all K outputs together, each point's own V_n (K, K)
``AtMode``       at the mean weights, without their uncertainty

No array is larger than (points, K, K) or (draws, points, K) of one batch of points; results lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian, HeadLikelihood
from ssm_nn.inference.last_layer.sites import padded, padded_size
from ssm_nn.inference.last_layer.structures import HeadBelief
from ssm_nn.inference.predictive import Prediction, _mixture_of_site
from ssm_nn.weight_mesh import on_every_device

__all__ = ["AtMode", "MeanField", "MonteCarlo", "PredictiveMethod", "Probit", "predict_head", "sample_outputs"]

Array = Any

_NUMBERS = 2**24  # of the largest array of one batch: 128 MiB in float64
_BATCH = 4096
_NODES = 32  # of the Gauss-Hermite rule for one output: exact for polynomials of degree 63


@dataclass(frozen=True)
class Probit:
    """The probit approximation for classes; for counts, Gauss and Hermite's rule over the log rate."""

    def numbers(self, num_outputs: int) -> int:
        """Of one point."""
        return num_outputs * _NODES if num_outputs == 1 else num_outputs


@dataclass(frozen=True)
class MeanField:
    """The mean-field approximation for classes, which counts the covariance of each pair of logits."""

    def numbers(self, num_outputs: int) -> int:
        """Of one point."""
        return num_outputs**2


@dataclass(frozen=True)
class MonteCarlo:
    """Draws of a point's outputs; the same noise for all points.

    Args:
        num_samples: S >= 1.
    """

    num_samples: int = 100

    def __post_init__(self):
        check_count(num_samples=self.num_samples)

    def numbers(self, num_outputs: int) -> int:
        """Of one point."""
        return max(self.num_samples * num_outputs, num_outputs**2)


@dataclass(frozen=True)
class AtMode:
    """The likelihood at the mean weights."""

    def numbers(self, num_outputs: int) -> int:
        """Of one point."""
        return num_outputs


PredictiveMethod = Probit | MeanField | MonteCarlo | AtMode


def predict_head(
    belief: HeadBelief,
    mean: Array,
    features: np.ndarray,
    likelihood: HeadLikelihood,
    labels: np.ndarray | None,
    method: PredictiveMethod,
    key: Array | int = 0,
) -> Prediction:
    """The predictive distribution of n points, batch by batch, on the host.

    Args:
        features: (n, D), whitened.
        labels: to be scored, or None.
        method: how the expectation over the weights is taken; MeanField is for classes.
        key: of ``MonteCarlo``; a whole number is taken as a seed.
    """
    if not isinstance(method, PredictiveMethod):
        raise ValueError(
            f"method is {method!r}; Probit(), MeanField(), MonteCarlo(num_samples) and AtMode() are accepted"
        )
    if isinstance(method, MeanField) and not isinstance(likelihood, Categorical):
        raise ValueError(
            "method is MeanField(), which is for a Categorical likelihood; Probit() is accepted for others"
        )
    if not len(features):
        raise ValueError("x holds no point to predict")
    key = jax.random.key(key) if isinstance(key, int) else key
    size = min(_batch_size(method, likelihood.num_outputs), padded_size(len(features)))
    parts = []
    for start in range(0, len(features), size):
        phi = features[start : start + size]
        y = None if labels is None else padded(labels[start : start + size], size)
        made = _predict(method, likelihood, belief, mean, padded(phi, size), y, key)
        parts.append({name: None if value is None else np.asarray(value)[: len(phi)] for name, value in made.items()})
    joined: dict[str, Any] = {
        name: None if parts[0][name] is None else np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    return Prediction(**joined)


def sample_outputs(
    belief: HeadBelief, mean: Array, features: np.ndarray, num_samples: int, key: Array | int = 0
) -> np.ndarray:
    """Draws (S, n, K) of the outputs of all points together: each from one draw of the weights; on the host."""
    check_count(num_samples=num_samples)
    key = jax.random.key(key) if isinstance(key, int) else key
    size = int(np.prod(mean.shape))
    chunk = max(_NUMBERS // size, 1)
    drawn = []
    for start in range(0, num_samples, chunk):
        key, own = jax.random.split(key)
        drawn.append(np.asarray(_outputs(belief, mean, jnp.asarray(features), own, min(chunk, num_samples - start))))
    return np.concatenate(drawn)


@partial(jax.jit, static_argnums=4)
def _outputs(belief: HeadBelief, mean: Array, phi: Array, key: Array, num_samples: int) -> Array:
    weights = mean + belief.draw(key, num_samples)
    return jnp.einsum("nd,skd->snk", phi, weights)


def _batch_size(method: PredictiveMethod, num_outputs: int) -> int:
    most = max(_NUMBERS // method.numbers(num_outputs), 1)
    return min(1 << (most.bit_length() - 1), _BATCH)


@partial(jax.jit, static_argnums=0)
def _predict(method: PredictiveMethod, *arguments: Any) -> dict[str, Any]:
    return on_every_device(_predicted(method, *arguments))


def _predicted(
    method: PredictiveMethod,
    likelihood: HeadLikelihood,
    belief: HeadBelief,
    mean: Array,
    phi: Array,
    y: Any,
    key: Array,
) -> dict[str, Any]:
    f = phi @ mean.T
    if isinstance(method, AtMode):
        return _mixture(likelihood, f[None], y)
    if isinstance(method, MonteCarlo):
        root = _root(belief.output_covariance(phi))
        noise = jax.random.normal(key, (method.num_samples, f.shape[1]), f.dtype)
        return _mixture(likelihood, f + jnp.einsum("nkl,sl->snk", root, noise), y)
    if isinstance(method, MeanField):
        return _of_classes(_mean_field(f, belief.output_covariance(phi)), y)
    variance = belief.output_variance(phi)
    if isinstance(likelihood, Categorical):
        return _of_classes(jax.nn.softmax(f * _shrink(variance)), y)
    if isinstance(likelihood, Bernoulli):
        positive = jax.nn.sigmoid((f * _shrink(variance))[:, 0])
        return _of_classes(jnp.stack([1 - positive, positive], axis=1), y)
    if isinstance(likelihood, Gaussian):
        total = variance + jnp.square(jnp.asarray(likelihood.noise_scale, f.dtype))
        normal = (
            None if y is None else jnp.sum(-0.5 * (jnp.square(y - f) / total + jnp.log(2 * jnp.pi * total)), axis=1)
        )
        return _summary(mean=f, variance=total, log_density=normal)
    return _by_quadrature(likelihood, f, variance, y)


def _shrink(variance: Array) -> Array:
    return 1 / jnp.sqrt(1 + jnp.pi / 8 * variance)


def _root(covariance: Array) -> Array:
    """``V = R R^T`` of (n, K, K), also where V is singular to rounding."""
    values, vectors = jnp.linalg.eigh(covariance)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]


def _mean_field(f: Array, covariance: Array) -> Array:
    own = jnp.diagonal(covariance, axis1=1, axis2=2)
    between = own[:, :, None] + own[:, None, :] - 2 * covariance
    apart = (f[:, :, None] - f[:, None, :]) * _shrink(jnp.maximum(between, 0))
    # 1 / sum_j exp(-apart), then normalised; in logarithms, so that logits of any size stay finite
    return jax.nn.softmax(-jax.nn.logsumexp(-apart, axis=2), axis=1)


def _summary(**known: Any) -> dict[str, Any]:
    return dict.fromkeys(Prediction._fields) | known


def _of_classes(p: Array, y: Any) -> dict[str, Any]:
    numbers = jnp.arange(p.shape[1])
    mean = p @ numbers.astype(p.dtype)
    scored = None if y is None else jnp.log(jnp.take_along_axis(p, y[:, None].astype(jnp.int32), axis=1))[:, 0]
    variance = jnp.sum(p * jnp.square(numbers - mean[:, None]), axis=1)
    return _summary(mean=mean, variance=variance, probabilities=p, log_density=scored)


def _mixture(likelihood: HeadLikelihood, outputs: Array, y: Any) -> dict[str, Any]:
    """The mixture over draws of the outputs (S, n, K), as ``ssm_nn.inference.predict`` makes it."""
    rebuild: Callable[[Array], Any] = lambda eta: likelihood.distribution(eta, None)  # noqa: E731

    def one(f, y):  # (S, K)
        return _mixture_of_site(rebuild, f[:, None, :], None if y is None else y[None])

    if y is None:
        return jax.vmap(lambda f: one(f, None), in_axes=1)(outputs)
    return jax.vmap(one, in_axes=(1, 0))(outputs, y)


def _by_quadrature(likelihood: HeadLikelihood, f: Array, variance: Array, y: Any) -> dict[str, Any]:
    """One output: nodes and weights of Gauss and Hermite for N(f, v)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    log_weights = jnp.log(jnp.asarray(weights / weights.sum(), f.dtype))[:, None]
    at = f[:, 0] + jnp.sqrt(variance[:, 0]) * jnp.asarray(nodes, f.dtype)[:, None]
    distribution: Any = likelihood.distribution(at[..., None], None)
    means, variances = distribution.mean, distribution.variance
    mean = jnp.sum(jnp.exp(log_weights) * means, axis=0)
    spread = jnp.sum(jnp.exp(log_weights) * (variances + jnp.square(means - mean)), axis=0)
    scored = None if y is None else jax.nn.logsumexp(distribution.log_prob(y) + log_weights, axis=0)
    return _summary(mean=mean, variance=spread, log_density=scored)
