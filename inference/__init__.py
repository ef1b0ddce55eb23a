"""The engines: programs in, beliefs over weights out."""

from ssm_nn.inference.adaptive_noise import AdaptiveFilter
from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.evidence_gradient import EvidenceGradient, maximise_evidence
from ssm_nn.inference.expectation_maximisation import learn_kernel
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.kernel_profile import profile_kernel
from ssm_nn.inference.kronecker import Kronecker, KroneckerCurvature
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.posterior import Posterior
from ssm_nn.inference.predictive import AtMean, Linearised, Prediction, ThroughNetwork, predict
from ssm_nn.inference.sketch import SketchedCurvature
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.inference.switching import SwitchingFilter
from ssm_nn.inference.task_memory import TaskMemory

__all__ = [
    "AdaptiveFilter",
    "AtMean",
    "Belief",
    "Dense",
    "Diagonal",
    "EvidenceGradient",
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
    "SwitchingFilter",
    "TaskMemory",
    "ThroughNetwork",
    "learn_kernel",
    "maximise_evidence",
    "predict",
    "profile_kernel",
]
