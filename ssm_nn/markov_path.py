"""The distribution of one leaf's weights over all tasks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample
from numpyro.infer.reparam import Reparam
from numpyro.util import is_prng_key

from ssm_nn.coordinate_map import is_indices
from ssm_nn.moments import Moments, step_mean

__all__ = ["InnovationReparam", "MarkovPath", "never_moves"]


class MarkovPath(dist.Distribution):
    r"""``theta_0 ~ N(loc, scale^2)``, ``theta_t | theta_{t-1} ~ N(a_t theta_{t-1}[perm_t] + b_t, q_t)``.

    Event shape (T, *leaf). A frozen path (a kernel that never moves the leaf) is one value for all tasks: its event
    shape is (1, *leaf), so that samplers see no degenerate density. A kernel with zero noise on some coordinates of
    a moving leaf has no density there: sample it through ``numpyro.handlers.reparam`` with ``InnovationReparam``.

    Args:
        loc, scale: prior mean and standard deviation, broadcastable to ``leaf_shape``.
        moments: the step's moments; with ``per_task`` each array has a leading axis of T, entry t being the step
            into task t (entry 0 is not used by the path; an engine that traces one task reads it).
        num_tasks: T.
        leaf_shape: shape of the leaf.
        per_task: whether the moments differ from task to task.
        frozen: whether one value serves all tasks.
    """

    pytree_data_fields = ("loc", "scale", "moments")
    pytree_aux_fields = ("num_tasks", "leaf_shape", "per_task", "frozen")

    def __init__(
        self,
        loc: Any,
        scale: Any,
        moments: Moments,
        num_tasks: int,
        leaf_shape: tuple[int, ...],
        *,
        per_task: bool = False,
        frozen: bool = False,
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.moments = loc, scale, moments
        self.num_tasks, self.leaf_shape = num_tasks, tuple(leaf_shape)
        self.per_task, self.frozen = per_task, frozen
        length = 1 if frozen else num_tasks
        super().__init__((), (length, *self.leaf_shape), validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    def step_into(self, t: int) -> Moments:
        """Moments of the step into task ``t``."""
        return jax.tree.map(lambda m: m[t], self.moments) if self.per_task else self.moments

    def _later_steps(self) -> tuple[Moments, Any]:
        """Moments of the steps into tasks 1 .. T-1 and the vmap axes along which they run."""
        if self.per_task:
            return jax.tree.map(lambda m: m[1:], self.moments), 0
        return self.moments, None

    def path_from_innovations(self, innovations: Any) -> Any:
        """The path driven by standard normals (T, *leaf): theta_0 = loc + scale e_0, theta_t = mean_t + sqrt(q_t) e_t."""
        first = self.loc + self.scale * innovations[0]
        if self.frozen or self.num_tasks == 1:
            return first[None]
        steps, _ = self._later_steps()

        def step(value, inputs):
            noise, moments = inputs if self.per_task else (inputs, steps)
            value = jnp.asarray(step_mean(moments, value) + jnp.sqrt(moments.noise) * noise, first.dtype)
            return value, value

        inputs = (innovations[1:], steps) if self.per_task else innovations[1:]
        _, later = jax.lax.scan(step, first, inputs)
        return jnp.concatenate([first[None], later])

    def sample(self, key, sample_shape=()):
        assert key is not None
        assert is_prng_key(key)
        dtype = jnp.result_type(self.loc, self.scale, float)
        draws = jax.random.normal(key, (*sample_shape, *self.event_shape), dtype)
        flat = draws.reshape((-1, *self.event_shape))
        return jax.vmap(self.path_from_innovations)(flat).reshape(draws.shape)

    @validate_sample
    def log_prob(self, value):
        lead = value.shape[: value.ndim - len(self.event_shape)]
        flat = value.reshape((-1, *self.event_shape))
        return jax.vmap(self._log_prob_one)(flat).reshape(lead)

    def _log_prob_one(self, path):
        total = _normal_log_prob(path[0], self.loc, self.scale**2)
        if path.shape[0] == 1:
            return total
        steps, axes = self._later_steps()

        def step(moments, before, after):
            return _normal_log_prob(after, step_mean(moments, before), moments.noise)

        return total + jnp.sum(jax.vmap(step, in_axes=(axes, 0, 0))(steps, path[:-1], path[1:]))

    @property
    def mean(self):
        return self.path_from_innovations(jnp.zeros(self.event_shape))

    @property
    def variance(self):
        first = jnp.broadcast_to(jnp.square(self.scale), self.leaf_shape)
        if self.moments.permutation is not None and not is_indices(self.moments.permutation):
            raise NotImplementedError("the variances of a path turned by a matrix; draw paths and take theirs")
        values = [first]
        for t in range(1, self.event_shape[0]):
            step = self.step_into(t)
            before = step_mean(step._replace(gain=1.0, shift=0.0), values[-1])
            values.append(jnp.square(step.gain) * before + step.noise)
        return jnp.stack([jnp.broadcast_to(value, self.leaf_shape) for value in values])

    @staticmethod
    def infer_shapes(*args, **kwargs):
        raise NotImplementedError("MarkovPath has no batch shape: its event holds the whole leaf")


def _normal_log_prob(value, loc, variance):
    # no density where the step is deterministic: -inf off it, nan on it, which NUTS reports as an invalid start
    terms = -0.5 * (jnp.square(value - loc) / variance + jnp.log(2 * jnp.pi * variance))
    return jnp.sum(jnp.broadcast_to(terms, jnp.shape(value)))


def never_moves(moments: Moments) -> bool:
    """Whether the step is written as the identity: gain 1, shift 0, noise 0 as plain numbers, no permutation.

    Arrays do not count, whatever they hold: the shape of a site must not depend on the value of a hyper-parameter.
    """
    plain = all(isinstance(m, int | float) for m in (moments.gain, moments.shift, moments.noise))
    return plain and moments.permutation is None and tuple(moments[:3]) == (1, 0, 0)


class InnovationReparam(Reparam):
    """Sample a path's innovations, standard normals (T, *leaf), in its place; any noise is allowed, zero too.

    Use it as ``numpyro.handlers.reparam(program, config={"net.hidden.kernel": InnovationReparam()})``. It also mends
    the funnel between a small kernel scale and the path.
    """

    def __call__(self, name, fn, obs):
        if obs is not None:
            raise ValueError(f"{name!r} is observed; InnovationReparam takes latent paths")
        path, _, _ = self._unwrap(fn)
        if not isinstance(path, MarkovPath):
            raise ValueError(f"{name!r} is a {type(path).__name__}; InnovationReparam takes the sites of weights()")
        shape = path.event_shape
        innovations = numpyro.sample(f"{name}_innovations", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
        return None, path.path_from_innovations(innovations)
