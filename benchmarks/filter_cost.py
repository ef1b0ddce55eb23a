"""What a filter step costs beside plain training: time, memory, import.

    uv run python benchmarks/filter_cost.py [--quick] [--repeats 5] [--out benchmarks/results]

784-100-100-10 (relu), MNIST's 60,000 examples, 5 epochs of Adam, rank 20, curvature from 10,000 examples. Plain training and
filter step alternate in one process; each figure is a ratio within one pair, reported as median, minimum and maximum. The
network, optimiser, batch size and number of steps are the same; the filter step includes everything: prior, training, task-wide
likelihood and evidence, curvature, compression, checks.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from conditions import machine
from csv_files import write_csv

import ssm_nn
from ssm_nn.inference import LaplaceFilter, LowRank, Minibatch, SketchedCurvature
from ssm_nn.inference.smoothing import smooth_means
from ssm_nn.models import RandomWalk
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp

RANK, CURVATURE_EXAMPLES, LEARNING_RATE, PRIOR_EVERY = 20, 10_000, 1e-3, 8


def main() -> None:
    """Run every measurement and write the table."""
    arguments = parsed()
    examples, epochs = (6_000, 1) if arguments.quick else (60_000, 5)
    data = load("mnist")
    x = jnp.asarray(data.train_x.reshape(len(data.train_x), -1)[:examples])
    y = jnp.asarray(data.train_y[:examples])
    apply, params = mlp((784, 100, 100, 10), "relu")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    plain = plain_training(apply, params, x, y, epochs, arguments.batch_size)
    engine = the_engine((apply, params), epochs, arguments.batch_size, epochs * -(-examples // arguments.batch_size))
    task = ssm_nn.Task({"x": x, "y": y})

    first, _ = engine.update(engine.init(0, task), task)
    state, info = engine.update(first, task)  # a second task, so that the prior has its full rank
    plain()
    plain_seconds, filter_seconds = [], []
    for _ in range(arguments.repeats):
        plain_seconds.append(timed(plain))
        filter_seconds.append(timed(lambda: engine.update(state, task)[0].mean))
    ratios = [f / p for f, p in zip(filter_seconds, plain_seconds, strict=True)]

    filtered = engine.filtered([state] * 10, [info] * 10)
    past = engine.init(0, task)._replace(step=jnp.ones((), jnp.int32))
    after = timed_repeatedly(lambda: aftermath(engine, filtered, past, task), arguments.repeats)
    shares = [a / p for a, p in zip(after, plain_seconds, strict=True)]
    rows = [
        ("plain training, seconds", *spread(plain_seconds)),
        ("filter step, seconds", *spread(filter_seconds)),
        ("filter step / plain training", *spread(ratios)),
        ("predict, smoothed means and read-outs of 10 tasks / one task's plain training", *spread(shares)),
        (
            "import ssm_nn, .models and .inference / import numpyro",
            *spread(import_ratios(arguments.repeats)),
        ),
        *memory_rows(engine, state, task, x, size),
    ]
    report(rows, arguments, examples, epochs, size)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a filter step costs beside plain training.")
    parser.add_argument("--quick", action="store_true", help="6,000 examples and one epoch: checks that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="pairs measured (default 5)")
    parser.add_argument("--batch-size", type=int, default=256, help="of both (default 256)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args()


def plain_training(apply, params, x, y, epochs, batch_size):
    """Epochs of Adam on the cross-entropy, nothing else: one compiled epoch, data on the device."""
    batches = len(x) // batch_size
    optimizer = the_optimizer(epochs * batches)

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(x))[: batches * batch_size].reshape(batches, batch_size)

        def step(carry, rows):
            params, state = carry

            def loss(params):
                return optax.softmax_cross_entropy_with_integer_labels(apply(params, x[rows]), y[rows]).mean()

            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def train():
        weights, state = params, optimizer.init(params)
        for number in range(epochs):
            weights, state = epoch(weights, state, jax.random.key(number))
        return weights

    return train


def the_optimizer(steps: int) -> optax.GradientTransformation:
    """Of both: Adam, its learning rate falling to 0 as a cosine."""
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


def the_engine(network, epochs, batch_size, steps) -> LaplaceFilter:
    """The filter with the same optimiser, epochs and batches."""

    def program(tasks):
        net = ssm_nn.weights(
            "net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.01), num_tasks=len(tasks)
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

    search = Minibatch(the_optimizer(steps), epochs=epochs, batch_size=batch_size, prior_every=PRIOR_EVERY)
    return LaplaceFilter(program, LowRank(RANK), estimator=search, curvature=SketchedCurvature(CURVATURE_EXAMPLES))


def aftermath(engine, filtered, state, task):
    """Ten predictions, ten smoothed means, ten vectors of variances and log-determinants."""
    made = []
    for belief in filtered.beliefs:
        _, predicted, _ = engine._advance(
            engine.hypers, state._replace(mean=belief.mean, precision=belief.precision), task, state.key
        )
        made.append((predicted.mean, read_out(belief.precision)))
    return made, smooth_means(filtered)


@jax.jit
def read_out(precision):
    """Marginal variances and log-determinant."""
    return precision.variance(), precision.logdet()


def timed(function) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def timed_repeatedly(function, repeats: int) -> list[float]:
    """After one call that compiles."""
    function()
    return [timed(function) for _ in range(repeats)]


def import_ratios(repeats: int) -> list[float]:
    """Fresh processes in turn."""
    ours = "import ssm_nn, ssm_nn.models, ssm_nn.inference"

    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    seconds("import numpyro")
    return [seconds(ours) / seconds("import numpyro") for _ in range(repeats)]


def memory_rows(engine, state, task, x, size):
    """What XLA allocates for the two large compiled pieces, against the bound data + 12 P (R + 2) + activations."""
    captured = {}
    condition = engine._condition

    def spy(*inputs):
        captured["inputs"] = inputs
        return condition(*inputs)

    engine._condition = spy
    engine.update(state, task)
    engine._condition = condition
    analysis = condition.lower(*captured["inputs"]).compile().memory_analysis()
    used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    activations = 1024 * (784 + 100 + 100 + 10) * 4 * 2
    bound = x.nbytes + 12 * size * (RANK + 2) * 4 + activations
    mebi = 2**20
    return [
        ("curvature and evidence: memory, MiB", *(used / mebi,) * 3),
        ("bound data + 12 P (R + 2) 4 bytes + activations, MiB", *(bound / mebi,) * 3),
    ]


def spread(values) -> tuple[float, float, float]:
    """Median, minimum, maximum."""
    return statistics.median(values), min(values), max(values)


def report(rows, arguments, examples, epochs, size) -> None:
    """Print the table and write it as CSV with the conditions."""
    conditions = (
        f"{examples} examples, {epochs} epochs, batch {arguments.batch_size}, P = {size}, rank {RANK}, "
        f"{arguments.repeats} pairs; {machine()}"
    )
    print(conditions)
    for name, median, low, high in rows:
        print(f"{name:<82} {median:10.3f}  [{low:.3f}, {high:.3f}]")
    arguments.out.mkdir(parents=True, exist_ok=True)
    columns = ("measure", "median", "minimum", "maximum")
    lines = [dict(zip(columns, row, strict=True)) | {"conditions": conditions} for row in rows]
    write_csv(arguments.out / "filter_cost.csv", lines)


if __name__ == "__main__":
    main()
