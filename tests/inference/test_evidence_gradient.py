"""The evidence's derivative against the exact one and against differences, and its maximum against EM's."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from scipy.optimize import minimize_scalar
from walking_regression import GAINS, NOISES, P, evidence, program, tasks_of

from ssm_nn import Moments, Task, stack_tasks, weights
from ssm_nn.inference import evidence_gradient
from ssm_nn.inference.diagnosis.traced_filter import TracedFilter
from ssm_nn.inference.differentiable import DifferentiableLowRank
from ssm_nn.inference.evidence_gradient import EvidenceGradient, maximise_evidence
from ssm_nn.inference.expectation_maximisation import learn_kernel
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.sketch import SketchedCurvature
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.models import RandomWalk
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import rotated
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

x64 = pytest.mark.usefixtures("x64")
STRUCTURES = {"dense": Dense(), "full rank": LowRank(P), "diagonal": Diagonal(), "rank 2": LowRank(2)}


def hypers_of(noise, gain=(1.0, 1.0)):
    return dict(zip([*NOISES, *GAINS], [*noise, *gain], strict=True))


@cache
def engine(structure):
    return LaplaceFilter(program, STRUCTURES[structure], hypers=hypers_of((0.1, 0.1)))


@cache
def gradient_of(structure):
    return EvidenceGradient(engine(structure))


def differences(function, hypers, step=1e-4):
    """Central, of fourth order."""
    found = {}
    for name, value in hypers.items():
        shifted = [function(hypers | {name: value + i * step}) for i in (-2, -1, 1, 2)]
        found[name] = (shifted[0] - 8 * shifted[1] + 8 * shifted[2] - shifted[3]) / (12 * step)
    return found


ORDERS = [[1, 2, 0], [2, 1, 0], [0, 2, 1], [1, 0, 2], [2, 0, 1]]


@x64
@pytest.mark.parametrize("structure", ["dense", pytest.param("full rank", marks=pytest.mark.slow)])
def test_gradient_equals_that_of_the_exact_evidence(structure):
    tasks = tasks_of(0, num_tasks=5, size=4, orders=ORDERS, gaps=[1.0, 0.5, 1.5, 2.0, 1.0], missing=(0, 2))
    hypers = hypers_of((0.4, 0.05), (0.8, -0.5))

    def exact(h):
        return evidence(tasks, [h[name] for name in NOISES], [h[name] for name in GAINS])

    found = gradient_of(structure)(hypers, tasks)
    assert found.log_evidence == pytest.approx(exact(hypers), abs=1e-8)
    assert found.unconverged == ()
    for name, expected in differences(exact, hypers).items():
        assert float(found.gradient[name]) == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@pytest.mark.slow
@x64
@pytest.mark.parametrize("structure", ["diagonal", "rank 2"])
def test_gradient_of_an_approximation_is_that_of_its_own_evidence(structure):
    """At a noise of 0 as well, where the derivative is one-sided in the program but not in the formula."""
    tasks = tasks_of(1, num_tasks=4, size=4)
    for noise in ((0.4, 0.05), (0.4, 1e-3)):
        hypers = hypers_of(noise, (0.9, 0.7))
        found = gradient_of(structure)(hypers, tasks)

        def run(h):
            return engine(structure).with_hypers(h).run(0, tasks).log_evidence

        assert found.log_evidence == pytest.approx(run(hypers), abs=1e-9)
        for name, expected in differences(run, hypers, 1e-4).items():
            assert float(found.gradient[name]) == pytest.approx(expected, rel=2e-5, abs=2e-6), name
    still = gradient_of(structure)(hypers_of((0.0, 0.0)), tasks)
    assert all(np.isfinite(float(part)) for part in still.gradient.values())


@pytest.mark.slow
@x64
@pytest.mark.parametrize("structure", [Dense(), pytest.param(LowRank(6), marks=pytest.mark.slow)])
def test_gradient_of_a_nonlinear_network_with_a_converged_map(structure):
    """Softmax outputs, tanh units: the Hessian is not the Gauss-Newton matrix, and the curvature moves with the MAP."""
    rng = np.random.default_rng(3)
    initial = {"hidden": 0.7 * rng.normal(size=(2, 3)), "head": 0.7 * rng.normal(size=(3, 3))}

    def network(params, x):
        return jnp.tanh(x @ params["hidden"]) @ params["head"]

    def model(tasks):
        q = numpyro.sample("q", dist.Uniform(0.0, 10.0))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        net = weights(
            "net",
            (network, initial),
            prior=dist.Normal(0.0, scale),
            transition=lambda leaf: Moments(0.95, 0.0, q),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task["y"])

        net.over(tasks, observe)

    x = rng.normal(size=(3, 12, 2))
    labels = (x[..., 0] > 0).astype(int) + (x[..., 1] > 0.5)
    tasks = [Task({"x": x[t], "y": labels[t]}) for t in range(3)]
    hypers = {"q": 0.2, "scale": 0.9}
    filter_ = LaplaceFilter(model, structure, hypers=hypers, estimator=GaussNewton(tolerance=1e-15, max_steps=500))

    def run(h):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterWarning)
            return filter_.with_hypers(h).run(0, tasks).log_evidence

    found = EvidenceGradient(filter_)(hypers, tasks)
    assert found.log_evidence == pytest.approx(run(hypers), abs=1e-8)
    for name, expected in differences(run, hypers, 1e-3).items():
        assert float(found.gradient[name]) == pytest.approx(expected, rel=1e-4), name


@x64
def test_the_cut_has_a_finite_derivative_where_singular_values_are_equal(rng):
    """Equal inside the kept ones, inside the dropped ones, and across the cut."""
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0][:, :4]
    weights_ = rng.normal(size=(6, 6))

    def loss(structure, factor):
        cut = structure.cut(DiagonalPlusLowRank(jnp.ones(6), factor)).precision
        return jnp.sum(weights_ * cut.to_dense())

    for singular, smooth in (([2.0, 2.0, 1.0, 1.0], True), ([2.0, 1.0, 1.0, 0.5], False)):
        factor = jnp.asarray(basis * singular)
        value, gradient = jax.value_and_grad(lambda f: loss(DifferentiableLowRank(2), f))(factor)
        assert float(value) == pytest.approx(float(loss(LowRank(2), factor)), abs=1e-10)
        assert np.all(np.isfinite(gradient))
        if smooth:
            direction, eps = rng.normal(size=(6, 4)), 1e-5
            slope = (loss(LowRank(2), factor + eps * direction) - loss(LowRank(2), factor - eps * direction)) / (
                2 * eps
            )
            assert float(jnp.sum(gradient * direction)) == pytest.approx(float(slope), rel=1e-6)


def bump_task():
    """A bump, which two units of tanh make with weights of opposite signs."""
    x = np.linspace(-2, 2, 40)[:, None]
    return Task({"x": x, "y": np.exp(-2 * x[:, 0] ** 2)})


def bump_program(tasks):
    def apply(w, x):
        return jnp.tanh(x * w["in"] + w["bias"]) @ w["out"]

    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    network = (apply, {"in": jnp.full(2, 0.5), "bias": jnp.full(2, 0.1), "out": jnp.full(2, 0.5)})
    net = weights("net", network, prior=dist.Normal(0.0, 2.0), transition=RandomWalk(noise), num_tasks=len(tasks))
    net.over(tasks, lambda f, task: numpyro.sample("y", dist.Normal(f(task["x"]), 0.1), obs=task["y"]))


@x64
def test_units_that_mirror_each_other_are_reported_as_a_saddle():
    task, hypers = bump_task(), {"noise": jnp.asarray(0.01)}
    mirrored = LaplaceFilter(bump_program, Dense(), hypers=hypers, estimator=Lbfgs())
    with pytest.warns(FilterWarning, match=r"tasks \[0\] did not end at a minimum"):
        assert maximise_evidence(mirrored, [task], ["noise"], steps=1).unconverged_tasks == (0,)
    assert int(TracedFilter(mirrored)(hypers, stack_tasks([task]), jax.random.key(0)).unconverged) == 1


@pytest.mark.slow
@x64
def test_several_starts_end_at_the_highest_of_their_ends():
    tasks, values = tasks_of(0, num_tasks=3), (3.0, 0.1)

    def end(first, *starts):
        begin = engine("dense").with_hypers(hypers_of((first, 0.1)))
        with pytest.warns(FilterWarning, match="slope"):
            return maximise_evidence(begin, tasks, ["noise.first"], starts=starts, steps=2).log_evidence

    alone = [end(value) for value in values]
    assert alone[0] != alone[1]
    assert end(values[0], {"noise.first": values[1]}) == max(alone)


@pytest.mark.slow
@x64
def test_a_noise_that_is_best_at_zero_ends_there_and_the_other_at_its_own_maximum():
    tasks = tasks_of(4, noise=(0.0, 0.3), num_tasks=8)

    def missing_evidence(noise):
        return -evidence(tasks, [0.0, float(noise)])

    expected = minimize_scalar(missing_evidence, bounds=(1e-3, 3.0), method="bounded", options={"xatol": 1e-6})
    assert evidence(tasks, [1e-4, expected.x]) < -expected.fun, "the exact evidence falls with the first noise"
    rule = optax.adam(optax.exponential_decay(0.3, 15, 0.6))
    found = maximise_evidence(engine("dense"), tasks, list(NOISES), optimizer=rule, steps=60, tolerance=2e-2)
    assert float(found.hypers["noise.first"]) == 0.0
    assert float(found.hypers["noise.second"]) == pytest.approx(expected.x, rel=2e-2)
    assert found.log_evidence == pytest.approx(-expected.fun, abs=1e-3)


@pytest.mark.slow
@x64
def test_gradient_and_em_end_at_one_maximum():
    tasks = tasks_of(1, noise=(0.3, 0.1), num_tasks=8)
    start = engine("dense").with_hypers(hypers_of((0.1, 0.3)))
    by_em = learn_kernel(start, tasks, NOISES, tolerance=1e-5)
    there = gradient_of("dense")(by_em.hypers, tasks)
    for name in NOISES:
        assert float(there.gradient[name] * by_em.hypers[name]) == pytest.approx(0, abs=2e-5)
    off = {name: float(by_em.hypers[name]) * factor for name, factor in zip(NOISES, (1.5, 0.7), strict=True)}
    rule = optax.adam(optax.exponential_decay(0.1, 15, 0.6))
    near = start.with_hypers(by_em.hypers | off)
    by_gradient = maximise_evidence(near, tasks, list(NOISES), optimizer=rule, steps=60, tolerance=2e-2)
    assert by_gradient.converged
    assert by_gradient.log_evidence == pytest.approx(by_em.log_evidence, abs=1e-3)
    assert by_gradient.hypers["gain.first"] == 1.0


@x64
def test_what_is_not_kept_for_the_way_back_is_made_again(monkeypatch):
    tasks = tasks_of(0, num_tasks=5, size=4, missing=(2,))
    hypers, made = hypers_of((0.4, 0.05)), []
    keep = evidence_gradient._PullBack.keep
    monkeypatch.setattr(
        evidence_gradient._PullBack, "keep", lambda pull, room: made.append(keep(pull, room)) or made[-1]
    )
    kept = gradient_of("dense")(hypers, tasks)
    assert made[0] == 0  # no hyper-parameter moves the prior
    assert all(made[1:])
    monkeypatch.setattr(evidence_gradient, "_KEPT_BYTES", made[1])
    again = gradient_of("dense")(hypers, tasks)
    assert [size > 0 for size in made[5:]] == [False, True, False, False, False]
    assert again == kept


@pytest.mark.slow
def test_a_step_is_compiled_once_a_shape():
    tasks = [Task(jax.tree.map(np.float32, task.data)) for task in tasks_of(0, num_tasks=4)]
    gradient = EvidenceGradient(LaplaceFilter(program, LowRank(P), hypers=hypers_of((0.1, 0.1))))
    gradient(hypers_of((0.1, 0.1)), tasks)
    pieces = [getattr(gradient._evidence, name) for name in ("first", "later", "pull")]
    before = [piece._cache_size() for piece in pieces]
    found = gradient(hypers_of((0.2, 0.3)), tasks)
    assert [piece._cache_size() for piece in pieces] == before == [1, 1, 2]
    assert found.gradient["noise.first"].dtype == np.float32


@pytest.mark.slow
def test_steps_that_do_not_suffice_are_reported():
    tasks = [Task(jax.tree.map(np.float32, task.data)) for task in tasks_of(0, num_tasks=4)]
    start = LaplaceFilter(program, LowRank(P), hypers=hypers_of((5.0, 5.0)))
    with pytest.warns(FilterWarning, match="the evidence still has a slope of"):
        found = maximise_evidence(start, tasks, ["noise.first"], steps=2)
    assert not found.converged
    assert len(found.history) == 2


@pytest.mark.parametrize(
    ("learn", "change", "message"),
    [
        ([], {}, "learn is "),
        ("noise.first", {}, "learn is 'noise.first'; a sequence"),
        (["noise"], {}, "learn names 'noise'; the engine has the hyper-parameters"),
        (["noise.first"], {"noise": (0.0, 0.1)}, "'noise.first', which starts at 0.0, on the edge of its support"),
        (["noise.first"], {"starts": [{"noise.first": -1.0}]}, "'noise.first', which starts at -1.0"),
        (["noise.first"], {"starts": [{"noise.last": 1.0}]}, "starts names ..noise.last..; learn names"),
        (["noise.first"], {"steps": 0}, "steps is 0"),
        (["noise.first"], {"tolerance": -1.0}, "tolerance is -1.0"),
        (["noise.first"], {"curvature": SketchedCurvature()}, "ExactCurvature"),
    ],
)
def test_what_cannot_be_maximised_is_refused(learn, change, message):
    settings = {name: change.pop(name) for name in ("curvature",) if name in change}
    filter_ = LaplaceFilter(program, LowRank(2), hypers=hypers_of(change.pop("noise", (0.1, 0.1))), **settings)
    tasks = [Task(jax.tree.map(np.float32, task.data)) for task in tasks_of(0, num_tasks=2)]
    with pytest.raises(ValueError, match=message):
        maximise_evidence(filter_, tasks, learn, **change)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_rotated_digits_the_gradient_reaches_the_best_of_a_grid(seed):
    """q in {0, .01, .1, .5, 1} for each of two layers."""
    tasks = list(rotated(load("digits"), 8, 5.0, 50, seed=seed).train)
    model = classification(mlp((64, 24, 10)), 1.0, {"first": "layers.0.*", "last": "layers.1.*"})
    start = {"noise.first": 0.003, "noise.last": 0.3}
    filter_ = LaplaceFilter(model, LowRank(100), hypers=start, estimator=Lbfgs())
    grid = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        for first in (0.0, 0.01, 0.1, 0.5, 1.0):
            for last in (0.0, 0.01, 0.1, 0.5, 1.0):
                here = filter_.with_hypers({"noise.first": first, "noise.last": last})
                grid[first, last] = here.run(seed, tasks).log_evidence
        ascent = {"starts": [{"noise.first": 0.1, "noise.last": 1.0}], "optimizer": optax.adam(0.5), "steps": 20}
        found = maximise_evidence(filter_, tasks, list(start), key=seed, **ascent)
    # each run ends in modes of its own: from one start, as far as nats apart
    assert found.log_evidence >= max(grid.values()) - 0.05, (found.history, grid)
