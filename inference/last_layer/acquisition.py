"""Which points of a pool to label next: what a strategy sees, and the strategies that score points one by one.

``Random``    in any order
``Margin``    the least p_1 - p_2 between the two most probable classes first (Scheffer, Decomain, Wrobel 2001)
``Entropy``   the largest -sum_k p_k log p_k first (Shannon 1948)

p is the predictive distribution with the weights integrated out. Strategies that share what they know with no label compare
points by a score alone and take the best ones; points of the same score come in random order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, HeadLikelihood
from ssm_nn.inference.last_layer.head_predictions import Probit, predict_head, sample_outputs
from ssm_nn.inference.last_layer.sites import padded, padded_size
from ssm_nn.inference.last_layer.structures import HeadBelief

__all__ = ["Entropy", "Margin", "Pool", "Random", "Scored", "Strategy"]

Array = Any

PROBIT = Probit()


@dataclass(frozen=True, eq=False)
class Pool:
    """What a strategy may look at.

    Attributes:
        likelihood: of the head's outputs.
        belief, mean: over the whitened weights, after the labels so far.
        features: (N, D), whitened, of all points, also of earlier labels.
        candidates: (n,), indices of the points that may be chosen; scores are in their order.
        labelled: (m,), indices of the points whose labels are known.
    """

    likelihood: HeadLikelihood
    belief: HeadBelief
    mean: Array
    features: np.ndarray
    candidates: np.ndarray
    labelled: np.ndarray

    @cached_property
    def phi(self) -> np.ndarray:
        """Features (n, D) of the candidates."""
        return self.features[self.candidates]

    @cached_property
    def padded_phi(self) -> Array:
        """``phi`` on the device, with copies of its first row up to a power of two: few shapes are compiled."""
        return jnp.asarray(padded(self.phi, padded_size(len(self.candidates))))

    @cached_property
    def at_mean(self) -> tuple[Array, HeadLikelihood, Array, Array]:
        """``padded_phi``, the likelihood, the outputs at the mean, and the most probable labels: what an update is made of."""
        return self.padded_phi, self.likelihood, *_at_mean(self.padded_phi, self.mean, self.likelihood)

    def probabilities(self) -> np.ndarray:
        """Predictive probabilities (n, K) of the candidates; (n, 2) for a Bernoulli head."""
        self.check_classes()
        made = predict_head(self.belief, self.mean, self.phi, self.likelihood, None, PROBIT)
        assert made.probabilities is not None
        return made.probabilities

    def drawn_outputs(self, num_samples: int, key: Array) -> Array:
        """Outputs (S, n', K) of ``padded_phi``, all points under the same draws of the weights; on the host."""
        return sample_outputs(self.belief, self.mean, np.asarray(self.padded_phi), num_samples, key)

    def check_classes(self) -> None:
        """Raise ValueError where labels are not classes."""
        if not isinstance(self.likelihood, Categorical | Bernoulli):
            raise ValueError(
                f"the likelihood is {type(self.likelihood).__name__}, and the strategy is for classes; Random(), BAIT(), "
                "TypiClust(), InformationGain() and Foreseen of these are accepted"
            )

    def without(self, index: int) -> Pool:
        """With a point that is a candidate no more."""
        return replace(self, candidates=self.candidates[self.candidates != index])

    def believing(self, belief: HeadBelief) -> Pool:
        """With another covariance."""
        return replace(self, belief=belief)


class Strategy:
    """Chooses points of a pool; base of all strategies."""

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """Indices into the pool (size,), each once, the first choice first.

        Args:
            pool: what is known.
            size: from 1 to the number of candidates.
            key: of all randomness, ties included.

        Raises:
            ValueError: another size, a likelihood that the strategy is not for.
        """
        raise NotImplementedError

    def at_once(self, batch_size: int) -> int:
        """How many labels of a batch are asked for before the belief takes them in."""
        return batch_size


class Scored(Strategy):
    """Takes the points with the largest scores."""

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """(n,) of the candidates, larger is better."""
        raise NotImplementedError

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """The ``size`` largest scores."""
        check_size(pool, size)
        own, ties = jax.random.split(key)
        return pool.candidates[largest(self.score(pool, own), size, ties)]


@dataclass(frozen=True)
class Random(Scored):
    """Points in random order."""

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """All the same: ties are broken at random."""
        return np.zeros(len(pool.candidates))


@dataclass(frozen=True)
class Margin(Scored):
    """``p_2 - p_1`` of the two most probable classes."""

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """From -1 (certain) to 0."""
        best = np.sort(pool.probabilities(), axis=1)
        return best[:, -2] - best[:, -1]


@dataclass(frozen=True)
class Entropy(Scored):
    """``-sum_k p_k log p_k`` in nats."""

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """From 0 to log K."""
        return entr(pool.probabilities()).sum(axis=1)


def check_size(pool: Pool, size: int) -> None:
    """Raise ValueError where so many points cannot be chosen."""
    check_count(size=size)
    if size > len(pool.candidates):
        raise ValueError(f"size is {size}, but the pool has {len(pool.candidates)} candidates left")


def largest(scores: np.ndarray, size: int, key: Array) -> np.ndarray:
    """Places of the ``size`` largest scores, the largest first, ties in random order.

    Raises:
        ValueError: where a score is nan.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are nan: the belief is not finite")
    order = generator_of(key).permutation(len(scores))
    return order[np.argsort(-scores[order], kind="stable")[:size]]


def generator_of(key: Array) -> np.random.Generator:
    """NumPy's generator that a key determines, for what is drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def pseudo_labels(likelihood: HeadLikelihood, f: Array) -> Array:
    """The most probable label at outputs f (n, K); for numbers their mean."""
    if isinstance(likelihood, Categorical):
        return jnp.argmax(f, axis=1).astype(jnp.int32)
    if isinstance(likelihood, Bernoulli):
        return (f[:, 0] > 0).astype(jnp.int32)
    distribution: Any = likelihood.distribution(f, None)
    return distribution.mean


@jax.jit
def _at_mean(phi: Array, mean: Array, likelihood: HeadLikelihood) -> tuple[Array, Array]:
    f = phi @ mean.T
    return f, pseudo_labels(likelihood, f)


def class_probabilities(likelihood: HeadLikelihood, f: Array) -> Array:
    """(..., K) at outputs f (..., K); (..., 2) for a Bernoulli head."""
    if isinstance(likelihood, Bernoulli):
        return jnp.concatenate([jax.nn.sigmoid(-f), jax.nn.sigmoid(f)], axis=-1)
    return jax.nn.softmax(f, axis=-1)
