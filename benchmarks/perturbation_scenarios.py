"""The task sequences and networks of the perturbation benchmark, and the methods that learn them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import optax

from ssm_nn.inference import Minibatch
from ssm_nn.inference.perturbation.allocation import Evidence, ExactQuadratic, FixedRank, PaperShare
from ssm_nn.inference.perturbation.baselines import ElasticHeads, FineTuned, HeadTraining, L2ToBase, Packed, SingleTask
from ssm_nn.inference.perturbation.directions import PlainSVD, Whitened
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.fitting import SitePrior
from ssm_nn.inference.perturbation.graphs import Chain
from ssm_nn.inference.perturbation.pruning import AllTasks, Growth, OwnTask
from ssm_nn.models.cifar100 import SPLIT_ORDERS, SUPERCLASS_ORDERS, cifar100_split, cifar100_superclasses, own_heads
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.image_networks import lenet
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.omniglot import omniglot, omniglot_rotation
from ssm_nn.models.streams import TaskStream, permuted

PRIOR_SCALE = 0.2


@dataclass(frozen=True)
class Budget:
    """How much is run; None sets no bound.

    Attributes:
        epochs: a task, and of fine-tuning.
        warm_up: epochs of free training before it.
        num_tasks, examples: at most.
        curvature: examples behind factors and quadratics.
    """

    epochs: int
    warm_up: int
    num_tasks: int | None = None
    examples: int | None = None
    curvature: int = 2000


@dataclass(frozen=True)
class Scenario:
    """A task sequence with its network.

    Attributes:
        name: on the command line.
        stream: (budget, seed, order) -> the tasks.
        network: (input shape, classes, seed) -> (apply, params), and the pattern of its head.
        budget: of a full run.
        batch_size: of all methods.
        growth: limit for the later tasks together.
        cap: most directions a layer that are looked at: far more than the limit has room for.
        num_orders: orders that are run, the natural one first.
        methods: run by default.
    """

    name: str
    stream: Callable[[Budget, int, int], TaskStream]
    network: Callable[[tuple[int, ...], int, int], tuple[Any, str]]
    budget: Budget
    batch_size: int = 128
    growth: float = 0.6
    cap: int = 100
    num_orders: int = 1
    methods: tuple[str, ...] = (
        "perturbation", "paper", "paper-all", "evidence", "fixed", "chain", "single", "fine-tuning", "l2", "ewc", "packed",
        "joint",
    )  # fmt: skip

    def quick(self) -> Scenario:
        """The same, to see that it runs."""
        few = min(self.budget.num_tasks or 3, 3)
        return replace(self, budget=Budget(1, 1, num_tasks=few, examples=1280, curvature=200))


@cache
def _data(name: str) -> Dataset:
    return load(name)


def _order(order: int, num_tasks: int) -> list[int] | None:
    """The natural order, then random ones, the same for every seed."""
    return None if order == 0 else np.random.default_rng(order).permutation(num_tasks).tolist()


def _permuted(flatten: bool) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        num = budget.num_tasks or 10
        tests = None if budget.examples is None else 1000
        return permuted(_data("mnist"), num, budget.examples, tests, seed, _order(order, num), flatten)

    return stream


def _omniglot(budget: Budget, seed: int, order: int) -> TaskStream:
    drawings = _drawings()
    num = budget.num_tasks or 80
    return omniglot_rotation(drawings, num, seed=seed, order=_order(order, num))


@cache
def _drawings() -> Any:
    return omniglot()


def _split_cifar(budget: Budget, seed: int, order: int) -> TaskStream:
    groups = [[2 * k, 2 * k + 1] for k in range(5)]
    tests = None if budget.examples is None else 500
    return own_heads(_data("cifar10_jpeg"), groups, _order(order, 5), budget.examples, tests, seed)


def _cifar100(make: Any, orders: dict[str, tuple[int, ...]]) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        del budget, seed
        return make(list(orders)[order])

    return stream


def _mlp(width: int) -> Callable[[tuple[int, ...], int, int], tuple[Any, str]]:
    return lambda inputs, classes, seed: (mlp((*inputs, width, classes), "relu", seed), "layers.1.*")


def _lenet(inputs: tuple[int, ...], classes: int, seed: int) -> tuple[Any, str]:
    return lenet(inputs, classes, seed=seed), "head.*"


def _small_lenet(inputs: tuple[int, ...], classes: int, seed: int) -> tuple[Any, str]:
    return lenet(inputs, classes, (16, 32), (256, 128), seed=seed), "head.*"


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("permuted-mnist", _permuted(True), _mlp(100), Budget(3, 1), cap=32),
        Scenario("permuted-mnist-wide", _permuted(True), _mlp(1000), Budget(3, 1)),
        Scenario("permuted-mnist-lenet", _permuted(False), _lenet, Budget(3, 1), methods=("perturbation", "paper", "single")),
        Scenario("omniglot-rotation", _omniglot, _small_lenet, Budget(20, 5), batch_size=64, growth=10.0),
        Scenario("split-cifar10", _split_cifar, _lenet, Budget(10, 2), growth=0.2, num_orders=5),
        Scenario("cifar100-split", _cifar100(cifar100_split, SPLIT_ORDERS), _lenet, Budget(20, 1), growth=0.2, num_orders=5),
        Scenario(
            "cifar100-superclass",
            _cifar100(cifar100_superclasses, SUPERCLASS_ORDERS),
            _lenet,
            Budget(20, 1),
            growth=0.2,
            num_orders=5,
        ),
    )
}  # fmt: skip


def learner(method: str, scenario: Scenario, stream: TaskStream, seed: int) -> Any:
    """The engine of a method; ``joint`` and ``allocations`` take the perturbation's."""
    budget, inputs = scenario.budget, stream.input_shape
    assert stream.num_classes is not None  # every scenario is a classification
    network, head = scenario.network(inputs, stream.num_classes, seed)
    program = multi_head(network, head, PRIOR_SCALE)
    growth = Growth(scenario.growth, max(len(stream), 2))
    own = {
        "perturbation": {"directions": Whitened(), "allocation": ExactQuadratic(), "growth": growth},
        "paper": {"directions": PlainSVD(), "allocation": PaperShare(0.9), "growth": growth, "pruning": OwnTask()},
        "paper-all": {"directions": PlainSVD(), "allocation": PaperShare(0.9), "growth": growth, "pruning": AllTasks()},
        "evidence": {"directions": Whitened(), "allocation": Evidence(), "growth": growth},
        "fixed": {"directions": PlainSVD(), "allocation": FixedRank(3), "growth": growth},
        "chain": {"directions": Whitened(), "allocation": ExactQuadratic(), "growth": growth, "graph": Chain()},
    }
    engine = PerturbationFilter(
        program,
        minibatch=_minibatch(budget.epochs, scenario.batch_size),
        warm_up_epochs=budget.warm_up,
        prior=SitePrior(),
        curvature_examples=budget.curvature,
        cap=scenario.cap,
        **own.get(method, {"directions": PlainSVD()}),
    )
    free = {
        "single": SingleTask(),
        "fine-tuning": FineTuned(),
        "l2": L2ToBase(1000.0),
        "ewc": ElasticHeads(100.0),
        "packed": Packed(1 / max(len(stream), 2)),
    }
    return HeadTraining(engine, free[method]) if method in free else engine


@cache
def _minibatch(epochs: int, batch_size: int) -> Minibatch:
    return Minibatch(optax.adam(1e-3), epochs=epochs, batch_size=batch_size)
