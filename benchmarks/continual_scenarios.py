"""The scenarios: which stream, which network, which beliefs are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from continual_settings import PRIOR_SCALE, Budget

from ssm_nn import Task, stack_tasks
from ssm_nn.models.datasets import Dataset
from ssm_nn.models.streams import (
    LazyTasks,
    TaskStream,
    brightened,
    orthogonal_rotation,
    permuted,
    rotated,
    split,
    without,
)

STATIC_WORLD, KNOWN_PERMUTATION, KNOWN_ROTATION, TASK_CLASSES = "static", "permutation", "rotation", "classes"
BASELINES = ("fine-tuning", "joint", "ewc", "structured-laplace", "si", "vcl", "replay-200")


@dataclass(frozen=True)
class Scenario:
    """A family of streams by seed, and what is learnt on it.

    Attributes:
        name: on the command line, and of its files.
        dataset: that ``load`` knows.
        stream: (dataset, num_tasks, train_size=, test_size=, seed=) -> TaskStream.
        num_tasks, examples, test_examples: T, and examples a task; None takes all there are.
        methods: names; ``low-rank-*`` stands for every rank of the budget, ``low-rank`` for its middle one.
        world: how the program is told of the task: not at all, by its step, or by the classes that it has.
        network: ``"mlp"`` or ``"cnn"``.
        smoothed: judge the belief of each task given all tasks, too.
        middle_missing: the task in the middle comes without data.
        validation_tasks: of the stream on which strengths are tuned; None takes the budget's number.
        prior_scale: standard deviation of every weight before the first task.
    """

    name: str
    dataset: str
    stream: Callable[..., TaskStream]
    num_tasks: int
    examples: int | None = None
    test_examples: int | None = None
    methods: tuple[str, ...] = (*BASELINES, "low-rank", "kronecker", "kronecker-spread")
    world: str = STATIC_WORLD
    network: str = "mlp"
    smoothed: bool = False
    middle_missing: bool = False
    validation_tasks: int | None = None
    prior_scale: float = PRIOR_SCALE

    @property
    def whole_matrix(self) -> bool:
        """Whether one belief serves all tasks: not where a known step moves the weights along."""
        return self.world not in (KNOWN_PERMUTATION, KNOWN_ROTATION)

    def method_names(self, budget: Budget) -> list[str]:
        """With the ranks of the budget."""
        names = []
        for name in self.methods:
            if name == "low-rank-*":
                names += [f"low-rank-{rank}" for rank in budget.ranks]
            else:
                names.append(f"low-rank-{budget.rank}" if name == "low-rank" else name)
        return names

    def tasks(self, dataset: Dataset, budget: Budget, seed: int) -> TaskStream:
        """The stream of a seed within the budget; its tasks hold what the program reads, and nothing else."""
        made = self.stream(
            dataset,
            _least(self.num_tasks, budget.num_tasks),
            train_size=_least(self.examples, budget.examples),
            test_size=_least(self.test_examples, budget.test_examples),
            seed=seed,
        )
        told = _told(made, self.world)
        return without(told, [len(told) // 2]) if self.middle_missing else told

    def for_validation(self, budget: Budget) -> tuple[Scenario, Budget]:
        """The same on fewer tasks and examples."""
        size = _least(self.examples, budget.validation_examples)
        tasks = _least(self.num_tasks, self.validation_tasks or budget.validation_tasks)
        smaller = replace(budget, num_tasks=tasks, examples=size, test_examples=None)
        return replace(self, test_examples=None), smaller


def validation_data(dataset: Dataset, held_out: int, seed: int) -> Dataset:
    """The training examples alone, ``held_out`` of them in the place of the test examples."""
    order = np.random.default_rng(seed).permutation(len(dataset.train_x))
    held, rest = order[:held_out], order[held_out:]
    return replace(
        dataset,
        train_x=dataset.train_x[rest],
        train_y=dataset.train_y[rest],
        test_x=dataset.train_x[held],
        test_y=dataset.train_y[held],
    )


def _told(stream: TaskStream, world: str) -> TaskStream:
    """The context that is not read is left out: engines are compiled for its shapes."""

    def rotation(t: int) -> np.ndarray:
        here, before = (float(stream.test[s].context["angle"]) for s in (t, max(t - 1, 0)))
        return (upright(here) @ upright(before).T).astype(np.float32)

    def upright(degrees: float) -> np.ndarray:
        return orthogonal_rotation(28, 28, degrees)

    def told(tasks: Any, t: int) -> Task:
        task = tasks[t]
        if world == KNOWN_PERMUTATION:
            return Task(task.data, {"permutation": task.context["permutation"]}, task.mask)
        if world == KNOWN_ROTATION:
            return Task(task.data, {"rotation": rotation(t)}, task.mask)
        if world == TASK_CLASSES:
            # beside each example, so that joint training and replay meet them too
            beside = np.tile(task.context["classes"], (task.num_examples, 1))
            return Task(task.data | {"classes": beside}, mask=task.mask)
        return Task(task.data, mask=task.mask)

    count = len(stream)
    return replace(
        stream,
        train=LazyTasks(partial(told, stream.train), count),
        test=LazyTasks(partial(told, stream.test), count, keep=True),
    )


def dealt(
    dataset: Dataset, num_tasks: int, train_size: int | None = None, test_size: int | None = None, seed: int = 0
) -> TaskStream:
    """``split``, whose sizes are taken as upper bounds: fewer classes a task have fewer examples.

    Training tasks are padded to the largest under a mask, so that engines compile once.
    """
    groups = np.array_split(np.arange(dataset.num_classes), num_tasks)

    def bounded(labels: np.ndarray, size: int | None) -> int | None:
        return None if size is None else min(size, *(int(np.isin(labels, group).sum()) for group in groups))

    sizes = {"train_size": bounded(dataset.train_y, train_size), "test_size": bounded(dataset.test_y, test_size)}
    made = split(dataset, num_tasks, **sizes, seed=seed)
    padded = stack_tasks(made.train[t] for t in range(num_tasks))
    return replace(made, train=LazyTasks(padded.at, num_tasks))


def _least(*sizes: int | None) -> Any:
    given = [size for size in sizes if size is not None]
    return min(given) if given else None


def _of(dataset: str) -> list[Scenario]:
    drift = (*BASELINES, "low-rank", "kronecker", *(f"kronecker-q{q}" for q in ("1e-5", "1e-4", "1e-3", "1e-2")))
    known = ("fine-tuning", "kronecker", "kronecker-known")
    turned = partial(rotated, step=5.0)
    return [
        Scenario(
            f"permuted-{dataset}-10",
            dataset,
            permuted,
            10,
            methods=(*BASELINES, "low-rank-*", "kronecker", "kronecker-spread"),
        ),
        # three tasks would not show what fifty forget
        Scenario(
            f"permuted-{dataset}-50",
            dataset,
            permuted,
            50,
            methods=(*BASELINES, "low-rank", "kronecker", "kronecker-spread", "kronecker-strength-3"),
            validation_tasks=10,
        ),
        Scenario(f"disjoint-{dataset}", dataset, dealt, 2),
        Scenario(f"split-{dataset}", dataset, dealt, 5, world=TASK_CLASSES),
        Scenario(f"rotated-{dataset}-drift", dataset, turned, 10, methods=(*drift, "kronecker-learnt"), smoothed=True),
        Scenario(
            f"rotated-{dataset}-drift-50",
            dataset,
            turned,
            10,
            examples=50,
            test_examples=2_000,
            methods=(*drift, "kronecker-learnt"),
            smoothed=True,
            prior_scale=1.0,  # at 0.2 the mode of 50 labels is a network of zeros
        ),
        Scenario(
            f"rotated-{dataset}-missing",
            dataset,
            turned,
            9,
            methods=("fine-tuning", *(f"kronecker-q{q}" for q in ("1e-5", "1e-4", "1e-3"))),
            smoothed=True,
            middle_missing=True,
        ),
        Scenario(f"known-permutation-{dataset}", dataset, permuted, 10, methods=known, world=KNOWN_PERMUTATION),
        Scenario(f"known-rotation-{dataset}", dataset, turned, 10, methods=known, world=KNOWN_ROTATION),
    ]


_CIFAR = Scenario("brightened-cifar", "cifar10_jpeg", brightened, 5, examples=5_000, test_examples=2_000, network="cnn")
SCENARIOS: Mapping[str, Scenario] = {s.name: s for s in (*_of("mnist"), *_of("fashion-mnist"), _CIFAR)}
