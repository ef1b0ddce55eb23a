"""A cell: one method on one scenario, order and seed. Finished cells are read; begun ones go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from perturbation_scenarios import L1, PRIOR_SCALE, Scenario, learner

from ssm_nn import Task
from ssm_nn.inference import metrics
from ssm_nn.inference.checkpoints import replacing
from ssm_nn.inference.perturbation.allocation import ExactQuadratic, PaperShare, Reads, Scores
from ssm_nn.inference.perturbation.baselines import FineTuned, HeadTraining
from ssm_nn.inference.perturbation.checkpoints import PerturbationFolder
from ssm_nn.inference.perturbation.directions import PlainSVD
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.joint import train_jointly
from ssm_nn.models.streams import TaskStream

ALLOCATIONS = "allocations"
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Cells:
    """The folder of cells."""

    folder: Path

    def path(self, settings: dict[str, Any]) -> Path:
        """A cell's file, named by the hash of its settings."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{settings['method']}-{settings['order']}-{settings['seed']}-{digest}.json"
        return self.folder / settings["scenario"] / name

    def read(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What is there of a cell."""
        path = self.path(settings)
        return json.loads(path.read_text()) if path.exists() else {"settings": settings, "done": False, "tasks": []}

    def write(self, cell: dict[str, Any]) -> None:
        """Whole or not at all."""
        with replacing(self.path(cell["settings"])) as file:
            file.write(json.dumps(cell, indent=1).encode())

    def finished(self, scenario: Scenario) -> list[dict[str, Any]]:
        """All finished cells with the scenario's present settings."""

        def present(settings: dict[str, Any]) -> bool:
            return settings == settings_of(scenario, settings["method"], settings["order"], settings["seed"])

        cells = [json.loads(path.read_text()) for path in sorted((self.folder / scenario.name).glob("*.json"))]
        return [cell for cell in cells if cell["done"] and present(cell["settings"])]


def settings_of(scenario: Scenario, method: str, order: int, seed: int) -> dict[str, Any]:
    """All that a result depends on, but for the code."""
    common = {"batch_size": scenario.batch_size, "growth": scenario.growth, "prior_scale": PRIOR_SCALE}
    common |= {"cap": scenario.cap, "spread": scenario.spread, "rates": list(scenario.rates), "l1": L1}
    common["budget"] = asdict(scenario.budget)
    if scenario.first is not None:
        common["first"] = scenario.first
    settings = {"scenario": scenario.name, "method": method, "order": order, "seed": seed, "common": common}
    return settings | {"elastic": scenario.elastic} if method == "ewc" else settings


def run_cell(cells: Cells, scenario: Scenario, method: str, order: int, seed: int, report: Report) -> dict[str, Any]:
    """The cell's content, from its file if it is finished."""
    settings = settings_of(scenario, method, order, seed)
    cell = cells.read(settings)
    if cell["done"]:
        return cell
    stream = scenario.stream(scenario.budget, seed, order)
    made = learner(method, scenario, stream, seed)  # for the whole sequence
    if scenario.first is not None:
        stream = replace(stream, train=stream.train[: scenario.first], test=stream.test[: scenario.first])
    if method == "joint":
        _joint(cell, made, stream, seed)
    elif method == ALLOCATIONS:
        _allocations(cell, made, stream, seed, report)
    else:
        _task_by_task(cells, cell, made, stream, seed, report)
    cells.write(cell | {"done": True})
    return cell | {"done": True}


def judged(made: Any, state: Any, test: Task) -> dict[str, float]:
    """Accuracy, NLL and calibration error on the examples of a test task that count."""
    site = made.predict(state, test)["y"]
    counts = np.ones(test.num_examples, bool) if test.mask is None else np.asarray(test.mask)
    probabilities, labels = np.asarray(site.probabilities)[counts], np.asarray(test["y"])[counts]
    return {
        "accuracy": metrics.accuracy(probabilities, labels),
        "nll": -float(np.mean(np.asarray(site.log_density)[counts])),
        "ece": metrics.ece(probabilities, labels),
    }


def _task_by_task(cells: Cells, cell: dict[str, Any], made: Any, stream: TaskStream, seed: int, report: Report) -> None:
    state = made.init(seed, stream.train[0])
    folder = cells.path(cell["settings"]).with_suffix("")
    resumable = isinstance(made, PerturbationFilter)
    if resumable:
        reading = made._known()
        state = PerturbationFolder(folder).read(state, reading.own(reading.initial))
        cell["tasks"] = cell["tasks"][: state.step]
    else:
        cell["tasks"] = []
    for t in range(len(cell["tasks"]), len(stream)):
        report(t, len(stream))
        task = stream.train[t]
        began, spent = time.perf_counter(), time.process_time()
        state, info = made.update(state, task)
        jax.block_until_ready(state[2])
        # CPU seconds beside wall time: they stand still while other processes have the cores
        row: dict[str, Any] = {
            "task": int(task.context["task"]),
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - spent,
        }
        if info is not None:
            row |= {"phases": info.seconds, "ranks": info.ranks, "pruned": info.pruned}
            row["predicted_change"] = info.predicted_change
        row |= {f"learnt_{name}": value for name, value in judged(made, state, stream.test[t]).items()}
        row["growth"] = made.storage(state).growth
        cell["tasks"].append(row)
        if resumable:
            cells.write(cell)
            PerturbationFolder(folder).add(state)
    _final(cell, made, state, stream)
    shutil.rmtree(folder, ignore_errors=True)


def _final(cell: dict[str, Any], made: Any, state: Any, stream: TaskStream) -> None:
    for t, row in enumerate(cell["tasks"]):
        row |= judged(made, state, stream.test[t])


def _joint(cell: dict[str, Any], made: PerturbationFilter, stream: TaskStream, seed: int) -> None:
    began = time.perf_counter()
    state = train_jointly(made, seed, [stream.train[t] for t in range(len(stream))])
    jax.block_until_ready(state.shared)
    seconds = (time.perf_counter() - began) / len(stream)
    reader = HeadTraining(made, FineTuned())
    growth = reader.storage(state).growth
    cell["tasks"] = [
        {"task": int(stream.test[t].context["task"]), "seconds": seconds, "growth": growth} for t in range(len(stream))
    ]
    _final(cell, reader, state, stream)


def _allocations(cell: dict[str, Any], made: PerturbationFilter, stream: TaskStream, seed: int, report: Report) -> None:
    """Paper's share and exact quadratic on the same directions, at equal parameters, right after truncation and fine-tuned.

    ``set`` is the exact rule's choice among the same candidates before any step: it differs from the paper's in the set alone.
    """
    made.directions, rules = PlainSVD(), {"paper": PaperShare(0.9), "set": _Sets(), "exact": ExactQuadratic()}
    state, _ = made.update(made.init(seed, stream.train[0]), stream.train[0])
    cell["tasks"] = []
    for t in range(1, len(stream)):
        report(t, len(stream))
        task = stream.train[t]
        made.allocation = _Both()
        proposal = made.propose(state, task)
        budget = int(proposal.scores.cost[rules["paper"].choose(proposal.scores, None)].sum())
        row: dict[str, Any] = {"task": int(task.context["task"]), "numbers": budget}
        for name, rule in rules.items():
            made.allocation = rule
            gains = made.choose(state, task, proposal._replace(budget=budget))
            truncated = made.truncated_state(state, task, proposal, gains)
            row |= {f"{name}_truncated_{k}": v for k, v in judged(made, truncated, stream.test[t]).items()}
            row[f"{name}_truncated_train_nll"] = judged(made, truncated, task)["nll"]
            if name == "set":
                continue
            after, info = made.finish(state, task, proposal, gains)
            row |= {f"{name}_{k}": v for k, v in judged(made, after, stream.test[t]).items()}
            row |= {f"{name}_ranks": info.ranks, f"{name}_predicted": info.predicted_change}
        cell["tasks"].append(row)


class _Both(PaperShare):
    """Asks for all that either rule reads."""

    def reads(self, total: int, budget: int | None) -> Reads:
        del total, budget
        return Reads(quadratic=True, sensitivity=True)


class _Sets(ExactQuadratic):
    """Candidates without steps."""

    def candidates(self, scores: Scores, budget: int | None) -> np.ndarray:
        return np.unique(super().candidates(scores, budget) != 0, axis=0).astype(float)
