"""Laplace-Gaussian filter: a Gaussian belief over the weights, carried from task to task (LR-LGF).

    predict    m' = a m + b,  Lambda' = (A Lambda^-1 A + Q)^-1
    update     m = argmin -power log p(D_t | theta) + 1/2 |theta - m'|^2_Lambda',   Lambda = Lambda' + G_t, cut to size

with G_t the generalised Gauss-Newton matrix of the whole task at m. Exact for programs that are linear in their weights
with Gaussian likelihoods and a structure that holds the precision. Source: Sliwa, Schneider, Bosch, Kristiadi, Hennig,
arXiv 2410.06800.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssm_nn.extraction import Layout, Program, StateSpace, describe, extract
from ssm_nn.inference.automatic import AutomaticEstimator
from ssm_nn.inference.batches import as_arrays, with_mask, without_masked
from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info, predict_belief
from ssm_nn.inference.checks import check_positive, check_support, check_task
from ssm_nn.inference.curvature import Curvature, ExactCurvature
from ssm_nn.inference.histories import History, InMemory, Recalled
from ssm_nn.inference.kronecker import Kronecker
from ssm_nn.inference.map_problem import NOT_CONVERGED, NOT_FINITE, MapEstimator, MapProblem, all_finite, norm
from ssm_nn.inference.posterior import Posterior
from ssm_nn.inference.sharding import ShardedProgram, checked_mesh, everywhere, on_mesh
from ssm_nn.inference.smoothing import smooth
from ssm_nn.inference.structures import Diagonal, LowRank, Structure
from ssm_nn.moments import Moments
from ssm_nn.tasks import Task, Tasks, as_task, each_task
from ssm_nn.weight_mesh import along_weights

__all__ = ["FilterWarning", "LaplaceFilter"]

Array = Any
Progress = Callable[[int, FilterState, Info], None]


class FilterWarning(UserWarning):
    """An update that did not go as it should: what happened, at which task, and what to try."""


class LaplaceFilter:
    """Filter and smoother of a task-sequence program.

    Args:
        program: a NumPyro program with ``ssm_nn.weights`` and a loop over tasks.
        structure: what is kept of the precision: ``LowRank(rank)``, ``Diagonal()``, ``Dense()`` or
            ``Kronecker()``.
        hypers: the value of every latent site of the program outside its weights.
        estimator: finds the MAP weights of a task: ``GaussNewton()``, ``Lbfgs()`` or ``Minibatch(optax...)``; by default the
            one that suits the task's size.
        curvature: gathers a task's information: ``ExactCurvature()`` (default), ``SketchedCurvature(...)``, or
            ``KroneckerCurvature(...)`` with (and only with) ``Kronecker()``, whose default it is.
        power: how often the likelihood counts, > 0; 1 is Bayes' rule, 1 / power is the temperature of a cold posterior.
            With another power the evidence is that of the tempered likelihood.
        mesh: a ``jax.sharding.Mesh``: beliefs are spread over its axis ``weights``, batches over its axis ``data``. For
            ``LowRank``, ``Diagonal`` and ``Kronecker``; weights lie in the order of ``inference.sharding.ShardedLayout``.
    """

    def __init__(
        self,
        program: Program,
        structure: Structure | None = None,
        *,
        hypers: Mapping[str, Any] | None = None,
        estimator: MapEstimator | None = None,
        curvature: Curvature | None = None,
        power: float = 1.0,
        mesh: Mesh | None = None,
    ):
        if not callable(program):
            raise ValueError(f"program is {program!r}; a NumPyro program, a function of the tasks, is accepted")
        check_positive(power=power)
        if structure is not None and not hasattr(structure, "cut_message"):
            raise ValueError(
                f"structure is {structure!r}; LowRank(rank), Diagonal(), Dense() and Kronecker() are accepted"
            )
        self.structure = LowRank(20) if structure is None else structure
        if mesh is not None and not isinstance(self.structure, LowRank | Diagonal | Kronecker):
            raise ValueError(f"mesh serves LowRank, Diagonal and Kronecker, not {self.structure}")
        self.mesh = None if mesh is None else checked_mesh(mesh)
        self.program = program if self.mesh is None else ShardedProgram(program, self.mesh)
        self.hypers = everywhere(self.program, _strongly_typed(hypers or {}))
        self.estimator = AutomaticEstimator() if estimator is None else estimator
        self.curvature = curvature or self.structure.curvature() or ExactCurvature()
        self.power = float(power)
        self._estimate = self.estimator.bind(self.program)
        self._first = jax.jit(self._first_belief)
        self._advance = jax.jit(self._predict)
        self._condition = jax.jit(self._laplace)
        self._supported = jax.jit(lambda hypers, task: check_support(self._space(hypers, task), task))

    def with_hypers(self, hypers: Mapping[str, Any]) -> LaplaceFilter:
        """The same engine at other hyper-parameters; nothing is compiled again."""
        other = copy(self)
        other.hypers = everywhere(self.program, _strongly_typed(hypers))
        return other

    def with_power(self, power: float) -> LaplaceFilter:
        """The same engine with the likelihood counted ``power`` times; nothing is compiled again."""
        check_positive(power=power)
        other = copy(self)
        other.power = float(power)
        return other

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> FilterState:
        """The belief before any task: the prior. Nothing is learnt from ``task``; it gives shapes and is checked.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task.
        """
        key = jax.random.key(int(key)) if isinstance(key, Integral) else key
        task = as_task(task)
        check_task(task)
        # raises on values of the context that an abstract trace would not see; one example is enough for that
        extract(self.program, Task(jax.tree.map(lambda a: a[:1], task.data), task.context), self.hypers)
        with on_mesh(self.mesh):
            prior = self._first(self.hypers, everywhere(self.program, as_arrays(task)))
        step, key = everywhere(self.program, (jnp.zeros((), jnp.int32), key))
        return FilterState(step, key, prior.mean, prior.precision)

    def update(self, state: FilterState, task: Task | Mapping[str, Any] | None) -> tuple[FilterState, Info]:
        """One task: predict, find the MAP weights, add the task's information, cut to size.

        A task without data (None, or a Task with a context only) is a prediction. If the MAP or the curvature is not
        finite the information of the task is left out, Info says so, and a FilterWarning is raised once.

        Raises:
            ValueError: for data that are not finite, or outside the likelihood's support.
        """
        with on_mesh(self.mesh):
            return self._update(state, task)

    def _update(self, state: FilterState, task: Task | Mapping[str, Any] | None) -> tuple[FilterState, Info]:
        began = time.perf_counter()
        task = as_arrays(as_task(task))
        check_task(task)
        task = everywhere(self.program, without_masked(task))
        next_key, map_key, curvature_key = jax.random.split(state.key, 3)
        moments, predicted, start = self._advance(self.hypers, state, task, map_key)
        self.structure.check_step(moments, predicted.precision)
        step = state.step + 1
        if not task.data:
            info = Info.without_data(moments, predicted.precision.no_information(), time.perf_counter() - began)
            return FilterState(step, next_key, predicted.mean, predicted.precision), info
        self._check_values(task)
        power = everywhere(self.program, jnp.asarray(self.power, predicted.mean.dtype))
        problem = MapProblem(predicted.mean, predicted.precision, with_mask(task), self.hypers, power)
        found = self._estimate(problem, start, map_key)
        status = found.status
        if status != NOT_FINITE:
            belief, site, numbers = self._condition(problem, found.shift, curvature_key)
            if bool(numbers["finite"]):
                info = Info(
                    moments=moments,
                    site=site,
                    log_evidence=float(numbers["log_evidence"]),
                    log_likelihood=float(numbers["log_likelihood"]),
                    gradient_norm=float(numbers["gradient_norm"]),
                    dropped_share=float(numbers["dropped_share"]),
                    steps=found.steps,
                    status=status,
                    seconds=time.perf_counter() - began,
                )
                self._warn(int(step) - 1, info)
                return FilterState(step, next_key, belief.mean, belief.precision), info
        info = Info.without_data(moments, predicted.precision.no_information(), time.perf_counter() - began)
        info = info._replace(status=NOT_FINITE, steps=found.steps, log_evidence=float("nan"))
        self._warn(int(step) - 1, info)
        return FilterState(step, next_key, predicted.mean, predicted.precision), info

    def run(
        self,
        key: Array,
        tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
        progress: Progress | None = None,
        history: History | None = None,
    ) -> Filtered:
        """All tasks one after another; equal to ``init`` and the ``update``s.

        Args:
            key: as for ``init``.
            tasks: a stack, a list or any iterator of tasks.
            progress: called after each task with its index, the state and the Info.
            history: where the beliefs of all tasks live: ``InMemory()`` (default), ``OnHost()`` or ``OnDisk(folder)``, which
                goes on behind the tasks that an earlier run has left there.
        """
        history = InMemory() if history is None else history
        state, layout, template, done, t = None, None, None, 0, -1
        for t, task in enumerate(each_task(tasks)):
            if state is None:
                state, layout = self.init(key, task), describe(self.program, task, self.hypers)
                done = history.begin(partial(self._entry_like, state, task), self._mark(layout, state))
            if template is not None and task.data:
                _check_like(t, task, template)
            template = task if task.data else template
            if t < done:
                state, info = history.get(t)
            else:
                state, info = self.update(state, task)
                history.put(t, (state, info))
            if progress is not None:
                progress(t, state, info)
        history.flush()
        assert layout is not None  # each_task raises for no task at all
        if type(history) is InMemory:
            states, infos = zip(*[history.get(i) for i in range(t + 1)], strict=True)
            return self.filtered(states, infos, layout)
        beliefs = Recalled(lambda i: _belief(history.get(i)[0]), range(t + 1))
        infos = Recalled(lambda i: history.get(i)[1], range(t + 1))
        return Filtered(self.program, layout, self.hypers, self.structure, beliefs, infos, history)

    def filtered(self, states: Sequence[FilterState], infos: Sequence[Info], layout: Layout | None = None) -> Filtered:
        """What ``run`` returns, from states and Infos gathered by hand with ``update``."""
        if len(states) != len(infos) or not states:
            raise ValueError(f"states has {len(states)} entries and infos {len(infos)}; one of each a task is accepted")
        layout = describe(self.program, Task(), self.hypers) if layout is None else layout
        return Filtered(
            self.program,
            layout,
            self.hypers,
            self.structure,
            tuple(_belief(state) for state in states),
            tuple(infos),
        )

    def smooth(self, filtered: Filtered) -> Posterior:
        """Rauch-Tung-Striebel means and covariances of every task given all tasks; needs no data."""
        with on_mesh(self.mesh):
            smoothed = smooth(filtered)
        return Posterior(smoothed.filtered, smoothed.means, smoothed.messages)

    def _entry_like(self, state: FilterState, task: Task) -> tuple[FilterState, Info]:
        """What a history keeps of a task, without its numbers."""
        with on_mesh(self.mesh):
            moments, predicted, _ = jax.eval_shape(self._predict, self.hypers, state, as_arrays(task), state.key)
        site = jax.eval_shape(lambda precision: precision.no_information(), predicted.precision)

        def placed(leaf: Any, like: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding)

        if self.mesh is not None:
            moments = jax.tree.map(lambda leaf: placed(leaf, state.mean), moments)
            site = jax.tree.map(placed, site, state.precision)
        return state, Info.without_data(moments, site, 0.0)

    def _mark(self, layout: Layout, state: FilterState) -> str:
        """What tells this run from another; addresses of functions differ from process to process."""
        hypers = {name: jnp.asarray(value).tolist() for name, value in sorted(self.hypers.items())}
        weights = [(site.name, site.shape) for site in layout.sites]
        parts = (self.structure, self.estimator, self.curvature, self.power, hypers, weights, state.mean.dtype)
        return re.sub(r" at 0x[0-9a-f]+", "", f"{parts} {jax.random.key_data(state.key).tolist()}")

    # the four compiled pieces

    def _space(self, hypers: Any, task: Task) -> StateSpace:
        return extract(self.program, task, hypers)

    def _first_belief(self, hypers: Any, task: Task) -> Belief:
        space = self._space(hypers, task)
        prior = Belief(space.prior_mean, self.structure.fitted(space, task).prior(space.prior_variance))
        return along_weights(prior, space.layout.size)

    def _predict(self, hypers: Any, state: FilterState, task: Task, key: Array) -> tuple[Moments, Belief, Array]:
        """Moments of the step, the predicted belief (the prior for the first task), and where the MAP search starts."""
        space = self._space(hypers, task)
        moments = space.moments

        before = Belief(state.mean, state.precision)
        predicted = jax.lax.cond(state.step == 0, lambda: before, lambda: predict_belief(before, moments))

        def first_start():
            # at the network's own weights, or a draw where these are zero: a zero mean is a saddle of a network's posterior
            drawn = predicted.mean + predicted.precision.sample(key)
            return jnp.where(jnp.any(space.initial != 0), space.initial, drawn) - predicted.mean

        start = jax.lax.cond(state.step == 0, first_start, lambda: jnp.zeros_like(predicted.mean))
        return along_weights((moments, predicted, start), space.layout.size)

    def _laplace(self, problem: MapProblem, shift: Array, key: Array) -> tuple[Belief, Any, dict[str, Array]]:
        space = self._space(problem.hypers, problem.task)
        theta = problem.mean + shift
        information = self.curvature.gather(
            space, self.structure, theta, problem.task, problem.precision, problem.power, key
        )
        log_likelihood, slope = self.curvature.log_likelihood_and_gradient(space, theta, problem.task)
        log_likelihood, slope = problem.power * log_likelihood, problem.power * slope
        cut = self.structure.cut(problem.precision.absorb(information.site))
        log_evidence = log_likelihood - 0.5 * problem.precision.quadratic(shift) - 0.5 * information.logdet_gain
        belief, site = along_weights((Belief(theta, cut.precision), information.site), space.layout.size)
        return (
            belief,
            site,
            {
                "log_evidence": log_evidence,
                "log_likelihood": log_likelihood,
                "gradient_norm": norm(problem.precision.matvec(shift) - slope),
                "dropped_share": jnp.maximum(information.dropped_share, cut.dropped_share),
                "finite": all_finite((belief, log_evidence)),
            },
        )

    def _check_values(self, task: Task) -> None:
        for name, ok in self._supported(self.hypers, task).items():
            if not bool(ok):
                raise ValueError(
                    f"the values observed at {name!r} lie outside the support of its likelihood "
                    "(for class labels: whole numbers from 0 to the number of outputs minus 1)"
                )

    def _warn(self, t: int, info: Info) -> None:
        if info.status in (NOT_CONVERGED, NOT_FINITE):
            warnings.warn(f"task {t}: {info.message}", FilterWarning, stacklevel=4)


def _belief(state: FilterState) -> Belief:
    return Belief(state.mean, state.precision)


def _strongly_typed(hypers: Mapping[str, Any]) -> dict[str, Array]:
    # a Python number is weakly typed, and each of the two kinds would be compiled for
    return {name: jnp.asarray(value, jnp.result_type(value)) for name, value in hypers.items()}


def _check_like(t: int, task: Task, template: Task) -> None:
    for name in template:
        if name not in task:
            raise ValueError(f"task {t} has no {name!r}; it has {sorted(task)}, earlier tasks {sorted(template)}")
        here, there = jnp.shape(task[name]), jnp.shape(template[name])
        if here[1:] != there[1:]:
            raise ValueError(f"task {t}: {name!r} holds examples of shape {here[1:]}, in earlier tasks {there[1:]}")
