"""Square-root information of a head's weights: R upper triangular with S^-1 = R^T R, for long streams in float32.

    [R; L_1^T J_1; ...; L_n^T J_n] = Q R'        (QR: nothing is subtracted, nothing inverted)

Exact like ``Full``. An update costs O((K D)^3) whatever the number of points: give it many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.full_covariance import weighted_factor
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["SquareRoot", "SquareRootInformation"]

Array = Any


@dataclass(frozen=True)
class SquareRoot:
    """The triangular root of the precision, exact, in (K D)^2 numbers."""

    exact = True

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        return (num_outputs * num_features) ** 2

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> SquareRootInformation:
        """The identity."""
        return SquareRootInformation(jnp.eye(num_outputs * num_features, dtype=dtype), num_outputs)

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> SquareRootInformation:
        """The same."""
        return self.prior(num_outputs, num_features, dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["root"], meta_fields=["num_outputs"])
@dataclass(frozen=True)
class SquareRootInformation:
    """R (K D, K D); see ``ssm_nn.inference.last_layer.structures.HeadBelief``."""

    root: Array
    num_outputs: int

    def _whitened(self, phi: Array) -> Array:
        """``R^-T J^T`` (K D, n, K)."""
        columns = jnp.einsum("nd,kl->kdnl", phi, jnp.eye(self.num_outputs, dtype=phi.dtype))
        size = self.root.shape[0]
        return self._back(columns.reshape(size, -1)).reshape(size, phi.shape[0], self.num_outputs)

    def _back(self, columns: Array) -> Array:
        return jax.scipy.linalg.solve_triangular(self.root, columns, trans="T")

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K)."""
        white = self._whitened(phi)
        return jnp.einsum("ank,aml->nkml", white, white)

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        whitened = self._back((a.T @ phi).ravel())
        return jax.scipy.linalg.solve_triangular(self.root, whitened).reshape(self.num_outputs, -1)

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> SquareRootInformation:
        """QR of the root on top of the points' rows."""
        factor = weighted_factor(likelihood, f, y, weight)
        rows = jnp.einsum("nd,nkc->nckd", phi, factor).reshape(-1, self.root.shape[0])
        return self._made(jnp.concatenate([self.root, rows]))

    def _made(self, rows: Array) -> SquareRootInformation:
        root = jnp.linalg.qr(rows, mode="r")
        return SquareRootInformation(root * jnp.sign(jnp.diagonal(root))[:, None], self.num_outputs)

    def corrected(
        self,
        before: SquareRootInformation,
        mean: Array,
        moved: Array,
        phi: Array,
        likelihood: HeadLikelihood,
        y: Any,
        weight: Array,
    ) -> Array:
        """The mean after two more steps of Newton in the weights, which mend the dual's rounding; self is after the points."""
        for _ in range(2):
            g = jnp.where(weight[:, None] > 0, weight[:, None] * likelihood.gradient(phi @ moved.T, y), 0.0)
            slope = g.T @ phi - before.matvec(moved - mean)
            step = jax.scipy.linalg.solve_triangular(self.root, self._back(slope.ravel()))
            moved = moved + step.reshape(moved.shape)
        return moved

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> SquareRootInformation:
        """``R^T (I - W W^T) R`` with W = R^-T U; not finite where the points were never absorbed."""
        factor = weighted_factor(likelihood, f, y, weight)
        white = jnp.einsum("ank,nkc->anc", self._whitened(phi), factor).reshape(self.root.shape[0], -1)
        left = jnp.linalg.cholesky(jnp.eye(self.root.shape[0], dtype=white.dtype) - white @ white.T)
        return self._made(left.T @ self.root)

    def absorbed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[SquareRootInformation, Array]:
        """``absorb`` and the log determinant of what it gives."""
        made = self.absorb(phi, likelihood, f, y, weight)
        return made, made.log_determinant()

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K)."""
        white = self._whitened(phi)
        return jnp.einsum("ank,anl->nkl", white, white)

    def output_variance(self, phi: Array) -> Array:
        """Diagonals of ``output_covariance`` (n, K)."""
        return jnp.sum(jnp.square(self._whitened(phi)), axis=0)

    def information(self) -> SquareRootInformation:
        """Itself."""
        return self

    def matvec(self, v: Array) -> Array:
        """``R^T R v``."""
        return (self.root.T @ (self.root @ v.ravel())).reshape(v.shape)

    def block(self) -> Array:
        """(D, D): the blocks of one output of ``R^T R``, averaged over the outputs."""
        cut = self.root.reshape(self.root.shape[0], self.num_outputs, -1)
        return jnp.einsum("akd,ake->de", cut, cut) / self.num_outputs

    def _inverse(self) -> Array:
        return jax.scipy.linalg.solve_triangular(self.root, jnp.eye(self.root.shape[0], dtype=self.root.dtype))

    def log_determinant(self) -> Array:
        """``log |S|``."""
        return -2 * jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.root))))

    def trace(self) -> Array:
        """``tr S``."""
        return jnp.sum(jnp.square(self._inverse()))

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return jnp.sum(jnp.square(self._inverse()), axis=1).reshape(self.num_outputs, -1)

    def step(self, gain: Array, noise: Array) -> SquareRootInformation:
        """``(A S A + Q)^-1``, by QR of ``[A R^-1, sqrt Q]``."""
        gain, noise = (jnp.tile(part, self.num_outputs) for part in (gain, noise))
        return self._of_covariance(jnp.concatenate([(gain[:, None] * self._inverse()).T, jnp.diag(jnp.sqrt(noise))]))

    def _of_covariance(self, rows: Array) -> SquareRootInformation:
        """Of the covariance ``rows^T rows``."""
        root = jnp.linalg.qr(rows, mode="r")
        size = root.shape[0]
        return self._made(jax.scipy.linalg.solve_triangular(root, jnp.eye(size, dtype=root.dtype), trans="T"))

    def smoothed(
        self, shift: Array, after: SquareRootInformation, gain: Array, noise: Array
    ) -> tuple[Array, SquareRootInformation]:
        """``G shift`` and the covariance in the light of the step after it, as a sum of squares:

        [S^1/2 A, S^1/2; Q^1/2, 0] = Q [X, Y; 0, Z],     G^T = X^-1 Y,     S' = Z^T Z + G S_after G^T
        """
        gain, noise = (jnp.tile(part, self.num_outputs) for part in (gain, noise))
        half, size = self._inverse().T, self.root.shape[0]
        spread = jnp.diag(jnp.sqrt(noise))
        joint = jnp.linalg.qr(jnp.block([[half * gain, half], [spread, jnp.zeros_like(spread)]]), mode="r")
        pull = jax.scipy.linalg.solve_triangular(joint[:size, :size], joint[:size, size:]).T
        rows = jnp.concatenate([joint[size:, size:], after._inverse().T @ pull.T])
        return (pull @ shift.ravel()).reshape(shift.shape), self._of_covariance(rows)

    def grown(self, num_new: int) -> SquareRootInformation:
        """New outputs, independent of the old and as uncertain as at first."""
        new = jnp.eye(num_new * (self.root.shape[0] // self.num_outputs), dtype=self.root.dtype)
        return SquareRootInformation(jax.scipy.linalg.block_diag(self.root, new), self.num_outputs + num_new)

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        noise = jax.random.normal(key, (self.root.shape[0], num_samples), self.root.dtype)
        return jax.scipy.linalg.solve_triangular(self.root, noise).T.reshape(num_samples, self.num_outputs, -1)
