"""Likelihoods of the outputs f = W phi of a linear head, point by point, with weights on the points.

    g = d log p(y | f) / d f,    Lambda = E_{y | f} [ -d^2 log p(y | f) / d f^2 ] = L L^T

For all four below Lambda is the Hessian itself, so that Newton's method and the generalised Gauss-Newton method agree.
Factors come from ``ssm_nn.likelihoods``, as in every engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ssm_nn.likelihoods import likelihood_of

__all__ = ["Bernoulli", "Categorical", "Gaussian", "HeadLikelihood", "Poisson"]

Array = Any


class HeadLikelihood(Protocol):
    """What an update asks of a likelihood. Shapes: f, g, v (n, K), y with n leading, factors (n, K, C)."""

    @property
    def num_outputs(self) -> int:
        """K."""
        ...

    @property
    def degrees(self) -> int:
        """The rank of Lambda: K - 1 for classes, whose logits may shift together, else K."""
        ...

    def checked(self, y: Any) -> Any:
        """Labels as arrays of the right dtype; ValueError for what lies outside the support."""
        ...

    def log_prob(self, f: Array, y: Any) -> Array:
        """(n,)."""
        ...

    def gradient(self, f: Array, y: Any) -> Array:
        """g (n, K)."""
        ...

    def factor(self, f: Array, y: Any) -> Array:
        """L (n, K, C)."""
        ...

    def weigh(self, f: Array, y: Any, v: Array) -> Array:
        """``Lambda(f) v`` (n, K)."""
        ...

    def diagonal(self, f: Array, y: Any) -> Array:
        """Diagonal of Lambda (n, K)."""
        ...

    def distribution(self, f: Array, y: Any) -> dist.Distribution:
        """Of one label at outputs f (..., K); leading axes are batch axes."""
        ...

    def grown(self, num_new: int) -> HeadLikelihood:
        """With more outputs; ValueError where there cannot be more."""
        ...


class _Canonical:
    """Likelihoods of known form, whose canonical outputs are f itself."""

    num_outputs: int

    @property
    def degrees(self) -> int:
        """K."""
        return self.num_outputs

    def distribution(self, f: Array, y: Any = None) -> Any:
        """At outputs f (..., K)."""
        raise NotImplementedError

    def log_prob(self, f: Array, y: Array) -> Array:
        """(n,)."""
        return self.distribution(f).log_prob(y)

    def gradient(self, f: Array, y: Array) -> Array:
        """``d log p / d f`` (n, K)."""
        return jax.grad(lambda f: jnp.sum(self.log_prob(f, y)))(f)

    def factor(self, f: Array, y: Array) -> Array:
        """L (n, K, C)."""
        return likelihood_of(self.distribution(f)).factor(y)

    def weigh(self, f: Array, y: Array, v: Array) -> Array:
        """``Lambda v``, with diagonal Lambda."""
        return self.diagonal(f, y) * v

    def diagonal(self, f: Array, y: Array) -> Array:
        """``sum_c L_kc^2`` (n, K)."""
        return jnp.sum(jnp.square(self.factor(f, y)), axis=-1)

    def grown(self, num_new: int) -> Any:
        """Refused: only classes arrive later."""
        raise ValueError(f"num_new is {num_new}, but only Categorical can have new outputs")


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["num_classes"])
@dataclass(frozen=True)
class Categorical(_Canonical):
    """``y ~ Categorical(softmax f)``, y in 0 ... K - 1. ``Lambda = diag(p) - p p^T``, finite for any logits.

    Args:
        num_classes: K >= 2.
    """

    num_classes: int

    def __post_init__(self):
        _check_count("num_classes", self.num_classes, 2)

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.num_classes

    @property
    def degrees(self) -> int:
        """K - 1: logits that shift together change nothing."""
        return self.num_classes - 1

    def checked(self, y: Any) -> Array:
        """Labels (n,) as int32."""
        y = _one_axis("y", y)
        whole = y.astype(np.int64, copy=False) if y.dtype.kind in "iub" else np.round(y)
        bad = ~((y == whole) & (whole >= 0) & (whole < self.num_classes))
        if bad.any():
            where = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"y is {y[where]} at index {where}; whole numbers from 0 to {self.num_classes - 1} are accepted "
                "(new classes come with engine.grow)"
            )
        return whole.astype(np.int32)

    def distribution(self, f: Array, y: Any = None) -> dist.CategoricalLogits:
        """``Categorical(softmax f)``."""
        del y
        return dist.CategoricalLogits(f)

    def log_prob(self, f: Array, y: Array) -> Array:
        """``f_y - logsumexp f``; a class that is absent stands at the least finite number."""
        return jnp.take_along_axis(jax.nn.log_softmax(f), y[:, None], axis=1)[:, 0]

    def gradient(self, f: Array, y: Array) -> Array:
        """``onehot(y) - p``."""
        return jax.nn.one_hot(y, self.num_classes, dtype=f.dtype) - jax.nn.softmax(f)

    def weigh(self, f: Array, y: Array, v: Array) -> Array:
        """``p * (v - p^T v)``."""
        p = jax.nn.softmax(f)
        return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))

    def diagonal(self, f: Array, y: Array) -> Array:
        """``p (1 - p)``, with 1 - p as a sum of the others."""
        p = jax.nn.softmax(f)
        top = jax.nn.one_hot(jnp.argmax(f, axis=-1), self.num_classes, dtype=f.dtype)
        # 1 - p cancels for the largest class alone
        return p * jnp.where(top > 0, jnp.sum(p * (1 - top), axis=-1, keepdims=True), 1 - p)

    def grown(self, num_new: int) -> Categorical:
        """With more classes."""
        _check_count("num_new", num_new, 1)
        return Categorical(self.num_classes + num_new)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Bernoulli(_Canonical):
    """``y ~ Bernoulli(sigmoid f)``, K = 1, y 0 or 1."""

    @property
    def num_outputs(self) -> int:
        """1."""
        return 1

    def checked(self, y: Any) -> Array:
        """Labels (n,) as int32."""
        y = _one_axis("y", y)
        bad = ~((y == 0) | (y == 1))
        if bad.any():
            where = int(np.flatnonzero(bad)[0])
            raise ValueError(f"y is {y[where]} at index {where}; 0 and 1 are accepted")
        return y.astype(np.int32)

    def distribution(self, f: Array, y: Any = None) -> dist.BernoulliLogits:
        """``Bernoulli(sigmoid f)``."""
        del y
        return dist.BernoulliLogits(f[..., 0])


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Poisson(_Canonical):
    """``y ~ Poisson(exp f)``, K = 1, y a whole number >= 0."""

    @property
    def num_outputs(self) -> int:
        """1."""
        return 1

    def checked(self, y: Any) -> Array:
        """Counts (n,) as int32."""
        y = _one_axis("y", y)
        bad = ~((y >= 0) & (y == np.round(y)))
        if bad.any():
            where = int(np.flatnonzero(bad)[0])
            raise ValueError(f"y is {y[where]} at index {where}; whole numbers >= 0 are accepted")
        return y.astype(np.int32)

    def distribution(self, f: Array, y: Any = None) -> dist.Poisson:
        """``Poisson(exp f)``."""
        del y
        return dist.Poisson(jnp.exp(f[..., 0]))

    def log_prob(self, f: Array, y: Array) -> Array:
        """``y f - exp f - log y!``, whose gradient stays finite where exp f underflows."""
        eta = f[..., 0]
        return y * eta - jnp.exp(eta) - jax.scipy.special.gammaln(y + jnp.ones((), f.dtype))

    def factor(self, f: Array, y: Array) -> Array:
        """``exp(f / 2)``."""
        del y
        return jnp.exp(f / 2)[..., None]


@partial(jax.tree_util.register_dataclass, data_fields=["noise_scale"], meta_fields=["num_outputs"])
@dataclass(frozen=True)
class Gaussian(_Canonical):
    """``y ~ N(f, noise_scale^2)``, independently in K outputs; updates are exact.

    Args:
        noise_scale: standard deviation of the observations, > 0.
        num_outputs: K.
    """

    noise_scale: Any
    num_outputs: int = 1

    def __post_init__(self):
        if isinstance(self.noise_scale, int | float) and not 0 < self.noise_scale < float("inf"):
            raise ValueError(f"noise_scale is {self.noise_scale}; a finite number > 0 is accepted")
        _check_count("num_outputs", self.num_outputs, 1)

    def checked(self, y: Any) -> Array:
        """Targets as (n, K); (n,) is taken where K = 1."""
        y = np.asarray(y)
        y = y[:, None] if y.ndim == 1 and self.num_outputs == 1 else y
        if y.ndim != 2 or y.shape[1] != self.num_outputs:
            raise ValueError(f"y has shape {y.shape}; (n, {self.num_outputs}) is accepted")
        if not np.isfinite(y.astype(float)).all():
            raise ValueError("y holds numbers that are not finite; finite ones are accepted")
        return y.astype(jax.dtypes.canonicalize_dtype(float))

    def distribution(self, f: Array, y: Any = None) -> dist.Distribution:
        """``N(f, noise_scale^2 I)``."""
        del y
        return dist.Normal(f, jnp.asarray(self.noise_scale, f.dtype)).to_event(1)

    def gradient(self, f: Array, y: Array) -> Array:
        """``(y - f) / noise_scale^2``."""
        return (y - f) / jnp.square(jnp.asarray(self.noise_scale, f.dtype))

    def factor(self, f: Array, y: Array) -> Array:
        """``I / noise_scale``: the location's part of the Normal's factor; the head does not move its scale."""
        located = likelihood_of(dist.Normal(f, jnp.asarray(self.noise_scale, f.dtype))).factor(y)[..., 0, 0]
        return located[..., None] * jnp.eye(self.num_outputs, dtype=f.dtype)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; a whole number >= {least} is accepted")


def _one_axis(name: str, y: Any) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iubf":
        raise ValueError(f"{name} has shape {y.shape} and dtype {y.dtype}; numbers of shape (n,) are accepted")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"{name} is not finite at index {int(np.flatnonzero(~np.isfinite(y))[0])}")
    return y
