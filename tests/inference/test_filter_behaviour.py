"""What the filter does beside its sums: it compiles once, refuses bad data, and reports what went wrong."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ssm_nn import Task, Tasks, weights
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.map_problem import (
    CONVERGED,
    FIXED_BUDGET,
    NOT_CONVERGED,
    NOT_FINITE,
    MapResult,
)
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.structures import Dense, LowRank
from ssm_nn.models.transitions import RandomWalk

N, D, K, T = 8, 2, 3, 3


def tanh_network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["head"]


def initial():
    rng = np.random.default_rng(1)
    return {"head": rng.normal(size=(2, K)), "hidden": rng.normal(size=(D, 2))}


def program(tasks):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    net = weights(
        "net",
        (tanh_network, initial()),
        prior=dist.Normal(0.0, 0.7),
        transition=RandomWalk(scale),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task["y"])

    net.over(tasks, observe)


def tasks_of(seed=0, size=N, num_tasks=T):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tasks, size, D)).astype(np.float32)
    labels = (x[..., 0] > 0).astype(np.int32) + (x[..., 1] > 0.5)
    return [Task({"x": x[t], "y": labels[t]}) for t in range(num_tasks)]


@cache
def engine():
    return LaplaceFilter(program, LowRank(4), hypers={"scale": 0.2})


COMPILED = ("_first", "_advance", "_condition", "_supported")


def compilations(filter_):
    return {name: getattr(filter_, name)._cache_size() for name in COMPILED}


def test_each_piece_is_compiled_once_a_shape(caplog):
    """Other data, another hyper-parameter of another type, a state that comes from the host: all the same program."""
    filter_ = LaplaceFilter(program, LowRank(4), hypers={"scale": 0.7})
    filter_.run(0, tasks_of())
    assert compilations(filter_) == dict.fromkeys(COMPILED, 1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        filter_.run(1, tasks_of(1))
        other = filter_.with_hypers({"scale": np.float64(0.2)}).run(0, tasks_of())
        filter_.with_hypers({"scale": jnp.array(0.5)}).run(0, tasks_of(2))
        state = filter_.init(0, tasks_of()[0])
        saved = jax.tree.map(np.asarray, state._replace(key=0))._replace(key=state.key)
        filter_.update(saved, tasks_of()[0])
    # the pieces of the filter and the search for the maximum; small helpers are none of them
    pieces = tuple(f"Compiling jit({name})" for name in ("_first_belief", "_predict", "_laplace", "<lambda>"))
    assert not [record for record in caplog.records if record.getMessage().startswith(pieces)]
    assert other.log_evidence == engine().run(0, tasks_of()).log_evidence


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_that_are_not_finite_are_refused(bad):
    task = tasks_of()[0]
    x = task["x"].copy()
    x[[2, 5], 1] = bad
    with pytest.raises(ValueError, match="'x' of the task is not finite in 2 examples, the first at index 2"):
        engine().init(0, Task({"x": x, "y": task["y"]}))
    state = engine().init(0, task)
    with pytest.raises(ValueError, match="'x' of the task is not finite in 2 examples, the first at index 2"):
        engine().update(state, Task({"x": x, "y": task["y"]}))
    counted = np.ones(N, bool)
    counted[[2, 5]] = False
    engine().init(0, Task({"x": x, "y": task["y"]}, mask=counted))


@pytest.mark.parametrize("label", [-1, K])
def test_labels_out_of_range_are_refused(label):
    task = tasks_of()[0]
    y = task["y"].copy()
    y[3] = label
    state = engine().init(0, task)
    with pytest.raises(ValueError, match="the values observed at 'y' lie outside the support of its likelihood"):
        engine().update(state, Task({"x": task["x"], "y": y}))
    # under the mask any label may stand
    engine().update(state, Task({"x": task["x"], "y": y}, mask=np.arange(N) != 3))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks is empty"),
        (
            [tasks_of()[0], Task({"x": np.ones((N, 5), np.float32), "y": np.zeros(N, int)})],
            "task 1: 'x' holds examples of shape",
        ),
        ([3], "a task is a Task, a mapping of arrays or None, not int"),
        ([Tasks({"x": np.ones((1, N, D))})], "this is a stack of tasks, where one task is needed"),
        ([Task({"x": np.ones((N, D), np.float32)})], "this task has no 'y'"),
        ([tasks_of()[0], Task({"x": np.ones((N, D), np.float32)})], "task 1 has no 'y'; it has"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks, message):
    with pytest.raises((ValueError, KeyError), match=message.replace("'", ".?'")):
        engine().run(0, tasks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LaplaceFilter(3), "program is 3"),
        (lambda: LaplaceFilter(program, power=0.0), "power is 0.0; a finite number > 0 is accepted"),
        (lambda: LaplaceFilter(program).init(0, tasks_of()[0]), "hypers has no value for the latent site 'scale'"),
        (lambda: LaplaceFilter(program, hypers={"scale": -1.0}).init(0, tasks_of()[0]), "the scale of RandomWalk is"),
        (lambda: GaussNewton(max_steps=0), "max_steps is 0"),
        (lambda: GaussNewton(tolerance=0.0), "tolerance is 0.0"),
        (lambda: Minibatch(epochs=0), "epochs is 0"),
        (lambda: Minibatch(batch_size=2.5), "batch_size is 2.5"),
        (lambda: Minibatch(patience=-1), "patience is -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Scripted:
    """A search that ends as the test says."""

    def __init__(self):
        self.status, self.change = CONVERGED, 0.0

    def bind(self, program):
        del program
        return lambda problem, start, key: MapResult(start + self.change, 3, self.status, 0.0)


@pytest.fixture(scope="module")
def scripted():
    """One engine for all endings, so that it is compiled once."""
    search = Scripted()
    return search, LaplaceFilter(program, LowRank(4), hypers={"scale": 0.2}, estimator=search)


# the search itself says so, or its result shows it
@pytest.mark.parametrize(("status", "change"), [(NOT_FINITE, 0.0), (CONVERGED, np.nan), (NOT_CONVERGED, 1e30)])
def test_a_map_that_is_not_finite_leaves_the_prediction(scripted, status, change):
    search, filter_ = scripted
    first, second = tasks_of()[:2]
    search.status, search.change = CONVERGED, 0.0
    before, _ = filter_.update(filter_.init(0, first), first)
    search.status, search.change = status, change
    with pytest.warns(FilterWarning, match="task 1: the MAP search or the curvature is not finite") as caught:
        after, info = filter_.update(before, second)
    assert len(caught) == 1
    silent, _ = filter_.update(before, None)
    for found, expected in zip(jax.tree.leaves(after[2:]), jax.tree.leaves(silent[2:]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (info.status, info.steps, info.converged) == (NOT_FINITE, 3, False)
    assert np.isnan(info.log_evidence)
    assert not np.any(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(info.site)]))
    # and the filter goes on from there
    search.status, search.change = CONVERGED, 0.0
    going_on, info = filter_.update(after, second)
    assert int(going_on.step) == 3
    assert info.converged
    assert np.all(np.isfinite(going_on.mean))


def test_a_search_cut_short_is_reported_and_its_belief_kept(scripted):
    search, filter_ = scripted
    search.status, search.change = NOT_CONVERGED, 0.25
    task = tasks_of()[0]
    with pytest.warns(FilterWarning, match="task 0: the MAP search did not converge"):
        state, info = filter_.update(filter_.init(0, task), task)
    assert (info.status, info.converged) == (NOT_CONVERGED, False)
    assert np.isfinite(info.log_evidence)
    np.testing.assert_allclose(state.mean, own_weights() + 0.25, rtol=1e-6)


def test_a_fixed_budget_is_no_failure(scripted):
    search, filter_ = scripted
    search.status, search.change = FIXED_BUDGET, 0.0
    task = tasks_of()[0]
    _, info = filter_.update(filter_.init(0, task), task)
    assert info.status == FIXED_BUDGET
    assert "convergence was not judged" in info.message


def test_the_first_search_starts_at_the_networks_own_weights(scripted):
    """A zero mean is a saddle; later searches start at the prediction."""
    search, filter_ = scripted
    search.status, search.change = CONVERGED, 0.0
    first, second = tasks_of()[:2]
    state = filter_.init(0, first)
    np.testing.assert_array_equal(state.mean, 0)
    for task in (first, second):
        state, _ = filter_.update(state, task)
        np.testing.assert_allclose(state.mean, own_weights(), rtol=1e-6)


def own_weights():
    return np.concatenate([np.ravel(leaf) for leaf in initial().values()])


@pytest.mark.usefixtures("x64")
def test_counting_the_likelihood_twice_is_counting_every_example_twice():
    """Sixteen rows, of which the last eight are copies, counted or not."""
    tasks, half = tasks_of()[:2], np.arange(2 * N) < N
    rows = [{name: np.concatenate([task[name], task[name]]) for name in task} for task in tasks]
    copies = LaplaceFilter(
        program, Dense(), hypers={"scale": 0.2}, estimator=GaussNewton(max_steps=500, tolerance=1e-13)
    )
    # the power is data: a copy of the engine shares what is compiled
    twice = copies.with_hypers(copies.hypers)
    twice.power = 2.0
    once = copies.run(0, [Task(row, mask=np.ones(2 * N, bool)) for row in rows])
    powered = twice.run(0, [Task(row, mask=half) for row in rows])
    for found, expected in zip(powered.beliefs, once.beliefs, strict=True):
        np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(found.precision.to_dense(), expected.precision.to_dense(), atol=1e-4)
    assert powered.log_evidence == pytest.approx(once.log_evidence, abs=1e-5)


def test_float32_stays_float32():
    filtered = engine().run(0, tasks_of())
    smoothed = engine().smooth(filtered)
    for leaf in jax.tree.leaves((filtered.beliefs, [info.site for info in filtered.infos], smoothed.beliefs)):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(leaf)))
    assert np.isfinite(filtered.log_evidence)


@pytest.mark.usefixtures("x64")
def test_a_float32_network_stays_so_among_float64():
    """Modules of flax and equinox are float32 unless told otherwise."""

    def single(tasks):
        params = {name: leaf.astype(np.float32) for name, leaf in initial().items()}
        settings = {"prior": dist.Normal(0.0, 0.7), "transition": RandomWalk(0.2), "num_tasks": len(tasks)}
        net = weights("net", (tanh_network, params), **settings)

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Bernoulli(logits=f(task["x"])[:, 0]), obs=task["y"] == 0)

        net.over(tasks, observe)

    filter_ = LaplaceFilter(single, LowRank(4))
    for dtype in (np.float32, np.float64):
        task = Task({name: value.astype(dtype) if name == "x" else value for name, value in tasks_of()[0].data.items()})
        state, info = filter_.update(filter_.init(0, task), task)
        assert {leaf.dtype for leaf in jax.tree.leaves(state[2:])} == {jnp.dtype("float32")}
        assert np.isfinite(info.log_evidence)


def test_progress_is_called_after_every_task():
    seen = []
    filtered = engine().run(
        0, tasks_of(), progress=lambda t, state, info: seen.append((t, int(state.step), info.log_evidence))
    )
    assert seen == [(t, t + 1, info.log_evidence) for t, info in enumerate(filtered.infos)]
