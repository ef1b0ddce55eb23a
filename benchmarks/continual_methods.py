"""The methods by name: how each is made for a bench, and over which strengths it is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from continual_bench import Bench
from continual_settings import LEARNING_RATES, REPLAYED, Budget

from ssm_nn.inference import Belief, Kronecker, LaplaceFilter, LowRank
from ssm_nn.inference.baselines import (
    FineTuning,
    JointTraining,
    OnlineEWC,
    Replay,
    StructuredLaplace,
    SynapticIntelligence,
    VariationalContinual,
)
from ssm_nn.inference.expectation_maximisation import learn_kernel

POWERS = (1.0, 3.0)
SPREADS = (0.25, 0.5, 1.0)  # standard deviations of the belief
LEARNT_FROM, LEARNING_RUNS = 1e-3, 8  # EM starts at this noise, and runs the filter so often at most
NOT_KEPT = ("step", "key", "start_mean", "start_sigma")  # of a state: copies and counters


class Choice(NamedTuple):
    """A method's strength, and the learning rate of its steps."""

    strength: float
    learning_rate: float


@dataclass(frozen=True)
class Method:
    """A method of the benchmark.

    Attributes:
        name: on the command line.
        make: (bench, strength) -> a filter or a baseline.
        strengths: candidates; a single one is taken as it is.
        rates: candidates for the learning rate, tuned together with the strength.
        strength_name: what the strength is called in the method's own words, empty where there is none.
    """

    name: str
    make: Callable[[Bench, float], Any]
    strengths: tuple[float, ...] = (1.0,)
    strength_name: str = ""
    rates: tuple[float, ...] = LEARNING_RATES[:1]

    def candidates(self, budget: Budget) -> list[Choice]:
        """Those that the budget allows."""
        rates = self.rates[: budget.strengths]
        return [Choice(strength, rate) for rate in rates for strength in self.strengths[: budget.strengths]]


def method_of(name: str, smoothed: bool = False) -> Method:
    """The method of a name.

    Args:
        name: such as ``"ewc"``, ``"low-rank-20"``, ``"kronecker-q1e-3"`` (noise of every weight between two tasks).
        smoothed: the scenario compares evidences, which a tuned power would change: filters keep power 1.

    Raises:
        ValueError: for an unknown name.
    """
    if name in _BASELINES:
        return _BASELINES[name]
    powers = (1.0,) if smoothed else POWERS
    if name.startswith("low-rank-"):
        rank = int(name.removeprefix("low-rank-"))
        return Method(name, lambda bench, power: bench.engine(LowRank(rank), power), powers, "power")
    if name == "kronecker":
        return Method(name, _kronecker_static, powers, "power")
    if name == "kronecker-spread":
        return Method(name, _kronecker_spread, SPREADS, "spread")
    if name.startswith("kronecker-strength-"):
        strength = float(name.removeprefix("kronecker-strength-"))
        return Method(name, lambda bench, spread: _kronecker_spread(bench, spread, strength), (SPREADS[0],), "spread")
    if name == "kronecker-known":
        return Method(name, lambda bench, power: bench.engine(Kronecker(), power), (1.0,), "power")
    if name == "kronecker-learnt":
        return Method(name, _kronecker_learnt, (LEARNT_FROM,), "first q")
    if name.startswith("kronecker-q"):
        return Method(name, _kronecker_walk, (float(name.removeprefix("kronecker-q")),), "q")
    raise ValueError(
        f"method is {name!r}; accepted are {', '.join(_BASELINES)}, low-rank-R, kronecker and its variants"
    )


def belief_of(learner: Any, state: Any, task: Any) -> Belief:
    """The belief in a state, of filters and baselines alike."""
    if isinstance(learner, LaplaceFilter):
        return Belief(state.mean, state.precision)
    return learner.belief(state, task)


def kept_numbers(state: Any) -> int:
    """Numbers that a state carries from task to task."""
    kept = [value for name, value in state._asdict().items() if name not in NOT_KEPT]
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


def _kronecker_static(bench: Bench, power: float) -> LaplaceFilter:
    return bench.engine(Kronecker(), power, bench.untold_world)


def _kronecker_spread(bench: Bench, spread: float, strength: float = 1.0) -> LaplaceFilter:
    """Curvature averaged over draws from the belief, instead of the likelihood's power; kept ``strength`` times."""
    return bench.engine(Kronecker(), 1.0, bench.untold_world, spread, strength)


def _kronecker_walk(bench: Bench, noise: float) -> LaplaceFilter:
    engine = bench.engine(Kronecker())
    return engine.with_hypers(dict.fromkeys(engine.hypers, noise))


def _kronecker_learnt(bench: Bench, noise: float) -> LaplaceFilter:
    """A noise a layer by EM on the training labels of the stream itself."""
    engine = _kronecker_walk(bench, noise)
    layers = {f"noise.{name}": pattern for name, pattern in bench.shape.groups.items()}
    tasks = [bench.stream.train[t] for t in range(bench.num_tasks)]
    learnt = learn_kernel(engine, tasks, layers, key=bench.seed, max_iterations=LEARNING_RUNS)
    return engine.with_hypers(learnt.hypers)


def _own_steps(bench: Bench) -> Any:
    # where a task is one batch the engine's search is L-BFGS, and these need an optimiser of steps
    return bench.minibatch if bench.small else None


_BASELINES = {
    method.name: method
    for method in (
        Method("fine-tuning", lambda bench, _: FineTuning(bench.trainer), rates=LEARNING_RATES),
        Method("joint", lambda bench, _: JointTraining(bench.trainer)),
        Method(
            "ewc",
            lambda bench, strength: OnlineEWC(bench.trainer, strength),
            (10.0, 100.0, 1.0, 1000.0),
            "strength",
            LEARNING_RATES,
        ),
        Method(
            "structured-laplace",
            lambda bench, strength: StructuredLaplace(bench.engine(Kronecker(), world=bench.untold_world), strength),
            (1.0, 3.0, 10.0),
            "strength",
            LEARNING_RATES,
        ),
        Method(
            "si",
            lambda bench, strength: SynapticIntelligence(bench.trainer, strength, minibatch=_own_steps(bench)),
            (1.0, 0.1, 0.01, 10.0),
            "strength",
            LEARNING_RATES,
        ),
        Method(
            "vcl",
            lambda bench, weight: VariationalContinual(
                bench.trainer, weight, sigma_rate=10.0, minibatch=_own_steps(bench)
            ),
            (1.0, 0.1, 0.01),
            "kl_weight",
            LEARNING_RATES,
        ),
        Method(
            f"replay-{REPLAYED}",
            lambda bench, _: Replay(bench.trainer, REPLAYED, minibatch=_own_steps(bench)),
            rates=LEARNING_RATES,
        ),
    )
}
