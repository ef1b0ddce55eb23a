"""Other learners on the same stream: plain steps, EWC and SI with boundaries given, and the rules that are kin to MESU.

Permuted MNIST, 784-50-10, one pass at one batch size for all. Every method meets the same permutations and, but for EWC and
SI, which shuffle by themselves, the same order of examples. Hyper-parameters are tuned by the average over all tasks at the
end of a shorter stream of other permutations. EWC takes steps of Adam, begun anew in every task, and SI steps of SGD.

BGD is the fixed point with an infinite window, and FOO-VB with a diagonal covariance (Zeno et al., arXiv 2010.00373) is BGD:
its closed form sqrt(v) sqrt(1 + h^2) - sqrt(v) h, h = sqrt(v) E[g e] / 2, is sqrt(v) exp(-asinh h).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from csv_files import write_csv
from mean_field_permuted import RULES
from mean_field_programs import CLASSES, PIXELS, classifier, images, network, permutation

from ssm_nn.inference import LaplaceFilter, Minibatch
from ssm_nn.inference.baselines import OnlineEWC, SynapticIntelligence
from ssm_nn.inference.checkpoints import replacing
from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.gradients import LocalReparameterisation
from ssm_nn.inference.mean_field.starts import FanIn
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.inference.metrics import accuracy
from ssm_nn.inference.predictive import AtMean, ThroughNetwork, predict_from

HIDDEN, BATCH, DRAWS, LAST = 50, 32, 10, 5
TUNING_SEED, TUNING_TASKS = 1_000, 5
INF = float("inf")


class Learner(Protocol):
    """One method at one choice of its hyper-parameters."""

    def learn(self, data: dict[str, Any], order: int) -> None:
        """One task in one pass; ``order`` is a seed."""
        ...

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """(N, classes)."""
        ...


class Plain:
    """SGD or Adam, which is not told of tasks: its state goes on."""

    def __init__(self, optimiser: optax.GradientTransformation, seed: int):
        self.params = weights(seed)
        self.state, self.one_pass = optimiser.init(self.params), one_pass(optimiser)

    def learn(self, data: dict[str, Any], order: int) -> None:
        """See ``Learner``."""
        batches = Batches(data, BATCH, seed=order)
        indices = batches.indices(0, len(batches))
        mask = indices < len(data["y"])
        inputs = data["x"], data["y"], np.where(mask, indices, 0), mask
        self.params, self.state = self.one_pass(self.params, self.state, *inputs)

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """See ``Learner``."""
        return np.asarray(_probabilities(self.params, x))


class Bounded:
    """EWC or SI: told of every task's end."""

    def __init__(self, make: Callable[[LaplaceFilter], Any], optimiser: optax.GradientTransformation, seed: int):
        apply, _ = network(HIDDEN)
        minibatch = Minibatch(optimiser, epochs=1, batch_size=BATCH)
        self.program = classifier((apply, weights(seed)))
        engine = LaplaceFilter(self.program, estimator=minibatch)
        self.method, self.state, self.seed = make(engine), None, seed

    def learn(self, data: dict[str, Any], order: int) -> None:
        """See ``Learner``."""
        del order
        if self.state is None:
            self.state = self.method.init(self.seed, data)
        self.state, _ = self.method.update(self.state, data)

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """See ``Learner``."""
        belief = self.method.belief(self.state, {"x": x})
        return predict_from(self.program, {}, belief, {"x": x}, method=AtMean())["y"].probabilities


class MeanField:
    """Any rule of the engine."""

    def __init__(self, rule: str, window: float, seed: int, spread: float = 2.0):
        self.engine = MeanFieldFilter(
            classifier(network(HIDDEN)),
            Window(window),
            rule=RULES[rule],
            estimator=LocalReparameterisation(DRAWS),
            start=FanIn(spread=spread),
        )
        self.state = self.engine.init(seed, {"x": np.zeros((1, PIXELS), np.float32), "y": np.zeros(1, np.int32)})

    def learn(self, data: dict[str, Any], order: int) -> None:
        """See ``Learner``."""
        self.state, _ = self.engine.run(self.state, Batches(data, BATCH, seed=order))

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """See ``Learner``."""
        return self.engine.predict(self.state, {"x": x}, method=ThroughNetwork(DRAWS), key=0)["y"].probabilities


@dataclass(frozen=True)
class Method:
    """A row of the table: ``make(choice, seed)``, and the choices that it is tuned over."""

    make: Callable[[tuple[float, ...], int], Learner]
    names: tuple[str, ...]
    choices: tuple[tuple[float, ...], ...]


RATES = ((0.001,), (0.003,), (0.01,), (0.03,))
WINDOWS = ((3e5,), (6e5,), (1.2e6,), (2.4e6,))
METHODS = {
    "SGD": Method(lambda c, s: Plain(optax.sgd(c[0]), s), ("rate",), RATES),
    "Adam": Method(lambda c, s: Plain(optax.adam(c[0]), s), ("rate",), ((3e-5,), (1e-4,), (3e-4,))),
    "online EWC, boundaries given": Method(
        lambda c, s: Bounded(lambda engine: OnlineEWC(engine, c[0]), optax.adam(c[1]), s),
        ("strength", "rate"),
        ((0.1, 1e-3), (0.3, 1e-3), (1.0, 1e-3), (10.0, 1e-3), (100.0, 1e-3), (10.0, 3e-3), (0.3, 3e-4), (1.0, 3e-4)),
    ),
    "SI, boundaries given": Method(
        lambda c, s: Bounded(lambda engine: SynapticIntelligence(engine, c[0]), optax.sgd(c[1]), s),
        ("strength", "rate"),
        (
            (0.001, 0.01),
            (0.003, 0.01),
            (0.01, 0.01),
            (0.1, 0.01),
            (1.0, 0.01),
            (0.1, 0.003),
            (0.003, 0.03),
            (0.01, 0.03),
        ),
    ),
    "BGD = FOO-VB diagonal": Method(
        lambda c, s: MeanField("fixed-point", INF, s, c[0]), ("spread",), ((0.5,), (1.0,), (2.0,), (4.0,))
    ),
    "IVON's rule": Method(lambda c, s: MeanField("ivon", c[0], s), ("window",), WINDOWS),
    "MESU, fixed point": Method(lambda c, s: MeanField("fixed-point", c[0], s), ("window",), WINDOWS),
}


def measure(out: Path, tasks: int, seeds: list[int], names: list[str]) -> list[dict]:
    """A row a method: what was chosen, accuracy on the task just learnt, the last five, all; mean and deviation over seeds."""
    rows = []
    for name in names or METHODS:
        method = METHODS[name]
        chosen = _tuned(out, name, method)
        runs = [_stream(out, name, chosen, tasks, seed) for seed in seeds]
        row: dict[str, Any] = {"method": name, **dict.fromkeys(("rate", "strength", "spread", "window"))}
        row |= dict(zip(method.names, chosen, strict=True))
        for key in ("learnt", "last_five", "all"):
            each = [run[key] for run in runs]
            row |= {key: float(np.mean(each)), f"{key}_sd": float(np.std(each))}
        row |= {"seeds": len(seeds), "seconds": float(np.mean([run["seconds"] for run in runs]))}
        rows.append(row)
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        write_csv(out / "baselines.csv", rows)
    return rows


def _tuned(out: Path, name: str, method: Method) -> tuple[float, ...]:
    scores = {c: _stream(out, name, c, TUNING_TASKS, TUNING_SEED)["all"] for c in method.choices}
    print(name, {str(c): round(score, 4) for c, score in scores.items()}, flush=True)
    return max(scores, key=lambda c: scores[c])


def _stream(out: Path, name: str, choice: tuple[float, ...], tasks: int, seed: int) -> dict[str, float]:
    """One run, or what a former one found."""
    words = name.replace(",", "").replace("'", "").replace(" ", "-")
    file = out / "cells" / f"baseline-{words}-{'-'.join(f'{c:g}' for c in choice)}-t{tasks}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    x, y, test_x, test_y = images("mnist")
    learner, learnt, seconds = METHODS[name].make(choice, seed), [], 0.0
    orders = [permutation(seed, task) for task in range(tasks)]

    def judged(order: np.ndarray) -> float:
        return accuracy(learner.probabilities(test_x[:, order]), test_y)

    for task, order in enumerate(orders):
        began = time.perf_counter()
        learner.learn({"x": jnp.asarray(x[:, order]), "y": jnp.asarray(y)}, seed * 100_003 + task)
        seconds += time.perf_counter() - began
        learnt.append(judged(order))
    every = [judged(order) for order in orders[:-1]] + learnt[-1:]
    found = {
        "learnt": float(np.mean(learnt)),
        "last_five": float(np.mean(every[-LAST:])),
        "all": float(np.mean(every)),
        "seconds": seconds / tasks,
    }
    with replacing(file) as handle:
        handle.write(json.dumps(found).encode())
    return found


@cache
def weights(seed: int) -> dict[str, Any]:
    """First weights, uniform on +-1 / sqrt(fan-in)."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        name: jax.random.uniform(key, (inputs, outputs), jnp.float32, -(inputs**-0.5), inputs**-0.5)
        for name, key, (inputs, outputs) in zip(
            ("hidden", "head"), keys, ((PIXELS, HIDDEN), (HIDDEN, CLASSES)), strict=True
        )
    }


@jax.jit
def _probabilities(params: Any, x: Any) -> Any:
    return jax.nn.softmax(network(HIDDEN)[0](params, x))


def one_pass(optimiser: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """(weights, state, x, y, rows of the batches, which of them count) -> (weights, state)."""
    apply = network(HIDDEN)[0]

    @jax.jit
    def whole(params: Any, state: Any, x: Any, y: Any, indices: Any, mask: Any) -> tuple[Any, Any]:
        def step(carry: Any, inputs: Any) -> Any:
            (params, state), (rows, counted) = carry, inputs

            def loss(params: Any) -> Any:
                each = optax.softmax_cross_entropy_with_integer_labels(apply(params, x[rows]), y[rows])
                return jnp.sum(jnp.where(counted, each, 0.0)) / jnp.sum(counted)

            change, state = optimiser.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, state), (indices, mask))[0]

    return whole
