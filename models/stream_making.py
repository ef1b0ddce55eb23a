"""What the families of streams share: the order of the tasks, the examples of each, the checks of the arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssm_nn.models.datasets import Dataset
from ssm_nn.models.task_streams import LazyTasks, TaskStream
from ssm_nn.tasks import Task

__all__ = [
    "EXAMPLES",
    "TEST_EXAMPLES",
    "check_seed",
    "check_size",
    "draw_rows",
    "generator",
    "natural_order",
    "permutation_of",
    "settings_of",
    "shaped",
    "steps_of",
    "stream_of",
]

# One child of the seed for each use, so that no two uses draw from one stream of random numbers.
EXAMPLES, TEST_EXAMPLES, PERMUTATIONS = range(3)


def permutation_of(seed: int, size: int, k: int) -> np.ndarray:
    """P_k (size,) of the natural number k: drawn, but the identity for k = 0."""
    return generator(seed, PERMUTATIONS, k).permutation(size) if k else np.arange(size)


def steps_of(permutation: Callable[[int], np.ndarray], natural: Sequence[int]) -> dict[int, np.ndarray]:
    """For each natural number k the step P_{t-1}^-1 [P_t] from the task before it in the stream; the identity first."""
    before = dict(zip(natural[1:], natural[:-1], strict=True))
    return {k: np.argsort(permutation(before.get(k, k)))[permutation(k)].astype(np.int32) for k in natural}


def shaped(x: np.ndarray, flatten: bool) -> np.ndarray:
    """Images as vectors, or as they are."""
    return x.reshape(len(x), -1) if flatten else x


def stream_of(
    dataset: Dataset,
    natural: tuple[int, ...],
    train_rows: Sequence[np.ndarray],
    test_rows: Sequence[np.ndarray],
    task: Callable[[np.ndarray, np.ndarray, int], Task],
    settings: dict[str, Any],
) -> TaskStream:
    """The tasks ``task(x, y, k)`` with k in the order ``natural``."""

    def train(t: int) -> Task:
        k = natural[t]
        return task(dataset.train_x[train_rows[k]], dataset.train_y[train_rows[k]], k)

    def test(t: int) -> Task:
        k = natural[t]
        return task(dataset.test_x[test_rows[k]], dataset.test_y[test_rows[k]], k)

    image = dataset.train_x.shape[1:]
    return TaskStream(
        name=f"{settings['shift']} {dataset.name}",
        train=LazyTasks(train, len(natural)),
        test=LazyTasks(test, len(natural), keep=True),
        num_classes=dataset.num_classes,
        input_shape=(int(np.prod(image)),) if settings["flatten"] else image,
        settings=settings,
    )


def draw_rows(
    dataset: Dataset, num_tasks: int, train_size: int | None, test_size: int | None, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Rows of the training and of the test examples for each natural number k; whether no two tasks share a row."""
    check_seed(seed)
    num_train, num_test = len(dataset.train_x), len(dataset.test_x)
    check_size(train_size, num_train, "train_size", f"in {dataset.name}")
    check_size(test_size, num_test, "test_size", f"in the test split of {dataset.name}")
    size = num_train if train_size is None else train_size
    disjoint = num_tasks * size <= num_train
    if disjoint:
        shuffled = generator(seed, EXAMPLES).permutation(num_train)
        train = [shuffled[k * size : (k + 1) * size] for k in range(num_tasks)]
    else:
        train = [generator(seed, EXAMPLES, k).permutation(num_train)[:size] for k in range(num_tasks)]
    test = generator(seed, TEST_EXAMPLES).permutation(num_test)[:test_size]
    return train, [test] * num_tasks, disjoint


def generator(seed: int, *use: int) -> np.random.Generator:
    """Random numbers for one use of the seed, independent of those for another."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))


def settings_of(
    dataset: Dataset,
    shift: str,
    num_tasks: int,
    train_size: int | None,
    test_size: int | None,
    seed: int,
    natural: tuple[int, ...],
    flatten: bool,
) -> dict[str, Any]:
    """What every stream says of the arguments that made it."""
    return {
        "dataset": dataset.name,
        "shift": shift,
        "num_tasks": num_tasks,
        "train_size": train_size,
        "test_size": test_size,
        "seed": seed,
        "order": list(natural),
        "flatten": flatten,
    }


def natural_order(order: Sequence[int] | None, num_tasks: int) -> tuple[int, ...]:
    """The natural numbers of the tasks in the order in which they come."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}; at least 1 is needed")
    if order is None:
        return tuple(range(num_tasks))
    if sorted(order) != list(range(num_tasks)):
        raise ValueError(f"order is {list(order)}; a permutation of 0 ... {num_tasks - 1} is needed")
    return tuple(int(k) for k in order)


def check_seed(seed: int) -> None:
    """Raise ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; a non-negative integer is needed")


def check_size(size: int | None, available: int, argument: str, where: str) -> None:
    """Raise ValueError unless so many examples are there."""
    if size is not None and not 1 <= size <= available:
        raise ValueError(f"{argument} is {size}; accepted are 1 to {available} (the examples {where}) and None for all")
