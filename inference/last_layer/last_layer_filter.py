"""Bayesian updates of a linear head in closed form, and their reversal.

    update   m' = argmax log p(y | W phi) + log N(W; m, S),   S'^-1 = S^-1 + sum_n w_n Lambda_n (x) phi_n phi_n^T
    remove   the same points' factors taken out
    sweep    every point's factor linearised anew, until they stand still: the posterior mode of all points, in any order

In state-space terms: all weights below the head are fixed, the kernel is static (or the head walks at random), and new data
are further observations. Exact for Gaussian likelihoods in the structures ``Full`` and ``SquareRoot``; else Laplace's
approximation. Source: Huseljic et al., arXiv 2210.06112, with Newton's iteration in the place of its one-pass rule.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssm_nn.inference.laplace import FilterWarning
from ssm_nn.inference.last_layer.conditioning import (
    Conditioned,
    condition_few,
    condition_many,
    grown,
    information_of,
    take_back,
)
from ssm_nn.inference.last_layer.head_predictions import PredictiveMethod, Probit, predict_head, sample_outputs
from ssm_nn.inference.last_layer.head_states import HeadState, UpdateInfo, info_of, no_change
from ssm_nn.inference.last_layer.heads import Head
from ssm_nn.inference.last_layer.kronecker_head import NO_WALK, KroneckerHead
from ssm_nn.inference.last_layer.moving import refiltered, swept
from ssm_nn.inference.last_layer.sites import Sites, padded, padded_size
from ssm_nn.inference.last_layer.split_conditioning import (
    check_splits,
    check_whole,
    condition_in_parts,
    padded_to_parts,
    points_of_part,
    split_prior,
)
from ssm_nn.inference.last_layer.structures import Chosen, HeadStructure, choose
from ssm_nn.inference.map_problem import CONVERGED, NOT_FINITE, all_finite
from ssm_nn.inference.predictive import Prediction
from ssm_nn.inference.sharding import checked_mesh, copied, on_mesh
from ssm_nn.weight_mesh import WEIGHTS, on_every_device

__all__ = ["HeadState", "LastLayerFilter", "UpdateInfo"]

Array = Any
PROBIT = Probit()


class LastLayerFilter:
    """Updates, removals and predictions of a linear head.

    Args:
        head: made by ``feature_head``, ``network_head`` or ``program_head``.
        structure: ``Full()``, ``SquareRoot()``, ``KroneckerHead()``, ``Shared()`` or ``DiagonalHead()``; by default the
            richest that the size allows, see ``choice``.
        keep_sites: keep D + K + 2 numbers a point, which removal and sweeps need; False for endless streams.
        mesh: a ``jax.sharding.Mesh``: the covariance is spread over its axis ``weights`` by features, points over its axis
            ``data``. For ``Full``, ``Shared`` and ``DiagonalHead`` and heads that stand still. Features that are always 0 fill
            D up to a multiple of the devices; a sweep begins where the points' factors, as they stand, put the mean.

    Raises:
        ValueError: arguments of another kind, ``KroneckerHead()`` for a head that moves, a mesh that does not serve them.

    Attributes:
        choice: the structure, and the reason for it in words.
    """

    def __init__(
        self, head: Head, structure: HeadStructure | None = None, *, keep_sites: bool = True, mesh: Mesh | None = None
    ):
        if not isinstance(head, Head):
            raise ValueError(
                f"head is {type(head).__name__}; what feature_head, network_head or program_head make is accepted"
            )
        if structure is not None and not hasattr(structure, "prior_information"):
            raise ValueError(
                f"structure is {structure!r}; Full(), SquareRoot(), KroneckerHead(), Shared() and DiagonalHead() are accepted"
            )
        if isinstance(structure, KroneckerHead) and head.moving:
            raise ValueError(NO_WALK)
        self.keep_sites, self.mesh = keep_sites, None if mesh is None else checked_mesh(mesh)
        self._filling = 0 if self.mesh is None else -head.num_features % self.mesh.shape[WEIGHTS]
        self.head = head.filled(self._filling)
        if structure is None:
            self.choice = choose(head.num_outputs, head.num_features, head.moving)
        else:
            self.choice = Chosen(structure, f"{type(structure).__name__}: asked for")
        self.structure = self.choice.structure
        if self.mesh is not None:
            check_splits(self.structure, head)
        self._dtype = np.dtype(jax.dtypes.canonicalize_dtype(head.scale.dtype))

    def with_scale(self, scale: Any) -> LastLayerFilter:
        """The same engine at another prior scale (standard deviation), one number or (D,); nothing is compiled again."""
        scale = np.asarray(scale)
        if self._filling and scale.shape == (self.head.num_features - self._filling,):
            scale = np.pad(scale, (0, self._filling), constant_values=1)
        return self.with_head(self.head.with_scale(scale))

    def with_head(self, head: Head) -> LastLayerFilter:
        """The same engine with another head of as many features, made of its own."""
        other = copy(self)
        other.head = head
        return other

    @property
    def prior_mean(self) -> Array:
        """(K, D), whitened."""
        return jnp.asarray(self.head.loc / self.head.scale, self._dtype)

    def init(self) -> HeadState:
        """The prior."""
        return HeadState(0, self._everywhere(self.prior_mean), self._prior(), self._no_sites())

    def _prior(self) -> Any:
        shape = self.head.num_outputs, self.head.num_features
        if self.mesh is not None:
            return split_prior(self.structure, shape, self._dtype, self.mesh)
        return self.structure.prior(*shape, self._dtype)

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.mesh is None else copied(self.mesh, tree)

    def _no_sites(self) -> Sites:
        empty = self._labels_like()
        return Sites.none(self.head.num_features, self.head.num_outputs, empty, self._dtype)

    def _labels(self, batch: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(self.head.likelihood.checked(self.head.labels(batch)))

    def _labels_like(self) -> np.ndarray:
        shape = (0, self.head.num_outputs) if hasattr(self.head.likelihood, "noise_scale") else (0,)
        return np.asarray(self.head.likelihood.checked(np.zeros(shape)))

    def features(self, batch: Mapping[str, Any] | Any) -> np.ndarray:
        """Whitened features (n, D) of a batch, or of its inputs alone; outputs are ``features @ mean.T``.

        Raises:
            ValueError: for another width, or features that are not finite.
        """
        batch = batch if isinstance(batch, Mapping) else {self.head.inputs: batch}
        phi = np.asarray(self.head.features(batch), self._dtype) * self.head.scale.astype(self._dtype)
        finite = np.isfinite(phi).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"the features of {int((~finite).sum())} points are not finite, the first at index "
                f"{int(np.flatnonzero(~finite)[0])}; finite ones are accepted"
            )
        return phi

    def weights(self, state: HeadState) -> np.ndarray:
        """The mean of W (K, D), the bias last."""
        with on_mesh(self.mesh):
            mean = np.asarray(_whole(state.mean))
        return (mean * self.head.scale)[:, : self.head.num_features - self._filling]

    def update(
        self, state: HeadState, batch: Mapping[str, Any], *, ids: Any = None, weights: Any = None
    ) -> tuple[HeadState, UpdateInfo]:
        """New points. An empty batch changes nothing; a head that moves makes its step before any later batch.

        Args:
            state: not changed.
            batch: a mapping with the inputs and the labels, points on the leading axis.
            ids: (n,) whole numbers by which points may be removed; by default they are counted on.
            weights: (n,), >= 0, how often each point counts.

        Raises:
            ValueError: labels out of range, features of another width or not finite, weights that are negative, ids met
                before.
        """
        began = time.perf_counter()
        points = self._points(state, batch, ids, weights)
        if points.num_points == 0:
            return state, no_change(began)
        made = self._condition(self._moved(state), points, fresh=state.step == 0)
        info = info_of(made, points.num_points, began)
        if info.status == NOT_FINITE:
            self._warn(info)
            return state, info
        self._warn(info)
        kept = state.sites
        if self.keep_sites:
            outputs = np.asarray(made.found.outputs)[: points.num_points]
            kept = kept.plus(points._replace(outputs=outputs))
        return HeadState(state.step + 1, made.mean, made.belief, kept), info

    def advance(self, state: HeadState) -> HeadState:
        """A batch of which nothing is known: one step of the head, ``m' = a m + b``, ``S' = A S A + Q``."""
        return self._moved(state)._replace(step=state.step + 1)

    def _moved(self, state: HeadState) -> HeadState:
        if not state.step or not self.head.moving:  # the prior is that of the first batch
            return state
        gain, shift, noise = self.step_moments()
        return state._replace(mean=gain * state.mean + shift, belief=_step(state.belief, gain, noise))

    def step_moments(self) -> tuple[Array, Array, Array]:
        """Gain (D,), shift (K, D) and noise (D,) of a step of the whitened weights."""
        head, dtype = self.head, self._dtype
        gain, shift, noise = (
            jnp.asarray(part, dtype)
            for part in (head.gain, head.shift / head.scale, head.noise / np.square(head.scale))
        )
        return gain, shift, noise

    def remove(self, state: HeadState, ids: Any) -> tuple[HeadState, UpdateInfo]:
        """Take points out of the belief.

        What is left stands as it was linearised together with the removed points; ``sweep`` wipes out that trace too.

        Raises:
            ValueError: for ids that no point has, or given twice; an engine that keeps no sites.
        """
        began = time.perf_counter()
        self._check_sites()
        places = state.sites.places(ids)
        if len(places) == 0:
            return state, no_change(began)
        rest = np.ones(state.sites.num_points, bool)
        rest[places] = False
        kept = state.sites.at(rest)
        if not kept.num_points and not self.head.moving:
            return self.init()._replace(step=state.step), no_change(began)._replace(num_points=len(places))
        if self.head.moving:
            after = refiltered(self, state._replace(sites=kept))
        else:
            after = self._released(state, state.sites.at(places))._replace(sites=kept)
        info = no_change(began)._replace(num_points=len(places))
        if not bool(all_finite((after.mean, after.belief))):
            # rounding has made the remaining information indefinite: everything from the sites, anew
            after, swept = self.sweep(after._replace(mean=self.prior_mean))
            info = swept._replace(num_points=len(places), log_evidence=float("nan"))
        return after, info._replace(seconds=time.perf_counter() - began)

    def _released(self, state: HeadState, points: Sites) -> HeadState:
        largest = self.largest_few
        mean, belief = state.mean, state.belief
        for start in range(0, points.num_points, largest):
            part = points.at(np.arange(start, min(start + largest, points.num_points)))
            arrays = self._padded(part)
            outputs = self._everywhere(jnp.asarray(padded(part.outputs, len(arrays[0]))))
            with on_mesh(self.mesh):
                mean, belief = take_back(belief, mean, arrays[0], self.head.likelihood, outputs, arrays[1], arrays[2])
        return state._replace(mean=mean, belief=belief)

    def sweep(self, state: HeadState, max_steps: int = 100) -> tuple[HeadState, UpdateInfo]:
        """Linearise all points anew where the mean now stands, ``max_steps`` times or until nothing moves.

        Each time is one step of Newton on the posterior of all points; at its end the belief depends neither on the order
        in which they came, nor on points that were removed.

        Raises:
            ValueError: an engine that keeps no sites.
        """
        began = time.perf_counter()
        self._check_sites()
        points = state.sites
        if not points.num_points:
            return self.init()._replace(step=state.step), no_change(began)
        if self.head.moving:
            return swept(self, state, max_steps)
        if self.mesh is not None:
            mean = self._everywhere(self.prior_mean)
            made = self._condition_in_parts(self._prior(), mean, points, points.outputs, max_steps)
        else:
            made = self._condition_many(self._prior_information(), self.prior_mean, state.mean, points, max_steps)
        info = info_of(made, points.num_points, began, max_steps)
        self._warn(info)
        if info.status == NOT_FINITE:
            return state, info
        outputs = np.asarray(made.found.outputs)[: points.num_points]
        return HeadState(state.step, made.mean, made.belief, points._replace(outputs=outputs)), info

    def grow(self, state: HeadState, num_new: int) -> tuple[LastLayerFilter, HeadState]:
        """An engine and a state with ``num_new`` more classes, of which nothing is known.

        Points of before stand as choices among the classes of then; a sweep counts them as evidence against the new ones.
        """
        engine = self.with_head(self.head.grown(num_new))
        # an absent class: probability 0, and finite where it is multiplied by 0
        absent = np.full((state.sites.num_points, num_new), -(np.finfo(self._dtype).max ** 0.5), self._dtype)
        sites = state.sites._replace(outputs=np.concatenate([state.sites.outputs, absent], axis=1))
        with on_mesh(self.mesh):
            mean = _stacked(state.mean, self._everywhere(engine.prior_mean[-num_new:]))
            return engine, HeadState(state.step, mean, grown(state.belief, num_new), sites)

    def predict(
        self,
        state: HeadState,
        batch: Mapping[str, Any] | Any,
        method: PredictiveMethod = PROBIT,
        key: Array | int = 0,
    ) -> Prediction:
        """The predictive distribution of each point; labels, if the batch has them, are scored.

        Args:
            batch: a mapping, or the inputs alone.
            method: ``Probit()``, ``MeanField()``, ``MonteCarlo(num_samples)`` or ``AtMode()``.
            key: of the draws; a whole number is taken as a seed.
        """
        phi = self.features(batch)
        labels = None
        if isinstance(batch, Mapping) and self.head.has_labels(batch):
            labels = self._labels(batch)
        key = self._everywhere(jax.random.key(key) if isinstance(key, int) else key)
        with on_mesh(self.mesh):
            return predict_head(state.belief, state.mean, phi, self.head.likelihood, labels, method, key)

    def sample_outputs(
        self, state: HeadState, batch: Mapping[str, Any] | Any, num_samples: int, key: Array | int = 0
    ) -> np.ndarray:
        """Draws (S, n, K) of the outputs of all points together, each from one draw of the weights; not on a mesh."""
        check_whole("sample_outputs", self.mesh)
        return sample_outputs(state.belief, state.mean, self.features(batch), num_samples, key)

    # the pieces

    @property
    def _few(self) -> int:
        """Outputs of a batch, n K, up to which the dual is cheaper than the weights."""
        size = self.head.num_outputs * (self.head.num_features - self._filling)
        return min(max(size // 2, 64), 4096) if self.structure.exact else min(max(size, 64), 1024)

    @property
    def largest_few(self) -> int:
        """Points of the largest batch that goes through the dual, a power of two."""
        if self.mesh is not None and self.structure.exact:  # the others give other means by other parts
            return points_of_part(self.head.num_outputs)
        return 1 << (max(self._few // self.head.num_outputs, 1).bit_length() - 1)

    def _points(self, state: HeadState, batch: Mapping[str, Any], ids: Any, weights: Any) -> Sites:
        if not isinstance(batch, Mapping):
            raise ValueError(f"batch is {type(batch).__name__}; a mapping with inputs and labels is accepted")
        phi, labels = self.features(batch), self._labels(batch)
        return state.sites.checked(phi, labels, ids, weights, state.step)

    def _padded(self, points: Sites, size: int | None = None) -> tuple[Array, Any, Array]:
        size = padded_size(points.num_points) if size is None else size
        weight = np.zeros(size, self._dtype)
        weight[: points.num_points] = points.weights
        arrays = padded(points.features, size), padded(points.labels, size), weight
        return self._everywhere(jax.tree.map(jnp.asarray, arrays))

    def _condition(self, state: HeadState, points: Sites, fresh: bool) -> Conditioned:
        if self.mesh is not None:
            return self._condition_in_parts(state.belief, state.mean, points)
        if padded_size(points.num_points) * self.head.num_outputs <= self._few:
            phi, y, weight = self._padded(points)
            return condition_few(state.belief, state.mean, phi, self.head.likelihood, y, weight)
        information = self._prior_information() if fresh else information_of(state.belief)
        return self._condition_many(information, state.mean, state.mean, points)

    def _condition_many(
        self, information: Any, mean: Array, start: Array, points: Sites, max_steps: int = 100
    ) -> Conditioned:
        phi, y, weight = self._padded(points)
        steps = jnp.asarray(max_steps, jnp.int32)
        return condition_many(information, mean, start, phi, self.head.likelihood, y, weight, steps)

    def _condition_in_parts(
        self, belief: Any, mean: Array, points: Sites, at: np.ndarray | None = None, max_steps: int = 100
    ) -> Conditioned:
        """On a mesh; from where factors of the points at the outputs ``at`` put the mean, by default from ``mean``."""
        size, part = padded_to_parts(points.num_points, self.head.num_outputs)
        phi, y, weight = self._padded(points, size)
        outputs = None if at is None else self._everywhere(jnp.asarray(padded(at, size)))
        steps = self._everywhere(jnp.asarray(max_steps, jnp.int32))
        few = at is None and padded_size(points.num_points) * self.head.num_outputs <= self._few
        kernel = few and not self.structure.exact
        with on_mesh(self.mesh):
            return condition_in_parts(belief, mean, phi, self.head.likelihood, y, weight, outputs, part, kernel, steps)

    def _prior_information(self) -> Any:
        return self.structure.prior_information(self.head.num_outputs, self.head.num_features, self._dtype)

    def _warn(self, info: UpdateInfo) -> None:
        if info.status != CONVERGED:
            warnings.warn(info.message, FilterWarning, stacklevel=3)

    def _check_sites(self) -> None:
        if not self.keep_sites:
            raise ValueError("keep_sites is False: this engine knows of no single point; make it with keep_sites=True")


_step = jax.jit(lambda belief, gain, noise: belief.step(gain, noise))
_whole = jax.jit(on_every_device)
_stacked = jax.jit(lambda rows, more: jnp.concatenate([rows, more]))
