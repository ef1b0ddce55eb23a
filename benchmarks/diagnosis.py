"""Weights integrated out against NUTS on the full program: CPU time for an effective draw of the kernel's scale.

    uv run python benchmarks/diagnosis.py [--weights 200 400 1000] [--examples 20] [--noise 0.3] [--draws 2000] ...

linear: y ~ N(x . theta_t, noise^2), theta_t ~ N(theta_{t-1}, scale^2), the scale unknown. network: 1-H-1 with 3 H + 1 weights,
its output layer walking, on readings of a curve whose height drifts. The full program is sampled by its innovations (full),
which is its better form where a task says little, or as it is written (centred). The belief is dense, so that linear programs
have one posterior by all. Effective draws are of log scale; compilation has a column of its own. Run with
``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false``, CPU seconds can be compared beside other jobs. Rows go to
``<out>/marginalize.csv``; a run that was stopped goes on.
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
from drifting_curve import visits_of
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS
from rich.console import Console
from rich.table import Table

import ssm_nn
from ssm_nn.inference import Dense, LaplaceFilter
from ssm_nn.inference.diagnosis import marginalize
from ssm_nn.models import RandomWalk, Static
from ssm_nn.models.networks import mlp

OUT = Path(__file__).parent / "results" / "diagnosis"
SCALE = 0.1
METHODS = ("marginalized", "full", "centred")
SETTINGS = ("program", "weights", "tasks", "examples", "noise", "draws")


def program_of(kind: str, num_weights: int, noise: float) -> tuple[Callable[..., None], list[str]]:
    """The program with so many weights, and the sites that walk; the prior keeps the outputs of order one."""
    if kind == "linear":
        network: Any = (lambda params, x: x @ params, jnp.zeros(num_weights))
        still, walking = {}, ["net.weight"]
    else:
        shaped = mlp((1, hidden_units(num_weights), 1), "tanh", seed=0)
        network, still, walking = shaped, {"layers.0.*": Static()}, ["net.layers.1.kernel", "net.layers.1.bias"]

    def program(tasks: Any) -> None:
        scale = numpyro.sample("scale", dist.LogNormal(jnp.log(SCALE), 1.0))
        kernel = ssm_nn.ByPath(still, otherwise=RandomWalk(scale)) if still else RandomWalk(scale)
        net = ssm_nn.weights("net", network, prior=dist.Normal(0.0, 1.0), transition=kernel, num_tasks=len(tasks))

        def observe(f: Any, task: Any) -> None:
            with numpyro.plate("examples", task["x"].shape[0]):
                outputs = f(task["x"])
                numpyro.sample("y", dist.Normal(outputs if kind == "linear" else outputs[:, 0], noise), obs=task["y"])

        net.over(tasks, observe)

    return program, walking


def hidden_units(num_weights: int) -> int:
    """H of a 1-H-1 network; the number of weights must be 3 H + 1."""
    if num_weights % 3 != 1:
        raise ValueError(f"weights is {num_weights}; the network 1-H-1 has 3 H + 1")
    return num_weights // 3


def tasks_of(kind: str, num_weights: int, num_tasks: int, examples: int, noise: float, seed: int = 0) -> Any:
    """Tasks drawn from the linear program at the scale 0.1, or readings of the curve."""
    if kind == "network":
        return ssm_nn.stack_tasks(visits_of(seed, num_tasks, examples, 0)[0])
    rng = np.random.default_rng(seed)
    theta, tasks = rng.normal(size=num_weights), []
    for _ in range(num_tasks):
        x = rng.normal(size=(examples, num_weights)) / np.sqrt(num_weights)
        y = x @ theta + noise * rng.normal(size=examples)
        tasks.append({"x": x.astype("float32"), "y": y.astype("float32")})
        theta = theta + SCALE * rng.normal(size=num_weights)
    return ssm_nn.stack_tasks(tasks)


def model_of(method: str, num_weights: int, parsed: argparse.Namespace) -> Callable[..., None]:
    """The model that NUTS samples."""
    program, walking = program_of(parsed.program, num_weights, parsed.noise)
    if method == "centred":
        return program
    if method == "full":
        return numpyro.handlers.reparam(program, config={name: ssm_nn.InnovationReparam() for name in walking})
    return marginalize(program, LaplaceFilter(program, Dense(), hypers={"scale": SCALE}))


def measured(method: str, num_weights: int, parsed: argparse.Namespace) -> dict[str, Any]:
    """One row: compilation, then warm-up, then draws, of which only these are in the seconds of an effective draw.

    Transitions are those of NumPyro's MCMC, called one by one: ``MCMC.run`` compiles anew in every call, which for a program
    as quick as these takes longer than its draws.
    """
    tasks = tasks_of(parsed.program, num_weights, parsed.tasks, parsed.examples, parsed.noise)
    kernel = NUTS(model_of(method, num_weights, parsed))
    began = time.process_time()
    state = kernel.init(jax.random.key(0), parsed.warmup, None, (tasks,), {})

    @jax.jit
    def transition(state: Any) -> tuple[Any, dict[str, Any]]:
        """The next state, and all sites of the draw, as MCMC stores them."""
        state = kernel.sample(state, (tasks,), {})
        return state, kernel.postprocess_fn((tasks,), {})(state.z)

    state = jax.block_until_ready(
        transition(transition(state)[0])[0]
    )  # the second call's types are those of all others
    compiled = time.process_time() - began
    for _ in range(parsed.warmup - 2):
        state, _ = transition(state)
    jax.block_until_ready(state)
    began = time.process_time()
    draws, steps = [], []
    for _ in range(parsed.draws):
        state, sites = transition(state)
        draws.append(sites["scale"])
        steps.append(state.num_steps)
    jax.block_until_ready(state)
    seconds = time.process_time() - began
    both = np.log(np.asarray(jnp.stack(draws), np.float64))
    ess = float(effective_sample_size(both[None]))
    return {
        "program": parsed.program,
        "weights": num_weights,
        "tasks": parsed.tasks,
        "examples": parsed.examples,
        "noise": parsed.noise,
        "method": method,
        "draws": parsed.draws,
        "cpu_seconds": seconds,
        "cpu_seconds_compiling": compiled,
        "ess": ess,
        "cpu_seconds_per_effective": seconds / ess,
        "steps_per_draw": float(np.mean(steps)),
        "mean": both.mean(),
        "sd": both.std(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(description="Weights integrated out against NUTS on the full program.")
    parser.add_argument("--program", choices=("linear", "network"), default="linear")
    parser.add_argument("--weights", type=int, nargs="+", default=[200, 400, 1000])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of the likelihood")
    parser.add_argument("--methods", nargs="+", default=["marginalized", "full"], choices=METHODS)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200, help="2 at least")
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "marginalize.csv"
    rows = read_csv(file)
    for num_weights in parsed.weights:
        for method in parsed.methods:
            settings = {name: getattr(parsed, name) for name in SETTINGS} | {"weights": num_weights, "method": method}
            if any(all(row[name] == str(value) for name, value in settings.items()) for row in rows):
                continue
            rows += as_text([measured(method, num_weights, parsed)])
            write_csv(file, rows)
    Console().print(shown(rows))


def shown(rows: list[dict[str, str]]) -> Table:
    """A line a setting and method; ratio: its seconds for an effective draw over those with weights integrated out."""
    table = Table(*SETTINGS[:-1], "method", "seconds an effective draw", "ratio", "steps", "effective", "compiling")
    table.add_column("log scale")
    table.title = "CPU seconds for an effective draw"
    by_setting: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        by_setting.setdefault(tuple(row[name] for name in SETTINGS), {})[row["method"]] = row
    for setting, methods in by_setting.items():
        for method, row in methods.items():
            each = float(row["cpu_seconds_per_effective"])
            base = methods.get("marginalized")
            ratio = "" if base is None else f"{each / float(base['cpu_seconds_per_effective']):.3g}"
            numbers = [f"{float(row[name]):.3g}" for name in ("steps_per_draw", "ess", "cpu_seconds_compiling")]
            moments = f"{float(row['mean']):.2f} ± {float(row['sd']):.2f}"
            name = "integrated out" if method == "marginalized" else method
            table.add_row(*setting[:-1], name, f"{each:.3g}", ratio, *numbers, moments)
    return table


if __name__ == "__main__":
    main()
