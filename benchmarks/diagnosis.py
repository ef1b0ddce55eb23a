"""Weights integrated out against NUTS on the full program: time for an effective draw of the kernel's scale.

    uv run python benchmarks/diagnosis.py [--weights 20 50 100 200] [--tasks 5] [--examples 20] [--draws 200]

One linear program, y ~ N(x . theta_t, 0.3^2), theta_t ~ N(theta_{t-1}, scale^2), its scale unknown; the full program is sampled
by its innovations, which is its better form. The belief is dense, so that both sample one posterior. Effective draws
are of log scale; compilation is left out on both sides. Rows go to ``<out>/marginalize.csv``; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from csv_files import as_text, read_csv, write_csv
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from rich.console import Console
from rich.table import Table

import ssm_nn
from ssm_nn.inference import Dense, LaplaceFilter
from ssm_nn.inference.diagnosis import marginalize
from ssm_nn.models import RandomWalk

OUT = Path(__file__).parent / "results" / "diagnosis"
SCALE, NOISE = 0.1, 0.3


def program_of(num_weights: int) -> Callable[..., None]:
    """The program with so many weights; the prior keeps the outputs of order one."""

    def program(tasks: Any) -> None:
        scale = numpyro.sample("scale", dist.LogNormal(jnp.log(SCALE), 1.0))
        net = ssm_nn.weights(
            "net",
            (lambda params, x: x @ params, jnp.zeros(num_weights)),
            prior=dist.Normal(0.0, 1.0),
            transition=RandomWalk(scale),
            num_tasks=len(tasks),
        )

        def observe(f: Any, task: Any) -> None:
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), NOISE), obs=task["y"])

        net.over(tasks, observe)

    return program


def tasks_of(num_weights: int, num_tasks: int, examples: int, seed: int = 0) -> Any:
    """Tasks drawn from the program at the scale 0.1."""
    rng = np.random.default_rng(seed)
    theta, tasks = rng.normal(size=num_weights), []
    for _ in range(num_tasks):
        x = rng.normal(size=(examples, num_weights)) / np.sqrt(num_weights)
        y = x @ theta + NOISE * rng.normal(size=examples)
        tasks.append({"x": x.astype("float32"), "y": y.astype("float32")})
        theta = theta + SCALE * rng.normal(size=num_weights)
    return ssm_nn.stack_tasks(tasks)


def model_of(method: str, num_weights: int, parsed: argparse.Namespace) -> Callable[..., None]:
    """The model that NUTS samples."""
    program = program_of(num_weights)
    if method == "full":
        return numpyro.handlers.reparam(program, config={"net.weight": ssm_nn.InnovationReparam()})
    return marginalize(program, LaplaceFilter(program, Dense(), hypers={"scale": SCALE}))


def measured(method: str, num_weights: int, parsed: argparse.Namespace) -> dict[str, Any]:
    """One row: warm-up compiles, and the draws are timed."""
    tasks = tasks_of(num_weights, parsed.tasks, parsed.examples)
    mcmc = MCMC(
        NUTS(model_of(method, num_weights, parsed)),
        num_warmup=parsed.warmup,
        num_samples=parsed.draws,
        progress_bar=False,
    )
    mcmc.warmup(jax.random.key(0), tasks)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, tasks)  # compiles the draws
    mcmc.post_warmup_state = mcmc.last_state
    began = time.perf_counter()
    mcmc.run(mcmc.post_warmup_state.rng_key, tasks)
    draws = np.log(np.asarray(mcmc.get_samples()["scale"], np.float64))
    seconds = time.perf_counter() - began
    ess = float(effective_sample_size(draws[None]))
    return {
        "weights": num_weights,
        "tasks": parsed.tasks,
        "examples": parsed.examples,
        "method": method,
        "draws": parsed.draws,
        "seconds": seconds,
        "ess": ess,
        "seconds_per_effective": seconds / ess,
        "mean": draws.mean(),
        "sd": draws.std(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(description="Weights integrated out against NUTS on the full program.")
    parser.add_argument("--weights", type=int, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "marginalize.csv"
    rows = read_csv(file)
    for num_weights in parsed.weights:
        for method in ("marginalized", "full"):
            settings = {"weights": num_weights, "tasks": parsed.tasks, "examples": parsed.examples, "method": method}
            settings["draws"] = parsed.draws
            if any(all(row[name] == str(value) for name, value in settings.items()) for row in rows):
                continue
            rows += as_text([measured(method, num_weights, parsed)])
            write_csv(file, rows)
    Console().print(shown(rows))


def shown(rows: list[dict[str, str]]) -> Table:
    """One line a size: both methods, and their ratio."""
    table = Table(
        "weights", "marginalized, s", "full, s", "ratio", "log scale", "full", title="seconds for an effective draw"
    )
    by_size: dict[int, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_size.setdefault(int(row["weights"]), {})[row["method"]] = row
    for size, methods in sorted(by_size.items()):
        if len(methods) < 2:
            continue
        ours, full = methods["marginalized"], methods["full"]
        each = [float(row["seconds_per_effective"]) for row in (ours, full)]
        moments = [f"{float(row['mean']):.2f} ± {float(row['sd']):.2f}" for row in (ours, full)]
        table.add_row(str(size), f"{each[0]:.3g}", f"{each[1]:.3g}", f"{each[1] / each[0]:.1f}", *moments)
    return table


if __name__ == "__main__":
    main()
