"""How much of the precision a filter keeps: ``LowRank(20)``, ``Diagonal()``, ``Dense()``.

A structure makes the first belief from the prior, gathers the information of a task column by column, and cuts a belief
back to its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.checks import check_count
from ssm_nn.moments import Moments
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, compress
from ssm_nn.tasks import Task

__all__ = ["Cut", "Dense", "Diagonal", "LowRank", "Structure"]

Array = Any


class Cut(NamedTuple):
    """A precision cut to the structure's size, and the share of the whitened trace that left its factor."""

    precision: Any
    dropped_share: Array


class AnyProgram:
    """Structures that need to know nothing of the program, and carry every step."""

    def fitted(self, space: StateSpace, task: Task) -> Self:
        """Itself."""
        del space, task
        return self

    def curvature(self) -> None:
        """The exact one."""
        return

    def check_step(self, moments: Moments, precision: Any) -> None:
        """Every step with gains and noises by weight; what a map asks is checked where it is applied."""
        del moments, precision


class Structure(Protocol):
    """What a filter asks of a structure; all methods are pure and fit for ``jit``."""

    def fitted(self, space: StateSpace, task: Task) -> Structure:
        """The structure with what it must know of the program before the first belief; ``task`` gives shapes."""
        ...

    def curvature(self) -> Any:
        """The curvature that suits the structure, where the user names none; None is the exact one."""
        ...

    def check_step(self, moments: Moments, precision: Any) -> None:
        """Raise ValueError for a step that the structure cannot carry; the arrays are concrete."""
        ...

    def prior(self, variance: Array) -> Any:
        """Precision of independent weights with the given variances (P,)."""
        ...

    def gather(self, site: Any, columns: Array, metric: Array) -> Cut:
        """``site + V V^T`` for columns V (P, K), cut to size; ``metric`` (P,) whitens; a site of None is zero."""
        ...

    def cut(self, precision: Any) -> Cut:
        """A precision after ``add``, cut to size."""
        ...

    def cut_message(self, message: Any, precision: Any) -> Any:
        """A backward message cut to size in the metric of the belief it will be added to."""
        ...


@dataclass(frozen=True)
class LowRank(AnyProgram):
    """Diagonal plus ``rank`` columns, O(P rank) memory; at full rank exact.

    Args:
        rank: R >= 0.
        keep_diagonal: add the diagonal of what is cut off to the diagonal, so that diag(Lambda) stays exact
            (default); otherwise drop it, so that no covariance is under-estimated.
    """

    rank: int
    keep_diagonal: bool = True

    def __post_init__(self):
        check_count(0, rank=self.rank)

    def prior(self, variance: Array) -> DiagonalPlusLowRank:
        """``diag(1 / variance)``."""
        return DiagonalPlusLowRank(1 / variance, jnp.zeros((variance.shape[0], self.rank), variance.dtype))

    def gather(self, site: DiagonalPlusLowRank | None, columns: Array, metric: Array) -> Cut:
        """Cut ``[V_site V]`` in the whitened metric."""
        if site is None:
            return self._cut(DiagonalPlusLowRank(jnp.zeros_like(metric), columns), metric)
        return self._cut(DiagonalPlusLowRank(site.diagonal, jnp.concatenate([site.factor, columns], axis=1)), metric)

    def cut(self, precision: DiagonalPlusLowRank) -> Cut:
        """Cut in the metric of its own diagonal."""
        return self._cut(precision, precision.diagonal)

    def cut_message(self, message: DiagonalPlusLowRank, precision: DiagonalPlusLowRank) -> DiagonalPlusLowRank:
        """Cut in the metric of the filtered belief's diagonal."""
        return self._cut(message, precision.diagonal).precision

    def _cut(self, wide: DiagonalPlusLowRank, metric: Array) -> Cut:
        kept = compress(wide.factor, metric, self.rank)
        added = kept.dropped_diagonal if self.keep_diagonal else 0.0
        return Cut(DiagonalPlusLowRank(wide.diagonal + added, kept.factor), kept.dropped_share)


@dataclass(frozen=True)
class Diagonal(AnyProgram):
    """The diagonal alone, O(P) memory: the filter that online EWC approximates."""

    def prior(self, variance: Array) -> DiagonalPrecision:
        """``diag(1 / variance)``."""
        return DiagonalPrecision(1 / variance)

    def gather(self, site: DiagonalPrecision | None, columns: Array, metric: Array) -> Cut:
        """Add the squares of the columns."""
        before = jnp.zeros_like(metric) if site is None else site.diagonal
        diagonal = before + jnp.sum(jnp.square(columns), axis=1)
        return Cut(DiagonalPrecision(diagonal), jnp.ones((), columns.dtype))

    def cut(self, precision: DiagonalPrecision) -> Cut:
        """Nothing to cut."""
        return Cut(precision, jnp.zeros((), precision.diagonal.dtype))

    def cut_message(self, message: DiagonalPrecision, precision: DiagonalPrecision) -> DiagonalPrecision:
        """Nothing to cut."""
        del precision
        return message


@dataclass(frozen=True)
class Dense(AnyProgram):
    """The full matrix, O(P^2) memory and O(P^3) time: exact, for up to a few thousand weights."""

    def prior(self, variance: Array) -> DensePrecision:
        """``diag(1 / variance)``."""
        return DensePrecision(jnp.diag(1 / variance))

    def gather(self, site: DensePrecision | None, columns: Array, metric: Array) -> Cut:
        """Add ``V V^T``."""
        del metric
        return self.cut(DensePrecision(columns @ columns.T) if site is None else site.add_columns(columns))

    def cut(self, precision: DensePrecision) -> Cut:
        """Nothing to cut."""
        return Cut(precision, jnp.zeros((), precision.matrix.dtype))

    def cut_message(self, message: DensePrecision, precision: DensePrecision) -> DensePrecision:
        """Nothing to cut."""
        del precision
        return message
