"""Gradient steps of convolutional networks inside a compiled loop and outside it, with ``lax``'s convolution and with ours.

    uv run python benchmarks/convolutions.py [--repeats 3]

A step is the gradient of the cross-entropy of 128 images of 32 x 32 x 3 in all weights; a loop makes four of them. CPU
seconds a step, medians over the repeats, which alternate between the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conditions import machine
from csv_files import write_csv
from jax import lax

from ssm_nn.models import image_networks, networks

OUT = Path(__file__).parent / "results" / "convolutions.csv"
NETWORKS = {"cnn": networks.cnn, "lenet": image_networks.lenet}
STEPS, BATCH = 4, 128
OURS, LAX = "ours", "lax"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description="Gradient steps of convolutional networks, in loops and outside.")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    repeats = parser.parse_args().repeats
    rows = []
    for name, make in NETWORKS.items():
        apply, params = make((32, 32, 3), num_outputs=10)
        made = {kind: _steps(kind, apply, params) for kind in (LAX, OURS)}
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(repeats):
            for kind, ways in made.items():
                for way, (function, steps) in ways.items():
                    seconds.setdefault((kind, way), []).append(_cpu_seconds(function) / steps)
        for way in next(iter(made.values())):
            lax_seconds, own = (statistics.median(seconds[kind, way]) for kind in (LAX, OURS))
            rows.append({"network": name, "where": way, LAX: lax_seconds, OURS: own, "lax / ours": lax_seconds / own})
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()), flush=True)
    write_csv(OUT, [row | {"machine": machine()} for row in rows])


def _steps(kind: str, apply: Any, params: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """Compiled: where -> (function, steps that it makes)."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((STEPS, BATCH, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, (STEPS, BATCH)))

    def loss(params: Any, x: Any, y: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)), y[:, None], 1))

    def step(params: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params, *batch)), None

    def loop(params: Any, images: Any, labels: Any) -> Any:
        return lax.scan(step, params, (images, labels))[0]

    ours = networks.conv_general_dilated
    if kind == LAX:  # all networks look it up there when they are traced
        networks.conv_general_dilated = lax.conv_general_dilated
    try:
        alone = jax.jit(lambda *a: step(*a)[0]).lower(params, (images[0], labels[0])).compile()
        looped = jax.jit(loop).lower(params, images, labels).compile()
    finally:
        networks.conv_general_dilated = ours
    return {
        "alone": (partial(alone, params, (images[0], labels[0])), 1),
        "in a loop": (partial(looped, params, images, labels), STEPS),
    }


def _cpu_seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - began


if __name__ == "__main__":
    main()
