"""Independent weights: ``1 / s_kd = 1 + sum_n w_n Lambda_n,kk phi_nd^2``, in K D numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["DiagonalHead", "DiagonalInformation"]

Array = Any


@dataclass(frozen=True)
class DiagonalHead:
    """Independent weights, in K D numbers."""

    exact = False

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        return num_outputs * num_features

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> DiagonalInformation:
        """Ones."""
        return DiagonalInformation(jnp.ones((num_outputs, num_features), dtype))

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> DiagonalInformation:
        """The same."""
        return self.prior(num_outputs, num_features, dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["precision"], meta_fields=[])
@dataclass(frozen=True)
class DiagonalInformation:
    """Precisions (K, D); see ``ssm_nn.inference.last_layer.structures.HeadBelief``."""

    precision: Array

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.precision.shape[0]

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K)."""
        between = jnp.einsum("nd,kd,md->knm", phi, 1 / self.precision, phi)
        return jnp.einsum("knm,kl->nkml", between, jnp.eye(self.num_outputs, dtype=phi.dtype))

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        return (a.T @ phi) / self.precision

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> DiagonalInformation:
        """Squares are added."""
        return DiagonalInformation(self.precision + _squares(phi, likelihood, f, y, weight))

    def absorb_few(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[DiagonalInformation, Array]:
        """``absorb``, and the change of ``log |S|``."""
        made = self.absorb(phi, likelihood, f, y, weight)
        return made, made.log_determinant() - self.log_determinant()

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> DiagonalInformation:
        """Squares are subtracted; what falls below the prior by rounding is the prior."""
        return DiagonalInformation(jnp.maximum(self.precision - _squares(phi, likelihood, f, y, weight), 1.0))

    def absorbed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[DiagonalInformation, Array]:
        """``absorb`` and the log determinant of what it gives."""
        made = self.absorb(phi, likelihood, f, y, weight)
        return made, made.log_determinant()

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K)."""
        return self.output_variance(phi)[..., None] * jnp.eye(self.num_outputs, dtype=phi.dtype)

    def output_variance(self, phi: Array) -> Array:
        """(n, K)."""
        return jnp.square(phi) @ (1 / self.precision).T

    def information(self) -> DiagonalInformation:
        """Itself."""
        return self

    def matvec(self, v: Array) -> Array:
        """``S^-1 v`` (K, D)."""
        return self.precision * v

    def block(self) -> Array:
        """(D, D), averaged over the outputs."""
        return jnp.diag(jnp.mean(self.precision, axis=0))

    def log_determinant(self) -> Array:
        """``log |S|``."""
        return -jnp.sum(jnp.log(self.precision))

    def trace(self) -> Array:
        """``tr S``."""
        return jnp.sum(1 / self.precision)

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return 1 / self.precision

    def step(self, gain: Array, noise: Array) -> DiagonalInformation:
        """``a^2 s + q``."""
        return DiagonalInformation(self.precision / (jnp.square(gain) + noise * self.precision))

    def grown(self, num_new: int) -> DiagonalInformation:
        """New outputs of which nothing is known."""
        return DiagonalInformation(jnp.pad(self.precision, ((0, num_new), (0, 0)), constant_values=1.0))

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        noise = jax.random.normal(key, (num_samples, *self.precision.shape), self.precision.dtype)
        return noise / jnp.sqrt(self.precision)


def _squares(phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> Array:
    information = jnp.where(weight[:, None] > 0, weight[:, None] * likelihood.diagonal(f, y), 0.0)
    return information.T @ jnp.square(phi)
