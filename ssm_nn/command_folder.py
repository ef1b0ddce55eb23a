"""A run's folder: where everything lies, and how it gets there whole.

settings.json                         options and versions
metrics.csv, kernels.csv              long tables, after each seed
posterior.nc                          the first seed's smoothed posterior
report.html
results/seed-0/<method>.json, .npz    finished methods; a .json is written last, and marks the method as done
checkpoints/seed-0/<kernel>/*.npz     beliefs after each task, while a later step still needs them
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssm_nn.command_settings import CommandError, Settings, device, read_settings, versions
from ssm_nn.inference.checkpoints import replacing

__all__ = ["METRIC_COLUMNS", "TASK_COLUMNS", "RunFolder"]

METRIC_COLUMNS = ("seed", "method", "kernel", "view", "learnt", "task", "metric", "value")
TASK_COLUMNS = (
    "seed",
    "kernel",
    "task",
    "log_evidence",
    "log_likelihood",
    "gradient_norm",
    "dropped_share",
    "steps",
    "status",
    "seconds",
)


class RunFolder:
    """The folder ``path`` of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file = path / "settings.json"
        self.metrics_file = path / "metrics.csv"
        self.kernels_file = path / "kernels.csv"
        self.posterior_file = path / "posterior.nc"
        self.report_file = path / "report.html"

    def begin(self, settings: Settings) -> None:
        """Write the settings into the folder; an error where a run, or anything else, lies there already."""
        for leftover in self.path.glob(f".{self.settings_file.name}.*.tmp"):  # of a process killed at this very place
            leftover.unlink(missing_ok=True)
        if any(self.path.iterdir()):
            what = "holds a run already" if self.settings_file.exists() else "is not an empty folder"
            raise CommandError(f"{self.path} {what}; give --out a new folder, or use `ssm-nn resume {self.path}`.")
        content = {"settings": settings.to_json(), "versions": versions() | device()}
        self.write_text(self.settings_file, json.dumps(content, indent=2) + "\n")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder for this process alone, and made where it is missing; released with the process, however it ends.

        Raises:
            CommandError: where it is no folder, or another process works in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CommandError(f"{self.path} is not an empty folder; give --out a new folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(
                    f"{self.path} is in use by another ssm-nn; wait until it ends, or stop it."
                ) from None
            except OSError as error:
                # some network file systems have no locks: there a second process is not noticed
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            yield
        finally:
            os.close(handle)

    def open(self) -> tuple[Settings, dict[str, str]]:
        """Settings and versions of the run that lies here."""
        return read_settings(self.settings_file)

    def sweep(self) -> None:
        """Remove what a killed process had not finished writing."""
        for file in self.path.rglob(".*.tmp"):
            file.unlink(missing_ok=True)

    def checkpoint(self, seed: int, method: str, task: int) -> Path:
        """File of the state after ``task``."""
        return self.checkpoints(seed) / method / f"task-{task:03d}.npz"

    def checkpoints(self, seed: int) -> Path:
        """Folder of a seed's checkpoints."""
        return self.path / "checkpoints" / f"seed-{seed}"

    def drop_checkpoints(self, seed: int, method: str | None = None) -> None:
        """Remove the checkpoints of a method, or of a seed."""
        folder = self.checkpoints(seed)
        shutil.rmtree(folder if method is None else folder / method, ignore_errors=True)
        if method is None and folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def _result(self, seed: int, method: str, ending: str) -> Path:
        return self.path / "results" / f"seed-{seed}" / f"{method}{ending}"

    def write_result(self, seed: int, method: str, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """What a finished method leaves: its rows, and arrays for the report; with checksums of both."""
        digest = ""
        if arrays:
            packed = io.BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **arrays)
            digest = hashlib.sha256(packed.getbuffer()).hexdigest()
            with replacing(self._result(seed, method, ".npz")) as stream:
                stream.write(packed.getbuffer())
        content = {"sha256": _digest(result, digest), "arrays": digest, "result": result}
        self.write_text(self._result(seed, method, ".json"), json.dumps(content))

    def read_result(self, seed: int, method: str) -> dict[str, Any] | None:
        """The result of a method, None where it is not finished."""
        file = self._result(seed, method, ".json")
        return self._checked(file)[0] if file.exists() else None

    def read_arrays(self, seed: int, method: str) -> dict[str, np.ndarray]:
        """The arrays of a finished method."""
        note, file = self._result(seed, method, ".json"), self._result(seed, method, ".npz")
        digest = self._checked(note)[1]
        try:
            packed = file.read_bytes()
        except OSError as error:
            raise CommandError(_damaged(file, note, error.strerror)) from None
        if hashlib.sha256(packed).hexdigest() != digest:
            raise CommandError(_damaged(file, note, "its sha256 is another"))
        with np.load(io.BytesIO(packed), allow_pickle=False) as content:
            return dict(content)

    def _checked(self, file: Path) -> tuple[dict[str, Any], str]:
        """A result and the checksum of its arrays."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            result, digest, expected = content["result"], content["arrays"], content["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CommandError(_damaged(file, file, f"{type(error).__name__}: {error}")) from None
        if _digest(result, digest) != expected:
            raise CommandError(_damaged(file, file, "its sha256 is another"))
        return result, digest

    def write_table(self, path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A CSV file; floats in the shortest form that reads back to the same bits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        self.write_text(path, text.getvalue())

    def read_table(self, path: Path) -> list[dict[str, str]]:
        """The rows of a CSV file by column."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        except FileNotFoundError:
            raise CommandError(
                f"{self.path} has no finished seed yet; go on with `ssm-nn resume {self.path}`."
            ) from None

    def write_text(self, path: Path, text: str) -> None:
        """A text file, whole or not at all."""
        with replacing(path) as file:
            file.write(text.encode())


def _digest(result: Any, arrays: Any) -> str:
    return hashlib.sha256(json.dumps([result, arrays]).encode()).hexdigest()


def _damaged(file: Path, note: Path, reason: str | None) -> str:
    return f"{file} is damaged ({reason}); remove {note}, and resume computes it again."
