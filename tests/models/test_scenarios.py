"""Streams with brightness shifts, other labels, irregular times, missing tasks, tasks that come again, in colour too."""

import itertools

import numpy as np
import pytest

from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.streams import (
    brightened,
    permuted,
    relabelled,
    repeating,
    rotated,
    rotated_at,
    split,
    without,
)
from ssm_nn.tasks import stack_tasks


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture
def colour(rng) -> Dataset:
    labels = np.arange(40, dtype=np.int32) % 4
    return Dataset(
        "colour",
        rng.random((40, 6, 6, 3), np.float32),
        labels,
        rng.random((12, 6, 6, 3), np.float32),
        labels[:12],
        4,
        "-",
    )


def rows(task) -> set[bytes]:
    return {x.tobytes() for x in task["x"]}


@pytest.mark.parametrize("make", [rotated, permuted, brightened, split, relabelled])
def test_colour_images_keep_their_shape_or_become_vectors(make, colour):
    image = make(colour, num_tasks=2, train_size=8, flatten=False)
    flat = make(colour, num_tasks=2, train_size=8, flatten=True)
    assert (image.input_shape, flat.input_shape) == ((6, 6, 3), (108,))
    for here, there in zip(image.train, flat.train, strict=True):
        assert (here["x"].shape, here["x"].dtype) == ((8, 6, 6, 3), np.float32)
        np.testing.assert_array_equal(here["x"].reshape(8, -1), there["x"])


def test_a_first_layer_moved_by_the_permutation_answers_alike_in_colour(colour, rng):
    tasks = list(permuted(colour, num_tasks=3, train_size=4, test_size=10).test)
    weights = rng.normal(size=(108, 5))
    outputs = tasks[0]["x"] @ weights
    for task in tasks[1:]:
        weights = weights[task.context["permutation"]]
        np.testing.assert_allclose(task["x"] @ weights, outputs, atol=1e-5)


def test_channels_of_rotated_images_turn_alike(colour):
    plain, turned = (rotated(colour, 2, step, train_size=5, flatten=False).train[1]["x"] for step in (0.0, 90.0))
    np.testing.assert_array_equal(turned, np.rot90(plain, axes=(1, 2)))


def test_brightness_and_contrast_are_those_of_the_context_and_clipped(digits):
    stream = brightened(digits, num_tasks=4, brightness=-0.2, contrast=1.5, train_size=30)
    plain = brightened(digits, num_tasks=4, brightness=0.0, train_size=30)
    for k, (task, before) in enumerate(zip(stream.train, plain.train, strict=True)):
        x = before["x"].astype(float)
        expected = np.clip(1.5**k * (x - 0.5) + 0.5 - 0.2 * k, 0, 1)
        np.testing.assert_allclose(task["x"], expected, atol=1e-6)
        gain, shift = task.context["gain"], task.context["shift"]
        np.testing.assert_allclose(np.clip(gain * x + shift, 0, 1), expected, atol=1e-6)
        assert (gain.dtype, shift.dtype, task["x"].dtype) == (np.float32,) * 3
        np.testing.assert_array_equal(task["y"], before["y"])
    np.testing.assert_array_equal(plain.train[0]["x"], stream.train[0]["x"])
    assert stream.train[3]["x"].min() == 0.0


def test_the_steps_of_the_labels_carry_each_task_into_the_next(digits, rng):
    order = [2, 0, 3, 1]
    stream = relabelled(digits, num_tasks=4, test_size=60, order=order, seed=3)
    tasks = list(stream.test)  # the same images in every task
    last = rng.normal(size=(64, 10))
    bias = rng.normal(size=10)
    logits = tasks[0]["x"] @ last + bias
    own = logits[np.arange(60), tasks[0]["y"]]
    np.testing.assert_array_equal(tasks[0].context["permutation"], np.arange(10))
    for before, here in itertools.pairwise(tasks):
        step = here.context["permutation"]
        assert step.dtype == np.int32
        np.testing.assert_array_equal(before["x"], here["x"])
        np.testing.assert_array_equal(step[here["y"]], before["y"])
        last, bias = last[:, step], bias[step]
        # whatever the labels are called, the network says of each image's own class what it said at first
        np.testing.assert_allclose((here["x"] @ last + bias)[np.arange(60), here["y"]], own)
    assert [int(task.context["task"]) for task in tasks] == order


def test_the_first_natural_task_keeps_its_labels_and_others_do_not(digits):
    stream, plain = relabelled(digits, num_tasks=3), rotated(digits, num_tasks=3, train_size=None, step=0.0)
    np.testing.assert_array_equal(stream.test[0]["y"], plain.test[0]["y"])
    for k in (1, 2):
        assert not np.array_equal(stream.test[k]["y"], plain.test[k]["y"])
        # one label for each class, and one class for each label
        assert len(set(zip(stream.test[k]["y"].tolist(), plain.test[k]["y"].tolist(), strict=True))) == 10


def test_equal_gaps_are_the_stream_of_even_steps(digits):
    even, timed = rotated(digits, 4, 7.0, 20), rotated_at(digits, [0, 1, 2, 3], 7.0, 20)
    for here, there in zip(even.train, timed.train, strict=True):
        np.testing.assert_array_equal(here["x"], there["x"])
        np.testing.assert_array_equal(here["y"], there["y"])
        assert here.context["angle"] == there.context["angle"]


def test_angles_follow_the_clock_and_gaps_say_how_long_it_was(digits):
    times = [1.0, 1.5, 4.0, 4.25]
    stream = rotated_at(digits, times, rate=8.0, train_size=5)
    contexts = [task.context for task in stream.train]
    assert [float(c["angle"]) for c in contexts] == [8.0, 12.0, 32.0, 34.0]
    assert [float(c["time"]) for c in contexts] == times
    assert [float(c["gap"]) for c in contexts] == [0.0, 0.5, 2.5, 0.25]
    assert all(value.dtype == np.float32 for c in contexts for value in c.values())
    assert stack_tasks(stream.train).context["gap"].shape == (4,)
    twelve = rotated(digits, 2, 12.0, test_size=9).test[1]
    np.testing.assert_array_equal(rotated_at(digits, times, rate=8.0, test_size=9).test[1]["x"], twelve["x"])


def test_a_missing_task_keeps_its_context_its_place_and_its_test(digits):
    stream = rotated_at(digits, [0, 1, 3], train_size=10)
    holed = without(stream, [1])
    assert [task.num_examples for task in holed.train] == [10, 0, 10]
    assert holed.train[1].context == stream.train[1].context
    np.testing.assert_array_equal(holed.train[2]["x"], stream.train[2]["x"])
    np.testing.assert_array_equal(holed.test[1]["x"], stream.test[1]["x"])
    stacked = stack_tasks(holed.train)
    np.testing.assert_array_equal(stacked.mask.sum(1), [10, 0, 10])
    assert holed.settings["without"] == [1]
    assert stream.train[1].num_examples == 10


@pytest.mark.parametrize("tasks", [[3], [-1], [0, 0], [0, 1, 2]])
def test_tasks_that_cannot_be_missing_are_named(tasks, digits):
    with pytest.raises(ValueError, match=r"different numbers among 0 ... 2 are accepted, but not all of them"):
        without(rotated(digits, 3), tasks)


def test_tasks_that_come_again_bring_other_examples_and_lose_none(digits):
    base = rotated(digits, num_tasks=3, step=90.0, train_size=25)
    visits = [0, 1, 0, 2, 0, 1]
    stream = repeating(base, visits)
    assert [int(task.context["task"]) for task in stream.train] == visits
    assert [float(task.context["angle"]) for task in stream.test] == [90.0 * k for k in visits]
    for k in range(3):
        parts = [rows(task) for task, base_k in zip(stream.train, visits, strict=True) if base_k == k]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 25
        assert set.union(*parts) == rows(base.train[k])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for task, k in zip(stream.test, visits, strict=True):
        np.testing.assert_array_equal(task["x"], base.test[k]["x"])
    assert stream.settings["visits"] == visits


@pytest.mark.parametrize("order", [None, [1, 2, 0]])
def test_permutations_are_those_from_the_visit_before(order, digits):
    visits = [2, 2, 0, 1, 0]
    tasks = list(repeating(permuted(digits, num_tasks=3, test_size=20, order=order), visits).test)
    np.testing.assert_array_equal(tasks[0].context["permutation"], np.arange(64))
    np.testing.assert_array_equal(tasks[1].context["permutation"], np.arange(64))
    for before, here in itertools.pairwise(tasks):
        np.testing.assert_array_equal(here["x"], before["x"][:, here.context["permutation"]])
    labels = list(repeating(relabelled(digits, num_tasks=3, test_size=20, order=order), visits).test)
    for before, here in itertools.pairwise(labels):
        np.testing.assert_array_equal(here.context["permutation"][here["y"]], before["y"])


def test_visits_that_cannot_be_made_are_named(digits):
    base = rotated(digits, num_tasks=2, train_size=2)
    for visits in ([], [2], [-1, 0]):
        with pytest.raises(ValueError, match=r"visits is .*; numbers among 0 ... 1 are accepted"):
            repeating(base, visits)
    with pytest.raises(ValueError, match="visits has 3 to task 0, which has 2 training examples"):
        _ = repeating(base, [0, 0, 0]).train[0]
    with pytest.raises(ValueError, match="tasks with a gap"):
        repeating(rotated_at(digits, [0, 1]), [0, 1, 0])


def test_a_missing_task_may_come_again_without_data(digits):
    stream = repeating(without(rotated(digits, 2, train_size=6), [1]), [1, 0, 1])
    assert [task.num_examples for task in stream.train] == [0, 6, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: brightened(d, brightness=float("nan")), "brightness is nan; a finite number"),
        (lambda d: brightened(d, contrast=0.0), "contrast is 0.0; a finite number > 0"),
        (lambda d: rotated_at(d, []), r"times is \[\]; finite numbers, each above the one before"),
        (lambda d: rotated_at(d, [0, 1, 1]), r"times is \[0, 1, 1\]; finite numbers"),
        (lambda d: rotated_at(d, [0, float("inf")]), "times is .*; finite numbers"),
        (lambda d: rotated_at(d, [0, 1], rate=float("nan")), "rate is nan; a finite number of degrees"),
    ],
)
def test_arguments_out_of_range_are_named(call, message, digits):
    with pytest.raises(ValueError, match=message):
        call(digits)


def test_disjoint_mnist_is_a_split_in_two(digits):
    stream = split(digits, num_tasks=2)
    assert [np.unique(task["y"]).tolist() for task in stream.train] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
