"""Checks of arguments, and of a task's data before anything is learnt from them."""

from __future__ import annotations

from math import isfinite
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import with_mask
from ssm_nn.tasks import Task

__all__ = ["check_count", "check_finite", "check_positive", "check_support", "check_task", "is_finite"]

Array = Any


def check_count(least: int = 1, /, **named: Any) -> None:
    """Raise ValueError for an argument that is not a whole number, or below ``least``."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number >= {least} is accepted")


def check_finite(least: float, **named: Any) -> None:
    """Raise ValueError for an argument that is no number, not finite, or below ``least``."""
    for name, value in named.items():
        if not (is_finite(value) and value >= least):
            raise ValueError(f"{name} is {value!r}; a finite number >= {least:g} is accepted")


def check_positive(**named: Any) -> None:
    """Raise ValueError for an argument that is no number, not finite, or not above 0."""
    for name, value in named.items():
        if not (is_finite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; a finite number > 0 is accepted")


def is_finite(value: Any) -> bool:
    """Whether it is a number, and a finite one."""
    try:
        return isfinite(value)
    except TypeError:  # no number
        return False


def check_task(task: Task) -> None:
    """Raise ValueError if a counted example holds a number that is not finite."""
    for name, array in task.data.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            continue
        values = np.asarray(array)
        with np.errstate(all="ignore"):
            if np.isfinite(np.sum(values)):  # three times faster than a look at each number
                continue
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        bad = ~finite if task.mask is None else ~finite & np.asarray(task.mask)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{name!r} of the task is not finite in {int(bad.sum())} examples, the first at index {first}"
            )


def check_support(space: StateSpace, task: Task) -> dict[str, Array]:
    """By site: whether all counted values lie in the likelihood's support. Fit for ``jit``; costs no forward pass where
    the support does not depend on the network's outputs."""
    verdicts = {}
    for name, site in space.observed(space.initial, with_mask(task)).items():
        support: Any = site.distribution.support
        inside = support(site.value)
        weight = jnp.broadcast_to(site.weight, jnp.shape(inside))
        verdicts[name] = jnp.all(inside | (weight == 0))
    return verdicts
