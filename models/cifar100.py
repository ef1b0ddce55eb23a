"""CIFAR-100 as task sequences, and any data set split into tasks with labels of their own.

    split        10 tasks of 10 classes, in the order of the fine labels
    superclass   20 tasks of 5 classes, one superclass each

in the orders A to E of Yoon et al. 2020 (arXiv 1902.09432), which Li et al. 2024 (arXiv 2311.15161) take over. Labels are
those of the task, 0 .. C - 1: a head has C outputs, not 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssm_nn.models.cifar import CIFAR100_FILE, cifar
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.stream_making import (
    EXAMPLES,
    TEST_EXAMPLES,
    check_seed,
    check_size,
    generator,
    natural_order,
    shaped,
)
from ssm_nn.models.task_streams import LazyTasks, TaskStream
from ssm_nn.tasks import Task

__all__ = ["SPLIT_ORDERS", "SUPERCLASS_ORDERS", "cifar100_split", "cifar100_superclasses", "own_heads", "superclasses"]

SPLIT_ORDERS = {
    "A": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "B": (1, 7, 4, 5, 2, 0, 8, 6, 9, 3),
    "C": (7, 0, 5, 1, 8, 4, 3, 6, 2, 9),
    "D": (5, 8, 2, 9, 0, 4, 3, 7, 6, 1),
    "E": (2, 9, 5, 4, 8, 0, 6, 1, 3, 7),
}
SUPERCLASS_ORDERS = {
    "A": tuple(range(20)),
    "B": (15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19),
    "C": (17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8),
    "D": (11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17),
    "E": (6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16),
}


def cifar100_split(order: str | Sequence[int] = "A", folder: str | Path | None = None) -> TaskStream:
    """Ten tasks of ten classes (5,000 + 1,000 images each).

    Args:
        order: a letter of ``SPLIT_ORDERS``, or a permutation of 0 .. 9.
        folder: of the data, as for ``load``.

    Raises:
        DataError: a missing, damaged or unreachable file. ValueError: an unknown order.
    """
    groups = [list(range(10 * k, 10 * k + 10)) for k in range(10)]
    return own_heads(load("cifar-100", folder), groups, _order(order, SPLIT_ORDERS))


def cifar100_superclasses(order: str | Sequence[int] = "A", folder: str | Path | None = None) -> TaskStream:
    """Twenty tasks of five classes, a superclass each (2,500 + 500 images); arguments and errors as ``cifar100_split``."""
    dataset = load("cifar-100", folder)
    coarse = cifar(CIFAR100_FILE, "coarse_labels", folder).train_y
    return own_heads(dataset, superclasses(dataset.train_y, coarse), _order(order, SUPERCLASS_ORDERS))


def superclasses(fine: np.ndarray, coarse: np.ndarray) -> list[list[int]]:
    """The fine labels of each coarse label, ascending.

    Raises:
        ValueError: labels of other lengths, or a fine label that stands with two coarse ones.
    """
    if np.shape(fine) != np.shape(coarse):
        raise ValueError(f"fine and coarse have shapes {np.shape(fine)} and {np.shape(coarse)}; one shape is needed")
    pairs = np.unique(np.stack([coarse, fine], axis=1), axis=0)
    if len(np.unique(pairs[:, 1])) < len(pairs):
        raise ValueError("coarse is no grouping of fine: some fine label stands with two coarse labels")
    return [pairs[pairs[:, 0] == k, 1].tolist() for k in range(int(pairs[:, 0].max()) + 1)]


def own_heads(
    dataset: Dataset,
    groups: Sequence[Sequence[int]],
    order: Sequence[int] | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    flatten: bool = False,
) -> TaskStream:
    """Task k holds the examples of the classes ``groups[k]``, labelled 0 .. C - 1 in that order.

    Args:
        dataset: images with classes.
        groups: classes of each task, all of one number C, no class twice.
        order: a permutation of 0 .. T - 1; None is the natural order.
        train_size, test_size: examples a task, drawn without replacement; None takes all.
        seed: non-negative; draws the examples.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k}.

    Raises:
        ValueError: groups of different sizes, a class twice or not in the data set, another argument out of range.
    """
    dealt = [[int(c) for c in group] for group in groups]
    flat = [c for group in dealt for c in group]
    sizes = {len(group) for group in dealt}
    if len(sizes) != 1 or 0 in sizes or len(set(flat)) < len(flat) or not set(flat) <= set(range(dataset.num_classes)):
        raise ValueError(
            f"groups is {dealt}; lists of one length are accepted, of different classes in 0 .. {dataset.num_classes - 1}"
        )
    natural = natural_order(order, len(dealt))
    check_seed(seed)

    def rows_of(labels: np.ndarray, use: int, size: int | None, argument: str) -> list[np.ndarray]:
        own = [np.flatnonzero(np.isin(labels, group)) for group in dealt]
        check_size(size, min(map(len, own)), argument, "in the smallest task")
        return [generator(seed, use, k).permutation(rows)[:size] for k, rows in enumerate(own)]

    train_rows = rows_of(dataset.train_y, EXAMPLES, train_size, "train_size")
    test_rows = rows_of(dataset.test_y, TEST_EXAMPLES, test_size, "test_size")

    def task(x: np.ndarray, y: np.ndarray, rows: np.ndarray, k: int) -> Task:
        labels = np.argmax(y[rows][:, None] == np.array(dealt[k]), axis=1).astype(np.int32)
        return Task({"x": shaped(x[rows], flatten), "y": labels}, {"task": np.int32(k)})

    image = dataset.train_x.shape[1:]
    settings = {"dataset": dataset.name, "shift": "own heads", "num_tasks": len(dealt), "groups": dealt}
    settings |= {"train_size": train_size, "test_size": test_size, "seed": seed, "order": list(natural)}
    return TaskStream(
        name=f"{dataset.name} in {len(dealt)} tasks",
        train=LazyTasks(
            lambda t: task(dataset.train_x, dataset.train_y, train_rows[natural[t]], natural[t]), len(dealt)
        ),
        test=LazyTasks(
            lambda t: task(dataset.test_x, dataset.test_y, test_rows[natural[t]], natural[t]), len(dealt), keep=True
        ),
        num_classes=sizes.pop(),
        input_shape=(int(np.prod(image)),) if flatten else image,
        settings=settings | {"flatten": flatten},
    )


def _order(order: str | Sequence[int], known: dict[str, tuple[int, ...]]) -> Sequence[int]:
    if isinstance(order, str):
        if order not in known:
            raise ValueError(f"order is {order!r}; accepted are {', '.join(known)} and a permutation of the tasks")
        return known[order]
    return order
