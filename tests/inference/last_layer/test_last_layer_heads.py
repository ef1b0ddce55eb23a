"""The head of a network or a program: found, checked, and equal to the same features given as a matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import ssm_nn
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical, Gaussian, Poisson
from ssm_nn.inference.last_layer.heads import feature_head, network_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.program_heads import program_head
from ssm_nn.models import RandomWalk, Static
from ssm_nn.models.networks import mlp

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, HIDDEN, CLASSES = 3, 4, 3


def plain(outputs=CLASSES):
    return mlp((WIDTH, HIDDEN, outputs))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, param_dtype=float)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        one, two = jax.random.split(jax.random.key(0))
        self.first = eqx.nn.Linear(WIDTH, HIDDEN, key=one)
        self.head = eqx.nn.Linear(HIDDEN, CLASSES, key=two, use_bias=False)

    def __call__(self, x):
        return jax.vmap(lambda row: self.head(jnp.tanh(self.first(row))))(x)


class EquinoxOfOne(Equinox):
    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))


def hidden(kind, network, x):
    if kind == "nnx":
        return np.asarray(jnp.tanh(network.first(x)))
    if kind == "equinox":
        return np.asarray(jnp.tanh(jax.vmap(network.first)(x)))
    first = network[1]["layers"][0]
    return np.asarray(jnp.tanh(x @ first["kernel"] + first["bias"]))


@pytest.fixture
def data(rng):
    return rng.normal(size=(8, WIDTH)), rng.integers(0, CLASSES, 8)


@pytest.mark.parametrize(
    ("kind", "make"), [("nnx", Nnx), ("equinox", Equinox), ("equinox", EquinoxOfOne), ("pair", plain)]
)
def test_a_networks_head_sees_its_last_hidden_layer(kind, make, data):
    x, y = data
    network = make()
    head = network_head(network, Categorical(CLASSES), x, prior_precision=0.5)
    engine = LastLayerFilter(head, Full())
    own = hidden(kind, network, x)
    given = LastLayerFilter(
        feature_head(Categorical(CLASSES), HIDDEN, prior_precision=0.5, intercept=kind != "equinox"), Full()
    )
    np.testing.assert_allclose(engine.features({"x": x}), given.features(own), atol=1e-12)
    state, _ = engine.update(engine.init(), {"x": x, "y": y})
    same, _ = given.update(given.init(), {"x": own, "y": y})
    np.testing.assert_allclose(engine.weights(state), given.weights(same), atol=1e-10)


WALK = RandomWalk(0.3)


def program_of(network, observe, kernel=WALK):
    def program(tasks):
        net = ssm_nn.weights(
            "net",
            network,
            prior=ssm_nn.ByPath({"layers.1.bias": dist.Normal(0.2, 3.0)}, otherwise=dist.Normal(0.0, 0.5)),
            transition=ssm_nn.ByPath({"layers.1.*": kernel}, otherwise=Static()),
            num_tasks=len(tasks),
        )
        net.over(tasks, observe)

    return program


def observing(distribution):
    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", distribution(f(task["x"])), obs=task.get("y"))

    return observe


@pytest.mark.parametrize(
    ("outputs", "distribution", "likelihood", "labels"),
    [
        (3, lambda f: dist.Categorical(logits=f), Categorical(3), lambda y: y),
        (1, lambda f: dist.Poisson(jnp.exp(f[:, 0])), Poisson(), lambda y: y),
        (2, lambda f: dist.Normal(f, 0.3).to_event(1), Gaussian(0.3, 2), lambda y: np.stack([y, y - 1.0], axis=1)),
    ],
)
def test_a_program_gives_likelihood_prior_and_step_of_its_head(outputs, distribution, likelihood, labels, data):
    x, y = data[0], labels(data[1])
    network = plain(outputs)
    head = program_head(program_of(network, observing(distribution)), {"x": x, "y": y})
    assert type(head.likelihood) is type(likelihood)
    assert head.num_outputs == outputs
    if outputs == 2:
        assert head.likelihood.noise_scale == pytest.approx(0.3)
    np.testing.assert_allclose(head.scale, [0.5] * HIDDEN + [3.0])
    np.testing.assert_allclose(head.loc[:, -1], 0.2)
    np.testing.assert_allclose(head.noise, 0.09)
    assert head.moving
    np.testing.assert_allclose(head.features({"x": x})[:, :-1], hidden("pair", network, x), atol=1e-12)
    np.testing.assert_array_equal(np.asarray(head.labels({"x": x, "y": y})), y)


def test_a_program_that_maps_a_network_of_one_example_has_the_same_head(data):
    x, y = data

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=jax.vmap(f)(task["x"])), obs=task.get("y"))

    def program(tasks):
        net = ssm_nn.weights(
            "net", EquinoxOfOne(), prior=dist.Normal(0, 0.5), transition=Static(), num_tasks=len(tasks)
        )
        net.over(tasks, observe)

    head = program_head(program, {"x": x, "y": y})
    assert isinstance(head.likelihood, Categorical)
    np.testing.assert_allclose(head.features({"x": x}), hidden("equinox", EquinoxOfOne(), x), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(head.labels({"x": x, "y": y})), y)


@pytest.mark.parametrize(
    ("distribution", "kernel", "words"),
    [
        (lambda f: dist.Categorical(logits=f / 2), Static(), "not the logits of the program's Categorical"),
        (lambda f: dist.StudentT(3.0, f[:, 0]), Static(), "observes a StudentT"),
        (lambda f: dist.Normal(f[:, 0], jnp.exp(f[:, 1])), Static(), "not one constant"),
    ],
)
def test_programs_of_another_form_are_refused(distribution, kernel, words, data):
    with pytest.raises(ValueError, match=words):
        program_head(program_of(plain(), observing(distribution), kernel), {"x": data[0], "y": data[1]})


def test_a_program_that_moves_below_its_head_is_refused(data):
    def program(tasks):
        net = ssm_nn.weights("net", plain(), prior=dist.Normal(0, 1), transition=RandomWalk(0.1), num_tasks=len(tasks))
        net.over(tasks, observing(lambda f: dist.Categorical(logits=f)))

    with pytest.raises(ValueError, match=r"'net.layers.0.bias' below the head move"):
        program_head(program, {"x": data[0], "y": data[1]})


def test_a_layer_that_does_not_give_the_outputs_is_refused(data):
    x, _ = data
    with pytest.raises(
        ValueError, match=r"the outputs of the layer 'net.layers.0.kernel' are not those of the network"
    ):
        network_head(plain(), Categorical(CLASSES), x, layer="layers.0.kernel")
    with pytest.raises(ValueError, match=r"layer is 'top'; the layers found are"):
        network_head(plain(), Categorical(CLASSES), x, layer="top")
    with pytest.raises(ValueError, match="the network has 3 outputs, the likelihood 4"):
        network_head(plain(), Categorical(4), x)


def test_inputs_of_another_shape_than_the_networks_are_refused(data):
    x, y = data
    engine = LastLayerFilter(network_head(plain(), Categorical(CLASSES), x), Full())
    for bad in (x[:, :2], x[:, 0], []):
        with pytest.raises(ValueError, match=r"the inputs have shape \(.*\); \(n, 3\) is accepted"):
            engine.update(engine.init(), {"x": bad, "y": y})
    with pytest.raises(ValueError, match="batch is tuple; a mapping"):
        engine.update(engine.init(), (x, y))
    assert engine.update(engine.init(), {"x": x[:0], "y": y[:0]})[1].num_points == 0
    with pytest.raises(ValueError, match="takes neither a batch of examples of shape"):
        network_head(plain(), Categorical(CLASSES), x[:, :2])
