"""Posteriors judged: weights integrated out, importance correction, calibration, comparison, and one page of traffic lights."""

from ssm_nn.inference.diagnosis.comparison import EvidenceComparison, compare_evidence, compare_loo
from ssm_nn.inference.diagnosis.diagnose import Diagnosis, diagnose
from ssm_nn.inference.diagnosis.distances import (
    FunctionalDistance,
    GaussianDistance,
    functional_distance,
    gaussian_distance,
    gaussian_kl,
    gaussian_w2,
)
from ssm_nn.inference.diagnosis.importance import Importance, importance_weights
from ssm_nn.inference.diagnosis.innovations import Innovations, innovations
from ssm_nn.inference.diagnosis.kernel_test import KernelTest, kernel_test
from ssm_nn.inference.diagnosis.lights import Colour, Light
from ssm_nn.inference.diagnosis.marginalization import marginalize
from ssm_nn.inference.diagnosis.path_moments import PathMoments, path_moments
from ssm_nn.inference.diagnosis.scores import (
    LeaveOneOut,
    Prequential,
    leave_one_out,
    log_likelihood_tree,
    loo_by_task,
    prequential,
)
from ssm_nn.inference.diagnosis.simulation_calibration import SimulationCalibration, simulation_based_calibration
from ssm_nn.inference.diagnosis.warm_start import warm_start

__all__ = [
    "Colour",
    "Diagnosis",
    "EvidenceComparison",
    "FunctionalDistance",
    "GaussianDistance",
    "Importance",
    "Innovations",
    "KernelTest",
    "LeaveOneOut",
    "Light",
    "PathMoments",
    "Prequential",
    "SimulationCalibration",
    "compare_evidence",
    "compare_loo",
    "diagnose",
    "functional_distance",
    "gaussian_distance",
    "gaussian_kl",
    "gaussian_w2",
    "importance_weights",
    "innovations",
    "kernel_test",
    "leave_one_out",
    "log_likelihood_tree",
    "loo_by_task",
    "marginalize",
    "path_moments",
    "prequential",
    "simulation_based_calibration",
    "warm_start",
]
