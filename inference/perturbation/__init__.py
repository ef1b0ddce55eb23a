"""Hessian-aware low-rank perturbation (HALRP): each task's weights are a cheap transformation of a base."""

from ssm_nn.inference.perturbation.allocation import Evidence, ExactQuadratic, FixedRank, PaperShare
from ssm_nn.inference.perturbation.baselines import ElasticHeads, FineTuned, HeadTraining, L2ToBase, Packed, SingleTask
from ssm_nn.inference.perturbation.directions import PlainSVD, Whitened
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.fitting import SitePrior
from ssm_nn.inference.perturbation.graphs import Chain, InitialStar, Star, UncertainBase
from ssm_nn.inference.perturbation.joint import train_jointly
from ssm_nn.inference.perturbation.pruning import AllTasks, Growth, OwnTask
from ssm_nn.inference.perturbation.published import CIFAR100, FIVE_DATASETS, PERMUTED_MNIST, TINY_IMAGENET, Published
from ssm_nn.inference.perturbation.state import PerturbationState, Storage, UpdateInfo
from ssm_nn.inference.perturbation.task_posteriors import posterior_of

__all__ = [
    "CIFAR100",
    "FIVE_DATASETS",
    "PERMUTED_MNIST",
    "TINY_IMAGENET",
    "AllTasks",
    "Chain",
    "ElasticHeads",
    "Evidence",
    "ExactQuadratic",
    "FineTuned",
    "FixedRank",
    "Growth",
    "HeadTraining",
    "InitialStar",
    "L2ToBase",
    "OwnTask",
    "Packed",
    "PaperShare",
    "PerturbationFilter",
    "PerturbationState",
    "PlainSVD",
    "Published",
    "SingleTask",
    "SitePrior",
    "Star",
    "Storage",
    "UncertainBase",
    "UpdateInfo",
    "Whitened",
    "posterior_of",
    "train_jointly",
]
