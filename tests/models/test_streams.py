"""The shifts do what they say, and a stream is a function of its arguments."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.streams import LazyTasks, brightened, permuted, relabelled, rotated, rotation, split
from ssm_nn.tasks import Task, stack_tasks

STREAMS = {
    "rotated": rotated, "permuted": permuted, "brightened": brightened, "split": split, "relabelled": relabelled
}  # fmt: skip
STILL = {rotated: {"step": 0.0}, brightened: {"brightness": 0.0}}  # arguments that leave the inputs as they are
each_stream = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def numbered(num_train=60, num_test=20, image=(3, 4), num_classes=5) -> Dataset:
    """Images that carry their number in every pixel, in 128ths: training images 0, 1, ..., test images 100, 101, ..."""

    def images(numbers):
        return np.broadcast_to(np.float32(numbers)[:, None, None] / 128, (len(numbers), *image))

    train, test = images(np.arange(num_train)), images(100 + np.arange(num_test))
    labels = np.arange(num_train, dtype=np.int32) % num_classes, np.arange(num_test, dtype=np.int32) % num_classes
    return Dataset("numbered", train, labels[0], test, labels[1], num_classes, "made here")


def numbers(tasks) -> list[set[int]]:
    return [set(np.rint(128 * task["x"].reshape(len(task["y"]), -1)[:, 0]).astype(int)) for task in tasks]


@pytest.mark.parametrize("image", [(8, 8), (28, 28), (9, 9), (6, 11)])
@pytest.mark.parametrize("degrees", [5.0, -37.5, 120.0, 359.0])
def test_rotation_is_scipys_bilinear_one(image: tuple[int, int], degrees, rng):
    x = rng.random(image)
    ours = (rotation(*image, degrees) @ x.ravel()).reshape(image)
    theirs = ndimage.rotate(x, degrees, reshape=False, order=1, mode="grid-constant")
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("size", [8, 9, 28])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4, -1])
def test_quarter_turns_are_exact_and_counter_clockwise(size, quarters, rng):
    x = rng.random((size, size)).astype(np.float32)
    turned = (rotation(size, size, 90.0 * quarters) @ x.ravel()).reshape(size, size)
    np.testing.assert_array_equal(turned, np.rot90(x, quarters))


def test_rotation_keeps_grey_values_in_range(digits):
    for task in rotated(digits, num_tasks=4, step=33.0).test:
        assert 0 <= task["x"].min() <= task["x"].max() <= 1


def test_rotated_tasks_are_their_images_turned(digits):
    stream = rotated(digits, num_tasks=3, step=30.0, train_size=20, test_size=7, flatten=False)
    plain = rotated(digits, num_tasks=3, step=0.0, train_size=20, test_size=7, flatten=False)
    for k in range(3):
        for here, there in ((stream.train[k], plain.train[k]), (stream.test[k], plain.test[k])):
            expected = ndimage.rotate(
                there["x"].astype(float), 30.0 * k, axes=(2, 1), reshape=False, order=1, mode="grid-constant"
            )
            expected_too = np.stack(
                [
                    ndimage.rotate(x.astype(float), 30.0 * k, reshape=False, order=1, mode="grid-constant")
                    for x in there["x"]
                ]
            )
            np.testing.assert_allclose(expected, expected_too, atol=1e-12)
            np.testing.assert_allclose(here["x"], expected, atol=1e-6)
            np.testing.assert_array_equal(here["y"], there["y"])
        assert stream.train[k].context["angle"] == np.float32(30.0 * k)
        assert stream.train[k].context["angle"].dtype == np.float32


def test_labels_stay_with_their_images(digits):
    """The nearest neighbour in the whole data set is the image itself, under its own label."""
    pixels, labels = digits.train_x.reshape(-1, 64), digits.train_y
    for stream in (rotated(digits, num_tasks=2, step=0.0, train_size=30), split(digits, num_tasks=2, train_size=30)):
        for task in stream.train:
            nearest = ((task["x"][:, None] - pixels) ** 2).sum(-1).argmin(axis=1)
            np.testing.assert_array_equal(labels[nearest], task["y"])


def test_the_relative_permutations_carry_each_task_into_the_next(digits):
    order = [2, 0, 3, 1]
    stream = permuted(digits, num_tasks=4, test_size=30, seed=5, order=order)
    tasks = list(stream.test)  # the same images in every task
    np.testing.assert_array_equal(tasks[0].context["permutation"], np.arange(64))
    for before, here in itertools.pairwise(tasks):
        relative = here.context["permutation"]
        assert sorted(relative) == list(range(64))
        assert not np.array_equal(relative, np.arange(64))
        np.testing.assert_array_equal(here["x"], before["x"][:, relative])
    assert [int(task.context["task"]) for task in tasks] == order


def test_a_first_layer_moved_by_the_permutation_computes_the_same(digits, rng):
    tasks = list(permuted(digits, num_tasks=3, test_size=10).test)
    weights = rng.normal(size=(64, 5))
    outputs = tasks[0]["x"] @ weights
    for task in tasks[1:]:
        weights = weights[task.context["permutation"]]
        np.testing.assert_allclose(task["x"] @ weights, outputs, atol=1e-6)


def test_the_first_natural_task_is_not_permuted(digits):
    plain = rotated(digits, num_tasks=1, test_size=30, step=0.0, seed=3)
    np.testing.assert_array_equal(permuted(digits, test_size=30, seed=3).test[0]["x"], plain.test[0]["x"])


def test_images_are_permuted_alike_flat_or_not(digits):
    flat = permuted(digits, num_tasks=2, test_size=5)
    image = permuted(digits, num_tasks=2, test_size=5, flatten=False)
    assert (flat.input_shape, image.input_shape) == ((64,), (8, 8))
    assert image.test[1]["x"].shape == (5, 8, 8)
    np.testing.assert_array_equal(flat.test[1]["x"], image.test[1]["x"].reshape(5, 64))


def test_split_deals_out_the_classes(digits):
    stream = split(digits, num_tasks=4, order=[3, 0, 1, 2])
    for k, own, task in zip([3, 0, 1, 2], [[8, 9], [0, 1, 2], [3, 4, 5], [6, 7]], stream.train, strict=True):
        assert np.unique(task["y"]).tolist() == own
        assert np.flatnonzero(task.context["classes"]).tolist() == own
        assert task.context["task"] == k
    assert sum(len(task["y"]) for task in stream.train) == len(digits.train_y)
    assert sum(len(task["y"]) for task in stream.test) == len(digits.test_y)


@each_stream
def test_training_tasks_are_disjoint_while_examples_remain(make):
    stream = make(numbered(), num_tasks=5, train_size=12, **STILL.get(make, {}))
    tasks = numbers(stream.train)
    assert [len(task) for task in tasks] == [12] * 5
    assert len(set.union(*tasks)) == 60
    assert stream.settings["disjoint"] is True


@pytest.mark.parametrize("make", [rotated, permuted, relabelled])
def test_training_tasks_overlap_when_examples_run_out_but_never_repeat_one(make):
    stream = make(numbered(), num_tasks=5, train_size=13, **STILL.get(make, {}))
    tasks = numbers(stream.train)
    assert [len(task) for task in tasks] == [13] * 5
    assert len({frozenset(task) for task in tasks}) == 5
    assert stream.settings["disjoint"] is False


@each_stream
def test_no_test_example_is_trained_on(make):
    stream = make(numbered(), num_tasks=5, train_size=None, **STILL.get(make, {}))
    assert all(max(task) < 100 for task in numbers(stream.train))
    assert all(min(task) >= 100 for task in numbers(stream.test))


@each_stream
def test_a_stream_is_a_function_of_its_arguments(make, digits):
    def same(left, right):
        return all(np.array_equal(left[name], right[name]) for name in ("x", "y"))

    first, again, other = (make(digits, num_tasks=3, train_size=40, seed=seed) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first.train, again.train, strict=True))
    assert all(same(a, b) for a, b in zip(first.test, again.test, strict=True))
    assert not any(same(a, b) for a, b in zip(first.train, other.train, strict=True))
    assert first.settings == again.settings != other.settings
    # Whichever task is asked for first.
    assert same(again.train[2], first.train[2])


@each_stream
def test_an_order_moves_whole_tasks(make, digits):
    natural, moved = make(digits, num_tasks=3, train_size=40), make(digits, num_tasks=3, train_size=40, order=[2, 0, 1])
    for t, k in enumerate([2, 0, 1]):
        for name in ("x", "y"):
            np.testing.assert_array_equal(moved.train[t][name], natural.train[k][name])
            np.testing.assert_array_equal(moved.test[t][name], natural.test[k][name])


@each_stream
def test_tasks_stack(make, digits):
    stream = make(digits, num_tasks=3, train_size=10)
    stacked = stack_tasks(stream.train)
    assert stacked["x"].shape == ((3, 10, 8, 8) if make is brightened else (3, 10, 64))
    assert (stacked["x"].dtype, stacked["y"].dtype) == (np.float32, np.int32)
    assert len(stream) == 3
    assert stream.num_classes == 10


@each_stream
def test_names_and_settings_say_what_the_stream_is(make, digits):
    stream = make(digits, num_tasks=2, train_size=10, test_size=5, seed=4)
    shift = next(name for name, each in STREAMS.items() if each is make)
    assert stream.name == f"{shift} digits"
    told = {"dataset": "digits", "shift": shift, "num_tasks": 2, "train_size": 10, "test_size": 5, "seed": 4}
    assert told.items() <= stream.settings.items()


@each_stream
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "num_tasks is 0; at least 1"),
        ({"num_tasks": 3, "order": [0, 1, 1]}, r"order is \[0, 1, 1\]; a permutation of 0 ... 2"),
        ({"num_tasks": 3, "order": [0, 1]}, r"order is \[0, 1\]; a permutation"),
        ({"train_size": 0}, "train_size is 0; accepted are 1 to"),
        ({"train_size": 61}, "train_size is 61; accepted are 1 to"),
        ({"test_size": 21}, "test_size is 21; accepted are 1 to"),
        ({"seed": -1}, "seed is -1; a non-negative integer"),
    ],
)
def test_arguments_out_of_range_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(numbered(), **arguments)


def test_arguments_of_one_shift_out_of_range_are_named():
    with pytest.raises(ValueError, match="step is nan; a finite number of degrees"):
        rotated(numbered(), step=float("nan"))
    with pytest.raises(ValueError, match="num_tasks is 6; numbered has 5 classes"):
        split(numbered(), num_tasks=6)


def test_lazy_tasks_are_made_when_asked_for_and_kept_only_on_request():
    for keep, calls in ((False, [1, 2, 1, 2]), (True, [1, 2])):
        made = []
        tasks = LazyTasks(lambda t, made=made: made.append(t) or Task({"y": np.zeros(t + 1)}), 3, keep)
        assert (len(tasks), made) == (3, [])
        assert tasks[1].num_examples == 2
        assert tasks[-1].num_examples == 3
        assert [task.num_examples for task in tasks[1:]] == [2, 3]
        assert made == calls
        with pytest.raises(IndexError, match="task 3 was asked for, but there are 3 tasks"):
            tasks[3]
        assert [task.num_examples for task in tasks] == [1, 2, 3]
