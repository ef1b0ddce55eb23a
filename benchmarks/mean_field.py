"""Mean-field learning without task boundaries (MESU): the published stream, width and window, read-out, speed.

    uv run python benchmarks/mean_field.py permuted [--tasks 200] [--hidden 50] [--window 3e5] [--batch 1] [--rule ...]
    uv run python benchmarks/mean_field.py trade [--widths 50 256] [--windows 3e5 1.2e6 inf]
    uv run python benchmarks/mean_field.py hessian
    uv run python benchmarks/mean_field.py speed
    uv run python benchmarks/mean_field.py baselines [--tasks 10] [--seeds 0 1 2]
    uv run --group drift python benchmarks/mean_field.py drift      # without the group, without river's

Results go to ``<out>``; a run that was stopped goes on after its last whole task.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import mean_field_baselines
import mean_field_drift
import mean_field_hessian
import mean_field_permuted as permuted_runs
import mean_field_speed
from csv_files import write_csv
from mean_field_figures import draw_stream, draw_trade

OUT = Path(__file__).parent / "results" / "mean_field"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for."""
    parsed = _parsed(arguments)
    parsed.run(parsed)


def _permuted(parsed: argparse.Namespace) -> None:
    given = {name: getattr(parsed, name) for name in permuted_runs.Setting.__dataclass_fields__}
    setting = permuted_runs.Setting(**given)
    rows = permuted_runs.run(setting, parsed.out)
    title = f"{setting.hidden} units, window {setting.window:g}, batch {setting.batch}"
    published = (setting.hidden, setting.window, setting.batch) == (50, 3e5, 1)
    draw_stream(parsed.out / f"{setting.name}.png", rows, title, published)


def _trade(parsed: argparse.Namespace) -> None:
    """Ten tasks at batch 32, every width with every window; a row a run."""
    table = []
    for seed in parsed.seeds:
        for width in parsed.widths:
            for window in parsed.windows:
                setting = permuted_runs.Setting(
                    hidden=width,
                    window=window,
                    batch=32,
                    rule="fixed-point",
                    tasks=parsed.tasks,
                    examples=parsed.examples,
                    seed=seed,
                )
                rows = permuted_runs.run(setting, parsed.out, all_tasks_at=(parsed.tasks,))
                learnt = sum(row["learnt"] for row in rows) / len(rows)
                table.append({"hidden": width, "window": window, "seed": seed, "learnt_mean": learnt} | rows[-1])
                write_csv(parsed.out / "trade.csv", table)
                draw_trade(parsed.out / "trade.png", table)


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mean-field learning without task boundaries.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    commands = parser.add_subparsers(required=True)
    permuted = commands.add_parser("permuted", help="permuted MNIST, judged after every task")
    for name, field in permuted_runs.Setting.__dataclass_fields__.items():
        choices = list(permuted_runs.RULES) if name == "rule" else None
        kind = type(field.default)
        permuted.add_argument(
            f"--{name}", type=kind, default=field.default, choices=choices, help=f"default {field.default}"
        )
    permuted.set_defaults(run=_permuted)
    trade = commands.add_parser("trade", help="ten tasks at batch 32: window and width")
    trade.add_argument("--widths", type=int, nargs="+", default=[50, 256])
    trade.add_argument("--windows", type=float, nargs="+", default=[3e5, 1.2e6, float("inf")])
    trade.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    trade.add_argument("--tasks", type=int, default=10)
    trade.add_argument("--examples", type=int, default=60_000)
    trade.set_defaults(run=_trade)
    hessian = commands.add_parser("hessian", help="importance against the exact diagonal of the Hessian, on digits")
    hessian.set_defaults(run=lambda parsed: mean_field_hessian.measure(parsed.out))
    speed = commands.add_parser("speed", help="examples a second beside weight sampling and SGD")
    speed.set_defaults(run=lambda parsed: mean_field_speed.measure(parsed.out))
    baselines = commands.add_parser("baselines", help="SGD, Adam, EWC, SI, BGD, IVON and MESU at batch 32, tuned")
    baselines.add_argument("--tasks", type=int, default=10)
    baselines.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    baselines.add_argument("--methods", nargs="+", default=[], choices=list(mean_field_baselines.METHODS))
    baselines.set_defaults(
        run=lambda parsed: mean_field_baselines.measure(parsed.out, parsed.tasks, parsed.seeds, parsed.methods)
    )
    drift = commands.add_parser("drift", help="prequential accuracy on Electricity and weather")
    drift.add_argument("--streams", nargs="+", default=list(mean_field_drift.STREAMS), choices=mean_field_drift.STREAMS)
    drift.add_argument("--seeds", type=int, default=3, help="how many, of the mean fields")
    drift.set_defaults(run=lambda parsed: mean_field_drift.measure(parsed.out, parsed.streams, parsed.seeds))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    warnings.simplefilter("once")
    main()
