"""What a mean field has learnt about the curvature of the loss: the importance of every weight.

    1 / sigma^2 = N H + 1 / sigma_p^2    where the window holds N examples, once it is filled, so that

    H = (1 / sigma^2 - 1 / sigma_p^2) / N,         N infinite: H = lim 1 / (n sigma_n^2) over n examples

H the diagonal of the Hessian of -log p(y | x, w), an example, expected under the belief and averaged over the window. It lies
above the Hessian at the mean where the belief is wide: for softmax regression of digits by 2 % at the median under the prior
N(0, 0.1^2), by 19 % under N(0, 1) (``benchmarks/mean_field.py hessian``). Source: Bonnet et al., arXiv 2504.13569.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import jax.numpy as jnp

from ssm_nn.extraction import extract
from ssm_nn.inference.batches import as_arrays
from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.states import MeanFieldState
from ssm_nn.tasks import Task, as_task

__all__ = ["importance"]

Array = Any


def importance(engine: MeanFieldFilter, state: MeanFieldState, batch: Task | Mapping[str, Any]) -> Array:
    """H (P,), in nats per squared weight and example; ``batch`` gives shapes.

    Exact at the stationary point of the filter; before about two windows of examples it is too small. The variance of the
    draws leaves a relative error of a few per cent.

    Raises:
        ValueError: for a filter without a finite window that has seen no example yet.
    """
    space = extract(engine.program, as_arrays(as_task(batch)), engine.hypers)
    precision = 1 / jnp.square(state.sigma)
    if engine.window is not None and isfinite(engine.window.examples):
        return (precision - 1 / space.prior_variance) / engine.window.examples
    if int(state.examples) < 1:
        raise ValueError("state has seen no examples; without a window the importance is a mean over examples")
    return precision / state.examples
