"""The convolution for loops is ``lax``'s, in value, in all derivatives, under vmap, and in a traced network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssm_nn.convolutions import conv_general_dilated

pytestmark = pytest.mark.usefixtures("x64")

LAST = ("NHWC", "HWIO", "NHWC")
FIRST = ("NCHW", "OIHW", "NCHW")
# side, stride, border, dilation of the kernel, of the images
WINDOWS = [(5, 1, 2, 1, 1), (3, 2, 1, 1, 1), (4, 1, 0, 1, 1), (3, 2, 1, 2, 1), (3, 1, 1, 1, 2)]


def pair(window, layout):
    """Ours and lax's, and images and kernel for them."""
    side, stride, border, dilation, images_dilation = window
    options = {
        "window_strides": (stride, stride),
        "padding": [(border, border), (border, border + 1)],
        "rhs_dilation": (dilation, dilation),
        "lhs_dilation": (images_dilation, images_dilation),
        "dimension_numbers": layout,
    }
    draw = np.random.default_rng(side).normal
    last = layout is LAST
    images = jnp.asarray(draw(size=(2, 9, 8, 3) if last else (2, 3, 9, 8)))
    kernel = jnp.asarray(draw(size=(side, side, 3, 4) if last else (4, 3, side, side)))
    return partial(conv_general_dilated, **options), partial(lax.conv_general_dilated, **options), images, kernel


def equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("window", WINDOWS)
def test_value_and_derivatives_are_those_of_lax(window, layout):
    ours, theirs, images, kernel = pair(window, layout)
    equal(jax.jit(ours)(images, kernel), theirs(images, kernel))

    def gradient(f):
        return jax.grad(lambda x, k: jnp.sum(jnp.tanh(f(x, k))), (0, 1))

    tangents = jnp.cos(images), jnp.sin(kernel)
    equal(gradient(ours)(images, kernel), gradient(theirs)(images, kernel))
    found, expected = (jax.jvp(gradient(f), (images, kernel), tangents) for f in (ours, theirs))
    equal(found, expected)  # second derivatives, forward over reverse


@pytest.mark.parametrize("axes", [(1, None), (None, 2), (1, 2)], ids=["images", "kernels", "both"])
@pytest.mark.parametrize("layout", [LAST, FIRST], ids=["channels-last", "channels-first"])
def test_it_may_be_mapped(axes, layout):
    ours, theirs, images, kernel = pair(WINDOWS[1], layout)
    x = images if axes[0] is None else jnp.stack([images, 2 * images, -images], 1)
    k = kernel if axes[1] is None else jnp.stack([kernel, kernel + 1, kernel**2], 2)

    def gradient(f):
        return jax.grad(lambda x, k: jnp.sum(jnp.tanh(f(x, k))), (0, 1))

    for change in (lambda f: f, gradient):
        equal(jax.vmap(change(ours), axes)(x, k), jax.vmap(change(theirs), axes)(x, k))

    def total(f):
        return jax.grad(lambda both: jnp.sum(jnp.tanh(jax.vmap(f, axes)(*both))))

    equal(total(ours)((x, k)), total(theirs)((x, k)))


def test_no_convolution_is_left_in_the_gradient_and_the_forward_pass_is_one():
    ours, theirs, images, kernel = pair(WINDOWS[0], LAST)

    def names(f):
        return [equation.primitive.name for equation in jax.make_jaxpr(f)(images, kernel).jaxpr.eqns]

    assert names(ours) == names(theirs) == ["conv_general_dilated"]

    def backward(f):
        _, pull = jax.vjp(f, images, kernel)
        return jax.make_jaxpr(pull)(jnp.ones_like(f(images, kernel)))

    # counts alone would pass for a loop around them
    assert "conv_general_dilated" in str(backward(theirs))
    assert "conv_general_dilated" not in str(backward(ours))


def test_groups_and_other_devices_are_left_to_lax(monkeypatch):
    rng = np.random.default_rng(0)
    images, kernel = jnp.asarray(rng.normal(size=(2, 6, 6, 4))), jnp.asarray(rng.normal(size=(3, 3, 2, 6)))
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAST, "feature_group_count": 2}
    equal(conv_general_dilated(images, kernel, **options), lax.conv_general_dilated(images, kernel, **options))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ours, _, images, kernel = pair(WINDOWS[0], LAST)
    (equation,) = jax.make_jaxpr(ours)(images, kernel).jaxpr.eqns
    assert equation.primitive is lax.conv_general_dilated_p


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtypes_are_kept(dtype):
    ours, theirs, images, kernel = pair(WINDOWS[1], LAST)
    x, k = images.astype(dtype), kernel.astype(dtype)
    for f in (ours, theirs):
        leaves = jax.tree.leaves((f(x, k), jax.grad(lambda x, k, f=f: jnp.sum(f(x, k)), (0, 1))(x, k)))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
