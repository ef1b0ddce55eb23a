"""What is kept of the covariance of a head's weights, and which form suits a size.

Weights are whitened: the prior of V (K, D) is the identity. Exact forms: ``Full``, ``SquareRoot``. Approximate ones:
``KroneckerHead``, ``Shared``, ``DiagonalHead``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.shared_covariance import Shared

__all__ = ["Chosen", "HeadBelief", "HeadInformation", "HeadStructure", "choose"]

Array = Any

FULL_LIMIT = 2**24  # numbers: 128 MiB in float64; an update reads and writes all of them
FACTOR_LIMIT = 2**25  # of the Kronecker factors, whose eigenvectors each update finds anew


class HeadInformation(Protocol):
    """The inverse of a covariance, where many points come at once."""

    def matvec(self, v: Array) -> Array:
        """``S^-1 v`` (K, D)."""
        ...

    def block(self) -> Array:
        """(D, D): a typical block of one output, for a preconditioner."""
        ...

    def log_determinant(self) -> Array:
        """``log |S|``."""
        ...

    def absorbed(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> tuple[Any, Array]:
        """The belief with the points' information added, and its ``log |S|``."""
        ...


class HeadBelief(Protocol):
    """The covariance S of whitened weights; phi (n, D), a (n, K). All methods are pure and fit for ``jit``."""

    @property
    def num_outputs(self) -> int:
        """K."""
        ...

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K) between the outputs of the points."""
        ...

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        ...

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> HeadBelief:
        """With the information of points that are linearised at f."""
        ...

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> HeadBelief:
        """Without it again."""
        ...

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K)."""
        ...

    def output_variance(self, phi: Array) -> Array:
        """(n, K)."""
        ...

    def information(self) -> HeadInformation:
        """The inverse."""
        ...

    def log_determinant(self) -> Array:
        """``log |S|``."""
        ...

    def trace(self) -> Array:
        """``tr S``."""
        ...

    def variance(self) -> Array:
        """(K, D)."""
        ...

    def step(self, gain: Array, noise: Array) -> HeadBelief:
        """``A S A + Q`` with gains and noises (D,)."""
        ...

    def grown(self, num_new: int) -> HeadBelief:
        """With outputs of which nothing is known."""
        ...

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        ...


class HeadStructure(Protocol):
    """Makes the first belief."""

    exact: bool

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        ...

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> HeadBelief:
        """The identity."""
        ...

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> HeadInformation:
        """Its inverse."""
        ...


class Chosen(NamedTuple):
    """A structure, and why it was picked."""

    structure: HeadStructure
    reason: str


def choose(num_outputs: int, num_features: int, moving: bool = False) -> Chosen:
    """The richest structure that a size allows.

    Args:
        num_outputs, num_features: K, D.
        moving: the head walks at random, which a Kronecker form cannot carry.
    """
    size = num_outputs * num_features
    words = f"K = {num_outputs}, D = {num_features}"
    if Full().numbers(num_outputs, num_features) <= FULL_LIMIT:
        return Chosen(Full(), f"Full: {words}, and a {size} x {size} covariance has at most {FULL_LIMIT:,} numbers")
    too_large = f"{words}, and a {size} x {size} covariance has more than {FULL_LIMIT:,} numbers"
    if KroneckerHead().numbers(num_outputs, num_features) <= FACTOR_LIMIT:
        if not moving:
            return Chosen(KroneckerHead(), f"KroneckerHead: {too_large}")
        return Chosen(Shared(), f"Shared: {too_large}; a Kronecker form carries no random walk")
    return Chosen(DiagonalHead(), f"DiagonalHead: {too_large}, and so have the factors of a Kronecker form")
