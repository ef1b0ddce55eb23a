"""Update rules: what a batch's expected gradient and curvature make of a mean-field belief.

With g = dC/dmu = E[grad], H = E[Hessian's diagonal] = (dC/dsigma) / sigma, C the expected negative log likelihood of the
batch (the sum over its examples), and a belief (m_-, v_-) that the window has let forget,

    first order   mu = mu - sigma^2 g + rho sigma^2 (mu_p - mu) / sigma_p^2
                  sigma = sigma - sigma^3 H / 2 + rho sigma (sigma_p^2 - sigma^2) / (2 sigma_p^2)     MESU as published
    fixed point   h = v_- H / 2;  mu = m_- - v_- g;  sigma = sqrt(v_-) exp(-asinh h)                  BGD at rho = 0
    natural       lambda = lambda_- + H;  mu = m_- - g / lambda                                       VON, online Newton
    IVON          lambda = lambda_- + H + (rho (lambda - lambda_p) - H)^2 / (2 lambda)
                  mu = mu - (g + rho lambda_p (mu - mu_p)) / lambda

They agree to first order in v g, v H and rho. Each is one elementwise function of arrays, and keeps within a trust region
|mu - m_-| <= c sqrt(v_-), |sigma - sqrt(v_-)| <= c sqrt(v_-) / 2: without one, batches of more than one example can throw
sigma to zero or to infinity. Sources: Bonnet et al., arXiv 2504.13569; Zeno et al., arXiv 1803.10123; Khan et al. 2018,
arXiv 1806.04854; Shen et al. 2024, arXiv 2402.17641.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from ssm_nn.inference.mean_field.forgetting import Gaussian, forget

__all__ = ["FirstOrder", "FixedPoint", "Ivon", "Natural", "Step", "UpdateRule", "sigma_factor"]

Array = Any


class Step(NamedTuple):
    """The new belief of one leaf, and where the trust region cut the step of its mean or its sigma."""

    belief: Gaussian
    clipped: Array


class UpdateRule(Protocol):
    """One form of the update; all methods act element by element."""

    def predict(self, belief: Gaussian, prior: Gaussian, rho: Array) -> Gaussian:
        """The belief under which the gradients of the next batch are taken."""
        ...

    def update(
        self, predicted: Gaussian, prior: Gaussian, rho: Array, gradient: Array, curvature: Array, trust: float
    ) -> Step:
        """The belief after the batch, from what ``predict`` gave, g and H."""
        ...


@dataclass(frozen=True)
class FirstOrder:
    """The published rule: old values on the right, the forgetting added to first order.

    Sigma turns negative where v H >= 2, which a trust region below 2 rules out.
    """

    def predict(self, belief: Gaussian, prior: Gaussian, rho: Array) -> Gaussian:
        """The belief as it is."""
        del prior, rho
        return belief

    def update(
        self, predicted: Gaussian, prior: Gaussian, rho: Array, gradient: Array, curvature: Array, trust: float
    ) -> Step:
        """See the module."""
        mean, sigma = predicted
        variance = jnp.square(sigma)
        shift, factor, clipped = _trusted(sigma, -variance * gradient, 1 - variance * curvature / 2, trust)
        pull = rho * jnp.square(sigma / prior.sigma)
        return Step(
            Gaussian(mean + shift + pull * (prior.mean - mean), sigma * (factor + (rho - pull) / 2)),
            clipped,
        )


class _Forgets:
    def predict(self, belief: Gaussian, prior: Gaussian, rho: Array) -> Gaussian:
        """Stabilised forgetting."""
        return forget(belief, prior, rho)


@dataclass(frozen=True)
class FixedPoint(_Forgets):
    """The stationary point of the free energy in sigma, the gradient held fixed: sigma is positive at any H, and log sigma
    does not drift under a curvature that is noise about 0. With an infinite window it is BGD, which is FOO-VB (arXiv
    2010.00373) with a diagonal covariance."""

    def update(
        self, predicted: Gaussian, prior: Gaussian, rho: Array, gradient: Array, curvature: Array, trust: float
    ) -> Step:
        """See the module."""
        del prior, rho
        mean, sigma = predicted
        variance = jnp.square(sigma)
        shift, factor, clipped = _trusted(sigma, -variance * gradient, sigma_factor(variance * curvature / 2), trust)
        return Step(Gaussian(mean + shift, sigma * factor), clipped)


@dataclass(frozen=True)
class Natural(_Forgets):
    """Precisions add, and the mean takes a step by the new one: a Newton step with the expected Hessian.

    The precision turns negative where v_- H <= -1, which a trust region rules out at any size below infinity."""

    def update(
        self, predicted: Gaussian, prior: Gaussian, rho: Array, gradient: Array, curvature: Array, trust: float
    ) -> Step:
        """See the module."""
        del prior, rho
        return _newton(predicted, gradient, jnp.square(predicted.sigma) * curvature, trust)


@dataclass(frozen=True)
class Ivon:
    """IVON without momentum: effective sample size = the window, beta2 = 1 - rho, learning rate rho, weight decay
    lambda_p / window. Its squared term keeps every precision positive."""

    def predict(self, belief: Gaussian, prior: Gaussian, rho: Array) -> Gaussian:
        """The belief as it is."""
        del prior, rho
        return belief

    def update(
        self, predicted: Gaussian, prior: Gaussian, rho: Array, gradient: Array, curvature: Array, trust: float
    ) -> Step:
        """See the module."""
        mean, sigma = predicted
        variance = jnp.square(sigma)
        ratio = jnp.square(sigma / prior.sigma)  # lambda_p / lambda
        change = variance * curvature - rho * (1 - ratio)  # relative, of the precision
        pull = rho / jnp.square(prior.sigma) * (mean - prior.mean)
        return _newton(predicted, gradient + pull, change + jnp.square(change) / 2, trust)


def sigma_factor(h: Array) -> Array:
    """``exp(-asinh h) = sqrt(1 + h^2) - h``, in the form that does not cancel."""
    root = jnp.abs(h) + jnp.sqrt(1 + jnp.square(h))
    return jnp.where(h > 0, 1 / root, root)


def _newton(belief: Gaussian, gradient: Array, change: Array, trust: float) -> Step:
    """lambda (1 + change), and a step of the mean by it."""
    mean, sigma = belief
    raw = 1 + change
    lowest, highest = (1 + trust / 2) ** -2, (1 - trust / 2) ** -2 if trust < 2 else jnp.inf
    kept = raw if trust == jnp.inf else jnp.clip(raw, lowest, highest)
    variance = jnp.square(sigma) / kept
    wanted = -variance * gradient
    shift = _cut(wanted, trust * sigma, trust)
    return Step(Gaussian(mean + shift, jnp.sqrt(variance)), (kept != raw) | (shift != wanted))


def _trusted(sigma: Array, shift: Array, factor: Array, trust: float) -> tuple[Array, Array, Array]:
    """Shift of the mean and factor of sigma within the trust region, and where they were cut."""
    kept_shift = _cut(shift, trust * sigma, trust)
    kept_factor = factor if trust == jnp.inf else jnp.clip(factor, 1 - trust / 2, 1 + trust / 2)
    return kept_shift, kept_factor, (kept_shift != shift) | (kept_factor != factor)


def _cut(shift: Array, limit: Array, trust: float) -> Array:
    return shift if trust == jnp.inf else jnp.clip(shift, -limit, limit)
