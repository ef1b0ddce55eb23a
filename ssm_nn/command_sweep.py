"""The command ``ssm-nn sweep``: runs with every combination of some options, side by side in one table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssm_nn.command_options import settings_of, without_meaningless
from ssm_nn.command_settings import CommandError, Settings, one_sentence

if TYPE_CHECKING:
    from ssm_nn.command_folder import RunFolder

__all__ = ["sweep"]

# of one run, not of all
_OWN = ("out", "quiet")


def sweep(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Folder of the sweep, new or begun.", show_default=False)],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help='An option of `ssm-nn run` and its values, separated by spaces: --vary "engine=low-rank diagonal" --vary '
            '"rank=10 50". Every combination is a cell; an option that has no meaning in one (a rank of a diagonal) is left '
            "out there.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each a process, >= 1.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor tables.")] = False,
) -> None:
    """Run every combination of some options, and compare: sweep FOLDER --vary ... -- options of all cells.

    A cell is a run with a folder of its own, named by its settings. The same command goes on after a stop, other values add
    cells, and without --vary all begun cells are finished. Tables and a picture are made of what is finished.
    """
    with one_sentence():
        if jobs < 1:
            raise CommandError(f"--jobs is {jobs}; a whole number >= 1 is accepted.")
        if context.args and not vary:
            raise CommandError(f"{' '.join(context.args)}: options of all cells need --vary beside them.")
        wanted = _combinations(_parser(context), context.args, vary or [])
        _execute(path, wanted, jobs, quiet)


def _parser(context: typer.Context) -> Callable[[list[str]], dict[str, Any]]:
    """What ``ssm-nn run`` makes of its options."""
    assert context.parent is not None  # the command ssm-nn
    run = context.parent.command.commands["run"]  # pyright: ignore[reportAttributeAccessIssue]

    def parse(arguments: list[str]) -> dict[str, Any]:
        try:
            return run.make_context("run", list(arguments)).params
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            raise CommandError(f"{error.format_message()} See `ssm-nn run --help`.") from None  # pyright: ignore

    return parse


def _combinations(
    parse: Callable[[list[str]], dict[str, Any]], common: Sequence[str], vary: Sequence[str]
) -> list[Settings]:
    """The settings of all cells, each once."""
    values = dict(_values(text, parse([])) for text in vary)
    if len(values) < len(vary):
        raise CommandError("--vary names an option twice; all its values go into one.")
    found: dict[Settings, None] = {}
    for chosen in itertools.product(*values.values()) if vary else ():
        own = [part for name, value in zip(values, chosen, strict=True) for part in (f"--{name}", value)]
        options = parse([*common, *own])
        for name in _OWN:
            if options[name]:
                raise CommandError(f"--{name} is of one run; a sweep names its cells' folders itself.")
        found[settings_of(without_meaningless(options))] = None
    return list(found)


def _values(text: str, options: dict[str, Any]) -> tuple[str, list[str]]:
    name, _, listed = text.partition("=")
    known = [option.replace("_", "-") for option in options if option not in _OWN]
    if name not in known or not listed.split():
        raise CommandError(
            f'--vary is {text!r}; an option of `ssm-nn run` and its values, such as "rank=10 50", is accepted. Options are '
            f"{', '.join(sorted(known))}."
        )
    return name, listed.split()


def _execute(path: Path, wanted: list[Settings], jobs: int, quiet: bool) -> None:
    """Begin, finish, tabulate."""
    from rich.console import Console
    from rich.progress import Progress

    from ssm_nn.command_cells import begin_cells, cells_of, check_folder, finish_cells, is_finished
    from ssm_nn.command_endings import exit_code, of_the_file_system, stoppable
    from ssm_nn.command_sweep_table import print_table, write_table

    console = Console(quiet=quiet)
    check_folder(path)
    if not wanted and not cells_of(path):
        raise CommandError(f'{path} is no sweep yet; begin one with --vary, such as --vary "engine=low-rank diagonal".')
    failed: dict[Path, str] = {}
    try:
        with stoppable(), Progress(console=console) as bar:
            begin_cells(path, wanted)
            cells = cells_of(path)
            shown = bar.add_task("cells", total=len(cells), completed=sum(map(is_finished, cells)))

            def done(cell: RunFolder) -> None:
                bar.advance(shown)
                write_table(path)

            failed = finish_cells(cells, jobs, done)
            lines = write_table(path)
    except OSError as error:
        raise CommandError(of_the_file_system(error, path, f"ssm-nn sweep {path}")) from None
    except KeyboardInterrupt as stop:
        finished, all_ = sum(map(is_finished, cells_of(path))), len(cells_of(path))
        typer.echo(
            f"\nStopped; {finished} of {all_} cells are finished, and every finished task of the others is saved. Go on with: "
            f"ssm-nn sweep {path}",
            err=True,
        )
        raise typer.Exit(exit_code(stop)) from None
    print_table(console, lines)
    console.print(f"\nTables and picture: {path}", soft_wrap=True, highlight=False)
    for cell, said in failed.items():
        typer.echo(f"{cell} failed: {said}", err=True)
    if failed:
        raise typer.Exit(1)
