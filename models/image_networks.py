"""Convolutional networks of the continual-learning papers, as pairs (apply, params) with a head of their own.

| network | layers before the head | at 10 outputs |
|---|---|---|
| ``lenet`` | 2 convolutions 5 x 5 (20, 50) with pooling, 2 dense (800, 500) | 2,995,620 parameters on 32 x 32 x 3 |
| ``alexnet`` | 3 convolutions (4, 3, 2; 64, 128, 256) with pooling, 2 dense (2048, 2048) | 6,533,450 |
| ``resnet18`` | 17 convolutions 3 x 3 in 8 residual blocks, 3 of 1 x 1 on the way round, mean over positions | 11,173,962 |

Every layer but the head is followed by a normaliser with a scale and a bias for each output, whose moments are those of one
example: layer normalisation in ``lenet`` and ``alexnet``, groups of channels in ``resnet18``. The papers use batch
normalisation, whose running averages are no weights; the number of parameters is the same. Leaves: ``convs.<n>.kernel``
(h, w, in, out), ``norms.<n>.scale``, ``layers.<n>.kernel`` (in, out), ``head.kernel``, and their biases.

Sources: LeNet and AlexNet as in Yoon et al. 2020 (arXiv 1902.09432) and Li et al. 2024 (arXiv 2311.15161); ResNet-18 of He et
al. 2016 (arXiv 1512.03385) in its form for small images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssm_nn.models.networks import GroupNorm, convolution

__all__ = ["alexnet", "lenet", "resnet18"]

Array = Any
Network = tuple[Callable[[Any, Array], Array], dict[str, Any]]

_EPSILON = GroupNorm().epsilon


def lenet(
    input_shape: Sequence[int] = (32, 32, 3),
    num_outputs: int = 10,
    channels: Sequence[int] = (20, 50),
    hidden: Sequence[int] = (800, 500),
    seed: int = 0,
) -> Network:
    """``pool(relu(norm(h * K + b)))`` for each of ``channels``, ``relu(norm(h W + b))`` for each of ``hidden``, the head.

    Args:
        input_shape: (H, W) or (H, W, C), sides of at least 4.
        num_outputs: K.
        channels: of the convolutions, 5 x 5 with a border of 2 and stride 1, each halved by a 2 x 2 maximum.
        hidden: widths of the dense layers.
        seed: of the initial weights: kernels N(0, 2 / fan-in) (He), of the head N(0, 1 / fan-in).

    Returns:
        (apply, params): x (..., H, W) or (..., H, W, C) to logits (..., K). ``apply`` raises ValueError for other images.

    Raises:
        ValueError: an input that is no image or too small, a size below 1.
    """
    windows = [(5, 2, 2)] * len(channels)  # side, border, pooling
    return _convolutional(input_shape, num_outputs, channels, windows, hidden, seed)


def alexnet(
    input_shape: Sequence[int] = (32, 32, 3),
    num_outputs: int = 10,
    channels: Sequence[int] = (64, 128, 256),
    hidden: Sequence[int] = (2048, 2048),
    seed: int = 0,
) -> Network:
    """As ``lenet``, with convolutions of 4 x 4, 3 x 3 and 2 x 2 without a border (arguments and errors as there)."""
    if len(channels) != 3:
        raise ValueError(f"channels is {list(channels)}; three are accepted, for windows of 4, 3 and 2")
    return _convolutional(input_shape, num_outputs, channels, [(4, 0, 2), (3, 0, 2), (2, 0, 2)], hidden, seed)


def _convolutional(
    input_shape: Sequence[int],
    num_outputs: int,
    channels: Sequence[int],
    windows: Sequence[tuple[int, int, int]],
    hidden: Sequence[int],
    seed: int,
) -> Network:
    image = _checked_image(input_shape, [*channels, *hidden, num_outputs])
    sides, deep = list(image[:2]), image[2]
    kernels = []
    for out, (side, border, pooling) in zip(channels, windows, strict=True):
        kernels.append((side, side, deep, out))
        sides = [(n + 2 * border - side + 1) // pooling for n in sides]
        deep = out
    if min(sides) < 1:
        raise ValueError(f"input_shape is {tuple(input_shape)}, of which nothing is left after the convolutions")
    flat = sides[0] * sides[1] * deep
    dense = list(zip([flat, *hidden[:-1]], hidden, strict=True)) if hidden else []
    head = hidden[-1] if hidden else flat
    keys = iter(jax.random.split(jax.random.key(seed), len(kernels) + len(dense) + 1))
    params: dict[str, Any] = {
        "convs": [_affine(next(keys), shape, 2.0) for shape in kernels],
        "layers": [_affine(next(keys), shape, 2.0) for shape in dense],
        "head": _affine(next(keys), (head, num_outputs), 1.0),
        "norms": [_unit(n) for n in [*channels, *hidden]],
    }

    def apply(params: Any, x: Array) -> Array:
        h, leading = _images(x, input_shape, image)
        norms = iter(params["norms"])
        for layer, (_, border, pooling) in zip(params["convs"], windows, strict=True):
            h = convolution(h, layer["kernel"], 1, border) + layer["bias"]
            h = _pooled(jax.nn.relu(_normalised(next(norms), h)), pooling)
        h = h.reshape(len(h), -1)
        for layer in params["layers"]:
            h = jax.nn.relu(_normalised(next(norms), h @ layer["kernel"] + layer["bias"]))
        return (h @ params["head"]["kernel"] + params["head"]["bias"]).reshape(*leading, -1)

    return apply, params


def resnet18(
    input_shape: Sequence[int] = (32, 32, 3),
    num_outputs: int = 10,
    channels: Sequence[int] = (64, 128, 256, 512),
    groups: int = 8,
    seed: int = 0,
) -> Network:
    """``h <- relu(norm(relu(norm(h * K_1)) * K_2) + way(h))``, two blocks at each of ``channels``, then the mean and the head.

    The first block at every width but the first has stride 2, and a convolution of 1 x 1 with a normaliser on its way round.

    Args:
        input_shape: (H, W) or (H, W, C).
        num_outputs: K.
        channels: widths, each a multiple of ``groups``.
        groups: of the normalisers.
        seed: as for ``lenet``.

    Returns:
        (apply, params), as for ``lenet``; the kernels of the ways round are ``ways.<n>.kernel``.

    Raises:
        ValueError: an input that is no image, a size below 1, widths that the groups do not divide.
    """
    image = _checked_image(input_shape, [*channels, num_outputs])
    if groups < 1 or any(n % groups for n in channels):
        raise ValueError(f"groups is {groups} for channels {list(channels)}; it must divide each of them")
    shapes, ways, strides, deep = [(3, 3, image[2], channels[0])], [], [], channels[0]
    for stage, out in enumerate(channels):
        for place in range(2):
            strides.append(2 if stage and not place else 1)
            shapes += [(3, 3, deep, out), (3, 3, out, out)]
            if strides[-1] == 2 or deep != out:
                ways.append((1, 1, deep, out))
            deep = out
    keys = iter(jax.random.split(jax.random.key(seed), len(shapes) + len(ways) + 1))
    params: dict[str, Any] = {
        "convs": [{"kernel": _affine(next(keys), shape, 2.0)["kernel"]} for shape in shapes],
        "ways": [{"kernel": _affine(next(keys), shape, 2.0)["kernel"]} for shape in ways],
        "norms": [_unit(shape[3]) for shape in [*shapes, *ways]],
        "head": _affine(next(keys), (deep, num_outputs), 1.0),
    }
    normalise = GroupNorm(groups)

    def apply(params: Any, x: Array) -> Array:
        h, leading = _images(x, input_shape, image)
        convs, ways = iter(params["convs"]), iter(params["ways"])
        norms, way_norms = iter(params["norms"]), iter(params["norms"][len(shapes) :])

        def step(h: Array, stride: int) -> Array:
            return normalise(next(norms), convolution(h, next(convs)["kernel"], stride, 1))

        h = jax.nn.relu(step(h, 1))
        for stride in strides:
            inner = step(jax.nn.relu(step(h, stride)), 1)
            if inner.shape != h.shape:
                h = normalise(next(way_norms), convolution(h, next(ways)["kernel"], stride, 0))
            h = jax.nn.relu(inner + h)
        h = h.mean((1, 2))
        return (h @ params["head"]["kernel"] + params["head"]["bias"]).reshape(*leading, -1)

    return apply, params


def _pooled(h: Array, size: int) -> Array:
    """The maximum of each size x size square; what is left over at the border is dropped."""
    rows, columns = h.shape[1] // size, h.shape[2] // size
    cut = h[:, : rows * size, : columns * size]
    return cut.reshape(len(h), rows, size, columns, size, -1).max((2, 4))


def _normalised(params: dict[str, Array], h: Array) -> Array:
    """Layer normalisation over all but the first axis, scale and bias along the last."""
    axes = tuple(range(1, h.ndim))
    centred = h - h.mean(axes, keepdims=True)
    gain = lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + _EPSILON)
    return centred * gain * params["scale"] + params["bias"]


def _affine(key: Array, shape: tuple[int, ...], gain: float) -> dict[str, Array]:
    spread = np.sqrt(gain / np.prod(shape[:-1]))
    return {"kernel": jax.random.normal(key, shape, float) * spread, "bias": jnp.zeros(shape[-1], float)}


def _unit(size: int) -> dict[str, Array]:
    return {"scale": jnp.ones(size, float), "bias": jnp.zeros(size, float)}


def _checked_image(input_shape: Sequence[int], widths: Sequence[int]) -> tuple[int, int, int]:
    """(H, W, C)."""
    image = list(input_shape)
    if len(image) not in (2, 3) or not all(_is_size(n) for n in image):
        raise ValueError(f"input_shape is {tuple(image)}; (H, W) or (H, W, C) of whole numbers >= 1 is accepted")
    if not all(_is_size(n) for n in widths):
        raise ValueError(f"the widths and num_outputs are {list(widths)}; whole numbers >= 1 are accepted")
    height, width, *deep = image
    return height, width, deep[0] if deep else 1


def _is_size(n: Any) -> bool:
    return not isinstance(n, bool) and isinstance(n, int | np.integer) and int(n) >= 1


def _images(x: Array, given: Sequence[int], image: tuple[int, int, int]) -> tuple[Array, tuple[int, ...]]:
    """x as (N, H, W, C), and its leading axes."""
    if list(jnp.shape(x)[-len(given) :]) != list(given):
        raise ValueError(f"x has shape {jnp.shape(x)}; this network takes images (..., {', '.join(map(str, given))})")
    return jnp.reshape(x, (-1, *image)), jnp.shape(x)[: -len(given)]
