"""Ready programs: what they say in the state-space form, and that one compiled engine serves all kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from ssm_nn.extraction import extract
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.structures import LowRank
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification, regression
from ssm_nn.tasks import Task, stack_tasks

LAYERS = {"first": "layers.0.*", "last": "layers.1.*"}


def task(rng, targets):
    return Task({"x": rng.normal(size=(6, 3)).astype(np.float32), "y": targets})


@pytest.fixture
def classes(rng):
    return task(rng, rng.integers(0, 2, 6).astype(np.int32))


def test_each_group_has_its_noise_and_every_weight_the_prior(classes):
    program = classification(mlp((3, 4, 2)), 0.5, LAYERS)
    space = extract(program, classes, {"noise.first": 0.0, "noise.last": 0.3})
    noise = space.layout.leaves(space.moments.noise)
    np.testing.assert_array_equal(noise["net.layers.0.kernel"], 0)
    np.testing.assert_allclose(noise["net.layers.1.bias"], 0.3)
    np.testing.assert_allclose(space.prior_variance, 0.25)
    np.testing.assert_array_equal(space.moments.gain, 1)


def test_the_likelihood_is_the_softmax_of_the_network(classes):
    network = mlp((3, 4, 2))
    space = extract(classification(network), classes, {"noise.all": 0.1})
    expected = jax.nn.log_softmax(network[0](network[1], classes["x"]))[np.arange(6), classes["y"]].sum()
    np.testing.assert_allclose(space.log_likelihood(space.initial, classes), expected, rtol=1e-5)


@pytest.mark.parametrize("width", [(), (1,)])
def test_regression_takes_a_network_of_one_output(rng, width):
    def apply(params, x):
        return jnp.reshape(x @ params["w"], (x.shape[0], *width))

    data = task(rng, rng.normal(size=6).astype(np.float32))
    space = extract(regression((apply, {"w": jnp.ones(3)}), 0.2), data, {"noise.all": 0.0})
    residual = data["y"] - data["x"].sum(axis=1)
    expected = np.sum(-0.5 * (residual / 0.2) ** 2 - np.log(0.2 * np.sqrt(2 * np.pi)))
    np.testing.assert_allclose(space.log_likelihood(space.initial, data), expected, rtol=1e-5)


def test_the_program_is_an_ordinary_numpyro_program(classes):
    tasks = stack_tasks([classes, classes])
    program = classification(mlp((3, 4, 2)), 1.0, LAYERS)
    trace = handlers.trace(handlers.seed(program, 0)).get_trace(tasks)
    assert trace["net.layers.1.kernel"]["value"].shape == (2, 4, 2)
    assert 0 <= trace["noise.last"]["value"] <= 100
    assert trace["y"]["value"].shape == (2, 6)


def test_no_kernel_is_compiled_twice(classes, caplog):
    engine = LaplaceFilter(classification(mlp((3, 4, 2)), 1.0, LAYERS), LowRank(3), estimator=Lbfgs())
    walks = [{"noise.first": first, "noise.last": last} for first, last in [(0.0, 0.0), (0.1, 0.5), (0.0, 1.0)]]
    filtered = [engine.with_hypers(walks[0]).run(0, [classes, classes])]
    with jax.log_compiles():
        filtered += [engine.with_hypers(walk).run(1, [classes, classes]) for walk in walks[1:]]
    compiled = [r.message for r in caplog.records if r.message.startswith("Compiling")]
    assert not [
        message for message in compiled if "_laplace" in message or "_predict" in message or "lambda" in message
    ]
    assert len({f.log_evidence for f in filtered}) == 3


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"prior_scale is .*; a positive number"):
        classification(mlp((3, 2)), scale)
    with pytest.raises(ValueError, match=r"noise_scale is .*; a positive number"):
        regression(mlp((3, 1)), scale)


def test_groups_must_cover_every_leaf_once(classes):
    with pytest.raises(ValueError, match="groups is empty"):
        classification(mlp((3, 2)), 1.0, {})
    with pytest.raises(ValueError, match="every leaf needs one"):
        extract(classification(mlp((3, 4, 2)), 1.0, {"first": "layers.0.*"}), classes, {"noise.first": 0.0})


@pytest.mark.parametrize("noise", [-0.1, 101.0])
def test_a_noise_outside_its_prior_is_refused(classes, noise):
    with pytest.raises(ValueError, match="noise"):
        extract(classification(mlp((3, 2))), classes, {"noise.all": noise})
