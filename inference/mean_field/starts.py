"""Where a mean field starts: the belief before the first batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.checks import check_finite, check_positive
from ssm_nn.inference.mean_field.forgetting import Gaussian
from ssm_nn.inference.mean_field.gradients import layers_of
from ssm_nn.layers import TiedWeightsError
from ssm_nn.tasks import Task

__all__ = ["AtPrior", "FanIn", "OwnWeights", "Start"]

Array = Any


class Start(Protocol):
    """Makes the first belief; hashable, and fit for ``jit``."""

    def belief(self, space: StateSpace, task: Task, key: Array) -> Gaussian:
        """Mean and sigma (P,)."""
        ...


@dataclass(frozen=True)
class AtPrior:
    """The program's prior: Bayes' rule from the first batch on. For models that are linear in their weights: the zero mean of
    a network's prior is a saddle, and its variances drown the data."""

    def belief(self, space: StateSpace, task: Task, key: Array) -> Gaussian:
        """See ``Start``."""
        del task, key
        return Gaussian(space.prior_mean, jnp.sqrt(space.prior_variance))


@dataclass(frozen=True)
class OwnWeights:
    """The network's own initial weights, each with the same standard deviation.

    Args:
        sigma: standard deviation, > 0.
    """

    sigma: float

    def __post_init__(self):
        check_positive(sigma=self.sigma)

    def belief(self, space: StateSpace, task: Task, key: Array) -> Gaussian:
        """See ``Start``."""
        del task, key
        return Gaussian(space.initial, jnp.full_like(space.initial, self.sigma))


@dataclass(frozen=True)
class FanIn:
    """By the number I of a layer's inputs: mu ~ U(-reach / sqrt(I), reach / sqrt(I)), sigma = spread / sqrt(I).

    Biases, and leaves that belong to no layer, start at the network's own weights, with the sigma of their layer or the
    smallest of any. The defaults are those published for MESU on images.

    Args:
        reach: >= 0; 0 starts all layers at 0.
        spread: > 0.
    """

    reach: float = 4.0
    spread: float = 2.0

    def __post_init__(self):
        check_finite(0.0, reach=self.reach)
        check_positive(spread=self.spread)

    def belief(self, space: StateSpace, task: Task, key: Array) -> Gaussian:
        """See ``Start``."""
        arrays = space.layout.arrays(space.initial)
        try:
            layers = layers_of(space, arrays, with_mask(task))
        except TiedWeightsError as error:
            raise ValueError(f"start is FanIn, but {error.fact}; OwnWeights(sigma) is accepted") from None
        if not layers:
            raise ValueError("start is FanIn, but no layer was found in the network; OwnWeights(sigma) is accepted")
        inputs = {name: layer.num_inputs for layer in layers for name in (layer.kernel, layer.bias) if name}
        kernels, most = {layer.kernel for layer in layers}, max(inputs.values())
        mean = {network: dict(leaves) for network, leaves in arrays.items()}
        sigma = {network: dict(leaves) for network, leaves in arrays.items()}
        for number, site in enumerate(space.layout.sites):
            name = (site.network, site.path)
            root = math.sqrt(inputs.get(name, most))
            leaf = arrays[site.network][site.path]
            if name in kernels:
                limit = self.reach / root
                draw = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -limit, limit)
                mean[site.network][site.path] = draw
            sigma[site.network][site.path] = jnp.full_like(leaf, self.spread / root)
        return Gaussian(space.layout.packed(mean), space.layout.packed(sigma, 1.0))
