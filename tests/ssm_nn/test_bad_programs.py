"""What a program may not do: each fault is one clear sentence, at the earliest moment."""

import re

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from ssm_nn import ByPath, Moments, PerTask, Task, Tasks, extract, stack_tasks, weights
from ssm_nn.models.transitions import OrnsteinUhlenbeck, Permuted, RandomWalk, ShrinkAndPerturb, Static

N, D = 4, 2
PARAMS = {"bias": np.zeros(3), "kernel": np.zeros((D, 3))}
TASK = Task({"x": np.ones((N, D), np.float32), "y": np.array([0, 1, 2, 1])})


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def observe_classes(f, task):
    with numpyro.plate("examples", task["x"].shape[0]):
        numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))


NORMAL, STATIC = dist.Normal(0.0, 1.0), Static()


def program_of(observe=observe_classes, network=(linear, PARAMS), prior=NORMAL, transition=STATIC, num_tasks=None):
    def program(tasks):
        length = len(tasks) if num_tasks is None else num_tasks
        net = weights("net", network, prior=prior, transition=transition, num_tasks=length)
        net.over(tasks, observe)

    return program


def read(program, hypers=None):
    """Both moments at which a fault may be met: when the program is read, and when a task is."""
    space = extract(program, TASK, hypers)
    space.log_likelihood(space.initial, TASK)


def assert_refused(program, message, hypers=None):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(program, hypers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["prior", "transition"])
def test_patterns_of_paths(what):
    good = dist.Normal(0.0, 1.0) if what == "prior" else RandomWalk(0.1)

    def with_patterns(patterns):
        return program_of(**{what: ByPath(patterns)})

    assert_refused(
        with_patterns({"kernel": good, "bias": good, "head": good}), f"{what}: no weights match the pattern 'head'"
    )
    assert_refused(
        with_patterns({"kernel": good, "*": good}), f"{what}: 'kernel' matches several patterns, 'kernel', '*'"
    )
    assert_refused(with_patterns({"kernel": good}), f"{what}: 'bias' matches none of 'kernel'")
    with pytest.raises(ValueError, match="patterns is empty"):
        ByPath({})


def without_observations(tasks):
    weights("net", (linear, PARAMS), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))


def without_weights(tasks):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=tasks["x"])


def loops_twice(tasks):
    net = weights("net", (linear, PARAMS), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))
    net.over(tasks, observe_classes)
    net.over(
        tasks, lambda f, task: numpyro.sample("z", dist.Categorical(logits=f(task["x"])).to_event(1), obs=task["y"])
    )


def has_a_loop_of_its_own(tasks):
    without_observations(tasks)
    scan(lambda carry, x: (carry, x), None, tasks["x"])


def forgets_a_network(tasks):
    settings = {"prior": dist.Normal(0.0, 1.0), "transition": Static(), "num_tasks": len(tasks)}
    net = weights("net", (linear, PARAMS), **settings)
    weights("head", (linear, PARAMS), **settings)
    net.over(tasks, observe_classes)


def in_a_plate(tasks):
    with numpyro.plate("ensemble", 2):
        without_observations(tasks)


PROGRAMS = {
    "no weights": (without_weights, "the program has no weights; declare them with ssm_nn.weights"),
    "no observations": (without_observations, "the program observes no task"),
    "two loops": (loops_twice, "the program loops over its tasks twice"),
    "another loop": (has_a_loop_of_its_own, "the program has a scan of its own"),
    "a network left out": (forgets_a_network, "weights that no task observes: head.bias, head.kernel"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_are_no_task_sequence(name):
    assert_refused(*PROGRAMS[name])


def test_weights_stand_outside_every_plate():
    with pytest.raises(ValueError, match=re.escape("weights() stands outside every plate")), handlers.seed(rng_seed=0):
        in_a_plate(Tasks({"x": jnp.ones((3, N, D))}))


def observe_latent(f, task):
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    observe_classes(f, task)


def observe_param(f, task):
    numpyro.param("scale", 1.0)
    observe_classes(f, task)


def observe_twice(f, task):
    observe_classes(f, task)
    observe_classes(f, task)


BODIES = {
    "latent site": (observe_latent, "the site 'z' inside the task body is not observed"),
    "param": (observe_param, "numpyro.param('scale') inside the task body"),
    "one name twice": (observe_twice, "the task body has two sites named 'y'"),
    "nothing": (lambda f, task: f(task["x"]), "the program observes nothing: the task body has no site with obs"),
    "unknown array": (
        lambda f, task: numpyro.sample("y", dist.Categorical(logits=f(task["x"])).to_event(1), obs=task["label"]),
        "this task has no 'label'; it has ['x', 'y']",
    ),
    "outputs too many": (
        lambda f, task: numpyro.sample("y", dist.Normal(f(task["x"]), 1.0).to_event(2), obs=task["y"]),
        "the site 'y' observes values of shape (4,), but its Independent has shape (4, 3)",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_task_bodies(name):
    observe, message = BODIES[name]
    kind = KeyError if name == "unknown array" else ValueError
    with pytest.raises(kind, match=re.escape(message).replace("'", ".?'")):
        read(program_of(observe))


def with_scale(tasks):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    program_of(transition=lambda leaf: Moments(noise=scale**2))(tasks)


@pytest.mark.parametrize(
    ("hypers", "message"),
    [
        ({}, "hypers has no value for the latent site 'scale'"),
        (
            {"scale": 0.1, "scael": 0.1},
            "hypers has 'scael', which is no latent site outside the weights; those are ['scale']",
        ),
        ({"scale": -0.1}, "hypers['scale'] is -0.1; accepted is"),
        ({"scale": float("nan")}, "is not finite"),
        (
            {"scale": 0.1, "net.bias": np.zeros((1, 3))},
            "hypers has 'net.bias', which is no latent site outside the weights",
        ),
        ({"scale": 0.1, "y": 1}, "hypers has 'y', which is no latent site"),
    ],
)
def test_hyper_parameters(hypers, message):
    assert_refused(with_scale, message, hypers)


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (RandomWalk(-0.1), "the scale of RandomWalk is -0.1; accepted is a standard deviation >= 0"),
        (RandomWalk(float("nan")), "the scale of RandomWalk is nan"),
        (ShrinkAndPerturb(0.5, -1.0), "the scale of ShrinkAndPerturb is -1.0"),
        (OrnsteinUhlenbeck(1.5), "the retention of OrnsteinUhlenbeck is 1.5; accepted is a number in [0, 1]"),
        (lambda leaf: Moments(noise=-1.0), "the kernel's noise for 'bias' is negative"),
        (lambda leaf: Moments(gain=float("inf")), "the kernel's gain for 'bias' is not finite"),
        (lambda leaf: Moments(gain=0.0), "the kernel's gain and noise for 'bias' are both 0 somewhere"),
        (
            lambda leaf: Moments(noise=jnp.ones(7)),
            "the kernel's noise for 'bias' has shape (7,); it must broadcast to (3,)",
        ),
        (lambda leaf: 0.3, "transition returned float for 'bias'; it must return Moments"),
        (0.3, "transition is 0.3; accepted are a kernel such as RandomWalk(0.1) and a function"),
        (Permuted(jnp.array([0, 0, 1])), "the permutation for 'bias' is [0 0 1]; accepted is each of 0 .. 2 once"),
        (Permuted(jnp.array([0, 1]), axis=1), "the permutation for 'bias'"),
        (PerTask(lambda c: RandomWalk(c), jnp.ones(5)), "the context of PerTask has leading axes {5}"),
        (PerTask(lambda c: lambda leaf: Moments(noise=c), -jnp.ones(1)), "the kernel's noise for 'bias' is negative"),
    ],
)
def test_transitions(transition, message):
    assert_refused(program_of(transition=transition), message)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (dist.Laplace(0.0, 1.0), "prior of 'bias' is Laplace; numpyro's Normal is accepted"),
        (1.0, "prior of 'bias' is float"),
        (dist.Normal(jnp.zeros(5), 1.0), "prior of 'bias' has the batch shape (5,); it must broadcast to (3,)"),
        (dist.Normal(0.0, jnp.ones((2, 3))), "; it must broadcast to (3,)"),
    ],
)
def test_priors(prior, message):
    assert_refused(program_of(prior=prior), message)


@pytest.mark.parametrize(
    ("num_tasks", "message"),
    [
        (2, "num_tasks is 2 for 'net', but there are 1 tasks"),
        (0, "num_tasks is 0; a positive whole number is accepted"),
        (True, "num_tasks is True"),
        (1.0, "num_tasks is 1.0"),
    ],
)
def test_numbers_of_tasks(num_tasks, message):
    assert_refused(program_of(num_tasks=num_tasks), message)


class Normalised(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Normalised(), "network has batch normalisation"),
        (linear, "network is of type function; accepted are a flax.nnx module"),
        ((linear, {}), "network has no weights"),
        ((linear, {"kernel": np.zeros(3, int)}), "network: 'kernel' has dtype int32; weights must be floating-point"),
    ],
)
def test_networks(network, message):
    assert_refused(program_of(network=network), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task({"x": np.ones((3, 2)), "y": np.ones(4)}), "data: the arrays of a task must have one length"),
        (lambda: Task({"x": 1.0}), "data['x'] is a scalar"),
        (lambda: Task({"x": np.ones(3)}, mask=np.ones(4, bool)), "mask has shape (4,), but the task has 3 examples"),
        (lambda: stack_tasks([]), "tasks is empty"),
        (lambda: stack_tasks([{"x": np.ones(3)}, {"y": np.ones(3)}]), "task 1 has the arrays ['y'], task 0 has ['x']"),
        (
            lambda: stack_tasks([{"x": np.ones((3, 2))}, {"x": np.ones((3, 1))}]),
            "task 1: 'x' holds examples of shape (1,)",
        ),
        (
            lambda: stack_tasks([Task({}, {"a": 1}), Task({}, {"b": 1})]),
            "task 1 has the context ['b'], task 0 has ['a']",
        ),
        (lambda: stack_tasks([3]), "a task is a Task, a mapping of arrays or None, not int"),
    ],
)
def test_tasks(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
