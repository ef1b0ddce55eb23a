"""The settings of a run: checked at once, written to settings.json, read back by resume and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer

__all__ = [
    "Activation",
    "CommandError",
    "Data",
    "Engine",
    "Kernel",
    "KernelChoice",
    "Settings",
    "Shift",
    "device",
    "kernels_of",
    "one_sentence",
    "parse_kernel",
    "versions",
    "whole_numbers",
]

STATIC = "static"
DEFAULT_NOISE = "all=0.1,first=0.1,last=1,last=4"
DEFAULT_TASKS = {"rotate": 10, "permute": 10, "split": 5}
DEFAULT_STEP = 5.0
DEFAULT_RANK = 100
# above, a task is learnt by Adam on mini-batches: L-BFGS reads every example at every step
WHOLE_TASK_LABELS = 5000
MAX_NOISE = 100.0  # the program's, which is slow to import; a test holds the two together
_PACKAGES = ("ssm-nn", "jax", "jaxlib", "numpyro", "optax", "numpy", "scipy", "scikit-learn", "arviz")


class Data(StrEnum):
    """Accepted data sets."""

    DIGITS = "digits"
    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"


class Shift(StrEnum):
    """How tasks differ."""

    ROTATE = "rotate"
    PERMUTE = "permute"
    SPLIT = "split"


class Engine(StrEnum):
    """What is kept of the precision."""

    LOW_RANK = "low-rank"
    DENSE = "dense"
    DIAGONAL = "diagonal"


class KernelChoice(StrEnum):
    """How the kernel is found."""

    AUTO = "auto"
    STATIC = "static"
    WALK = "walk"


class Activation(StrEnum):
    """Accepted activations."""

    TANH = "tanh"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    SOFTPLUS = "softplus"


class CommandError(Exception):
    """What the user can mend, in one sentence."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """What the user can mend ends the command with one sentence and code 2."""
    try:
        yield
    except CommandError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def whole_numbers(option: str, text: str, other: str = "") -> tuple[int, ...]:
    """``"100,100"`` as numbers >= 1.

    Raises:
        CommandError: naming ``option``, and what else than numbers it accepts.
    """
    numbers = text.split(",")
    # a width of more digits could be no array's, and Python would not even read it
    if not all(number.isascii() and number.isdigit() and len(number) < 10 and int(number) > 0 for number in numbers):
        raise CommandError(
            f"{option} is {text!r}; whole numbers >= 1 separated by commas, such as 100,100{other or ','} are accepted."
        )
    return tuple(int(number) for number in numbers)


@dataclass(frozen=True)
class Kernel:
    """A random walk by layer.

    Attributes:
        name: as the user wrote it, such as ``"first=0.1+last=0.5"``; ``"static"`` for no noise at all.
        noise: variance of one step for each layer, from the input to the output.
    """

    name: str
    noise: tuple[float, ...]

    @property
    def slug(self) -> str:
        """The name as part of a file's path."""
        return self.name.replace("=", "-").replace("+", "_")


@dataclass(frozen=True)
class Settings:
    """The options of ``ssm-nn run`` that decide its result."""

    data: str
    data_folder: str | None
    shift: str
    tasks: int
    step: float | None
    labels: int | None
    hidden: tuple[int, ...]
    activation: str
    engine: str
    rank: int | None
    kernel: str
    noise: tuple[str, ...]
    prior_scale: float
    seeds: int
    seed: int
    draws: int
    epochs: int
    batch_size: int

    def __post_init__(self):
        for name in ("tasks", "seeds", "draws", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise CommandError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; a whole number >= 1 is accepted."
                )
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in list(accepted):
                raise CommandError(f"--{name} is {getattr(self, name)!r}; {', '.join(accepted)} are accepted.")
        if any(width < 1 for width in self.hidden):
            raise CommandError(f"--hidden is {self.hidden}; whole numbers >= 1 are accepted.")
        if self.seed < 0:
            raise CommandError(f"--seed is {self.seed}; a whole number >= 0 is accepted.")
        if not 0 < self.prior_scale < float("inf"):
            raise CommandError(f"--prior-scale is {self.prior_scale}; a positive number is accepted.")
        if self.rank is not None and self.rank < 0:
            raise CommandError(f"--rank is {self.rank}; a whole number >= 0 is accepted.")
        kernels_of(self)

    @property
    def num_layers(self) -> int:
        """Layers of weights."""
        return len(self.hidden) + 1

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``; KeyError for a missing entry, TypeError for one of another type."""
        plain: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        plain["hidden"], plain["noise"] = tuple(plain["hidden"]), tuple(plain["noise"])
        for name, kind in get_type_hints(cls).items():
            if not _is_of(plain[name], kind):
                raise TypeError(f"{name} is {plain[name]!r}")
        return cls(**plain)


_CHOICES: dict[str, type[StrEnum]] = {
    "data": Data,
    "shift": Shift,
    "engine": Engine,
    "kernel": KernelChoice,
    "activation": Activation,
}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a plain value is of an annotated type; True is no number."""
    if get_origin(kind) is tuple:
        return all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_of(value, option) for option in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def kernels_of(settings: Settings) -> list[Kernel]:
    """The candidates, static first."""
    walks = [parse_kernel(text, settings.num_layers) for text in settings.noise] if settings.kernel != STATIC else []
    static = [] if settings.kernel == "walk" else [Kernel(STATIC, (0.0,) * settings.num_layers)]
    kernels = static + walks
    seen: dict[tuple[float, ...], str] = {}
    for kernel in kernels:
        if kernel.noise in seen:
            raise CommandError(f"--noise gives the same kernel twice, {seen[kernel.noise]!r} and {kernel.name!r}.")
        seen[kernel.noise] = kernel.name
    if not kernels:
        raise CommandError("--noise names no kernel; --kernel walk needs at least one, such as last=0.5.")
    return kernels


def parse_kernel(text: str, num_layers: int) -> Kernel:
    """``"first=0.1+last=0.5"`` as a kernel: places joined by +, each with the variance of its walk.

    A place is ``all``, ``first``, ``last`` or the number of a layer, 0 at the input. Places that overlap are an error.

    Raises:
        CommandError: in one sentence.
    """
    accepted = f"all, first, last or a layer's number from 0 to {num_layers - 1}, =, and a variance"
    noise: list[float | None] = [None] * num_layers
    for part in text.split("+"):
        place, equals, number = part.partition("=")
        layers = _layers(place, num_layers)
        if not equals or layers is None:
            raise CommandError(f"--noise has {text!r}; accepted is {accepted}, such as last=0.5 or first=0.1+last=0.5.")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= MAX_NOISE:
            raise CommandError(f"--noise has {text!r}; the variance must be a number from 0 to {MAX_NOISE:g}.")
        for layer in layers:
            if noise[layer] is not None:
                raise CommandError(f"--noise has {text!r}, which gives layer {layer} two variances.")
            noise[layer] = value
    return Kernel(text, tuple(value or 0.0 for value in noise))


def _layers(place: str, num_layers: int) -> Sequence[int] | None:
    named = {"all": range(num_layers), "first": range(1), "last": range(num_layers - 1, num_layers)}
    if place.isascii() and place.isdigit() and len(place) < 10 and int(place) < num_layers:
        return range(int(place), int(place) + 1)
    return named.get(place)


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> dict[str, str]:
    """What the run was made on; loads JAX."""
    import jax
    import jax.numpy as jnp

    kinds = sorted({one.device_kind for one in jax.devices()})
    return {"devices": f"{jax.device_count()} x {', '.join(kinds)}", "precision": str(jnp.result_type(float))}


def read_settings(path: Path) -> tuple[Settings, dict[str, str]]:
    """Settings and versions from a settings.json.

    Raises:
        CommandError: no such file, or one that is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with = {str(name): str(value) for name, value in dict(content["versions"]).items()}
        return Settings.from_json(content["settings"]), made_with
    except FileNotFoundError:
        raise CommandError(f"{path.parent} is no run folder: it has no {path.name}.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CommandError(f"{path} cannot be read as the settings of a run: {error}.") from None
