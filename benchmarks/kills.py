"""Kill runs at random moments, resume them, and compare what comes out with runs that nothing disturbed, byte by byte.

    uv run python benchmarks/kills.py --kills 100

A run of each engine in turn gets SIGKILL, SIGTERM or SIGINT after a random time, and again after it is resumed if it lives
so long; then it is resumed to its end. Results go to benchmarks/results/kills.csv, one line a kill.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer
from csv_files import write_csv
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "kills.csv"
ENGINES = ("low-rank", "diagonal", "dense")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SIZE = ["--tasks", "3", "--labels", "12", "--hidden", "3", "--seeds", "1", "--draws", "2", "--noise", "last=0.5"]
COLUMNS = ("engine", "signal", "after_seconds", "ended_first", "equal", "said")


def started(*arguments: str) -> subprocess.Popen:
    """``ssm-nn`` in a process of its own, quietly."""
    command = [sys.executable, "-c", "from ssm_nn.command_line import main; main()", *arguments, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*arguments: str) -> None:
    """Run to the end; an error stops the benchmark."""
    process = started(*arguments)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"ssm-nn {' '.join(arguments)} ended with {process.returncode}: {said}")


def killed(chosen: signal.Signals, after: float, *arguments: str) -> tuple[bool, str]:
    """Whether the run ended before the signal came, and what it said."""
    process = started(*arguments)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(chosen)
        _, said = process.communicate()
        return False, said
    return True, said


def trial(engine: str, folder: Path, whole: bytes, seconds: float, dice: random.Random) -> list[list[object]]:
    """One or two kills of one run, then its end; a line for each kill."""
    path = folder / "run"
    lines: list[list[object]] = []
    for _ in range(dice.choice((1, 2))):
        begun = (path / "settings.json").exists()
        arguments = ("resume", str(path)) if begun else ("run", "--engine", engine, *SIZE, "--out", str(path))
        chosen, after = dice.choice(SIGNALS), dice.uniform(0, seconds)
        first, said = killed(chosen, after, *arguments)
        lines.append([engine, chosen.name, round(after, 2), first, "", "" if "Traceback" not in said else "Traceback"])
        if first:
            break
    if (path / "settings.json").exists():
        finish("resume", str(path))
    else:
        finish("run", "--engine", engine, *SIZE, "--out", str(path))
    equal = (path / "metrics.csv").read_bytes() == whole
    return [[*line[:4], equal, line[5]] for line in lines]


def main(kills: int = 100, seed: int = 0) -> None:
    """Kill ``kills`` times or once more."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, whole, seconds = Path(name), {}, {}
        for engine in ENGINES:
            began = time.perf_counter()
            finish("run", "--engine", engine, *SIZE, "--out", str(folder / engine))
            seconds[engine] = time.perf_counter() - began
            whole[engine] = (folder / engine / "metrics.csv").read_bytes()
        lines: list[list[object]] = []
        for number in track(range(kills), "kills"):
            if len(lines) >= kills:
                continue
            engine = ENGINES[number % len(ENGINES)]
            with tempfile.TemporaryDirectory(dir=folder) as place:
                lines += trial(engine, Path(place), whole[engine], seconds[engine], dice)
            RESULTS.parent.mkdir(exist_ok=True)
            write_csv(RESULTS, (dict(zip(COLUMNS, line, strict=True)) for line in lines))
    equal = sum(bool(line[4]) for line in lines)
    loud = sum(bool(line[5]) for line in lines)
    inside = sum(not line[3] for line in lines)
    print(f"{len(lines)} kills, {inside} of them inside a run: {equal} equal results, {loud} tracebacks")
    if equal < len(lines) or loud:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
