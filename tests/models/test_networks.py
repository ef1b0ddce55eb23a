"""The plain multilayer perceptron and the plain convolutional network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.models.networks import ACTIVATIONS, GroupNorm, cnn, mlp
from ssm_nn.networks import as_network


@pytest.mark.parametrize("activation", [*ACTIVATIONS, jnp.sin])
def test_the_network_is_its_formula(rng, activation):
    apply, params = mlp((3, 5, 4, 2), activation, seed=1)
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    x = rng.normal(size=(7, 3)).astype(np.float32)
    h = x
    for n, layer in enumerate(params["layers"]):
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        h = h if n == 2 else np.asarray(act(h))
    np.testing.assert_allclose(apply(params, x), h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(params, x[0]), h[0], rtol=1e-5, atol=1e-6)


def test_leaves_are_named_by_layer():
    initial = as_network(mlp((3, 5, 2))).initial
    shapes = {path: leaf.shape for path, leaf in initial.items()}
    assert shapes == {
        "layers.0.bias": (5,), "layers.0.kernel": (3, 5), "layers.1.bias": (2,), "layers.1.kernel": (5, 2)
    }  # fmt: skip


def test_kernels_have_the_variance_of_lecun_and_biases_are_zero():
    _, params = mlp((400, 300, 10))
    for layer in params["layers"]:
        kernel = np.asarray(layer["kernel"])
        assert kernel.var() * kernel.shape[0] == pytest.approx(1, rel=0.1)
        assert not np.any(layer["bias"])


def test_the_seed_decides_the_weights():
    same, again, other = (mlp((3, 2), seed=seed)[1] for seed in (4, 4, 5))
    assert jax.tree.all(jax.tree.map(np.array_equal, same, again))
    assert not np.array_equal(same["layers"][0]["kernel"], other["layers"][0]["kernel"])


@pytest.mark.parametrize("sizes", [(3,), (), (3, 0), (3, 2.5), (3, True)])
def test_sizes_that_make_no_network_are_refused(sizes):
    with pytest.raises(ValueError, match="at least two whole numbers >= 1"):
        mlp(sizes)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="accepted are tanh, relu"):
        mlp((3, 2), "tanhh")


def convolved(x, kernel, bias):
    """(H, W, in) -> (ceil(H / 2), ceil(W / 2), out), by loops, in float64."""
    padded = np.pad(x.astype(np.float64), ((1, 2), (1, 2), (0, 0)))
    height, width = -(-x.shape[0] // 2), -(-x.shape[1] // 2)
    out = np.empty((height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            patch = padded[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            out[row, column] = np.einsum("ijc,ijco->o", patch, kernel) + bias
    return out


def normalised(z, groups, epsilon, scale, bias):
    parts = np.split(z, groups, axis=-1)
    return np.concatenate([(p - p.mean()) / np.sqrt(p.var() + epsilon) for p in parts], axis=-1) * scale + bias


@pytest.mark.parametrize(
    ("image", "normaliser"), [((8, 8, 3), None), ((7, 10, 2), GroupNorm(2)), ((9, 6), GroupNorm(1, 1e-2))]
)
def test_the_convolutional_network_is_its_formula(image, normaliser, rng):
    apply, params = cnn(image, (4, 6), (5,), 3, "tanh", normaliser, seed=2)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
    x = rng.normal(size=(2, *image)).astype(np.float32)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for one, out in zip(x, np.asarray(apply(params, x)), strict=True):
        h = one.reshape(*image[:2], -1)
        for n, layer in enumerate(exact["convs"]):
            h = convolved(h, layer["kernel"], layer["bias"])
            if normaliser is not None:
                h = normalised(h, normaliser.groups, normaliser.epsilon, **exact["norms"][n])
            h = np.tanh(h)
        first, last = exact["layers"]
        h = np.tanh(h.ravel() @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
        np.testing.assert_allclose(out, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image", [(8, 6), (8, 6, 3)])
def test_examples_are_answered_one_by_one_whatever_their_leading_axes(image, rng):
    apply, params = cnn(image, (4,), (), 3)
    x = rng.normal(size=(2, 5, *image)).astype(np.float32)
    out = apply(params, x)
    assert out.shape == (2, 5, 3)
    np.testing.assert_allclose(apply(params, x[1]), out[1], atol=1e-5)
    np.testing.assert_allclose(apply(params, x[1, 2]), out[1, 2], atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda one: apply(params, one))(x[0]), out[0], atol=1e-5)
    # no example sees another: what batch normalisation breaks
    other = x.copy()
    other[1, 3:] *= 100
    np.testing.assert_array_equal(apply(params, other)[1, 2], out[1, 2])


def test_leaves_of_the_convolutional_network_are_named_by_layer():
    initial = as_network(cnn((28, 28), (8, 16), (20,), 10)).initial
    assert {path: leaf.shape for path, leaf in initial.items()} == {
        "convs.0.bias": (8,), "convs.0.kernel": (3, 3, 1, 8), "convs.1.bias": (16,), "convs.1.kernel": (3, 3, 8, 16),
        "layers.0.bias": (20,), "layers.0.kernel": (7 * 7 * 16, 20), "layers.1.bias": (10,), "layers.1.kernel": (20, 10),
        "norms.0.bias": (8,), "norms.0.scale": (8,), "norms.1.bias": (16,), "norms.1.scale": (16,),
    }  # fmt: skip
    assert not any(path.startswith("norms") for path in as_network(cnn((28, 28), (8,), normaliser=None)).initial)
    kernel = np.asarray(cnn((28, 28), (32, 64))[1]["convs"][1]["kernel"])
    assert kernel.var() * 9 * 32 == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_image_gives_finite_outputs_and_gradients(value):
    """A black border makes whole groups constant; their variance is zero."""
    apply, params = cnn((16, 16, 3), (4, 4, 4, 4, 4), (), 3)
    x = np.full((2, 16, 16, 3), value, np.float32)
    gradient = jax.grad(lambda p: (apply(p, x) ** 2).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((apply(params, x), gradient)))


def test_normalised_features_do_not_see_brightness_and_contrast(rng):
    norm = GroupNorm(2, 1e-12)
    z = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    learned = {"scale": rng.normal(size=6).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}
    np.testing.assert_allclose(norm(learned, 3 * z + 2), norm(learned, z), atol=1e-4)


def test_float32_weights_take_bytes_and_float64_weights_float32_images(rng, x64):
    apply, params = cnn((8, 8), (4,), (), 3)
    assert params["convs"][0]["kernel"].dtype == np.float64
    x = rng.integers(0, 255, (2, 8, 8)).astype(np.uint8)
    exact = apply(params, x.astype(np.float64))
    np.testing.assert_allclose(apply(params, x.astype(np.float32)), exact, rtol=1e-12)
    np.testing.assert_allclose(apply(jax.tree.map(np.float32, params), x), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (8,)}, r"input_shape is \(8,\); \(H, W\) or \(H, W, C\)"),
        ({"input_shape": (2, 8, 8, 3)}, "input_shape is"),
        ({"input_shape": (8, 0)}, "input_shape is"),
        ({"channels": ()}, r"channels is \[\]; at least one"),
        ({"channels": (4, 2.5)}, "channels is"),
        ({"hidden": (0,)}, r"hidden and num_outputs are \[0, 10\]"),
        ({"num_outputs": True}, r"hidden and num_outputs are \[True\]"),
        ({"activation": "tanhh"}, "accepted are tanh, relu"),
        ({"channels": (16, 6)}, r"groups=4.*for channels \[16, 6\]; groups must divide"),
        ({"normaliser": GroupNorm(0)}, "groups must divide"),
    ],
)
def test_arguments_that_make_no_convolutional_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cnn(**{"input_shape": (8, 8), **arguments})


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 8, 9), (2, 8, 8, 1)])
def test_images_of_another_shape_are_refused(shape):
    apply, params = cnn((8, 8), (4,))
    with pytest.raises(ValueError, match=r"x has shape .*; this network takes images \(..., 8, 8\)"):
        apply(params, np.zeros(shape, np.float32))
