"""The uncertain base of a linear-Gaussian program, against dense conditioning in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

from ssm_nn import ByPath, Task, weights
from ssm_nn.inference import Minibatch
from ssm_nn.inference.perturbation import FixedRank, PerturbationFilter, PlainSVD, UncertainBase
from ssm_nn.inference.perturbation.fitting import OwnParameters
from ssm_nn.models.transitions import OrnsteinUhlenbeck, Static

SIGMA, KERNEL_SCALE, BIAS_SCALE = 0.5, 2.0, 1.5
N, INPUTS, OUTPUTS = 24, 3, 2


def program(tasks):
    params = {"kernel": jnp.full((INPUTS, OUTPUTS), 0.3), "bias": jnp.zeros(OUTPUTS)}
    net = weights(
        "net",
        (lambda p, x: x @ p["kernel"] + p["bias"], params),
        prior=ByPath({"kernel": dist.Normal(0.0, KERNEL_SCALE), "bias": dist.Normal(0.0, BIAS_SCALE)}),
        transition=ByPath({"kernel": Static(), "bias": OrnsteinUhlenbeck(0.0)}),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), SIGMA).to_event(1), obs=task.get("y"))

    net.over(tasks, observe)


def without_scales(carry):
    """Labels for the optimiser: scales stay as the least squares found them, so that the program is linear in the rest."""
    if not isinstance(carry, OwnParameters):
        return jax.tree.map(lambda _: "moves", carry)
    still = jax.tree.map(lambda _: "still", carry.factors)
    return jax.tree.map(lambda _: "moves", carry)._replace(factors=still)


def learnt(tasks):
    descent = optax.multi_transform({"moves": optax.sgd(0.1), "still": optax.set_to_zero()}, without_scales)
    made = PerturbationFilter(
        program,
        minibatch=Minibatch(descent, epochs=400, batch_size=N),
        graph=UncertainBase(),
        directions=PlainSVD(),
        allocation=FixedRank(0),
    )
    return made, made.run(0, tasks)[0]


def tasks_of(rng, orthogonal):
    made = []
    for t in range(3):
        x = rng.normal(size=(N, INPUTS))
        if orthogonal:  # columns orthogonal to each other and to the bias's
            x = np.linalg.qr(np.column_stack([np.ones(N), x]))[0][:, 1:] * np.sqrt(N)
        y = x @ rng.normal(size=(INPUTS, OUTPUTS)) + rng.normal(size=OUTPUTS) + SIGMA * rng.normal(size=(N, OUTPUTS))
        made.append(Task({"x": jnp.asarray(x), "y": jnp.asarray(y)}, {"task": np.int32(t)}))
    return made


def design(task, record):
    """d y / d (W, b) for all N * OUTPUTS observations, given the task's scales."""
    x = np.asarray(task["x"], float)
    s = np.ones(INPUTS) if not record.factors else record.factors[0].inputs
    r = np.ones(OUTPUTS) if not record.factors else record.factors[0].outputs
    rows = np.einsum("ni,i,op,p->noip", x, s, np.eye(OUTPUTS), r).reshape(N * OUTPUTS, -1)
    return rows, np.tile(np.eye(OUTPUTS), (N, 1))


def conditioned(mean, precision, rows, y):
    """Mean and precision of ``N(mean, precision^-1)`` given ``y = rows w + noise``."""
    total = precision + rows.T @ rows / SIGMA**2
    return np.linalg.solve(total, precision @ mean + rows.T @ y / SIGMA**2), total


def test_each_task_conditions_the_base_and_keeps_the_diagonal(x64, rng):
    tasks = tasks_of(rng, orthogonal=False)
    _, state = learnt(tasks)
    size = INPUTS * OUTPUTS
    mean, diagonal = np.zeros(size), np.full(size, KERNEL_SCALE**-2.0)
    for task, record in zip(tasks, state.records, strict=True):
        rows = np.column_stack(design(task, record))
        prior = np.diag(np.concatenate([diagonal, np.full(OUTPUTS, BIAS_SCALE**-2.0)]))
        found, total = conditioned(np.concatenate([mean, np.zeros(OUTPUTS)]), prior, rows, np.ravel(task["y"]))
        np.testing.assert_allclose(record.own["net"]["bias"], found[size:], atol=1e-8)
        mean, diagonal = found[:size], np.diag(total)[:size]
    np.testing.assert_allclose(state.base["net"]["kernel"].ravel(), mean, atol=1e-8)
    np.testing.assert_allclose(state.precision["net"]["kernel"].ravel(), diagonal, rtol=1e-8)


def test_orthogonal_designs_give_the_belief_of_all_data_at_once(x64, rng):
    """The diagonal is then exact: the last belief is the smoothed one, and every task is read at it."""
    tasks = tasks_of(rng, orthogonal=True)
    made, state = learnt(tasks)
    size, count = INPUTS * OUTPUTS, len(tasks)
    rows, targets = [], []
    for t, (task, record) in enumerate(zip(tasks, state.records, strict=True)):
        shared, own = design(task, record)
        biases = np.zeros((N * OUTPUTS, count * OUTPUTS))
        biases[:, t * OUTPUTS : (t + 1) * OUTPUTS] = own
        rows.append(np.column_stack([shared, biases]))
        targets.append(np.ravel(task["y"]))
    prior = np.diag(np.repeat([KERNEL_SCALE**-2.0, BIAS_SCALE**-2.0], [size, count * OUTPUTS]))
    mean, total = conditioned(np.zeros(len(prior)), prior, np.concatenate(rows), np.concatenate(targets))
    kernel = mean[:size].reshape(INPUTS, OUTPUTS)
    np.testing.assert_allclose(state.base["net"]["kernel"], kernel, atol=1e-8)
    variance = np.diag(np.linalg.inv(total))[:size]
    np.testing.assert_allclose(1 / state.precision["net"]["kernel"].ravel(), variance, rtol=1e-8)
    factors = state.records[1].factors[0]
    expected = factors.inputs[:, None] * kernel * factors.outputs
    np.testing.assert_allclose(made.weights(state, 1)["net"]["kernel"], expected, atol=1e-8)
    assert np.abs(factors.inputs - 1).max() > 0.1  # so that the scales are seen to count
