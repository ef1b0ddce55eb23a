"""The information of a task about the weights: the generalised Gauss-Newton matrix over all its examples.

    G = sum_n J_n^T L_n L_n^T J_n = V V^T,   J_n (K, P) Jacobian of the outputs, L_n L_n^T Fisher information in them

over the whole task, not one batch. ``ExactCurvature`` streams every column of V through the structure; ``SketchedCurvature``
(inference/sketch.py) reads G by products alone, for tasks whose columns are too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import batched, index_batches, one_batch, rows, single
from ssm_nn.inference.structures import Structure
from ssm_nn.tasks import Task

__all__ = ["Curvature", "ExactCurvature", "Information", "columns", "random_column"]

Array = Any

# a chunk of columns holds at most this many numbers (64 MiB in float32): enough for large matrix products, and small
# beside any network's optimiser state
_CHUNK_NUMBERS = 2**24
# examples of one forward and backward pass over a whole task: large products, small activations
_FORWARD_EXAMPLES = 1024


class Information(NamedTuple):
    """What one task says of the weights.

    Attributes:
        site: positive semi-definite information in the structure's form.
        logdet_gain: ``log det(Lambda' + G) - log det Lambda'``.
        dropped_share: largest share of the whitened trace that a compression moved out of the factor.
    """

    site: Any
    logdet_gain: Array
    dropped_share: Array


class Curvature(Protocol):
    """Gathers the information of a task at given weights; pure, fit for ``jit``."""

    def gather(
        self,
        space: StateSpace,
        structure: Structure,
        theta: Array,
        task: Task,
        predicted: Any,
        power: Array,
        key: Array,
    ) -> Information:
        """The information of ``task`` at ``theta`` (P,), likelihood counted ``power`` times, beside the prediction."""
        ...

    def log_likelihood_and_gradient(self, space: StateSpace, theta: Array, task: Task) -> tuple[Array, Array]:
        """Log likelihood of the whole task at ``theta``, and its gradient (P,)."""
        ...


def columns(space: StateSpace, theta: Array, task: Task) -> Array:
    """V (P, N C): ``V V^T`` is the generalised Gauss-Newton matrix of all examples in ``task`` at ``theta``."""

    def of_one(data, mask):
        example = single(task, data, mask)
        outputs, pull = jax.vjp(lambda weights: space.outputs(weights, example), theta)
        factor = space.output_factor(theta, example).astype(outputs.dtype)
        return jax.vmap(lambda cotangent: pull(cotangent)[0], in_axes=1, out_axes=1)(factor)

    stacked = jax.vmap(of_one, out_axes=1)(task.data, task.mask)  # (P, N, C)
    return stacked.reshape(theta.shape[0], -1)


def random_column(space: StateSpace, theta: Array, batch: Task, key: Array) -> Array:
    """``sum_n J_n^T L_n e_n`` (P,) over the examples of ``batch`` with random signs e_n (C,): its second moment is V V^T."""

    def outputs(weights):
        return jax.vmap(lambda data, mask: space.outputs(weights, single(batch, data, mask)))(batch.data, batch.mask)

    factors = jax.vmap(lambda data, mask: space.output_factor(theta, single(batch, data, mask)))(batch.data, batch.mask)
    at_theta, pull = jax.vjp(outputs, theta)
    signs = jax.random.rademacher(key, factors.shape[:1] + factors.shape[2:], at_theta.dtype)
    return pull(jnp.einsum("nkc,nc->nk", factors, signs).astype(at_theta.dtype))[0]


def factor_columns(space: StateSpace, task: Task) -> int:
    """C, the number of columns of one example; by abstract evaluation."""

    def factor(theta, data, mask):
        return space.output_factor(theta, single(task, data, mask))

    first = jax.tree.map(lambda a: a[0], task.data)
    return jax.eval_shape(factor, space.initial, first, task.mask[0]).shape[1]


def summed_log_likelihood(
    space: StateSpace,
    theta: Array,
    task: Task,
    transform: Callable = lambda function: function,
    examples: range | None = None,
) -> Any:
    """``transform`` of the log likelihood (itself, or its value and gradient), summed over chunks of examples."""
    total = task.num_examples
    examples = range(total) if examples is None else examples
    # chunks are gathered as they are read: padding the task would copy it
    chunks = index_batches(jnp.arange(examples.start, examples.stop), min(len(examples), _FORWARD_EXAMPLES), total)

    def of_chunk(indices):
        return transform(lambda weights: space.log_likelihood(weights, rows(task, indices)))(theta)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_chunk, chunks[0]))
    summed, _ = jax.lax.scan(lambda sums, chunk: (jax.tree.map(jnp.add, sums, of_chunk(chunk)), None), zeros, chunks)
    return summed


def sampled_gradient(space: StateSpace, theta: Array, task: Task, examples: int) -> tuple[Array, Array]:
    """Log likelihood of the whole task; its gradient from the first ``examples`` examples, scaled up."""
    if task.num_examples <= examples:
        return summed_log_likelihood(space, theta, task, jax.value_and_grad)
    part, rest = range(examples), range(examples, task.num_examples)
    value, gradient = summed_log_likelihood(space, theta, task, jax.value_and_grad, part)
    counted = jnp.sum(task.mask) / jnp.maximum(jnp.sum(task.mask[:examples]), 1)
    return value + summed_log_likelihood(space, theta, task, examples=rest), gradient * counted


@dataclass(frozen=True)
class ExactCurvature:
    """Every column of every example, in chunks; cost O(P (R + K)^2) a chunk of K columns. Exact at full rank.

    Args:
        batch_size: examples a chunk; by default as many as fit 64 MiB of columns and 1,024 columns.
    """

    batch_size: int | None = None

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; a whole number >= 1 is accepted")

    def gather(
        self,
        space: StateSpace,
        structure: Structure,
        theta: Array,
        task: Task,
        predicted: Any,
        power: Array,
        key: Array,
    ) -> Information:
        """Scan over chunks: evidence by ``log det(I + V^T Lambda^-1 V)`` against the precision so far, then gather."""
        del key
        batches = batched(task, self._batch(space, task))
        metric = predicted.precision_diagonal()

        def absorb(site: Any, chunk: Any) -> Information:
            new = jnp.sqrt(power) * columns(space, theta, one_batch(batches, *chunk))
            so_far = predicted if site is None else predicted.add(site)
            root = jnp.linalg.cholesky(jnp.eye(new.shape[1], dtype=new.dtype) + new.T @ so_far.solve(new))
            cut = structure.gather(site, new, metric)
            return Information(cut.precision, 2 * jnp.sum(jnp.log(jnp.diagonal(root))), cut.dropped_share)

        def step(total: Information, chunk: Any) -> tuple[Information, None]:
            added = absorb(total.site, chunk)
            gain, share = total.logdet_gain + added.logdet_gain, jnp.maximum(total.dropped_share, added.dropped_share)
            return Information(added.site, gain, share), None

        # the first chunk meets no site: columns of zeros would be decomposed for nothing
        first, rest = (jax.tree.map(part, (batches.data, batches.mask)) for part in (lambda a: a[0], lambda a: a[1:]))
        information, _ = jax.lax.scan(step, absorb(None, first), rest)
        return information

    def log_likelihood_and_gradient(self, space: StateSpace, theta: Array, task: Task) -> tuple[Array, Array]:
        """Both over all examples, in chunks."""
        return summed_log_likelihood(space, theta, task, jax.value_and_grad)

    def _batch(self, space: StateSpace, task: Task) -> int:
        if self.batch_size is not None:
            return min(self.batch_size, task.num_examples)
        per_example = factor_columns(space, task)
        allowed = min(_CHUNK_NUMBERS // space.layout.size, 1024) // per_example
        return max(min(allowed, task.num_examples), 1)
