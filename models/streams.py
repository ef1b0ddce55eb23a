"""Seeded streams of classification tasks made from one data set: rotated, permuted, split.

A stream is a function of its arguments alone. Each task has a natural number k; ``order`` says in which order the tasks
come, and changes nothing else: task k holds the same examples wherever it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import numpy as np
from jaxtyping import Float
from scipy import sparse

from ssm_nn.models.datasets import Dataset
from ssm_nn.tasks import Task

__all__ = ["LazyTasks", "TaskStream", "permuted", "rotated", "rotation", "split"]

# One child of the seed for each use, so that no two uses draw from one stream of random numbers.
_EXAMPLES, _TEST_EXAMPLES, _PERMUTATIONS = range(3)


class LazyTasks(Sequence[Task]):
    """Tasks 0 ... T - 1, each made when it is asked for.

    Args:
        make: task number -> Task; called once more each time a task is asked for, unless ``keep``.
        num_tasks: T.
        keep: hold on to tasks once they are made.
    """

    def __init__(self, make: Callable[[int], Task], num_tasks: int, keep: bool = False):
        self._make = cache(make) if keep else make
        self._num_tasks = num_tasks

    def __len__(self) -> int:
        return self._num_tasks

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._make(t) for t in range(self._num_tasks)[index]]
        try:
            return self._make(range(self._num_tasks)[index])
        except IndexError:
            raise IndexError(f"task {index} was asked for, but there are {self._num_tasks} tasks") from None


@dataclass(frozen=True, eq=False)
class TaskStream:
    """A stream of T tasks.

    Attributes:
        name: ``"rotated digits"`` for example.
        train: T tasks, made when they are asked for.
        test: T tasks of examples that no training task holds, kept once they are made.
        num_classes: labels are 0 ... num_classes - 1; None where the targets are numbers.
        input_shape: shape of one input, (D,) where images are flattened.
        settings: the arguments that made the stream, as numbers, strings, booleans, lists and None.
    """

    name: str
    train: Sequence[Task]
    test: Sequence[Task]
    num_classes: int | None
    input_shape: tuple[int, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.train)


def rotated(
    dataset: Dataset,
    num_tasks: int = 10,
    step: float = 5.0,
    train_size: int | None = 50,
    test_size: int | None = None,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = True,
) -> TaskStream:
    """Task k holds images turned counter-clockwise by k * step degrees (bilinear, zero outside the image).

    Args:
        dataset: images (N, H, W).
        num_tasks: T.
        step: degrees from one task to the next in the natural order.
        train_size: training examples a task, drawn without replacement. While T * train_size examples are there, no two
            tasks share one; else each task draws by itself, and tasks overlap. None takes all of them in every task.
        test_size: test examples a task, the same images in every task; None takes all of them.
        seed: non-negative; draws the examples.
        order: a permutation of 0 ... T - 1, the natural numbers of the tasks in the order in which they come.
        flatten: inputs are (H * W,) instead of (H, W).

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"angle": float32, degrees}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = _order(order, num_tasks)
    if not np.isfinite(step):
        raise ValueError(f"step is {step}; a finite number of degrees is needed")
    train_rows, test_rows, disjoint = _rows(dataset, num_tasks, train_size, test_size, seed)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        turned = _turn(x, k * step)
        return Task({"x": _shaped(turned, flatten), "y": y}, {"angle": np.float32(k * step)})

    settings = _settings(dataset, "rotated", num_tasks, train_size, test_size, seed, natural, flatten)
    return _stream(dataset, natural, train_rows, test_rows, task, settings | {"step": step, "disjoint": disjoint})


def permuted(
    dataset: Dataset,
    num_tasks: int = 10,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = True,
) -> TaskStream:
    """Task k holds images whose pixels are permuted: x_k[:, i] = x[:, P_k[i]], with P_0 the identity.

    The context carries the step from the previous task of the stream to this one,

        x_t[:, i] = x_{t-1}[:, permutation[i]]        for one and the same image, so that
        W_t = W_{t-1}[permutation]                    keeps x_t @ W_t = x_{t-1} @ W_{t-1}

    where W has the inputs as rows; it is the identity for the first task of the stream.

    Args:
        dataset: images (N, H, W).
        num_tasks: T.
        train_size, test_size: as for ``rotated``.
        seed: non-negative; draws the examples and the permutations.
        order: as for ``rotated``.
        flatten: inputs are (D,) with D = H * W, instead of (H, W). Pixels are numbered row by row in either case.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k; "permutation": int32
        (D,)}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = _order(order, num_tasks)
    train_rows, test_rows, disjoint = _rows(dataset, num_tasks, train_size, test_size, seed)
    num_pixels = int(np.prod(dataset.train_x.shape[1:]))
    before = dict(zip(natural[1:], natural[:-1], strict=True))

    def pixels(k: int) -> np.ndarray:
        """P_k."""
        return _generator(seed, _PERMUTATIONS, k).permutation(num_pixels) if k else np.arange(num_pixels)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        here, previous = pixels(k), pixels(before.get(k, k))
        relative = np.argsort(previous)[here].astype(np.int32)
        shuffled = x.reshape(len(x), -1)[:, here].reshape(x.shape)
        return Task({"x": _shaped(shuffled, flatten), "y": y}, {"task": np.int32(k), "permutation": relative})

    settings = _settings(dataset, "permuted", num_tasks, train_size, test_size, seed, natural, flatten)
    return _stream(dataset, natural, train_rows, test_rows, task, settings | {"disjoint": disjoint})


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
    have one class more.

    Args:
        dataset: images (N, H, W).
        num_tasks: T, at most K.
        train_size: training examples a task, drawn without replacement from those of its classes; None takes all.
        test_size: test examples a task, drawn likewise from the test split; None takes all.
        seed: non-negative; draws the examples.
        order: as for ``rotated``.
        flatten: inputs are (H * W,) instead of (H, W).

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k; "classes": bool
        (K,), true for the task's own}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = _order(order, num_tasks)
    if num_tasks > dataset.num_classes:
        raise ValueError(f"num_tasks is {num_tasks}; {dataset.name} has {dataset.num_classes} classes to deal out")
    dealt = np.array_split(np.arange(dataset.num_classes), num_tasks)
    _check_seed(seed)

    def rows_of(labels: np.ndarray, use: int, size: int | None, argument: str) -> list[np.ndarray]:
        own = [np.flatnonzero(np.isin(labels, classes)) for classes in dealt]
        _check_size(size, min(map(len, own)), argument, "in the smallest task")
        return [_generator(seed, use, k).permutation(rows)[:size] for k, rows in enumerate(own)]

    train_rows = rows_of(dataset.train_y, _EXAMPLES, train_size, "train_size")
    test_rows = rows_of(dataset.test_y, _TEST_EXAMPLES, test_size, "test_size")

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        mask = np.isin(np.arange(dataset.num_classes), dealt[k])
        return Task({"x": _shaped(x, flatten), "y": y}, {"task": np.int32(k), "classes": mask})

    settings = _settings(dataset, "split", num_tasks, train_size, test_size, seed, natural, flatten)
    return _stream(dataset, natural, train_rows, test_rows, task, settings | {"disjoint": True})


def rotation(height: int, width: int, degrees: float) -> sparse.csr_array:
    """The (H * W, H * W) matrix that turns an image, pixels numbered row by row, counter-clockwise about its middle.

    Bilinear interpolation, zero outside the image; a row has at most four entries. With rows pointing down, the pixel
    (r, c) off the middle takes the value at (r cos a + c sin a, c cos a - r sin a).
    """
    angle = np.deg2rad(degrees)
    middle = (height - 1) / 2, (width - 1) / 2
    target = np.indices((height, width)).reshape(2, -1)
    down, right = target[0] - middle[0], target[1] - middle[1]
    source_row = np.cos(angle) * down + np.sin(angle) * right + middle[0]
    source_column = np.cos(angle) * right - np.sin(angle) * down + middle[1]
    # Where a position is a pixel but for rounding, it is that pixel: quarter turns are then exact.
    source_row, source_column = np.round(source_row, 9), np.round(source_column, 9)
    top, left = np.floor(source_row).astype(int), np.floor(source_column).astype(int)
    rows, columns, weights = [], [], []
    for row_offset, column_offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + row_offset, left + column_offset
        weight = (1 - np.abs(source_row - row)) * (1 - np.abs(source_column - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (weight > 0)
        rows.append(np.flatnonzero(inside))
        columns.append((row * width + column)[inside])
        weights.append(weight[inside])
    size = height * width
    entries = np.concatenate(weights).astype(np.float32)
    return sparse.csr_array((entries, (np.concatenate(rows), np.concatenate(columns))), shape=(size, size))


def _turn(x: Float[np.ndarray, "n h w"], degrees: float) -> Float[np.ndarray, "n h w"]:
    if degrees == 0:
        return x
    pixels = x.reshape(len(x), -1)
    return np.ascontiguousarray((rotation(x.shape[1], x.shape[2], degrees) @ pixels.T).T).reshape(x.shape)


def _shaped(x: np.ndarray, flatten: bool) -> np.ndarray:
    return x.reshape(len(x), -1) if flatten else x


def _stream(
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


def _rows(
    dataset: Dataset, num_tasks: int, train_size: int | None, test_size: int | None, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Rows of the training and of the test examples for each natural number k; whether no two tasks share a row."""
    _check_seed(seed)
    num_train, num_test = len(dataset.train_x), len(dataset.test_x)
    _check_size(train_size, num_train, "train_size", f"in {dataset.name}")
    _check_size(test_size, num_test, "test_size", f"in the test split of {dataset.name}")
    size = num_train if train_size is None else train_size
    disjoint = num_tasks * size <= num_train
    if disjoint:
        shuffled = _generator(seed, _EXAMPLES).permutation(num_train)
        train = [shuffled[k * size : (k + 1) * size] for k in range(num_tasks)]
    else:
        train = [_generator(seed, _EXAMPLES, k).permutation(num_train)[:size] for k in range(num_tasks)]
    test = _generator(seed, _TEST_EXAMPLES).permutation(num_test)[:test_size]
    return train, [test] * num_tasks, disjoint


def _generator(seed: int, *use: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))


def _settings(
    dataset: Dataset,
    shift: str,
    num_tasks: int,
    train_size: int | None,
    test_size: int | None,
    seed: int,
    natural: tuple[int, ...],
    flatten: bool,
) -> dict[str, Any]:
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


def _order(order: Sequence[int] | None, num_tasks: int) -> tuple[int, ...]:
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}; at least 1 is needed")
    if order is None:
        return tuple(range(num_tasks))
    if sorted(order) != list(range(num_tasks)):
        raise ValueError(f"order is {list(order)}; a permutation of 0 ... {num_tasks - 1} is needed")
    return tuple(int(k) for k in order)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed is {seed}; a non-negative integer is needed")


def _check_size(size: int | None, available: int, argument: str, where: str) -> None:
    if size is not None and not 1 <= size <= available:
        raise ValueError(f"{argument} is {size}; accepted are 1 to {available} (the examples {where}) and None for all")
