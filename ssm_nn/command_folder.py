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
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssm_nn.command_settings import CommandError, Settings, read_settings, versions
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
        """Make the folder and write the settings; an error where a run lies there already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "holds a run already" if self.settings_file.exists() else "is not an empty folder"
            raise CommandError(f"{self.path} {what}; give --out a new folder, or use `ssm-nn resume {self.path}`.")
        try:
            content = {"settings": settings.to_json(), "versions": versions()}
            self.write_text(self.settings_file, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"The folder {self.path} cannot be written: {error.strerror}.") from None

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

    def _result(self, seed: int, method: str) -> Path:
        return self.path / "results" / f"seed-{seed}" / method

    def write_result(self, seed: int, method: str, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """What a finished method leaves: its rows, and arrays for the report."""
        file = self._result(seed, method)
        if arrays:
            with replacing(file.with_name(file.name + ".npz")) as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)
        self.write_text(file.with_name(file.name + ".json"), json.dumps(result))

    def read_result(self, seed: int, method: str) -> dict[str, Any] | None:
        """The result of a method, None where it is not finished."""
        file = self._result(seed, method)
        file = file.with_name(file.name + ".json")
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{file} is damaged ({error}); remove it, and resume computes it again.") from None

    def read_arrays(self, seed: int, method: str) -> dict[str, np.ndarray]:
        """The arrays of a finished method."""
        file = self._result(seed, method)
        file = file.with_name(file.name + ".npz")
        try:
            with np.load(file, allow_pickle=False) as content:
                return dict(content)
        except (OSError, ValueError) as error:
            raise CommandError(f"{file} cannot be read: {error}.") from None

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
