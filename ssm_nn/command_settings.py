"""The settings of a run: checked at once, written to settings.json, read back by resume and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["CommandError", "Kernel", "Settings", "kernels_of", "parse_kernel", "versions"]

STATIC = "static"
DEFAULT_NOISE = "all=0.1,first=0.1,last=1,last=4"
DEFAULT_TASKS = {"rotate": 10, "permute": 10, "split": 5}
DEFAULT_STEP = 5.0
DEFAULT_RANK = 100
# above, a task is learnt by Adam on mini-batches: L-BFGS reads every example at every step
WHOLE_TASK_LABELS = 5000
MAX_NOISE = 100.0  # the program's, which is slow to import; a test holds the two together
_PACKAGES = ("ssm-nn", "jax", "jaxlib", "numpyro", "optax", "numpy", "scipy", "scikit-learn", "arviz")


class CommandError(Exception):
    """What the user can mend, in one sentence."""


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
        """The inverse of ``to_json``; KeyError for a missing entry."""
        plain: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        plain["hidden"], plain["noise"] = tuple(plain["hidden"]), tuple(plain["noise"])
        return cls(**plain)


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
    if place.isascii() and place.isdigit() and int(place) < num_layers:
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


def read_settings(path: Path) -> tuple[Settings, dict[str, str]]:
    """Settings and versions from a settings.json.

    Raises:
        CommandError: no such file, or one that is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Settings.from_json(content["settings"]), dict(content["versions"])
    except FileNotFoundError:
        raise CommandError(f"{path.parent} is no run folder: it has no {path.name}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} cannot be read as the settings of a run: {error}.") from None
