"""Metaplastic mean-field learning (MESU): predict, update, smooth, one number of uncertainty a weight."""

from ssm_nn.inference.mean_field.engine import Checkpoint, MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Gaussian, Window
from ssm_nn.inference.mean_field.gradients import LocalReparameterisation, WeightSampling
from ssm_nn.inference.mean_field.importance import importance
from ssm_nn.inference.mean_field.progress import LearningBar
from ssm_nn.inference.mean_field.rules import FirstOrder, FixedPoint, Ivon, Natural
from ssm_nn.inference.mean_field.starts import AtPrior, FanIn, OwnWeights
from ssm_nn.inference.mean_field.states import MeanFieldInfo, MeanFieldState
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.inference.mean_field.trajectory import filter_path, posterior_of, smooth_path
from ssm_nn.inference.mean_field.transformation import draw, mean_field

__all__ = [
    "AtPrior",
    "Batches",
    "Checkpoint",
    "FanIn",
    "FirstOrder",
    "FixedPoint",
    "Gaussian",
    "Ivon",
    "LearningBar",
    "LocalReparameterisation",
    "MeanFieldFilter",
    "MeanFieldInfo",
    "MeanFieldState",
    "Natural",
    "OwnWeights",
    "WeightSampling",
    "Window",
    "draw",
    "filter_path",
    "importance",
    "mean_field",
    "posterior_of",
    "smooth_path",
]
