"""What ``kills.py`` kills: an engine on small digits in a folder, which goes on where the folder says; called as a script.

    python benchmarks/kill_cells.py "mean field" FOLDER

It says a line when everything is imported, and leaves ``result.npz``: what is believed at the end, every bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from ssm_nn.inference import Kronecker, LaplaceFilter, LowRank, Minibatch, OnDisk
from ssm_nn.inference.checkpoints import save
from ssm_nn.inference.last_layer import BALD, ActiveLearner, Categorical, Full, LastLayerFilter, feature_head
from ssm_nn.inference.mean_field import Batches, Checkpoint, MeanFieldFilter, Window
from ssm_nn.inference.perturbation import Growth, PerturbationFilter
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import permuted, rotated

__all__ = ["ENGINES"]

SEARCH = Minibatch(optax.adam(5e-3), epochs=10, batch_size=32)


def laplace(structure: Any, folder: Path) -> Any:
    """Eight turned tasks, filtered and smoothed, with the beliefs of both on disk."""
    engine = LaplaceFilter(classification(mlp((64, 20, 10))), structure, hypers={"noise.all": 0.01}, estimator=SEARCH)
    stream = rotated(load("digits"), 8, train_size=64, test_size=10)
    posterior = engine.smooth(engine.run(0, stream.train, history=OnDisk(folder / "history")))
    evidences = [info.log_evidence for info in posterior.filtered.infos]
    return [np.array(evidences), *((belief.mean, belief.precision.variance()) for belief in posterior.beliefs)]


def mean_field(folder: Path) -> Any:
    """4,000 single examples, a checkpoint every 200."""
    stream = permuted(load("digits"), 1, train_size=1000, test_size=10)
    engine = MeanFieldFilter(classification(mlp((64, 20, 10))), Window(2000), hypers={"noise.all": 0.0})
    batches = Batches(stream.train[0], 1, epochs=4, seed=0)
    state, _ = engine.run(0, batches, checkpoint=Checkpoint(folder / "state.npz", 200))
    return state


def last_layer(folder: Path) -> Any:
    """Active learning of 12 batches of 5 labels on the pixels."""
    digits = permuted(load("digits"), 1, train_size=300, test_size=200)
    pool, test = digits.train[0], digits.test[0]
    learner = ActiveLearner(LastLayerFilter(feature_head(Categorical(10), 64), Full()), BALD(), pool["x"], batch_size=5)
    labels = np.asarray(pool["y"])
    state, curve = learner.run(labels.__getitem__, 12, dict(test.data), path=folder / "curve.npz")
    return [state.chosen, state.head.mean, *(np.asarray(score) for _, score in sorted(curve.scores.items()))]


def perturbation(folder: Path) -> Any:
    """Six permuted tasks under a limit of growth."""
    stream = permuted(load("digits"), 6, train_size=320, test_size=10)
    engine = PerturbationFilter(
        multi_head(mlp((64, 20, 12, 10), "relu"), "layers.2.*", prior_scale=0.5),
        minibatch=SEARCH,
        curvature_examples=100,
        growth=Growth(4.0, 6),
    )
    state, _ = engine.run(0, stream.train, folder=folder / "tasks")
    return [engine.weights(state, t) for t in range(6)]


ENGINES: dict[str, Callable[[Path], Any]] = {
    "filter, low rank": lambda folder: laplace(LowRank(8), folder),
    "filter, Kronecker": lambda folder: laplace(Kronecker(), folder),
    "mean field": mean_field,
    "last layer": last_layer,
    "perturbation": perturbation,
}


def main(engine: str, folder: Path) -> None:
    """Go on to the end."""
    print("begins", flush=True)
    save(folder / "result.npz", ENGINES[engine](folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
