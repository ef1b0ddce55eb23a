"""Strategies that look ahead: they update the belief in closed form before the batch is complete, or the label is known.

``Sequential``        one label, its update, the next choice: a batch is asked for point by point. Huseljic et al., arXiv
                      2210.06112.
``Foreseen``          no label is needed inside the batch: after each choice the covariance takes what a label of it is expected
                      to add, and the mean stays where it is, which is where it is expected
``ExpectedEntropy``   each candidate with each of its labels enters the belief; what counts is how certain the pool's
                      predictions are then (Roy, McCallum 2001)

With one point a batch the first two are the strategy that they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.acquisition import Pool, Scored, Strategy, check_size, class_probabilities
from ssm_nn.inference.last_layer.acquisition_design import absorbed
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.map_search import climb_in_outputs
from ssm_nn.inference.last_layer.structures import HeadBelief

__all__ = ["ExpectedEntropy", "Foreseen", "Sequential"]

Array = Any


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy is {strategy!r}; a Strategy such as Margin() is accepted")


@dataclass(frozen=True)
class Sequential(Strategy):
    """``strategy`` with the belief updated after every label of a batch, not after the batch.

    Args:
        strategy: any other.
    """

    strategy: Strategy

    def __post_init__(self):
        _check_strategy(self.strategy)

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """What ``strategy`` selects."""
        return self.strategy.select(pool, size, key)

    def at_once(self, batch_size: int) -> int:
        """One."""
        return 1


@dataclass(frozen=True)
class Foreseen(Strategy):
    """The batch that ``strategy`` makes one by one, the covariance updated after each choice as if its label were known.

    Args:
        strategy: one whose choice depends on the covariance.
    """

    strategy: Strategy

    def __post_init__(self):
        _check_strategy(self.strategy)

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """Each point after the expected effect of those before."""
        check_size(pool, size)
        chosen: list[int] = []
        for step in range(size):
            own = key if step == 0 else jax.random.fold_in(key, step)
            index = int(self.strategy.select(pool, 1, own)[0])
            chosen.append(index)
            if step < size - 1:
                place = int(np.flatnonzero(pool.candidates == index)[0])
                belief = absorbed(pool.belief, *pool.at_mean, place)
                pool = pool.without(index).believing(belief)
        return np.array(chosen)


@dataclass(frozen=True)
class ExpectedEntropy(Scored):
    """The expected fall of the mean predictive entropy of the pool:

        1/M sum_e H[p_e] - sum_y p(y_n = y) 1/M sum_e H[p_e | y_n = y]

    with p_e | y_n = y from the iterated update with that one label. Costs K updates a candidate, each of M predictions.

    Args:
        num_evaluated: M points of the pool, drawn anew for each batch; all of them where there are no more.
    """

    num_evaluated: int = 100

    def __post_init__(self):
        check_count(num_evaluated=self.num_evaluated)

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """(n,) in nats."""
        pool.check_classes()
        count = min(self.num_evaluated, len(pool.features))
        evaluated = np.asarray(jax.random.choice(key, len(pool.features), (count,), replace=False))
        phi_e = jnp.asarray(pool.features[evaluated])
        found = _entropy_falls(pool.belief, pool.mean, pool.padded_phi, pool.likelihood, phi_e)
        return np.asarray(found)[: len(pool.candidates)]


@jax.jit
def _entropy_falls(belief: HeadBelief, mean: Array, phi: Array, likelihood: HeadLikelihood, phi_e: Array) -> Array:
    f, f_e = phi @ mean.T, phi_e @ mean.T
    covariance, variance_e = belief.output_covariance(phi), belief.output_variance(phi_e)
    size = f.shape[1]
    present = _mean_entropy(likelihood, f_e, variance_e)
    one = jnp.ones(1, f.dtype)

    def of_point(point):
        own_phi, own_f, own = point
        # S J^T, column by column: the covariance of every output at e with each output of the candidate (M, K, K)
        columns = jax.vmap(lambda a: belief.lift(own_phi[None], a[None]))(jnp.eye(size, dtype=f.dtype))
        between = jnp.einsum("jkd,ed->ekj", columns, phi_e)

        def of_label(y):
            kernel = own[None, :, None, :]
            found = climb_in_outputs(kernel, own_f[None], likelihood, y[None], one)
            factor = likelihood.factor(found.outputs, y[None])[0]
            root = jnp.linalg.cholesky(jnp.eye(factor.shape[1], dtype=f.dtype) + factor.T @ own @ factor)
            half = jax.scipy.linalg.solve_triangular(root, factor.T, lower=True)
            moved = f_e + between @ found.position[0]
            left = variance_e - jnp.sum(jnp.square(between @ half.T), axis=2)
            return _mean_entropy(likelihood, moved, jnp.maximum(left, 0.0))

        p = _predictive(likelihood, own_f, jnp.diagonal(own))
        return present - p @ jax.vmap(of_label)(jnp.arange(p.shape[0], dtype=jnp.int32))

    return jax.lax.map(of_point, (phi, f, covariance))


def _predictive(likelihood: HeadLikelihood, f: Array, variance: Array) -> Array:
    """The probit approximation, as ``Probit`` makes it."""
    return class_probabilities(likelihood, f / jnp.sqrt(1 + jnp.pi / 8 * variance))


def _mean_entropy(likelihood: HeadLikelihood, f: Array, variance: Array) -> Array:
    return jnp.mean(jnp.sum(entr(_predictive(likelihood, f, variance)), axis=-1))
