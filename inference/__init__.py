"""The engines: programs in, beliefs over weights out."""

from ssm_nn.inference.adaptive_noise import AdaptiveFilter
from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.datatree import to_datatree
from ssm_nn.inference.datatree_store import write_datatree
from ssm_nn.inference.evidence_gradient import EvidenceGradient, maximise_evidence
from ssm_nn.inference.expectation_maximisation import learn_kernel
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.histories import InMemory, OnDisk, OnHost
from ssm_nn.inference.kernel_profile import profile_kernel
from ssm_nn.inference.kronecker import Kronecker, KroneckerCurvature
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.marginals import Marginals, marginals_of
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.observations import without_masked
from ssm_nn.inference.posterior import Posterior
from ssm_nn.inference.predictive import AtMean, Linearised, Prediction, ThroughNetwork, predict
from ssm_nn.inference.prefetch import prefetched
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
    "InMemory",
    "Info",
    "Kronecker",
    "KroneckerCurvature",
    "LaplaceFilter",
    "Lbfgs",
    "Linearised",
    "LowRank",
    "Marginals",
    "Minibatch",
    "OnDisk",
    "OnHost",
    "Posterior",
    "Prediction",
    "SketchedCurvature",
    "SwitchingFilter",
    "TaskMemory",
    "ThroughNetwork",
    "learn_kernel",
    "marginals_of",
    "maximise_evidence",
    "predict",
    "prefetched",
    "profile_kernel",
    "to_datatree",
    "without_masked",
    "write_datatree",
]
