"""Stabilised forgetting: the kernel of a window that slides over the examples, without task boundaries.

    lambda_- = (1 - rho) lambda + rho lambda_p,   m_- = [(1 - rho) lambda m + rho lambda_p m_p] / lambda_-

with lambda = 1 / sigma^2 and rho the share of the window that a batch takes. It is the Gaussian proportional to
q^{1-rho} p^rho, p the prior. Beside the kernels of a program, whose moments are fixed, its step depends on the belief,

    theta_t | theta_{t-1} ~ N(A theta_{t-1} + b, Q),   A = (1-rho) v_- / v,   b = rho v_- m_p / v_p,   Q = v_- (1 - (1-rho) A)

so that the smoother's gain is the constant v A / v_- = 1 - rho. Source: Kulhavy and Zarrop 1993, "On a general concept of
forgetting"; Bonnet et al., arXiv 2504.13569, where the window counts batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from ssm_nn.moments import Moments

__all__ = ["Gaussian", "Window", "forget", "forgetting_moments"]

Array = Any


class Gaussian(NamedTuple):
    """Independent normals: ``mean`` and standard deviation ``sigma`` of each weight, arrays of one shape."""

    mean: Array
    sigma: Array


@dataclass(frozen=True)
class Window:
    """Forgetting at the rate rho = B / examples for a batch of B: what is older than the window fades into the prior.

    Args:
        examples: length of the window, > 0, counted in examples, whatever the batch size; inf forgets nothing.
    """

    examples: float

    def __post_init__(self):
        if not self.examples > 0:
            raise ValueError(f"the window is {self.examples} examples; a number > 0 is accepted, inf for no forgetting")

    def check_batch(self, size: int) -> None:
        """Raise ValueError for a batch that the window does not hold."""
        if size > self.examples:
            raise ValueError(
                f"the window is {self.examples:g} examples, shorter than a batch of {size}; the batch size or more is accepted"
            )

    def rate(self, count: Array) -> Array:
        """rho of a batch of ``count`` examples."""
        return count / self.examples


def forget(belief: Gaussian, prior: Gaussian, rho: Array) -> Gaussian:
    """``q^{1-rho} p^rho``, normalised; the identity at rho = 0, the prior at rho = 1, to the last bit where q is p."""
    if isinstance(rho, float) and rho == 0:
        return belief
    # v_- = v / (1 + rho (v / v_p - 1)): nothing cancels, and rho small against 1 keeps its digits
    ratio = jnp.square(belief.sigma / prior.sigma)
    shrink = 1 / (1 + rho * (ratio - 1))
    return Gaussian(
        belief.mean + rho * ratio * shrink * (prior.mean - belief.mean),
        belief.sigma * jnp.sqrt(shrink),
    )


def forgetting_moments(belief: Gaussian, prior: Gaussian, rho: Array) -> Moments:
    """A, b, Q of the step from ``belief``, as a linear-Gaussian kernel."""
    after = forget(belief, prior, rho)
    variance = jnp.square(after.sigma)
    gain = (1 - rho) * jnp.square(after.sigma / belief.sigma)
    # Q = v_- (1 - (1-rho)^2 v_- / v), of which 1 - (1-rho) v_- / v is rho v_- / v_p
    noise = variance * rho * (jnp.square(after.sigma / prior.sigma) + gain)
    return Moments(gain, rho * jnp.square(after.sigma / prior.sigma) * prior.mean, noise)
