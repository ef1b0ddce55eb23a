"""Predictions of one task's examples under a belief over the weights.

    p(y | x) = E_{theta ~ belief} p(y | eta(x; theta))

Ways to take the expectation: ``Linearised`` (the default) draws through the network linearised where the belief was made,
eta = eta(x; c) + J (theta - c), the model whose Gaussian posterior the belief is (Immer, Korzepa, Bauer 2021, arXiv
2008.08400); c is the filter's mean, for smoothed beliefs too. ``ThroughNetwork`` draws through the network itself. ``AtMean``
does not average over the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ssm_nn.extraction import Program, StateSpace, extract
from ssm_nn.inference.batches import batched, single, with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.tasks import Task, as_task

__all__ = ["AtMean", "Linearised", "Prediction", "ThroughNetwork", "predict", "predict_from"]

Array = Any

_DRAWN_NUMBERS = 2**25  # weights drawn at a time: 128 MiB in float32
_BATCH = 512  # examples at a time


class Posterior(Protocol):
    """Filtered or smoothed beliefs of all tasks."""

    @property
    def program(self) -> Program:
        """The program."""
        ...

    @property
    def hypers(self) -> Mapping[str, Array]:
        """Its hyper-parameters."""
        ...

    @property
    def beliefs(self) -> Any:
        """One Belief a task."""
        ...


class Prediction(NamedTuple):
    """The predictive distribution of one observed site, by example; host arrays.

    Attributes:
        mean, variance: (N, ...) of the predictive distribution; of the label's number for class likelihoods.
        probabilities: (N, K) for class likelihoods (Bernoulli as K = 2), else None.
        aleatoric, epistemic: (N,) in nats for class likelihoods: mean entropy over the draws, and the mutual information
            between label and weights; else None.
        log_density: (N,) log predictive density of the observed values, None where there are none.
    """

    mean: np.ndarray
    variance: np.ndarray
    probabilities: np.ndarray | None
    aleatoric: np.ndarray | None
    epistemic: np.ndarray | None
    log_density: np.ndarray | None


@dataclass(frozen=True)
class AtMean:
    """Outputs at the mean weights, without uncertainty of the weights.

    Args:
        linearised: of the linearised network, or of the network itself; the two differ for smoothed beliefs only.
    """

    linearised: bool = True


@dataclass(frozen=True)
class Linearised:
    """Draws through the network linearised where the belief was made.

    Args:
        num_samples: S >= 1, the same draws for all examples.
    """

    num_samples: int = 100

    def __post_init__(self):
        check_count(num_samples=self.num_samples)


@dataclass(frozen=True)
class ThroughNetwork:
    """Draws of the weights through the network itself.

    Args:
        num_samples: S >= 1, the same draws for all examples.
    """

    num_samples: int = 100

    def __post_init__(self):
        check_count(num_samples=self.num_samples)


Method = AtMean | Linearised | ThroughNetwork
LINEARISED = Linearised()


def predict(
    posterior: Posterior, t: int, task: Task | Mapping[str, Any], *, method: Method = LINEARISED, key: Array | int = 0
) -> dict[str, Prediction]:
    """Predict the examples of ``task`` with the belief of task ``t``; observed values, if any, are scored.

    Args:
        posterior: ``Filtered`` or ``Smoothed``.
        t: whose belief; -1 is the last.
        task: examples, with or without their labels.
        method: how the expectation over the weights is taken.
        key: of the draws; a whole number is taken as a seed.

    Returns:
        A Prediction for each observed site, by name.
    """
    if not isinstance(t, Integral):
        raise ValueError(
            f"t is {type(t).__name__}; the whole number of a task is accepted: predict(posterior, t, task)"
        )
    if not -len(posterior.beliefs) <= t < len(posterior.beliefs):
        raise ValueError(f"t is {t}, but there are {len(posterior.beliefs)} tasks")
    return predict_from(posterior.program, posterior.hypers, posterior.beliefs[t], task, method=method, key=key)


def predict_from(
    program: Program,
    hypers: Mapping[str, Array],
    belief: Belief,
    task: Task | Mapping[str, Any],
    *,
    method: Method = LINEARISED,
    key: Array | int = 0,
) -> dict[str, Prediction]:
    """``predict`` for a belief that stands alone."""
    task = with_mask(jax.tree.map(jnp.asarray, as_task(task)))
    if not task.data:
        raise ValueError("task has no data to predict")
    batches = batched(task, min(task.num_examples, _BATCH))
    key = jax.random.key(key) if isinstance(key, int) else key
    linear = isinstance(method, Linearised) or (
        isinstance(method, AtMean) and method.linearised and belief.centre is not None
    )
    slices = [jax.tree.map(lambda array, b=b: array[b], (batches.data, batches.mask)) for b in range(len(batches.mask))]
    outputs: list[list[Array]] = [[] for _ in slices]
    for shifts in _draws(belief, key, method):
        for collected, batch in zip(outputs, slices, strict=True):
            collected.append(_outputs(program, linear, dict(hypers), belief, shifts, task.context, *batch))
    summaries = [
        _summarise(program, dict(hypers), belief.mean, jnp.concatenate(collected), task.context, *batch)
        for collected, batch in zip(outputs, slices, strict=True)
    ]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays)[: task.num_examples], *summaries)
    return {name: Prediction(**site) for name, site in joined.items()}


def _draws(belief: Belief, key: Array, method: Method) -> Iterator[Array]:
    """Shifts from the mean, (S, P), as many at a time as memory allows."""
    if isinstance(method, AtMean):
        yield jnp.zeros((1, *belief.mean.shape), belief.mean.dtype)
        return
    keys = jax.random.split(key, method.num_samples)
    chunk = max(_DRAWN_NUMBERS // belief.mean.shape[0], 1)
    for start in range(0, method.num_samples, chunk):
        yield _shifts(belief.precision, keys[start : start + chunk])


@jax.jit
def _shifts(precision: Any, keys: Array) -> Array:
    return jax.vmap(precision.sample)(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    program: Program, linear: bool, hypers: Any, belief: Belief, shifts: Array, context: Any, data: Any, mask: Array
) -> Array:
    """Outputs (S, B, K) of a batch under every draw."""
    task = Task.tree_unflatten(None, (data, context, mask))
    space = extract(program, task, hypers)

    def of_batch(theta):
        return jax.vmap(lambda d, m: space.outputs(theta, single(task, d, m)))(data, mask)

    if not linear:
        return jax.lax.map(lambda shift: of_batch(belief.mean + shift), shifts)
    centre = belief.mean if belief.centre is None else belief.centre
    at_centre, push = jax.linearize(of_batch, centre)
    return jax.vmap(lambda shift: at_centre + push(belief.mean - centre + shift))(shifts)


@partial(jax.jit, static_argnums=0)
def _summarise(
    program: Program, hypers: Any, mean: Array, outputs: Array, context: Any, data: Any, mask: Array
) -> dict[str, dict[str, Array | None]]:
    """Mixture over the draws of the likelihoods at ``outputs`` (S, B, K)."""
    task = Task.tree_unflatten(None, (data, context, mask))
    space = extract(program, task, hypers)

    def of_example(eta, d, m):
        return _mixture(space, mean, single(task, d, m), eta)

    return jax.vmap(of_example, in_axes=(1, 0, 0))(outputs, data, mask)


def _mixture(space: StateSpace, mean: Array, example: Task, outputs: Array) -> dict[str, dict[str, Array | None]]:
    """Summary of one example from its outputs (S, K), site by site."""
    summaries, start = {}, 0
    for name, site in space.observe(mean, example).items():
        likelihood = likelihood_of(site.distribution)
        shape = likelihood.outputs.shape
        width = int(np.prod(shape))
        part = outputs[:, start : start + width].reshape((-1, *shape))
        start += width
        summaries[name] = _mixture_of_site(likelihood.rebuild, part, site.value)
    return summaries


def _mixture_of_site(rebuild: Any, outputs: Array, value: Array | None) -> dict[str, Array | None]:
    means, variances = jax.vmap(lambda eta: _moments(rebuild(eta)))(outputs)
    summary: dict[str, Array | None] = {
        "mean": jnp.mean(means, axis=0),
        "variance": jnp.mean(variances, axis=0) + jnp.var(means, axis=0),
        "probabilities": None,
        "aleatoric": None,
        "epistemic": None,
        "log_density": None,
    }
    by_class = jax.vmap(lambda eta: class_log_probabilities(rebuild(eta)))(outputs)
    if by_class is not None:
        log_mixture = jax.nn.logsumexp(by_class, axis=0) - jnp.log(by_class.shape[0])
        aleatoric = jnp.mean(_entropy(by_class), axis=0)
        summary["probabilities"] = jnp.exp(log_mixture)
        summary["aleatoric"] = jnp.sum(aleatoric)
        # an entropy of a mean is at least the mean entropy; rounding alone makes it less
        summary["epistemic"] = jnp.sum(jnp.maximum(_entropy(log_mixture) - aleatoric, 0.0))
    if value is not None:
        log_densities = jax.vmap(lambda eta: jnp.sum(rebuild(eta).log_prob(value)))(outputs)
        summary["log_density"] = jax.nn.logsumexp(log_densities) - jnp.log(outputs.shape[0])
    # the example's own axis of length 1 is the batch axis of the result
    for name in ("mean", "variance", "probabilities"):
        if summary[name] is not None:
            summary[name] = jnp.asarray(summary[name])[0]
    return summary


def _moments(distribution: dist.Distribution) -> tuple[Array, Array]:
    """Mean and variance; of the class number for categorical likelihoods, which have none of their own."""
    by_class = class_log_probabilities(distribution)
    if by_class is None:
        return jnp.asarray(distribution.mean), jnp.asarray(distribution.variance)
    numbers = jnp.arange(by_class.shape[-1])
    probabilities = jnp.exp(by_class)
    mean = jnp.sum(probabilities * numbers, axis=-1)
    return mean, jnp.sum(probabilities * jnp.square(numbers - mean[..., None]), axis=-1)


def class_log_probabilities(distribution: dist.Distribution) -> Array | None:
    """(..., K) for categorical and Bernoulli likelihoods, None for others."""
    if isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        return class_log_probabilities(distribution.base_dist)
    if isinstance(distribution, dist.CategoricalLogits):
        return jax.nn.log_softmax(distribution.logits)
    if isinstance(distribution, dist.BernoulliLogits):
        logits = jnp.asarray(distribution.logits)
        return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
    return None


def _entropy(log_probabilities: Array) -> Array:
    finite = jnp.where(log_probabilities > -jnp.inf, log_probabilities, 0.0)
    return jnp.sum(-finite * jnp.exp(log_probabilities), axis=-1)
