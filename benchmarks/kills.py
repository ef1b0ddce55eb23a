"""Kill runs at random moments, resume them, and compare what comes out with runs that nothing disturbed, byte by byte.

    uv run python benchmarks/kills.py --kills 100

A run of each engine in turn (those of kill_cells.py from Python, and ``ssm-nn run``) gets SIGKILL, SIGTERM or SIGINT after a
random time of work, and again whenever it is resumed, until it ends before the next kill. Results go to
benchmarks/results/kills.csv, one line a kill; ``equal`` is that of the end of its run.
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
from typing import NamedTuple

import typer
from csv_files import write_csv
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "kills.csv"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PYTHON = ("filter, low rank", "filter, Kronecker", "mean field", "last layer", "perturbation")
COMMAND = "ssm-nn run"
SIZE = ["--tasks", "3", "--labels", "12", "--hidden", "3", "--seeds", "1", "--draws", "2", "--noise", "last=0.5"]
MOST = 6  # kills of one run: then it may end
COLUMNS = ("engine", "signal", "after_seconds", "ended_first", "equal", "said")


class Run(NamedTuple):
    """An engine in a folder."""

    engine: str
    folder: Path

    def command(self) -> list[str]:
        """That begins it, or goes on with it."""
        if self.engine != COMMAND:
            return [sys.executable, str(Path(__file__).with_name("kill_cells.py")), self.engine, str(self.folder)]
        begun = (self.folder / "run" / "settings.json").exists()
        place = str(self.folder / "run")
        arguments = ["resume", place] if begun else ["run", "--engine", "diagonal", *SIZE, "--out", place]
        # as its own command, but for the word by which the clock starts
        code = "from ssm_nn.command_line import main; print('begins', flush=True); main()"
        return [sys.executable, "-c", code, *arguments, "--quiet"]

    def result(self) -> bytes:
        """What its end has left."""
        return (self.folder / ("run/metrics.csv" if self.engine == COMMAND else "result.npz")).read_bytes()


def started(run: Run, compiled: Path) -> subprocess.Popen:
    """In a process of its own that has imported everything."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: subprocess.Popen = subprocess.Popen(run.command(), env=environment, **pipes)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(run: Run, compiled: Path) -> float:
    """Seconds of work to the end; an error stops the benchmark."""
    process, began = started(run, compiled), time.perf_counter()
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{run.engine} ended with {process.returncode}: {said}")
    return time.perf_counter() - began


def killed(run: Run, compiled: Path, chosen: signal.Signals, after: float) -> tuple[bool, str]:
    """Whether the run ended before the signal came, and what it said."""
    process = started(run, compiled)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(chosen)
        _, said = process.communicate()
        return False, said
    return True, said


def trial(run: Run, compiled: Path, whole: bytes, seconds: float, dice: random.Random) -> list[list[object]]:
    """One run, killed until it ends; a line for each kill."""
    lines: list[list[object]] = []
    ended = False
    while not ended and len(lines) < MOST:
        chosen, after = dice.choice(SIGNALS), dice.uniform(0, seconds)
        ended, said = killed(run, compiled, chosen, after)
        # Python itself says KeyboardInterrupt in a traceback; the command must not
        loud = "Traceback" in said and (run.engine == COMMAND or chosen is not signal.SIGINT)
        lines.append(
            [run.engine, chosen.name, round(after, 2), ended, "", said.strip().splitlines()[-1] if loud else ""]
        )
    if not ended:
        finish(run, compiled)
    equal = run.result() == whole
    return [[*line[:4], equal, line[5]] for line in lines]


def main(kills: int = 100, seed: int = 0, out: Path = RESULTS) -> None:
    """Kill ``kills`` times or a few times more."""
    dice = random.Random(seed)
    engines = (*PYTHON, COMMAND)
    with tempfile.TemporaryDirectory() as name:
        folder, whole, seconds = Path(name), {}, {}
        compiled = folder / "compiled"
        for number, engine in enumerate(engines):
            for again in ("first", "second"):  # the second finds its programs compiled, as the killed ones do
                run = Run(engine, folder / f"{number}-{again}")
                run.folder.mkdir()
                seconds[engine] = finish(run, compiled)
                if whole.setdefault(engine, run.result()) != run.result():
                    raise SystemExit(f"{engine}: two runs that nothing disturbed differ")
        lines: list[list[object]] = []
        turn = 0
        with Progress() as progress:
            bar = progress.add_task("kills", total=kills)
            while len(lines) < kills:
                engine = engines[turn % len(engines)]
                turn += 1
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    lines += trial(Run(engine, Path(place)), compiled, whole[engine], seconds[engine], dice)
                progress.update(bar, completed=len(lines))
                out.parent.mkdir(exist_ok=True)
                write_csv(out, (dict(zip(COLUMNS, line, strict=True)) for line in lines))
    equal = sum(bool(line[4]) for line in lines)
    loud = sum(bool(line[5]) for line in lines)
    inside = sum(not line[3] for line in lines)
    print(f"{len(lines)} kills, {inside} of them inside a run: {equal} equal results, {loud} tracebacks")
    if equal < len(lines) or loud:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
