"""The drifting function is the random walk that it is said to be."""

import numpy as np
import pytest

from ssm_nn.models.drifting_regression import drifting_regression
from ssm_nn.tasks import stack_tasks


def test_targets_scatter_about_the_truth_by_the_noise():
    made = drifting_regression(num_tasks=6, size=4000, noise=0.25, seed=3)
    for tasks in (made.stream.train, made.stream.test):
        for t, task in enumerate(tasks):
            residual = task["y"] - made.truth(t, task["x"])
            assert residual.mean() == pytest.approx(0, abs=5 * 0.25 / np.sqrt(4000))
            assert residual.std() == pytest.approx(0.25, rel=5 / np.sqrt(2 * 4000))


def test_weights_walk_by_the_drift():
    made = drifting_regression(num_tasks=400, size=1, drift=0.2, num_features=50)
    steps = np.diff(made.weights, axis=0)
    assert steps.mean() == pytest.approx(0, abs=5 * 0.2 / np.sqrt(steps.size))
    assert steps.std() == pytest.approx(0.2, rel=5 / np.sqrt(2 * steps.size))
    assert abs(np.corrcoef(steps[1:].ravel(), steps[:-1].ravel())[0, 1]) < 5 / np.sqrt(steps.size)


def test_the_first_weights_are_standard_normal():
    first = np.concatenate([drifting_regression(1, 1, seed, num_features=50).weights[0] for seed in range(40)])
    assert first.mean() == pytest.approx(0, abs=5 / np.sqrt(first.size))
    assert first.std() == pytest.approx(1, rel=5 / np.sqrt(2 * first.size))


def test_without_drift_and_noise_one_function_fits_every_task():
    made = drifting_regression(num_tasks=3, size=30, drift=0.0, noise=0.0)
    for task in made.stream.train:
        np.testing.assert_allclose(task["y"], made.truth(0, task["x"]), atol=1e-6)


def test_the_truth_is_a_sum_of_bumps():
    made = drifting_regression(num_tasks=2, num_features=5)
    x, centres = np.array([-0.7, 0.0, 0.31]), [-1.0, -0.5, 0.0, 0.5, 1.0]
    expected = [
        sum(w * np.exp(-((p - c) ** 2) / (2 * 0.5**2)) for w, c in zip(made.weights[1], centres, strict=True))
        for p in x
    ]
    np.testing.assert_allclose(made.truth(1, x), expected)
    np.testing.assert_allclose(made.truth(1, x[:, None]), expected)


def test_it_is_a_function_of_its_arguments_and_stacks():
    first, again, other = (drifting_regression(seed=seed).stream for seed in (0, 0, 1))
    stacked = stack_tasks(first.train)
    assert stacked["x"].shape == (10, 20, 1)
    np.testing.assert_array_equal(stacked["y"], stack_tasks(again.train)["y"])
    assert not np.array_equal(stacked["y"], stack_tasks(other.train)["y"])
    np.testing.assert_array_equal(stacked.context["time"], np.arange(10))
    assert not np.array_equal(first.train[0]["x"], first.test[0]["x"])
    assert first.settings["shift"] == "drifting regression"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "num_tasks is 0; at least 1"),
        ({"size": 0}, "size is 0; at least 1"),
        ({"seed": -1}, "seed is -1; at least 0"),
        ({"num_features": 1}, "num_features is 1; at least 2"),
        ({"drift": -0.1}, "drift is -0.1; a finite non-negative number"),
        ({"noise": float("nan")}, "noise is nan; a finite non-negative number"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        drifting_regression(**arguments)
