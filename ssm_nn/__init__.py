"""Neural-network weights as latent states of a state-space model, on NumPyro."""

from ssm_nn.extract import Layout, StateSpace, extract
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
