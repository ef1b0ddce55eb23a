"""Permuted MNIST without task boundaries: one long stream, judged after every task; goes on where it was stopped.

Clothes (Fashion-MNIST's test images) are told from the digits of the task just learnt by the epistemic part of the predictive
entropy. ``auroc_*`` permutes the clothes as the task and standardises them as the digits; ``*_many_draws`` does so with 100
draws instead of ``draws``, on every fifth image; ``*_as_published`` leaves the clothes as they are and standardises them by
their own mean and deviation, as the authors' code does (github.com/kellian-cottart/mesu-pmnist).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from csv_files import write_csv
from mean_field_programs import classifier, images, network, permutation, standardised

from ssm_nn.inference.checkpoints import load, replacing, save
from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.gradients import LocalReparameterisation
from ssm_nn.inference.mean_field.progress import LearningBar
from ssm_nn.inference.mean_field.rules import FirstOrder, FixedPoint, Ivon, Natural
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.inference.metrics import accuracy, auroc
from ssm_nn.inference.predictive import Prediction, ThroughNetwork
from ssm_nn.models.datasets import load as load_images

RULES = {"first-order": FirstOrder(), "fixed-point": FixedPoint(), "natural": Natural(), "ivon": Ivon()}
LAST, EVERY = 5, 10  # tasks of "the last five"; how often they, and the images of clothes, are judged
MANY_DRAWS, NTH = 100, 5  # the score of many draws is of every fifth image: standard error .005


@dataclass(frozen=True)
class Setting:
    """All that a run depends on; the defaults are the published ones."""

    hidden: int = 50
    window: float = 300_000.0
    batch: int = 1
    rule: str = "first-order"
    draws: int = 10
    trust: float = 1.0
    tasks: int = 200
    examples: int = 60_000
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its files; the number of tasks is left out, so that a longer run goes on from a shorter one."""
        return f"permuted-{self.hidden}-{self.window:g}-b{self.batch}-{self.rule}-s{self.draws}-n{self.examples}-{self.seed}"


def run(setting: Setting, out: Path, all_tasks_at: tuple[int, ...] = (10, 20, 50, 100, 200)) -> list[dict]:
    """A row a task: accuracy on it, and every tenth task on the last five, on all at a few, and AUROC on clothes."""
    x, y, test_x, test_y = images("mnist")
    clothes = images("fashion-mnist")[2]
    own_clothes = standardised(load_images("fashion-mnist").test_x)
    engine = MeanFieldFilter(
        classifier(network(setting.hidden)),
        Window(setting.window),
        rule=RULES[setting.rule],
        estimator=LocalReparameterisation(setting.draws),
        trust=setting.trust,
    )
    state = engine.init(setting.seed, {"x": x[:1], "y": y[:1]})
    rows_file = out / "cells" / f"{setting.name}.json"
    rows: list[dict] = []
    if rows_file.exists():
        rows = json.loads(rows_file.read_text())["rows"][: setting.tasks]
        if 0 < len(rows) < setting.tasks:
            state = load(_state_file(rows_file, len(rows)), state)

    def predicted(inputs, task, draws=setting.draws):
        return engine.predict(state, {"x": inputs}, method=ThroughNetwork(draws), key=task)["y"]

    def judged(task):
        return accuracy(predicted(test_x[:, permutation(setting.seed, task)], task).probabilities, test_y)

    for task in range(len(rows), setting.tasks):
        order = permutation(setting.seed, task)
        data = {"x": jnp.asarray(x[: setting.examples, order]), "y": jnp.asarray(y[: setting.examples])}
        batches = Batches(data, setting.batch, seed=setting.seed * 100_003 + task)
        began = time.perf_counter()
        with LearningBar(len(batches), f"{setting.name} task {task + 1}/{setting.tasks}") as bar:
            state, info = engine.run(state, batches, progress=bar)
        seconds = time.perf_counter() - began
        inside = predicted(test_x[:, order], task)
        row = {
            "task": task + 1,
            "learnt": accuracy(inside.probabilities, test_y),
            "prequential": info.accuracy,
            "free_energy": float(np.sum(info.free_energy) / np.sum(info.counted)),
            "sigma_median": float(info.sigma_quantiles[3]),
            "left_out": len(info.left_out),
            "examples_per_second": setting.examples / seconds,
        }
        done = task + 1
        if done % EVERY == 0 or done == setting.tasks:
            row["last_five"] = float(np.mean([judged(t) for t in range(max(done - LAST, 0), done)]))
            row |= _told_apart("", inside, predicted(clothes[:, order], task))
            row |= _told_apart("_as_published", inside, predicted(own_clothes, task))
            some = (predicted(kind[::NTH, order], task, MANY_DRAWS) for kind in (test_x, clothes))
            row |= _told_apart("_many_draws", *some)
        if done in all_tasks_at:
            row["all"] = float(np.mean([judged(t) for t in range(done)]))
        rows.append(row)
        save(_state_file(rows_file, done), state)
        with replacing(rows_file) as file:
            file.write(json.dumps({"setting": asdict(setting), "rows": rows}, indent=1).encode())
        _state_file(rows_file, done - 1).unlink(missing_ok=True)
        print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        if done % EVERY == 0 or done == setting.tasks:
            write_csv(out / f"{setting.name}.csv", rows)
    return rows


def _told_apart(suffix: str, inside: Prediction, outside: Prediction) -> dict[str, float]:
    """AUROC of clothes against digits by the parts of the predictive entropy."""
    strange = np.repeat([0, 1], [len(inside.epistemic), len(outside.epistemic)])
    found = {}
    for name in ("epistemic", "entropy"):
        scores = [p.epistemic + (p.aleatoric if name == "entropy" else 0.0) for p in (inside, outside)]
        found[f"auroc_{name}{suffix}"] = auroc(np.concatenate(scores), strange)
    return found


def _state_file(rows_file: Path, done: int) -> Path:
    return rows_file.with_suffix(f".task{done}.npz")
