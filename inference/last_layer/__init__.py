"""Bayesian last-layer updates in closed form, removal of data, and active learning with them."""

from ssm_nn.inference.last_layer.acquisition import Entropy, Margin, Random
from ssm_nn.inference.last_layer.acquisition_design import BAIT, InformationGain
from ssm_nn.inference.last_layer.acquisition_diversity import BADGE, TypiClust
from ssm_nn.inference.last_layer.acquisition_information import BALD, BatchBALD
from ssm_nn.inference.last_layer.acquisition_lookahead import ExpectedEntropy, Foreseen, Sequential
from ssm_nn.inference.last_layer.active_learner import ActiveLearner, ActiveState
from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.evidence import TunedHead, tune_head
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_datatree import head_datatree
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from ssm_nn.inference.last_layer.head_predictions import AtMode, MeanField, MonteCarlo, Probit
from ssm_nn.inference.last_layer.head_states import HeadState, UpdateInfo
from ssm_nn.inference.last_layer.heads import feature_head, network_head
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.last_layer_mixture import LastLayerMixture, MixtureInfo, MixtureState
from ssm_nn.inference.last_layer.moving import smooth_head
from ssm_nn.inference.last_layer.program_heads import draw_bodies, program_head, program_heads
from ssm_nn.inference.last_layer.published_rule import PublishedRule
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.square_root import SquareRoot

__all__ = [
    "BADGE",
    "BAIT",
    "BALD",
    "ActiveLearner",
    "ActiveState",
    "AtMode",
    "BatchBALD",
    "Bernoulli",
    "Categorical",
    "DiagonalHead",
    "Entropy",
    "ExpectedEntropy",
    "Foreseen",
    "Full",
    "Gaussian",
    "HeadState",
    "InformationGain",
    "KroneckerHead",
    "LastLayerFilter",
    "LastLayerMixture",
    "Margin",
    "MeanField",
    "MixtureInfo",
    "MixtureState",
    "MonteCarlo",
    "Poisson",
    "Probit",
    "PublishedRule",
    "Random",
    "Sequential",
    "Shared",
    "SquareRoot",
    "TunedHead",
    "TypiClust",
    "UpdateInfo",
    "draw_bodies",
    "feature_head",
    "head_datatree",
    "network_head",
    "program_head",
    "program_heads",
    "smooth_head",
    "tune_head",
]
