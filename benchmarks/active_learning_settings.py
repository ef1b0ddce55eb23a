"""What the active-learning benchmark compares: data sets as ready features, strategies, and the plain form of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ssm_nn.inference.last_layer.acquisition import Entropy, Margin, Random, Strategy
from ssm_nn.inference.last_layer.acquisition_design import BAIT, InformationGain
from ssm_nn.inference.last_layer.acquisition_diversity import BADGE, TypiClust
from ssm_nn.inference.last_layer.acquisition_information import BALD, BatchBALD
from ssm_nn.inference.last_layer.acquisition_lookahead import ExpectedEntropy, Foreseen, Sequential
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.models.datasets import load
from ssm_nn.models.ready_features import load_features

VALIDATION_SEED = 1000  # of the pool on which the prior's variance is chosen; seeds below it are reported


@dataclass(frozen=True)
class Setting:
    """A data set and how it is labelled.

    Attributes:
        name: of the data set.
        num_classes: K.
        num_features: principal components of the pool.
        structure: of the engine.
        pool: points drawn from the training set, another draw each seed.
        start: labels at first, drawn at random, the same for all strategies.
        batch_size, num_batches: labels after that.
        test: points judged, at most.
        draws, configurations: of BALD and BatchBALD.
        probes: of BAIT.
        variances: of an output before any label, tried in turn.
    """

    name: str
    num_classes: int
    num_features: int
    structure: Any
    pool: int = 500
    start: int = 10
    batch_size: int = 10
    num_batches: int = 10
    test: int = 500
    draws: int = 100
    configurations: int = 256
    probes: int = 200
    variances: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)

    def described(self) -> dict[str, Any]:
        """All that a result depends on."""
        return asdict(self) | {"structure": type(self.structure).__name__}


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("digits", 10, 32, Full()),
        Setting("cifar10", 10, 32, Full()),
        Setting("dbpedia", 14, 32, Full(), start=14),
        Setting(
            "banking77",
            77,
            128,
            Shared(),
            pool=1000,
            test=1000,
            start=77,
            batch_size=20,
            draws=50,
            configurations=64,
            variances=(1.0, 3.0, 10.0, 30.0),  # by tens, the evidence is at the end of the grid, its maximum between
        ),
    )
}


@dataclass(frozen=True)
class Method:
    """A strategy by name.

    Attributes:
        plain: the method that looks not ahead, which it is compared with.
        candidates: so many points of the pool are looked at each time; None looks at all.
    """

    name: str
    strategy: Strategy
    plain: str | None = None
    candidates: int | None = None


def methods_of(setting: Setting) -> dict[str, Method]:
    """By name, in the order of the tables."""
    bald, bait = BALD(setting.draws), BAIT(num_evaluated=100, num_probes=setting.probes)
    plain = {
        "random": Random(),
        "margin": Margin(),
        "entropy": Entropy(),
        "bald": bald,
        "information": InformationGain(),
        "batchbald": BatchBALD(setting.draws, setting.configurations),
        "badge": BADGE(),
        "bait": bait,
        "typiclust": TypiClust(),
    }
    listed = [Method(name, strategy) for name, strategy in plain.items()]
    listed += [
        Method(f"foreseen-{name}", Foreseen(plain[name]), name) for name in ("margin", "entropy", "bald", "information")
    ]
    listed += [
        Method(f"sequential-{name}", Sequential(plain[name]), name) for name in ("margin", "entropy", "bald", "badge")
    ]
    if setting.num_classes <= 20:  # K updates a candidate
        listed.append(Method("expected-entropy", ExpectedEntropy(50), "entropy", candidates=100))
    return {method.name: method for method in listed}


@dataclass(frozen=True, eq=False)
class Bench:
    """The pool of one seed, and points to judge by.

    Attributes:
        x, y: of the pool, the labels at first in front.
        test_x, test_y: of the test.
    """

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@cache
def _arrays(name: str) -> tuple[np.ndarray, ...]:
    if name == "digits":
        data = load("digits")
        return (
            data.train_x.reshape(len(data.train_x), -1),
            data.train_y,
            data.test_x.reshape(len(data.test_x), -1),
            data.test_y,
        )
    ready = load_features(name)
    return ready.train_x, ready.train_y, ready.test_x, ready.test_y


@lru_cache(maxsize=2)
def bench_of(setting: Setting, seed: int) -> Bench:
    """A pool drawn from the training set, centred, turned to its principal components, of mean squared length 1.

    Nothing of the test set is looked at: neither by the components nor by the scale.
    """
    train_x, train_y, test_x, test_y = _arrays(setting.name)
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(train_x))[: setting.pool]
    x, y = train_x[drawn].astype(np.float64), train_y[drawn]
    if seed >= VALIDATION_SEED:  # judged on training points that are not in its pool
        rest = np.setdiff1d(np.arange(len(train_x)), drawn)[: setting.test]
        test_x, test_y = train_x[rest], train_y[rest]
    judged = generator.permutation(len(test_x))[: setting.test]
    test_x, test_y = test_x[judged].astype(np.float64), test_y[judged]
    centre = x.mean(axis=0)
    x, test_x = x - centre, test_x - centre
    turn = np.linalg.svd(x, full_matrices=False)[2][: setting.num_features].T
    x, test_x = x @ turn, test_x @ turn
    scale = np.sqrt(np.mean(np.sum(x**2, axis=1)))
    return Bench(
        (x / scale).astype(np.float32), y.astype(np.int32), (test_x / scale).astype(np.float32), test_y.astype(np.int32)
    )
