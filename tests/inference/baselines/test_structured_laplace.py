"""Online structured Laplace with summed factors, on models whose factors can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.baselines.structured_laplace import StructuredLaplace
from ssm_nn.inference.kronecker import Kronecker
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.predictive import AtMean, predict_from
from ssm_nn.inference.structures import Diagonal
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification, regression
from ssm_nn.models.streams import permuted
from ssm_nn.tasks import Task

PRIOR, NOISE, SIZE = 0.7, 0.3, 4


def engine(structure=None, power=1.0):
    def linear(params, x):
        return (x @ params["w"])[:, 0]

    program = regression((linear, {"w": jnp.full((SIZE, 1), 0.25)}), NOISE, PRIOR)
    structure = Kronecker() if structure is None else structure
    return LaplaceFilter(program, structure, hypers={"noise.all": 0.0}, estimator=Lbfgs(tolerance=1e-10), power=power)


def tasks(rng, sizes=(8, 5, 9)):
    return [Task({"x": rng.normal(size=(n, SIZE)), "y": rng.normal(size=n)}) for n in sizes]


@pytest.mark.usefixtures("x64")
def test_it_follows_its_recursion_at_any_strength_and_power(rng):
    strength, power = 2.5, 1.7
    stream = tasks(rng)
    beliefs = StructuredLaplace(engine(power=power), strength).run(0, stream)
    mean, inputs, outputs = np.zeros(SIZE), np.zeros((SIZE, SIZE)), 0.0
    precision = np.eye(SIZE) / PRIOR**2
    for t, (task, belief) in enumerate(zip(stream, beliefs, strict=True)):
        x, y = task["x"], task["y"]
        matrix = power * x.T @ x / NOISE**2 + precision
        mean = np.linalg.solve(matrix, power * x.T @ y / NOISE**2 + precision @ mean)
        inputs += x.T @ x / len(x)
        outputs += power * len(x) / NOISE**2
        precision = np.eye(SIZE) / PRIOR**2 + strength / (t + 1) * inputs * outputs
        np.testing.assert_allclose(belief.mean, mean, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(belief.precision.to_dense(), precision, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_tasks_with_equal_inputs_give_the_exact_posterior(rng):
    x = rng.normal(size=(7, SIZE))
    stream = [Task({"x": x, "y": rng.normal(size=7)}) for _ in range(3)]
    belief = StructuredLaplace(engine()).run(0, stream)[-1]
    precision = 3 * x.T @ x / NOISE**2 + np.eye(SIZE) / PRIOR**2
    mean = np.linalg.solve(precision, sum(x.T @ task["y"] for task in stream) / NOISE**2)
    np.testing.assert_allclose(belief.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(belief.precision.to_dense(), precision, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_task_without_data_changes_nothing(rng):
    method = StructuredLaplace(engine())
    state, _ = method.update(method.init(0, tasks(rng)[0]), tasks(rng)[0])
    after, found = method.update(state, None)
    assert found is None
    assert after.step == state.step + 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0, key=0), state._replace(step=0, key=0))


@pytest.mark.slow
def test_a_network_remembers_what_fine_tuning_forgets():
    stream = permuted(load("digits"), num_tasks=2, train_size=400)
    program = classification(mlp((64, 20, 10), "relu", seed=0), 0.3)
    filt = LaplaceFilter(program, Kronecker(), hypers={"noise.all": 0.0}, estimator=Lbfgs(max_steps=100))

    def first_task_right(strength):
        belief = StructuredLaplace(filt, strength).run(0, stream.train)[-1]
        site = predict_from(program, filt.hypers, belief, stream.test[0], method=AtMean())["y"]
        return np.mean(np.argmax(site.probabilities, axis=-1) == stream.test[0]["y"])

    assert first_task_right(1.0) > first_task_right(0.0) + 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engine": engine(Diagonal())}, "structure is Diagonal"),
        ({"engine": engine(), "strength": -1.0}, "strength is -1"),
        ({"engine": engine(), "examples": 0}, "examples is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        StructuredLaplace(**arguments)
