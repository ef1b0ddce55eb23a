"""What an update of a head costs in CPU seconds, beside the Newton refit and full retraining: one run, one process.

    OPENBLAS_NUM_THREADS=1 uv run python benchmarks/last_layer_cost.py [--repeats 5] [--out benchmarks/results/last_layer]

K = 10, D = 257: float64 updates of 10 points after 1,000, float32 and float64 fits of 10,000 points, 10,000 probit predictions;
K D = 29,568: an update of 10 points after 1,000 and the process's peak memory. Random features, labels of a random linear rule.
Retraining 100 epochs on 1,010 examples: a small network whole, ResNet-18 on images of 32 x 32 x 3 reckoned from single steps.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import last_layer_torch
import numpy as np
import optax
from csv_files import write_csv

from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.models.image_networks import resnet18
from ssm_nn.models.networks import mlp

RETRAINING_EPOCHS, RETRAINED = 100, 1_010  # of Adam, batches of 32; 784-256-256-10, and ResNet-18
BATCH = 32


def problem(num: int, classes: int, width: int) -> dict[str, np.ndarray]:
    """Points with labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, width))
    logits = x @ rng.normal(size=(width, classes)) / np.sqrt(width) * 2
    return {"x": x, "y": (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)}


def part(data: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """Some of the points."""
    return {name: array[start:stop] for name, array in data.items()}


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """CPU seconds of the whole process, compilation left out."""
    jax.block_until_ready(call())
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        jax.block_until_ready(call())
        spent.append(time.process_time() - began)
    return spent


def update_rows(repeats: int) -> list[tuple[Any, ...]]:
    """K = 10, D = 257, in float64."""
    data = problem(10_000, 10, 256)
    engine = LastLayerFilter(feature_head(Categorical(10), 256), Full())
    state, _ = engine.update(engine.init(), part(data, 0, 1_000))
    new, both = part(data, 1_000, 1_010), part(data, 0, 1_010)
    update = seconds(lambda: engine.update(state, new)[0][1:3], repeats)
    refit = seconds(lambda: engine.update(engine.init(), both)[0][1:3], min(repeats, 3))
    predict = seconds(lambda: engine.predict(state, data["x"]).probabilities, min(repeats, 3))
    retrain = seconds(lambda: retrained(), 1)
    with jax.enable_x64(False):
        deep = [RETRAINING_EPOCHS * (RETRAINED // BATCH) * step for step in seconds(resnet_step(), 3)]
    middle = statistics.median(update)
    return [
        ("update of 10 points after 1,000, float64", *spread(update), "0.15"),
        ("Newton refit of 1,010 points, float64", *spread(refit), ""),
        (
            "Newton refit / update",
            statistics.median(refit) / middle,
            min(refit) / max(update),
            max(refit) / min(update),
            "10",
        ),
        ("10,000 probit predictions, float64", *spread(predict), "1"),
        (f"retraining, {RETRAINING_EPOCHS} epochs, float64", *spread(retrain), ""),
        ("retraining / update", retrain[0] / middle, retrain[0] / max(update), retrain[0] / min(update), "1000"),
        (f"retraining ResNet-18, {RETRAINING_EPOCHS} epochs, float32, from 3 steps", *spread(deep), ""),
        (
            "retraining ResNet-18 / update",
            statistics.median(deep) / middle,
            min(deep) / max(update),
            max(deep) / min(update),
            "1000",
        ),
    ]


def fit_row(repeats: int, words: str) -> tuple[Any, ...]:
    """10,000 points at K = 10, D = 257, in the dtype of the context."""
    data = problem(10_000, 10, 256)
    engine = LastLayerFilter(feature_head(Categorical(10), 256), Full())
    return (
        f"fit of 10,000 points, {words}",
        *spread(seconds(lambda: engine.update(engine.init(), data)[0][1:3], repeats)),
        "3",
    )


def torch_rows(repeats: int) -> list[tuple[Any, ...]]:
    """K = 10, D = 65, float64: a fit of 1,010 points with its mode, and laplace-torch's at that mode where it is installed."""
    if last_layer_torch.version() is None:
        return []
    data = problem(1_010, 10, 64)
    engine = LastLayerFilter(feature_head(Categorical(10), 64), Full())
    state, _ = engine.update(engine.init(), part(data, 0, 1_000))
    refitted, _ = engine.update(engine.init(), data)
    weights = engine.weights(refitted)
    theirs = [last_layer_torch.refit(data["x"], data["y"], weights, 1.0, data["x"][:1])[2] for _ in range(repeats + 1)]
    refit = seconds(lambda: engine.update(engine.init(), data)[0][1:3], repeats)
    update = seconds(lambda: engine.update(state, part(data, 1_000, 1_010))[0][1:3], repeats)
    return [
        ("laplace-torch's fit of 1,010 points at their mode, D = 65", *spread(theirs[1:]), ""),
        ("Newton refit of the same with its search for the mode", *spread(refit), ""),
        ("update of 10 points after 1,000 likewise", *spread(update), ""),
    ]


def banking_rows(repeats: int) -> list[tuple[Any, ...]]:
    """K D = 29,568."""
    data = problem(1_010, 77, 384)
    engine = LastLayerFilter(feature_head(Categorical(77), 384, intercept=False))
    state, _ = engine.update(engine.init(), part(data, 0, 1_000))
    update = seconds(lambda: engine.update(state, part(data, 1_000, 1_010))[0][1:3], repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        ("update of 10 points, K D = 29,568, float32", *spread(update), "0.1"),
        ("peak memory of the process so far, GiB", peak, peak, peak, "2"),
    ]


def retrained() -> Any:
    """A network of three layers, trained from its start."""
    apply, params = mlp((784, 256, 256, 10), "relu")
    rng = np.random.default_rng(0)
    x, y = jax.numpy.asarray(rng.normal(size=(RETRAINED, 784))), jax.numpy.asarray(rng.integers(0, 10, RETRAINED))
    optimizer = optax.adam(1e-3)

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)

        def step(carry, rows):
            params, state = carry

            def loss(params):
                return optax.softmax_cross_entropy_with_integer_labels(apply(params, x[rows]), y[rows]).mean()

            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    state = optimizer.init(params)
    for number in range(RETRAINING_EPOCHS):
        params, state = epoch(params, state, jax.random.key(number))
    return params


def resnet_step() -> Callable[[], Any]:
    """One step of Adam on one batch of images."""
    apply, params = resnet18((32, 32, 3), 10)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 32, 32, 3)).astype("float32"), rng.integers(0, 10, BATCH)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

        change, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    return lambda: step(params, state)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, minimum, maximum."""
    return statistics.median(values), min(values), max(values)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What an update of a head costs.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "last_layer")
    arguments = parser.parse_args()
    rows = banking_rows(arguments.repeats)  # first: its memory is to be seen alone
    rows.append(fit_row(min(arguments.repeats, 3), "float32"))
    with jax.enable_x64(True):
        rows += update_rows(arguments.repeats)
        rows.append(fit_row(min(arguments.repeats, 3), "float64"))
        rows += torch_rows(arguments.repeats)
    arguments.out.mkdir(parents=True, exist_ok=True)
    columns = ("measure", "median", "minimum", "maximum", "aim")
    write_csv(arguments.out / "cost.csv", (dict(zip(columns, row, strict=True)) for row in rows))
    for name, median, low, high, aim in rows:
        print(f"{name:<60} {median:10.4f}  [{low:.4f}, {high:.4f}]  aim {aim or '-'}")


if __name__ == "__main__":
    main()
