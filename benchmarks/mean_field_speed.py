"""Examples a second, side by side in one process: outputs drawn, weights drawn, plain SGD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from csv_files import write_csv
from mean_field_permuted import RULES
from mean_field_programs import classifier, images, network

from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.gradients import Estimator, LocalReparameterisation, WeightSampling
from ssm_nn.inference.mean_field.streams import Batches

HIDDEN, DRAWS = 50, 10


def measure(out: Path, repeats: int = 5) -> list[dict]:
    """Median, least and most of ``repeats`` rounds; in each round every method has its turn."""
    x, y, _, _ = images("mnist")
    jobs: dict[str, tuple[int, Callable[[], object]]] = {}

    def learner(rule: str, estimator: Estimator, batch: int, count: int) -> Callable[[], object]:
        engine = MeanFieldFilter(classifier(network(HIDDEN)), Window(3e5), rule=RULES[rule], estimator=estimator)
        batches = Batches({"x": x[:count], "y": y[:count]}, batch)
        state = engine.init(0, batches.task)
        return lambda: engine.run(state, batches)[0].mean

    for rule in RULES:
        jobs[f"outputs drawn, {rule}, batch 1"] = 8192, learner(rule, LocalReparameterisation(DRAWS), 1, 8192)
    jobs["weights drawn, first-order, batch 1"] = 256, learner("first-order", WeightSampling(DRAWS), 1, 256)
    jobs["outputs drawn, fixed-point, batch 32"] = (
        32768,
        learner("fixed-point", LocalReparameterisation(DRAWS), 32, 32768),
    )
    jobs["weights drawn, fixed-point, batch 32"] = 2048, learner("fixed-point", WeightSampling(DRAWS), 32, 2048)
    for batch in (1, 32):
        jobs[f"SGD, one pass an example, batch {batch}"] = 32768, sgd(x[:32768], y[:32768], batch, 1)
        jobs[f"SGD, {DRAWS} passes an example, batch {batch}"] = 8192, sgd(x[:8192], y[:8192], batch, DRAWS)
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, (count, job) in jobs.items():
            began = time.perf_counter()
            jax.block_until_ready(job())
            if number:  # the first round compiles
                speeds[name].append(count / (time.perf_counter() - began))
    ratios = {
        "outputs drawn / weights drawn, batch 1": _ratios(
            speeds["outputs drawn, first-order, batch 1"], speeds["weights drawn, first-order, batch 1"]
        ),
        "seconds an example over SGD's at one pass, batch 32": _ratios(
            speeds["SGD, one pass an example, batch 32"], speeds["outputs drawn, fixed-point, batch 32"]
        ),
        f"seconds an example over SGD's at {DRAWS} passes, batch 32": _ratios(
            speeds[f"SGD, {DRAWS} passes an example, batch 32"], speeds["outputs drawn, fixed-point, batch 32"]
        ),
    }
    rows = [
        {"measure": name, "median": statistics.median(v), "minimum": min(v), "maximum": max(v)}
        for name, v in [*((f"{n}: examples/s", v) for n, v in speeds.items()), *ratios.items()]
    ]
    for row in rows:
        print(f"{row['measure']:<62} {row['median']:10.1f}  [{row['minimum']:.1f}, {row['maximum']:.1f}]")
    write_csv(out / "speed.csv", rows)
    return rows


def sgd(x, y, batch: int, passes: int) -> Callable[[], object]:
    """Plain SGD on the same network, the data gathered in the same way; every example goes ``passes`` times forward and
    backward a step, as many as a mean field has draws."""
    apply, params = network(HIDDEN)
    params = jax.tree.map(lambda leaf: 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    x, y = jnp.asarray(x), jnp.asarray(y)
    order = jnp.arange(len(x)).reshape(-1, batch)

    @jax.jit
    def train(params, x, y):
        def step(params, rows):
            inputs = jnp.repeat(x[rows], passes, axis=0)
            labels = jnp.repeat(y[rows], passes)

            def loss(params):
                return optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), labels).mean()

            return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params)), None

        return jax.lax.scan(step, params, order)[0]

    return lambda: train(params, x, y)


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]
