"""Plain networks: a pair (apply, params) that ``ssm_nn.weights`` takes as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["ACTIVATIONS", "mlp"]

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
    if len(widths) < 2 or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in widths):
        raise ValueError(f"sizes is {widths}; at least two whole numbers >= 1 are accepted, from input to output")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)} and any function")
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = [
        {
            "kernel": jax.random.normal(key, (fan_in, fan_out), float) / np.sqrt(fan_in),
            "bias": jnp.zeros(fan_out, float),
        }
        for key, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True)
    ]

    def apply(params: Params, x: Array) -> Array:
        *hidden, last = params["layers"]
        for layer in hidden:
            x = act(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    return apply, {"layers": layers}
