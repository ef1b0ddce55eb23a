"""Gaussian beliefs over weights by their precision: what every structure offers, and the choice of one.

A belief is a mean m (P,) and a precision Lambda. Each structure is a NamedTuple of arrays with the parameter axis first, and
has the same named read-outs. The dense form is the exact twin that the others are tested against.

    DensePrecision(matrix)                 Lambda = matrix              ssm_nn/precision_dense.py
    DiagonalPrecision(diagonal)            Lambda = diag(d)             ssm_nn/precision_diagonal.py
    DiagonalPlusLowRank(diagonal, factor)  Lambda = diag(d) + U U^T     ssm_nn/precision_low_rank.py
    KroneckerEigen(blocks, rest)           Lambda_l = (V_A (x) V_G) diag(vec S) (V_A (x) V_G)^T a layer
                                                                        ssm_nn/precision_kronecker.py

The information that a task adds, and the message that the smoother sends backwards, are of the same family but only
positive semi-definite: they may be added to a precision, not solved with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

from ssm_nn.coordinate_map import CoordinateMap
from ssm_nn.moments import Moments
from ssm_nn.whitening import Whitening

__all__ = ["Precision", "permuted", "step_mean_vector", "unpermuted", "unpermuted_vector"]

Array = Any


class Precision(Protocol):
    """A symmetric positive definite (P, P) operator."""

    def matvec(self, x: Array) -> Array:
        """``Lambda x`` for x (P,)."""
        ...

    def solve(self, x: Array) -> Array:
        """``Lambda^-1 x`` for x (P,) or (P, K)."""
        ...

    def solver(self) -> Callable[[Array], Array]:
        """``solve`` prepared for many vectors x (P,): factors are made once."""
        ...

    def logdet(self) -> Array:
        """``log det Lambda``."""
        ...

    def precision_diagonal(self) -> Array:
        """``diag Lambda`` (P,)."""
        ...

    def variance(self) -> Array:
        """``diag Lambda^-1`` (P,), the marginal variances."""
        ...

    def quadratic(self, x: Array) -> Array:
        """``x^T Lambda x`` as a sum of squares, so that it cannot turn negative."""
        ...

    def quadratic_form(self) -> Callable[[Array], Array]:
        """``quadratic`` prepared for many evaluations: factors are made, and laid out for reading, once."""
        ...

    def whitening(self) -> Whitening:
        """A square root; a product with it costs no more than one with Lambda."""
        ...

    def sample(self, key: Array) -> Array:
        """A draw (P,) from N(0, Lambda^-1)."""
        ...

    def to_dense(self) -> Array:
        """(P, P)."""
        ...

    def add(self, site: Any) -> Self:
        """``Lambda + site``, uncompressed; ``site`` is of the same structure, positive semi-definite."""
        ...

    def absorb(self, site: Any) -> Self:
        """``add`` for the information of the newest data, in whatever basis that came in."""
        ...

    def no_information(self) -> Self:
        """The information of a task without data."""
        ...

    def add_columns(self, columns: Array) -> Precision:
        """``Lambda + V V^T`` exactly, V (P, K), in whatever structure holds it."""
        ...

    def mapped(self, coordinates: CoordinateMap) -> Self:
        """Precision of ``O theta``.

        Raises:
            ValueError: for a map that the structure cannot carry.
        """
        ...

    def predict(self, moments: Moments) -> Self:
        """Precision of ``gain * theta + shift + N(0, noise)``: ``(A Lambda^-1 A + Q)^-1`` without inverting Q."""
        ...

    def smoother_gain(self, moments: Moments, x: Array) -> Array:
        """``G x`` with ``G = Lambda^-1 A Lambda'^-1`` for x (P,), Lambda' the prediction."""
        ...

    def sample_conditional(self, moments: Moments, key: Array) -> Array:
        """A draw (P,) from N(0, H), H the covariance of theta_t given theta_{t+1}: ``H^-1 = Lambda + A Q^-1 A``."""
        ...

    def conditional_log_density(self, moments: Moments, residual: Array) -> Array:
        """``log N(residual; 0, H)`` over the coordinates with noise; the others are determined by theta_{t+1}."""
        ...

    def message_before(self, message: Any, moments: Moments) -> Any:
        """The information ``A (B^-1 + Q)^-1 A`` on theta_t of a message B on theta_{t+1}, before compression."""
        ...


def step_mean_vector(moments: Moments, mean: Array) -> Array:
    """``gain * O mean + shift`` for a vector (P,)."""
    moved = mean if moments.permutation is None else moments.permutation(mean)
    return moments.gain * moved + moments.shift


def permuted(precision: Any, moments: Moments) -> Any:
    """The precision in the coordinates in which the gain acts, those of ``O theta``."""
    return precision if moments.permutation is None else precision.mapped(moments.permutation)


def unpermuted(precision: Any, moments: Moments) -> Any:
    """The inverse of ``permuted``."""
    return precision if moments.permutation is None else precision.mapped(moments.permutation.inverse())


def unpermuted_vector(moments: Moments, x: Array) -> Array:
    """``x`` (P,) of the gain's coordinates in those of theta."""
    return x if moments.permutation is None else moments.permutation.inverse()(x)
