"""The sketched curvature against the dense matrix that it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ssm_nn
from ssm_nn.inference import Dense, Diagonal, LaplaceFilter, LowRank, SketchedCurvature
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.curvature import columns
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

N, D, H, K = 400, 6, 5, 3
RNG = np.random.default_rng(1)
# a spectrum that falls, so that a low rank holds most of it
SCALES = (3.0 * 0.4 ** np.arange(D)).astype("float32")
TASK = with_mask(
    ssm_nn.Task(
        {
            "x": jnp.asarray(RNG.normal(size=(N, D)).astype("float32") * SCALES),
            "y": jnp.asarray(RNG.integers(0, K, N)),
        }
    )
)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(D, H)) / 3, jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(H, K)), jnp.float32),
}


def program(tasks):
    net = ssm_nn.weights(
        "net",
        (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], PARAMS),
        prior=dist.Normal(0.0, 1.0),
        transition=ssm_nn.models.RandomWalk(0.1),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

    net.over(tasks, observe)


@pytest.fixture(scope="module")
def space():
    return ssm_nn.extract(program, TASK)


@pytest.fixture(scope="module")
def dense(space):
    v = np.asarray(columns(space, space.initial, TASK), np.float64)
    return v @ v.T


def gathered(space, structure, curvature, seeds=8):
    predicted = structure.prior(jnp.ones(space.layout.size))

    def gather(key):
        return curvature.gather(space, structure, space.initial, TASK, predicted, jnp.ones(()), key)

    return jax.vmap(gather)(jax.random.split(jax.random.key(0), seeds))


def matrices(information):
    return np.asarray(jax.vmap(lambda site: site.to_dense())(information.site), np.float64)


def test_the_diagonal_is_unbiased(space, dense):
    information = gathered(space, Diagonal(), SketchedCurvature(column_batch=4), seeds=64)
    # 64 sketches of 100 columns: a relative standard error of at most sqrt(2 / 6400)
    np.testing.assert_allclose(information.site.diagonal.mean(axis=0), np.diag(dense), rtol=0.09)


@pytest.mark.slow
def test_factor_and_diagonal_together_keep_the_whole_diagonal(space, dense):
    made = matrices(gathered(space, LowRank(8), SketchedCurvature(column_batch=2), seeds=32)).mean(axis=0)
    np.testing.assert_allclose(np.trace(made), np.trace(dense), rtol=0.03)
    np.testing.assert_allclose(np.diag(made), np.diag(dense), rtol=0.2)


@pytest.mark.slow
def test_one_example_a_column_finds_the_leading_directions(space, dense):
    made = matrices(gathered(space, LowRank(8), SketchedCurvature(column_batch=1)))
    values, vectors = np.linalg.eigh(dense)
    for matrix in made:
        along = np.einsum("ik,ij,jk->k", vectors[:, -3:], matrix, vectors[:, -3:])
        np.testing.assert_allclose(along, values[-3:], rtol=0.4)


@pytest.mark.slow
def test_evidence_is_near_the_exact_one_and_the_error_shrinks_with_columns(space, dense):
    exact = np.linalg.slogdet(np.eye(len(dense)) + dense)[1]
    few = np.asarray(gathered(space, LowRank(20), SketchedCurvature(column_batch=3)).logdet_gain)
    many = np.asarray(gathered(space, LowRank(20), SketchedCurvature(column_batch=1)).logdet_gain)
    assert np.abs(many - exact).mean() < 0.15 * exact
    assert np.abs(many - exact).mean() < np.abs(few - exact).mean()


def test_a_part_of_the_examples_is_scaled_up_to_the_task(space, dense):
    made = gathered(space, Diagonal(), SketchedCurvature(examples=100, column_batch=1), seeds=64)
    np.testing.assert_allclose(made.site.diagonal.sum(axis=1).mean(), np.trace(dense), rtol=0.1)


def test_the_filter_runs_with_it_and_agrees_with_the_exact_curvature():
    engines = [LaplaceFilter(program, LowRank(20), curvature=c) for c in (None, SketchedCurvature(column_batch=1))]
    exact, sketched = (engine.update(engine.init(0, TASK), TASK) for engine in engines)
    np.testing.assert_allclose(sketched[1].log_evidence, exact[1].log_evidence, rtol=0.03)
    assert isinstance(sketched[0].precision, DiagonalPlusLowRank)


def test_what_it_cannot_serve_is_refused(space):
    with pytest.raises(ValueError, match="serves LowRank and Diagonal"):
        gathered(space, Dense(), SketchedCurvature(), seeds=1)
    with pytest.raises(ValueError, match="too few for rank 20"):
        gathered(space, LowRank(20), SketchedCurvature(column_batch=40), seeds=1)
    with pytest.raises(ValueError, match="examples is 0"):
        SketchedCurvature(examples=0)
