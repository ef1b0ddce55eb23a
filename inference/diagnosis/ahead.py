"""The belief of every task before its data came: what the filter predicted, and was then judged by.

theta_t | D_1 .. D_{t-1} ~ N(a O m_{t-1} + b, (A Lambda_{t-1}^-1 A + Q)^-1),    the prior for the first task
"""

from __future__ import annotations

from typing import Any

import jax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.beliefs import Belief, Filtered, predict_belief
from ssm_nn.inference.structures import Structure
from ssm_nn.tasks import Task, Tasks

__all__ = ["predicted_beliefs"]

Array = Any


def predicted_beliefs(filtered: Filtered, stack: Tasks) -> list[Belief]:
    """One Belief a task; ``stack`` gives the first task's shapes and context."""
    first = _prior(filtered.program, filtered.structure, filtered.hypers, stack.at(0))
    later = [
        _predicted(belief, info.moments) for belief, info in zip(filtered.beliefs, filtered.infos[1:], strict=False)
    ]
    return [first, *later]


def _prior(program: Program, structure: Structure, hypers: Any, task: Task) -> Belief:
    space = extract(program, task, hypers)
    return Belief(space.prior_mean, structure.fitted(space, task).prior(space.prior_variance))


@jax.jit
def _predicted(belief: Belief, moments: Any) -> Belief:
    return predict_belief(Belief(belief.mean, belief.precision), moments)
