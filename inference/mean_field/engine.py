"""Mean-field filter of a stream of batches: metaplastic learning without task boundaries (MESU).

    predict    the program's kernel, then the window:  lambda_- = (1 - rho) lambda + rho lambda_p          (``forgetting``)
    update     mu, sigma  <-  rule(m_-, v_-, g, H),   g = dC/dmu, H = (dC/dsigma) / sigma                  (``rules``)

with C = E_q[- sum over the batch of log p(y | x, w)] and rho = B / window. For a model that is linear in its weights with
Gaussian noise, and examples that each meet one weight, the natural rule is the Kalman filter of that kernel. Sources: Bonnet
et al., "Bayesian continual learning and forgetting in neural networks", arXiv 2504.13569; arXiv 2312.10153.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssm_nn.extraction import Program, StateSpace, extract
from ssm_nn.inference.batches import as_arrays, rows, with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checkpoints import load, save
from ssm_nn.inference.checks import check_count, check_support, check_task
from ssm_nn.inference.laplace import FilterWarning
from ssm_nn.inference.mean_field.forgetting import Gaussian, Window
from ssm_nn.inference.mean_field.gradients import Estimator, LocalReparameterisation, Outcome
from ssm_nn.inference.mean_field.rules import FixedPoint, UpdateRule
from ssm_nn.inference.mean_field.starts import FanIn, Start
from ssm_nn.inference.mean_field.states import QUANTILES, MeanFieldInfo, MeanFieldState
from ssm_nn.inference.mean_field.streams import Batches, Block, blocks_of
from ssm_nn.inference.predictive import Method, Prediction, ThroughNetwork, predict_from
from ssm_nn.inference.sharding import ShardedProgram, checked_mesh, everywhere, gathered
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.tasks import Task, as_task

__all__ = ["Checkpoint", "MeanFieldFilter"]

Array = Any
Tree = dict[str, dict[str, Array]]
Progress = Callable[[int, MeanFieldState, MeanFieldInfo], None]


class Checkpoint(NamedTuple):
    """Where and how often ``run`` saves its state: ``path`` (an npz file), every so many batches."""

    path: str | Path
    every: int


class MeanFieldFilter:
    """Mean-field filter of a program, batch by batch.

    Args:
        program: a NumPyro program with ``ssm_nn.weights`` and a loop over tasks; every batch is a task to it, so that its
            kernel moves the weights once a batch. ``Static()`` leaves forgetting to the window.
        window: ``Window(examples)``; None forgets nothing beyond the program's kernel.
        rule: ``FixedPoint()``, ``FirstOrder()`` (MESU as published), ``Natural()`` or ``Ivon()``.
        estimator: ``LocalReparameterisation(draws)`` or ``WeightSampling(draws)``.
        start: ``FanIn()``, ``OwnWeights(sigma)`` or ``AtPrior()``.
        trust: c > 0, |mu - m_-| <= c sqrt(v_-) and |sigma - sqrt(v_-)| <= c sqrt(v_-) / 2 in every step; inf for no limit.
        hypers: the value of every latent site of the program outside its weights.
        mesh: a ``jax.sharding.Mesh``: beliefs are spread over its axis ``weights``, batches over its axis ``data``; see
            ``LaplaceFilter``.
    """

    def __init__(
        self,
        program: Program,
        window: Window | None = None,
        *,
        rule: UpdateRule = FixedPoint(),  # noqa: B008  (it has no fields)
        estimator: Estimator = LocalReparameterisation(),  # noqa: B008  (two numbers)
        start: Start = FanIn(),  # noqa: B008  (two numbers)
        trust: float = 1.0,
        hypers: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
    ):
        if not callable(program):
            raise ValueError(f"program is {program!r}; a NumPyro program, a function of the tasks, is accepted")
        if window is not None and not isinstance(window, Window):
            raise ValueError(f"window is {window!r}; Window(examples) and None are accepted")
        for name, value, method, accepted in (
            ("rule", rule, "update", "FixedPoint(), FirstOrder(), Natural() and Ivon()"),
            ("estimator", estimator, "gather", "LocalReparameterisation(draws) and WeightSampling(draws)"),
            ("start", start, "belief", "FanIn(), OwnWeights(sigma) and AtPrior()"),
        ):
            if not hasattr(value, method):
                raise ValueError(f"{name} is {value!r}; {accepted} are accepted")
        if not trust > 0:
            raise ValueError(f"trust is {trust}; a number > 0 is accepted, inf for no limit")
        self.program = program if mesh is None else ShardedProgram(program, checked_mesh(mesh))
        self.window, self.rule, self.estimator = window, rule, estimator
        self.start, self.trust = start, float(trust)
        self.hypers = everywhere(
            self.program, {n: jnp.asarray(v, jnp.result_type(v)) for n, v in (hypers or {}).items()}
        )
        self._begin = jax.jit(self._first)
        self._learn = jax.jit(partial(self._block, False))
        self._learn_guarded = jax.jit(partial(self._block, True))
        self._supported = jax.jit(lambda hypers, task: check_support(extract(self.program, task, hypers), task))

    def init(self, key: Array, batch: Task | Mapping[str, Any]) -> MeanFieldState:
        """The belief before any batch. Nothing is learnt from ``batch``; it gives shapes and is checked.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            batch: one or more examples.
        """
        key = jax.random.key(int(key)) if isinstance(key, Integral) else key
        task = as_arrays(as_task(batch))
        check_task(task)
        if not task.num_examples:
            raise ValueError("batch has no examples; one or more are needed to see their shapes")
        space = extract(self.program, task, self.hypers)  # raises on values that an abstract trace would not see
        if space.moments.permutation is not None:
            raise ValueError(
                "the program's kernel maps coordinates (Permuted, Rotated) at every step, and a mean-field filter steps once "
                "a batch; kernels with gain, shift and noise are accepted"
            )
        state = self._begin(self.hypers, *everywhere(self.program, (task, key)))
        self._check_state(state)
        return state

    def update(self, state: MeanFieldState, batch: Task | Mapping[str, Any]) -> tuple[MeanFieldState, MeanFieldInfo]:
        """One batch: predict, and update by its expected gradient and curvature.

        A step that is not finite, or that would leave a sigma that is not positive, is left out: the state is kept but for
        its step number, Info says so, and a FilterWarning is raised.

        Raises:
            ValueError: for data that are not finite or outside the likelihood's support, a batch longer than the window, a
                state with a sigma that is not positive.
        """
        task = as_arrays(as_task(batch))
        check_task(task)
        if not task.num_examples:
            raise ValueError("batch has no examples; one or more are accepted")
        self._check_state(state)
        indices = np.arange(task.num_examples, dtype=np.int32)[None]
        return self._one_block(state, Block(with_mask(task), indices, 1))

    def run(
        self,
        start: MeanFieldState | Array,
        batches: Batches | Iterable[Task | Mapping[str, Any]],
        *,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[MeanFieldState, MeanFieldInfo]:
        """Many batches, in compiled loops; equal to the ``update``s.

        Args:
            start: a state, or a key or seed for ``init``.
            batches: ``Batches(task, size)`` for arrays that are at hand, or any iterable of batches: a list, a generator, a
                data loader. Batches with data that are not finite are left out, with a FilterWarning.
            progress: called after each block of batches with the number done, the state, and the block's Info.
            checkpoint: save as you go; where the file exists already, go on from it, with the same ``start`` and ``batches``
                as before. The result is the same to the last bit.

        Returns:
            The state, and the Info of all batches (those before a resumed checkpoint left out).

        Raises:
            ValueError: for no batches at all, and as for ``update``.
        """
        if not isinstance(start, MeanFieldState):
            if isinstance(batches, Batches):
                first = batches.task
            else:
                iterator = iter(batches)
                first = next(iterator, None)
                if first is None:
                    raise ValueError("batches is empty; at least one batch is needed")
                batches = itertools.chain([first], iterator)
            start = self.init(start, first)
        self._check_state(start)
        state, done = start, 0
        if checkpoint is not None:
            check_count(every=checkpoint.every)
            if Path(checkpoint.path).exists():
                state = load(checkpoint.path, start)
                done = int(state.step) - int(start.step)
                if done < 0:
                    raise ValueError(f"the checkpoint {checkpoint.path} is older than the state that run starts from")
        infos: list[MeanFieldInfo] = []
        for block in blocks_of(batches, done, checkpoint.every if checkpoint is not None else None):
            state, info = self._one_block(state, block)
            infos.append(info)
            done += block.count
            if checkpoint is not None and done % checkpoint.every == 0:
                save(checkpoint.path, state)
            if progress is not None:
                progress(done, state, info)
        if not infos and not done:
            raise ValueError("batches is empty; at least one batch is needed")
        return state, MeanFieldInfo.join(infos) if infos else MeanFieldInfo.nothing()

    def belief(self, state: MeanFieldState) -> Belief:
        """N(mean, diag sigma^2), as the other engines have it."""
        return Belief(state.mean, DiagonalPrecision(1 / jnp.square(state.sigma)))

    def predict(
        self,
        state: MeanFieldState,
        task: Task | Mapping[str, Any],
        *,
        method: Method = ThroughNetwork(),  # noqa: B008  (a number)
        key: Array | int = 0,
    ) -> dict[str, Prediction]:
        """Predict the examples of ``task``, by site; aleatoric and epistemic parts of their entropy included.

        A mean field learnt by sampling belongs to the network itself: draws go through it, and not through its linearisation.
        """
        return predict_from(self.program, self.hypers, self.belief(state), task, method=method, key=key)

    # one block on the host

    def _one_block(self, state: MeanFieldState, block: Block) -> tuple[MeanFieldState, MeanFieldInfo]:
        if self.window is not None:
            self.window.check_batch(block.indices.shape[1])
        for name, ok in self._supported(self.hypers, block.task).items():
            if not bool(ok):
                raise ValueError(
                    f"the values observed at {name!r} lie outside the support of its likelihood "
                    "(for class labels: whole numbers from 0 to the number of outputs minus 1)"
                )
        # a sigma that turns negative may turn back inside a block, where the trust region allows it
        learn = self._learn if self.trust < 2 else self._learn_guarded
        block = block._replace(task=everywhere(self.program, block.task))
        inputs = (self.hypers, state, block.task, block.indices, np.int32(block.count))
        made, outcome, numbers = learn(*inputs)
        if self.trust < 2 and not bool(numbers["healthy"]):
            made, outcome, numbers = self._learn_guarded(*inputs)
        sigma = numbers["sigma"]  # by leaf: a mesh fills the vector up
        left_out = np.flatnonzero(np.asarray(numbers["failed"])[: block.count])
        self._warn(int(state.step), block, left_out)
        records = (np.asarray(record)[: block.count] for record in outcome)
        return made, MeanFieldInfo(
            *records,
            divergence=float(numbers["divergence"]),
            clipped_share=float(numbers["clipped_share"]),
            sigma_quantiles=np.quantile(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sigma)]), QUANTILES),
            left_out=left_out,
        )

    def _warn(self, step: int, block: Block, left_out: np.ndarray) -> None:
        if not len(left_out):
            return
        reason = (
            "lower trust, or take the rule FixedPoint(); first-order sigma turns negative where sigma dC/dsigma >= 2"
        )
        try:
            check_task(jax.tree.map(np.asarray, rows(block.task, block.indices[left_out[0]])))
        except ValueError as error:
            reason = str(error).replace("of the task", "of the batch")
        numbers = ", ".join(str(step + int(number)) for number in left_out[:5])
        warnings.warn(
            f"batch {numbers}{', ...' if len(left_out) > 5 else ''} ({len(left_out)} in all): the step is not finite or leaves "
            f"no positive sigma, and was left out, the state kept: {reason}",
            FilterWarning,
            stacklevel=4,
        )

    def _check_state(self, state: MeanFieldState) -> None:
        if not bool(jnp.all((state.sigma > 0) & jnp.isfinite(state.sigma) & jnp.isfinite(state.mean))):
            raise ValueError(
                f"state has {int(jnp.sum(~(state.sigma > 0)))} weights whose sigma is not positive, or numbers that are not "
                "finite; sigma > 0 is accepted"
            )

    # the compiled pieces

    def _first(self, hypers: Any, task: Task, key: Array) -> MeanFieldState:
        start_key, draws_key = jax.random.split(key)
        belief = self.start.belief(extract(self.program, task, hypers), with_mask(task), start_key)
        zero = jnp.zeros((), jnp.int32)
        return MeanFieldState(zero, zero, draws_key, belief.mean, belief.sigma)

    def _block(
        self, guarded: bool, hypers: Any, state: MeanFieldState, task: Task, indices: Array, count: Array
    ) -> tuple[MeanFieldState, Outcome, dict[str, Array]]:
        """``count`` batches one after another; the last stands outside the loop, and says more of itself."""
        layout = extract(self.program, task, hypers).layout
        length = indices.shape[0]

        def one(number: Array, mean: Tree, sigma: Tree) -> tuple[Tree, Tree, Outcome, dict[str, Array]]:
            batch = rows(task, indices[number])
            new_mean, new_sigma, outcome, said = self._step(hypers, mean, sigma, batch, state.step + number, state.key)
            if guarded:
                ok = _healthy(new_mean, new_sigma) & jnp.isfinite(outcome.free_energy)
                new_mean, new_sigma = jax.tree.map(
                    lambda new, old: jnp.where(ok, new, old), (new_mean, new_sigma), (mean, sigma)
                )
                said["failed"] = ~ok
            return new_mean, new_sigma, outcome, said

        def loop(number: Array, carry: Any) -> Any:
            mean, sigma, records, failed = carry
            mean, sigma, outcome, said = one(number, mean, sigma)
            records = jax.tree.map(lambda r, o: r.at[number].set(o.astype(r.dtype)), records, outcome)
            return mean, sigma, records, failed.at[number].set(said["failed"]) if guarded else failed

        zeros = jnp.zeros(length, state.mean.dtype)
        carry = (
            layout.arrays(state.mean),
            layout.arrays(state.sigma),
            Outcome(zeros, zeros, zeros, zeros, jnp.zeros(length, jnp.int32)),
            jnp.zeros(length, bool),
        )
        carry = jax.lax.fori_loop(0, count - 1, loop, carry)
        mean, sigma, outcome, said = one(count - 1, carry[0], carry[1])
        records = jax.tree.map(lambda r, o: r.at[count - 1].set(o.astype(r.dtype)), carry[2], outcome)
        said["failed"] = carry[3].at[count - 1].set(said["failed"]) if guarded else carry[3]
        said["sigma"] = gathered(self.program, sigma)
        said["healthy"] = _healthy(mean, sigma) & jnp.all(jnp.isfinite(records.free_energy))
        made = MeanFieldState(
            state.step + count,
            state.examples + jnp.sum(records.counted),
            state.key,
            layout.packed(mean),
            layout.packed(sigma, 1.0),
        )
        return made, records, said

    def _step(
        self, hypers: Any, mean: Tree, sigma: Tree, batch: Task, number: Array, key: Array
    ) -> tuple[Tree, Tree, Outcome, dict[str, Array]]:
        """One batch, leaf by leaf: nothing is packed into one vector."""
        space = extract(self.program, batch, hypers)
        rho = 0.0 if self.window is None else self.window.rate(jnp.sum(batch.mask))
        before = _each(lambda m, s: Gaussian(m, s), mean, sigma)
        prior = _each(
            Gaussian, space.layout.arrays(space.prior_mean), space.layout.arrays(jnp.sqrt(space.prior_variance))
        )
        moved = self._moved(space, before, number)
        predicted = _each(lambda b, p: self.rule.predict(b, p, rho), moved, prior)
        predicted_mean, predicted_sigma = _each(lambda b: b.mean, predicted), _each(lambda b: b.sigma, predicted)
        draws_key = jax.random.fold_in(key, number)
        found = self.estimator.gather(space, predicted_mean, predicted_sigma, batch, draws_key)
        steps = _each(
            lambda b, p, g, h: self.rule.update(b, p, rho, g, h, self.trust),
            predicted,
            prior,
            found.gradient,
            found.curvature,
        )
        after = _each(lambda s: s.belief, steps)
        clipped = sum(jnp.sum(s.clipped) for leaves in steps.values() for s in leaves.values())
        divergence = sum(_divergence(after[n][p], b) for n, leaves in predicted.items() for p, b in leaves.items())
        said = {
            "clipped_share": jnp.asarray(clipped) / sum(leaf.size for leaf in jax.tree.leaves(mean)),
            "divergence": jnp.asarray(divergence),
            "failed": jnp.zeros((), bool),
        }
        return _each(lambda b: b.mean, after), _each(lambda b: b.sigma, after), found.outcome, said

    def _moved(self, space: StateSpace, belief: Any, number: Array) -> Any:
        """After the program's own kernel; the first batch meets the prior, which no step precedes."""
        if all(site.frozen for site in space.layout.sites):
            return belief
        gain, shift, noise = (space.layout.arrays(moment) for moment in space.moments[:3])

        def move(b: Gaussian, a: Array, c: Array, q: Array) -> Gaussian:
            after = Gaussian(a * b.mean + c, jnp.sqrt(jnp.square(a * b.sigma) + q))
            return jax.tree.map(lambda new, old: jnp.where(number > 0, new, old), after, b)

        return _each(move, belief, gain, shift, noise)


def _each(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of the leaves of one network and path."""
    return {n: {p: function(*(tree[n][p] for tree in trees)) for p in leaves} for n, leaves in trees[0].items()}


def _healthy(mean: Tree, sigma: Tree) -> Array:
    means = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(mean)]
    sigmas = [jnp.all((leaf > 0) & (leaf < jnp.inf)) for leaf in jax.tree.leaves(sigma)]
    return jnp.all(jnp.stack(means + sigmas))


def _divergence(after: Gaussian, before: Gaussian) -> Array:
    """KL(after | before), summed over a leaf."""
    ratio = jnp.square(after.sigma / before.sigma)
    moved = jnp.square((after.mean - before.mean) / before.sigma)
    return 0.5 * jnp.sum(ratio - 1 - jnp.log(ratio) + moved)
