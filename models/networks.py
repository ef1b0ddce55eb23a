"""Plain networks: a pair (apply, params) that ``ssm_nn.weights`` takes as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssm_nn.convolutions import conv_general_dilated

__all__ = ["ACTIVATIONS", "GroupNorm", "cnn", "convolution", "mlp"]

Array = Any
Params = dict[str, list[dict[str, Array]]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}


def mlp(
    sizes: Sequence[int], activation: str | Callable[[Array], Array] = "tanh", seed: int = 0
) -> tuple[Callable[[Params, Array], Array], Params]:
    """``h_0 = x,  h_l = activation(h_{l-1} W_l + b_l)``, the last layer without activation.

    Args:
        sizes: widths from the input to the output, at least two: ``(64, 24, 10)`` has one hidden layer.
        activation: a name of ``ACTIVATIONS`` or a function that acts element by element.
        seed: of the initial weights: kernels N(0, 1 / fan-in) (LeCun), biases 0.

    Returns:
        (apply, params): ``apply(params, x)`` maps x (..., sizes[0]) to (..., sizes[-1]); the leaves have the paths
        ``layers.0.kernel`` (in, out), ``layers.0.bias`` (out,), ``layers.1.kernel``, ...

    Raises:
        ValueError: fewer than two sizes, a size below 1, an unknown activation.
    """
    widths = list(sizes)
    if len(widths) < 2 or not all(map(_is_size, widths)):
        raise ValueError(f"sizes is {widths}; at least two whole numbers >= 1 are accepted, from input to output")
    act = _activation(activation)
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = [_affine(key, shape) for key, shape in zip(keys, pairwise(widths), strict=True)]

    def apply(params: Params, x: Array) -> Array:
        return _dense(params["layers"], act, x)

    return apply, {"layers": layers}


class GroupNorm(NamedTuple):
    """``scale (z - mean) / sqrt(variance + epsilon) + bias``, moments over the positions and channels of one group of
    one example (Wu and He 2018): no example sees another, and nothing is kept from call to call.

    Attributes:
        groups: the channels of a layer are cut into so many groups of neighbours; 1 is layer normalisation.
        epsilon: added to the variance. The default is that of the paper's code; a group that is constant over an
            image (a black border, a dead unit) has variance 0, and is left at 0 instead of being divided by it.
    """

    groups: int = 4
    epsilon: float = 1e-5

    def __call__(self, params: dict[str, Array], z: Array) -> Array:
        """z (N, H, W, C) -> (N, H, W, C), with params ``scale`` (C,) and ``bias`` (C,)."""

        def over_group(value: Array) -> Array:
            """The group's mean of (N, H, W, C), beside each of its channels: (N, 1, 1, C)."""
            # positions first, channels after: the small array is the one whose axes are cut up
            channels = value.mean((1, 2)).reshape(len(value), self.groups, -1)
            return jnp.repeat(channels.mean(-1), channels.shape[-1], axis=1)[:, None, None]

        centred = z - over_group(z)
        gain = params["scale"] * lax.rsqrt(over_group(jnp.square(centred)) + self.epsilon)
        return centred * gain + params["bias"]


def cnn(
    input_shape: Sequence[int],
    channels: Sequence[int] = (16, 32, 32),
    hidden: Sequence[int] = (),
    num_outputs: int = 10,
    activation: str | Callable[[Array], Array] = "relu",
    normaliser: GroupNorm | None = GroupNorm(),  # noqa: B008  (a tuple of numbers)
    seed: int = 0,
) -> tuple[Callable[[Params, Array], Array], Params]:
    """``h_l = activation(normalise(h_{l-1} * K_l + b_l))`` for each entry of ``channels``, then ``mlp`` on the result.

    The convolutions are 3 x 3 with stride 2 and a border of zeros, so that each halves height and width (rounded up).

    Args:
        input_shape: (H, W) or (H, W, C).
        channels: of the convolutions, one or more.
        hidden: widths of the hidden dense layers between the convolutions and the output.
        num_outputs: width of the output.
        activation: a name of ``ACTIVATIONS`` or a function that acts element by element.
        normaliser: ``GroupNorm(groups)``, whose ``groups`` must divide each entry of ``channels``, or None.
        seed: of the initial weights: kernels N(0, 1 / fan-in) (LeCun), biases 0, scales 1.

    Returns:
        (apply, params): ``apply(params, x)`` maps x (..., H, W) or (..., H, W, C) to (..., num_outputs). The leaves have
        the paths ``convs.0.kernel`` (3, 3, in, out), ``convs.0.bias`` (out,), ``norms.0.scale`` (out,), ``norms.0.bias``
        (out,), ``layers.0.kernel`` (in, out), ``layers.0.bias`` (out,), ... A dense layer sees the pixels of the last
        convolution row by row, channels fastest. ``apply`` raises ValueError for images of another shape.

    Raises:
        ValueError: a size below 1, an input that is no image, an unknown activation, groups that do not fit.
    """
    image, widths, dense = list(input_shape), list(channels), [*hidden, num_outputs]
    if len(image) not in (2, 3) or not all(map(_is_size, image)):
        raise ValueError(f"input_shape is {tuple(image)}; (H, W) or (H, W, C) of whole numbers >= 1 is accepted")
    if not widths or not all(map(_is_size, widths)):
        raise ValueError(f"channels is {widths}; at least one whole number >= 1 is accepted, one for a convolution")
    if not all(map(_is_size, dense)):
        raise ValueError(f"hidden and num_outputs are {dense}; whole numbers >= 1 are accepted")
    if normaliser is not None and (normaliser.groups < 1 or any(n % normaliser.groups for n in widths)):
        raise ValueError(
            f"normaliser is {normaliser} for channels {widths}; groups must divide each of them (1 always does)"
        )
    act = _activation(activation)
    stacked = [image[2] if len(image) == 3 else 1, *widths]
    positions = [-(-side // 2 ** len(widths)) for side in image[:2]]
    sizes = [positions[0] * positions[1] * widths[-1], *dense]
    shapes = [(3, 3, *pair) for pair in zip(stacked[:-1], widths, strict=True)]
    shapes += list(pairwise(sizes))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    affine = [_affine(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    params: Params = {"convs": affine[: len(widths)], "layers": affine[len(widths) :]}
    if normaliser is not None:
        params["norms"] = [{"scale": jnp.ones(n, float), "bias": jnp.zeros(n, float)} for n in widths]

    def apply(params: Params, x: Array) -> Array:
        if list(jnp.shape(x)[-len(image) :]) != image:
            raise ValueError(
                f"x has shape {jnp.shape(x)}; this network takes images (..., {', '.join(map(str, image))})"
            )
        leading = jnp.shape(x)[: -len(image)]
        h = jnp.reshape(x, (-1, image[0], image[1], stacked[0]))
        for n, layer in enumerate(params["convs"]):
            # the output (r, c) is centred on the pixel (2 r, 2 c), whatever the parity of H and W
            h = convolution(h, layer["kernel"], 2, 1) + layer["bias"]
            h = act(h if normaliser is None else normaliser(params["norms"][n], h))
        return _dense(params["layers"], act, h.reshape(*leading, sizes[0]))

    return apply, params


def convolution(h: Array, kernel: Array, stride: int, border: int) -> Array:
    """(N, H, W, in) by (h, w, in, out) -> (N, H', W', out) with ``border`` zeros on every side."""
    dtype = jnp.result_type(h, kernel)  # the convolution itself promotes nothing
    pads = ((border, border), (border, border))
    return conv_general_dilated(
        h.astype(dtype), kernel.astype(dtype), (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _dense(layers: Sequence[dict[str, Array]], act: Callable[[Array], Array], x: Array) -> Array:
    *hidden, last = layers
    for layer in hidden:
        x = act(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def _affine(key: Array, shape: tuple[int, ...]) -> dict[str, Array]:
    """A kernel (..., in, out) drawn from N(0, 1 / fan-in) and a bias (out,) of zeros."""
    fan_in = np.prod(shape[:-1])
    return {"kernel": jax.random.normal(key, shape, float) / np.sqrt(fan_in), "bias": jnp.zeros(shape[-1], float)}


def _activation(activation: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)} and any function")
    return ACTIVATIONS[activation] if isinstance(activation, str) else activation


def _is_size(n: Any) -> bool:
    return not isinstance(n, bool) and isinstance(n, int | np.integer) and int(n) >= 1
