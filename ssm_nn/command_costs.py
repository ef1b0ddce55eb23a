"""What a filter over T tasks costs: numbers held on a device and on disk, and operations of a task, by structure.

With P weights, R columns kept, C outputs, N examples a task, n devices, K = min(2^24 / P, 1024) columns at a time, and layers
of I inputs (the bias counted) and O outputs:

    structure    belief            held at once             operations of a task, beside 6 P N for each pass
    Diagonal     2 P               P (28 + 3 K)             2 P N C
    LowRank(R)   P (R + 2)         P (4 R + 7 + 6 (R + K))  P N C (6 (R + K)^2 / K + 2 K + 4 R) and SVDs of R + K
    Dense        P + P^2           6 P^2                    14 P^3
    Kronecker    P + (I^2 + O^2 + I O) a layer              N (2 I^2 + 2 O^2 + I O) and eigenvectors of I and O a layer

The first two are divided among n devices. A history keeps a task's belief, the step into it (3 P), its information (a belief
without its mean), and for the smoother a mean and a message of that size again. Time is operations over rates measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Cost", "Job", "Rates", "advice", "costs", "in_words", "measure_rates"]

BYTES = 4  # float32
_PASSES = 200  # of L-BFGS over a task that is learnt whole; measured on digits and on MNIST: 60 to 400
_EPOCHS, _BATCH, _WHOLE_TASK = 5, 128, 5_000  # the engine's own choices
_PROJECTED_EXAMPLES = 10_000  # of the Kronecker form
_EXACT_UP_TO = 3_000  # weights, for which the dense form takes seconds
_LONG = 10  # tasks, after which a diagonal plus low rank has begun to forget (benchmarks/README.md)


@dataclass(frozen=True)
class Job:
    """A sequence to be planned.

    Args:
        widths: of the layers, from the inputs to the outputs.
        rank: R.
        tasks: T.
        examples: N, a task.
        devices: n.
    """

    widths: tuple[int, ...]
    rank: int
    tasks: int
    examples: int
    devices: int = 1

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(I, O) of each layer, the bias counted among the inputs."""
        return [(i + 1, o) for i, o in zip(self.widths[:-1], self.widths[1:], strict=True)]

    @property
    def weights(self) -> int:
        """P."""
        return sum(i * o for i, o in self.layers)

    @property
    def columns(self) -> int:
        """K."""
        outputs = self.widths[-1]
        return max(min(min(2**24 // self.weights, 1024) // outputs, self.examples), 1) * outputs


@dataclass(frozen=True)
class Rates:
    """Of one device, in float32.

    Attributes:
        product: operations a second of a matrix product.
        tall: of a QR decomposition of a tall matrix.
        small: of the singular value decomposition of a matrix of some hundreds.
    """

    product: float
    tall: float
    small: float


@dataclass(frozen=True)
class Cost:
    """Of one structure.

    Attributes:
        structure: its name, as it is written.
        device_bytes: held at once on each device.
        disk_bytes: a history of all tasks, smoothed.
        task_seconds: one task, on all devices.
        sharded: whether it is divided among devices.
    """

    structure: str
    device_bytes: float
    disk_bytes: float
    task_seconds: float
    sharded: bool


def measure_rates() -> Rates:
    """Measure for about three seconds on the first device."""
    square = jnp.ones((1024, 1024)) + jnp.eye(1024)
    tall = jax.random.normal(jax.random.key(0), (20_000, 128))
    small = tall[:256] @ tall[:256].T / 128
    return Rates(
        _rate(lambda a: a @ a, square, 2 * 1024**3),
        _rate(jnp.linalg.qr, tall, 4 * tall.size * tall.shape[1]),
        _rate(jnp.linalg.svd, small, 20 * 256**3),
    )


def _rate(function: Callable[[Any], Any], matrix: Any, operations: float) -> float:
    """Operations a second, the best of what fits in about a second; the matrix is an argument, or XLA would fold it in."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(matrix))
    best, end = float("inf"), time.perf_counter() + 0.8
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(compiled(matrix))
        best = min(best, time.perf_counter() - began)
    return operations / best


def costs(job: Job, rates: Rates) -> list[Cost]:
    """Of every structure, the most faithful first."""
    p, r, k, n = job.weights, job.rank, job.columns, job.examples
    outputs = job.widths[-1]
    chunks = ceil(n * outputs / k)
    blocks = sum(i * i + o * o + i * o for i, o in job.layers)
    steps = _PASSES if n <= _WHOLE_TASK else _EPOCHS * ceil(n / _BATCH)
    passes = _PASSES if n <= _WHOLE_TASK else _EPOCHS
    search = 6 * p * n * passes / rates.product

    def cost(structure: str, precision: int, held: float, seconds: float, sharded: bool) -> Cost:
        entry = (p + precision) + 3 * p + precision + (p + precision)
        share = job.devices if sharded else 1
        return Cost(structure, BYTES * held / share, BYTES * entry * job.tasks, (search + seconds) / share, sharded)

    wide = chunks * (6 * p * (r + k) ** 2 / rates.tall + 20 * (r + k) ** 3 / rates.small)
    columns = chunks * (2 * p * k * k + 4 * p * r * k + 2 * p * k) / rates.product
    around = (steps * 8 * p * r + 12 * p * r * r) / rates.product
    projected = min(n, _PROJECTED_EXAMPLES)
    turned = projected * sum(2 * i * i + 2 * o * o + i * o for i, o in job.layers) / rates.product
    eigen = sum(40 * (i**3 + o**3) for i, o in job.layers) / rates.small
    rotations = [4 * steps * (i * i * o + i * o * o) for i, o in job.layers]
    if n > _WHOLE_TASK:  # mini-batches: the first layer's data are turned once, where that is less
        i, o = job.layers[0]
        rotations[0] = min(rotations[0], 2 * n * i * i + 4 * steps * _BATCH * o * o)
    return [
        cost(
            "Dense()",
            p * p,
            6 * p * p + 2 * p * k,
            14 * p**3 / rates.product + steps * 2 * p * p / rates.product,
            False,
        ),
        cost("Kronecker()", blocks, 4 * blocks + 26 * p, turned + eigen + sum(rotations) / rates.product, False),
        cost(f"LowRank({r})", p * (r + 1), p * (4 * r + 7 + 6 * (r + k)), wide + columns + around, True),
        cost("Diagonal()", p, p * (28 + 3 * k), 2 * p * n * outputs / rates.product, True),
    ]


def advice(job: Job, found: list[Cost], memory: float, disk: float) -> str:
    """Which structure to choose, and why, in a few sentences; ``memory`` and ``disk`` in bytes."""
    dense, kronecker, low_rank, diagonal = found

    def fits(cost: Cost) -> bool:
        return cost.device_bytes <= memory

    if job.weights <= _EXACT_UP_TO and fits(dense):
        chosen, why = dense, "it keeps the whole precision, and is affordable for so few weights"
    elif job.tasks > _LONG and fits(kronecker) and job.devices == 1:
        chosen, why = kronecker, f"over more than {_LONG} tasks a diagonal plus low rank forgets, and this does not"
    elif fits(low_rank):
        chosen, why = low_rank, "it keeps the directions that the data know best, and fits"
        if job.tasks > _LONG and fits(kronecker):
            why += f" {job.devices} devices; on one, Kronecker() would forget less over so many tasks"
    elif fits(diagonal):
        smaller = _rank_that_fits(job, memory)
        hint = f"; LowRank({smaller}) would fit too" if smaller else ""
        chosen, why = diagonal, f"LowRank({job.rank}) needs {in_words(low_rank.device_bytes)} a device{hint}"
    else:
        needed = ceil(diagonal.device_bytes * job.devices / memory)
        return f"Nothing fits {in_words(memory)} a device; Diagonal() would on {needed} devices."
    history = f" Its history takes {in_words(chosen.disk_bytes)}"
    if chosen.disk_bytes > disk:
        history += f", of which {in_words(disk)} are free: filter without smoothing, or make room."
    elif chosen.disk_bytes + chosen.device_bytes > memory:
        history += ": give the run history=OnDisk(folder)."
    else:
        history += " and fits in memory."
    return f"Choose {chosen.structure}: {why}.{history}"


def _rank_that_fits(job: Job, memory: float) -> int:
    """The largest of some ranks whose low-rank form fits; 0 for none."""
    bytes_a_rank = BYTES * job.weights * 10 / job.devices
    fixed = BYTES * job.weights * (7 + 6 * job.columns) / job.devices
    return max(int((memory - fixed) // bytes_a_rank), 0)


def in_words(size: float) -> str:
    """Bytes with the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError
