"""The cells of a sweep: a run's folder each, named by its settings, finished by processes of their own.

<sweep>/cells/<hash of the settings>/     a folder as ``ssm-nn run`` makes it

A cell that was begun goes on after its last finished task, one that is finished is not run again. Joblib deals the cells
out: within ``joblib.parallel_config(backend="dask")`` to a cluster that shares the folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssm_nn.command_folder import RunFolder
from ssm_nn.command_settings import CommandError, Settings

__all__ = ["begin_cells", "cells_of", "finish_cells", "is_finished"]


class _Processes:
    """Those of this process's cells, so that a stop reaches them, and no more are begun."""

    def __init__(self):
        self._lock, self._running, self._stopped = threading.Lock(), set[subprocess.Popen[str]](), False

    @contextmanager
    def begun(self, command: list[str]) -> Iterator[subprocess.Popen[str] | None]:
        """A process with its errors as text; None after a stop."""
        with self._lock:
            process = None
            if not self._stopped:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                self._running.add(process)
        try:
            yield process
        finally:
            # one cell at a time is waited for in the main thread, where a stop arrives before the process has ended
            if process is not None and process.poll() is not None:
                self._running.discard(process)

    @contextmanager
    def stopped_with_this(self) -> Iterator[None]:
        """By Ctrl-C they are stopped as this process is, by SIGTERM they would go on."""
        self._stopped = False
        try:
            yield
        except KeyboardInterrupt:
            with self._lock:
                self._stopped, running = True, list(self._running)
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise


_processes = _Processes()


def cells_of(sweep: Path) -> list[RunFolder]:
    """All cells that lie in a sweep's folder."""
    return [RunFolder(file.parent) for file in sorted(sweep.glob("cells/*/settings.json"))]


def is_finished(cell: RunFolder) -> bool:
    """Whether its report, which is made last, is there."""
    return cell.report_file.exists()


def begin_cells(sweep: Path, settings: Iterable[Settings]) -> list[RunFolder]:
    """A folder for each of the settings; those that are there already are left as they are."""
    found = []
    for one in settings:
        digest = hashlib.sha256(json.dumps(one.to_json(), sort_keys=True).encode()).hexdigest()
        cell = RunFolder(sweep / "cells" / digest[:16])
        if not cell.settings_file.exists():
            with cell.claimed():
                cell.begin(one)
        found.append(cell)
    return found


def finish_cells(
    cells: Sequence[RunFolder], jobs: int, done: Callable[[RunFolder], None] = lambda cell: None
) -> dict[Path, str]:
    """Run what is not finished, ``jobs`` cells at a time.

    Args:
        cells: of ``begin_cells``.
        jobs: processes at a time, on this machine.
        done: called with each cell that ends, well or not.

    Returns:
        The last line that each cell said which failed, by its folder; the others are run nevertheless.
    """
    from joblib import Parallel, delayed

    failed, by_path = {}, {cell.path: cell for cell in cells}
    open_ = [cell.path for cell in cells if not is_finished(cell)]
    parallel = Parallel(n_jobs=jobs, prefer="threads", return_as="generator_unordered")
    with _processes.stopped_with_this():
        ends: Any = parallel(delayed(_finish)(path) for path in open_)
        for path, said in ends:
            if said is not None:
                failed[path] = said
            done(by_path[path])
    return failed


def _finish(path: Path) -> tuple[Path, str | None]:
    """A process of its own: it takes its memory with it, and what kills it does not kill the sweep."""
    command = [sys.executable, "-m", "ssm_nn", "resume", str(path), "--quiet"]
    with _processes.begun(command) as process:
        if process is None:
            return path, "stopped"
        _, said = process.communicate()
    if process.returncode == 0:
        return path, None
    lines = said.strip().splitlines()
    return path, lines[-1] if lines else f"ended with code {process.returncode}"


def combinations(names: Sequence[str], settings: Sequence[Settings]) -> list[tuple[str, ...]]:
    """What each of the settings has under the names, as text."""
    return [tuple(_text(getattr(one, name)) for name in names) for one in settings]


def varied(settings: Sequence[Settings]) -> list[str]:
    """The names under which not all settings are alike, in their own order."""
    rows = [one.to_json() for one in settings]
    return [name for name in rows[0] if any(row[name] != rows[0][name] for row in rows)] if rows else []


def _text(value: object) -> str:
    if value is None:
        return "–"
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def check_folder(sweep: Path) -> None:
    """Raise CommandError where the path holds anything but a sweep."""
    if sweep.exists() and not sweep.is_dir():
        raise CommandError(f"{sweep} is not a folder; a sweep's folder, new or begun, is accepted.")
    if sweep.is_dir() and any(sweep.iterdir()) and not (sweep / "cells").is_dir():
        raise CommandError(f"{sweep} holds something else than a sweep; a new folder is accepted.")
