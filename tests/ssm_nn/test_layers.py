"""Layers found by tracing: their outer products are the gradients that differentiation gives."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

from ssm_nn import Task, extract, weights
from ssm_nn.inference.batches import single
from ssm_nn.inference.kronecker import find_places
from ssm_nn.layers import find_layers, run_layers
from ssm_nn.models.networks import GroupNorm, cnn, mlp
from ssm_nn.models.transitions import Static

K = 3
pytestmark = pytest.mark.usefixtures("x64")


def program_of(network, call=lambda f, x: f(x)):
    def program(tasks):
        net = weights("net", network(), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=call(f, task["x"])), obs=task["y"])

        net.over(tasks, observe)

    return program


def task_of(shape, number=2):
    x = np.random.default_rng(0).normal(size=(number, *shape))
    return Task({"x": jnp.array(x), "y": jnp.zeros(number, int)})


def places_of(program, task):
    """The places, and the message about what lies outside them."""
    space = extract(program, task)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        places = find_places(space, task)
    return space, places, " ".join(str(w.message) for w in caught)


def assert_outer_products_are_gradients(program, task):
    """For every example: sum_p [a_p; 1] g_p^T laid into theta is the gradient of a random product of the outputs."""
    space, places, _ = places_of(program, task)
    rng = np.random.default_rng(1)
    theta = jnp.array(rng.normal(size=space.layout.size)) / 2
    for n in range(task.num_examples):
        example = single(task, jax.tree.map(lambda a, n=n: a[n], task.data), jnp.asarray(True))
        outputs = space.outputs(theta, example)
        cotangent = jnp.array(rng.normal(size=outputs.shape))
        gradient = np.asarray(jax.grad(lambda w, e=example, c=cotangent: space.outputs(w, e) @ c)(theta))
        arrays = space.layout.arrays(theta)
        layers = find_layers(lambda a, e=example: space.outputs_at(a, e), arrays)
        nothing = [jnp.zeros((layer.positions, layer.num_outputs)) for layer in layers]
        found, pull, inputs = jax.vjp(
            lambda p, e=example, a=arrays: run_layers(lambda a: space.outputs_at(a, e), a, p), nothing, has_aux=True
        )
        np.testing.assert_allclose(found, outputs, atol=1e-12)
        (gradients,) = pull(cotangent)
        for layer, place, a, g in zip(layers, places.layers, inputs, gradients, strict=True):
            assert a.shape == (layer.positions, layer.num_inputs)
            wide = a if layer.bias is None else jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1)
            np.testing.assert_allclose(place.matrix(jnp.array(gradient)), wide.T @ g, atol=1e-11)
            for start, piece in place.pieces(wide.T @ g).items():
                np.testing.assert_allclose(piece, gradient[start : start + piece.size], atol=1e-11)
        assert np.abs(gradient).max() > 1e-3
    matrices = [place.matrix(theta) for place in places.layers]
    np.testing.assert_array_equal(places.join(matrices, places.rest_of(theta)), theta)


def pair(apply, shapes):
    """(apply, params) with weights of the given shapes."""
    params = {name: jnp.zeros(shape) + 0.1 for name, shape in shapes.items()}
    return lambda: (apply, params)


def rngs():
    return nnx.Rngs(0)


DOUBLE = {"param_dtype": jnp.float64}


class NnxNetwork(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs(), **DOUBLE)
        self.norm = nnx.LayerNorm(4, rngs=rngs(), **DOUBLE)
        self.head = nnx.Linear(3 * 2 * 4, K, rngs=rngs(), **DOUBLE)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x)))
        return self.head(h.reshape(len(x), -1))


class EquinoxNetwork(eqx.Module):
    conv: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        one, two, three = jax.random.split(jax.random.key(0), 3)
        self.conv = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, dtype=float, key=one)
        self.hidden = eqx.nn.Linear(3 * 2 * 4, 5, dtype=float, key=two)
        self.head = eqx.nn.Linear(5, K, use_bias=False, dtype=float, key=three)

    def __call__(self, x):
        h = jax.nn.gelu(self.conv(x))
        return self.head(jax.nn.softplus(self.hidden(h.reshape(-1))))


def jitted(params, x):
    inner = jax.jit(lambda w, h: jax.nn.relu(h @ w.T))
    return jnp.einsum("io,ni->no", jnp.swapaxes(params["v"], 0, 1), inner(params["w"], x)) + params["b"]


def over_positions(params, x):
    """One dense layer at each of several positions."""
    return jnp.sum(jax.nn.silu(jnp.einsum("npi,io->npo", x, params["w"]) + params["b"]), axis=1)


def one_by_one(params, x):
    """A layer of one output, and one of one input."""
    h = jnp.tanh(x @ params["w"] + params["b"].reshape(1, -1))
    return h @ params["v"] + jnp.broadcast_to(params["c"], (len(x), K))


def squeezed(params, x):
    return x @ jnp.squeeze(params["w"], 0) + params["b"][None]


def bias_first(params, x):
    return params["b"] + jnp.astype(x, jnp.float64) @ params["w"]


# network, call, shape of x, kernels with their bias, weights of no layer
CASES = {
    "mlp": (lambda: mlp((4, 5, K), "relu"), None, (4,), {"layers.0": "kb", "layers.1": "kb"}, ()),
    "mlp, positions": (
        lambda: mlp((4, 5, K), "gelu"),
        lambda f, x: f(x).sum(1),
        (6, 4),
        {"layers.0": "kb", "layers.1": "kb"},
        (),
    ),
    "cnn": (
        lambda: cnn((5, 4), (4, 4), (5,), K, normaliser=None),
        None,
        (5, 4),
        {"convs.0": "kb", "convs.1": "kb", "layers.0": "kb", "layers.1": "kb"},
        (),
    ),
    "cnn, normalised": (
        lambda: cnn((5, 4, 2), (4,), (), K, "gelu", GroupNorm(2)),
        None,
        (5, 4, 2),
        {"convs.0": "kb", "layers.0": "kb"},
        ("norms.0.bias", "norms.0.scale"),
    ),
    "nnx": (
        NnxNetwork,
        None,
        (6, 4, 2),
        {"conv": "kb", "head": "kb"},
        ("norm.bias", "norm.scale"),
    ),
    "nnx, sequential": (
        lambda: nnx.Sequential(
            nnx.Linear(4, 5, rngs=rngs(), **DOUBLE), nnx.gelu, nnx.Linear(5, K, use_bias=False, rngs=rngs(), **DOUBLE)
        ),
        None,
        (4,),
        {"layers.0": "kb", "layers.2": "k"},
        (),
    ),
    "equinox": (
        EquinoxNetwork,
        lambda f, x: jax.vmap(f)(x),
        (2, 6, 4),
        {"conv": "kb", "hidden": "kb", "head": "k"},
        (),
    ),
    "jit, einsum": (
        pair(jitted, {"w": (5, 4), "v": (K, 5), "b": (K,)}),
        None,
        (4,),
        {"w": "k", "v": "kb"},
        (),
    ),
    "positions": (pair(over_positions, {"w": (4, K), "b": (K,)}), None, (6, 4), {"w": "kb"}, ()),
    "one output": (
        pair(one_by_one, {"w": (4, 1), "b": (1,), "v": (1, K), "c": (K,)}),
        None,
        (4,),
        {"w": "kb", "v": "kb"},
        (),
    ),
    "an axis of size one": (pair(squeezed, {"w": (1, 4, K), "b": (K,)}), None, (4,), {"w": "kb"}, ()),
    "bias first": (pair(bias_first, {"w": (4, K), "b": (K,)}), None, (4,), {"w": "kb"}, ()),
}


def case_of(name):
    network, call, shape, kernels, rest = CASES[name]
    return program_of(network, *(() if call is None else (call,))), task_of(shape), kernels, rest


@pytest.mark.parametrize("name", CASES)
def test_outer_products_of_inputs_and_output_gradients_are_the_gradient(name):
    program, task, _, _ = case_of(name)
    assert_outer_products_are_gradients(program, task)


@pytest.mark.parametrize("name", CASES)
def test_every_dense_and_convolutional_layer_is_found_with_its_bias(name):
    program, task, kernels, rest = case_of(name)
    _, places, message = places_of(program, task)
    found = {
        place.name.removeprefix("net.").removesuffix(".kernel").removesuffix(".weight"): (
            "k" if place.bias_start is None else "kb"
        )
        for place in places.layers
    }
    assert found == kernels
    assert all(name in message for name in rest)
    assert bool(message) == bool(rest)
    assert places.rest_size + sum(stop - start for place in places.layers for start, stop in place.spans) == places.size


def scanned(params, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["loop"]), None), x, length=2)
    return h @ params["w"]


def grouped(params, x):
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )
    return h.reshape(len(x), -1) @ params["w"]


def elementwise(params, x):
    return (x * params["scale"]) @ params["w"] + params["offset"] ** 2


def read_before_the_bias(params, x):
    """The bias does not have the gradient of the layer's output."""
    h = x @ params["w"]
    return jnp.tanh(h + params["b"]) + h


def shared_bias(params, x):
    h = jnp.tanh(x @ params["w"] + params["b"])
    return h @ params["v"] + params["b"]


def along_another_axis(params, x):
    """As many positions as outputs, and an offset for each position."""
    return jnp.sum(jnp.einsum("npi,io->npo", x, params["w"]) + params["b"][:, None], axis=1)


@jax.custom_vjp
def doubled(w, x):
    return x @ w


doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (2 * kept[1].T @ g, g @ kept[0].T))


def own_derivative(params, x):
    """A product whose gradient is not that of a product."""
    return jnp.tanh(doubled(params["v"], x)) @ params["w"]


def product_of_weights(params, x):
    return x @ (params["a"] @ params["b"]) @ params["w"]


OUTSIDE = {
    "scan": (scanned, {"loop": (4, 4), "w": (4, K)}, (4,), ["w"], ["loop"]),
    "grouped convolution": (grouped, {"conv": (3, 2, 4), "w": (20, K)}, (5, 4), ["w"], ["conv"]),
    "elementwise": (elementwise, {"scale": (4,), "w": (4, K), "offset": (K,)}, (4,), ["w"], ["scale", "offset"]),
    "read before the bias": (read_before_the_bias, {"w": (4, K), "b": (K,)}, (4,), ["w"], ["b"]),
    "a bias of two layers": (
        shared_bias,
        {"w": (4, K), "v": (K, K), "b": (K,)},
        (4,),
        ["w", "v"],
        ["b"],
    ),
    "an offset along another axis": (along_another_axis, {"w": (4, K), "b": (K,)}, (K, 4), ["w"], ["b"]),
    "a derivative of its own": (own_derivative, {"v": (4, 5), "w": (5, K)}, (4,), ["w"], ["v"]),
    "a product of weights": (product_of_weights, {"a": (4, 2), "b": (2, 5), "w": (5, K)}, (4,), ["w"], ["a", "b"]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_weights_used_otherwise_stay_outside_and_are_named(name):
    apply, shapes, shape, inside, outside = OUTSIDE[name]
    program, task = program_of(pair(apply, shapes)), task_of(shape)
    _, places, message = places_of(program, task)
    assert [(place.name, place.bias_start) for place in places.layers] == [(f"net.{n}", None) for n in inside]
    assert all(f"net.{n}" in message for n in outside)
    assert "they keep a diagonal plus low rank" in message
    assert_outer_products_are_gradients(program, task)


def test_a_general_linear_layer_of_several_output_axes_stays_outside():
    class Network(nnx.Module):
        def __init__(self):
            self.wide = nnx.LinearGeneral(4, (2, 3), rngs=rngs(), **DOUBLE)
            self.head = nnx.Linear(6, K, rngs=rngs(), **DOUBLE)

        def __call__(self, x):
            return self.head(self.wide(x).reshape(len(x), -1))

    program, task = program_of(Network), task_of((4,))
    _, places, message = places_of(program, task)
    assert [place.name for place in places.layers] == ["net.head.kernel"]
    assert "net.wide.bias, net.wide.kernel" in message
    assert_outer_products_are_gradients(program, task)


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T


@pytest.mark.parametrize(
    ("program", "shape"),
    [
        (program_of(pair(tied, {"w": (K, 5)})), (K,)),
        (program_of(lambda: mlp((4, K)), lambda f, x: f(x[:, 0]) + f(x[:, 1])), (2, 4)),
    ],
)
def test_tied_weights_are_refused(program, shape):
    with pytest.raises(
        ValueError, match=r"are used 2 times \(tied weights, or a network called twice a task\).*LowRank"
    ):
        places_of(program, task_of(shape))
