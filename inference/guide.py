"""The smoother's posterior as a NumPyro guide, and as a distribution over whole trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ssm_nn.inference.draws import leaves_of_path
from ssm_nn.inference.smoothing import Smoothed

__all__ = ["PathPosterior", "guide_of"]

Array = Any


class PathPosterior(dist.Distribution):
    """The smoother's distribution of all weights of all tasks, event shape (T, P), drawn by backward sampling.

    Exact under the filter's beliefs: ``theta_T ~ N(m_T, Lambda_T^-1)``, then ``theta_t | theta_{t+1}`` backwards.

    Args:
        smoothed: what ``LaplaceFilter.smooth`` returned.
    """

    def __init__(self, smoothed: Smoothed, *, validate_args: bool | None = None):
        self.smoothed = smoothed
        super().__init__((), (len(smoothed), smoothed.layout.size), validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(constraints.real, 2)

    def sample(self, key, sample_shape=()):
        assert key is not None
        if sample_shape == ():
            return self.smoothed.sample_path(key)
        count = 1
        for length in sample_shape:
            count *= length
        paths = jax.lax.map(self.smoothed.sample_path, jax.random.split(key, count))
        return paths.reshape((*sample_shape, *self.event_shape))

    def log_prob(self, value):
        lead = value.shape[:-2]
        flat = value.reshape((-1, *self.event_shape))
        return jax.vmap(self.smoothed.log_density)(flat).reshape(lead)

    @property
    def mean(self):
        return jnp.stack(self.smoothed.means)

    @property
    def variance(self):
        return jnp.stack([belief.precision.variance() for belief in self.smoothed.beliefs])


def guide_of(smoothed: Smoothed) -> Callable[..., dict[str, Array]]:
    """A guide for ``numpyro.infer.Predictive(program, guide=..., params={})`` and for importance weights.

    It draws a whole trajectory, and gives every site of the program outside its loop over tasks its part of it; the
    hyper-parameters stay at the engine's values. Its arguments, those of the program, are not read.
    """
    path = PathPosterior(smoothed)

    def guide(*tasks: Any) -> dict[str, Array]:
        del tasks
        drawn = numpyro.sample("_weights_path", path, infer={"is_auxiliary": True})
        values = {}
        for name, value in smoothed.hypers.items():
            values[name] = numpyro.sample(name, dist.Delta(value, event_dim=jnp.ndim(value)))
        for name, leaf in leaves_of_path(smoothed.layout, drawn).items():
            values[name] = numpyro.sample(name, dist.Delta(leaf, event_dim=leaf.ndim))
        return values

    return guide
