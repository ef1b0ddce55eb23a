"""A convolution whose gradient is as fast inside a compiled loop as outside it, on a CPU.

    y[n, p, o] = sum_{w, c} x[n, stride p + dilation w, c] K[w, c, o]

is what ``jax.lax.conv_general_dilated`` computes. Inside ``lax.scan`` XLA's CPU compiler runs the convolutions of its gradient
in plain loops, 20 to 30 times slower than outside (github.com/jax-ml/jax/issues/12868), and every engine here trains inside
``lax.scan``. So on a CPU the gradient is that of the same sum written as one matrix product over windows, which has no such
weakness:

    dK = P(x)^T dy,    dx = P^T(dy K^T)        P(x) (n p, w c): the windows of x, side by side

The forward pass stays XLA's own. The equation bears the name and the parameters of ``lax``'s, so that whoever reads a traced
network finds a convolution. On other devices, and with groups, this is ``lax.conv_general_dilated`` itself.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["conv_general_dilated"]

Array = Any


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **options: Any) -> Array:
    """``jax.lax.conv_general_dilated``, argument by argument, with a gradient that is fast in loops.

    ``flax.nnx.Conv(..., conv_general_dilated=conv_general_dilated)`` takes it. Forward, channels last are fastest.

    Args:
        lhs, rhs: images and kernel, of one dtype.
        window_strides, padding: as in ``lax``.
        options: every further argument of ``lax.conv_general_dilated``, by name.
    """
    plain = partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
    if jax.default_backend() != "cpu":
        return plain(lhs, rhs)
    (equation,) = jax.make_jaxpr(plain)(lhs, rhs).jaxpr.eqns
    params = equation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return plain(lhs, rhs)
    return _convolution_p.bind(lhs, rhs, **params)


def _as_product(lhs: Array, rhs: Array, **params: Any) -> Array:
    """The same as one matrix product over windows."""
    numbers = params["dimension_numbers"]
    images = lhs.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    kernel = rhs.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    window = kernel.shape[:-2]
    around = [(0, 0, 0), *((*pads, n - 1) for pads, n in zip(params["padding"], params["lhs_dilation"], strict=True))]
    images = lax.pad(images, np.zeros((), images.dtype), [*around, (0, 0, 0)])
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    reach = [(n - 1) * d for n, d in zip(window, dilation, strict=True)]
    places = [max((n - r - 1) // s + 1, 0) for n, r, s in zip(images.shape[1:-1], reach, strides, strict=True)]

    def seen_from(offset: tuple[int, ...]) -> Array:
        starts = [i * d for i, d in zip(offset, dilation, strict=True)]
        ends = [a + (m - 1) * s + 1 for a, m, s in zip(starts, places, strides, strict=True)]
        whole = images.shape[0], images.shape[-1]
        return lax.slice(images, (0, *starts, 0), (whole[0], *ends, whole[1]), (1, *strides, 1))

    windows = jnp.concatenate([seen_from(offset) for offset in itertools.product(*map(range, window))], -1)
    result = lax.dot_general(
        windows,
        kernel.reshape(-1, kernel.shape[-1]),
        (((windows.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    out = numbers.out_spec
    return result.transpose(np.argsort((out[0], *out[2:], out[1])).tolist())


def _plain(lhs: Array, rhs: Array, **params: Any) -> Array:
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _shape(lhs: Any, rhs: Any, **params: Any) -> Any:
    made = jax.eval_shape(partial(_plain, **params), lhs, rhs)
    return ShapedArray(made.shape, made.dtype)


def _of_images(cotangent: Array, lhs: Any, rhs: Array, **params: Any) -> Array:
    return jax.linear_transpose(lambda x: _as_product(x, rhs, **params), lhs.aval)(cotangent)[0]


def _of_kernel(cotangent: Array, lhs: Array, rhs: Any, **params: Any) -> Array:
    return jax.linear_transpose(lambda kernel: _as_product(lhs, kernel, **params), rhs.aval)(cotangent)[0]


def _batched(values: Any, axes: Any, **params: Any) -> tuple[Array, int]:
    """More images for one kernel are a longer batch, more kernels for one batch are more channels; both are products."""
    (lhs, rhs), (of_images, of_kernels) = values, axes
    numbers = params["dimension_numbers"]
    if of_kernels is None:
        merged, split = numbers.lhs_spec[0], numbers.out_spec[0]
        count, operands = lhs.shape[of_images], (_merged(lhs, of_images, merged), rhs)
    elif of_images is None:
        merged, split = numbers.rhs_spec[0], numbers.out_spec[1]
        count, operands = rhs.shape[of_kernels], (lhs, _merged(rhs, of_kernels, merged))
    else:
        return jax.vmap(partial(_as_product, **params), (of_images, of_kernels))(lhs, rhs), 0
    result = _convolution_p.bind(*operands, **params)
    shape = result.shape
    return result.reshape(*shape[:split], count, shape[split] // count, *shape[split + 1 :]), split


def _merged(array: Array, axis: int, into: int) -> Array:
    """The batch's axis in front of the axis ``into`` of the rest, and one with it."""
    moved = jnp.moveaxis(array, axis, into)
    shape = moved.shape
    return moved.reshape(*shape[:into], shape[into] * shape[into + 1], *shape[into + 2 :])


_convolution_p = Primitive(lax.conv_general_dilated_p.name)
_convolution_p.def_impl(_plain)
_convolution_p.def_abstract_eval(_shape)
ad.defbilinear(_convolution_p, _of_images, _of_kernel)
batching.primitive_batchers[_convolution_p] = _batched
mlir.register_lowering(_convolution_p, mlir.lower_fun(_plain, multiple_results=False))
