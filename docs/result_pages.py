"""Result pages, written from the files under benchmarks/results: no number is typed by hand.

A table shows a CSV file as it is, rounded: ``name`` and ``name_sd`` become one column, columns that are empty or the same in
every row are left out and named below the table.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS = 4
Row = dict[str, str]


class Section(NamedTuple):
    """Files of one kind on a page: a pattern under ``results``, what stands above each table, and which rows are shown."""

    pattern: str
    about: str
    rows: Callable[[Row], bool] = lambda row: True


class Page(NamedTuple):
    """One page; ``commands`` make its files."""

    title: str
    about: str
    commands: tuple[str, ...]
    sections: tuple[Section, ...]


PAGES = {
    "continual": Page(
        "Continual learning",
        "One method, one scenario, one seed is a cell; tables have the mean and the standard deviation over seeds. `average` "
        "is the accuracy of the last belief over all tasks, `learnt` that of each task right after it was learnt, `forgetting` "
        "the mean loss from a task's best accuracy to the last, `before` that on a task before any of its data. `ratio` is "
        "the time of an update to that of fine-tuning. Strengths and learning rates were tuned on another stream.",
        ("uv run python benchmarks/continual.py permuted-mnist-10 --seeds 0 1 2",),
        (Section("continual/*-summary.csv", "`{stem}`"),),
    ),
    "kernels": Page(
        "Choosing the kernel, and what its intervals hold",
        "Images that turn 5 degrees a task, 50 labels each: the walk's variance (over that of the prior) of the first and the "
        "last layer by several criteria, on training labels alone. `evidence_above_` and `nll_below_` count seeds; "
        "`tasks_smoothing_helps_` counts tasks of a stream. Below it, coverage of predictive intervals on a drifting curve.",
        ("uv run python benchmarks/kernel_choice.py digits", "uv run python benchmarks/coverage.py"),
        (
            Section("kernel_choice-summary.csv", "Noise of the layers"),
            Section("coverage-summary.csv", "Coverage"),
        ),
    ),
    "diagnosis": Page(
        "Engines judged by NUTS",
        "A small drifting network by every engine and by NUTS on the same program: k-hat of trajectories and of single "
        "updates, distance of predictions (W2 in NUTS' standard deviations), coverage of 90 % intervals, PSIS-LOO. Below it, "
        "what beliefs without correlations between layers lose, and weights integrated out against NUTS on the full program.",
        (
            "uv run python benchmarks/engines_against_nuts.py",
            "uv run python benchmarks/parts_against_nuts.py",
            "uv run python benchmarks/lost_by_blocks.py",
            "uv run python benchmarks/diagnosis.py",
        ),
        (
            Section("diagnosis/engines-summary.csv", "Engines"),
            Section("diagnosis/parts-summary.csv", "Engines of parts of a network"),
            Section("diagnosis/blocks.csv", "What a belief without correlations between layers loses"),
            Section("diagnosis/marginalize.csv", "CPU seconds for an effective draw of the kernel's scale"),
        ),
    ),
    "mean_field": Page(
        "Mean-field learning without task boundaries",
        "A row is one task of permuted images, learnt batch by batch without being told where a task ends. `learnt` is the "
        "accuracy on the task just learnt, `last_five` and `all` those on the last five and on all tasks so far; the AUROC "
        "tells known images from those of another data set. Below it, width and window over ten tasks, other learners on the "
        "same stream, prequential accuracy on two streams that drift, the curvature read off sigma, and speed.",
        (
            "uv run python benchmarks/mean_field.py permuted",
            "uv run python benchmarks/mean_field.py trade",
            "uv run python benchmarks/mean_field.py baselines",
            "uv run --group drift python benchmarks/mean_field.py drift",
            "uv run python benchmarks/mean_field.py hessian",
            "uv run python benchmarks/mean_field.py speed",
        ),
        (
            Section(
                "mean_field/permuted-*.csv",
                "`{stem}`, tasks at which all others were tested",
                lambda row: bool(row["all"]),
            ),
            Section("mean_field/trade.csv", "Width and window: ten tasks at batch 32"),
            Section("mean_field/baselines.csv", "Other learners on the same stream: ten tasks at batch 32"),
            Section("mean_field/drift-*.csv", "`{stem}`: prequential accuracy"),
            Section("mean_field/speed.csv", "Examples a second, and ratios"),
            Section("mean_field/hessian.csv", "The precision that each weight holds against the exact curvature"),
        ),
    ),
    "last_layer": Page(
        "Last-layer updates",
        "A head is fitted to `base` points, then `new` ones come. Every update is compared with a refit of all points: "
        "`accuracy`, `nll`, and the total variation of its predictions from the refit's.",
        ("uv run python benchmarks/last_layer.py digits-50-10", "uv run python benchmarks/last_layer_cost.py"),
        (
            Section("last_layer/*-summary.csv", "`{stem}`"),
            Section("last_layer/cost.csv", "Cost"),
        ),
    ),
    "active_learning": Page(
        "Active learning",
        "`area` is the mean score over the labels spent; `over_random` the paired difference to labels drawn at random, with a "
        "95 % interval over seeds; `over_plain` the difference of a foreseen or sequential strategy to its plain form.",
        ("uv run python benchmarks/active_learning.py digits",),
        (Section("active_learning/*-summary.csv", "`{stem}`"),),
    ),
    "perturbation": Page(
        "Low-rank perturbation",
        "Tasks with known identity, each a low-rank perturbation of the first. `growth` is what the later tasks add, as a "
        "share of the first; `aopd` and `mopd` are mean and largest disparity of a task's accuracy over orders.",
        ("uv run python benchmarks/perturbation.py permuted-mnist permuted-mnist-wide",),
        (Section("perturbation/*.csv", "`{stem}`"),),
    ),
    "cost": Page(
        "What a filter step costs",
        "Plain training and a filter step of the same epochs, alternated in one process; ratios are within pairs. Each piece "
        "of a step against its floor: the bytes that it must move and the operations that it must do, at rates measured "
        "beside it. Memory and time where weights or tasks are many, the history on disk.",
        (
            "uv run python benchmarks/filter_cost.py",
            "uv run python benchmarks/floors.py",
            "uv run python benchmarks/large.py",
            "uv run python benchmarks/large.py --stream",
        ),
        (
            Section("filter_cost.csv", "Cost"),
            Section("floors.csv", "Each piece against its floor"),
            Section("large.csv", "Many weights"),
            Section("stream.csv", "Many tasks"),
        ),
    ),
}


def pages() -> dict[str, str | bytes]:
    """Place -> Markdown, and the pictures."""
    made: dict[str, str | bytes] = {}
    for place, page in PAGES.items():
        lines = [f"# {page.title}", "", page.about, "", "```console"]
        lines += [*(f"$ {command}" for command in page.commands), "```", ""]
        pictures: list[Path] = []
        for section in page.sections:
            for path in sorted(RESULTS.glob(section.pattern)):
                lines += [f"## {section.about.format(stem=path.stem.removesuffix('-summary'))}", ""]
                lines += [*table(path, section.rows), "", f"From `{path.relative_to(ROOT)}`.", ""]
                picture = path.with_name(f"{path.stem.removesuffix('-summary')}.png")
                if picture.exists():
                    lines += [f"![{picture.stem}]({place}/{picture.name})", ""]
                    pictures.append(picture)
        if not any(line.startswith("## ") for line in lines):
            lines += ["No results are recorded yet.", ""]
        lines += ["How it was measured, what was tuned and what failed is told in `benchmarks/README.md`.", ""]
        made[f"results/{place}.md"] = "\n".join(lines)
        made |= {f"results/{place}/{picture.name}": picture.read_bytes() for picture in pictures}
    return made


def table(path: Path, wanted: Callable[[Row], bool] = lambda row: True) -> list[str]:
    """The file as lines of a Markdown table, and a line on what was left out.

    Raises:
        ValueError: for a file without rows.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if wanted(row)]
    if not rows:
        raise ValueError(f"{path.relative_to(ROOT)} has no rows to show")
    columns = [name for name in rows[0] if not (name.endswith("_sd") and name.removesuffix("_sd") in rows[0])]
    shared = {name: rows[0][name] for name in columns if len(rows) > 1 and len({row[name] for row in rows}) == 1}
    shown = [name for name in columns if name not in shared and any(not _empty(row[name]) for row in rows)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in shown) + " |"]
    lines += ["|" + "|".join("---" if _textual(rows, name) else "---:" for name in shown) + "|"]
    lines += ["| " + " | ".join(_cell(row, name) for name in shown) + " |" for row in rows]
    common = [f"{name.replace('_', ' ')} {number(value)}" for name, value in shared.items() if not _empty(value)]
    return [*lines, "", f"In all rows: {', '.join(common)}."] if common else lines


def number(text: str) -> str:
    """Rounded to four significant digits, whole numbers with separators; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text.replace("|", "\\|")
    if not math.isfinite(value):
        return "–"
    if value == round(value) or abs(value) >= 10**DIGITS:
        return f"{round(value):,}"
    return f"{value:.{DIGITS}g}"


def _cell(row: Row, name: str) -> str:
    if _empty(row[name]):
        return ""
    spread = row.get(f"{name}_sd", "")
    if _empty(spread) or float(spread) == 0:
        return number(row[name])
    # as many decimals as show two digits of the spread
    decimals = max(1 - math.floor(math.log10(float(spread))), 0)
    return f"{float(row[name]):.{decimals}f} ± {float(spread):.{decimals}f}"


def _empty(text: str) -> bool:
    return text.strip().lower() in ("", "nan")


def _textual(rows: list[Row], name: str) -> bool:
    return any(number(value) == value and not value[-1:].isdigit() for value in _values(rows, name))


def _values(rows: list[Row], name: str) -> Iterator[str]:
    return (row[name] for row in rows if not _empty(row[name]))
