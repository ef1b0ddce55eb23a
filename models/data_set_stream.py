"""A task for each of several data sets, all as colour images of one size: the five data sets of the papers, or some of them.

Source of the sequence of five: Ebrahimi et al. 2020, "Adversarial continual learning" (arXiv 2003.09553): MNIST, CIFAR-10,
SVHN, Fashion-MNIST and notMNIST, whose images are brought to 32 x 32 x 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ssm_nn.models.datasets import Dataset
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

__all__ = ["FIVE", "in_colour", "of_data_sets"]

FIVE = ("mnist", "cifar-10", "svhn", "fashion-mnist", "notmnist")


def of_data_sets(
    datasets: Sequence[Dataset],
    order: Sequence[int] | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    side: int = 32,
    flatten: bool = False,
) -> TaskStream:
    """Task k is the k-th data set, with its own labels.

    Args:
        datasets: of one number of classes, such as ``[load(name) for name in FIVE]``.
        order: a permutation of 0 .. T - 1; None is the natural order.
        train_size, test_size: examples a task, drawn without replacement; None takes all.
        seed: non-negative; draws the examples.
        side: of all images.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 in [0, 1] (N, side, side, 3) and "y" int32, and the context {"task": int32, the number k}.

    Raises:
        ValueError: no data set, different numbers of classes, images larger than ``side``, another argument out of range.
    """
    found = {data.name: data.num_classes for data in datasets}
    if not found or len(set(found.values())) != 1:
        raise ValueError(f"datasets have {found or 'no'} classes; data sets of one number of classes are accepted")
    natural = natural_order(order, len(datasets))
    check_seed(seed)
    for data in datasets:
        if max(data.train_x.shape[1:3]) > side:
            raise ValueError(f"side is {side}; {data.name} has images of {data.train_x.shape[1:3]}, which are not cut")
        check_size(train_size, len(data.train_y), "train_size", f"in {data.name}")
        check_size(test_size, len(data.test_y), "test_size", f"in {data.name}")

    def task(k: int, use: int) -> Task:
        data, test = datasets[k], use == TEST_EXAMPLES
        x, y = (data.test_x, data.test_y) if test else (data.train_x, data.train_y)
        rows = generator(seed, use, k).permutation(len(y))[: test_size if test else train_size]
        return Task({"x": shaped(in_colour(x[rows], side), flatten), "y": y[rows]}, {"task": np.int32(k)})

    names = [data.name for data in datasets]
    settings = {"dataset": names, "shift": "data sets", "num_tasks": len(names), "order": list(natural), "seed": seed}
    return TaskStream(
        name=f"{len(names)} data sets",
        train=LazyTasks(lambda t: task(natural[t], EXAMPLES), len(names)),
        test=LazyTasks(lambda t: task(natural[t], TEST_EXAMPLES), len(names), keep=True),
        num_classes=next(iter(found.values())),
        input_shape=(3 * side**2,) if flatten else (side, side, 3),
        settings=settings | {"train_size": train_size, "test_size": test_size, "flatten": flatten},
    )


def in_colour(x: Float[np.ndarray, "n h w *c"], side: int) -> Float[np.ndarray, "n s s 3"]:
    """A border of zeros around, and grey in all three channels."""
    before = [(side - n) // 2 for n in x.shape[1:3]]
    after = [side - n - b for n, b in zip(x.shape[1:3], before, strict=True)]
    borders = [(0, 0), *zip(before, after, strict=True), *[(0, 0)] * (x.ndim - 3)]
    framed = np.pad(x, borders)
    return framed if x.ndim == 4 else np.repeat(framed[..., None], 3, axis=-1)
