"""Streams whose tasks differ in their labels: some of the classes each, or the classes under other labels."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ssm_nn.models.datasets import Dataset
from ssm_nn.models.stream_making import (
    EXAMPLES,
    TEST_EXAMPLES,
    check_seed,
    check_size,
    draw_rows,
    generator,
    natural_order,
    permutation_of,
    settings_of,
    shaped,
    steps_of,
    stream_of,
)
from ssm_nn.models.task_streams import TaskStream
from ssm_nn.tasks import Task

__all__ = ["relabelled", "split"]


def split(
    dataset: Dataset,
    num_tasks: int = 5,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = True,
) -> TaskStream:
    """Task k holds the examples of its own classes: the K classes are dealt out in order, K / T to a task.

    Labels stay those of the data set (class-incremental): the network has K outputs from the start. The mask of the
    context restricts them to the task's own for a task-incremental reading. Where T does not divide K, the first tasks
    have one class more. Two tasks of the ten digits, 0 to 4 and 5 to 9, are disjoint MNIST: ``split(mnist, num_tasks=2)``.

    Args:
        dataset: images (N, H, W) or (N, H, W, C).
        num_tasks: T, at most K.
        train_size: training examples a task, drawn without replacement from those of its classes; None takes all.
        test_size: test examples a task, drawn likewise from the test split; None takes all.
        seed: non-negative; draws the examples.
        order: as for ``rotated``.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k; "classes": bool
        (K,), true for the task's own}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = natural_order(order, num_tasks)
    if num_tasks > dataset.num_classes:
        raise ValueError(f"num_tasks is {num_tasks}; {dataset.name} has {dataset.num_classes} classes to deal out")
    dealt = np.array_split(np.arange(dataset.num_classes), num_tasks)
    check_seed(seed)

    def rows_of(labels: np.ndarray, use: int, size: int | None, argument: str) -> list[np.ndarray]:
        own = [np.flatnonzero(np.isin(labels, classes)) for classes in dealt]
        check_size(size, min(map(len, own)), argument, "in the smallest task")
        return [generator(seed, use, k).permutation(rows)[:size] for k, rows in enumerate(own)]

    train_rows = rows_of(dataset.train_y, EXAMPLES, train_size, "train_size")
    test_rows = rows_of(dataset.test_y, TEST_EXAMPLES, test_size, "test_size")

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        mask = np.isin(np.arange(dataset.num_classes), dealt[k])
        return Task({"x": shaped(x, flatten), "y": y}, {"task": np.int32(k), "classes": mask})

    settings = settings_of(dataset, "split", num_tasks, train_size, test_size, seed, natural, flatten)
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | {"disjoint": True})


def relabelled(
    dataset: Dataset,
    num_tasks: int = 5,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = True,
) -> TaskStream:
    """Task k has the classes under other labels: label j stands for class P_k[j] of the data set, P_0 the identity.

    The context carries the step from the previous task of the stream to this one,

        y_{t-1} = permutation[y_t]                    for one and the same image, so that
        W_t = W_{t-1}[:, permutation],  b_t = b_{t-1}[permutation]
                                                      keep h @ W_t + b_t = (h @ W_{t-1} + b_{t-1})[:, permutation]

    where W (hidden, K) and b (K,) are the last layer; it is the identity for the first task of the stream.

    Args:
        dataset: images (N, H, W) or (N, H, W, C).
        num_tasks: T.
        train_size, test_size: as for ``rotated``.
        seed: non-negative; draws the examples and the permutations.
        order: as for ``rotated``.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k; "permutation": int32
        (K,)}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = natural_order(order, num_tasks)
    train_rows, test_rows, disjoint = draw_rows(dataset, num_tasks, train_size, test_size, seed)

    classes = partial(permutation_of, seed, dataset.num_classes)
    steps = steps_of(classes, natural)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        labels = np.argsort(classes(k))[y].astype(np.int32)
        return Task({"x": shaped(x, flatten), "y": labels}, {"task": np.int32(k), "permutation": steps[k]})

    settings = settings_of(dataset, "relabelled", num_tasks, train_size, test_size, seed, natural, flatten)
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | {"disjoint": disjoint})
