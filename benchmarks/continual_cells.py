"""A cell: one method on one scenario at one seed. Finished cells are read, begun ones go on after their last whole task."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from continual_bench import Bench
from continual_methods import Choice, Method, belief_of, kept_numbers
from continual_scenarios import Scenario
from continual_settings import VALIDATION_SEED, Budget, common

from ssm_nn import Task
from ssm_nn.inference.baselines import JointTraining
from ssm_nn.inference.checkpoints import CheckpointError, load, replacing, save
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.tuning import Tuned, tune

AFTER, BEFORE, SMOOTHED = (
    "after",
    "before",
    "smoothed",
)  # views: belief of task i on task j <= i; on task i + 1; given all
Rows = list[dict[str, Any]]
Report = Callable[[int, int], None]  # tasks done, tasks in all


@dataclass
class Result:
    """What a cell found, a row a judgement and a row a task.

    Attributes:
        scores: view, learnt, tested, accuracy, nll.
        tasks: task, seconds, numbers (kept to the next task), log_evidence (nan where there is none).
    """

    scores: Rows
    tasks: Rows


@dataclass(frozen=True)
class Store:
    """The folder of cells; each is a file named by the hash of its settings."""

    folder: Path

    def path(self, settings: dict[str, Any], suffix: str = ".json") -> Path:
        """Where a cell lies."""
        name = f"{settings['method']}-{settings['seed']}-{digest_of(settings)}{suffix}"
        return self.folder / settings["scenario"] / name

    def read(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """A cell's content, or None."""
        path = self.path(settings)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, settings: dict[str, Any], content: dict[str, Any]) -> None:
        """Whole or not at all."""
        with replacing(self.path(settings)) as file:
            file.write(json.dumps({"settings": settings, **content}, indent=1).encode())

    def finished(self, scenario: str) -> Iterator[dict[str, Any]]:
        """All finished cells of a scenario that were reported on."""
        for path in sorted((self.folder / scenario).glob("*.json")):
            content = json.loads(path.read_text())
            if content.get("done"):
                yield content


def digest_of(settings: dict[str, Any]) -> str:
    """What names the settings of a cell."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings_of(scenario: Scenario, method: Method, seed: int, budget: Budget, choice: Choice | str) -> dict[str, Any]:
    """All that a result depends on, but for the code."""
    chosen = {"tuned": choice} if isinstance(choice, str) else choice._asdict()
    return {
        "scenario": scenario.name,
        "dataset": scenario.dataset,
        "num_tasks": scenario.num_tasks,
        "examples": scenario.examples,
        "test_examples": scenario.test_examples,
        "validation_tasks": scenario.validation_tasks,
        "method": method.name,
        "seed": seed,
        **({"middle_missing": True} if scenario.middle_missing else {}),
        **chosen,
        "common": common(budget) | {"prior_scale": scenario.prior_scale},
    }


def tuned(store: Store, scenario: Scenario, method: Method, budget: Budget) -> Choice:
    """The strength and learning rate that score best on the validation stream; found once for all seeds."""
    candidates = method.candidates(budget)
    if len(candidates) == 1:
        return candidates[0]
    settings = settings_of(scenario, method, VALIDATION_SEED, budget, str([tuple(c) for c in candidates]))
    known = store.read(settings)
    if known is not None:
        return Choice(*known["choice"])
    scores = {}
    for rate in dict.fromkeys(c.learning_rate for c in candidates):
        bench = Bench(scenario, budget, VALIDATION_SEED, validation=True, learning_rate=rate)
        strengths = tuple(c.strength for c in candidates if c.learning_rate == rate)
        found = _tuned(bench, method, strengths).scores
        scores |= {Choice(strength, rate): score for strength, score in found.items()}
    best = max(scores, key=lambda c: -math.inf if math.isnan(scores[c]) else scores[c])
    listed = [{**c._asdict(), "score": score} for c, score in scores.items()]
    store.write(settings, {"choice": best, "scores": listed})
    return best


def _tuned(bench: Bench, method: Method, candidates: tuple[float, ...]) -> Tuned:
    tasks = [bench.stream.train[t] for t in range(bench.num_tasks)]

    def score(belief: Any) -> float:
        return float(np.mean([bench.judge(belief, bench.stream.test[t])[0] for t in range(bench.num_tasks)]))

    return tune(lambda strength: method.make(bench, strength), candidates, tasks, score, bench.seed)


def run_cell(store: Store, bench: Bench, method: Method, choice: Choice, report: Report) -> Result:
    """The cell's result, from its file if it is finished."""
    settings = settings_of(bench.scenario, method, bench.seed, bench.budget, choice)
    known = store.read(settings)
    if known is not None and known["done"]:
        return Result(known["scores"], known["tasks"])
    if method.name == "joint":
        result = _joint(bench, method)
    else:
        result = _task_by_task(store, settings, bench, method, choice.strength, report)
    note = {"strength_name": method.strength_name, "done": True}
    store.write(settings, {**note, "scores": result.scores, "tasks": result.tasks})
    for begun in store.path(settings).parent.glob(store.path(settings, "").name + ".task*.npz"):
        begun.unlink()
    return result


def _joint(bench: Bench, method: Method) -> Result:
    """One training on the examples of all tasks: the prefixes would cost T / 2 times as much."""
    share = bench.budget.joint_examples // bench.num_tasks
    tasks = [_first(bench.stream.train[t], share) for t in range(bench.num_tasks)]
    began = time.perf_counter()
    learner = JointTraining(bench.joint_trainer(sum(task.num_examples for task in tasks)))
    state, _ = learner.update(learner.init(bench.seed, bench.example), tasks)
    jax.block_until_ready(state.mean)
    seconds = time.perf_counter() - began
    last = bench.num_tasks - 1
    numbers = kept_numbers(state) + sum(leaf.size for task in tasks for leaf in jax.tree.leaves(task))
    belief = learner.belief(state, bench.example)
    scores = [_judged(bench, AFTER, belief, last, t) for t in range(bench.num_tasks)]
    return Result(scores, [_task_row(last, seconds, numbers, math.nan)])


def _task_by_task(
    store: Store, settings: dict[str, Any], bench: Bench, method: Method, strength: float, report: Report
) -> Result:
    learner = method.make(bench, strength)
    state = learner.init(bench.seed, bench.example)
    keeps_all = bench.scenario.smoothed and isinstance(learner, LaplaceFilter)
    begun = None if keeps_all else _begun(store, settings, state)
    result, states, infos = Result([], []), [], []
    if begun is not None:
        state, result = begun
    for t in range(len(result.tasks), bench.num_tasks):
        report(t, bench.num_tasks)
        task = bench.stream.train[t]
        if not bench.scenario.whole_matrix and t:
            predicted = state
            if isinstance(learner, LaplaceFilter):
                predicted, _ = learner.update(state, Task({}, task.context))
            result.scores.append(_judged(bench, BEFORE, belief_of(learner, predicted, task), t - 1, t))
        began = time.perf_counter()
        state, info = learner.update(state, task)
        jax.block_until_ready(state.mean)
        seconds = time.perf_counter() - began
        belief = belief_of(learner, state, task)
        tested = range(t + 1) if bench.scenario.whole_matrix else [t]
        result.scores += [_judged(bench, AFTER, belief, t, j) for j in tested]
        evidence = getattr(info, "log_evidence", math.nan)
        result.tasks.append(_task_row(t, seconds, kept_numbers(state), evidence))
        if keeps_all:
            states.append(state)
            infos.append(info)
        else:
            _checkpoint(store, settings, state, result)
    if keeps_all:
        filtered = learner.filtered(states, infos)
        beliefs = learner.smooth(filtered).beliefs
        result.scores += [_judged(bench, SMOOTHED, b, bench.num_tasks - 1, t) for t, b in enumerate(beliefs)]
    return result


def _judged(bench: Bench, view: str, belief: Any, learnt: int, tested: int) -> dict[str, Any]:
    accuracy, nll = bench.judge(belief, bench.stream.test[tested])
    return {"view": view, "learnt": learnt, "tested": tested, "accuracy": accuracy, "nll": nll}


def _task_row(task: int, seconds: float, numbers: int, log_evidence: float) -> dict[str, Any]:
    return {"task": task, "seconds": seconds, "numbers": numbers, "log_evidence": log_evidence}


def _first(task: Task, count: int) -> Task:
    return Task({name: task[name][:count] for name in task}, task.context)


def _checkpoint(store: Store, settings: dict[str, Any], state: Any, result: Result) -> None:
    """State first, then the rows that name it: a kill between the two costs one task."""
    done = len(result.tasks)
    save(store.path(settings, f".task{done}.npz"), state)
    store.write(settings, {"done": False, "scores": result.scores, "tasks": result.tasks})
    store.path(settings, f".task{done - 1}.npz").unlink(missing_ok=True)


def _begun(store: Store, settings: dict[str, Any], like: Any) -> tuple[Any, Result] | None:
    """Where an earlier run stopped; None where it left nothing, or a state that grows (replay's memory)."""
    content = store.read(settings)
    if content is None:
        return None
    result = Result(content["scores"], content["tasks"])
    try:
        return load(store.path(settings, f".task{len(result.tasks)}.npz"), like), result
    except CheckpointError:
        return None
