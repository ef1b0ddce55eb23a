"""The tables of how_to/cost.md: `uv run python docs/cost_table.py` writes them, a test compares them with the page.

Sizes follow from the networks alone, times from the rates below: round numbers, which `ssm-nn plan` measures.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path

from ssm_nn.command_costs import Job, Rates, advice, costs, in_words

__all__ = ["PAGE", "tables", "with_tables"]

PAGE = Path(__file__).parent / "pages" / "how_to" / "cost.md"
RATES = Rates(product=1e11, tall=1e10, small=1e9)
RANK, EXAMPLES = 50, 1_000
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
DEVICE_BYTES = 80 * 2**30
INPUTS, OUTPUTS, WIDEST = 784, 10, 4096
SHORT, LONG = 10, 10_000  # tasks


def widths(weights: int) -> tuple[int, ...]:
    """Of a network of about so many weights: two hidden layers, or as many of 4,096 as it takes."""
    linear = INPUTS + OUTPUTS + 2
    two = round((-linear + math.sqrt(linear**2 + 4 * weights)) / 2)
    layers = 1 + round((weights - INPUTS * WIDEST) / WIDEST**2) if two > WIDEST else 2
    return (INPUTS, *(min(two, WIDEST),) * layers, OUTPUTS)


def cost_lines() -> list[str]:
    """A row a size and structure; the dense one, which grows as the square, for the smallest size alone."""
    lines = [
        "| weights | structure | memory on the device | history of 10 tasks | of 10,000 | a task | 10,000 tasks |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for weights in SIZES:
        short, long = (Job(widths(weights), RANK, tasks, EXAMPLES) for tasks in (SHORT, LONG))
        for first, second in zip(costs(short, RATES), costs(long, RATES), strict=True):
            if first.structure == "Dense()" and weights > SIZES[0]:
                continue
            sizes = (first.device_bytes, first.disk_bytes, second.disk_bytes)
            times = (first.task_seconds, first.task_seconds * LONG)
            cells = [f"{short.weights:,}", f"`{first.structure}`", *map(_size, sizes), *map(_time, times)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def choice_lines() -> list[str]:
    """A row a size, what ``advice`` says for few and many tasks, on one device and on 64."""
    cases = [(tasks, devices) for devices in (1, 64) for tasks in (SHORT, LONG)]
    lines = [
        "| weights | " + " | ".join(f"{t:,} tasks, {d} device{'s' * (d > 1)}" for t, d in cases) + " |",
        "|---:|" + "---|" * len(cases),
    ]
    for weights in SIZES:
        cells = []
        for tasks, devices in cases:
            job = Job(widths(weights), RANK, tasks, EXAMPLES, devices)
            said = advice(job, costs(job, RATES), DEVICE_BYTES, math.inf)
            chosen = re.match(r"Choose (.*?): ", said)
            cells.append(f"`{chosen[1]}`" if chosen else said.removesuffix("."))
        lines.append("| " + " | ".join([f"{Job(widths(weights), RANK, 1, 1).weights:,}", *cells]) + " |")
    return lines


def _size(size: float) -> str:
    return in_words(size) if size < 1000 * 2**40 else f"{size / 2**40:,.0f} TiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    year = timedelta(days=365).total_seconds()
    for unit, length in (("years", year), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    raise AssertionError


def tables() -> dict[str, list[str]]:
    """By the name that marks the table's place on the page."""
    return {"costs": cost_lines(), "choices": choice_lines()}


def with_tables(page: str) -> str:
    """The page with the tables between their marks made anew."""
    for name, lines in tables().items():
        between = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", flags=re.DOTALL)
        page = between.sub(lambda found, lines=lines: "\n".join([found[1], "", *lines, "", found[2]]), page)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
