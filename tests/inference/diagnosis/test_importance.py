"""Importance correction against exact posteriors, its refusals, and NUTS started from the smoother."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from judged_tasks import SCALE, D, joint_of, labelled, logistic, regression, tasks_of
from numpyro.infer import MCMC, NUTS

import ssm_nn
from ssm_nn.inference import Dense, LaplaceFilter
from ssm_nn.inference.diagnosis import Colour, Importance, importance_weights, path_moments, warm_start
from ssm_nn.inference.diagnosis.importance import pareto_weights
from ssm_nn.inference.diagnosis.lights import khat_light

TASKS = tasks_of(0)


@pytest.fixture(scope="module")
def exact():
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE})
    return engine.smooth(engine.run(0, TASKS))


def test_an_exact_smoother_has_equal_weights_and_its_evidence(exact):
    """Made in float32: its rounding is all that the weights see."""
    found = importance_weights(exact, TASKS, num_samples=200)
    assert np.ptp(found.log_ratios) < 0.05
    assert found.ess > 199
    assert found.reliable
    assert (found.task_khat < 0.5).all()
    assert found.log_evidence == pytest.approx(joint_of(TASKS).log_evidence, abs=0.05)


def claimed(power, tasks):
    """The belief with the likelihood counted ``power`` times, its record saying that it was counted once."""
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE}, power=power)
    filtered = engine.run(0, tasks)
    infos = tuple(info._replace(log_likelihood=info.log_likelihood / power) for info in filtered.infos)
    return engine.smooth(replace(filtered, infos=infos))


def test_correction_moves_a_wrong_belief_to_the_exact_posterior():
    tasks = TASKS[:2]
    posterior, joint = claimed(0.5, tasks), joint_of(tasks)
    found = importance_weights(posterior, tasks, num_samples=4000)
    assert found.reliable
    assert 500 < found.ess < 3500

    def moments(leaves):
        path = leaves["net.weight"]
        return {"mean": path, "product": path[:, :, None] * path[:, None, :]}

    corrected = found.expectation(moments)
    covariance = corrected["product"] - corrected["mean"][:, :, None] * corrected["mean"][:, None, :]
    error = 5 / np.sqrt(found.ess)
    for t in range(2):
        exact_ = joint.covariance[t, :, t]
        sd = np.sqrt(np.diag(exact_))
        assert (np.abs(corrected["mean"][t] - joint.mean[t]) < error * sd).all()
        assert (np.abs(covariance[t] - exact_) < 1.5 * error * np.outer(sd, sd)).all()
        # the belief itself is well outside
        own = posterior.beliefs[t].precision.variance()
        assert (own > 1.3 * np.diag(exact_)).any()
    assert found.log_evidence == pytest.approx(joint.log_evidence, abs=error)
    drawn = found.resampled(1000, key=1)["net.weight"]
    assert drawn.shape == (1000, 2, D)
    np.testing.assert_allclose(
        drawn.var(0), corrected["product"][:, range(D), range(D)] - corrected["mean"] ** 2, rtol=0.2
    )


def test_a_belief_that_is_too_far_off_is_not_corrected():
    found = importance_weights(claimed(30.0, TASKS), TASKS, num_samples=500)
    assert found.khat > 0.7
    assert not found.reliable
    for refused in (
        lambda: found.expectation(lambda leaves: leaves),
        lambda: found.resampled(5),
        lambda: found.log_evidence,
    ):
        with pytest.raises(ValueError, match=r"k-hat is \d+\.\d\d \(500 draws.*corrected expectations would be wrong"):
            refused()


def test_a_tempered_belief_is_judged_against_its_own_target(exact):
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE}, power=3.0)
    found = importance_weights(engine.smooth(engine.run(0, TASKS)), TASKS, num_samples=200)
    assert np.ptp(found.log_ratios) < 0.1


def test_pareto_weights_in_float64_of_known_tails():
    """Ratios whose tail is exactly Pareto with shape k."""
    u = np.random.default_rng(0).uniform(size=4000)
    for shape in (0.3, 0.9):
        assert pareto_weights(-shape * np.log(u)).khat == pytest.approx(shape, abs=0.15)
    equal = pareto_weights(np.full(200, -1234.5))
    assert equal.khat == -1
    assert equal.ess == 200
    assert pareto_weights(np.append(np.zeros(99), np.nan)).khat == np.inf


def test_the_tree_holds_weights_by_draw_and_khat_by_task(exact):
    tree = importance_weights(exact, TASKS, num_samples=100).to_datatree()["importance"]
    assert tree["log_weight"].dims == ("chain", "draw")
    assert tree["task_khat"].dims == ("task",)


def test_bad_input_is_refused(exact):
    with pytest.raises(ValueError, match="num_samples is 99: too few draws"):
        importance_weights(exact, TASKS, num_samples=99)
    with pytest.raises(ValueError, match="tasks holds 2 tasks, but the posterior has 5"):
        importance_weights(exact, TASKS[:2])
    with pytest.raises(ValueError, match="tasks are not those the posterior was made from: at its mean, task 0"):
        importance_weights(exact, tasks_of(1))
    with pytest.raises(ValueError, match="the site 'y' inside the task body is not observed"):
        importance_weights(exact, [{"x": task["x"]} for task in TASKS])


def test_path_moments_are_those_of_the_joint_gaussian(exact):
    found, joint = path_moments(exact), joint_of(TASKS)
    np.testing.assert_allclose(found.mean, joint.mean, atol=1e-4)
    np.testing.assert_allclose(found.covariance, joint.covariance, atol=1e-5)


def shrinking(tasks):
    """Weights that move without noise."""
    net = ssm_nn.weights(
        "net",
        (lambda params, x: x @ params, jnp.zeros(D)),
        prior=dist.Normal(0.0, 1.0),
        transition=lambda leaf: ssm_nn.Moments(gain=0.9),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), 0.3), obs=task["y"])

    net.over(tasks, observe)


def test_weights_that_move_without_noise_have_no_density():
    engine = LaplaceFilter(shrinking, Dense())
    found = importance_weights(engine.smooth(engine.run(0, TASKS)), TASKS, num_samples=100)
    with pytest.raises(ValueError, match="100 of 100 draws have a density that is not finite"):
        found.expectation(lambda leaves: leaves)


@pytest.mark.parametrize("dense", [False, True])
def test_nuts_starts_at_the_smoothed_mean_with_its_covariance(exact, dense):
    fixed = numpyro.handlers.condition(regression, {"scale": jnp.asarray(SCALE)})
    engine = LaplaceFilter(fixed, Dense())
    posterior = engine.smooth(engine.run(0, TASKS))
    settings = warm_start(fixed, posterior, dense=dense)
    kernel = NUTS(fixed, **settings)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(0), ssm_nn.stack_tasks(TASKS), extra_fields=("num_steps",))
    draws, joint = np.asarray(mcmc.get_samples()["net.weight"]), joint_of(TASKS)
    if dense:  # in the right metric the target is round: short trajectories, nearly independent draws
        sd = np.sqrt(np.einsum("titi->ti", joint.covariance))
        assert np.median(mcmc.get_extra_fields()["num_steps"]) <= 7
        assert (np.abs(draws.mean(0) - joint.mean) < 5 * sd / np.sqrt(100)).all()
    start = settings["init_strategy"].keywords["values"]["net.weight"]
    np.testing.assert_allclose(start, jnp.stack(posterior.means))


def test_a_warm_start_refuses_another_program_and_weights_without_noise(exact):
    with pytest.raises(ValueError, match="program is not the one"):
        warm_start(logistic, exact)
    still = LaplaceFilter(regression, Dense(), hypers={"scale": 1e-30})
    with pytest.raises(ValueError, match=r"the weights net\.weight move without noise"):
        warm_start(regression, still.smooth(still.run(0, TASKS)))


@pytest.mark.slow
def test_a_network_has_larger_khat_than_its_linear_kin():
    tasks = labelled(0)
    engine = LaplaceFilter(logistic, Dense())
    found = importance_weights(engine.smooth(engine.run(0, tasks)), tasks, num_samples=300)
    assert len(found.task_khat) == 3
    assert np.nanmax(found.task_khat) > 0.5
    assert (found.task_ess < 200).all()


def test_one_draw_that_carries_all_the_weight_has_an_infinite_khat(rng):
    found = pareto_weights(1e4 * rng.normal(size=200))
    assert found.khat == float("inf")
    assert found.ess == pytest.approx(1.0)
    # tasks without data have none; an infinite one is a red light
    by_task = np.array([np.inf, np.nan])
    judged = Importance(None, 0, np.zeros(200), found.log_weights, found.khat, found.ess, by_task, np.ones(2))
    light = khat_light(judged, 3)
    assert light.colour is Colour.RED
    assert "k-hat is inf for task 0 (1 of 2 tasks" in light.finding
