"""A cell: one strategy on one data set at one seed. Finished cells are read, begun ones go on after their last whole batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from active_learning_settings import VALIDATION_SEED, Bench, Method, Setting, bench_of

from ssm_nn.inference.checkpoints import CheckpointError, replacing
from ssm_nn.inference.last_layer.acquisition_curves import LearningCurve
from ssm_nn.inference.last_layer.active_learner import ActiveLearner
from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter

Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Store:
    """The folder of cells; each is a file named by the hash of its settings."""

    folder: Path

    def path(self, settings: dict[str, Any], suffix: str = ".json") -> Path:
        """Where a cell lies."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{settings['method']}-{settings['seed']}-{digest}{suffix}"
        return self.folder / settings["setting"]["name"] / name

    def read(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """A cell's content, or None."""
        path = self.path(settings)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, settings: dict[str, Any], content: dict[str, Any]) -> None:
        """Whole or not at all."""
        with replacing(self.path(settings)) as file:
            file.write(json.dumps({"settings": settings, **content}).encode())

    def finished(self, setting: Setting) -> Iterator[dict[str, Any]]:
        """Cells of the present settings that were reported on."""
        wanted = json.loads(json.dumps(setting.described()))
        for path in sorted((self.folder / setting.name).glob("*.json")):
            content = json.loads(path.read_text())
            if content["settings"]["setting"] == wanted and "scores" in content:
                yield content


def settings_of(setting: Setting, method: Method | str, seed: int) -> dict[str, Any]:
    """All that a result depends on, but for the code."""
    name, words = (method, "") if isinstance(method, str) else (method.name, f"{method.strategy!r} {method.candidates}")
    return {"setting": setting.described(), "method": name, "strategy": words, "seed": seed}


def engine_of(setting: Setting, bench: Bench, variance: float) -> LastLayerFilter:
    """A head whose outputs have a prior variance, at a point of mean length, of ``variance``, and as much for the bias."""
    head = feature_head(Categorical(setting.num_classes), bench.x.shape[1], prior_precision=1 / variance)
    return LastLayerFilter(head, setting.structure)


def prior_variance(store: Store, setting: Setting) -> float:
    """The one of ``setting.variances`` with the largest evidence of randomly chosen labels, on a pool of its own."""
    settings = settings_of(setting, "prior", VALIDATION_SEED)
    known = store.read(settings)
    if known is None:
        bench = bench_of(setting, VALIDATION_SEED)
        count = setting.start + setting.batch_size * setting.num_batches // 2
        evidences = []
        for variance in setting.variances:
            engine = engine_of(setting, bench, variance)
            state, _ = engine.update(engine.init(), {"x": bench.x[:count], "y": bench.y[:count]})
            evidences.append(engine.sweep(state)[1].log_evidence)
        known = {"variance": setting.variances[int(np.argmax(evidences))], "evidences": evidences}
        store.write(settings, known)
    return known["variance"]


def run_cell(store: Store, setting: Setting, method: Method, seed: int, report: Report) -> LearningCurve:
    """The cell's curve, from its file if it is finished."""
    settings = settings_of(setting, method, seed)
    known = store.read(settings)
    if known is None:
        bench = bench_of(setting, seed)
        engine = engine_of(setting, bench, prior_variance(store, setting))
        first = {"x": bench.x[: setting.start], "y": bench.y[: setting.start]}
        start, _ = engine.update(engine.init(), first)
        learner = ActiveLearner(
            engine,
            method.strategy,
            bench.x[setting.start :],
            batch_size=setting.batch_size,
            start=start,
            candidates=method.candidates,
            seed=seed,
        )
        begun = store.path(settings, ".npz")
        labels, test = bench.y[setting.start :], {"x": bench.test_x, "y": bench.test_y}
        run = partial(learner.run, labels.__getitem__, setting.num_batches, test, path=begun, progress=report)
        try:
            _, curve = run()
        except CheckpointError:  # begun with other code, or features rounded otherwise
            begun.unlink()
            _, curve = run()
        store.write(settings, _content(curve))
        begun.unlink(missing_ok=True)
        return curve
    return curve_of(known)


def _content(curve: LearningCurve) -> dict[str, Any]:
    return {
        "num_labelled": curve.num_labelled.tolist(),
        "scores": {name: values.tolist() for name, values in curve.scores.items()},
        "seconds": curve.seconds.tolist(),
        "chosen": curve.chosen.tolist(),
    }


def curve_of(cell: dict[str, Any]) -> LearningCurve:
    """As it was when the cell was run."""
    scores = {name: np.array(values) for name, values in cell["scores"].items()}
    return LearningCurve(np.array(cell["num_labelled"]), scores, np.array(cell["seconds"]), np.array(cell["chosen"]))
