"""The evidence by covariances of outputs: that of dense precisions, on linear programs and on networks."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from walking_classifier import quadrants, walking_classifier
from walking_regression import P, evidence, program, tasks_of

import ssm_nn
from ssm_nn.extraction import extract
from ssm_nn.inference import Dense, Diagonal, GaussNewton, Kronecker, LaplaceFilter, Lbfgs, LowRank
from ssm_nn.inference.batches import counted_copies
from ssm_nn.inference.diagnosis.output_space import Covariance, OutputSpace, Spread
from ssm_nn.inference.diagnosis.traced_filter import TracedFilter
from ssm_nn.models import RandomWalk

HYPERS = {"noise.first": 0.4, "noise.second": 0.05, "gain.first": 0.8, "gain.second": -0.5}


def serves(engine, listed):
    stack = ssm_nn.stack_tasks(listed)
    first = counted_copies(stack.at(0))
    space = extract(engine.program, first, engine.hypers)
    return OutputSpace(engine).serves(space, first, len(stack), engine.hypers)


def traced_slope(engine, listed):
    traced, stack, key = TracedFilter(engine), ssm_nn.stack_tasks(listed), jax.random.key(0)
    return jax.jit(jax.value_and_grad(lambda h: traced(h, stack, key).log_evidence))(engine.hypers)


@pytest.mark.usefixtures("x64")
def test_columns_narrow_a_covariance_as_they_widen_its_precision(rng):
    variance, factor = rng.uniform(1.0, 2.0, 7), 0.3 * rng.normal(size=(7, 3))
    new, x = rng.normal(size=(7, 2)), rng.normal(size=7)
    covariance = Covariance(jnp.asarray(variance), jnp.asarray(factor))
    dense = np.diag(variance) - factor @ factor.T
    after = np.linalg.inv(np.linalg.inv(dense) + new @ new.T)
    spread = Spread.of(covariance, jnp.asarray(new))
    np.testing.assert_allclose(dense - spread.narrowing @ spread.narrowing.T, after, atol=1e-12)
    assert float(spread.half_logdet) == pytest.approx(np.linalg.slogdet(np.eye(2) + new.T @ dense @ new)[1] / 2)
    z = after @ x
    np.testing.assert_allclose(spread.step(covariance, x), [z, np.linalg.solve(dense, z)], atol=1e-12)
    assert float(covariance.quadratic(x)) == pytest.approx(x @ dense @ x)


@pytest.mark.usefixtures("x64")
def test_density_and_derivative_are_those_of_the_exact_evidence():
    """Tasks without data among them, the first one too, and weights that are reordered on the way."""
    orders = [[0, 1, 2], [2, 0, 1], [0, 1, 2], [1, 0, 2], [0, 2, 1]]
    listed = tasks_of(0, num_tasks=5, size=1, orders=orders, missing=(0, 2))
    engine = LaplaceFilter(program, Dense(), hypers=HYPERS)
    assert serves(engine, listed)
    found, slope = traced_slope(engine, listed)

    def exact(h):
        return evidence(listed, (h["noise.first"], h["noise.second"]), (h["gain.first"], h["gain.second"]))

    assert float(found) == pytest.approx(exact(HYPERS), abs=1e-9)
    for name, value in HYPERS.items():
        up, down = (exact(HYPERS | {name: value + step}) for step in (1e-5, -1e-5))
        assert float(slope[name]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-7), name


@pytest.mark.usefixtures("x64")
def test_on_a_network_they_are_those_of_the_filter():
    """Against differences of the filter's own evidence; tasks differ in size, and the likelihood counts twice."""
    rng = np.random.default_rng(3)
    sizes = (4, 2, 3)
    listed = [quadrants(rng.normal(size=(n, 2))) for n in sizes]
    model = walking_classifier(rng, 8)
    engine = LaplaceFilter(model, Dense(), hypers={"scale": 0.3}, estimator=GaussNewton(tolerance=1e-13), power=2.0)
    assert serves(engine, listed)
    found, slope = traced_slope(engine, listed)
    runs = [engine.with_hypers({"scale": 0.3 + step}).run(0, listed).log_evidence for step in (-1e-3, 0.0, 1e-3)]
    assert float(found) == pytest.approx(runs[1], abs=1e-7)
    assert float(slope["scale"]) == pytest.approx((runs[2] - runs[0]) / 2e-3, rel=1e-4)


def test_only_evidences_that_it_computes_are_taken():
    few, many = tasks_of(0, num_tasks=5, size=1), tasks_of(0, num_tasks=6, size=1)
    taken = {
        "all of the precision": (LaplaceFilter(program, Dense(), hypers=HYPERS), few, True),
        "nothing cut off": (LaplaceFilter(program, LowRank(P), hypers=HYPERS), few, True),
        "more outputs than weights": (LaplaceFilter(program, Dense(), hypers=HYPERS), many, False),
        "more outputs than the rank": (LaplaceFilter(program, LowRank(P - 1), hypers=HYPERS), few, False),
        "diagonal": (LaplaceFilter(program, Diagonal(), hypers=HYPERS), few, False),
        "Kronecker": (LaplaceFilter(program, Kronecker(), hypers=HYPERS), few, False),
        "another search": (LaplaceFilter(program, Dense(), hypers=HYPERS, estimator=Lbfgs()), few, False),
    }
    assert {name: serves(engine, tasks) for name, (engine, tasks, _) in taken.items()} == {
        name: expected for name, (*_, expected) in taken.items()
    }


def test_in_single_precision_sharp_data_are_left_to_precisions():
    """Information of more than a thousand in units of the prior is lost to rounding where covariances are subtracted."""
    tasks = ssm_nn.stack_tasks(tasks_of(0, num_tasks=2, size=2))
    sharp = ssm_nn.stack_tasks([{"x": 1e3 * np.asarray(tasks.at(t)["x"]), "y": tasks.at(t)["y"]} for t in range(2)])
    few = OutputSpace(LaplaceFilter(program, Dense(), hypers=HYPERS))
    assert few.resolves(tasks)
    assert not few.resolves(sharp)
    seen = []
    jax.jit(lambda stack: seen.append(few.resolves(stack)))(tasks)
    assert seen == [False]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sharp)
        assert few.resolves(wide)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("start", "unconverged"), [((0.5, -0.5), 1), ((0.5, 0.5), 0)])
def test_a_search_that_ends_at_a_saddle_is_counted(start, unconverged):
    """y = a b: from weights of opposite signs the search falls to 0, where the objective falls on along a = b."""

    def product(tasks):
        network = (lambda w, x: x * w["a"] * w["b"], dict(zip("ab", map(jnp.asarray, start), strict=True)))
        net = ssm_nn.weights(
            "net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.1), num_tasks=len(tasks)
        )
        net.over(tasks, lambda f, task: numpyro.sample("y", dist.Normal(f(task["x"]), 0.5), obs=task["y"]))

    listed = [{"x": np.ones(1), "y": np.ones(1)}]
    engine = LaplaceFilter(product, Dense())
    assert serves(engine, listed)
    found = jax.jit(TracedFilter(engine))({}, ssm_nn.stack_tasks(listed), jax.random.key(0))
    assert int(found.unconverged) == unconverged
