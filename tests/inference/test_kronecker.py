"""The filter with the Kronecker-eigen structure: exact for linear regression, and what it refuses."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles_gaussian import Chain, condition, of_task

from ssm_nn import ByPath, PerTask, Task, weights
from ssm_nn.inference.checkpoints import load, save
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.kronecker import Kronecker, KroneckerCurvature
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import CONVERGED, MapResult
from ssm_nn.inference.sketch import SketchedCurvature
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.models.transitions import Permuted, RandomWalk, Rotated, ShrinkAndPerturb, Static

D, C, N, T, SD, PRIOR = 4, 3, 6, 4, 0.5, 1.3
P = (D + 1) * C
K = 3
pytestmark = pytest.mark.usefixtures("x64")


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def regression(transition, network=None):
    """y_n ~ N(x_n W + b, SD^2 I); ``transition`` of a hyper-parameter and of the tasks' context."""

    def program(tasks):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        net = weights(
            "net",
            network or (linear, {"kernel": jnp.zeros((D, C)), "bias": jnp.zeros(C)}),
            prior=dist.Normal(0.0, PRIOR),
            transition=transition(scale, tasks.context),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), SD).to_event(1), obs=task["y"])

        net.over(tasks, observe)

    return program


def each(kernel, bias):
    return ByPath({"kernel": kernel, "bias": bias})


def moving(scale, context):
    return ShrinkAndPerturb(context["gain"], scale * context["sd"])


# a step into each task with a known map of its own
KINDS = {
    "inputs turned": lambda s, c: each(Rotated(c["turn"], then=moving(s, c)), moving(s, c)),
    "inputs permuted": lambda s, c: each(Permuted(c["turn"], then=moving(s, c)), moving(s, c)),
    "outputs turned": lambda s, c: each(Rotated(c["turn"], 1, moving(s, c)), Rotated(c["turn"], 0, moving(s, c))),
}


@cache
def engine(kind, structure=Kronecker()):  # noqa: B008  (frozen)
    """One a kind of map, so that it is compiled once."""
    program = regression(lambda scale, context: PerTask(lambda c: KINDS[kind](scale, c), context))
    return LaplaceFilter(program, structure, hypers={"scale": 1.0}, estimator=GaussNewton())


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


# gain and standard deviation of a step
STEPS = {
    "static": (1.0, 0.0),
    "random walk": (1.0, 0.4),
    "Ornstein-Uhlenbeck": (0.6, 0.8 * PRIOR),
    "shrink and perturb": (0.8, 0.2),
    "drawn anew": (0.0, PRIOR),
}


def tasks_of(seed, step="random walk", kind=None, missing=(), num_tasks=T):
    """``kind`` None: a map that leaves everything in its place, for the engine of turned inputs."""
    rng = np.random.default_rng(seed)
    tasks = []
    for t in range(num_tasks):
        x = rng.normal(size=(N, D))
        y = x @ rng.normal(size=(D, C)) + rng.normal(size=C) + SD * rng.normal(size=(N, C))
        turn = {
            None: np.eye(D),
            "inputs turned": rotation(D, t),
            "inputs permuted": rng.permutation(D),
            "outputs turned": rotation(C, t),
        }[kind]
        gain, sd = map(np.asarray, STEPS[step])
        tasks.append(Task({} if t in missing else {"x": x, "y": y}, {"gain": gain, "sd": sd, "turn": turn}))
    return tasks


def chain_of(tasks, kind=None):
    """The same as matrices; theta is the bias, then the kernel row by row."""
    steps, data = [], []
    for t, task in enumerate(tasks):
        turn, gain, sd = (task.context[name] for name in ("turn", "gain", "sd"))
        turn = np.eye(D)[turn] if kind == "inputs permuted" else turn
        matrix = np.zeros((P, P))
        outputs = turn if kind == "outputs turned" else np.eye(C)
        matrix[:C, :C] = outputs
        matrix[C:, C:] = np.kron(np.eye(D), outputs) if kind == "outputs turned" else np.kron(turn, np.eye(C))
        if t:
            steps.append((gain * matrix, np.zeros(P), sd**2 * np.eye(P)))
        if task.data:
            design = np.kron(np.concatenate([np.ones((N, 1)), task["x"]], axis=1), np.eye(C))
            data.append((design, np.ravel(task["y"]), SD**2 * np.eye(N * C)))
        else:
            data.append(None)
    return Chain(np.zeros(P), PRIOR**2 * np.eye(P), steps, data)


def assert_close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


def trace(belief):
    return float(jnp.sum(belief.precision.precision_diagonal()))


@pytest.mark.parametrize(
    ("step", "kind"), [*((step, None) for step in STEPS), *(("shrink and perturb", kind) for kind in KINDS)]
)
def test_linear_regression_of_several_outputs_is_exact(step, kind):
    """Beliefs, evidence and smoothed means, with a task that has no data; of smoothed precisions the trace is."""
    tasks = tasks_of(1, step, kind, missing=(2,))
    chain = chain_of(tasks, kind)
    filtered = engine(kind or "inputs turned").run(0, tasks)
    smoothed = engine(kind or "inputs turned").smooth(filtered)
    everything = condition(chain)
    for t in range(T):
        mean, covariance = of_task(condition(chain, t), t)
        assert_close(filtered.beliefs[t].mean, mean, 1e-9)
        assert_close(np.linalg.inv(np.asarray(filtered.beliefs[t].precision.to_dense())), covariance, 1e-9)
        evidence = condition(chain, t).log_evidence - (condition(chain, t - 1).log_evidence if t else 0.0)
        assert filtered.infos[t].log_evidence == pytest.approx(evidence, abs=1e-8)
        mean, covariance = of_task(everything, t)
        assert_close(smoothed.means[t], mean, 1e-9)
        assert trace(smoothed.beliefs[t]) >= trace(filtered.beliefs[t]) - 1e-9
        if step == "static":
            assert trace(smoothed.beliefs[t]) == pytest.approx(np.trace(np.linalg.inv(covariance)), rel=1e-9)


def test_density_and_beliefs_equal_those_of_the_dense_structure():
    tasks = tasks_of(9, "shrink and perturb", "inputs turned")
    found, exact = (engine("inputs turned", structure).run(0, tasks) for structure in (Kronecker(), Dense()))
    for here, there in zip(found.beliefs, exact.beliefs, strict=True):
        assert_close(here.mean, there.mean)
        assert_close(here.precision.to_dense(), there.precision.to_dense())
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-10)
    path = jnp.array(np.random.default_rng(0).normal(size=(T, P)))
    one, two = (engine("inputs turned").smooth(filtered).log_density(path) for filtered in (found, exact))
    assert float(one) == pytest.approx(float(two), abs=1e-8)


def test_a_task_that_says_nothing_is_a_prediction():
    kronecker = engine("inputs turned")
    tasks = tasks_of(2)
    state, _ = kronecker.update(kronecker.init(0, tasks[0]), tasks[0])
    silent, _ = kronecker.update(state, Task({}, tasks[1].context))
    empty = {name: value[:0] for name, value in tasks[1].data.items()}
    for data, mask in ((empty, None), (tasks[1].data, np.zeros(N, bool))):
        after, info = kronecker.update(state, Task(data, tasks[1].context, mask))
        assert info.log_evidence == 0
        assert_close(after.mean, silent.mean, 0)
        assert_close(after.precision.to_dense(), silent.precision.to_dense(), 0)
    assert_close(silent.mean, state.mean, 1e-15)
    assert trace(silent) < trace(state)


def test_updates_equal_run_and_come_back_from_a_file(tmp_path):
    """Every update by way of a checkpoint of the state and the Info."""
    kronecker = engine("inputs turned")
    tasks = tasks_of(3, kind="inputs turned", missing=(1,))
    filtered = kronecker.run(jax.random.key(5), tasks)
    state = kronecker.init(jax.random.key(5), tasks[0])
    for t, task in enumerate(tasks):
        made = kronecker.update(state, task)
        save(tmp_path / "state.npz", made)
        state, info = load(tmp_path / "state.npz", jax.tree.map(lambda leaf: leaf, made))
        found = (state.mean, state.precision), info.site, info.moments
        expected = filtered.beliefs[t][:2], filtered.infos[t].site, filtered.infos[t].moments
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, two)
        assert info.log_evidence == filtered.infos[t].log_evidence


def test_other_hyper_parameters_and_data_compile_nothing_again():
    kronecker = engine("inputs turned")
    once = kronecker.run(0, tasks_of(4))
    pieces = ("_first", "_advance", "_condition", "_supported")
    before = {name: getattr(kronecker, name)._cache_size() for name in pieces}
    other = kronecker.with_hypers({"scale": np.float64(0.1)}).run(1, tasks_of(4))
    kronecker.run(0, tasks_of(5, "static", "inputs turned"))
    assert {name: getattr(kronecker, name)._cache_size() for name in pieces} == before
    assert abs(other.log_evidence - once.log_evidence) > 0.1


def test_a_first_task_without_examples_is_the_prior():
    tasks = tasks_of(7)
    empty = Task({name: value[:0] for name, value in tasks[0].data.items()}, tasks[0].context)
    silent = [Task({}, tasks[0].context), *tasks[1:]]
    found = engine("inputs turned").run(0, [empty, *tasks[1:]])
    assert found.log_evidence == pytest.approx(condition(chain_of(silent)).log_evidence, abs=1e-8)


def test_the_basis_is_that_of_the_partial_traces_of_prior_and_data():
    """On a linear model, whose inputs alone have a basis: the eigenvectors of sum a a^T."""
    kronecker = engine("inputs turned")
    task = tasks_of(6)[0]
    state, info = kronecker.update(kronecker.init(0, task), task)
    wide = np.concatenate([task["x"], np.ones((N, 1))], axis=1)
    inputs = np.asarray(info.site.blocks[0].inputs)
    turned = inputs.T @ (wide.T @ wide) @ inputs
    assert_close(turned, np.diag(np.diag(turned)), 1e-9)
    assert_close(info.site.blocks[0].values, np.repeat(np.diag(turned)[:, None], C, axis=1) / SD**2, 1e-9)
    assert_close(state.precision.blocks[0].values, info.site.blocks[0].values + 1 / PRIOR**2, 1e-9)


# bad input


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T + params["b"]


SWAP = np.array([1, 0, 2])
REFUSED = {
    "noise": (
        each(RandomWalk(0.1), RandomWalk(0.2)),
        Kronecker(),
        None,
        "noise differs within the layer of 'net.kernel'",
    ),
    "gain": (each(RandomWalk(0.1), ShrinkAndPerturb(0.5, 0.1)), Kronecker(), None, "gain differs within the layer"),
    "low rank": (each(Rotated(rotation(D)), Static()), LowRank(3), None, "Kronecker and Dense carry matrices too"),
    "diagonal": (each(Rotated(rotation(D)), Static()), Diagonal(), None, "Kronecker and Dense carry matrices too"),
    "outputs alone": (each(Permuted(SWAP, 1), Static()), Kronecker(), None, "in its weights or in its bias alone"),
    "bias alone": (each(Static(), Permuted(SWAP)), Kronecker(), None, "in its weights or in its bias alone"),
    "two maps": (
        each(Permuted(SWAP, 1), Permuted(SWAP[::-1])),
        Kronecker(),
        None,
        "otherwise in its weights than in its",
    ),
    "exact curvature": (Static(), Kronecker(), ExactCurvature(), "use KroneckerCurvature, which is its default"),
    "sketch": (Static(), Kronecker(), SketchedCurvature(2), "SketchedCurvature serves LowRank and Diagonal, not"),
    "other structure": (Static(), LowRank(3), KroneckerCurvature(), "KroneckerCurvature serves Kronecker, not LowRank"),
}


class Still:
    """A search that stays where it starts."""

    def bind(self, program):
        del program
        return lambda problem, start, key: MapResult(start, 0, CONVERGED, 0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_structure_cannot_carry_is_refused(name):
    transition, structure, curvature, message = REFUSED[name]
    program = regression(lambda scale, context: transition)
    refusing = LaplaceFilter(program, structure, hypers={"scale": 1.0}, estimator=Still(), curvature=curvature)
    with pytest.raises(ValueError, match=message):
        refusing.run(0, [task.data for task in tasks_of(0, num_tasks=2)])


def test_what_cannot_be_traced_is_refused():
    tasks = tasks_of(0)
    with pytest.raises(ValueError, match="the first task has no data: Kronecker needs its shapes"):
        engine("inputs turned").run(0, [Task({}, tasks[0].context), *tasks])
    network = tied, {"w": jnp.ones((D, 2)), "b": jnp.zeros(D)}
    with pytest.raises(ValueError, match=r"net.w are used 2 times \(tied weights"):
        LaplaceFilter(regression(lambda scale, context: Static(), network), Kronecker(), hypers={"scale": 1.0}).init(
            0, {"x": np.ones((N, D)), "y": np.ones((N, D))}
        )


@pytest.mark.parametrize("rank", [-1, 2.5, True])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank is .*; a whole number >= 0 is accepted"):
        Kronecker(rank)


@pytest.mark.parametrize("examples", [0, 1.5, True])
def test_a_number_of_examples_that_is_none_is_refused(examples):
    with pytest.raises(ValueError, match=r"examples is .*; a whole number >= 1 is accepted"):
        KroneckerCurvature(examples)


def test_an_unfitted_structure_says_so():
    with pytest.raises(ValueError, match="must be fitted to a program first"):
        Kronecker().prior(jnp.ones(3))
