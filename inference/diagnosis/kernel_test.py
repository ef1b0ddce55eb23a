"""Do the weights move as the kernel says? The smoothed disturbances against their own covariance.

    r_t = Lambda' (m^s_t - m')  ~  N(0, D_t),    D_t = Lambda' - Lambda' S^s Lambda'       under the program
    d log Z / d q_i  =  1/2 sum_t (r_ti^2 - D_tii)

r_t is what all data say of the step into task t. Larger than D_t: the weights move further than the kernel lets them; smaller:
less far. By leaf, the sum of squares is compared with a chi^2 of the same two moments (Satterthwaite). Exact for programs that
are linear in their weights with Gaussian likelihoods; finite at noise 0, too, so that it also judges leaves that stand still.
Source: Harvey and Koopman 1992 (auxiliary residuals), here by precisions as in ``inference/disturbances.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2

from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.diagnosis.trajectories import check_smoothed
from ssm_nn.inference.disturbances import parallel_sum
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.moments import Moments
from ssm_nn.precision import permuted, step_mean_vector

__all__ = ["KernelTest", "kernel_test"]

Array = Any

_PROBES = 64  # of the trace of D^2: a relative error of an eighth at worst


class KernelTest(NamedTuple):
    """One leaf's steps, all of them together.

    Attributes:
        ratio: sum r^2 over sum D; above 1 the leaf moves further than its kernel says.
        p_too_small: of so large a ratio if the kernel were right; ``p_too_large`` of so small a one.
        slope: d log Z / d log q, in nats: what the evidence gains for each factor of e of the leaf's noise; 0 at noise 0.
        still: whether the kernel gives the leaf no noise.
    """

    ratio: float
    p_too_small: float
    p_too_large: float
    slope: float
    still: bool


def kernel_test(posterior: Smoothed, key: int = 0) -> dict[str, KernelTest]:
    """By site of the weights. Empty for a single task. O(T P R^2).

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        key: of the random probes by which traces of D^2 are estimated.

    Raises:
        ValueError: for another object.
    """
    check_smoothed(posterior)
    filtered, sites = posterior.filtered, posterior.layout.sites
    labels = jnp.asarray(np.repeat(np.arange(len(sites)), [site.stop - site.start for site in sites]))
    sums = np.zeros((4, len(sites)))
    noise = np.zeros(posterior.layout.size)
    for t in range(len(posterior) - 1):
        later = filtered.infos[t + 1]
        step_key = jax.random.fold_in(jax.random.key(key), t)
        belief = Belief(filtered.beliefs[t].mean, filtered.beliefs[t].precision)
        after = posterior.messages[t + 1]
        sums += np.asarray(
            _of_step(len(sites), labels, belief, later.moments, later.site, after, posterior.means[t + 1], step_key),
            float,
        )
        noise += np.asarray(later.moments.noise, float)
    if len(posterior) == 1:
        return {}
    return {
        site.name: _judged(*sums[:, i], still=not noise[site.start : site.stop].any()) for i, site in enumerate(sites)
    }


def _judged(squares: float, expected: float, trace_of_square: float, slope: float, *, still: bool) -> KernelTest:
    if expected == 0 or trace_of_square == 0:  # no data after the first task
        return KernelTest(1.0, 1.0, 1.0, 0.0, still)
    degrees = expected**2 / trace_of_square
    place = squares / expected * degrees
    return KernelTest(
        squares / expected, float(chi2.sf(place, degrees)), float(chi2.cdf(place, degrees)), float(slope), still
    )


@partial(jax.jit, static_argnums=0)
def _of_step(
    groups: int, labels: Array, belief: Belief, moments: Moments, site: Any, message: Any, mean_after: Array, key: Array
) -> Array:
    """By leaf: r^2, diag D, the trace of the square of its block of D, and q (r^2 - diag D) / 2."""
    prediction = permuted(belief.precision, moments).predict(moments)
    shared = parallel_sum(prediction, site if message is None else message.add(site))
    r = prediction.matvec(mean_after - step_mean_vector(moments, belief.mean))
    expected = shared.precision_diagonal()
    signs = jax.random.rademacher(key, (_PROBES, r.shape[0]), r.dtype)

    def leaf_sum(x: Array) -> Array:
        return jax.ops.segment_sum(x, labels, groups)

    def traces(sign: Array) -> Array:
        def of_leaf(leaf: Array) -> Array:
            inside = labels == leaf
            return jnp.sum(jnp.square(jnp.where(inside, shared.matvec(jnp.where(inside, sign, 0.0)), 0.0)))

        return jax.lax.map(of_leaf, jnp.arange(groups))

    squared = jnp.mean(jax.lax.map(traces, signs), axis=0)
    square = jnp.square(r)
    return jnp.stack([leaf_sum(square), leaf_sum(expected), squared, leaf_sum(moments.noise * (square - expected) / 2)])
