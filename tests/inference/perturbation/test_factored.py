"""The factored path against kernels that are formed, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssm_nn.inference.perturbation.blocks import Factors, composed
from ssm_nn.inference.perturbation.factored import find_blocks, run_perturbed

NAME = ("net", "kernel")


def random_factors(rng, block):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape))

    keep = jnp.asarray((rng.random(block.cap) < 0.7).astype(float))
    return Factors(
        draw(block.num_inputs),
        draw(block.num_outputs),
        draw(block.num_inputs, block.cap),
        draw(block.cap, block.num_outputs),
        keep,
    )


def check(function, kernel, rng):
    arrays = {"net": {"kernel": kernel, "other": jnp.asarray(rng.normal(size=3))}}
    (block,) = find_blocks(function, arrays, {NAME}, None)
    factors = random_factors(rng, block)
    expected = function(composed([block], arrays, [factors]))
    np.testing.assert_allclose(run_perturbed(function, arrays, {NAME: factors}), expected, rtol=1e-10, atol=1e-10)

    def loss(path):
        return lambda f: jnp.sum(jnp.sin(path(f)))

    one = jax.grad(loss(lambda f: run_perturbed(function, arrays, {NAME: f})))(factors)
    two = jax.grad(loss(lambda f: function(composed([block], arrays, [f]))))(factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), one, two)
    return block


@pytest.mark.parametrize(("size", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (4, 1, 0)])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_factored_convolution_equals_the_materialised_one(x64, rng, size, stride, padding, layout):
    x = jnp.asarray(rng.normal(size=(2, 9, 8, 3) if layout == "NHWC" else (2, 3, 9, 8)))
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 4) if layout == "NHWC" else (4, 3, size, size)))
    numbers = (layout, "HWIO" if layout == "NHWC" else "OIHW", layout)

    def function(arrays):
        pads = ((padding, padding), (padding, padding))
        return lax.conv_general_dilated(
            x, arrays["net"]["kernel"], (stride, stride), pads, dimension_numbers=numbers
        ) + jnp.sum(arrays["net"]["other"])

    block = check(function, kernel, rng)
    assert (block.num_inputs, block.num_outputs, block.cap, len(block.window_axes)) == (3, 4, 3, 2)


def test_factored_dense_layer_equals_the_materialised_one(x64, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 6)))
    check(lambda a: x @ a["net"]["kernel"] * a["net"]["other"], jnp.asarray(rng.normal(size=(6, 3))), rng)
    # weights on the left, and several contracted axes
    check(lambda a: a["net"]["kernel"] @ x[0, :, :4], jnp.asarray(rng.normal(size=(3, 5))), rng)
    check(lambda a: jnp.tensordot(x, a["net"]["kernel"], 2), jnp.asarray(rng.normal(size=(5, 6, 4))), rng)
    check(
        jax.jit(lambda a: jnp.einsum("nti,oi->nto", x, a["net"]["kernel"])), jnp.asarray(rng.normal(size=(4, 6))), rng
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda k, x: x @ (2 * k), "mul"),
        (lambda k, x: x @ k @ k, "more than once"),
        (lambda k, x: jnp.sum(x), "meet no data"),
        (lambda k, x: x @ k + jnp.sum(k), "reduce_sum"),
        (lambda k, x: jnp.einsum("ni,ij->nij", x, k), "batched"),
        (
            lambda k, x: lax.conv_general_dilated(
                x.reshape(2, 2, 2),
                k.reshape(1, 2, 8)[:, :1],
                (1,),
                "SAME",
                feature_group_count=2,
                dimension_numbers=("NWC", "WIO", "NWC"),
            ),
            "kernel",
        ),
    ],
    ids=["scaled", "twice", "unused", "read elsewhere", "outer", "grouped"],
)
def test_a_kernel_that_the_factored_path_cannot_express_is_named(function, words):
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=words) as error:
        find_blocks(lambda a: function(a["net"]["kernel"], x), {"net": {"kernel": jnp.ones((4, 4))}}, {NAME}, None)
    assert "net.kernel" in str(error.value)
