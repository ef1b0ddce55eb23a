"""Freely trained weights taken apart: scales, directions, and what is known of each direction."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Program
from ssm_nn.inference.perturbation.allocation import Allocation, Scores
from ssm_nn.inference.perturbation.blocks import Factors
from ssm_nn.inference.perturbation.curvature import drop_quadratic, kernel_statistics, losses_at
from ssm_nn.inference.perturbation.directions import Directions, least_squares_scales, residual
from ssm_nn.inference.perturbation.fitting import joined
from ssm_nn.inference.perturbation.reading import Reading
from ssm_nn.tasks import Task

__all__ = ["Proposal", "Recipe", "Watch", "chosen", "take_apart", "truncated"]

Array = Any


class Recipe(NamedTuple):
    """How weights are taken apart.

    Attributes:
        program, hypers: whose likelihood scores the directions.
        directions: how a residual is split.
        allocation: which says what it needs to know.
        sweeps: of the least squares for the scales.
        examples: behind factors and quadratic.
    """

    program: Program
    hypers: Any
    directions: Directions
    allocation: Allocation
    sweeps: int
    examples: int


class Proposal(NamedTuple):
    """A task's freely trained weights, taken apart.

    Attributes:
        free: all weights after the warm-up, network -> path -> leaf.
        reference: the kernels that are perturbed.
        factors: one a block, with all directions up to the cap.
        scores: of the directions.
        budget: numbers that directions may take; None where nothing limits them.
        status: of the warm-up.
        seconds: wall time by phase.
    """

    free: Any
    reference: Any
    factors: tuple[Factors, ...]
    scores: Scores
    budget: int | None
    status: int
    seconds: dict[str, float]


def take_apart(
    recipe: Recipe, reading: Reading, free: Any, reference: Any, task: Task, budget: int | None, watch: Watch
) -> tuple[tuple[Factors, ...], Scores]:
    """Factors with all directions up to the cap, and their scores.

    Args:
        recipe: how.
        reading: of the program.
        free, reference: all freely trained weights, and the kernels that are perturbed.
        task: the training data, with a mask.
        budget: numbers that the allocation may spend.
        watch: takes the time of each phase.
    """
    program, hypers, blocks = recipe.program, recipe.hypers, reading.blocks
    sides, sensitivity = None, np.full(len(blocks), np.nan)
    reads = recipe.allocation.reads(sum(block.cap * block.cost for block in blocks), budget)
    if recipe.directions.needs_sides or reads.sensitivity:
        found = kernel_statistics(program, blocks, hypers, free, task, recipe.examples)
        sides, sensitivity = found.sides, np.asarray(found.sensitivity, float)
    watch.lap("factors", sides)
    sigma, factors = _decomposed(blocks, recipe.directions, recipe.sweeps, free, reference, sides)
    watch.lap("svd", factors)
    scores = _scores(reading, sigma, sensitivity, int(jnp.sum(task.mask)))
    if reads.quadratic:
        arrays = joined(reference, reading.own(free))
        quadratic = drop_quadratic(program, blocks, hypers, arrays, factors, task, recipe.examples)
        scores = scores._replace(linear=np.asarray(quadratic.linear), matrix=np.asarray(quadratic.matrix))
    watch.lap("quadratic", scores.sigma)
    return factors, scores


def truncated(factors: tuple[Factors, ...], gains: np.ndarray) -> tuple[Factors, ...]:
    """The factors with each direction as often as ``gains`` (A,) says: without those of 0."""
    made = []
    for f, part in zip(factors, gains_by_layer(factors, gains), strict=True):
        kept = (part != 0).astype(part.dtype)
        made.append(f._replace(right=f.right * jnp.where(kept, part, 1)[:, None], keep=kept))
    return tuple(made)


def gains_by_layer(factors: tuple[Factors, ...], gains: np.ndarray) -> tuple[Array, ...]:
    """``gains`` (..., A) cut into (..., k), one a layer."""
    ends = np.cumsum([f.keep.shape[0] for f in factors])
    parts = np.split(np.asarray(gains), ends[:-1], axis=-1)
    return tuple(jnp.asarray(part, f.keep.dtype) for f, part in zip(factors, parts, strict=True))


def chosen(recipe: Recipe, reading: Reading, proposal: Proposal, task: Task) -> np.ndarray:
    """Gains (A,) of the allocation's best candidate, by the loss on examples that the quadratic has not seen if there are any.

    Args:
        recipe, reading: as for ``take_apart``.
        proposal: whose directions are to be chosen.
        task: the training data, with a mask.
    """
    candidates = recipe.allocation.candidates(proposal.scores, proposal.budget)
    if len(candidates) == 1:
        return candidates[0]
    arrays = joined(proposal.reference, reading.own(proposal.free))
    gains = gains_by_layer(proposal.factors, candidates)
    factors, examples = proposal.factors, recipe.examples
    losses = losses_at(recipe.program, reading.blocks, recipe.hypers, arrays, factors, gains, task, examples)
    # a loss that is not finite is worse than any
    return candidates[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]


class Watch:
    """Wall time by phase; a lap ends when its arrays are there."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds, self._began = dict(seconds or {}), time.perf_counter()

    def lap(self, name: str, result: Any) -> None:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[name] = now - self._began
        self._began = now


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decomposed(blocks: Any, directions: Directions, sweeps: int, free: Any, base: Any, sides: Any) -> Any:
    sigmas, factors = [], []
    for number, block in enumerate(blocks):
        network, path = block.name
        before, after = base[network][path], free[network][path]
        inputs, outputs = least_squares_scales(block, after, before, sweeps)
        made = block.identity(before.dtype)._replace(inputs=inputs, outputs=outputs)
        difference = residual(block, after, before, made)
        sigma, left, right = directions.split(block, difference, None if sides is None else sides[number])
        sigmas.append(sigma)
        factors.append(made._replace(left=left, right=right, keep=jnp.ones_like(made.keep)))
    return sigmas, tuple(factors)


def _scores(reading: Reading, sigma: Any, sensitivity: np.ndarray, num_examples: int) -> Scores:
    layer = np.repeat(np.arange(len(reading.blocks)), [block.cap for block in reading.blocks])
    cost = np.array([reading.blocks[number].cost for number in layer])
    unknown = np.full(len(layer), np.nan)
    matrix = np.full((len(layer), len(layer)), np.nan)
    flat = np.concatenate([np.asarray(s, float) for s in sigma])
    return Scores(flat, layer, cost, sensitivity, unknown, matrix, num_examples)
