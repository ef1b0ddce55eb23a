"""Searching where a Kronecker belief is round: turning the data once is turning the weights in every step."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from ssm_nn import Task, weights
from ssm_nn.extraction import extract
from ssm_nn.inference.batches import rows, with_mask
from ssm_nn.inference.kronecker import Kronecker
from ssm_nn.inference.layer_coordinates import LayerCoordinates, turned_layers
from ssm_nn.inference.map_problem import FIXED_BUDGET, MapProblem
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.search_coordinates import Round
from ssm_nn.layers import run_with_products
from ssm_nn.models.transitions import Static
from ssm_nn.precision_kronecker import EigenBlock

N, D, H, K = 11, 4, 5, 3
pytestmark = pytest.mark.usefixtures("x64")


def two_layers(p, x):
    return jnp.tanh(x @ p["first"] + p["bias"]) @ p["last"]


def outputs_first(p, x):
    """The kernel as left operand, and data that are scaled by themselves."""
    data = x / (1 + jnp.sum(jnp.square(x), axis=1, keepdims=True))
    return jnp.tanh(p["first"].T @ data.T + p["bias"][:, None]).T @ p["last"]


def skipping(p, x):
    """Two layers read the data alone."""
    return two_layers(p, x) + x @ p["skip"]


def scaled(p, x):
    """A weight stands before the first layer."""
    return two_layers(p, p["scale"] * x)


def convolved(p, x):
    """The first layer meets an example in several places."""
    wide = jax.lax.conv_general_dilated(x[:, None, :], p["window"], (1,), "SAME")
    return jnp.tanh(wide.reshape(x.shape[0], -1)) @ p["last"]


LEAVES = {"first": (D, H), "bias": (H,), "last": (H, K), "skip": (D, K), "scale": (D,), "window": (2, 1, 3)}
NETWORKS = {
    two_layers: (("first", "bias", "last"), (0,)),
    outputs_first: (("first", "bias", "last"), (0,)),
    skipping: (("first", "bias", "last", "skip"), (0, 2)),
    scaled: (("first", "bias", "last", "scale"), ()),
    convolved: (("window", "last"), ()),
}


def program_of(network):
    shapes = {name: LEAVES[name] for name in NETWORKS[network][0]}
    if network is convolved:
        shapes["last"] = (2 * D, K)
    params = {name: np.ones(shape) for name, shape in shapes.items()}

    def program(tasks):
        net = weights("net", (network, params), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task["y"])

        net.over(tasks, observe)

    return program


def orthogonal(rng, size):
    return jnp.asarray(np.linalg.qr(rng.normal(size=(size, size)))[0])


def problem_of(program, seed=0):
    """A belief with bases of its own, and two masked examples."""
    rng = np.random.default_rng(seed)
    task = Task({"x": rng.normal(size=(N, D)), "y": rng.integers(K, size=N)}, mask=np.arange(N) < N - 2)
    task = with_mask(jax.tree.map(jnp.asarray, task))
    space = extract(program, task)
    precision = Kronecker(2).fitted(space, task).prior(space.prior_variance)
    blocks = tuple(
        EigenBlock(orthogonal(rng, i), orthogonal(rng, o), jnp.asarray(rng.uniform(0.5, 4, (i, o))))
        for i, o in (block.values.shape for block in precision.blocks)
    )
    precision = type(precision)(blocks, precision.rest, precision.places)
    mean = jnp.asarray(rng.normal(size=space.layout.size))
    return MapProblem(mean, precision, task, {}, jnp.array(1.5)), space


@pytest.mark.filterwarnings("ignore:Kronecker")  # names the leaf outside the layers
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_turned_data_give_the_likelihood_and_its_gradient_at_the_weights_of_the_round_coordinates(network):
    problem, space = problem_of(program_of(network))
    turned = turned_layers(space, problem.precision, problem.task, steps=100, batch_size=6)
    assert turned == NETWORKS[network][1]
    searched = space.layout, problem.mean, problem.precision, jnp.array(0.1)
    here, plain = LayerCoordinates(*searched, turned), Round(*searched)
    shift = jnp.asarray(np.random.default_rng(1).normal(size=space.layout.size))
    np.testing.assert_allclose(here.leave(here.enter(shift)), shift, atol=1e-12)

    indices = jnp.array([3, 0, 7, N, 10, 5])  # one beyond the task, one masked
    batch = rows(problem.task, indices)
    inputs = here.inputs(space, problem.task)
    assert [x.shape[0] for x in inputs] == [N] * len(turned)
    beside = jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), inputs)

    def likelihood(shift):
        return here.log_likelihood(space, here.enter(shift), batch, beside)

    def expected(shift):
        return plain.log_likelihood(space, plain.enter(shift), batch, ())

    for one, two in zip(jax.value_and_grad(likelihood)(shift), jax.value_and_grad(expected)(shift), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-11)
    (one, gradient), (two, whole) = here.prior(here.enter(shift)), plain.prior(plain.enter(shift))
    np.testing.assert_allclose(one, two, rtol=1e-12)
    np.testing.assert_allclose(
        here.leave(gradient(here.enter(shift))), plain.leave(whole(plain.enter(shift))), atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:Kronecker")
@pytest.mark.parametrize("network", [two_layers, scaled], ids=lambda network: network.__name__)
def test_a_search_with_turned_data_takes_the_path_of_one_that_moves_the_weights(network, monkeypatch):
    program = program_of(network)
    problem, space = problem_of(program)
    start = jnp.asarray(np.random.default_rng(2).normal(size=space.layout.size))

    def search():
        estimator = Minibatch(optax.adam(1e-2), epochs=5, batch_size=4)
        return estimator.bind(program)(problem, start, jax.random.key(3))

    turned = search()
    monkeypatch.setattr("ssm_nn.inference.minibatch.turned_layers", lambda *_: ())
    by_weights = search()
    monkeypatch.setattr("ssm_nn.inference.minibatch.LayerCoordinates", lambda *searched: Round(*searched[:-1]))
    plain = search()
    for found in (turned, by_weights):
        assert found.status == FIXED_BUDGET
        np.testing.assert_allclose(found.shift, plain.shift, atol=1e-10)
        np.testing.assert_allclose(found.objective, plain.objective, rtol=1e-12)


def test_data_are_turned_where_that_saves_products():
    problem, space = problem_of(program_of(two_layers))
    for steps, expected in ((N // (2 * H), ()), (N // (2 * H) + 1, (0,))):
        assert turned_layers(space, problem.precision, problem.task, steps, batch_size=4) == expected


def test_a_product_is_given_for_one_that_is_made():
    """Else a kernel that stands for its shape alone would be read."""
    arrays = {"net": {"first": jnp.ones((D, H)), "last": jnp.ones((H, K))}}

    def tied(arrays):
        return jnp.sum(jnp.ones((2, D)) @ arrays["net"]["first"] @ arrays["net"]["first"].T)

    with pytest.raises(ValueError, match=r"net\.first meet the data in .*one product is accepted"):
        run_with_products(tied, arrays, {("net", "first"): jnp.ones((2, H))})
