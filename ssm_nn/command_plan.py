"""The command ``ssm-nn plan``: memory, disk and time of every structure before anything is learnt."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ssm_nn.command_settings import DEFAULT_RANK, CommandError, one_sentence, whole_numbers

__all__ = ["plan"]

_GIB = 2**30


def plan(
    widths: Annotated[
        str, typer.Option(help="Sizes of the layers from the inputs to the outputs, such as 784,100,100,10.")
    ] = "784,100,100,10",
    rank: Annotated[int, typer.Option(help="Columns that a low-rank belief keeps, >= 0.")] = DEFAULT_RANK,
    tasks: Annotated[int, typer.Option(help="Number of tasks, >= 1.")] = 10,
    examples: Annotated[int, typer.Option(help="Labelled examples a task, >= 1.")] = 1000,
    devices: Annotated[int, typer.Option(help="Devices of the mesh, all like the first of this machine, >= 1.")] = 1,
    memory: Annotated[
        float | None, typer.Option(help="Memory of a device in GiB. Default: this machine's.", show_default=False)
    ] = None,
    disk: Annotated[
        float | None, typer.Option(help="Free disk in GiB. Default: what is free here.", show_default=False)
    ] = None,
) -> None:
    """Say what a sequence will take, structure by structure, and which to choose; measures this machine for three seconds."""
    with one_sentence():
        sizes = whole_numbers("--widths", widths)
        if len(sizes) < 2:
            raise CommandError(f"--widths is {widths!r}; at least two numbers, inputs and outputs, are accepted.")
        for name, value, least in (
            ("rank", rank, 0),
            ("tasks", tasks, 1),
            ("examples", examples, 1),
            ("devices", devices, 1),
        ):
            if value < least:
                raise CommandError(f"--{name} is {value}; a whole number >= {least} is accepted.")
        for name, size in (("memory", memory), ("disk", disk)):
            if size is not None and not 0 < size < float("inf"):
                raise CommandError(f"--{name} is {size}; a positive number of GiB is accepted.")
        _print(sizes, rank, tasks, examples, devices, memory, disk)


def _print(
    widths: tuple[int, ...],
    rank: int,
    tasks: int,
    examples: int,
    devices: int,
    memory: float | None,
    disk: float | None,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    with console.status("Measuring this machine"):
        from ssm_nn.command_costs import Job, advice, costs, in_words, measure_rates

        rates = measure_rates()
    job = Job(widths, rank, tasks, examples, devices)
    found = costs(job, rates)
    held = _memory_here() if memory is None else memory * _GIB
    free = shutil.disk_usage(Path.cwd()).free if disk is None else disk * _GIB
    title = f"{job.weights:,} weights, {tasks} tasks of {examples:,} examples, {devices} device{'s' * (devices > 1)}"
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, show_edge=False, pad_edge=False)
    table.add_column("structure", no_wrap=True)
    for heading in ("memory a device", "history on disk", "time a task", "all tasks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in found:
        name = cost.structure if cost.sharded or devices == 1 else f"{cost.structure} (one device)"
        cells = [in_words(cost.device_bytes), in_words(cost.disk_bytes)]
        cells += [_duration(seconds) for seconds in (cost.task_seconds, cost.task_seconds * tasks)]
        table.add_row(name, *cells, style=None if cost.device_bytes <= held else "dim")
    console.print(table)
    console.print(
        Text(
            f"\nOf {in_words(held)} memory a device and {in_words(free)} disk. Times are estimates, within a few times."
        )
    )
    console.print(Text(advice(job, found, held, free)))


def _memory_here() -> float:
    """Bytes of the first device, or of the machine."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    if seconds > 1e8:
        return f"{seconds / 3.15e7:.2g} years"
    return str(timedelta(seconds=round(seconds)))
