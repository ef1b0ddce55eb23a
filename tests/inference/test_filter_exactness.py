"""Filter and smoother on linear-Gaussian programs, where every number is known."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_tasks import N, P, T, chain_of, program, tasks_of
from oracles_gaussian import condition, of_task

from ssm_nn import Task, stack_tasks
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.structures import Dense, Diagonal, LowRank

pytestmark = pytest.mark.usefixtures("x64")

EXACT = {"dense": Dense(), "full rank": LowRank(P)}
exact = pytest.mark.parametrize("structure", EXACT)
# a task in the middle without data, the first one too
MISSING = {0: (), 1: (2,), 2: (0, 3)}


@cache
def engine(structure):
    """One engine a structure, so that each is compiled once."""
    return LaplaceFilter(program, EXACT[structure])


def moments(belief):
    return np.asarray(belief.mean), np.linalg.inv(belief.precision.to_dense())


def assert_belief(belief, expected, tolerance=1e-8):
    for found, value in zip(moments(belief), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance)


@exact
@pytest.mark.parametrize("seed", MISSING)
def test_filter_and_smoother_equal_the_joint_gaussian(structure, seed):
    tasks = tasks_of(seed, missing=MISSING[seed])
    chain = chain_of(tasks)
    filtered = engine(structure).run(0, tasks)
    smoothed = engine(structure).smooth(filtered)
    everything = condition(chain)
    for t in range(T):
        assert_belief(filtered.beliefs[t], of_task(condition(chain, t), t))
        assert_belief(smoothed.beliefs[t], of_task(everything, t))
        evidence = condition(chain, t).log_evidence - (condition(chain, t - 1).log_evidence if t else 0.0)
        assert filtered.infos[t].log_evidence == pytest.approx(evidence, abs=1e-7)
    assert filtered.log_evidence == pytest.approx(everything.log_evidence, abs=1e-7)


def test_filter_and_smoother_equal_dynamax():
    with warnings.catch_warnings():
        # of its own dependencies
        warnings.simplefilter("ignore", DeprecationWarning)
        from dynamax.linear_gaussian_ssm import lgssm_smoother
        from dynamax.linear_gaussian_ssm.inference import make_lgssm_params

    tasks = tasks_of(1, missing=MISSING[1])
    chain = chain_of(tasks)
    # a task without data is one that looks at nothing; entry t of the dynamics is the step into t, entry 0 not used
    blank = (np.zeros((N, P)), np.zeros(N), np.eye(N))
    design, values, noise = map(np.stack, zip(*[blank if d is None else d for d in chain.data], strict=True))
    matrices, shifts, noises = map(np.stack, zip(chain.steps[0], *chain.steps, strict=True))
    arrays = (chain.mean, chain.covariance, matrices, noises, design, noise, shifts, np.zeros((T, N)))
    *required, shifts, offsets = map(jnp.asarray, arrays)
    params = make_lgssm_params(*required, dynamics_bias=shifts, emissions_bias=offsets)
    exact_ = lgssm_smoother(params, jnp.asarray(values))
    constant = -0.5 * N * np.log(2 * np.pi) * sum(d is None for d in chain.data)
    filtered = engine("dense").run(0, tasks)
    smoothed = engine("dense").smooth(filtered)
    assert filtered.log_evidence == pytest.approx(float(exact_.marginal_loglik) - constant, abs=1e-7)
    # dynamax adds 1e-9 to the diagonal of what it inverts
    for t in range(T):
        assert_belief(filtered.beliefs[t], (exact_.filtered_means[t], exact_.filtered_covariances[t]), 1e-7)
        assert_belief(smoothed.beliefs[t], (exact_.smoothed_means[t], exact_.smoothed_covariances[t]), 1e-7)


@exact
def test_without_motion_sequential_equals_batch(structure):
    """The same five examples, counted two and three at a time or all at once."""
    (whole,) = tasks_of(3, "still", num_tasks=1)
    parts = [np.arange(N) < 2, np.arange(N) >= 2]
    one_by_one = engine(structure).run(0, [Task(whole.data, whole.context, mask) for mask in parts])
    at_once = engine(structure).run(0, [Task(whole.data, whole.context, np.ones(N, bool))])
    assert_belief(one_by_one.beliefs[-1], moments(at_once.beliefs[0]))
    assert one_by_one.log_evidence == pytest.approx(at_once.log_evidence, abs=1e-8)
    # and every task is smoothed to the same belief
    for belief in engine(structure).smooth(one_by_one).beliefs:
        assert_belief(belief, moments(at_once.beliefs[0]))


@exact
def test_updates_equal_run_to_the_last_bit(structure):
    tasks = tasks_of(1, missing=(2,))
    filtered = engine(structure).run(jax.random.key(7), tasks)
    state = engine(structure).init(jax.random.key(7), tasks[0])
    for t, task in enumerate(tasks):
        # by way of the host, as a saved state comes
        key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
        state = jax.tree.map(np.asarray, state._replace(key=0))._replace(key=key)
        state, info = engine(structure).update(state, task)
        belief, expected = filtered.beliefs[t], filtered.infos[t]
        same = jax.tree.map(
            np.array_equal,
            (state.mean, state.precision, info.site, info.moments),
            (belief.mean, belief.precision, expected.site, expected.moments),
        )
        assert jax.tree.all(same)
        assert info.log_evidence == expected.log_evidence
    assert int(state.step) == T


@exact
def test_a_stack_equals_a_list_and_an_iterator(structure):
    tasks = tasks_of(4)
    listed, stacked, streamed = (engine(structure).run(0, given) for given in (tasks, stack_tasks(tasks), iter(tasks)))
    for other in (stacked, streamed):
        assert other.log_evidence == pytest.approx(listed.log_evidence, abs=1e-10)
        assert_belief(other.beliefs[-1], moments(listed.beliefs[-1]), 1e-10)


@exact
def test_a_task_that_says_nothing_is_a_prediction(structure):
    """No data, no example, no counted example: the same belief, evidence 0."""
    tasks = tasks_of(5)
    state, _ = engine(structure).update(engine(structure).init(0, tasks[0]), tasks[0])
    silent = Task({}, tasks[1].context)
    masked = Task(tasks[1].data, tasks[1].context, np.zeros(N, bool))
    expected = of_task(condition(chain_of([tasks[0], silent])), 1)
    empty = Task({name: value[:0] for name, value in tasks[1].data.items()}, tasks[1].context)
    for task in (silent, masked, empty):
        after, info = engine(structure).update(state, task)
        assert info.log_evidence == pytest.approx(0, abs=1e-12)
        assert info.converged
        assert_belief(after, expected)


@exact
@pytest.mark.parametrize("junk", [0.0, 1e6, np.nan])
def test_masked_examples_do_not_count(structure, junk):
    """Whatever stands there."""
    tasks = tasks_of(6)
    mask = np.array([True, False, True, True, False])
    whole = tasks[1]
    padded = {"x": np.where(mask[:, None], whole["x"], junk), "y": np.where(mask, whole["y"], junk), "sd": whole["sd"]}
    tasks[1] = Task(padded, whole.context, mask)
    filtered = engine(structure).run(0, tasks)
    smoothed = engine(structure).smooth(filtered)
    everything = condition(chain_of(tasks))
    assert filtered.log_evidence == pytest.approx(everything.log_evidence, abs=1e-7)
    for t in range(T):
        assert_belief(smoothed.beliefs[t], of_task(everything, t))


def test_tasks_of_several_sizes_are_stacked_under_a_mask():
    tasks = [tasks_of(t, num_tasks=1, size=size)[0] for t, size in enumerate((5, 3, 4))]
    stacked = stack_tasks(tasks)
    assert stacked.mask.shape == (3, N)
    filtered = engine("full rank").run(0, stacked)
    everything = condition(chain_of(tasks))
    assert filtered.log_evidence == pytest.approx(everything.log_evidence, abs=1e-7)
    for t, belief in enumerate(engine("full rank").smooth(filtered).beliefs):
        assert_belief(belief, of_task(everything, t))


@exact
def test_a_gap_in_a_random_walk_is_bridged_half_way(structure):
    tasks = tasks_of(7, "walk", missing=(2,))
    smoothed = engine(structure).smooth(engine(structure).run(0, tasks))
    np.testing.assert_allclose(smoothed.means[2], (smoothed.means[1] + smoothed.means[3]) / 2, atol=1e-9)


def test_curvature_in_chunks_equals_curvature_at_once():
    tasks = tasks_of(9)
    chunked = LaplaceFilter(program, LowRank(P), curvature=ExactCurvature(batch_size=2)).run(0, tasks)
    at_once = engine("full rank").run(0, tasks)
    for t in range(T):
        assert_belief(chunked.beliefs[t], moments(at_once.beliefs[t]), 1e-9)
        assert chunked.infos[t].log_evidence == pytest.approx(at_once.infos[t].log_evidence, abs=1e-9)


def test_diagonal_filter_equals_a_recursion_by_hand():
    """Mean from the full least-squares problem of each task, precision and message coordinate by coordinate."""
    tasks = tasks_of(10, missing=(3,))
    chain = chain_of(tasks)
    filter_ = LaplaceFilter(program, Diagonal())
    filtered = filter_.run(0, tasks)
    smoothed = filter_.smooth(filtered)
    mean, precision, beliefs, predictions, sites = chain.mean, 1 / np.diag(chain.covariance), [], [], []
    for t, data in enumerate(chain.data):
        if t:
            matrix, shift, noise = chain.steps[t - 1]
            mean = matrix @ mean + shift
            # a signed permutation with gains maps variances by its squares
            precision = 1 / (matrix**2 @ (1 / precision) + np.diag(noise))
        predictions.append(mean)
        site = np.zeros(P)
        if data is not None:
            design, value, spread = data
            weighted = design.T @ np.linalg.inv(spread)
            evidence = normal_log_density(value - design @ mean, design @ np.diag(1 / precision) @ design.T + spread)
            assert filtered.infos[t].log_evidence == pytest.approx(evidence, abs=1e-8)
            mean = mean + np.linalg.solve(np.diag(precision) + weighted @ design, weighted @ (value - design @ mean))
            site = np.diag(weighted @ design)
            precision = precision + site
        beliefs.append((mean, precision))
        sites.append(site)
        np.testing.assert_allclose(filtered.beliefs[t].mean, mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(filtered.beliefs[t].precision.diagonal, precision, rtol=1e-9)
    message = np.zeros(P)
    for t in range(T - 2, -1, -1):
        matrix, _, noise = chain.steps[t]
        message = message + sites[t + 1]
        message = (matrix**2).T @ (message / (1 + np.diag(noise) * message))
        before, kept = beliefs[t]
        gain = (matrix / kept).T / (matrix**2 @ (1 / kept) + np.diag(noise))
        mean = before + gain @ (mean - predictions[t + 1])
        np.testing.assert_allclose(smoothed.means[t], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(smoothed.beliefs[t].precision.diagonal, kept + message, rtol=1e-9)


@pytest.mark.parametrize("structure", [LowRank(2), LowRank(2, keep_diagonal=False)])
def test_smoothing_never_widens_a_covariance(structure):
    """At ranks too small for the data."""
    tasks = tasks_of(11)
    filter_ = LaplaceFilter(program, structure)
    filtered = filter_.run(0, tasks)
    smoothed = filter_.smooth(filtered)
    narrowed = 0.0
    for before, after in zip(filtered.beliefs, smoothed.beliefs, strict=True):
        shrinkage = moments(before)[1] - moments(after)[1]
        assert np.linalg.eigvalsh(shrinkage).min() > -1e-12
        narrowed = max(narrowed, np.linalg.eigvalsh(shrinkage).max())
    assert narrowed > 1e-2


def path_draws(smoothed, number):
    return np.asarray(jax.jit(jax.vmap(smoothed.sample_path))(jax.random.split(jax.random.key(1), number)))


def test_drawn_paths_have_the_moments_of_the_exact_path():
    """Covariances between tasks too; five standard errors of a normal's sample moments."""
    structure = "full rank"
    tasks, number = tasks_of(12, missing=(1,), num_tasks=3), 10_000
    joint = condition(chain_of(tasks))
    smoothed = engine(structure).smooth(engine(structure).run(0, tasks))
    draws = path_draws(smoothed, number).reshape(number, -1)
    mean, covariance = joint.mean.ravel(), joint.covariance.reshape(joint.mean.size, -1)
    scale = np.diag(covariance)
    residual = draws - mean
    assert np.all(np.abs(residual.mean(0)) < 5 * np.sqrt(scale / number))
    error = np.sqrt((np.outer(scale, scale) + covariance**2) / number)
    assert np.all(np.abs(residual.T @ residual / number - covariance) < 5 * error)
    assert np.abs(joint.covariance[0, :, 2]).max() > 0.05, "the tasks must be correlated for this to say anything"


@exact
@pytest.mark.parametrize("kind", ["noisy", "any"])
def test_density_of_a_path_equals_the_joint_gaussian(structure, kind):
    tasks = tasks_of(13, kind, num_tasks=3)
    chain = chain_of(tasks)
    joint = condition(chain)
    smoothed = engine(structure).smooth(engine(structure).run(0, tasks))
    path = path_draws(smoothed, 2)[0]
    # what a step without noise determines counts once, in the later task
    free = np.ones(path.shape, bool)
    for t, (matrix, _, noise) in enumerate(chain.steps):
        order = np.abs(matrix) > 0
        still = order[np.diag(noise) == 0].any(axis=0)
        free[t] = ~still
    covariance = joint.covariance.reshape(path.size, -1)[np.ix_(free.ravel(), free.ravel())]
    expected = normal_log_density((path - joint.mean)[free], covariance)
    assert (kind == "any") == (not free.all())
    assert float(smoothed.log_density(path)) == pytest.approx(expected, abs=1e-7)


def normal_log_density(residual, covariance):
    logdet = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (residual @ np.linalg.solve(covariance, residual) + logdet)
