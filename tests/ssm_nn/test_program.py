"""A program of weights and tasks under NumPyro's inference and handlers, and by the networks of several libraries."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from ssm_nn import ByPath, InnovationReparam, PerTask, Task, Tasks, extract, over, stack_tasks, weights
from ssm_nn.models.transitions import OrnsteinUhlenbeck, Permuted, RandomWalk, Static

T, N, D = 3, 4, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(T, N, D)).astype(np.float32)
TASKS = Tasks({"x": jnp.array(X), "y": jnp.array(RNG.normal(size=(T, N)), jnp.float32)})
# of numpy, so that their dtype is that of the test
PARAMS = {"bias": np.zeros(()), "kernel": np.zeros(D)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def program(tasks):
    """A latent kernel scale, a leaf that never moves, and one that walks."""
    scale = numpyro.sample("scale", dist.HalfNormal(0.5))
    net = weights(
        "net",
        (linear, PARAMS),
        prior=dist.Normal(0.0, 1.0),
        transition=ByPath({"kernel": RandomWalk(scale)}, otherwise=Static()),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), 0.5), obs=task.get("y"))

    net.over(tasks, observe)


SITES = {"net.bias": (1,), "net.kernel": (T, D), "scale": ()}


def drawn(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return {name: jnp.array(np.abs(rng.normal(size=shape)), jnp.result_type(float)) for name, shape in shapes.items()}


def test_nuts_runs(key):
    mcmc = MCMC(NUTS(program), num_warmup=10, num_samples=5, progress_bar=False)
    mcmc.run(key, TASKS)
    assert {name: value.shape[1:] for name, value in mcmc.get_samples().items()} == SITES


def test_svi_runs_and_its_guide_predicts(key):
    guide = AutoNormal(program)
    result = SVI(program, guide, numpyro.optim.Adam(0.05), Trace_ELBO()).run(key, 20, TASKS, progress_bar=False)
    assert float(result.losses[-1]) < float(result.losses[0])
    predictive = Predictive(program, guide=guide, params=result.params, num_samples=6)
    drawn_ = predictive(key, TASKS.without("y"))
    assert drawn_["y"].shape == (6, T, N)


def test_prior_and_posterior_predictive_draws(key):
    draws = Predictive(program, num_samples=5)(key, TASKS.without("y"))
    assert {name: value.shape[1:] for name, value in draws.items()} == SITES | {"y": (T, N)}
    assert not np.array_equal(draws["y"][0], draws["y"][1])
    samples = {name: jnp.stack([value] * 4) for name, value in drawn(SITES).items()}
    posterior = Predictive(program, posterior_samples=samples)(key, TASKS.without("y"))
    assert posterior["y"].shape == (4, T, N)


def test_condition_and_do_set_the_weights(key):
    values = drawn(SITES)
    for handler in (handlers.condition, handlers.do):
        trace = handlers.trace(handlers.seed(handler(program, values), key)).get_trace(TASKS.without("y"))
        found = trace["y"]["fn"].loc
        expected = jnp.einsum("tnd,td->tn", X, values["net.kernel"]) + values["net.bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scope_gives_every_site_its_prefix():
    scoped = handlers.scope(program, prefix="left")
    values = drawn(SITES)
    density, trace = log_density(scoped, (TASKS,), {}, {f"left/{name}": value for name, value in values.items()})
    assert {"left/net.kernel", "left/net.bias", "left/scale", "left/y"} <= set(trace)
    np.testing.assert_allclose(density, log_density(program, (TASKS,), {}, values)[0], rtol=1e-6)
    space = extract(scoped, TASKS.at(0), {"left/scale": 0.3})
    assert [site.name for site in space.layout.sites] == ["left/net.bias", "left/net.kernel"]


def test_reparam_samples_the_innovations(key):
    moved = handlers.reparam(program, config={"net.kernel": InnovationReparam()})
    mcmc = MCMC(NUTS(moved), num_warmup=5, num_samples=3, progress_bar=False)
    mcmc.run(key, TASKS)
    assert mcmc.get_samples()["net.kernel_innovations"].shape == (3, T, D)
    assert mcmc.get_samples()["net.kernel"].shape == (3, T, D)


class NnxNet(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, 1, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(1, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.layer(x)[..., 0]


class EquinoxNet(equinox.Module):
    layer: equinox.nn.Linear
    name: str = equinox.field(static=True)

    def __init__(self):
        self.layer = equinox.nn.Linear(D, 1, key=jax.random.key(0))
        self.name = "net"

    def __call__(self, x):
        return jax.vmap(self.layer)(x)[..., 0]


# network: kernel and bias by path, and the call that they stand for
NETWORKS = {
    "flax.nnx": (NnxNet(), ("layer.kernel", (D, 1)), ("layer.bias", (1,))),
    "equinox": (EquinoxNet(), ("layer.weight", (1, D)), ("layer.bias", (1,))),
    "pair": ((linear, PARAMS), ("kernel", (D,)), ("bias", ())),
}


@pytest.mark.parametrize("library", NETWORKS)
def test_networks_of_several_libraries(library, key):
    network, (kernel, kernel_shape), (bias, bias_shape) = NETWORKS[library]

    def one_network(tasks):
        net = weights("net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.3), num_tasks=len(tasks))
        net.over(tasks, lambda f, task: numpyro.sample("y", dist.Normal(f(task["x"]), 1.0).to_event(1), obs=task["y"]))

    values = drawn({f"net.{kernel}": (T, *kernel_shape), f"net.{bias}": (T, *bias_shape)})
    conditioned = handlers.condition(one_network, values)
    trace = handlers.trace(handlers.seed(conditioned, key)).get_trace(TASKS)
    expected = jnp.einsum("tnd,td->tn", X, values[f"net.{kernel}"].reshape(T, D)) + values[f"net.{bias}"].reshape(T, 1)
    np.testing.assert_allclose(trace["y"]["fn"].base_dist.loc, expected, rtol=1e-5)
    # the network itself is as it was, and lends its initial weights
    space = extract(one_network, TASKS.at(0))
    initial = space.layout.leaves(space.initial)
    own = {
        "flax.nnx": lambda: network.layer.kernel[...],
        "equinox": lambda: network.layer.weight,
        "pair": lambda: PARAMS["kernel"],
    }
    np.testing.assert_array_equal(initial[f"net.{kernel}"], own[library]())


def two_networks(tasks):
    """Two networks, two observed sites, a context that the observation reads."""
    scale = numpyro.sample("scale", dist.HalfNormal(0.5))
    f = weights("f", (linear, PARAMS), prior=dist.Normal(0.5, 1.0), transition=RandomWalk(scale), num_tasks=len(tasks))
    g = weights(
        "g",
        (linear, PARAMS),
        prior=ByPath({"kernel": dist.Normal(0.0, 0.1), "bias": dist.Normal(1.0, 2.0)}),
        transition=ByPath({"kernel": OrnsteinUhlenbeck(0.8), "bias": Static()}),
        num_tasks=len(tasks),
    )

    def observe(f, g, task):
        rate = jnp.exp(g(task["x"]) * task.context["exposure"])
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("size", dist.Normal(f(task["x"]), 0.5), obs=task["y"])
            numpyro.sample("count", dist.Poisson(rate), obs=task["count"])

    over([f, g], tasks, observe)


def permuted(tasks):
    """A known permutation of the inputs and a time gap for every task."""

    def kernel(context):
        then = RandomWalk(0.3 * context["gap"])
        return ByPath({"kernel": Permuted(context["order"], then=then)}, otherwise=RandomWalk(0.1))

    transition = PerTask(kernel, tasks.context)
    net = weights("net", (linear, PARAMS), prior=dist.Normal(0.0, 1.0), transition=transition, num_tasks=len(tasks))
    net.over(tasks, lambda f, task: numpyro.sample("y", dist.Normal(f(task["x"]), 1.0).to_event(1), obs=task["y"]))


COUNTED = Tasks(
    {**TASKS.data, "count": RNG.poisson(2.0, (T, N))},
    {
        "exposure": np.array([0.5, 1.0, 2.0]),
        "order": np.array([[0, 1], [1, 0], [1, 0]]),
        "gap": np.array([1.0, 2.0, 0.5]),
    },
)
MASKED = Tasks(TASKS.data, {}, jnp.array(RNG.uniform(size=(T, N)) < 0.6))
# program, tasks, sites that are no weights, shapes of the weights
JOINTS = {
    "one network": (program, TASKS, {"scale": 0.4}, {"net.bias": (1,), "net.kernel": (T, D)}),
    "masked": (program, MASKED, {"scale": 0.4}, {"net.bias": (1,), "net.kernel": (T, D)}),
    "two networks": (
        two_networks,
        COUNTED,
        {"scale": 0.4},
        {"f.bias": (T,), "f.kernel": (T, D), "g.bias": (1,), "g.kernel": (T, D)},
    ),
    "permuted": (permuted, COUNTED, {}, {"net.bias": (T,), "net.kernel": (T, D)}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", JOINTS)
def test_the_extracted_parts_add_up_to_the_joint_density(name):
    """Prior, steps and likelihoods of one task at a time against ``log_density`` of the whole stack."""
    joint, tasks, hypers, shapes = JOINTS[name]
    values = drawn(shapes)
    expected, trace = log_density(joint, (tasks,), {}, {**values, **hypers})
    for site, value in hypers.items():
        expected = expected - trace[site]["fn"].log_prob(value)
    total, before = 0.0, None
    for t in range(T):
        space = extract(joint, tasks.at(t), hypers)
        theta = space.layout.vector({n: v[min(t, v.shape[0] - 1)] for n, v in values.items()})
        moves = np.concatenate([np.full(site.stop - site.start, not site.frozen) for site in space.layout.sites])
        if before is None:
            total += normal_log_density(theta, space.prior_mean, space.prior_variance)
        else:
            gain, shift, noise, order = space.moments[:4]
            moved = before if order is None else before[order.indices(before.size)]
            total += normal_log_density(theta[moves], (gain * moved + shift)[moves], noise[moves])
        total += float(space.log_likelihood(theta, tasks.at(t)))
        before = theta
    np.testing.assert_allclose(total, expected, rtol=1e-10)


def normal_log_density(x, mean, variance):
    x, mean, variance = map(np.asarray, (x, mean, variance))
    return float(np.sum(-0.5 * (x - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)))


def test_masked_examples_do_not_change_the_density():
    """Tasks of several sizes, stacked: padding counts for nothing, whatever stands there."""
    tasks = [Task({"x": X[t, :n], "y": np.asarray(TASKS["y"][t, :n])}) for t, n in enumerate((4, 2, 3))]
    stacked, values = stack_tasks(tasks), drawn(SITES)
    padding = ~np.asarray(stacked.mask)
    junk = Tasks({"x": stacked["x"], "y": jnp.where(padding, 1e6, stacked["y"])}, {}, stacked.mask)
    density = log_density(program, (stacked,), {}, values)[0]
    np.testing.assert_allclose(log_density(program, (junk,), {}, values)[0], density, rtol=1e-6)
    whole = log_density(program, (TASKS,), {}, values)[0]
    loc = np.einsum("tnd,td->tn", X, values["net.kernel"]) + np.asarray(values["net.bias"])
    terms = np.asarray(dist.Normal(loc, 0.5).log_prob(TASKS["y"]))
    np.testing.assert_allclose(whole - density, terms[padding].sum(), rtol=1e-4)


def test_sites_are_drawn_per_path_and_stacked_by_task(key):
    trace = handlers.trace(handlers.seed(program, key)).get_trace(TASKS)
    assert trace["net.kernel"]["fn"].event_shape == (T, D)
    assert trace["net.bias"]["fn"].event_shape == (1,), "a leaf that never moves is one for all tasks"
    assert trace["y"]["value"].shape == (T, N)
