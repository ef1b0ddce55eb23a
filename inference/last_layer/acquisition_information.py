"""What labels would tell about the weights, in nats.

``BALD``        I(y_n; W) = H[E_W p(y_n | W)] - E_W H[p(y_n | W)], point by point (Houlsby et al. 2011, arXiv 1112.5745)
``BatchBALD``   I(y_1, ..., y_B; W) of a batch together, grown greedily (Kirsch, van Amersfoort, Gal 2019, arXiv 1906.08158)

Expectations are means over draws of the weights, the same for all points. The sum over the labels of a batch is exact while
there are few configurations of them; after that configurations are drawn from their joint distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.acquisition import Pool, Scored, Strategy, check_size, class_probabilities, largest
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["BALD", "BatchBALD", "batch_information", "mutual_information"]

Array = Any

_NUMBERS = 2**24  # of the largest array of one step: 64 MiB in float32


@dataclass(frozen=True)
class BALD(Scored):
    """The mutual information of each label alone and the weights.

    Args:
        num_samples: draws of the weights.
    """

    num_samples: int = 100

    def __post_init__(self):
        check_count(num_samples=self.num_samples)

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """(n,) in nats, >= 0."""
        pool.check_classes()
        found = _information(pool.likelihood, pool.drawn_outputs(self.num_samples, key))
        return np.asarray(found)[: len(pool.candidates)]


@dataclass(frozen=True)
class BatchBALD(Strategy):
    """The mutual information of the labels of a batch together and the weights, grown by the best point each time.

    Args:
        num_samples: draws of the weights, S.
        num_configurations: of the labels chosen so far: all while there are no more than so many, else so many draws.
    """

    num_samples: int = 100
    num_configurations: int = 256

    def __post_init__(self):
        check_count(num_samples=self.num_samples, num_configurations=self.num_configurations)

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """Greedily: each point is the best after those before it."""
        check_size(pool, size)
        pool.check_classes()
        drawing, configuring, ties = jax.random.split(key, 3)
        outputs = pool.drawn_outputs(self.num_samples, drawing)
        p = _probabilities(pool.likelihood, outputs)
        chosen: list[int] = []
        for step in range(size):
            gains = batch_information(p, chosen, jax.random.fold_in(configuring, step), self.num_configurations)
            gains = gains[: len(pool.candidates)]
            gains[chosen] = -np.inf
            chosen.append(int(largest(gains, 1, jax.random.fold_in(ties, step))[0]))
        return pool.candidates[chosen]


def mutual_information(probabilities: Array) -> Array:
    """``H[mean_s p_s] - mean_s H[p_s]`` (n,) of probabilities (S, n, K)."""
    return jnp.sum(entr(jnp.mean(probabilities, axis=0)) - jnp.mean(entr(probabilities), axis=0), axis=-1)


_probabilities = jax.jit(class_probabilities)


@jax.jit
def _information(likelihood: HeadLikelihood, outputs: Array) -> Array:
    return mutual_information(class_probabilities(likelihood, outputs))


def batch_information(probabilities: Array, chosen: list[int], key: Array, num_configurations: int) -> np.ndarray:
    """``I(y_chosen, y_n; W)`` (n,) for each point n beside those chosen, which are counted again where n is one of them.

    Args:
        probabilities: (S, n, K).
        chosen: points that are in the batch.
        key: of the configurations of their labels, where they are drawn.
        num_configurations: above which they are.
    """
    _, num_points, num_classes = probabilities.shape
    exact = num_classes ** len(chosen) <= num_configurations
    if exact:
        given = _all_configurations(probabilities, chosen)
    else:
        given = _drawn_configurations(probabilities, jnp.asarray(chosen), key, num_configurations)
    own = np.asarray(_own_entropy(probabilities))
    settled = own[chosen].sum()
    size = max(_NUMBERS // (given.shape[0] * num_classes), 1)
    parts = [
        np.asarray(_joint_entropy(given, probabilities[:, start : start + size], exact))
        for start in range(0, num_points, size)
    ]
    return np.concatenate(parts) - own - settled


@jax.jit
def _own_entropy(probabilities: Array) -> Array:
    """``E_W H[p(y_n | W)]`` (n,)."""
    return jnp.mean(jnp.sum(entr(probabilities), axis=2), axis=0)


def _all_configurations(probabilities: Array, chosen: list[int]) -> Array:
    """``p(y_chosen | w_s)`` (M, S) for all M = K^B labellings."""
    given = jnp.ones((1, probabilities.shape[0]), probabilities.dtype)
    for place in chosen:
        own = probabilities[:, place].T  # (K, S)
        given = (given[:, None] * own[None]).reshape(-1, given.shape[1])
    return given


@partial(jax.jit, static_argnums=3)
def _drawn_configurations(probabilities: Array, chosen: Array, key: Array, count: int) -> Array:
    """``p(y | w_s)`` (M, S) for M labellings y of the chosen points, drawn from their joint distribution."""
    logs = jnp.log(probabilities[:, chosen])  # (S, B, K)
    source = jnp.arange(count) % logs.shape[0]  # each from a draw of the weights, all draws in turn
    labels = jax.random.categorical(key, logs[source])  # (M, B)

    def with_one(total, place):
        return total + logs[:, place, labels[:, place]].T, None

    given, _ = jax.lax.scan(with_one, jnp.zeros((count, logs.shape[0]), logs.dtype), jnp.arange(logs.shape[1]))
    return jnp.exp(given)


@partial(jax.jit, static_argnums=2)
def _joint_entropy(given: Array, probabilities: Array, exact: bool) -> Array:
    """``H(y_chosen, y_n)`` (n,): a sum over configurations, or the mean over drawn ones of their surprise."""
    num_draws = probabilities.shape[0]
    joint = jnp.einsum("ms,snk->mnk", given, probabilities) / num_draws
    if exact:
        return jnp.sum(entr(joint), axis=(0, 2))
    before = jnp.mean(given, axis=1)[:, None, None]  # p(y_chosen), from which each was drawn
    surprise = jnp.where(joint > 0, joint / before * jnp.log(jnp.where(joint > 0, joint, 1.0)), 0.0)
    return -jnp.sum(jnp.mean(surprise, axis=0), axis=1)
