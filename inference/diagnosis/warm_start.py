"""NUTS on the full program, started where the smoother ended: its mean, and its covariance as the metric."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_value

from ssm_nn.extraction import Program
from ssm_nn.inference.diagnosis.path_moments import path_moments
from ssm_nn.inference.diagnosis.trajectories import check_smoothed
from ssm_nn.inference.draws import leaves_of_path
from ssm_nn.inference.smoothing import Smoothed

__all__ = ["warm_start"]

Array = Any


def warm_start(program: Program, posterior: Smoothed, *, dense: bool = False) -> dict[str, Any]:
    """Arguments of NUTS: ``MCMC(NUTS(program, **warm_start(program, posterior)), ...)``.

    The chain starts at the smoothed means and the engine's hyper-parameters; the inverse mass matrix of the weights is the
    smoother's covariance. Where the program has no hyper-parameters the metric is kept as it is, so that a short warm-up
    suffices; otherwise NUTS adapts it from there.

    Args:
        program: the posterior's own program.
        posterior: what ``LaplaceFilter.smooth`` returned.
        dense: the whole covariance, of up to 5,000 numbers over all tasks, rather than its diagonal.

    Raises:
        ValueError: for another program, weights that move without noise (NUTS has no density there), too many weights.
    """
    check_smoothed(posterior)
    if posterior.program is not program:
        raise ValueError(
            "program is not the one that the posterior was made with; pass posterior.program's own function"
        )
    layout, tasks = posterior.layout, len(posterior)
    still = [s.name for s in layout.sites if not s.frozen and _without_noise(posterior, s.start, s.stop)]
    if still:
        raise ValueError(
            f"program: the weights {', '.join(still)} move without noise, where NUTS has no density; use Static(), or sample "
            "their innovations (InnovationReparam)"
        )
    values = {name: jnp.asarray(leaf) for name, leaf in leaves_of_path(layout, jnp.stack(posterior.means)).items()}
    sites = sorted(layout.sites, key=lambda site: site.name)
    if dense:
        covariance = path_moments(posterior).covariance.reshape(tasks * layout.size, -1)
        places = np.concatenate([_places(site, tasks, layout.size) for site in sites])
        matrix = covariance[np.ix_(places, places)]
        names = tuple(site.name for site in sites)
        metric: dict[Any, Array] = {names: jnp.asarray(matrix, values[names[0]].dtype)}
    else:
        variance = jnp.stack([belief.precision.variance() for belief in posterior.beliefs])
        spread = leaves_of_path(layout, variance)
        metric = {(site.name,): jnp.ravel(spread[site.name]) for site in sites}
    return {
        "init_strategy": init_to_value(values={**posterior.hypers, **values}),
        "inverse_mass_matrix": metric,
        "dense_mass": list(metric) if dense else False,
        "adapt_mass_matrix": bool(posterior.hypers),
    }


def _places(site: Any, tasks: int, size: int) -> np.ndarray:
    """Where the coordinates of a site lie in a trajectory laid out flat."""
    first = tasks - 1 if site.frozen else 0
    return (np.arange(first, tasks)[:, None] * size + np.arange(site.start, site.stop)).ravel()


def _without_noise(posterior: Smoothed, start: int, stop: int) -> bool:
    infos = posterior.filtered.infos[1:]
    return any(bool(np.any(np.asarray(info.moments.noise)[start:stop] <= 0)) for info in infos)
