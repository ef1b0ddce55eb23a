"""Transition kernels: how the weights of one leaf move between tasks.

Each is an object with ``moments(leaf)``. For another kernel by leaf use ``ssm_nn.ByPath``, by task ``ssm_nn.PerTask``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ssm_nn.moments import Leaf, Moments, Transition, moments_of

__all__ = ["OrnsteinUhlenbeck", "Permuted", "RandomWalk", "Rotated", "ShrinkAndPerturb", "Static"]

Array = Any


def _reject(name: str, value: Array, bad: Any, accepted: str) -> None:
    if not isinstance(value, Tracer) and bool(np.any(bad(np.asarray(value)))):
        raise ValueError(f"{name} is {value}; accepted is {accepted}")


class Static(NamedTuple):
    """``theta_t = theta_{t-1}``: the leaf is one for all tasks, and online Laplace its filter."""

    def moments(self, leaf: Leaf) -> Moments:
        """Gain 1, no noise."""
        del leaf
        return Moments()


class RandomWalk(NamedTuple):
    """``theta_t ~ N(theta_{t-1}, scale^2)``.

    Attributes:
        scale: standard deviation of one step, >= 0, broadcastable to the leaf.
    """

    scale: Array

    def moments(self, leaf: Leaf) -> Moments:
        """Gain 1, noise scale^2."""
        del leaf
        _reject("the scale of RandomWalk", self.scale, lambda v: ~(v >= 0), "a standard deviation >= 0")
        return Moments(noise=jnp.square(self.scale))


class OrnsteinUhlenbeck(NamedTuple):
    """``theta_t ~ N(m_0 + g (theta_{t-1} - m_0), (1 - g^2) s_0^2)``: keeps the prior N(m_0, s_0^2) stationary.

    Attributes:
        retention: g in [0, 1]; 1 is static, 0 draws the leaf anew from the prior.
    """

    retention: Array

    def moments(self, leaf: Leaf) -> Moments:
        """Gain g, shift (1 - g) m_0, noise (1 - g^2) s_0^2."""
        g = self.retention
        _reject("the retention of OrnsteinUhlenbeck", g, lambda v: ~((v >= 0) & (v <= 1)), "a number in [0, 1]")
        # (1 - g)(1 + g), not 1 - g^2: no cancellation near 1
        return Moments(g, (1 - g) * leaf.loc, (1 - g) * (1 + g) * jnp.square(leaf.scale))


class ShrinkAndPerturb(NamedTuple):
    """``theta_t ~ N(shrink theta_{t-1}, scale^2)`` (Ash and Adams 2020).

    Attributes:
        shrink: factor on the old weights.
        scale: standard deviation of the perturbation, >= 0.
    """

    shrink: Array
    scale: Array

    def moments(self, leaf: Leaf) -> Moments:
        """Gain shrink, noise scale^2."""
        del leaf
        _reject("the scale of ShrinkAndPerturb", self.scale, lambda v: ~(v >= 0), "a standard deviation >= 0")
        return Moments(self.shrink, 0.0, jnp.square(self.scale))


class Permuted(NamedTuple):
    """Reorder the leaf along an axis, then move it: ``theta_t | theta_{t-1} ~ then(theta_{t-1}[permutation])``.

    For a known permutation of the inputs: where x_t[:, i] = x_{t-1}[:, permutation[i]], the first layer's rows move
    along (``axis`` 0 of a flax kernel (in, out), 1 of an equinox weight (out, in)).

    Attributes:
        permutation: indices (size of the axis,).
        axis: axis of the leaf that runs over the inputs.
        then: the kernel applied afterwards.
    """

    permutation: Array
    axis: int = 0
    then: Transition = Static()

    def moments(self, leaf: Leaf) -> Moments:
        """Those of ``then``, with the permutation in front."""
        moments = moments_of(self.then, leaf)
        if moments.permutation is not None:
            raise ValueError("Permuted inside Permuted; compose the two permutations into one")
        size = leaf.shape[self.axis] if -len(leaf.shape) <= self.axis < len(leaf.shape) else 0
        _reject(
            f"the permutation for {leaf.path!r}",
            self.permutation,
            lambda v: v.ndim != 1 or sorted(v.tolist()) != list(range(size)),
            f"each of 0 .. {size - 1} once (axis {self.axis} of shape {leaf.shape})",
        )
        return moments._replace(permutation=self.permutation, axis=self.axis)


class Rotated(NamedTuple):
    """Turn the leaf along an axis, then move it: ``theta_t | theta_{t-1} ~ then(O theta_{t-1})``, O orthogonal.

    For inputs turned by a known map: where x_t = x_{t-1} O^T, the first layer's rows move along, as for ``Permuted``. The
    structures ``Kronecker`` and ``Dense`` carry it exactly; ``ssm_nn.models.rotations.orthogonal_rotation`` makes O for
    images.

    Attributes:
        matrix: O, orthogonal (n, n) to 1e-4, n the size of the axis.
        axis: axis of the leaf that runs over the inputs.
        then: the kernel applied afterwards; its gain and noise must be the same for all entries of the axis.
    """

    matrix: Array
    axis: int = 0
    then: Transition = Static()

    def moments(self, leaf: Leaf) -> Moments:
        """Those of ``then``, with O in front."""
        moments = moments_of(self.then, leaf)
        if moments.permutation is not None:
            raise ValueError("Rotated around another known map; multiply the two into one matrix")
        matrix = self.matrix if isinstance(self.matrix, Tracer) else np.asarray(self.matrix, float)
        if not isinstance(matrix, Tracer):
            square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
            off = np.max(np.abs(matrix @ matrix.T - np.eye(len(matrix)))) if square else np.inf
            if not off < 1e-4:
                raise ValueError(
                    f"the matrix of Rotated for {leaf.path!r} has shape {matrix.shape} and differs from an orthogonal one by "
                    f"{off:.2g}; an orthogonal matrix is accepted, such as orthogonal_rotation's"
                )
        return moments._replace(permutation=jnp.asarray(matrix, float), axis=self.axis)
