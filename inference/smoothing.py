"""Smoother: the belief of every task given all tasks, from what the filter kept; no data are needed.

    mean         m^s_t = m_t + G_t (m^s_{t+1} - m'_{t+1})                         Rauch-Tung-Striebel
    precision    Lambda^s_t = Lambda_t + B_t,  B_t = A ((B_{t+1} + V_{t+1})^-1 + Q)^-1 A     backward information message

The message keeps the precision positive definite and never below the filter's at any rank, where the textbook recursion on
compressed marginals does not. Whole trajectories are drawn by backward sampling, exact under the filter's beliefs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Layout
from ssm_nn.inference.beliefs import Belief, Filtered, Info
from ssm_nn.inference.histories import InMemory, Recalled
from ssm_nn.inference.structures import Structure
from ssm_nn.moments import Moments
from ssm_nn.precision import permuted, step_mean_vector, unpermuted, unpermuted_vector

__all__ = ["Smoothed", "smooth"]

Array = Any


@dataclass(frozen=True)
class Smoothed:
    """The belief of each task given all tasks.

    Attributes:
        filtered: what it was made from.
        means: one (P,) a task.
        messages: the backward information of later tasks on each task; none for the last.

    Where the filter kept a history, all three are read from it or from one beside it, a task at a time.
    """

    filtered: Filtered
    means: Sequence[Array]
    messages: Sequence[Any]

    def __len__(self) -> int:
        return len(self.means)

    @property
    def program(self) -> Any:
        """The program."""
        return self.filtered.program

    @property
    def layout(self) -> Layout:
        """How the weights lie in one vector."""
        return self.filtered.layout

    @property
    def hypers(self) -> dict[str, Array]:
        """The program's hyper-parameters."""
        return self.filtered.hypers

    @cached_property
    def beliefs(self) -> Sequence[Belief]:
        """One Belief a task; a low-rank precision has twice the filter's rank."""
        recalled = Recalled(self._belief, range(len(self)))
        return tuple(recalled) if self.filtered.history is None else recalled

    def _belief(self, t: int) -> Belief:
        belief, message = self.filtered.beliefs[t], self.messages[t]
        if message is None:
            return Belief(self.means[t], belief.precision, belief.mean)
        precision = belief.precision.add(message)
        if len(belief.mean.sharding.device_set) > 1:  # on a mesh: laid out as the filter's
            precision = jax.tree.map(lambda new, like: jax.device_put(new, like.sharding), precision, belief.precision)
        return Belief(self.means[t], precision, belief.mean)

    def sample_path(self, key: Array) -> Array:
        """One draw (T, P) of all tasks' weights together, by backward sampling."""
        keys = jax.random.split(key, len(self))
        last, later = self.filtered.entry(-1)
        path = [last.mean + _sample(last.precision, keys[-1])]
        for t in range(len(self) - 2, -1, -1):
            belief, info = self.filtered.entry(t)
            path.append(_sample_before(belief, later.moments, path[-1], keys[t]))
            later = info
        return jnp.stack(path[::-1])

    def log_density(self, path: Array) -> Array:
        """Log density of a path (T, P) under the distribution that ``sample_path`` draws from.

        Coordinates that a step determines (zero noise) count once, in the later task.
        """
        last, later = self.filtered.entry(-1)
        residual = path[-1] - last.mean
        total = 0.5 * (
            last.precision.logdet() - last.precision.quadratic(residual) - residual.size * jnp.log(2 * jnp.pi)
        )
        for t in range(len(self) - 2, -1, -1):
            belief, info = self.filtered.entry(t)
            total = total + _log_density_before(belief, later.moments, path[t], path[t + 1])
            later = info
        return total


def smooth(filtered: Filtered) -> Smoothed:
    """Smooth all tasks backwards; O(T P R^2) time, and where the filter kept a history, memory that does not grow with T."""
    kept = InMemory() if filtered.history is None else filtered.history.beside("smoothed")
    end = len(filtered) - 1
    last, later = filtered.entry(end)
    mean, message = last.mean, None
    for t in range(end - 1, -1, -1):
        belief, info = filtered.entry(t)
        mean, message = _step(filtered.structure, belief, later.moments, later.site, mean, message)
        later = info
        if t == end - 1:
            kept.begin(lambda first=(mean, message): first, "smoothed")
        kept.put(t, (mean, message))
    kept.flush()
    means = Recalled(lambda t: kept.get(t)[0] if t < end else filtered.beliefs[end].mean, range(end + 1))
    messages = Recalled(lambda t: kept.get(t)[1] if t < end else None, range(end + 1))
    if filtered.history is None:
        return Smoothed(filtered, tuple(means), tuple(messages))
    return Smoothed(filtered, means, messages)


def smooth_means(filtered: Filtered) -> tuple[Array, ...]:
    """The smoothed means alone; O(T P R^2) without the compression of messages."""
    belief, later = filtered.entry(-1)
    means = [belief.mean]
    for t in range(len(filtered) - 2, -1, -1):
        belief, info = filtered.entry(t)
        means.append(_mean_before(belief, later.moments, means[-1]))
        later = info
    return tuple(means[::-1])


@partial(jax.jit, static_argnums=0)
def _step(
    structure: Structure, belief: Belief, moments: Moments, site: Any, mean_after: Array, message_after: Any
) -> tuple[Array, Any]:
    """Smoothed mean of task t and the message that it receives."""
    mean = _mean_before(belief, moments, mean_after)
    after = site if message_after is None else message_after.add(site)
    message = unpermuted(permuted(belief.precision, moments).message_before(after, moments), moments)
    return mean, structure.cut_message(message, belief.precision)


@jax.jit
def _mean_before(belief: Belief, moments: Moments, mean_after: Array) -> Array:
    innovation = mean_after - step_mean_vector(moments, belief.mean)
    return belief.mean + _gain(belief, moments, innovation)


def _gain(belief: Belief, moments: Moments, innovation: Array) -> Array:
    return unpermuted_vector(moments, permuted(belief.precision, moments).smoother_gain(moments, innovation))


@jax.jit
def _sample(precision: Any, key: Array) -> Array:
    return precision.sample(key)


@jax.jit
def _sample_before(belief: Belief, moments: Moments, after: Array, key: Array) -> Array:
    """theta_t given theta_{t+1} = after: N(m_t + G_t (after - m'_{t+1}), H_t)."""
    noise = permuted(belief.precision, moments).sample_conditional(moments, key)
    return _mean_before(belief, moments, after) + unpermuted_vector(moments, noise)


@jax.jit
def _log_density_before(belief: Belief, moments: Moments, here: Array, after: Array) -> Array:
    residual = here - _mean_before(belief, moments, after)
    residual = residual if moments.permutation is None else moments.permutation(residual)
    return permuted(belief.precision, moments).conditional_log_density(moments, residual)


def filter_statistics(infos: Iterable[Info]) -> dict[str, list[float]]:
    """The numbers of every Info, by name."""
    names = ("log_evidence", "log_likelihood", "gradient_norm", "dropped_share", "steps", "status", "seconds")
    rows = [[getattr(info, name) for name in names] for info in infos]
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
