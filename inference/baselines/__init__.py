"""What filters are compared with, on the same program, network, optimiser and budget."""

from ssm_nn.inference.baselines.elastic_weights import OnlineEWC
from ssm_nn.inference.baselines.plain import FineTuning, JointTraining
from ssm_nn.inference.baselines.replay import Replay
from ssm_nn.inference.baselines.structured_laplace import StructuredLaplace
from ssm_nn.inference.baselines.synaptic_intelligence import SynapticIntelligence
from ssm_nn.inference.baselines.variational_continual import VariationalContinual

__all__ = [
    "FineTuning",
    "JointTraining",
    "OnlineEWC",
    "Replay",
    "StructuredLaplace",
    "SynapticIntelligence",
    "VariationalContinual",
]
