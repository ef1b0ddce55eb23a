"""The evidence by kernels of outputs: that of dense algebra, for every form of linear program; other programs are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from walking_regression import program as ordered
from walking_regression import tasks_of

import ssm_nn
from ssm_nn import ByPath, Moments, PerTask
from ssm_nn.inference import Dense, Diagonal, LaplaceFilter, LowRank
from ssm_nn.inference.diagnosis import linear_outputs, marginalize
from ssm_nn.inference.diagnosis.kernel_evidence import kernel_evidence, kernel_resolves
from ssm_nn.inference.diagnosis.linear_outputs import linear_tasks
from ssm_nn.inference.diagnosis.traced_filter import TracedFilter
from ssm_nn.models import RandomWalk, Static

T, N = 4, 5
LOC = np.array([[0.3, -1.0], [0.0, 2.0], [0.5, 0.1]])
HYPERS = {"walk": 0.4, "gain": 0.7, "noise": 0.5, "level": 1.3}


def apply(params, x):
    return x @ params["moving"] + params["still"]


def regression(tasks):
    """Columns that move differently, by a kernel of the task; a leaf that stands still; two sites, one of rows of two."""
    walk = numpyro.sample("walk", dist.HalfNormal(1.0))
    gain = numpyro.sample("gain", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))

    def step(context):
        columns = jnp.array([1.0, 2.0]) * context["gap"] * walk
        return ByPath({"still": Static()}, otherwise=lambda leaf: Moments(gain, 0.2, jnp.square(columns)))

    net = ssm_nn.weights(
        "net",
        (apply, {"moving": jnp.zeros((3, 2)), "still": jnp.zeros(2)}),
        prior=ByPath({"moving": dist.Normal(LOC, 0.9)}, otherwise=dist.Normal(0.0, 0.6)),
        transition=PerTask(step, tasks.context),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            outputs = f(task["x"])
            numpyro.sample("y", dist.Normal(outputs + level, noise).to_event(1), obs=task["y"])
            numpyro.sample("z", dist.Normal(2.0 * outputs[:, 0], 0.1 + jnp.abs(task["x"][:, 0])), obs=task["z"])

    net.over(tasks, observe)


def drawn_tasks(missing=()):
    """Of different lengths, so that the stack has a mask."""
    rng = np.random.default_rng(0)
    listed = []
    for t in range(T):
        n = N - t % 2
        data = {"x": rng.normal(size=(n, 3)), "y": rng.normal(size=(n, 2)), "z": rng.normal(size=n)}
        listed.append(ssm_nn.Task({} if t in missing else data, {"gap": np.asarray(1.0 + t)}))
    return listed


def exact(listed, h, power=1.0):
    """One dense Gaussian over all that is observed, the path of the weights made step by step."""
    scale = np.concatenate([np.full(6, 0.9), np.full(2, 0.6)])
    mean, covariance = np.concatenate([LOC.ravel(), np.zeros(2)]), np.diag(scale**2)
    means, blocks, rows = [mean], {(0, 0): covariance}, []
    for t in range(1, len(listed)):
        a = np.diag([h["gain"]] * 6 + [1.0] * 2)
        q = np.tile(np.array([1.0, 2.0]) * listed[t].context["gap"] * h["walk"], 3) ** 2
        means.append(a @ means[-1] + np.array([0.2] * 6 + [0.0] * 2))
        for s in range(t):
            blocks[t, s] = a @ blocks[t - 1, s]
            blocks[s, t] = blocks[t, s].T
        blocks[t, t] = a @ blocks[t - 1, t - 1] @ a + np.diag(np.concatenate([q, [0.0, 0.0]]))
    for t, task in enumerate(listed):
        for i in range(task.num_examples if task.data else 0):
            x = task["x"][i]
            moving = np.zeros((2, 3, 2))
            moving[0, :, 0], moving[1, :, 1] = x, x
            phi = np.concatenate([moving.reshape(2, 6), np.eye(2)], axis=1)
            for k in range(2):
                rows.append((t, phi[k], task["y"][i, k] - h["level"], h["noise"]))
            rows.append((t, 2.0 * phi[0], task["z"][i], 0.1 + abs(x[0])))
    residual = np.array([y - phi @ means[t] for t, phi, y, _ in rows])
    kernel = np.array([[one[1] @ blocks[one[0], two[0]] @ two[1] for two in rows] for one in rows])
    variance = np.array([row[3] for row in rows]) ** 2
    # N(y; f, s^2)^p is N(y; f, s^2 / p) up to a factor
    kernel += np.diag(variance / power)
    value = -0.5 * residual @ np.linalg.solve(kernel, residual) - 0.5 * np.linalg.slogdet(2 * np.pi * kernel)[1]
    return value + 0.5 * np.sum((1 - power) * np.log(2 * np.pi * variance) - np.log(power))


def by_kernel(listed, power=1.0, program=regression):
    """(hypers) -> log evidence; None where the program has another form."""
    linear = linear_tasks(program, ssm_nn.stack_tasks(listed), HYPERS)
    return None if linear is None else lambda h: kernel_evidence(program, linear, h, power)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("power", "missing"), [(1.0, ()), (2.5, (0, 2))])
def test_value_and_derivative_are_those_of_one_dense_gaussian(power, missing):
    listed = drawn_tasks(missing)
    value, slope = jax.value_and_grad(by_kernel(listed, power))(HYPERS)
    assert float(value) == pytest.approx(exact(listed, HYPERS, power), abs=1e-9)
    for name, at in HYPERS.items():
        up, down = (exact(listed, HYPERS | {name: at + step}, power) for step in (1e-5, -1e-5))
        assert float(slope[name]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-6), name


def test_in_single_precision_noise_far_below_the_prior_does_no_harm(rng):
    """Where outputs are no more than weights; where they are more, B cannot be told from a singular matrix."""
    wide = changed(noise=lambda f, h: 1e-3, network=(lambda params, x: x @ params, jnp.zeros(40)))
    listed = [{"x": rng.normal(size=(5, 40)), "z": rng.normal(size=5)} for _ in range(3)]
    found = []
    for double in (False, True):
        with jax.enable_x64(double):
            linear = linear_tasks(wide, ssm_nn.stack_tasks(listed), {"walk": 0.3})
            assert kernel_resolves(wide, linear, {"walk": 0.3})
            found.append(jax.value_and_grad(lambda h: kernel_evidence(wide, linear, {"walk": h}))(jnp.asarray(0.3)))  # noqa: B023
    assert found[0][0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)

    stack, sharp = ssm_nn.stack_tasks(drawn_tasks()), HYPERS | {"noise": 1e-3}
    linear = linear_tasks(regression, stack, sharp)
    assert kernel_resolves(regression, linear, HYPERS)
    assert not kernel_resolves(regression, linear, sharp)
    with jax.enable_x64(True):
        assert kernel_resolves(regression, linear_tasks(regression, stack, sharp), sharp)


@pytest.mark.usefixtures("x64")
def test_density_without_weights_is_that_of_the_filter_traced_tasks_or_not():
    listed = drawn_tasks()
    stack = ssm_nn.stack_tasks(listed)
    engine = LaplaceFilter(regression, Dense(), hypers=HYPERS)
    model = marginalize(regression, engine)
    expected = float(engine.run(0, listed).log_evidence)
    for sites in (_sites(model, stack), jax.jit(lambda stack: _sites(model, stack))(stack)):
        assert float(sites["log_evidence"]) == pytest.approx(expected, abs=1e-8)
        assert int(sites["unconverged_tasks"]) == 0


def _sites(model, stack):
    with handlers.trace() as trace, handlers.condition(data=HYPERS):
        model(stack)
    return {name: trace[name]["value"] for name in ("log_evidence", "unconverged_tasks")}


def changed(mean=lambda f, x, h: f, noise=lambda f, h: 0.5, likelihood=dist.Normal, network=None):
    """A program that differs from a linear one in one thing."""
    network = network or (lambda params, x: x @ params, jnp.zeros(3))

    def program(tasks):
        h = numpyro.sample("walk", dist.HalfNormal(1.0))
        net = ssm_nn.weights(
            "net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(h), num_tasks=len(tasks)
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                outputs = f(task["x"])
                numpyro.sample("y", likelihood(mean(outputs, task["x"], h), noise(outputs, h)), obs=task["z"])

        net.over(tasks, observe)

    return program


@pytest.mark.parametrize(
    ("form", "linear"),
    [
        (changed(), True),
        (changed(mean=lambda f, x, h: 2.0 * f * x[:, 0] - h), True),
        (changed(noise=lambda f, h: h), True),
        (changed(mean=lambda f, x, h: jnp.tanh(f)), False),
        (changed(mean=lambda f, x, h: jnp.maximum(f, 0.0)), False),
        (changed(mean=lambda f, x, h: h * f), False),
        (changed(noise=lambda f, h: 0.1 + f**2), False),
        (changed(likelihood=dist.Laplace), False),
        (changed(network=(lambda params, x: x @ params["a"] @ params["b"], {"a": jnp.ones((3, 2)), "b": jnp.ones(2)})), False),
    ],
)  # fmt: skip
def test_the_form_is_read_off_the_trace(form, linear):
    stack = ssm_nn.stack_tasks([{"x": task["x"], "z": task["z"]} for task in drawn_tasks()])
    assert (linear_tasks(form, stack, {"walk": 0.3}) is not None) == linear


def test_weights_that_are_reordered_and_many_outputs_are_refused(rng, monkeypatch):
    orders = [[0, 1, 2], [2, 0, 1]]
    hypers = {"noise.first": 0.4, "noise.second": 0.05, "gain.first": 0.8, "gain.second": -0.5}
    assert linear_tasks(ordered, ssm_nn.stack_tasks(tasks_of(0, num_tasks=2)), hypers) is not None
    assert linear_tasks(ordered, ssm_nn.stack_tasks(tasks_of(0, num_tasks=2, orders=orders)), hypers) is None
    many = {"x": rng.normal(size=(201, 3)), "z": rng.normal(size=201)}
    assert linear_tasks(changed(), ssm_nn.stack_tasks([many]), {"walk": 0.3}) is None
    stack = ssm_nn.stack_tasks([{name: array[:20] for name, array in many.items()}])
    for most, made in ((20 * 20, True), (20 * 20 - 1, False)):
        monkeypatch.setattr(linear_outputs, "_MOST_NUMBERS", most)
        assert (linear_tasks(changed(), stack, {"walk": 0.3}) is not None) == made


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", [Diagonal(), LowRank(2)])
def test_a_structure_that_cuts_keeps_its_own_evidence(structure):
    listed = drawn_tasks()
    engine = LaplaceFilter(regression, structure, hypers=HYPERS)
    found = _sites(marginalize(regression, engine), ssm_nn.stack_tasks(listed))["log_evidence"]
    own = TracedFilter(engine)(HYPERS, ssm_nn.stack_tasks(listed), jax.random.key(0)).log_evidence
    assert float(found) == pytest.approx(float(own), abs=1e-9)
    assert abs(float(found) - exact(listed, HYPERS)) > 1e-3
