"""Tables of results as CSV files, whole or not at all."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssm_nn.inference.checkpoints import replacing

__all__ = ["as_text", "read_csv", "write_csv"]


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line for each row; a column of any row is one of the table, empty where a row lacks it or holds nan.

    Args:
        path: the file, replaced as a whole.
        rows: name -> value; numbers are written in full. Without rows the file is empty.
    """
    listed = list(rows)
    names = list(dict.fromkeys(name for row in listed for name in row))
    text = io.StringIO()
    if names:
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if _is_nan(value) else value for name, value in row.items()} for row in listed)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_text(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """New rows in the form in which ``read_csv`` gives the old ones."""
    return [{name: str(value) for name, value in row.items()} for row in rows]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
