"""Neural-network weights as latent states of a state-space model, on NumPyro.

The names of the language are loaded when they are first used, so that the command line can answer without loading JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_nn.extraction import Layout, StateSpace, extract
    from ssm_nn.markov_path import InnovationReparam, MarkovPath
    from ssm_nn.moments import Leaf, Moments
    from ssm_nn.program import ByPath, PerTask, Weights, over, weights
    from ssm_nn.tasks import Task, Tasks, stack_tasks

__all__ = [
    "ByPath",
    "InnovationReparam",
    "Layout",
    "Leaf",
    "MarkovPath",
    "Moments",
    "PerTask",
    "StateSpace",
    "Task",
    "Tasks",
    "Weights",
    "extract",
    "over",
    "stack_tasks",
    "weights",
]

_HOMES = {
    "extraction": ("Layout", "StateSpace", "extract"),
    "markov_path": ("InnovationReparam", "MarkovPath"),
    "moments": ("Leaf", "Moments"),
    "program": ("ByPath", "PerTask", "Weights", "over", "weights"),
    "tasks": ("Task", "Tasks", "stack_tasks"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"ssm_nn.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in ("models", "inference"):
        return import_module(f"ssm_nn.{name}")
    raise AttributeError(f"module 'ssm_nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "inference", "models"])
