"""The command ``ssm-nn``: run, plan, sweep, resume, report. Nothing slow is imported before a command needs it."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssm_nn.command_options import settings_of
from ssm_nn.command_plan import plan
from ssm_nn.command_settings import (
    DEFAULT_NOISE,
    DEFAULT_RANK,
    DEFAULT_STEP,
    WHOLE_TASK_LABELS,
    Activation,
    CommandError,
    Data,
    Engine,
    KernelChoice,
    Settings,
    Shift,
    device,
    one_sentence,
    versions,
)
from ssm_nn.command_sweep import sweep

if TYPE_CHECKING:
    from rich.console import Console

    from ssm_nn.command_run import Experiment

__all__ = ["main"]

main = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Learn from a sequence of tasks: filter a network's weights task by task, smooth them, compare.",
)


STREAM, NETWORK, FILTER, RUN = "The stream of tasks", "The network", "The filter", "The run"
Folder = Annotated[Path, typer.Argument(help="A folder that `ssm-nn run` made.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor tables.", rich_help_panel=RUN)]


@main.command()
def run(  # the options are read from the context: they are many
    context: typer.Context,
    data: Annotated[
        Data,
        typer.Option(help="Images; digits come with scikit-learn, the others are downloaded.", rich_help_panel=STREAM),
    ] = Data.DIGITS,
    data_folder: Annotated[
        Path | None,
        typer.Option(
            help="Look for the data files here only. Default: the folder in SSM_NN_DATA, the cache, then download.",
            show_default=False,
            rich_help_panel=STREAM,
        ),
    ] = None,
    shift: Annotated[
        Shift,
        typer.Option(
            help="Turn the images further with each task, permute their pixels, or split the classes.",
            rich_help_panel=STREAM,
        ),
    ] = Shift.ROTATE,
    tasks: Annotated[
        int | None,
        typer.Option(
            help="Number of tasks, >= 1. Default: 10, for split 5.", show_default=False, rich_help_panel=STREAM
        ),
    ] = None,
    step: Annotated[
        float | None,
        typer.Option(
            help=f"Degrees from task to task, with --shift rotate. Default: {DEFAULT_STEP:g}.",
            show_default=False,
            rich_help_panel=STREAM,
        ),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Labelled examples a task, >= 1; 0 or all takes all there are.", rich_help_panel=STREAM)
    ] = "50",
    hidden: Annotated[
        str,
        typer.Option(
            help="Widths of the hidden layers, such as 100,100; none for no hidden layer.", rich_help_panel=NETWORK
        ),
    ] = "24",
    activation: Annotated[
        Activation, typer.Option(help="Between the layers.", rich_help_panel=NETWORK)
    ] = Activation.TANH,
    prior_scale: Annotated[
        float, typer.Option(help="Standard deviation of every weight before any task, > 0.", rich_help_panel=NETWORK)
    ] = 1.0,
    engine: Annotated[
        Engine,
        typer.Option(
            help="What the belief keeps of the precision: diagonal plus low rank, all of it, the diagonal.",
            rich_help_panel=FILTER,
        ),
    ] = Engine.LOW_RANK,
    rank: Annotated[
        int | None,
        typer.Option(
            help=f"Columns kept by --engine low-rank, >= 0. Default: {DEFAULT_RANK}.",
            show_default=False,
            rich_help_panel=FILTER,
        ),
    ] = None,
    kernel: Annotated[
        KernelChoice,
        typer.Option(
            help=(
                "How weights move between tasks: not at all (static), by the best of --noise (walk), or by "
                "whichever of these the evidence prefers (auto)."
            ),
            rich_help_panel=FILTER,
        ),
    ] = KernelChoice.AUTO,
    noise: Annotated[
        str | None,
        typer.Option(
            help="Candidate random walks, separated by commas. Each gives the variance of one step, 0 to 100, for all "
            "weights (all=0.1), the first or last layer (last=0.5), a layer by number (0=0.1), or several of these joined "
            "by + (first=0.01+last=0.5); other layers stand still. Not with --kernel static. Default: "
            + DEFAULT_NOISE
            + ".",
            show_default=False,
            rich_help_panel=FILTER,
        ),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            help=(
                f"Passes over a task, >= 1, where it has more than {WHOLE_TASK_LABELS:,} labels and is learnt by "
                "Adam; smaller tasks are learnt by L-BFGS until it converges."
            ),
            rich_help_panel=FILTER,
        ),
    ] = 5,
    batch_size: Annotated[int, typer.Option(help="Examples a step of Adam, >= 1.", rich_help_panel=FILTER)] = 128,
    seeds: Annotated[
        int, typer.Option(help="Repetitions, >= 1; they differ in the examples that are labelled.", rich_help_panel=RUN)
    ] = 5,
    seed: Annotated[
        int, typer.Option(help="Of the first repetition, >= 0; the next have the next numbers.", rich_help_panel=RUN)
    ] = 0,
    draws: Annotated[
        int,
        typer.Option(
            help="Draws of the weights, >= 1, for averaged predictions and in posterior.nc.", rich_help_panel=RUN
        ),
    ] = 50,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, new or empty. Default: runs/<date>-<time>.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Filter a stream of tasks, choose the kernel by evidence, smooth, and compare with fine-tuning and joint training.

    Writes tables, the posterior and a report into the run's folder.
    """
    with one_sentence():
        settings = settings_of(context.params)
        path = Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S") if out is None else out
        _execute(path, settings, quiet)


main.command()(plan)
main.command(context_settings={"allow_extra_args": True})(sweep)


@main.command()
def resume(path: Folder, quiet: Quiet = False) -> None:
    """Go on with a run that was stopped, from its last finished task; the result is the same to the last bit."""
    with one_sentence():
        _execute(path, None, quiet)


@main.command()
def report(path: Folder) -> None:
    """Make the report of a run anew."""
    with one_sentence():
        from ssm_nn.command_endings import of_the_file_system
        from ssm_nn.command_folder import RunFolder
        from ssm_nn.command_report import write_report
        from ssm_nn.command_run import Experiment

        folder = RunFolder(path)
        settings = folder.open()[0]
        try:
            with folder.claimed():
                Experiment(settings, folder, _silent).write_tables()
                write_report(folder)
        except OSError as error:
            raise CommandError(of_the_file_system(error, path, None)) from None
        typer.echo(f"Report: {folder.report_file}")


def _execute(path: Path, settings: Settings | None, quiet: bool) -> None:
    """Run or resume in ``path``, then print and report."""
    began = time.perf_counter()
    from rich.console import Console

    console = Console(quiet=quiet)
    with console.status("Loading JAX"):
        import scipy.linalg  # noqa: F401 - loads the linear algebra that is limited below
        from threadpoolctl import threadpool_limits

        from ssm_nn.command_endings import compiled_on_disk, exit_code, of_the_file_system, stoppable
        from ssm_nn.command_folder import RunFolder
        from ssm_nn.command_report import write_report
        from ssm_nn.command_run import Experiment
        from ssm_nn.command_summary import Summary
        from ssm_nn.command_table import print_summary
        from ssm_nn.inference.checkpoints import CheckpointError
        from ssm_nn.models.downloads import DataError

    folder = RunFolder(path)
    again = f"ssm-nn resume {path}"
    try:
        with stoppable(), compiled_on_disk():
            if settings is None:
                used, made_with = folder.open()
                _compare_versions(console, made_with)
            else:
                used = settings
            experiment = Experiment(used, folder, _silent)
            experiment.check()
            with folder.claimed():
                if settings is None:
                    folder.sweep()
                else:
                    folder.begin(settings)
                # the matrices are small: more threads of the linear algebra cost more than they bring
                with threadpool_limits(limits=1, user_api="blas"):
                    _with_progress(console, experiment)
                with console.status("Writing the report"):
                    write_report(folder)
    except (DataError, CheckpointError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            of_the_file_system(error, path, again if os.path.exists(folder.settings_file) else None)
        ) from None
    except KeyboardInterrupt as stop:
        said = (
            f"every finished task is saved. Go on with: {again}"
            if os.path.exists(folder.settings_file)
            else "nothing is lost."
        )
        typer.echo(f"\nStopped; {said}", err=True)
        raise typer.Exit(exit_code(stop)) from None
    for file in experiment.damaged:
        _caution(console, f"{file} was cut short or altered; the task was learnt again from the one before.")
    print_summary(console, Summary(folder))
    console.print(
        f"\nReport: {folder.report_file}   ({time.perf_counter() - began:.0f} s)", soft_wrap=True, highlight=False
    )


def _silent(*_: object) -> None:
    """No progress."""


def _compare_versions(console: Console, made_with: dict[str, str]) -> None:
    now = versions() | device()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in made_with.items() if now.get(name) != old]
    if changed:
        _caution(
            console,
            f"Other versions or devices than when the run began, so the last bits may differ: {', '.join(changed)}",
        )


def _caution(console: Console, sentence: str) -> None:
    from rich.text import Text

    console.print(Text(sentence, style="yellow"))  # as text: what a file says is no markup


def _with_progress(console: Console, experiment: Experiment) -> None:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    settings = experiment.settings
    done: dict[tuple[int, str], int] = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=experiment.total, numbers="")

        def show(seed: int, method: str, task: int, accuracy: float, log_evidence: float) -> None:
            done[seed, method] = max(done.get((seed, method), 0), task + 1)
            numbers = f"accuracy {accuracy:.1%}" if accuracy == accuracy else ""
            numbers += f", evidence {log_evidence:.1f}" if log_evidence == log_evidence else ""
            description = f"seed {seed + 1}/{settings.seeds} {method} task {task + 1}/{settings.tasks}"
            progress.update(bar, completed=sum(done.values()), description=description, numbers=numbers)

        experiment.report = show
        experiment.run()
