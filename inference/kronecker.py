"""The Kronecker-eigen structure, and the curvature of a task in it.

    A_t = sum_n sum_p a a^T,  G_t = sum_n sum_p g g^T       a a layer's inputs, g gradients at its outputs, g ~ J^T L e
    V_A, V_G   eigenvectors of the partial traces of  Lambda' + A_t (x) G_t / N
    S_t = sum_n (V_A^T (sum_p a_p g_p^T) V_G)^2             squares elementwise: the exact diagonal in that basis

over the examples of the whole task. Exact for a linear model with Gaussian outputs and one prior variance: the information
is then a Kronecker product with the identity. Else the trace and the diagonal in the basis are exact, the rest is lost. The
basis is the belief's: of the information that the smoother sends back, no more than these two are exact in any model.
Sources: Martens and Grosse 2015 (arXiv 1503.05671), Grosse and Martens 2016 (arXiv 1602.01407, convolutions), George et al.
2018 (arXiv 1806.03884, the eigenvalues).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import index_batches, rows, some_examples
from ssm_nn.inference.checks import check_count, check_finite, check_positive
from ssm_nn.inference.curvature import Information, columns, random_column, sampled_gradient
from ssm_nn.inference.layer_passes import LayerPasses, layers_of
from ssm_nn.inference.sharding import ShardedLayout
from ssm_nn.inference.structures import Cut, LowRank
from ssm_nn.layer_places import LayerPlace, Places
from ssm_nn.layers import Layer
from ssm_nn.moments import Moments
from ssm_nn.precision_kronecker import EigenBlock, KroneckerEigen, common_bases
from ssm_nn.precision_low_rank import DiagonalPlusLowRank
from ssm_nn.tasks import Task

__all__ = ["Kronecker", "KroneckerCurvature"]

Array = Any

_ROUGH_EXAMPLES = 2000  # for the belief from which weights are drawn
_REST_EXAMPLES = 20  # behind one random column of the weights outside the layers


@dataclass(frozen=True)
class Kronecker:
    """Block-diagonal over layers, each block a Kronecker product of two bases with free eigenvalues.

    Memory (I^2 + O^2 + I O) a layer. Dense and convolutional layers are found by tracing the network; weights outside them,
    such as those of normalisers, keep a diagonal plus low rank, and a warning names them. Serves kernels with one gain and
    one noise a layer, bias included. On a mesh each device makes the bases of some layers, and keeps rows of all.

    Args:
        rank: of the weights outside the layers.
    """

    rank: int = 10
    places: Places | None = None

    def __post_init__(self):
        check_count(0, rank=self.rank)

    def fitted(self, space: StateSpace, task: Task) -> Kronecker:
        """With the places of the layers.

        Raises:
            ValueError: for a task without data, which cannot be traced, and for tied weights.
        """
        if not task.data:
            raise ValueError("the first task has no data: Kronecker needs its shapes to find the network's layers")
        return replace(self, places=find_places(space, task))

    def curvature(self) -> KroneckerCurvature:
        """From 10,000 examples."""
        return KroneckerCurvature()

    def check_step(self, moments: Moments, precision: KroneckerEigen) -> None:
        """One gain and one noise a layer, and one map of its outputs."""
        _check_maps(moments, precision.places)
        for name in ("gain", "noise"):
            bounds = np.asarray(_bounds(precision.places, getattr(moments, name)))
            for layer, (least, most) in zip(precision.places.layers, bounds, strict=True):
                if least != most:
                    raise ValueError(
                        f"the kernel's {name} differs within the layer of {layer.name!r} ({least:.3g} to {most:.3g}): "
                        "Kronecker carries one gain and one noise a layer, its bias included; give both leaves one kernel, or "
                        "use LowRank, Diagonal or Dense"
                    )

    def prior(self, variance: Array) -> KroneckerEigen:
        """``diag(1 / variance)``."""
        if self.places is None:
            raise ValueError("Kronecker must be fitted to a program first: structure.fitted(space, task)")
        return KroneckerEigen.diagonal(1 / variance, self.places, self.rank)

    def gather(self, site: Any, columns: Array, metric: Array) -> Cut:
        """Not held by this form."""
        raise ValueError("Kronecker takes no single columns; use KroneckerCurvature, which is its default")

    def cut(self, precision: KroneckerEigen) -> Cut:
        """The weights outside the layers back to their rank."""
        if not precision.places.rest_size:
            return Cut(precision, jnp.zeros((), precision.rest.diagonal.dtype))
        rest = LowRank(self.rank).cut(precision.rest)
        return Cut(replace(precision, rest=rest.precision), rest.dropped_share)

    def cut_message(self, message: KroneckerEigen, precision: KroneckerEigen) -> KroneckerEigen:
        """Likewise."""
        if not precision.places.rest_size:
            return message
        return replace(message, rest=LowRank(self.rank).cut_message(message.rest, precision.rest))


@partial(jax.jit, static_argnums=0)
def _bounds(places: Places, vector: Array) -> Array:
    """(layers, 2): the least and the largest of each layer's weights."""
    rows = [layer.real(matrix) for layer, matrix in zip(places.layers, places.matrices(vector), strict=True)]
    return jnp.stack([jnp.stack([jnp.min(r), jnp.max(r)]) for r in rows]) if rows else jnp.zeros((0, 2))


def _check_maps(moments: Moments, places: Places) -> None:
    maps = {} if moments.permutation is None else {leaf.start: leaf for leaf in moments.permutation.leaves}
    for layer in places.layers:
        bias = None if layer.bias_start is None else maps.get(layer.bias_start)
        if bias is not None and not np.array_equal(
            maps[layer.start].turn, bias.turn
        ):  # one alone is refused by the step
            raise ValueError(
                f"the kernel maps the outputs of {layer.name!r} otherwise in its weights than in its bias: map both alike; "
                "Dense, Diagonal and LowRank take two maps"
            )


def find_places(space: StateSpace, task: Task) -> Places:
    """The layers of a program's networks, with a warning for the weights that are in none."""
    starts = {(site.network, site.path): site for site in space.layout.sites}

    def place(layer: Layer) -> LayerPlace:
        site = starts[layer.kernel]
        bias = None if layer.bias is None else starts[layer.bias].start
        found = LayerPlace(site.name, site.start, site.shape, layer.input_axes, layer.output_axis, bias)
        return found if spread is None else found._replace(filling=-found.num_rows % spread.shards)

    spread = space.layout if isinstance(space.layout, ShardedLayout) else None
    layers = layers_of(space, task, space.layout.arrays(space.prior_mean))
    size = sum(site.stop - site.start for site in space.layout.sites)
    places = Places(tuple(place(layer) for layer in layers), size, spread)
    outside = [s.name for s in space.layout.sites if any(start <= s.start < stop for start, stop in places.rest)]
    if outside:
        warnings.warn(
            f"Kronecker: {', '.join(outside)} belong to no dense or convolutional layer; they keep a diagonal plus low rank",
            stacklevel=2,
        )
    return places


@dataclass(frozen=True)
class KroneckerCurvature:
    """Two passes over the examples: one for the basis, one for the eigenvalues in it.

    While N times the columns of the exact output factor is at most ``examples``, all columns are used; beyond, one column
    an example with random signs, whose second moment is the same.

    Laplace's curvature is that of the mode, where a network that fits its task is surest, and smallest. With ``spread`` s > 0
    it is averaged over weights drawn from N(theta, s^2 Lambda^-1), one draw a chunk of examples, Lambda the prediction with
    the diagonal, in its basis, of the mode's curvature from a part of the examples: s trades the task just learnt for those
    before it. Weights outside the layers stay where they are, and keep the mode's curvature.

    The belief keeps the information ``strength`` times. Above 1, many tasks are forgotten more slowly, and new ones learnt
    less well; the weights of a task's own search, and its evidence, are those of strength 1. It is what ``strength`` is to
    elastic weight consolidation. The engine's power, in contrast, counts the likelihood in search and information alike.

    Args:
        examples: drawn from the task and scaled up to it; a task of fewer is used whole.
        spread: s >= 0; 0 is Laplace's approximation.
        strength: > 0; 1 is Laplace's approximation.
    """

    examples: int = 10_000
    spread: float = 0.0
    strength: float = 1.0

    def __post_init__(self):
        check_finite(0.0, spread=self.spread)
        check_positive(strength=self.strength)
        check_count(examples=self.examples)

    def gather(
        self, space: StateSpace, structure: Any, theta: Array, task: Task, predicted: Any, power: Array, key: Array
    ) -> Information:
        """The site in the basis chosen for ``predicted`` and it together; its log-determinant there, an upper bound."""
        if not isinstance(structure, Kronecker):
            raise ValueError(f"KroneckerCurvature serves Kronecker, not {structure}; use ExactCurvature")
        subset_key, sign_key, rest_key, rough_key = jax.random.split(key, 4)
        chosen, counted = some_examples(subset_key, task, self.examples)
        scale = power * jnp.sum(task.mask) / counted
        draw = self._draws(space, theta, task, predicted, power, rough_key) if self.spread else None
        passes = LayerPasses(space, theta, task, chosen, sign_key, self.examples, draw)
        sides = passes.sides()
        traces = []
        for block, (inputs, outputs), layer in zip(predicted.blocks, sides, passes.layers, strict=True):
            share = self.strength * scale / (counted * layer.positions)
            new = inputs * (jnp.trace(outputs) * share), outputs * (jnp.trace(inputs) * share)
            traces.append([block.traces(), new])
        bases = common_bases(predicted.places.layers, traces)
        blocks = [EigenBlock(*basis, b.values) for basis, b in zip(bases, predicted.blocks, strict=True)]
        blocks = [
            block._replace(values=scale * values) for block, values in zip(blocks, passes.squares(blocks), strict=True)
        ]
        rest, share = predicted.rest.no_information(), jnp.zeros((), theta.dtype)
        if predicted.places.rest_size:
            each = passes.all_columns
            cut = self._rest(space, structure, theta, task, predicted, chosen, each, rest_key)
            rest, share = _scaled(cut.precision, scale), cut.dropped_share
        site = replace(predicted, blocks=tuple(blocks), rest=rest)
        gain = predicted.absorb(site).logdet() - predicted.logdet()
        return Information(self._strengthened(site), gain, share)

    def _strengthened(self, site: KroneckerEigen) -> KroneckerEigen:
        if self.strength == 1:
            return site
        blocks = tuple(block._replace(values=self.strength * block.values) for block in site.blocks)
        return replace(site, blocks=blocks, rest=_scaled(site.rest, self.strength))

    def _draws(
        self, space: StateSpace, theta: Array, task: Task, predicted: Any, power: Array, key: Array
    ) -> Callable[[Array], Array]:
        """Weights around theta. The predicted basis serves: another would cost the larger part of a pass."""
        subset_key, sign_key = jax.random.split(key)
        chosen, counted = some_examples(subset_key, task, min(self.examples, _ROUGH_EXAMPLES))
        scale = power * jnp.sum(task.mask) / counted
        squares = LayerPasses(space, theta, task, chosen, sign_key, self.examples).squares(list(predicted.blocks))
        deviations = [1 / jnp.sqrt(b.values + scale * s) for b, s in zip(predicted.blocks, squares, strict=True)]
        still = jnp.zeros_like(predicted.rest.diagonal)

        def draw(key: Array) -> Array:
            keys = jax.random.split(key, len(deviations))
            noise = [d * jax.random.normal(k, d.shape, d.dtype) for k, d in zip(keys, deviations, strict=True)]
            drawn = [block.back(turned) for block, turned in zip(predicted.blocks, noise, strict=True)]
            return theta + self.spread * predicted.places.join(drawn, still)

        return draw

    def log_likelihood_and_gradient(self, space: StateSpace, theta: Array, task: Task) -> tuple[Array, Array]:
        """Log likelihood of the whole task; its gradient from the first ``examples`` examples, scaled up."""
        return sampled_gradient(space, theta, task, self.examples)

    def _rest(
        self,
        space: StateSpace,
        structure: Kronecker,
        theta: Array,
        task: Task,
        predicted: Any,
        chosen: Array,
        each: bool,
        key: Array,
    ) -> Cut:
        """Columns of the weights outside the layers, streamed through the cut: each, or one of random signs for some
        examples."""
        places, low_rank = predicted.places, LowRank(structure.rank)
        metric = predicted.rest.precision_diagonal()
        total = task.num_examples
        batches = index_batches(chosen, 1 if each else min(_REST_EXAMPLES, chosen.shape[0]), total)
        together = min(32, batches.shape[0])
        groups = index_batches(batches.ravel(), together * batches.shape[1], total).reshape(
            -1, together, batches.shape[1]
        )

        def columns_of(indices: Array, key: Array) -> Array:
            batch = rows(task, indices)
            wide = columns(space, theta, batch) if each else random_column(space, theta, batch, key)[:, None]
            return jax.vmap(places.rest_of, in_axes=1)(wide)

        def step(site, inputs):
            made = jax.vmap(columns_of)(*inputs)
            wide = made.reshape(-1, made.shape[-1]).T
            cut = low_rank.gather(site, wide, metric)
            return cut.precision, cut.dropped_share

        keys = jax.random.split(key, groups.shape[:2])
        site, shares = jax.lax.scan(step, predicted.rest.no_information(), (groups, keys))
        return Cut(site, jnp.max(shares))


def _scaled(site: DiagonalPlusLowRank, scale: Array | float) -> DiagonalPlusLowRank:
    return DiagonalPlusLowRank(site.diagonal * scale, site.factor * jnp.sqrt(scale))
