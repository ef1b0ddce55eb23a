"""What a transition kernel says of one leaf: the moments of a linear-Gaussian step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ssm_nn.coordinate_map import along_axis, is_indices

__all__ = ["Leaf", "Moments", "Transition", "step_mean"]

Array = Any


class Leaf(NamedTuple):
    """One array of weights as a kernel sees it.

    Attributes:
        path: dotted name inside its network, such as ``"layers.0.kernel"``.
        shape: shape of the array.
        loc, scale: prior mean and standard deviation, broadcastable to ``shape``.
    """

    path: str
    shape: tuple[int, ...]
    loc: Array
    scale: Array


class Moments(NamedTuple):
    """``theta_t | theta_{t-1} ~ N(gain * O theta_{t-1} + shift, noise)``, coordinate by coordinate after O.

    Attributes:
        gain, shift: broadcastable to the leaf.
        noise: variance, >= 0, broadcastable to the leaf; 0 makes the step deterministic.
        permutation: O, applied along ``axis`` of the leaf before the gain: indices (n,), an orthogonal matrix (n, n) of
            floating-point numbers, or None. In the moments of all weights together it is a ``CoordinateMap``.
        axis: the axis of the leaf on which O acts.
    """

    gain: Array = 1.0
    shift: Array = 0.0
    noise: Array = 0.0
    permutation: Array | None = None
    axis: int = 0


# the axis is part of the structure, not data: indexing along it happens at trace time
jax.tree_util.register_pytree_node(
    Moments,
    lambda m: ((m.gain, m.shift, m.noise, m.permutation), m.axis),
    lambda axis, children: Moments(*children, axis=axis),
)


@runtime_checkable
class Transition(Protocol):
    """How one leaf moves between tasks. Any function ``Leaf -> Moments`` serves as well."""

    def moments(self, leaf: Leaf) -> Moments:
        """Moments of the step into the next task."""
        ...


def moments_of(transition: Transition | Callable[[Leaf], Moments], leaf: Leaf) -> Moments:
    """The kernel's moments for ``leaf``.

    Raises:
        ValueError: if the kernel is no kernel, its moments do not broadcast to the leaf, or its noise is negative.
    """
    if isinstance(transition, Transition):
        moments = transition.moments(leaf)
    elif callable(transition):
        moments = transition(leaf)
    else:
        raise ValueError(
            f"transition is {transition!r}; accepted are a kernel such as RandomWalk(0.1) and a function Leaf -> Moments"
        )
    if not isinstance(moments, Moments):
        raise ValueError(f"transition returned {type(moments).__name__} for {leaf.path!r}; it must return Moments")
    return moments


def check_moments(moments: Moments, leaf: Leaf, leading: tuple[int, ...] = ()) -> None:
    """Raise ValueError where moments do not fit the leaf (shapes), or a concrete noise is negative or not finite."""
    allowed = leading + leaf.shape
    for name in ("gain", "shift", "noise"):
        shape = jnp.shape(getattr(moments, name))
        try:
            fits = jnp.broadcast_shapes(shape, allowed) == allowed
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"the kernel's {name} for {leaf.path!r} has shape {shape}; it must broadcast to {allowed}")
        value = getattr(moments, name)
        if not isinstance(value, Tracer) and not bool(np.all(np.isfinite(value))):
            raise ValueError(f"the kernel's {name} for {leaf.path!r} is not finite")
    if not isinstance(moments.noise, Tracer) and bool(np.any(np.asarray(moments.noise) < 0)):
        raise ValueError(f"the kernel's noise for {leaf.path!r} is negative; a variance is accepted, >= 0")
    concrete = not any(isinstance(m, Tracer) for m in (moments.gain, moments.noise))
    if concrete and bool(np.any((np.asarray(moments.gain) == 0) & (np.asarray(moments.noise) == 0))):
        raise ValueError(
            f"the kernel's gain and noise for {leaf.path!r} are both 0 somewhere: no variance would be left"
        )
    if moments.permutation is not None:
        size = leaf.shape[moments.axis] if -len(leaf.shape) <= moments.axis < len(leaf.shape) else None
        shape = jnp.shape(moments.permutation)[len(leading) :]
        if size is None or shape != ((size,) if is_indices(moments.permutation) else (size, size)):
            raise ValueError(
                f"the kernel maps axis {moments.axis} of {leaf.path!r} (shape {leaf.shape}) with an array of shape {shape} and "
                f"dtype {jnp.result_type(moments.permutation)}; one index for each row, or a square matrix, is accepted"
            )


def step_mean(moments: Moments, value: Array) -> Array:
    """``gain * O value + shift`` for one leaf ``value``."""
    if moments.permutation is not None:
        value = along_axis(moments.permutation, value, moments.axis)
    return moments.gain * value + moments.shift
