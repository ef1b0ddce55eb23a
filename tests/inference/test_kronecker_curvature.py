"""The curvature of a task in Kronecker form against the dense Gauss-Newton matrix, and what comes out of a posterior."""

import warnings
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive

from ssm_nn import Task, extract, stack_tasks, weights
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.kronecker import Kronecker, KroneckerCurvature
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.structures import Dense
from ssm_nn.models.networks import cnn, mlp
from ssm_nn.models.transitions import RandomWalk
from ssm_nn.precision_kronecker import EigenBlock

D, K = 4, 3
pytestmark = pytest.mark.usefixtures("x64")


def assert_close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


def classes(network):
    def program(tasks):
        net = weights("net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.2), num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

    return program


def scaled_mlp():
    apply, params = mlp((D, 3, K))
    return lambda p, x: apply(p["net"], x * p["scale"]), {"net": params, "scale": jnp.ones(D)}


def offset_alone(params, x):
    return x[:, :K] * params["scale"] + params["offset"]


NETWORKS = {
    "dense": (lambda: mlp((D, 3, K)), (D,)),
    "convolution": (lambda: cnn((4, 3), (2,), (), K, normaliser=None), (4, 3)),
    "with a rest": (scaled_mlp, (D,)),
    "no layer": (lambda: (offset_alone, {"scale": jnp.ones(K), "offset": jnp.zeros(K)}), (D,)),
}
COUNT = 8


class Gathered:
    """A task's information by Kronecker and by dense curvature."""

    def __init__(self, name, task=None, rank=10):
        make, shape = NETWORKS[name]
        rng = np.random.default_rng(0)
        self.program = classes(make())
        plain = Task({"x": rng.normal(size=(COUNT, *shape)), "y": rng.integers(0, K, COUNT)})
        self.task = with_mask(jax.tree.map(jnp.asarray, plain if task is None else task(plain)))
        space = extract(self.program, self.task)
        self.theta = jnp.array(rng.normal(size=space.layout.size))
        variance = jnp.array(rng.uniform(0.5, 2, space.layout.size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.structure = Kronecker(rank).fitted(space, self.task)
        self.predicted = self.structure.prior(variance)
        self.space, self.dense_predicted = space, Dense().prior(variance)

    @cache  # noqa: B019  (cases live as long as the tests)
    def gather(self, examples, spread):
        """Compiled: information for each of many keys."""
        curvature = KroneckerCurvature(examples, spread)

        @jax.jit
        def gather(predicted, theta, power, keys):
            def one(key):
                return curvature.gather(self.space, self.structure, theta, self.task, predicted, power, key)

            return jax.lax.map(one, keys)

        return gather

    def kronecker(self, examples, keys, power=1.0, spread=0.0):
        """Information, a leading axis of keys."""
        return self.gather(examples, spread)(self.predicted, self.theta, power, keys)

    def dense(self, power=1.0):
        made = ExactCurvature().gather(
            self.space, Dense(), self.theta, self.task, self.dense_predicted, jnp.asarray(power), jax.random.key(0)
        )
        return np.asarray(made.site.matrix), float(made.logdet_gain)

    def blocks(self, dense):
        entries = [np.asarray(place.matrix(jnp.arange(len(dense)))).ravel() for place in self.structure.places.layers]
        return [dense[np.ix_(e, e)] for e in entries]


@cache
def case_of(name, task=None, rank=10):
    return Gathered(name, task, rank)


def keys(number):
    return jax.random.split(jax.random.key(0), number)


@pytest.mark.parametrize("name", ["dense", "convolution", pytest.param("with a rest", marks=pytest.mark.slow)])
def test_with_all_columns_diagonal_in_the_basis_and_trace_are_exact(name):
    case = case_of(name)
    information = case.kronecker(1000, keys(1), power=1.7)
    dense, exact_gain = case.dense(power=1.7)
    for block, here in zip(information.site.blocks, case.blocks(dense), strict=True):
        wide = np.kron(block.inputs[0], block.outputs[0])
        assert_close(wide.T @ wide, np.eye(len(wide)))
        assert_close(np.ravel(block.values[0]), np.diag(wide.T @ here @ wide))
        assert_close(jnp.sum(block.values), np.trace(here))
    rest = case.structure.places.rest_of(np.diag(dense))
    assert_close(jax.vmap(lambda rest: rest.precision_diagonal())(information.site.rest)[0], rest)
    # a determinant is at most that of the diagonal, in any basis and between layers
    assert float(information.logdet_gain[0]) >= exact_gain


# one column an example with random signs; fewer examples than the task has, scaled up
@pytest.mark.parametrize(
    ("name", "examples"), [("dense", COUNT - 3), ("convolution", COUNT), ("with a rest", COUNT - 3)]
)
def test_random_columns_are_unbiased(name, examples):
    """Traces of the blocks, and the diagonal of the weights outside them; five standard errors of the mean."""
    case, number = case_of(name), 600
    site = case.kronecker(examples, keys(number)).site
    dense, _ = case.dense()
    found = [np.asarray(jnp.sum(block.values, axis=(1, 2)))[:, None] for block in site.blocks]
    expected = [[np.trace(here)] for here in case.blocks(dense)]
    found.append(np.asarray(jax.vmap(lambda rest: rest.precision_diagonal())(site.rest)))
    expected.append(case.structure.places.rest_of(np.diag(dense)))
    for drawn, exact in zip(found, expected, strict=True):
        error = drawn.std(axis=0) / np.sqrt(number)
        assert np.all(np.abs(drawn.mean(axis=0) - np.asarray(exact)) <= 5 * error + 1e-12)


def test_a_spread_of_almost_nothing_is_the_mode():
    near, at = (case_of("dense").kronecker(1000, keys(1), spread=spread).site for spread in (1e-9, 0.0))
    one, two = (jax.tree.map(lambda a: a[0], site).to_dense() for site in (near, at))
    assert_close(one, two, 1e-6)


def turned(precision):
    """In bases of its own, and so small that the curvature of a task counts beside it."""
    rng = np.random.default_rng(4)

    def basis(matrix):
        return jnp.asarray(np.linalg.qr(rng.normal(size=matrix.shape))[0])

    blocks = [EigenBlock(basis(b.inputs), basis(b.outputs), 0.02 * b.values) for b in precision.blocks]
    return replace(precision, blocks=tuple(blocks))


def test_a_spread_averages_the_curvature_over_draws_from_the_belief():
    """Traces of the blocks against dense curvatures at draws made here; five standard errors of the difference."""
    case, number, spread = case_of("dense"), 500, 0.5
    predicted, rng = turned(case.predicted), np.random.default_rng(3)
    draws = np.tile(np.asarray(case.theta), (number, 1))
    places = np.arange(draws.shape[1])
    for block, layer, here in zip(
        predicted.blocks, case.structure.places.layers, case.blocks(case.dense()[0]), strict=True
    ):
        wide = np.kron(block.inputs, block.outputs)
        precision = np.ravel(block.values) + np.diag(wide.T @ here @ wide)  # in the predicted basis
        entries = np.asarray(layer.matrix(places)).ravel()
        draws[:, entries] += spread * (rng.normal(size=(number, len(precision))) / np.sqrt(precision)) @ wide.T

    @jax.jit
    def dense_at(theta):
        made = ExactCurvature().gather(
            case.space, Dense(), theta, case.task, case.dense_predicted, jnp.asarray(1.0), jax.random.key(0)
        )
        return made.site.matrix

    def traces(matrix):
        return [np.trace(block) for block in case.blocks(np.asarray(matrix))]

    expected = np.array([traces(matrix) for matrix in jax.lax.map(dense_at, draws)])
    spread_out = case.gather(1000, spread)(predicted, case.theta, 1.0, keys(number)).site
    found = np.stack([np.asarray(jnp.sum(block.values, axis=(1, 2))) for block in spread_out.blocks], axis=1)
    error = np.sqrt((found.var(axis=0) + expected.var(axis=0)) / number)
    assert np.all(np.abs(found.mean(axis=0) - expected.mean(axis=0)) <= 5 * error)
    mode = traces(dense_at(case.theta))
    assert np.any(np.abs(mode - expected.mean(axis=0)) > 7 * error), "the mode's curvature is another"


def padded(plain):
    rows = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 7])
    return Task({n: v[rows] for n, v in plain.data.items()}, mask=np.array([True, False] + [True] * 7 + [False]))


@pytest.mark.parametrize("name", ["dense", "convolution"])
def test_masked_examples_count_for_nothing(name):
    plain, masked = (
        jax.tree.map(lambda a: a[0], case_of(name, task).kronecker(1000, keys(1)).site) for task in (None, padded)
    )
    assert_close(plain.to_dense(), masked.to_dense(), 1e-9)


@pytest.mark.parametrize("name", ["dense", "with a rest"])
def test_strength_keeps_the_site_of_that_power_and_the_evidence_of_its_share(name):
    case, one = case_of(name), keys(1)[0]

    def gathered(strength, power):
        curvature = KroneckerCurvature(1000, strength=strength)
        return curvature.gather(case.space, case.structure, case.theta, case.task, case.predicted, power, one)

    strong, powerful = jax.jit(lambda: (gathered(3.0, 1.0), gathered(1.0, 3.0)))()
    assert_close(strong.site.to_dense(), powerful.site.to_dense(), 1e-9)
    third = replace(
        strong.site,
        blocks=tuple(block._replace(values=block.values / 3) for block in strong.site.blocks),
        rest=strong.site.rest._replace(
            diagonal=strong.site.rest.diagonal / 3, factor=strong.site.rest.factor / np.sqrt(3)
        ),
    )
    expected = case.predicted.absorb(third).logdet() - case.predicted.logdet()
    np.testing.assert_allclose(float(strong.logdet_gain), float(expected), rtol=1e-9)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_strength_that_is_not_positive_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength is .*; .* accepted"):
        KroneckerCurvature(strength=strength)


def test_power_counts_the_likelihood_so_often():
    once, twice = (case_of("dense").kronecker(1000, keys(1), power=power).site for power in (1.0, 2.0))
    for here, there in zip(once.blocks, twice.blocks, strict=True):
        assert_close(2 * jnp.sum(here.values), jnp.sum(there.values))


@pytest.mark.parametrize("rank", [0, 10])
def test_a_network_without_layers_is_diagonal_plus_low_rank(rank):
    """Six weights: rank 10 holds every column."""
    case = case_of("no layer", rank=rank)
    assert case.structure.places.layers == ()
    information = case.kronecker(1000, keys(1))
    assert information.site.rest.factor.shape == (1, 2 * K, rank)
    dense, gain = case.dense()
    assert_close(jnp.sum(information.site.rest.factor**2) + jnp.sum(information.site.rest.diagonal), np.trace(dense))
    if rank == 10:
        assert_close(information.logdet_gain[0], gain)


# what comes out of a posterior


def class_tasks(num_tasks=3):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(num_tasks, COUNT, D))
    return [Task({"x": x[t], "y": (x[t, :, 0] > 0).astype(int) + (x[t, :, 1] > 0.3)}) for t in range(num_tasks)]


@cache
def posterior():
    made = LaplaceFilter(classes(scaled_mlp()), Kronecker(2), estimator=GaussNewton(tolerance=1e-8))
    with pytest.warns(UserWarning, match=r"Kronecker: net.scale belong to no dense or convolutional layer"):
        filtered = made.run(0, [*class_tasks(2), None])
    return made.smooth(filtered)


@pytest.mark.slow
def test_smoothing_never_loses_trace():
    made = posterior()
    for t, (before, after) in enumerate(zip(made.filtered.beliefs, made.beliefs, strict=True)):
        gain = np.trace(np.asarray(after.precision.to_dense())) - np.trace(np.asarray(before.precision.to_dense()))
        assert gain >= -1e-9
        assert (gain > 1e-3) == (t == 0)  # nothing is seen after task 1
    assert np.isfinite(made.filtered.log_evidence)


@pytest.mark.slow
def test_draws_have_the_smoothed_moments():
    """Of the last tasks, whose belief is the filter's; five standard errors."""
    made, number = posterior(), 5000
    draws = np.asarray(jax.jit(jax.vmap(made.sample_path))(jax.random.split(jax.random.key(1), number)))
    assert draws.shape == (number, 3, made.layout.size)
    for t in (1, 2):
        covariance = np.linalg.inv(np.asarray(made.beliefs[t].precision.to_dense()))
        scale = np.diag(covariance)
        residual = draws[:, t] - np.asarray(made.means[t])
        error = np.sqrt((np.outer(scale, scale) + covariance**2) / number)
        assert np.all(np.abs(residual.T @ residual / number - covariance) < 5 * error)
        assert np.all(np.abs(residual.mean(0)) < 5 * np.sqrt(scale / number))


@pytest.mark.slow
def test_predictions_guide_and_datatree_come_out():
    made, tasks = posterior(), class_tasks()
    found = made.predict(2, tasks[2])["y"]
    assert found.probabilities.shape == (COUNT, K)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.all(np.isfinite(found.log_density))
    stack = stack_tasks(tasks)
    drawn = Predictive(made.program, guide=made.guide, params={}, num_samples=4)(jax.random.key(1), stack.without("y"))
    assert drawn["y"].shape == (4, 3, COUNT)
    tree = made.to_datatree(num_samples=5, tasks=tasks)
    assert tree["posterior"]["net.net.layers.0.kernel"].shape == (1, 5, 3, D, 3)
    assert tree["posterior"]["net.scale"].shape == (1, 5, 3, D)
    assert np.all(np.isfinite(tree["sample_stats"]["log_q"]))
    assert tree["filter_stats"]["log_evidence"].dims == ("task",)


@pytest.mark.slow
def test_float32_stays_float32_and_finite():
    with jax.enable_x64(False):
        single = LaplaceFilter(classes(mlp((D, 3, K))), Kronecker(), estimator=GaussNewton())
        tasks = [
            Task({"x": np.asarray(task["x"], np.float32), "y": np.asarray(task["y"], np.int32)})
            for task in class_tasks()
        ]
        smoothed = single.smooth(single.run(0, tasks))
        for leaf in jax.tree.leaves(([b[:2] for b in smoothed.beliefs], [i.site for i in smoothed.filtered.infos])):
            assert leaf.dtype == jnp.float32
            assert bool(jnp.all(jnp.isfinite(leaf)))
