"""The state-space form of a program: where each weight lies, and that nothing of all tasks is made."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

from ssm_nn import ByPath, Moments, Task, extract, over, weights
from ssm_nn.extraction import describe
from ssm_nn.models.transitions import RandomWalk, Static

D = 3


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def program_of(params):
    def program(tasks):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        kernel = ByPath({"kernel": RandomWalk(scale)}, otherwise=Static())
        settings = {"prior": dist.Normal(0.5, 2.0), "num_tasks": len(tasks)}
        f = weights("f", (linear, params), transition=kernel, **settings)
        g = weights("g", (linear, params), transition=lambda leaf: Moments(0.9, 0.1, 0.2), **settings)

        def observe(f, g, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), jnp.exp(g(task["x"]))), obs=task["y"])

        over([f, g], tasks, observe)

    return program


PARAMS = {"bias": jnp.array(7.0), "kernel": jnp.arange(3.0)}
TASK = Task({"x": np.ones((5, D), np.float32), "y": np.zeros(5, np.float32)})


def test_weights_lie_network_by_network_leaf_by_leaf():
    space = extract(program_of(PARAMS), TASK, {"scale": 0.5})
    layout = space.layout
    assert [(s.name, s.network, s.path, s.shape, s.start, s.stop, s.frozen) for s in layout.sites] == [
        ("f.bias", "f", "bias", (), 0, 1, True),
        ("f.kernel", "f", "kernel", (3,), 1, 4, False),
        ("g.bias", "g", "bias", (), 4, 5, False),
        ("g.kernel", "g", "kernel", (3,), 5, 8, False),
    ]
    assert layout.size == 8
    np.testing.assert_array_equal(space.initial, [7, 0, 1, 2, 7, 0, 1, 2])
    np.testing.assert_array_equal(space.prior_mean, np.full(8, 0.5))
    np.testing.assert_array_equal(space.prior_variance, np.full(8, 4.0))
    np.testing.assert_allclose(space.moments.gain, [1, 1, 1, 1, 0.9, 0.9, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(space.moments.noise, [0, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
    assert describe(program_of(PARAMS), TASK, {"scale": 0.5}) == layout
    assert hash(layout) == hash(describe(program_of(PARAMS), TASK, {"scale": 0.5}))


def test_a_vector_and_its_leaves_are_one_another():
    layout = describe(program_of(PARAMS), TASK, {"scale": 0.5})
    theta = jnp.arange(8.0)
    leaves = layout.leaves(theta)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "f.bias": (),
        "f.kernel": (3,),
        "g.bias": (),
        "g.kernel": (3,),
    }
    np.testing.assert_array_equal(layout.vector(leaves), theta)
    assert layout.leaves(jnp.zeros((2, 5, 8)))["g.kernel"].shape == (2, 5, 3)
    np.testing.assert_array_equal(layout.arrays(theta)["g"]["kernel"], [5, 6, 7])


def test_outputs_of_all_sites_and_their_factor():
    space = extract(program_of(PARAMS), TASK, {"scale": 0.5})
    single = Task({"x": np.ones((1, D), np.float32), "y": np.zeros(1, np.float32)})
    theta = jnp.arange(8.0) / 10
    outputs, factor = space.outputs(theta, single), space.output_factor(theta, single)
    np.testing.assert_allclose(outputs, [0.0 + 0.6, 0.4 + 1.8], rtol=1e-5)
    np.testing.assert_allclose(factor @ factor.T, np.diag([np.exp(-2 * 2.2), 2.0]), rtol=1e-5)


def sizes_made(function, *arguments):
    """Number of elements of every array that the traced function makes."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (
                int(np.prod(out.aval.shape, dtype=float)) for out in equation.outvars if hasattr(out.aval, "shape")
            )
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    yield from walk(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_extraction_makes_nothing_larger_than_the_weights():
    """Abstract weights that no machine could hold: nothing is computed, and no array has more than P elements."""
    size = 10**9
    abstract = {"bias": jax.ShapeDtypeStruct((), jnp.float32), "kernel": jax.ShapeDtypeStruct((size,), jnp.float32)}
    data = {"x": jax.ShapeDtypeStruct((2, size), jnp.float32), "y": jax.ShapeDtypeStruct((2,), jnp.float32)}

    def parts(params, data):
        space = extract(program_of(params), Task.tree_unflatten(None, (data, {}, None)), {"scale": 0.5})
        return space.prior_mean, space.prior_variance, space.moments, space.initial

    made = sizes_made(parts, abstract, data)
    weights_ = 2 * (size + 1)
    # the stack of one task is a view of its examples
    assert max(made) == max(weights_, 2 * size)
    assert made.count(weights_) < 12


def test_extraction_draws_nothing():
    """No key is asked for, although the program has latent sites."""
    space = extract(program_of(PARAMS), TASK, {"scale": 0.5})
    unlabelled = Task({"x": TASK["x"], "y": TASK["y"]}, mask=np.zeros(5, bool))
    assert float(space.log_likelihood(space.initial, unlabelled)) == 0.0


def test_a_handler_around_the_program_is_left_alone():
    with handlers.trace() as outer:
        extract(program_of(PARAMS), TASK, {"scale": 0.5})
    assert not outer
