"""Data sets, sizes and priors of the last-layer benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from last_layer_network import trained

from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.heads import Head, feature_head, network_head
from ssm_nn.models.datasets import load
from ssm_nn.models.ready_features import load_features

TEST_EXAMPLES = 1_000  # at most, the first ones
DRAWS = 200  # of the weights, for Monte-Carlo reweighting
RATES = (1e-3, 1e-2, 1e-1, 1.0)  # of the first-order step; the best on the test set is shown, in its favour
GAMMAS = (10.0, 1.0)  # of the published rule; 10 is the published one
NUM_RANDOM_FEATURES = 256
NETWORKS = 5  # starts of the network under ``digits-network``, for the mixture
LENGTH_SCALE = 2.0  # of the random features, in units of a pixel vector whose norm is about 4


@dataclass(frozen=True)
class Problem:
    """One data set with how many points are learnt before and arrive after.

    Attributes:
        data: its name.
        prior_precision: tau, by the evidence (``--evidence``); of ``digits-50-10`` by hand.
        base, new: numbers of points before and after.
    """

    data: str
    prior_precision: float
    base: tuple[int, ...] = (100, 1_000)
    new: tuple[int, ...] = (1, 10, 100, 500)


PROBLEMS = {
    "digits-50-10": Problem("digits", 0.2, (50,), (10,)),
    "digits": Problem("digits", 0.043, (100, 700)),
    "digits-network": Problem("digits-network", 0.27, (100, 700)),
    "random-features": Problem("random-features", 0.013, (100, 700)),
    "cifar10": Problem("cifar10", 390.0),
    "dbpedia": Problem("dbpedia", 0.078),
    "banking77": Problem("banking77", 0.09),
}
QUICK = {"digits-50-10": Problem("digits", 0.2, (50,), (10,))}


class Features(NamedTuple):
    """Features (n, D) and labels of all points."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int


@cache
def features_of(name: str) -> Features:
    """Of a data set; ``random-features`` are those of SNGP, cosines of a Gaussian projection of the digits.

    Of ``digits-network`` they are the pixels: what lies below the head is trained on the points before, see ``head_of``.
    """
    if name in ("digits", "digits-network", "random-features"):
        data = load("digits")
        train, test = (x.reshape(len(x), -1) for x in (data.train_x, data.test_x))
        if name == "random-features":
            rng = np.random.default_rng(0)
            w = rng.normal(size=(train.shape[1], NUM_RANDOM_FEATURES)) / LENGTH_SCALE
            b = rng.uniform(0, 2 * np.pi, NUM_RANDOM_FEATURES)
            train, test = (np.sqrt(2 / NUM_RANDOM_FEATURES) * np.cos(x @ w + b) for x in (train, test))
        return Features(train, data.train_y, test, data.test_y, data.num_classes)
    ready = load_features(name)
    order = np.random.default_rng(0).permutation(len(ready.test_y))[:TEST_EXAMPLES]
    return Features(ready.train_x, ready.train_y, ready.test_x[order], ready.test_y[order], ready.num_classes)


def head_of(problem: Problem, seed: int, num_base: int, start: int = 0) -> Head:
    """On the features, or on a network that was trained on the points before, from one of ``NETWORKS`` starts."""
    data = features_of(problem.data)
    likelihood = Categorical(data.num_classes)
    if problem.data != "digits-network":
        return feature_head(likelihood, data.train_x.shape[1], prior_precision=problem.prior_precision)
    places, _ = points_of(problem, seed, num_base, 0)
    network = trained(data.train_x[places], data.train_y[places], NETWORKS * seed + start)
    return network_head(network, likelihood, data.train_x[:1], prior_precision=problem.prior_precision)


def points_of(problem: Problem, seed: int, num_base: int, num_new: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the points before and after, drawn without replacement; nested in ``num_new``."""
    order = np.random.default_rng(seed).permutation(len(features_of(problem.data).train_y))
    return order[:num_base], order[num_base : num_base + num_new]
