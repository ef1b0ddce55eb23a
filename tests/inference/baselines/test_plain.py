"""Fine-tuning and joint training against closed forms on a linear-Gaussian program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.baselines.plain import FineTuning, JointTraining, join
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.structures import Diagonal
from ssm_nn.models.programs import regression
from ssm_nn.tasks import Task

PRIOR, NOISE, SIZE = 0.7, 0.3, 4


def engine(**options):
    def apply(params, x):
        return x @ params["w"]

    program = regression((apply, {"w": jnp.zeros(SIZE)}), NOISE, PRIOR)
    return LaplaceFilter(program, Diagonal(), hypers={"noise.all": 0.0}, **options)


def tasks(rng, sizes=(6, 3, 5)):
    return [Task({"x": rng.normal(size=(n, SIZE)), "y": rng.normal(size=n)}) for n in sizes]


def ridge(x, y):
    """The MAP weights in closed form."""
    return np.linalg.solve(x.T @ x / NOISE**2 + np.eye(SIZE) / PRIOR**2, x.T @ y / NOISE**2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", [GaussNewton(), Lbfgs(tolerance=1e-9)])
def test_fine_tuning_fits_each_task_alone(rng, estimator):
    stream = tasks(rng)
    beliefs = FineTuning(engine(estimator=estimator)).run(0, stream)
    for belief, task in zip(beliefs, stream, strict=True):
        np.testing.assert_allclose(belief.mean, ridge(task["x"], task["y"]), atol=1e-8)
        np.testing.assert_allclose(belief.precision.precision_diagonal(), np.full(SIZE, PRIOR**-2))


@pytest.mark.usefixtures("x64")
def test_joint_training_fits_all_tasks_so_far(rng):
    stream = tasks(rng)
    beliefs = JointTraining(engine(estimator=GaussNewton())).run(0, stream)
    for t, belief in enumerate(beliefs):
        x, y = (np.concatenate([task[name] for task in stream[: t + 1]]) for name in "xy")
        np.testing.assert_allclose(belief.mean, ridge(x, y), atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_joint_training_ends_where_a_static_filter_does(rng):
    stream = tasks(rng)
    dense = LaplaceFilter(engine().program, hypers={"noise.all": 0.0}, estimator=GaussNewton())
    last = dense.run(0, stream).beliefs[-1].mean
    np.testing.assert_allclose(JointTraining(dense).run(0, stream)[-1].mean, last, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_task_without_data_changes_nothing(rng):
    trainer = FineTuning(engine())
    state, _ = trainer.update(trainer.init(0, (stream := tasks(rng))[0]), stream[0])
    after, found = trainer.update(state, None)
    assert found is None
    assert int(after.step) == 2
    np.testing.assert_array_equal(after.mean, state.mean)


def test_fine_tuning_starts_at_the_network_and_goes_on_from_the_last_task(rng):
    """A search of one step shows where it began."""
    started = []

    class Spy:
        def bind(self, program):
            inner = Lbfgs(max_steps=1).bind(program)

            def search(problem, start, key):
                started.append(np.asarray(problem.mean + start))
                return inner(problem, start, key)

            return search

    def apply(params, x):
        return x @ params["w"]

    program = regression((apply, {"w": jnp.full(SIZE, 0.25)}), NOISE, PRIOR)
    trainer = FineTuning(LaplaceFilter(program, Diagonal(), hypers={"noise.all": 0.0}, estimator=Spy()))
    stream = jax.tree.map(np.float32, tasks(rng, (6, 6)))
    beliefs = trainer.run(0, stream)
    np.testing.assert_allclose(started[0], np.full(SIZE, 0.25), rtol=1e-6)
    np.testing.assert_allclose(started[1], beliefs[0].mean, rtol=1e-6)


def test_joined_tasks_keep_their_masks_and_are_padded(rng):
    stream = [Task({"x": np.ones((2, 1))}, mask=np.array([True, False])), Task(), Task({"x": 2 * np.ones((1, 1))})]
    joint = join(stream, 5)
    np.testing.assert_array_equal(joint["x"][:, 0], [1, 1, 2, 0, 0])
    np.testing.assert_array_equal(joint.mask, [True, False, True, False, False])
    with pytest.raises(ValueError, match="size is 2, but the tasks have 3 examples"):
        join(stream, 2)


def test_joint_updates_of_one_size_compile_once(rng, caplog):
    trainer = JointTraining(engine(estimator=Lbfgs()))
    stream = jax.tree.map(np.float32, tasks(rng))
    state = trainer.init(0, stream[0])
    state, _ = trainer.update(state, stream[:1], 14)
    with jax.log_compiles():
        trainer.update(state, stream, 14)
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_data_that_are_not_finite_are_refused(rng):
    task = Task({"x": np.full((2, SIZE), np.nan, np.float32), "y": np.zeros(2, np.float32)})
    trainer = FineTuning(engine())
    with pytest.raises(ValueError, match="not finite"):
        trainer.init(0, task)
