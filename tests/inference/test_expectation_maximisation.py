"""EM on linear-Gaussian programs, where the disturbances and the maximum of the evidence are known."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles_gaussian import condition
from scipy.optimize import minimize
from walking_regression import GAINS, GROUP, NOISES, P, chain_of, evidence, program, tasks_of

from ssm_nn import Moments, Task, weights
from ssm_nn.inference.disturbances import disturbances, parallel_sum, product_diagonal
from ssm_nn.inference.expectation_maximisation import learn_kernel
from ssm_nn.inference.kernel_profile import profile_kernel
from ssm_nn.inference.kronecker import Kronecker
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.smoothing import smooth
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.layer_places import LayerPlace, Places
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_kronecker import EigenBlock, KroneckerEigen
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

STRUCTURES = {"dense": Dense(), "full rank": LowRank(P)}
exact = pytest.mark.parametrize(
    "structure", [pytest.param(name, marks=[pytest.mark.slow] if name != "dense" else []) for name in STRUCTURES]
)
x64 = pytest.mark.usefixtures("x64")
ORDERS = [[1, 2, 0], [2, 1, 0], [0, 2, 1], [1, 0, 2], [2, 0, 1]]


@cache
def engine(structure):
    return LaplaceFilter(program, STRUCTURES[structure], hypers=hypers_of((0.1, 0.1)))


def hypers_of(noise, gain=(1.0, 1.0)):
    return dict(zip([*NOISES, *GAINS], [*noise, *gain], strict=True))


def at(structure, noise, gain=(1.0, 1.0)):
    return engine(structure).with_hypers(hypers_of(noise, gain))


def pairs(rng, size=7, wide=3):
    """A precision and information in each structure, and the same as dense matrices."""
    d, x = rng.uniform(0.5, 2, size), rng.uniform(0, 2, size) * (np.arange(size) % 2)
    u, w = rng.normal(size=(size, wide)), rng.normal(size=(size, 2 * wide))
    full, some = np.diag(d) + u @ u.T, np.diag(x) + w @ w.T
    return {
        "dense": (DensePrecision(jnp.asarray(full)), DensePrecision(jnp.asarray(some)), full, some),
        "diagonal": (DiagonalPrecision(jnp.asarray(d)), DiagonalPrecision(jnp.asarray(x)), np.diag(d), np.diag(x)),
        "low rank": (DiagonalPlusLowRank(d, u), DiagonalPlusLowRank(x, w), full, some),
    }


@x64
@pytest.mark.parametrize("kind", ["dense", "diagonal", "low rank"])
def test_parallel_sum_and_product_equal_dense_algebra(kind, rng):
    one, two, full, some = pairs(rng)[kind]
    expected = full - full @ np.linalg.solve(full + some, full)
    shared = parallel_sum(one, two)
    np.testing.assert_allclose(shared.to_dense(), expected, atol=1e-12)
    gain = rng.normal(size=7)
    product = np.diag(expected @ np.diag(gain) @ np.linalg.inv(full))
    np.testing.assert_allclose(product_diagonal(shared, gain, one), product, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "low rank"])
def test_parallel_sum_keeps_its_digits_in_single_precision(kind, scale, rng):
    """Where one of the two is a million times the other the sum is the smaller, and a difference would have no digit left."""
    one, two, full, some = pairs(rng)[kind]
    some, two = scale * some, jax.tree.map(lambda a: a * (scale if kind != "low rank" else 1.0), two)
    if kind == "low rank":
        two = DiagonalPlusLowRank(two.diagonal * scale, two.factor * np.sqrt(scale))
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (one, two))
    with np.errstate(all="raise"):
        mixed = np.linalg.inv(full + some)
    expected = np.diag(full @ mixed @ some)
    np.testing.assert_allclose(
        parallel_sum(*single).precision_diagonal(), expected, rtol=2e-4, atol=2e-5 * min(scale, 1)
    )


# theta: bias and kernel (in, out) of a layer, 3 of no layer, a kernel (out, in) without bias
KRONECKER = Places((LayerPlace("A", 2, (3, 2), (0,), 1, 0), LayerPlace("B", 11, (2, 4), (1,), 0, None)), 19)
KRONECKER_SPANS = {"A": slice(0, 8), "B": slice(11, 19)}


def kronecker_pair(rng, shared):
    """A precision and positive semi-definite information, in one basis or in two."""

    def basis(size):
        return np.linalg.qr(rng.normal(size=(size, size)))[0]

    bases = [(basis(layer.num_rows), basis(layer.num_outputs)) for layer in KRONECKER.layers]
    others = bases if shared else [(basis(len(i)), basis(len(o))) for i, o in bases]
    d, x = rng.uniform(0.5, 2, 3), np.array([0.0, 1.3, 0.0])
    lowest = [0.3, -1.0]  # of the information, some are 0
    made = [
        KroneckerEigen(
            tuple(EigenBlock(i, o, np.maximum(rng.uniform(low, 4, (len(i), len(o))), 0)) for i, o in of),  # type: ignore[arg-type]
            DiagonalPlusLowRank(rest, rng.normal(size=(3, 2))),
            KRONECKER,
        )
        for of, rest, low in ((bases, d, lowest[0]), (others, x, lowest[1]))
    ]
    one, two = made
    return one, two, np.asarray(one.to_dense()), np.asarray(two.to_dense())


@x64
def test_kronecker_sums_over_a_layer_equal_dense_algebra(rng):
    one, two, full, some = kronecker_pair(rng, shared=True)
    expected = full - full @ np.linalg.solve(full + some, full)
    shared = parallel_sum(one, two)
    np.testing.assert_allclose(shared.to_dense(), expected, atol=1e-12)
    gain = np.repeat([0.7, 0.2, -0.4, 1.1, -1.3], [8, 1, 1, 1, 8])
    product = np.diag(expected @ np.diag(gain) @ np.linalg.inv(full))
    found = np.asarray(product_diagonal(shared, jnp.asarray(gain), one))
    for span in KRONECKER_SPANS.values():
        np.testing.assert_allclose(found[span].sum(), product[span].sum(), rtol=1e-12)
    np.testing.assert_allclose(found[8:11], product[8:11], atol=1e-12)


@x64
def test_kronecker_sums_in_two_bases_are_those_of_the_diagonal_in_the_informations(rng):
    """The product's sums stay exact; of the precision the parallel sum takes the diagonal, as the filter's update does."""
    one, two, full, some = kronecker_pair(rng, shared=False)
    shared = parallel_sum(one, two)
    dense, gain = np.asarray(shared.to_dense()), np.repeat([0.7, 1.0, -1.3], [8, 3, 8])
    product = np.diag(dense @ np.diag(gain) @ np.linalg.inv(full))
    found = np.asarray(product_diagonal(shared, jnp.asarray(gain), one))
    for layer, span in zip(KRONECKER.layers, KRONECKER_SPANS.values(), strict=True):
        np.testing.assert_allclose(found[span].sum(), product[span].sum(), rtol=1e-12)
        order = np.asarray(layer.matrix(jnp.arange(19))).ravel()
        block = two.blocks[KRONECKER.layers.index(layer)]
        wide = np.kron(block.inputs, block.outputs)
        here, there = (np.diag(wide.T @ m[np.ix_(order, order)] @ wide) for m in (full, some))
        expected = wide @ np.diag(here * there / (here + there)) @ wide.T
        np.testing.assert_allclose(dense[np.ix_(order, order)], expected, atol=1e-12)


@pytest.mark.slow
@x64
def test_kronecker_learns_the_noise_of_the_dense_filter():
    """A linear layer with Gaussian outputs, where the Kronecker form is exact up to its bases."""
    random = np.random.default_rng(5)
    walk = np.cumsum(random.normal(size=(8, 4, 2)) * np.where(np.arange(8) > 0, 0.4, 1.0)[:, None, None], axis=0)
    tasks = []
    for weight in walk:
        x = random.normal(size=(40, 3))
        mean = np.c_[x, np.ones(40)] @ weight
        tasks.append(Task({"x": x, "y": mean + 0.3 * random.normal(size=mean.shape)}))
    parameters = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}

    def layer(tasks):
        noise = numpyro.sample("noise", dist.Uniform(0.0, 10.0))
        net = weights(
            "net",
            (lambda p, x: x @ p["kernel"] + p["bias"], parameters),
            prior=dist.Normal(0.0, 1.0),
            transition=lambda leaf: Moments(noise=noise),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), 0.3).to_event(1), obs=task.get("y"))

        net.over(tasks, observe)

    found = {}
    for structure in (Dense(), Kronecker()):
        start = LaplaceFilter(layer, structure, hypers={"noise": 0.02})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterWarning)
            found[structure] = learn_kernel(start, tasks, {"noise": "*"}, max_iterations=12).hypers["noise"]
    dense, kronecker = found.values()
    np.testing.assert_allclose(kronecker, dense, rtol=0.1)
    np.testing.assert_allclose(dense, 0.16, rtol=0.5)


@x64
@exact
def test_disturbances_equal_the_joint_gaussian(structure):
    """Squares and products of a step's noise, under permutations, gaps in the data, and a group that stands still."""
    tasks = tasks_of(0, num_tasks=5, orders=ORDERS, gaps=[1.0, 0.5, 0.0, 2.0, 1.0], missing=(3,))
    noise, gain = (0.4, 0.0), (0.8, -0.5)
    chain = chain_of(tasks, noise, gain)
    joint = condition(chain)
    found = disturbances(smooth(at(structure, noise, gain).run(0, tasks)))
    for t, (matrix, _, _) in enumerate(chain.steps):
        # (w, x) is linear in the path
        order = np.argmax(np.abs(matrix), axis=1)
        pick = np.eye(P)[order]
        cov = lambda a, b: joint.covariance[a, :, b]  # noqa: E731
        w_mean, x_mean = joint.mean[t + 1] - matrix @ joint.mean[t], pick @ joint.mean[t]
        cross = cov(t + 1, t) @ matrix.T
        w_cov = cov(t + 1, t + 1) - cross - cross.T + matrix @ cov(t, t) @ matrix.T
        product = (cov(t + 1, t) - matrix @ cov(t, t)) @ pick.T
        np.testing.assert_allclose(found[t].square, np.diag(w_cov) + w_mean**2, atol=1e-9)
        np.testing.assert_allclose(found[t].product, np.diag(product) + w_mean * x_mean, atol=1e-9)
        np.testing.assert_allclose(found[t].before, np.diag(pick @ cov(t, t) @ pick.T) + x_mean**2, atol=1e-9)
        assert np.all(np.asarray(found[t].square)[GROUP == 1] == 0)


@x64
@exact
def test_plain_em_never_lowers_the_evidence_and_climbs_to_its_maximum(structure):
    tasks = tasks_of(1, noise=(0.3, 0.1))
    with pytest.warns(FilterWarning, match="used up"):
        learnt = learn_kernel(
            at(structure, (2.0, 0.01)), tasks, NOISES, accelerate=False, max_iterations=10, tolerance=1e-6
        )
    risen = np.diff([one.log_evidence for one in learnt.history])
    assert np.all(risen > -1e-9)
    assert risen[0] > 1
    assert not learnt.converged


def maximum(function, start):
    """The exact marginal likelihood's maximum by scipy."""
    found = minimize(lambda z: -function(z), start, method="BFGS", options={"gtol": 1e-6})
    return found.x, -found.fun


@x64
@exact
@pytest.mark.parametrize("start", [pytest.param((2.0, 0.01), marks=pytest.mark.slow), (0.001, 1.0)])
def test_the_fixed_point_is_the_maximum_of_the_exact_evidence(structure, start):
    tasks = tasks_of(1, noise=(0.3, 0.1))
    best, value = maximum(lambda z: evidence(tasks, np.exp(z)), np.log([0.3, 0.1]))
    learnt = learn_kernel(at(structure, start), tasks, NOISES, tolerance=1e-5)
    assert learnt.converged
    assert len(learnt.history) < 20
    assert learnt.log_evidence == pytest.approx(value, abs=1e-7)
    np.testing.assert_allclose([float(learnt.hypers[name]) for name in NOISES], np.exp(best), rtol=1e-4)
    plain = learn_kernel(at(structure, np.exp(best)), tasks, NOISES, accelerate=False, tolerance=1e-3)
    assert len(plain.history) == 1, "EM alone must stay where the evidence has its maximum"


@pytest.mark.slow
@x64
def test_noise_and_gain_are_learnt_together():
    """Under permutations and unequal gaps."""
    rng = np.random.default_rng(5)
    orders, gaps = [rng.permutation(3) for _ in range(25)], rng.uniform(0.3, 2, 25)
    tasks = tasks_of(2, noise=(0.2, 0.1), gain=(0.7, -0.6), num_tasks=25, size=5, orders=orders, gaps=gaps)

    def exact_evidence(z):
        return evidence(tasks, np.exp(z[:2]), z[2:])

    best, value = maximum(exact_evidence, np.append(np.log([0.2, 0.1]), [0.7, -0.6]))
    learnt = learn_kernel(at("dense", (1.0, 1.0), (0.1, 0.1)), tasks, NOISES, gains=GAINS, tolerance=1e-4)
    assert learnt.converged
    assert learnt.log_evidence == pytest.approx(value, abs=1e-5)
    found = [float(learnt.hypers[name]) for name in (*NOISES, *GAINS)]
    np.testing.assert_allclose(found, np.append(np.exp(best[:2]), best[2:]), rtol=1e-2, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        plain = learn_kernel(
            at("dense", (1.0, 1.0), (0.1, 0.1)), tasks, NOISES, gains=GAINS, accelerate=False, max_iterations=8
        )
    assert np.all(np.diff([one.log_evidence for one in plain.history]) > 0)


@pytest.mark.slow
def test_single_precision_finds_the_maximum():
    tasks = [Task(jax.tree.map(np.float32, task.data)) for task in tasks_of(3)]
    _, value = maximum(lambda z: evidence(tasks_of(3), np.exp(z)), np.log([0.3, 0.1]))
    learnt = learn_kernel(LaplaceFilter(program, LowRank(P), hypers=hypers_of((1.0, 1.0))), tasks, NOISES)
    assert learnt.converged
    assert learnt.log_evidence == pytest.approx(value, abs=0.05)


@x64
def test_of_an_approximation_the_best_iterate_is_kept_and_its_end_is_told():
    """The diagonal filter's evidence and its EM part somewhere."""
    tasks = tasks_of(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learnt = learn_kernel(LaplaceFilter(program, Diagonal(), hypers=hypers_of((1.0, 1.0))), tasks, NOISES)
    assert learnt.converged == (not caught)
    assert learnt.log_evidence == max(one.log_evidence for one in learnt.history)
    assert learnt.log_evidence > learnt.history[0].log_evidence + 1


@pytest.mark.slow
@x64
def test_the_profile_peaks_where_em_ends():
    tasks = tasks_of(1, noise=(0.3, 0.1))
    learnt = learn_kernel(at("dense", (0.1, 0.1)), tasks, NOISES, tolerance=1e-4)
    at_best = engine("dense").with_hypers(learnt.hypers)
    q = float(learnt.hypers["noise.first"])
    profile = profile_kernel(at_best, tasks, "noise.first", [0.0, q / 3, q, 3 * q])
    assert profile.values[profile.best] == q
    assert profile.log_evidence[profile.best] == pytest.approx(learnt.log_evidence, abs=1e-9)
    assert profile.rows()[0]["noise.first"] == 0.0

    def refit(filter_):
        return learn_kernel(filter_, tasks, {"noise.second": "second"}, tolerance=1e-2).hypers

    refitted = profile_kernel(at_best, tasks, "noise.first", [q / 3, q, 3 * q], refit=refit)
    assert np.all(refitted.log_evidence >= profile.log_evidence[1:] - 1e-6)
    axes = refitted.plot(marks={"EM": q})
    assert axes.get_xlabel() == "noise.first"
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"EM", "best of the grid"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noises": {}}, "noises is empty"),
        ({"noises": {"noise": "first"}}, "noises names 'noise'; the engine has the hyper-parameters"),
        (
            {"noises": {"noise.first": "third"}},
            "noises: no weights match the pattern 'third'; the paths are first, second",
        ),
        ({"noises": {"noise.first": "second"}}, "must be proportional to 'noise.first' or to its square"),
        ({"noises": {"noise.first": "*"}}, "must be proportional to 'noise.first' or to its square"),
        ({"noises": {"gain.first": "first"}}, "must be proportional to 'gain.first'"),
        (
            {"gains": {"noise.first": "first"}},
            "the gain of the leaves 'first', and nothing else, must be 'noise.first'",
        ),
        ({"start": (0.0, 0.1)}, "'noise.first' starts at 0.0; EM never leaves 0"),
        ({"tasks": 1}, "tasks has 1 tasks; at least 2 are needed"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
@x64
def test_what_cannot_be_learnt_is_refused(change, message):
    tasks = tasks_of(0, num_tasks=3)[: change.pop("tasks", 3)]
    start = change.pop("start", (0.1, 0.1))
    with pytest.raises(ValueError, match=message):
        learn_kernel(at("dense", start), tasks, **({"noises": NOISES} | change))
