"""A program without its weights: what is left for NUTS and SVI once the filter has integrated them out.

    p(h | D)  ∝  p(h) Z(h),    Z(h) = integral p(D | theta) p(theta | h) d theta      by the filter

h are the latent sites of the program outside its weights: kernel scales, noises, prior widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer
from numpyro import handlers
from numpyro.primitives import Messenger

from ssm_nn.extraction import Program
from ssm_nn.inference.checks import check_task
from ssm_nn.inference.diagnosis.kernel_evidence import kernel_evidence, kernel_resolves
from ssm_nn.inference.diagnosis.linear_outputs import LinearTasks, linear_tasks
from ssm_nn.inference.diagnosis.output_space import OutputSpace
from ssm_nn.inference.diagnosis.traced_filter import Evidence, TracedFilter
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.structures import Dense, LowRank
from ssm_nn.markov_path import MarkovPath
from ssm_nn.program import TaskBody
from ssm_nn.tasks import Task, Tasks, stack_tasks

__all__ = ["marginalize"]

Array = Any


def marginalize(program: Program, engine: LaplaceFilter, *, key: Array | int = 0) -> Callable[..., None]:
    """``p(h) Z(h)``: the program's own priors over its hyper-parameters, and the filter's log evidence as a factor.

    Exact where the filter is: programs that are linear in their weights with Gaussian likelihoods, and a structure that holds
    the precision. For networks Z is Laplace's approximation, task by task.

    A derivative costs O((T K)^3) for all T tasks where a program is linear in its weights, its likelihood normal and the T K
    outputs no more than the P weights (or 200), by ``Dense`` or a ``LowRank`` that cuts nothing off; O(P T K^2) a task for
    other programs whose outputs are as few, by Gauss-Newton searches; O(P^3) a task by ``Dense`` otherwise. In float32 the
    first two ways are taken only where data are not too sharp for it at the engine's ``hypers``; for networks take float64.

    ``MCMC(NUTS(marginalize(program, engine)), ...).run(key, tasks)`` samples h alone; ``condition`` fixes some of them. Beside
    them stand the deterministic sites ``log_evidence`` and ``unconverged_tasks``: draws where the latter is not 0 have an
    evidence, and a derivative, that is wrong by as much as the MAP search is. Where the evidence is not finite, the density
    is 0.

    Args:
        program: the NumPyro program.
        engine: a filter of this very program; its ``hypers`` say nothing of the posterior.
        key: of the filter's own random choices, the same at every h.

    Returns:
        A NumPyro model of the tasks (a stack, or a list to be stacked).

    Raises:
        ValueError: for an engine of another program, or one whose evidence has no derivative.
    """
    evidence_of = TracedFilter(engine)
    if engine.program is not program:
        one, other = _name(engine.program), _name(program)
        twin = " of the same name, which is another function" if one == other else ""
        raise ValueError(f"engine was made for the program {one}, not for {other}{twin}; build it on the same function")
    by_outputs, by_weights = (jax.jit(made.__call__) for made in (evidence_of, TracedFilter(engine, by_outputs=False)))

    by_kernel = jax.jit(partial(kernel_evidence, program, power=engine.power))

    def strong(value: Any) -> Array:  # a Python number is weakly typed, and would be compiled for once more
        return jnp.asarray(value, jnp.result_type(value))

    seed = jax.random.key(int(key)) if isinstance(key, Integral) else key

    def hyper_parameters_alone(tasks: Tasks | Iterable[Task | Mapping[str, Any]]) -> None:
        stack = stack_tasks(tasks)
        _check_data(stack)
        with handlers.trace() as trace, _WithoutWeights():
            program(stack)
        # those that condition has fixed, too
        hypers = {
            name: strong(site["value"])
            for name, site in trace.items()
            if site["type"] == "sample" and not isinstance(site["fn"], dist.Unit)  # a factor
        }
        with handlers.block():
            linear = _linear(engine, stack, hypers)
            if linear is not None:
                found = Evidence(by_kernel(linear, hypers), jnp.zeros((), int))
            else:
                evidence = by_outputs if _resolves(engine, stack, hypers) else by_weights
                found = evidence(hypers, stack, seed)
        numpyro.deterministic("log_evidence", found.log_evidence)
        numpyro.deterministic("unconverged_tasks", found.unconverged)
        finite = jnp.isfinite(found.log_evidence)
        numpyro.factor("log_evidence_of_tasks", jnp.where(finite, found.log_evidence, -jnp.inf))

    return hyper_parameters_alone


class _WithoutWeights(Messenger):
    """Keep the sites of ``weights`` and the loop over tasks from every handler outside; nothing of size T x P is made."""

    def __init__(self):
        super().__init__(None)

    def process_message(self, msg):
        if msg["type"] == "sample" and isinstance(msg["fn"], MarkovPath):
            msg["value"], msg["stop"] = np.broadcast_to(np.zeros((), np.float32), msg["fn"].event_shape), True
        elif msg["type"] == "control_flow":
            if not isinstance(msg["args"][0], TaskBody):
                raise ValueError(
                    "program has a scan of its own; only the loop over tasks of weights().over is accepted"
                )
            msg["value"], msg["stop"] = ((None, None, None), (_Unobserved(), None)), True


class _Unobserved:
    trace: dict[str, Any] = {}


def _check_data(stack: Tasks) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stack)):
        return
    on_host = jax.tree.map(np.asarray, stack)  # inside a trace, a slice of a device array would be traced
    for t in range(len(stack)):
        check_task(on_host.at(t))


def _linear(engine: LaplaceFilter, stack: Tasks, hypers: Mapping[str, Any]) -> LinearTasks | None:
    """The tasks by their Gram matrices, where the evidence is then the engine's own, not dearer, and precise enough."""
    structure, double = engine.structure, jax.dtypes.canonicalize_dtype(float) == np.float64
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stack))
    unknown = traced or set(hypers) - set(engine.hypers)
    if not isinstance(structure, Dense | LowRank) or (unknown and not double):
        return None
    with nullcontext() if traced else jax.ensure_compile_time_eval():
        made = linear_tasks(engine.program, stack, hypers)
        if made is None or not (unknown or kernel_resolves(engine.program, made, engine.hypers, engine.power)):
            return None
    few = min(made.num_elements, made.num_weights)
    return made if isinstance(structure, Dense) or structure.rank >= few else None


def _resolves(engine: LaplaceFilter, stack: Tasks, hypers: Mapping[str, Any]) -> bool:
    if set(hypers) - set(engine.hypers):  # nothing is known of where the tasks lie
        return jax.dtypes.canonicalize_dtype(float) == np.float64
    with jax.ensure_compile_time_eval():
        return OutputSpace(engine).resolves(stack)


def _name(program: Any) -> str:
    return getattr(program, "__name__", repr(program))
