"""The engines: programs in, beliefs over weights out."""

from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.kronecker import Kronecker, KroneckerCurvature
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.posterior import Posterior
from ssm_nn.inference.predictive import AtMean, Linearised, Prediction, ThroughNetwork, predict
from ssm_nn.inference.sketch import SketchedCurvature
from ssm_nn.inference.structures import Dense, Diagonal, LowRank

__all__ = [
    "AtMean",
    "Belief",
    "Dense",
    "Diagonal",
    "ExactCurvature",
    "FilterState",
    "FilterWarning",
    "Filtered",
    "GaussNewton",
    "Info",
    "Kronecker",
    "KroneckerCurvature",
    "LaplaceFilter",
    "Lbfgs",
    "Linearised",
    "LowRank",
    "Minibatch",
    "Posterior",
    "Prediction",
    "SketchedCurvature",
    "ThroughNetwork",
    "predict",
]
