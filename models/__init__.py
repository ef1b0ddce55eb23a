"""What users write with: kernels, networks, programs, task streams, data sets."""

from ssm_nn.models.transitions import OrnsteinUhlenbeck, Permuted, RandomWalk, ShrinkAndPerturb, Static

__all__ = ["OrnsteinUhlenbeck", "Permuted", "RandomWalk", "ShrinkAndPerturb", "Static"]
