"""The mean-field belief after every batch, and its smoother with a constant gain.

    m^s_t = m_t + (1 - rho) (m^s_{t+1} - m_-_{t+1}),   v^s_t = v_t + (1 - rho)^2 (v^s_{t+1} - v_-_{t+1})

under the window alone, since the gain of its kernel is 1 - rho whatever the belief; behind another kernel of the program (gain
a, noise q) it is (1 - rho) a v_t / (a^2 v_t + q). Filter and window are one linear-Gaussian chain, ``forgetting_moments``
and the kernel's moments composed, so the smoother, its guide and its DataTree are those of the other engines. Meant for tens
or hundreds of batches: every belief is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import describe, extract
from ssm_nn.inference.batches import as_arrays, with_mask
from ssm_nn.inference.beliefs import Filtered, Info
from ssm_nn.inference.map_problem import FIXED_BUDGET, NOT_FINITE
from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Gaussian, forget, forgetting_moments
from ssm_nn.inference.mean_field.states import MeanFieldState
from ssm_nn.inference.posterior import Posterior
from ssm_nn.inference.smoothing import smooth
from ssm_nn.inference.structures import Diagonal
from ssm_nn.moments import Moments
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.tasks import Task, as_task

__all__ = ["filter_path", "posterior_of", "smooth_path"]

Array = Any


def filter_path(
    engine: MeanFieldFilter, start: MeanFieldState | Array, batches: Iterable[Task | Mapping[str, Any]]
) -> Filtered:
    """One belief a batch, as ``init`` and the ``update``s give them.

    Args:
        engine: the filter.
        start: a state, or a key or seed for ``init``.
        batches: each batch is one task of the program.

    Returns:
        Filtered; in its Infos ``log_evidence`` is the log predictive density by the draws, ``log_likelihood`` its mean over
        them (minus the free energy), and the search for a maximum, of which there is none, says nothing.
    """
    state, layout = start, None
    beliefs, infos = [], []
    advance = jax.jit(partial(_advance, engine))
    for raw in batches:
        batch = as_arrays(as_task(raw))
        if not isinstance(state, MeanFieldState):
            state = engine.init(state, batch)
        layout = describe(engine.program, batch, engine.hypers) if layout is None else layout
        began = time.perf_counter()
        moments, predicted = advance(engine.hypers, state, with_mask(batch))
        before, (state, said) = state, engine.update(state, batch)
        failed = bool(len(said.left_out))
        if failed:  # the belief stood still
            moments, predicted = _still(moments), Gaussian(before.mean, before.sigma)
        site = DiagonalPrecision(1 / jnp.square(state.sigma) - 1 / jnp.square(predicted.sigma))
        beliefs.append(engine.belief(state))
        infos.append(
            Info(
                moments=moments,
                site=site,
                log_evidence=float(said.log_predictive[0]),
                log_likelihood=-float(said.free_energy[0]),
                gradient_norm=math.nan,
                dropped_share=0.0,
                steps=1,
                status=NOT_FINITE if failed else FIXED_BUDGET,
                seconds=time.perf_counter() - began,
            )
        )
    if layout is None:
        raise ValueError("batches is empty; at least one batch is needed")
    return Filtered(engine.program, layout, engine.hypers, Diagonal(), tuple(beliefs), tuple(infos))


def smooth_path(filtered: Filtered) -> Posterior:
    """The belief after each batch given all batches; needs no data. ``guide`` and ``to_datatree`` come with it.

    A leaf with the kernel ``Static()`` is one value to the program: its draws are those after the last batch.
    """
    smoothed = smooth(filtered)
    return Posterior(smoothed.filtered, smoothed.means, smoothed.messages)


def posterior_of(engine: MeanFieldFilter, state: MeanFieldState, batch: Task | Mapping[str, Any]) -> Posterior:
    """The belief of ``state`` alone as a posterior of one task; ``batch`` gives shapes."""
    task = as_arrays(as_task(batch))
    layout = describe(engine.program, task, engine.hypers)
    nothing = jnp.zeros_like(state.mean)
    info = Info.without_data(Moments(1.0 + nothing, nothing, nothing), DiagonalPrecision(nothing), 0.0)
    return smooth_path(Filtered(engine.program, layout, engine.hypers, Diagonal(), (engine.belief(state),), (info,)))


def _advance(engine: MeanFieldFilter, hypers: Any, state: MeanFieldState, batch: Task) -> tuple[Moments, Gaussian]:
    """The kernel's step and the window's as one, and the belief that they predict."""
    space = extract(engine.program, batch, hypers)
    moved = state.step > 0
    gain = jnp.where(moved, space.moments.gain, 1.0)
    shift, noise = (jnp.where(moved, moment, 0.0) for moment in space.moments[1:3])
    belief = Gaussian(gain * state.mean + shift, jnp.sqrt(jnp.square(gain * state.sigma) + noise))
    if engine.window is None:
        return Moments(gain, shift, noise), belief
    prior = Gaussian(space.prior_mean, jnp.sqrt(space.prior_variance))
    rho = engine.window.rate(jnp.sum(batch.mask))
    fade = forgetting_moments(belief, prior, rho)
    made = Moments(fade.gain * gain, fade.gain * shift + fade.shift, jnp.square(fade.gain) * noise + fade.noise)
    return made, forget(belief, prior, rho)


def _still(moments: Moments) -> Moments:
    return Moments(jnp.ones_like(moments.gain), jnp.zeros_like(moments.shift), jnp.zeros_like(moments.noise))
