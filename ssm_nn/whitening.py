"""The square root of a precision: coordinates in which a belief is round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Whitening"]

Array = Any


class Whitening(NamedTuple):
    """R with ``Lambda = R^T R``: for z = R d the quadratic form ``d^T Lambda d`` is ``|z|^2``.

    Attributes:
        whiten: d (P,) -> ``R d``.
        colour: z (P,) -> ``R^-1 z``.
        smallest: a lower bound of the eigenvalues of Lambda, reached where its root is elementwise.
    """

    whiten: Callable[[Array], Array]
    colour: Callable[[Array], Array]
    smallest: Array
