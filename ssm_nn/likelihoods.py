"""Observed distributions seen from the network: canonical outputs, and a factor of the Fisher information in them.

For each likelihood, ``outputs`` are parameters eta (batch..., K) that may take any real value, ``rebuild`` makes the
distribution at other outputs, and ``factor`` is L (batch..., K, C) with

    L L^T = E_{y | eta} [ -d^2 log p(y | eta) / d eta^2 ],

finite for any eta. For exponential families in natural parameters this is the Hessian itself, so that J^T L L^T J is the
generalised Gauss-Newton matrix (Martens 2020, "New insights and perspectives on the natural gradient method").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

__all__ = ["Likelihood", "likelihood_of"]

Array = Any


class Likelihood(NamedTuple):
    """One observed distribution as a function of its outputs.

    Attributes:
        outputs: (batch..., K), differentiable in the weights.
        rebuild: from outputs of that shape to the distribution.
        factor: from the observed value to L (batch..., K, C); only the fallback reads the value.
        exact: whether L L^T is the exact Fisher information; if not, it is the output Hessian at the observed value
            with its negative eigenvalues set to zero.
    """

    outputs: Array
    rebuild: Callable[[Array], dist.Distribution]
    factor: Callable[[Array], Array]
    exact: bool = True


def likelihood_of(distribution: dist.Distribution) -> Likelihood:
    """The likelihood of any NumPyro distribution; wrappers (expanded, to_event, masked) are looked through."""
    if isinstance(distribution, dist.MaskedDistribution):
        return _masked(distribution)
    if isinstance(distribution, dist.Independent):
        inner, rank = likelihood_of(distribution.base_dist), distribution.reinterpreted_batch_ndims
        return inner._replace(rebuild=lambda eta: inner.rebuild(eta).to_event(rank))
    if isinstance(distribution, dist.ExpandedDistribution):
        return _expanded(distribution)
    for kind, make in _KNOWN.items():
        if type(distribution) is kind:
            return make(distribution)
    return _by_hessian(distribution)


def _masked(distribution: dist.MaskedDistribution) -> Likelihood:
    inner = likelihood_of(distribution.base_dist)
    if not inner.exact:
        return _by_hessian(distribution)
    mask = jnp.broadcast_to(distribution._mask, distribution.batch_shape)

    def factor(value: Array) -> Array:
        whole = inner.factor(value)
        return jnp.where(mask.reshape(mask.shape + (1,) * (whole.ndim - mask.ndim)), whole, 0.0)

    return inner._replace(factor=factor)


def _expanded(distribution: dist.ExpandedDistribution) -> Likelihood:
    base = distribution.base_dist
    inner = likelihood_of(base)
    if not inner.exact:
        return _by_hessian(distribution)
    lead, rank = distribution.batch_shape, len(base.batch_shape)

    def wide(array: Array) -> Array:
        trailing = array.shape[rank:]
        return jnp.broadcast_to(array.reshape((1,) * (len(lead) - rank) + array.shape), (*lead, *trailing))

    def at_value(value: Array) -> Array:
        del value  # an exact factor does not read it
        return wide(inner.factor(jnp.zeros(base.shape())))

    # rebuilt at full shape, so that outputs may differ along the expanded axes
    return inner._replace(outputs=wide(inner.outputs), factor=at_value)


def _softmax_factor(logits: Array, scale: Array | float = 1.0) -> Array:
    """diag(sqrt p) - p sqrt(p)^T, whose square is diag(p) - p p^T (the rows sum to one: p^T 1 = 1)."""
    p = jax.nn.softmax(logits, axis=-1)
    root = jnp.sqrt(p)
    factor = jnp.eye(p.shape[-1], dtype=p.dtype) * root[..., None] - p[..., :, None] * root[..., None, :]
    return factor * jnp.sqrt(jnp.asarray(scale, p.dtype))[..., None, None]


def _diagonal_factor(roots: Array) -> Array:
    """diag(roots) over the last axis."""
    return roots[..., None] * jnp.eye(roots.shape[-1], dtype=roots.dtype)


def _column(value: Array, like: dist.Distribution) -> Array:
    return jnp.broadcast_to(jnp.asarray(value, float), like.batch_shape)[..., None]


def _normal(d: dist.Normal) -> Likelihood:
    outputs = jnp.concatenate([_column(d.loc, d), jnp.log(_column(d.scale, d))], axis=-1)

    def factor(_: Array) -> Array:
        return _diagonal_factor(
            jnp.concatenate([jnp.exp(-outputs[..., 1:]), jnp.full_like(outputs[..., 1:], jnp.sqrt(2.0))], -1)
        )

    return Likelihood(outputs, lambda eta: dist.Normal(eta[..., 0], jnp.exp(eta[..., 1])), factor)


def _student_t(d: dist.StudentT) -> Likelihood:
    # Fisher information of location and log scale (Lange, Little, Taylor 1989); the degrees of freedom count as known
    outputs = jnp.concatenate([_column(d.loc, d), jnp.log(_column(d.scale, d))], axis=-1)
    df = _column(d.df, d)

    def factor(_: Array) -> Array:
        location = jnp.sqrt((df + 1) / (df + 3)) * jnp.exp(-outputs[..., 1:])
        return _diagonal_factor(jnp.concatenate([location, jnp.sqrt(2 * df / (df + 3))], -1))

    return Likelihood(outputs, lambda eta: dist.StudentT(df[..., 0], eta[..., 0], jnp.exp(eta[..., 1])), factor)


def _bernoulli(d: Any) -> Likelihood:
    outputs = _column(d.logits, d)

    def factor(_: Array) -> Array:
        # sqrt(p (1 - p)) = exp(-|eta| / 2) / (1 + exp(-|eta|)): no cancellation at large logits
        small = jnp.exp(-jnp.abs(outputs) / 2)
        return (small / (1 + small**2))[..., None]

    return Likelihood(outputs, lambda eta: dist.BernoulliLogits(eta[..., 0]), factor)


def _binomial(d: Any) -> Likelihood:
    single = _bernoulli(d)
    total = jnp.broadcast_to(d.total_count, d.batch_shape)

    def factor(value: Array) -> Array:
        return single.factor(value) * jnp.sqrt(jnp.asarray(total, single.outputs.dtype))[..., None, None]

    return Likelihood(single.outputs, lambda eta: dist.BinomialLogits(eta[..., 0], total), factor)


def _categorical(d: Any) -> Likelihood:
    return Likelihood(d.logits, dist.CategoricalLogits, lambda _: _softmax_factor(d.logits))


def _multinomial(d: Any) -> Likelihood:
    total = jnp.broadcast_to(d.total_count, d.batch_shape)
    return Likelihood(
        d.logits,
        lambda eta: dist.MultinomialLogits(eta, total, total_count_max=d.total_count_max),
        lambda _: _softmax_factor(d.logits, total),
    )


def _poisson(d: dist.Poisson) -> Likelihood:
    outputs = jnp.log(_column(d.rate, d))
    return Likelihood(
        outputs, lambda eta: dist.Poisson(jnp.exp(eta[..., 0])), lambda _: jnp.exp(outputs / 2)[..., None]
    )


_KNOWN: dict[type, Callable[[Any], Likelihood]] = {
    dist.Normal: _normal,
    dist.StudentT: _student_t,
    dist.BernoulliLogits: _bernoulli,
    dist.BernoulliProbs: _bernoulli,
    dist.BinomialLogits: _binomial,
    dist.BinomialProbs: _binomial,
    dist.CategoricalLogits: _categorical,
    dist.CategoricalProbs: _categorical,
    dist.MultinomialLogits: _multinomial,
    dist.MultinomialProbs: _multinomial,
    dist.Poisson: _poisson,
}


def _by_hessian(d: dist.Distribution) -> Likelihood:
    """Any other distribution: all its floating-point parameters together, one output vector for the whole batch."""
    leaves, treedef = jax.tree.flatten(d)
    real = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if not real:
        raise ValueError(f"the likelihood {type(d).__name__} has no floating-point parameter that a network could give")
    flat, unravel = ravel_pytree([jnp.asarray(leaves[i]) for i in real])

    def rebuild(eta: Array) -> dist.Distribution:
        filled = list(leaves)
        for i, leaf in zip(real, unravel(eta), strict=True):
            filled[i] = leaf
        return jax.tree.unflatten(treedef, filled)

    def factor(value: Array) -> Array:
        hessian = jax.hessian(lambda eta: -jnp.sum(rebuild(eta).log_prob(value)))(flat)
        scales, directions = jnp.linalg.eigh(hessian)
        return directions * jnp.sqrt(jnp.maximum(scales, 0))

    return Likelihood(flat, rebuild, factor, exact=False)
