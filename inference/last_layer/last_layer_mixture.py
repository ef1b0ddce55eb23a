"""Updates of a head whose body, the weights below it, is static and has a belief of its own, given as S bodies.

    p(s | y)  ~  w_s p(y | s),      p(W | s, y)  =  N(m_s, S_s),      p(y* | x*, y)  =  sum_s p(s | y) p(y* | x*, s, y)

s runs over draws of the belief of another engine with weights w_s = 1 / S, or over a finite set such as the members of a deep
ensemble. Given a body the head is a ``LastLayerFilter``, whose evidence p(y | s) weighs the body; no body moves. Exact for a
finite set of bodies where the head's update and evidence are: Gaussian labels in ``Full`` or ``SquareRoot``; else Laplace's
approximation given each body. For draws it is importance sampling from their belief, with the head integrated out: as good as
the number of bodies that keep weight, see ``effective_bodies``. Source: the Rao-Blackwellised particle filter (Doucet, de
Freitas, Murphy, Russell 2000), for particles that stand still.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import entr

from ssm_nn.inference.last_layer.head_predictions import PredictiveMethod, Probit
from ssm_nn.inference.last_layer.head_states import HeadState, UpdateInfo, no_change
from ssm_nn.inference.last_layer.heads import Head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.structures import HeadStructure
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.inference.predictive import Prediction

__all__ = ["LastLayerMixture", "MixtureInfo", "MixtureState"]

Array = Any
PROBIT = Probit()


class MixtureState(NamedTuple):
    """All that the next update needs.

    Attributes:
        heads: S states, one for each body.
        log_weights: (S,), ``log p(s | y)``, normalised.
        log_prior: (S,), the log weight of a body less the evidence of the points that its belief had seen, up to a constant.
        seen: ids of those points.
    """

    heads: tuple[HeadState, ...]
    log_weights: np.ndarray
    log_prior: np.ndarray
    seen: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """``p(s | y)`` (S,)."""
        return np.exp(self.log_weights)

    @property
    def effective_bodies(self) -> float:
        """``1 / sum_s p(s | y)^2``, from 1 to S: where it is small, draw more bodies, or anew from a belief that has seen y."""
        return float(1 / np.sum(np.square(self.weights)))


class MixtureInfo(NamedTuple):
    """What an update, a removal or a sweep says of itself.

    Attributes:
        num_points: that it was about.
        log_evidence: ``log p(y | points before)``, summed over the bodies; nan for a removal or a sweep.
        effective_bodies: after it.
        heads: one UpdateInfo for each body.
        seconds: wall clock.
    """

    num_points: int
    log_evidence: float
    effective_bodies: float
    heads: tuple[UpdateInfo, ...]
    seconds: float


class LastLayerMixture:
    """Updates and predictions of a head above several bodies.

    Args:
        heads: S heads of one likelihood: from ``program_heads``, or ``network_head`` of each member of an ensemble.
        structure, keep_sites: as for ``LastLayerFilter``.
        weights: (S,) of the bodies before any point, >= 0; equal by default.

    Attributes:
        engines: S filters.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        structure: HeadStructure | None = None,
        *,
        weights: Any = None,
        keep_sites: bool = True,
    ):
        self.engines = tuple(LastLayerFilter(head, structure, keep_sites=keep_sites) for head in heads)
        if not self.engines:
            raise ValueError("heads is empty; at least one is needed")
        first = self.engines[0].head
        for place, engine in enumerate(self.engines):
            if engine.head.likelihood != first.likelihood or engine.head.inputs != first.inputs:
                raise ValueError(
                    f"heads differ: the first is of {first.inputs!r} with {first.likelihood!r}, number {place} of "
                    f"{engine.head.inputs!r} with {engine.head.likelihood!r}"
                )
        given = np.ones(len(self.engines)) if weights is None else np.asarray(weights, float)
        if given.shape != (len(self.engines),) or not (np.isfinite(given) & (given >= 0)).all() or not given.any():
            raise ValueError(
                f"weights is {weights!r}; {len(self.engines)} finite numbers >= 0, not all 0, are accepted"
            )
        with np.errstate(divide="ignore"):
            self._log_prior = _normalised(np.log(given))

    def init(self, seen: Mapping[str, Any] | None = None) -> MixtureState:
        """The prior of the head on each body.

        Args:
            seen: points that the bodies' belief has learnt from. They teach the heads, and weigh no body: their belief has
                counted them. With exact draws from p(body | seen) this is the joint posterior of body and head.
        """
        heads = tuple(engine.init() for engine in self.engines)
        state = MixtureState(heads, self._log_prior, self._log_prior, np.zeros(0, np.int64))
        if seen is None:
            return state
        learnt, info = self.update(state, seen)
        if learnt is state:
            return state
        evidence = np.array([made.log_evidence for made in info.heads])
        ids = learnt.heads[0].sites.ids
        return learnt._replace(log_weights=self._log_prior, log_prior=self._log_prior - evidence, seen=ids)

    def update(
        self, state: MixtureState, batch: Mapping[str, Any], *, ids: Any = None, weights: Any = None
    ) -> tuple[MixtureState, MixtureInfo]:
        """New points for the head of each body, and for the bodies' weights. An empty batch changes nothing.

        Args:
            state, batch, ids, weights: as for ``LastLayerFilter.update``.

        Raises:
            ValueError: as there.
        """
        began = time.perf_counter()
        pairs = zip(self.engines, state.heads, strict=True)
        made = [engine.update(head, batch, ids=ids, weights=weights) for engine, head in pairs]
        heads, infos = (tuple(part) for part in zip(*made, strict=True))
        if not infos[0].num_points or any(info.status == NOT_FINITE for info in infos):
            return state, self._info(state, infos, 0.0 if not infos[0].num_points else float("nan"), began)
        joint = state.log_weights + np.array([info.log_evidence for info in infos])
        after = state._replace(heads=heads, log_weights=_normalised(joint))
        return after, self._info(after, infos, float(np.logaddexp.reduce(joint)), began)

    def remove(self, state: MixtureState, ids: Any) -> tuple[MixtureState, MixtureInfo]:
        """Take points out of the heads and of the bodies' weights, and sweep: as if they had never come.

        Raises:
            ValueError: for ids that no point has, points that the bodies themselves have seen, a head that moves, an engine
                that keeps no sites.
        """
        began = time.perf_counter()
        met = np.intersect1d(np.asarray(ids), state.seen)
        if met.size:
            raise ValueError(
                f"ids holds {met[:5].tolist()}, which the bodies' belief has learnt from: it would keep their trace; draw "
                "bodies from a belief without them"
            )
        self._check_still()
        pairs = zip(self.engines, state.heads, strict=True)
        left = tuple(engine.remove(head, ids)[0] for engine, head in pairs)
        if left[0] is state.heads[0]:  # no ids
            return state, self._info(state, (no_change(began),) * len(left), float("nan"), began)
        after, info = self.sweep(state._replace(heads=left))
        return after, info._replace(num_points=len(np.asarray(ids)), seconds=time.perf_counter() - began)

    def sweep(self, state: MixtureState, max_steps: int = 100) -> tuple[MixtureState, MixtureInfo]:
        """All points linearised anew on each body, and each body weighed by the evidence of all points together.

        Raises:
            ValueError: a head that moves, an engine that keeps no sites.
        """
        began = time.perf_counter()
        self._check_still()
        pairs = zip(self.engines, state.heads, strict=True)
        made = [engine.sweep(head, max_steps) for engine, head in pairs]
        heads, infos = (tuple(part) for part in zip(*made, strict=True))
        if any(info.status == NOT_FINITE for info in infos):
            return state, self._info(state, infos, float("nan"), began)
        log_weights = _normalised(state.log_prior + np.array([info.log_evidence for info in infos]))
        after = state._replace(heads=heads, log_weights=log_weights)
        return after, self._info(after, infos, float("nan"), began)

    def predict(
        self,
        state: MixtureState,
        batch: Mapping[str, Any] | Any,
        method: PredictiveMethod = PROBIT,
        key: Array | int = 0,
    ) -> Prediction:
        """The bodies' predictions mixed by their weights; arguments as for ``LastLayerFilter.predict``."""
        counted = [place for place, weight in enumerate(state.weights) if weight > 0]
        made = [self.engines[place].predict(state.heads[place], batch, method, key) for place in counted]
        return _mixed(made, state.log_weights[counted])

    def _check_still(self) -> None:
        if self.engines[0].head.moving:
            raise ValueError(
                "the head moves between batches; a mixture sweeps, and removes points from, a head that does not"
            )

    def _info(
        self, state: MixtureState, infos: tuple[UpdateInfo, ...], log_evidence: float, began: float
    ) -> MixtureInfo:
        seconds = time.perf_counter() - began
        return MixtureInfo(infos[0].num_points, log_evidence, state.effective_bodies, infos, seconds)


def _normalised(logs: np.ndarray) -> np.ndarray:
    return logs - np.logaddexp.reduce(logs)


def _mixed(made: Sequence[Prediction], log_weights: np.ndarray) -> Prediction:
    """Of S predictions: densities and probabilities averaged; variances by the law of total variance."""
    weights = np.exp(log_weights)

    def average(name: str) -> Any:
        parts = [getattr(one, name) for one in made]
        return None if parts[0] is None else np.tensordot(weights, np.stack(parts), axes=1)

    mean, p, aleatoric = average("mean"), average("probabilities"), average("aleatoric")
    between = sum(weight * np.square(one.mean - mean) for weight, one in zip(weights, made, strict=True))
    epistemic = None if aleatoric is None else entr(p).sum(axis=1) - aleatoric
    densities: list[Any] = [one.log_density for one in made]
    scored = None if densities[0] is None else np.logaddexp.reduce(np.stack(densities) + log_weights[:, None])
    return Prediction(mean, average("variance") + between, p, aleatoric, epistemic, scored)
