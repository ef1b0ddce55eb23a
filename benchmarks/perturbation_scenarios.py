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
from ssm_nn.inference.perturbation.graphs import Chain, InitialStar
from ssm_nn.inference.perturbation.pruning import AllTasks, Growth, OwnTask
from ssm_nn.inference.perturbation.published import CIFAR100
from ssm_nn.models.cifar100 import SPLIT_ORDERS, SUPERCLASS_ORDERS, cifar100_split, cifar100_superclasses, own_heads
from ssm_nn.models.data_set_stream import FIVE, of_data_sets
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.image_networks import lenet
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.omniglot import omniglot, omniglot_rotation
from ssm_nn.models.streams import TaskStream, permuted

PRIOR_SCALE = 0.2
RATES = 3e-3, 1e-2  # Adam's, of all weights and of a task's own parameters; they fall to zero on a cosine
LENET_RATES = 1e-3, 3e-3  # the larger ones leave LeNet at chance after a warm-up
L1 = 1.7e-4  # beside the mean loss: of factors whose entries are cut


@dataclass(frozen=True)
class Budget:
    """How much is run; None sets no bound.

    Attributes:
        epochs: of all weights: the first task, and every task of the baselines.
        warm_up, tune, refit: epochs of a later task of ours: of all weights, of its own parameters, and again after entries
            are cut. Methods that cut nothing, or nothing but at the end, fine-tune for ``tune + refit``.
        num_tasks, examples: at most.
        curvature: examples behind factors and quadratics.
    """

    epochs: int
    warm_up: int
    tune: int
    refit: int
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
        rates: of all weights, and of a task's own parameters.
        growth: limit for the later tasks together.
        cap: most directions a layer that are looked at: far more than the limit has room for.
        spread: how often the room for directions is filled before entries are cut.
        num_orders: orders that are run, the natural one first.
        methods: run by default.
        elastic: strength of ``ewc``.
        first: tasks of the sequence that are learnt, None for all: limits and orders stay those of the whole.
    """

    name: str
    stream: Callable[[Budget, int, int], TaskStream]
    network: Callable[[tuple[int, ...], int, int], tuple[Any, str]]
    budget: Budget
    batch_size: int = 128
    rates: tuple[float, float] = RATES
    growth: float = 0.6
    cap: int = 100
    spread: float = 4.0
    num_orders: int = 1
    methods: tuple[str, ...] = (
        "perturbation", "whole", "paper", "paper-all", "evidence", "fixed", "chain", "initial", "single", "fine-tuning",
        "l2", "ewc", "packed", "joint",
    )  # fmt: skip
    elastic: float = 100.0
    first: int | None = None

    def smaller(self, examples: int | None, first: int | None) -> Scenario:
        """With fewer examples a task, or its first tasks alone, under a name that says so."""
        words = [f"{n}-{what}" for n, what in ((examples, "examples"), (first, "tasks")) if n is not None]
        budget, size = self.budget, self.batch_size
        if examples is not None:  # what goes before training is kept in proportion, and an epoch still makes 100 steps
            budget = replace(budget, examples=examples, curvature=min(budget.curvature, -(-examples // 4)))
            size = min(size, -(-examples // 100))
        return replace(self, name="-".join([self.name, *words]), budget=budget, batch_size=size, first=first)

    def quick(self) -> Scenario:
        """The same, to see that it runs."""
        few = min(self.budget.num_tasks or 3, 3)
        return replace(self, budget=Budget(1, 1, 1, 1, num_tasks=few, examples=1280, curvature=200))


@cache
def _data(name: str) -> Dataset:
    return load(name)


def _order(order: int, num_tasks: int) -> list[int] | None:
    """The natural order, then random ones, the same for every seed."""
    return None if order == 0 else np.random.default_rng(order).permutation(num_tasks).tolist()


def _permuted(flatten: bool) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        num = budget.num_tasks or 10
        tests = None if budget.examples is None else 2000
        return permuted(_data("mnist"), num, budget.examples, tests, seed, _order(order, num), flatten)

    return stream


def _omniglot(flatten: bool) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        num = budget.num_tasks or 80
        return omniglot_rotation(_drawings(), num, seed=seed, order=_order(order, num), flatten=flatten)

    return stream


@cache
def _drawings() -> Any:
    return omniglot()


def _split_cifar(most: int | None, flatten: bool) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        groups, examples = [[2 * k, 2 * k + 1] for k in range(5)], budget.examples or most
        return own_heads(_data("cifar10_jpeg"), groups, _order(order, 5), examples, None, seed, flatten)

    return stream


def _data_sets(names: tuple[str, ...]) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        tests = None if budget.examples is None else 2000
        sets = [_data(name) for name in names]
        return of_data_sets(sets, _order(order, len(sets)), budget.examples, tests, seed)

    return stream


def _permuted_cifar(budget: Budget, seed: int, order: int) -> TaskStream:
    """As many images and classes as a task of CIFAR-100's split has."""
    num = budget.num_tasks or 10
    return permuted(_data("cifar10_jpeg"), num, budget.examples or 5000, 1000, seed, _order(order, num), False)


def _cifar100(make: Any, orders: dict[str, tuple[int, ...]]) -> Callable[[Budget, int, int], TaskStream]:
    def stream(budget: Budget, seed: int, order: int) -> TaskStream:
        del budget, seed
        return make(list(orders)[order])

    return stream


def _mlp(width: int) -> Callable[[tuple[int, ...], int, int], tuple[Any, str]]:
    return lambda inputs, classes, seed: (mlp((*inputs, width, classes), "relu", seed), "layers.1.*")


def _lenet(inputs: tuple[int, ...], classes: int, seed: int) -> tuple[Any, str]:
    return lenet(inputs, classes, seed=seed), "head.*"


def _narrow_lenet(channels: tuple[int, int], hidden: tuple[int, int]) -> Callable[..., tuple[Any, str]]:
    return lambda inputs, classes, seed: (lenet(inputs, classes, channels, hidden, seed=seed), "head.*")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("permuted-mnist", _permuted(True), _mlp(100), Budget(5, 1, 2, 2), cap=32),
        Scenario("permuted-mnist-wide", _permuted(True), _mlp(1000), Budget(5, 1, 2, 2)),
        Scenario(
            "permuted-mnist-lenet",
            _permuted(False),
            _lenet,
            Budget(12, 2, 5, 5),  # the paper's epochs
            rates=LENET_RATES,
            methods=("initial", "perturbation", "paper", "single"),
        ),
        Scenario(
            "omniglot-rotation",
            _omniglot(False),
            _narrow_lenet((16, 32), (256, 128)),
            Budget(25, 5, 10, 10),
            batch_size=64,
            rates=LENET_RATES,
            growth=10.0,
        ),
        Scenario(
            "omniglot-rotation-mlp",  # what a core does in minutes
            _omniglot(True),
            _mlp(200),
            Budget(20, 4, 8, 8),
            batch_size=64,
            growth=4.0,
            cap=32,
            methods=("perturbation", "single", "fine-tuning"),
        ),
        Scenario(
            "split-cifar10-mlp",  # 2,000 images a task: what a core does in minutes
            _split_cifar(2000, True),
            _mlp(200),
            Budget(10, 1, 5, 4),
            batch_size=64,
            growth=0.2,
            num_orders=5,
            methods=("perturbation", "initial", "fixed", "fine-tuning", "ewc", "packed", "single"),
            elastic=1e7,  # the best of powers of ten from 1 to 1e9, on seed 100
        ),
        Scenario(
            "split-cifar10",
            _split_cifar(None, False),
            _lenet,
            Budget(12, 2, 5, 5),
            rates=LENET_RATES,
            growth=0.2,
            num_orders=5,
            elastic=1e7,
        ),
        Scenario(
            "data-sets",  # three of the five, CIFAR-10 by its JPEG copy
            _data_sets(("mnist", "cifar10_jpeg", "fashion-mnist")),
            _lenet,
            Budget(12, 2, 5, 5),
            rates=LENET_RATES,
            num_orders=3,
            elastic=1e7,
        ),
        Scenario("five-data-sets", _data_sets(FIVE), _lenet, Budget(12, 3, 5, 4), rates=LENET_RATES, num_orders=5, elastic=1e7),
        Scenario(
            "cifar-schedule",  # the published one, for its time: where CIFAR-100 is not at hand
            _permuted_cifar,
            _lenet,
            Budget(20, 1, 10, 10),
            growth=0.2,
            methods=("published",),
        ),
        Scenario(
            "cifar100-split",
            _cifar100(cifar100_split, SPLIT_ORDERS),
            _lenet,
            Budget(20, 1, 10, 10),
            rates=LENET_RATES,
            growth=0.2,
            num_orders=5,
        ),
        Scenario(
            "cifar100-superclass",
            _cifar100(cifar100_superclasses, SUPERCLASS_ORDERS),
            _lenet,
            Budget(20, 1, 10, 10),
            rates=LENET_RATES,
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
    num_examples, size = stream.train[0].num_examples, scenario.batch_size
    if method == "published":
        program = multi_head(network, head, CIFAR100.prior_scale(num_examples))
        return PerturbationFilter(program, **CIFAR100.arguments(num_examples))
    rate, own_rate = scenario.rates
    program = multi_head(network, head, PRIOR_SCALE)
    growth = Growth(scenario.growth, max(len(stream), 2))
    steps = -(-num_examples // size)  # an epoch
    thinned = {
        "directions": Whitened(),
        "growth": growth,
        "pruning": OwnTask(scenario.spread, _adam(own_rate, budget.refit, size, budget.refit * steps)),
        "prior": SitePrior(l1=L1 * num_examples),
        "fine_tuning": _adam(own_rate, budget.tune, size, None),
    }
    own: dict[str, dict[str, Any]] = {
        "perturbation": {**thinned, "allocation": ExactQuadratic()},
        "whole": {"directions": Whitened(), "allocation": ExactQuadratic(), "growth": growth},
        "paper": {"allocation": PaperShare(0.9), "growth": growth, "pruning": OwnTask()},
        "paper-all": {"allocation": PaperShare(0.9), "growth": growth, "pruning": AllTasks()},
        "evidence": {**thinned, "allocation": Evidence()},
        "fixed": {"allocation": FixedRank(3), "growth": growth},
        "initial": {**thinned, "allocation": ExactQuadratic(), "graph": InitialStar()},
        "chain": {**thinned, "allocation": ExactQuadratic(), "graph": Chain()},
    }
    whole = budget.tune + budget.refit
    plain = {"directions": PlainSVD(), "prior": SitePrior(), "fine_tuning": _adam(own_rate, whole, size, whole * steps)}
    free_steps = budget.epochs * steps * (len(stream) if method == "joint" else 1)
    engine = PerturbationFilter(
        program,
        minibatch=_adam(rate, budget.epochs, size, free_steps),
        warm_up_epochs=budget.warm_up,
        curvature_examples=budget.curvature,
        cap=scenario.cap,
        **{**plain, **own.get(method, {})},
    )
    free = {
        "single": SingleTask(),
        "fine-tuning": FineTuned(),
        "l2": L2ToBase(1000.0),
        "ewc": ElasticHeads(scenario.elastic),
        "packed": Packed(1 / max(len(stream), 2)),
    }
    return HeadTraining(engine, free[method]) if method in free else engine


@cache
def _adam(rate: float, epochs: int, batch_size: int, steps: int | None) -> Minibatch:
    """At a constant rate, or at one that falls to zero within ``steps``."""
    schedule = rate if steps is None else optax.cosine_decay_schedule(rate, steps)
    return Minibatch(optax.adam(schedule), epochs=epochs, batch_size=batch_size)
