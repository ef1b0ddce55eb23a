"""Streams whose tasks differ in their inputs: rotated, at irregular times too, permuted, brightened images."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ssm_nn.models.datasets import Dataset
from ssm_nn.models.rotations import turned
from ssm_nn.models.stream_making import (
    draw_rows,
    natural_order,
    permutation_of,
    settings_of,
    shaped,
    steps_of,
    stream_of,
)
from ssm_nn.models.task_streams import TaskStream
from ssm_nn.tasks import Task

__all__ = ["brightened", "permuted", "rotated", "rotated_at"]


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
    """Task k holds images turned counter-clockwise by k * step degrees (bilinear, zero outside the image,
    each channel by itself).

    Args:
        dataset: images (N, H, W) or (N, H, W, C).
        num_tasks: T.
        step: degrees from one task to the next in the natural order.
        train_size: training examples a task, drawn without replacement. While T * train_size examples are there, no two
            tasks share one; else each task draws by itself, and tasks overlap. None takes all of them in every task.
        test_size: test examples a task, the same images in every task; None takes all of them.
        seed: non-negative; draws the examples.
        order: a permutation of 0 ... T - 1, the natural numbers of the tasks in the order in which they come.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"angle": float32, degrees}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = natural_order(order, num_tasks)
    if not np.isfinite(step):
        raise ValueError(f"step is {step}; a finite number of degrees is needed")
    train_rows, test_rows, disjoint = draw_rows(dataset, num_tasks, train_size, test_size, seed)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        return Task({"x": shaped(turned(x, k * step), flatten), "y": y}, {"angle": np.float32(k * step)})

    settings = settings_of(dataset, "rotated", num_tasks, train_size, test_size, seed, natural, flatten)
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | {"step": step, "disjoint": disjoint})


def rotated_at(
    dataset: Dataset,
    times: Sequence[float],
    rate: float = 5.0,
    train_size: int | None = 50,
    test_size: int | None = None,
    seed: int = 0,
    flatten: bool = True,
) -> TaskStream:
    """Task k comes at time t_k and holds images turned counter-clockwise by rate * t_k degrees.

    The gap t_k - t_{k-1} travels in the context, so that a kernel can move the weights in proportion to it. Equal gaps of 1
    from t_0 = 0 on are ``rotated`` with the step ``rate``.

    Args:
        dataset: images (N, H, W) or (N, H, W, C).
        times: t_0 < t_1 < ..., in any unit.
        rate: degrees in a unit of time.
        train_size, test_size, seed, flatten: as for ``rotated``.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"angle": degrees; "time": t_k; "gap": t_k - t_{k-1}, 0 for
        the first}, all float32.

    Raises:
        ValueError: an argument out of range.
    """
    moments = np.asarray(times, np.float64)
    if moments.ndim != 1 or not len(moments) or not np.all(np.isfinite(moments)) or np.any(np.diff(moments) <= 0):
        raise ValueError(f"times is {times}; finite numbers, each above the one before, are accepted, one or more")
    if not np.isfinite(rate):
        raise ValueError(f"rate is {rate}; a finite number of degrees in a unit of time is needed")
    train_rows, test_rows, disjoint = draw_rows(dataset, len(moments), train_size, test_size, seed)
    gaps = np.diff(moments, prepend=moments[0])

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        angle = rate * float(moments[k])
        context = {"angle": np.float32(angle), "time": np.float32(moments[k]), "gap": np.float32(gaps[k])}
        return Task({"x": shaped(turned(x, angle), flatten), "y": y}, context)

    natural = natural_order(None, len(moments))
    settings = settings_of(dataset, "rotated-at", len(moments), train_size, test_size, seed, natural, flatten)
    more = {"times": moments.tolist(), "rate": rate, "disjoint": disjoint}
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | more)


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
        dataset: images (N, H, W) or (N, H, W, C).
        num_tasks: T.
        train_size, test_size: as for ``rotated``.
        seed: non-negative; draws the examples and the permutations.
        order: as for ``rotated``.
        flatten: inputs are (D,) with D = H * W * C, instead of images. The D values are numbered row by row, the channels of
            a pixel in a row, in either case.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"task": int32, the natural number k; "permutation": int32
        (D,)}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = natural_order(order, num_tasks)
    train_rows, test_rows, disjoint = draw_rows(dataset, num_tasks, train_size, test_size, seed)
    num_pixels = int(np.prod(dataset.train_x.shape[1:]))

    pixels = partial(permutation_of, seed, num_pixels)
    steps = steps_of(pixels, natural)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        shuffled = x.reshape(len(x), -1)[:, pixels(k)].reshape(x.shape)
        return Task({"x": shaped(shuffled, flatten), "y": y}, {"task": np.int32(k), "permutation": steps[k]})

    settings = settings_of(dataset, "permuted", num_tasks, train_size, test_size, seed, natural, flatten)
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | {"disjoint": disjoint})


def brightened(
    dataset: Dataset,
    num_tasks: int = 5,
    brightness: float = 0.1,
    contrast: float = 1.0,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = False,
) -> TaskStream:
    """Task k holds images with another brightness and contrast about mid-grey, as from another scanner:

        x_k = clip(gain_k x + shift_k, 0, 1),   gain_k = contrast^k,   shift_k = k brightness + (1 - gain_k) / 2

    A covariate shift: labels keep their meaning, and task 0 is the data set itself. Values that are clipped are lost.

    Args:
        dataset: images (N, H, W) or (N, H, W, C), all channels treated alike.
        num_tasks: T.
        brightness: added from one task to the next, of either sign.
        contrast: factor from one task to the next, > 0.
        train_size, test_size, seed, order: as for ``rotated``.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 and "y" int32, and the context {"gain": float32, "shift": float32}.

    Raises:
        ValueError: an argument out of range.
    """
    natural = natural_order(order, num_tasks)
    if not np.isfinite(brightness):
        raise ValueError(f"brightness is {brightness}; a finite number is accepted")
    if not 0 < contrast < np.inf:
        raise ValueError(f"contrast is {contrast}; a finite number > 0 is accepted")
    train_rows, test_rows, disjoint = draw_rows(dataset, num_tasks, train_size, test_size, seed)

    def task(x: np.ndarray, y: np.ndarray, k: int) -> Task:
        gain = np.float32(contrast**k)
        shift = np.float32(k * brightness + (1 - contrast**k) / 2)
        return Task({"x": shaped(np.clip(gain * x + shift, 0, 1), flatten), "y": y}, {"gain": gain, "shift": shift})

    settings = settings_of(dataset, "brightened", num_tasks, train_size, test_size, seed, natural, flatten)
    more = {"brightness": brightness, "contrast": contrast, "disjoint": disjoint}
    return stream_of(dataset, natural, train_rows, test_rows, task, settings | more)
