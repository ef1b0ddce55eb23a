"""The head of a NumPyro program: its likelihood, prior and step are read from the extraction, the rest stays as it is.

``program_head`` takes one value of the weights below the head, ``program_heads`` several, for a ``LastLayerMixture``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ssm_nn.extraction import ObservedSite, Program, StateSpace, extract
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian, HeadLikelihood, Poisson
from ssm_nn.inference.last_layer.heads import Head, find_head, one_row, over_examples
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.program import TaskBody
from ssm_nn.tasks import Task, as_task

__all__ = ["draw_bodies", "program_head", "program_heads"]

Array = Any
SiteAt = Callable[[Array, Task], ObservedSite]


def program_head(
    program: Program,
    task: Task | Mapping[str, Any],
    *,
    hypers: Mapping[str, Any] | None = None,
    weights: Array | None = None,
    layer: str | None = None,
    inputs: str = "x",
) -> Head:
    """The last layer of a program's network under its own prior and kernel; all other weights are fixed.

    Args:
        program: with one network, whose outputs are the logits of a Categorical or Bernoulli, the log rate of a Poisson,
            or the mean of a Normal with a constant scale.
        task: one task, with labels; it gives shapes, and its values check what was found.
        hypers: the value of every latent site outside the weights.
        weights: (P,), where the weights below the head are fixed: a belief's mean for example; None takes the network's
            own initial weights.
        layer: path of the head's weights; None searches it.
        inputs: name of the array that the network is called with.

    Raises:
        ValueError: for a program of another form, and a network below the head that moves.
    """
    rows = None if weights is None else jnp.asarray(weights)[None]
    return _heads(program, task, hypers, rows, layer, inputs)[0]


def program_heads(
    program: Program,
    task: Task | Mapping[str, Any],
    bodies: Array,
    *,
    hypers: Mapping[str, Any] | None = None,
    layer: str | None = None,
    inputs: str = "x",
) -> tuple[Head, ...]:
    """``program_head`` at each of several values of the weights below the head, which is found and compiled once.

    Args:
        program, task, hypers, layer, inputs: as for ``program_head``.
        bodies: (S, P), made by ``draw_bodies`` for example; what it holds at the head's own weights is not read.

    Raises:
        ValueError: as ``program_head``.
    """
    rows = jnp.asarray(bodies)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"bodies has shape {rows.shape}; (S, P) with S >= 1 is accepted")
    return _heads(program, task, hypers, rows, layer, inputs)


def draw_bodies(belief: Belief, num_bodies: int, key: Array | int = 0) -> Array:
    """Draws (S, P) of all weights from the belief of another engine, whatever its structure.

    Args:
        belief: ``filtered.beliefs[t]`` of a ``LaplaceFilter``, ``engine.belief(state)`` of a ``MeanFieldFilter``.
        num_bodies: S >= 1.
        key: of the draws; a whole number is taken as a seed.
    """
    check_count(num_bodies=num_bodies)
    keys = jax.random.split(jax.random.key(key) if isinstance(key, int) else key, num_bodies)
    return belief.mean + jax.vmap(belief.precision.sample)(keys)


def _heads(
    program: Program,
    task: Task | Mapping[str, Any],
    hypers: Mapping[str, Any] | None,
    rows: Array | None,
    layer: str | None,
    inputs: str,
) -> tuple[Head, ...]:
    given = _on_device(task)
    space = extract(program, given, hypers)
    if len(space.body.networks) != 1:
        raise ValueError(f"the program has {len(space.body.networks)} networks; one is accepted")
    net = space.body.networks[0]
    thetas = space.initial[None] if rows is None else rows
    if thetas.shape[1:] != (space.layout.size,):
        raise ValueError(f"weights has shape {thetas.shape[1:]}; ({space.layout.size},) is accepted")
    if inputs not in given:
        raise ValueError(f"inputs is {inputs!r}; the task has {sorted(given)}")
    first = space.layout.arrays(thetas[0])
    apply, mapped = over_examples(lambda arrays, x: net.network.bind(arrays[net.name])(x), first, given[inputs])
    found = find_head(apply, first, given[inputs], layer)
    _check_still(space, {found.layer.kernel, found.layer.bias})
    site_at = _observed(space, apply, mapped, inputs)
    likelihood = _likelihood(site_at, given, found.num_outputs, space.initial.dtype)

    def at_head(vector: Array) -> np.ndarray:
        return found.matrix(space.layout.arrays(jnp.broadcast_to(vector, space.initial.shape)))

    def labels(batch: Mapping[str, Any]) -> Any:
        arrays = _on_device(batch)
        zeros = jnp.zeros((arrays.num_examples, found.num_outputs), space.initial.dtype)
        return site_at(zeros, arrays).value

    def features(theta: Array) -> Any:
        arrays = space.layout.arrays(theta)
        return lambda batch: found.features(arrays, as_task(batch)[inputs])

    moments = space.moments
    rest = (
        labels,
        at_head(space.prior_mean),
        np.sqrt(one_row("prior variance", at_head(space.prior_variance))),
        one_row("gain", at_head(moments.gain)),
        at_head(moments.shift),
        one_row("noise", at_head(moments.noise)),
        inputs,
        lambda batch: set(batch) >= set(given),
    )
    return tuple(Head(likelihood, features(theta), *rest) for theta in thetas)


def _on_device(task: Task | Mapping[str, Any]) -> Task:
    return jax.tree.map(jnp.asarray, as_task(task))


def _check_still(space: StateSpace, head: set[Any]) -> None:
    for s in space.layout.sites:
        if (s.network, s.path) in head:
            continue
        gain, shift, noise = (np.asarray(part)[s.start : s.stop] for part in space.moments[:3])
        if (gain != 1).any() or shift.any() or noise.any() or space.moments.permutation is not None:
            raise ValueError(f"the weights {s.name!r} below the head move; Static() is accepted for them")


class _Given:
    """Stands for the network: called with the examples or with one of them, it gives outputs that are handed over.

    Those of a batch lie in the arrays. Where the program maps the network over the examples, the outputs take the place of
    the inputs instead, so that each call meets its own.
    """

    def __init__(self, name: str, shape: tuple[int, ...], mapped: bool):
        self.name, self.network, self._shape, self._mapped = name, self, shape, mapped

    def bind(self, arrays: Mapping[str, Any]) -> Any:
        """A function that gives the outputs in the network's shape."""
        if self._mapped:
            return lambda row, *_: jnp.reshape(row, self._shape[1:])
        return lambda *_: jnp.reshape(arrays["outputs"], self._shape)


def _observed(space: StateSpace, apply: Any, mapped: bool, inputs: str) -> SiteAt:
    """What the program observes where its network gives outputs (n, K) for a task's examples; ``mapped`` by the program."""
    name, arrays = space.body.networks[0].name, space.layout.arrays(space.initial)

    def site_at(outputs: Array, task: Task) -> ObservedSite:
        shape = jax.eval_shape(apply, arrays, task[inputs]).shape
        stand_in: Any = _Given(name, shape, mapped)
        data = {**task.data, inputs: outputs} if mapped else task.data
        replaced = space._replace(body=TaskBody([stand_in], space.body.observe, {}))
        return _only_site(replaced.observed_at({name: {"outputs": outputs}}, Task(data, task.context, task.mask)))

    return site_at


def _only_site(sites: Mapping[str, ObservedSite]) -> ObservedSite:
    if len(sites) != 1:
        raise ValueError(f"the program observes {sorted(sites)}; one site is accepted")
    return next(iter(sites.values()))


def _likelihood(site_at: SiteAt, task: Task, num_outputs: int, dtype: Any) -> HeadLikelihood:
    """The likelihood of the outputs f, found by looking at the site's canonical outputs at two values of f."""
    num = task.num_examples
    drawn = np.random.default_rng(0).normal(size=(2, num, num_outputs))

    sites = [site_at(jnp.asarray(f, dtype), task) for f in drawn]
    weights = np.asarray(sites[0].weight)
    if not (weights == 1).all():
        raise ValueError("the program masks or scales its likelihood; give weights to update instead")
    base = _bare(sites[0].distribution)
    outputs = [np.asarray(likelihood_of(site.distribution).outputs).reshape(num, -1) for site in sites]
    kind = next((kind for kind in _KINDS if isinstance(base, kind)), None)
    if kind is None:
        raise ValueError(
            f"the program observes a {type(base).__name__}; Categorical, Bernoulli, Poisson and Normal are accepted"
        )
    if kind is dist.Normal:
        locations, scales = (np.stack([o.reshape(num, -1, 2)[..., i] for o in outputs]) for i in range(2))
        if not np.allclose(scales, scales.flat[0], atol=1e-5):
            raise ValueError("the scale of the program's Normal is not one constant; a last-layer update needs one")
        _check_outputs(locations, drawn, kind)
        return Gaussian(float(np.exp(scales.flat[0])), num_outputs)
    both = [np.stack(outputs), drawn]
    if kind in (dist.CategoricalLogits, dist.CategoricalProbs):
        both = [array - array.mean(axis=-1, keepdims=True) for array in both]  # shifted together they are the same
    _check_outputs(both[0], both[1], kind)
    return _KINDS[kind](num_outputs)


def _check_outputs(outputs: np.ndarray, drawn: np.ndarray, kind: type) -> None:
    if outputs.shape != drawn.shape or not np.allclose(outputs, drawn, atol=1e-4):
        raise ValueError(
            f"the network's outputs are not the {_WORDS[kind]} of the program's {kind.__name__} themselves; put scalings "
            "and offsets into the network"
        )


def _bare(distribution: Any) -> Any:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def _single(likelihood: type) -> Any:
    def make(num_outputs: int) -> Any:
        if num_outputs != 1:
            raise ValueError(f"the network has {num_outputs} outputs, and {likelihood.__name__} takes one")
        return likelihood()

    return make


_KINDS: dict[type, Any] = {
    dist.CategoricalLogits: Categorical,
    dist.CategoricalProbs: Categorical,
    dist.BernoulliLogits: _single(Bernoulli),
    dist.BernoulliProbs: _single(Bernoulli),
    dist.Poisson: _single(Poisson),
    dist.Normal: None,
}
_WORDS = {
    dist.CategoricalLogits: "logits",
    dist.CategoricalProbs: "logits",
    dist.BernoulliLogits: "logits",
    dist.BernoulliProbs: "logits",
    dist.Poisson: "log rate",
    dist.Normal: "mean",
}
