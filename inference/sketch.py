"""The information of a task by a randomised sketch, for networks and tasks whose columns are too many to stream.

The generalised Gauss-Newton matrix of a small batch b is the second moment of one gradient with random signs e,

    v_b = sum_{n in b} J_n^T L_n e_n,   E[v_b v_b^T] = sum_{n in b} J_n^T L_n L_n^T J_n

so that one backward pass over the task gives unbiased columns for all of G. In coordinates whitened by the prediction's
diagonal D, A = D^-1/2 G D^-1/2:

    range   Q = orth(A_1 Omega), Omega (P, R + oversampling) of random signs
    factor  Z = A_2 Q;  A ~ Z (Q^T Z)^-1 Z^T                            (Nystroem, never above A_2)

with A_1 and A_2 from independent signs, so that the factor's size is not fitted to the noise that chose its range; the rest
of the diagonal of A_2 goes to the diagonal. Sources: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061); Tropp, Yurtsever,
Udell, Cevher 2017 (arXiv 1706.05736).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import index_batches, rows, some_examples
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.curvature import Information, random_column, sampled_gradient
from ssm_nn.inference.structures import Diagonal, LowRank, Structure
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, compress
from ssm_nn.tasks import Task
from ssm_nn.weight_mesh import tall_skinny_qr

__all__ = ["SketchedCurvature"]

Array = Any

_RANGE_EXAMPLES = 20
_COLUMNS_TOGETHER = 50  # one product with 50 columns costs little more than with one: the image is read once


@dataclass(frozen=True)
class SketchedCurvature:
    """Sketch of the information, O(n P (R + oversampling) / column_batch) for n examples, whatever the number of outputs.

    The evidence takes what is outside the factor by its diagonal, which bounds its log-determinant from above
    (Hadamard): the log evidence is a lower bound of Laplace's, up to the sketch's noise.

    Args:
        examples: n, drawn from the task and scaled up to it; a task of fewer is used whole.
        oversampling: columns of the sketch beyond the rank.
        column_batch: examples behind one random column. An entry of the diagonal has the relative standard error
            ``sqrt(2 column_batch / n)`` at most.
    """

    examples: int = 10_000
    oversampling: int = 10
    column_batch: int = 40

    def __post_init__(self):
        check_count(examples=self.examples, column_batch=self.column_batch)
        check_count(0, oversampling=self.oversampling)

    def gather(
        self,
        space: StateSpace,
        structure: Structure,
        theta: Array,
        task: Task,
        predicted: Any,
        power: Array,
        key: Array,
    ) -> Information:
        """Sketch the whitened information, split it into factor and diagonal, and bound its log-determinant."""
        if not isinstance(structure, LowRank | Diagonal):
            raise ValueError(f"SketchedCurvature serves LowRank and Diagonal, not {structure}; use ExactCurvature")
        rank = structure.rank if isinstance(structure, LowRank) else 0
        subset_key, first_key, second_key, omega_key = jax.random.split(key, 4)
        columns, scale = self._small_batches(task, subset_key)
        if rank and columns.shape[0] * columns.shape[1] < 2 * (rank + self.oversampling):
            raise ValueError(
                f"column_batch is {self.column_batch}: the task gives {columns.shape[0] * columns.shape[1]} random columns, "
                f"too few for rank {rank}; two for each of rank + oversampling are needed, from a smaller column_batch"
            )
        scale = scale * power
        metric = predicted.precision_diagonal()
        whiten = jax.lax.rsqrt(metric)
        width = min(rank + self.oversampling, theta.shape[0]) if rank else 0
        basis = jnp.zeros((theta.shape[0], 0), theta.dtype)
        if rank:
            omega = _signs(omega_key, theta.shape[0], width).astype(theta.dtype)
            _, image = self._pass(space, theta, task, self._for_range(columns, width), whiten, omega, first_key)
            basis, _ = tall_skinny_qr(image)
        squares, image = self._pass(space, theta, task, columns, whiten, basis, second_key)
        diagonal = scale * metric * squares
        if not isinstance(structure, LowRank):
            gain = jnp.sum(jnp.log1p(diagonal / metric))
            return Information(DiagonalPrecision(diagonal), gain, jnp.ones((), theta.dtype))
        factor = jnp.sqrt(scale * metric)[:, None] * _nystroem(basis, image)
        kept = compress(factor, metric, rank)
        rest = jnp.maximum(diagonal - jnp.sum(jnp.square(kept.factor), axis=1), 0.0)
        gain = predicted.add(DiagonalPlusLowRank(rest, kept.factor)).logdet() - predicted.logdet()
        share = jnp.sum(rest / metric) / jnp.maximum(jnp.sum(diagonal / metric), jnp.finfo(theta.dtype).tiny)
        site = DiagonalPlusLowRank(rest if structure.keep_diagonal else jnp.zeros_like(rest), kept.factor)
        return Information(site, gain, share)

    def log_likelihood_and_gradient(self, space: StateSpace, theta: Array, task: Task) -> tuple[Array, Array]:
        """Log likelihood of the whole task; its gradient from the first ``examples`` examples, scaled up."""
        return sampled_gradient(space, theta, task, self.examples)

    def _small_batches(self, task: Task, key: Array) -> tuple[Array, Array]:
        """Indices (groups, columns, column_batch) of examples drawn without replacement, and what one of them counts."""
        total = task.num_examples
        chosen, counted = some_examples(key, task, self.examples)
        columns = index_batches(chosen, min(self.column_batch, total), total)
        together = min(_COLUMNS_TOGETHER, columns.shape[0])
        groups = index_batches(columns.ravel(), together * columns.shape[1], total)
        return groups.reshape(-1, together, columns.shape[1]), jnp.sum(task.mask) / counted

    @staticmethod
    def _for_range(columns: Array, width: int) -> Array:
        """Two shorter columns for each of the range's own: it needs directions, not sizes."""
        length = _RANGE_EXAMPLES if columns.shape[2] % _RANGE_EXAMPLES == 0 else columns.shape[2]
        shorter = columns.reshape(-1, length)
        groups = -(-2 * width // _COLUMNS_TOGETHER)
        together = min(-(-2 * width // groups), shorter.shape[0] // groups)
        return shorter[: groups * together].reshape(groups, together, length)

    def _pass(
        self, space: StateSpace, theta: Array, task: Task, columns: Array, whiten: Array, directions: Array, key: Array
    ) -> tuple[Array, Array]:
        """diag(A) (P,) and ``A directions`` (P, S) from one pass over the examples, each counted once."""
        # whitened on this side, since the columns are many
        whitened = directions * whiten[:, None]

        def step(carry, inputs):
            squares, image = carry
            some = jax.vmap(lambda indices, key: random_column(space, theta, rows(task, indices), key))(*inputs)
            # both products read the columns as they lie in memory
            image = image + (some @ whitened).T @ some
            return (squares + jnp.sum(jnp.square(some), axis=0), image), None

        start = (jnp.zeros_like(theta), jnp.zeros_like(whitened.T))
        (squares, image), _ = jax.lax.scan(step, start, (columns, jax.random.split(key, columns.shape[:2])))
        return squares * jnp.square(whiten), (image * whiten).T


def _signs(key: Array, size: int, width: int) -> Array:
    """Random signs (size, width), 32 from each random word."""
    words = jax.random.bits(key, (size, -(-width // 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(size, -1)[:, :width].astype(jnp.int32)


def _nystroem(basis: Array, image: Array) -> Array:
    """B (P, S) with ``B B^T = Z (Q^T Z)^+ Z^T`` for Q = basis, Z = image = A Q."""
    core = basis.T @ image
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    # directions in which the core is rounding error would be blown up by its inverse root
    floor = jnp.finfo(image.dtype).eps * core.shape[0] * jnp.max(jnp.abs(values), initial=0.0)
    inverse_root = jnp.where(values > floor, jax.lax.rsqrt(jnp.maximum(values, floor)), 0.0)
    return image @ (vectors * inverse_root)
