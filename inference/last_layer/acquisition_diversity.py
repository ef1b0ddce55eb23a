"""Batches whose points differ from each other.

``BADGE``       k-means++ seeding of gradients g_n = (y^_n - p_n) (x) phi_n at the most probable label (Ash et al. 2020,
                arXiv 1906.03671)
``TypiClust``   the most typical point of each of the largest clusters without a label (Hacohen, Dekel, Weinshall 2022,
                arXiv 2202.02794)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.acquisition import Pool, Strategy, check_size, generator_of
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["BADGE", "GradientEmbedding", "TypiClust", "gradient_embedding", "typicality"]

Array = Any


@dataclass(frozen=True)
class GradientEmbedding:
    """Vectors ``r_n (x) phi_n`` of K D numbers, kept as their two factors.

    Attributes:
        residuals: r (n, K), the gradient in the outputs.
        features: phi (n, D).
    """

    residuals: np.ndarray
    features: np.ndarray

    def squares(self) -> np.ndarray:
        """Squared lengths (n,)."""
        return np.sum(self.residuals**2, axis=1) * np.sum(self.features**2, axis=1)

    def squared_distances(self, place: int) -> np.ndarray:
        """(n,) from the vector at ``place``: |a|^2 + |b|^2 - 2 (r_a . r_b) (phi_a . phi_b), not below 0."""
        products = (self.residuals @ self.residuals[place]) * (self.features @ self.features[place])
        squares = self.squares()
        distances = np.maximum(squares + squares[place] - 2 * products, 0.0)
        distances[place] = 0.0
        return distances


def gradient_embedding(pool: Pool) -> GradientEmbedding:
    """Gradients of the log likelihood at the mean weights and the most probable labels, of all candidates."""
    pool.check_classes()
    count = len(pool.candidates)
    residuals = np.asarray(_residuals(*pool.at_mean))[:count]
    return GradientEmbedding(residuals.astype(np.float64), pool.phi.astype(np.float64))


@jax.jit
def _residuals(phi: Array, likelihood: HeadLikelihood, f: Array, y: Array) -> Array:
    return likelihood.gradient(f, y)


@dataclass(frozen=True)
class BADGE(Strategy):
    """Points of large and of different gradients: the largest first, then each with a probability as its squared distance.

    Gradients are in the whitened weights, whose prior is round.
    """

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """As ``k-means++`` seeds its centres, with the largest gradient as the first, as in the authors' program."""
        check_size(pool, size)
        embedding, generator = gradient_embedding(pool), generator_of(key)
        chosen = [_drawn_largest(embedding.squares(), generator)]
        nearest = embedding.squared_distances(chosen[0])
        while len(chosen) < size:
            nearest[chosen] = 0.0
            total = nearest.sum()
            if total > 0:
                place = int(generator.choice(len(nearest), p=nearest / total))
            else:  # all gradients are the same: at random among the rest
                place = int(generator.choice(np.setdiff1d(np.arange(len(nearest)), chosen)))
            chosen.append(place)
            nearest = np.minimum(nearest, embedding.squared_distances(place))
        return pool.candidates[chosen]


def _drawn_largest(values: np.ndarray, generator: np.random.Generator) -> int:
    return int(generator.choice(np.flatnonzero(values == values.max())))


@dataclass(frozen=True)
class TypiClust(Strategy):
    """Points in the thick of the largest clusters that have the fewest labels; looks at features alone.

    Clusters are made of the candidates and the labelled points, as many as there are labels after the batch.

    Args:
        max_clusters: at most so many.
        num_neighbours: of the mean distance whose inverse is the typicality.
        least_cluster: clusters of fewer points are passed over while there are others.
    """

    max_clusters: int = 500
    num_neighbours: int = 20
    least_cluster: int = 5

    def __post_init__(self):
        check_count(
            max_clusters=self.max_clusters, num_neighbours=self.num_neighbours, least_cluster=self.least_cluster
        )

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """Cluster by cluster, the one with the fewest labels, then the largest, first."""
        check_size(pool, size)
        places = np.concatenate([pool.labelled, pool.candidates]).astype(int)
        features = pool.features[places]
        count = min(len(pool.labelled) + size, self.max_clusters, len(places))
        members = _clusters(features, count, generator_of(key))
        labelled = np.arange(len(places)) < len(pool.labelled)
        taken, chosen = labelled.copy(), []
        while len(chosen) < size:
            sizes = np.bincount(members, minlength=count)
            known = np.bincount(members[taken], minlength=count)
            small = sizes < self.least_cluster
            free = sizes > known
            order = np.lexsort((-sizes, known, small, ~free))  # the last key counts first
            own = np.flatnonzero(members == order[0])
            typical = typicality(features[own], self.num_neighbours)
            typical[taken[own]] = -np.inf
            best = int(own[np.argmax(typical)])
            taken[best] = True
            chosen.append(int(places[best]))
        return np.array(chosen)


def typicality(features: np.ndarray, num_neighbours: int) -> np.ndarray:
    """The inverse of the mean distance to the nearest points, (n,) of features (n, D); at most n - 1 neighbours count."""
    features = np.asarray(features, np.float64)
    count = min(num_neighbours, len(features) - 1)
    if count == 0:
        return np.ones(len(features))
    squares = np.sum(features**2, axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sqrt(np.partition(distances, count - 1, axis=1)[:, :count])
    with np.errstate(divide="ignore"):  # a point with so many twins is as typical as can be
        return 1 / nearest.mean(axis=1)


def _clusters(features: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """The number (n,) of each point's cluster, by k-means; by mini-batches where there are many clusters, as published."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    seed = int(generator.integers(2**31))
    distinct = len(np.unique(features, axis=0))
    count = min(count, distinct)  # scikit-learn warns of fewer distinct points than clusters
    kind: Any = KMeans if count <= 50 else partial(MiniBatchKMeans, batch_size=4096)
    return kind(count, n_init=1, random_state=seed).fit_predict(features)
