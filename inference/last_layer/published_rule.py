"""The published one-pass rule, as a baseline. For each point in turn, with u = Sigma phi, v = phi^T u and p at the mean,

    Sigma' = Sigma - u u^T / (1 + v),    W' = W + gamma (y - p) (Sigma' phi)^T

from Sigma^-1 = I + sum_n p_max (1 - p_max) phi_n phi_n^T of the points learnt before. Nothing is iterated, and gamma is a
number to be tuned. Source: Huseljic et al., arXiv 2210.06112, whose gamma is 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checks import check_positive
from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.last_layer_filter import HeadState, LastLayerFilter
from ssm_nn.inference.last_layer.shared_covariance import Shared, SharedCovariance

__all__ = ["PublishedRule"]

Array = Any


class PublishedRule:
    """The rule for a Categorical head; states are those of ``engine``, a LastLayerFilter with ``Shared()``.

    Args:
        engine: gives the head; predictions and weights are read with it.
        gamma: length of a step, > 0.
    """

    def __init__(self, engine: LastLayerFilter, gamma: float = 10.0):
        check_positive(gamma=gamma)
        if not isinstance(engine.structure, Shared) or not isinstance(engine.head.likelihood, Categorical):
            raise ValueError(
                "engine is not one with structure=Shared() and a Categorical likelihood, which alone is accepted"
            )
        self.engine, self.gamma = engine, float(gamma)

    def start(self, state: HeadState) -> HeadState:
        """The mean of ``state`` (K, D) with the published covariance of the points in its sites."""
        top = np.max(np.asarray(jax.nn.softmax(jnp.asarray(state.sites.features) @ state.mean.T)), axis=1)
        rows = state.sites.features * np.sqrt(top * (1 - top))[:, None]
        precision = jnp.asarray(np.eye(rows.shape[1], dtype=rows.dtype) + rows.T @ rows)
        covariance = jnp.linalg.inv(precision)
        belief = SharedCovariance(covariance, precision, self.engine.head.num_outputs)
        return state._replace(belief=belief, sites=self.engine.init().sites)

    def update(self, state: HeadState, batch: Mapping[str, Any]) -> HeadState:
        """One pass over the points, in their order."""
        phi = self.engine.features(batch)
        labels = self.engine.head.likelihood.checked(self.engine.head.labels(batch))
        if not len(phi):
            return state
        mean, belief = _pass(state.mean, state.belief, jnp.asarray(phi), jnp.asarray(labels), self.gamma)
        return state._replace(step=state.step + 1, mean=mean, belief=belief)


@jax.jit
def _pass(mean: Array, belief: SharedCovariance, phi: Array, labels: Array, gamma: Array) -> tuple[Array, Any]:
    def one(carry, point):
        mean, covariance, precision = carry
        row, label = point
        u = covariance @ row
        covariance = covariance - jnp.outer(u, u) / (1 + row @ u)
        wrong = jax.nn.one_hot(label, len(mean), dtype=mean.dtype) - jax.nn.softmax(mean @ row)
        mean = mean + jnp.asarray(gamma, mean.dtype) * jnp.outer(wrong, covariance @ row)
        return (mean, covariance, precision + jnp.outer(row, row)), None

    (mean, covariance, precision), _ = jax.lax.scan(one, (mean, belief.covariance, belief.precision), (phi, labels))
    return mean, SharedCovariance(covariance, precision, belief.num_outputs)
