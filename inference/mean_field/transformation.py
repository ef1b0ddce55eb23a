"""The mean-field update as an optax gradient transformation, for those who want the optimiser alone.

    params = Gaussian(mean, sigma),  two pytrees alike
    grads  = jax.grad(C)(params),    C the expected sum of -log p over the batch, for example at draw(params, key)
    updates, state = transform.update(grads, state, params);  params = optax.apply_updates(params, updates)

The parameters are the belief that meets the next batch: a step is the rule's update, then the window's forgetting.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.inference.mean_field.forgetting import Gaussian
from ssm_nn.inference.mean_field.rules import FixedPoint, UpdateRule

__all__ = ["draw", "mean_field"]

Array = Any


def mean_field(
    steps: float,
    rule: UpdateRule = FixedPoint(),  # noqa: B008  (it has no fields)
    *,
    prior_mean: float = 0.0,
    prior_sigma: float = 1.0,
    trust: float = 1.0,
) -> optax.GradientTransformation:
    """The filter's step on parameters ``Gaussian(mean, sigma)``.

    Args:
        steps: length of the window in steps, >= 1 (examples over the batch size); inf forgets nothing.
        rule: the update rule.
        prior_mean, prior_sigma: of the prior, to which forgetting leads; prior_sigma > 0.
        trust: as in ``MeanFieldFilter``.

    Returns:
        A GradientTransformation without state; its ``update`` needs the parameters. Its updates are to be added as they
        are, without a learning rate. A sigma that is not positive comes out as nan.
    """
    if not steps >= 1:
        raise ValueError(f"steps is {steps}; a number >= 1 is accepted, inf for no forgetting")
    if not prior_sigma > 0:
        raise ValueError(f"prior_sigma is {prior_sigma}; a number > 0 is accepted")
    if not trust > 0:
        raise ValueError(f"trust is {trust}; a number > 0 is accepted, inf for no limit")
    rho = 1 / steps

    def init(params: Gaussian) -> optax.EmptyState:
        _check(params)
        return optax.EmptyState()

    def update(
        grads: Gaussian, state: optax.EmptyState, params: Gaussian | None = None
    ) -> tuple[Gaussian, optax.EmptyState]:
        if params is None:
            raise ValueError("params is None; the mean-field update needs the belief that it changes")
        _check(params)

        def leaf(mean: Array, sigma: Array, gradient: Array, slope: Array) -> Gaussian:
            prior = Gaussian(jnp.full_like(mean, prior_mean), jnp.full_like(sigma, prior_sigma))
            made = rule.update(Gaussian(mean, sigma), prior, rho, gradient, slope / sigma, trust).belief
            made = rule.predict(made, prior, rho)
            return Gaussian(made.mean - mean, jnp.where(made.sigma > 0, made.sigma - sigma, jnp.nan))

        steps_by_leaf = jax.tree.map(leaf, params.mean, params.sigma, grads.mean, grads.sigma)
        means, sigmas = (
            jax.tree.map(lambda step, n=n: step[n], steps_by_leaf, is_leaf=lambda x: isinstance(x, Gaussian))
            for n in (0, 1)
        )
        return Gaussian(means, sigmas), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def draw(params: Gaussian, key: Array) -> Any:
    """``mean + sigma e``, e standard normal: weights as a pytree, differentiable in the parameters."""
    leaves, structure = jax.tree.flatten(params.mean)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(lambda m, s, k: m + s * jax.random.normal(k, m.shape, m.dtype), params.mean, params.sigma, keys)


def _check(params: Gaussian) -> None:
    if not isinstance(params, Gaussian):
        raise ValueError(f"params is of type {type(params).__name__}; Gaussian(mean, sigma) of two pytrees is accepted")
