"""Parts of a filter, and states, that are none, named before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.perturbation.fitting import SitePrior
from ssm_nn.inference.perturbation.pruning import Growth

__all__ = ["check_parts", "step_of"]

# argument -> a method that each accepted object has, and what is accepted
_OBJECTS = {
    "directions": ("split", "PlainSVD(), Whitened()"),
    "allocation": ("candidates", "PaperShare(), ExactQuadratic(), Evidence(), FixedRank(3)"),
    "graph": ("kernels", "Star(), Chain(), UncertainBase(), InitialStar()"),
    "pruning": ("prune", "OwnTask(), AllTasks()"),
}
_CLASSES = {
    "minibatch": Minibatch,
    "fine_tuning": Minibatch,
    "prior": SitePrior,
    "growth": Growth,
    "hypers": Mapping,
}


def check_parts(program: Any, **parts: Any) -> None:
    """Raise ValueError for a program that cannot be called, and for a part that is neither None nor of its kind."""
    if not callable(program):
        raise ValueError(
            f"program is {program!r}; a NumPyro program of tasks is accepted, such as multi_head(...) makes"
        )
    for name, part in parts.items():
        if part is None:
            continue
        if name in _CLASSES:
            if not isinstance(part, _CLASSES[name]):
                raise ValueError(f"{name} is {part!r}; a {_CLASSES[name].__name__} is accepted, or None")
        elif isinstance(part, type | str) or not hasattr(part, _OBJECTS[name][0]):
            raise ValueError(f"{name} is {part!r}; accepted are {_OBJECTS[name][1]} and None")


def step_of(state: Any) -> int:
    """Number of tasks that a state has seen; ValueError for anything else."""
    if not isinstance(step := getattr(state, "step", None), int):
        raise ValueError(f"state is {state!r}; what init, update or run of this engine gave is accepted")
    return step
