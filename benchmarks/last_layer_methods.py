"""The ways to take in new points that the last-layer benchmark compares: each gives probabilities of the test points."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import last_layer_torch
import numpy as np
from last_layer_network import trained
from last_layer_settings import DRAWS, GAMMAS, NETWORKS, RATES, Problem, features_of, head_of, points_of
from scipy.special import logsumexp, softmax

from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_predictions import AtMode, Probit
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import HeadState, LastLayerFilter
from ssm_nn.inference.last_layer.last_layer_mixture import LastLayerMixture, MixtureState
from ssm_nn.inference.last_layer.published_rule import PublishedRule
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.structures import FULL_LIMIT
from ssm_nn.inference.metrics import accuracy, nll


class Answer(NamedTuple):
    """Probabilities (n, K) at the mode, those of the probit approximation or None, seconds of the update."""

    at_mode: np.ndarray
    probit: np.ndarray | None
    seconds: float


class Case:
    """One data set, seed and number of points before: what is learnt once for all numbers of points after."""

    def __init__(self, problem: Problem, seed: int, num_base: int):
        self.data, self.problem, self.seed, self.num_base = features_of(problem.data), problem, seed, num_base
        head = head_of(problem, seed, num_base)
        structures: list[Any] = [Shared(), KroneckerHead()]
        if Full().numbers(head.num_outputs, head.num_features) <= FULL_LIMIT:
            structures.insert(0, Full())
        self.engines = {type(one).__name__: LastLayerFilter(head, one) for one in structures}
        self.base, _ = points_of(problem, seed, num_base, 0)
        self.states = {name: self._refit(engine, self.base) for name, engine in self.engines.items()}
        self.best = next(iter(self.engines)) if structures[0].exact else "KroneckerHead"

    def batch(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Training points as a batch."""
        return {"x": self.data.train_x[places], "y": self.data.train_y[places]}

    def rows(self, num_new: int) -> Iterator[dict[str, Any]]:
        """One row a method."""
        base, new = points_of(self.problem, self.seed, self.num_base, num_new)
        both = np.r_[base, new]
        reference = self._answer(self.best, lambda engine: self._refit(engine, both))
        for method, answer in self._answers(new, both, reference):
            p, y = answer.at_mode, self.data.test_y
            yield {
                "data": self.problem.data,
                "base": self.num_base,
                "new": num_new,
                "seed": self.seed,
                "method": method,
                "accuracy": accuracy(p, y),
                "nll": nll(p, y),
                "nll_probit": float("nan") if answer.probit is None else nll(answer.probit, y),
                "total_variation": float(0.5 * np.abs(p - reference.at_mode).sum(axis=1).mean()),
                "seconds": answer.seconds,
            }

    def _answers(self, new: np.ndarray, both: np.ndarray, reference: Answer) -> Iterator[tuple[str, Answer]]:
        batch = self.batch(new)
        yield "refit", reference
        yield "none", self._answer(self.best, lambda _: self.states[self.best])
        for name, state in self.states.items():
            yield f"update {name}", self._answer(name, lambda engine, s=state: engine.update(s, batch)[0])
        yield f"update and sweep {self.best}", self._answer(self.best, lambda engine: self._swept(engine, batch))
        for gamma in GAMMAS:
            rule = PublishedRule(self.engines["Shared"], gamma)
            start = rule.start(self.states["Shared"])
            yield f"published {gamma:g}", self._answer("Shared", lambda _, r=rule, s=start: r.update(s, batch))
        yield "first order", self._first_order(batch)
        yield "reweighting", self._reweighted(batch)
        size = self.data.num_classes * self.engines[self.best].head.num_features
        if self.best == "Full" and size <= last_layer_torch.LARGEST and last_layer_torch.version() is not None:
            yield "laplace-torch", self._laplace_torch(both)
        if self.problem.data == "digits-network":
            yield "retraining", self._retrained(both)
            yield "mixture of networks", self._mixture(batch)

    def _refit(self, engine: LastLayerFilter, places: np.ndarray) -> HeadState:
        return engine.update(engine.init(), self.batch(places))[0]

    def _swept(self, engine: LastLayerFilter, batch: dict[str, np.ndarray]) -> HeadState:
        return engine.sweep(engine.update(self.states[self.best], batch)[0])[0]

    def _answer(self, name: str, learn: Callable[[LastLayerFilter], HeadState]) -> Answer:
        engine = self.engines[name]
        began = time.process_time()
        state = learn(engine)
        jax.block_until_ready((state.mean, state.belief))
        seconds = time.process_time() - began
        mode, probit = (
            engine.predict(state, self.data.test_x, method).probabilities for method in (AtMode(), Probit())
        )
        return Answer(mode, probit, seconds)

    def _first_order(self, batch: dict[str, np.ndarray]) -> Answer:
        """One step along the gradient of the new points' log-likelihood; of several lengths the best."""
        engine, state = self.engines[self.best], self.states[self.best]
        phi, test = engine.features(batch), engine.features(self.data.test_x)
        mean = np.asarray(state.mean)
        gradient = (
            np.asarray(engine.head.likelihood.gradient(jnp.asarray(phi @ mean.T), jnp.asarray(batch["y"]))).T @ phi
        )
        tried = [softmax(test @ (mean + rate * gradient).T, axis=1) for rate in RATES]
        return Answer(min(tried, key=lambda p: nll(p, self.data.test_y)), None, float("nan"))

    def _reweighted(self, batch: dict[str, np.ndarray]) -> Answer:
        """Draws of the weights before, weighted by the likelihood of the new points."""
        engine, state = self.engines[self.best], self.states[self.best]
        began = time.process_time()
        both = np.concatenate([batch["x"], self.data.test_x])
        outputs = engine.sample_outputs(state, both, DRAWS, self.seed)
        outputs = outputs - logsumexp(outputs, axis=2, keepdims=True)
        here, there = outputs[:, : len(batch["y"])], outputs[:, len(batch["y"]) :]
        scores = np.take_along_axis(here, batch["y"][None, :, None], axis=2)[:, :, 0].sum(axis=1)
        weights = softmax(scores.astype(np.float64))
        p = np.einsum("s,snk->nk", weights, np.exp(there))
        return Answer(p, p, time.process_time() - began)

    def _laplace_torch(self, both: np.ndarray) -> Answer:
        """Its full Laplace approximation of the last layer, at the refit's weights."""
        engine, batch = self.engines[self.best], self.batch(both)
        x, test = (np.asarray(engine.head.features({"x": x}), float)[:, :-1] for x in (batch["x"], self.data.test_x))
        weights = engine.weights(self._refit(engine, both))
        made = last_layer_torch.refit(x, batch["y"], weights, self.problem.prior_precision, test)
        return Answer(*made)

    def _retrained(self, both: np.ndarray) -> Answer:
        """The whole network trained from its start on the points before and after."""
        began = time.process_time()
        apply, params = trained(self.data.train_x[both], self.data.train_y[both], NETWORKS * self.seed)
        jax.block_until_ready(params)
        seconds = time.process_time() - began
        p = softmax(np.asarray(apply(params, self.data.test_x), float), axis=1)
        return Answer(p, None, seconds)

    def _mixture(self, batch: dict[str, np.ndarray]) -> Answer:
        """Heads on networks of several starts, all trained on the points before, which weigh none; updated with those after."""
        mixture, state = self._networks
        began = time.process_time()
        state, _ = mixture.update(state, batch)
        jax.block_until_ready([head.mean for head in state.heads])
        seconds = time.process_time() - began
        mode, probit = (
            mixture.predict(state, self.data.test_x, method).probabilities for method in (AtMode(), Probit())
        )
        return Answer(mode, probit, seconds)

    @cached_property
    def _networks(self) -> tuple[LastLayerMixture, MixtureState]:
        heads = [head_of(self.problem, self.seed, self.num_base, start) for start in range(NETWORKS)]
        mixture = LastLayerMixture(heads)
        return mixture, mixture.init(seen=self.batch(self.base))
