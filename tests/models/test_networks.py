"""The plain multilayer perceptron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.models.networks import ACTIVATIONS, mlp
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
