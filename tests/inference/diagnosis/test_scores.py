"""Leave-one-out, one task ahead, comparisons and distances, against closed forms and NUTS-like draws."""

import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from judged_tasks import SCALE, SD, D, N, T, joint_of, labelled, logistic, regression, tasks_of
from numpyro.infer import MCMC, NUTS

import ssm_nn
from ssm_nn.inference import Dense, Diagonal, LaplaceFilter, Linearised
from ssm_nn.inference.diagnosis import (
    compare_evidence,
    compare_loo,
    functional_distance,
    gaussian_distance,
    gaussian_kl,
    gaussian_w2,
    importance_weights,
    innovations,
    kernel_test,
    leave_one_out,
    log_likelihood_tree,
    loo_by_task,
    path_moments,
    prequential,
    warm_start,
)

TASKS = tasks_of(0)


def smoothed(program=regression, structure=None, tasks=TASKS, **hypers):
    engine = LaplaceFilter(program, structure or Dense(), hypers=hypers)
    return engine.smooth(engine.run(0, tasks))


@pytest.fixture(scope="module")
def exact():
    return smoothed(scale=SCALE)


@pytest.fixture(scope="module")
def draws():
    """Independent draws of the exact posterior, by site as NUTS gives them."""
    joint = joint_of(TASKS)
    rng = np.random.default_rng(0)
    flat = rng.multivariate_normal(joint.mean.ravel(), joint.covariance.reshape(T * D, -1), size=4000)
    return {"net.weight": flat.reshape(4000, T, D)}


def exact_loo():
    """Log densities of each example left out, by conditioning the joint Gaussian on all others."""
    found = []
    for t, task in enumerate(TASKS):
        for n in range(N):
            rest = [dict(k) for k in TASKS]
            kept = np.arange(N) != n
            rest[t] = {name: value[kept] for name, value in task.items()}
            joint = joint_of(rest)
            x = task["x"][n].astype(float)
            variance = x @ joint.covariance[t, :, t] @ x + SD**2
            error = task["y"][n] - x @ joint.mean[t]
            found.append(-0.5 * (error**2 / variance + np.log(2 * np.pi * variance)))
    return np.array(found).reshape(T, N)


def test_loo_by_task_is_the_exact_one(exact):
    found = leave_one_out(exact, TASKS, num_samples=4000)
    by_task = exact_loo().sum(axis=1)
    np.testing.assert_allclose(found.by_task, by_task, atol=0.5)
    assert found.elpd == pytest.approx(by_task.sum(), abs=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of single examples' k-hat
        assert found.elpd == pytest.approx(float(az.loo(found.tree).elpd), abs=0.05)


@pytest.mark.slow
def test_masked_examples_and_fixed_sites_do_not_count(exact):
    short = [{name: value[: N - 3 * (t == 1)] for name, value in task.items()} for t, task in enumerate(TASKS)]
    tree = smoothed(tasks=short, scale=SCALE).to_datatree(num_samples=200, tasks=short)
    tree["log_likelihood"]["scale"] = (("chain", "draw"), np.zeros((1, 200)))
    found = loo_by_task(tree)
    assert len(found.pareto_k) == T * N - 3
    assert list(found.task) == sorted(found.task)
    direct = leave_one_out(smoothed(tasks=short, scale=SCALE), short, num_samples=200)
    np.testing.assert_allclose(found.by_task, direct.by_task, atol=2.0)


def test_trees_without_log_likelihoods_or_with_too_few_draws_are_refused(exact):
    with pytest.raises(ValueError, match="tree has no group log_likelihood; make it with"):
        loo_by_task(exact.to_datatree(num_samples=100))
    with pytest.raises(ValueError, match="num_samples is 50: too few draws"):
        loo_by_task(exact.to_datatree(num_samples=50, tasks=TASKS))
    with pytest.raises(ValueError, match="num_samples is 50: too few draws"):
        leave_one_out(exact, TASKS, num_samples=50)


def test_one_task_ahead_is_the_exact_predictive(exact):
    found = prequential(exact, TASKS, method=Linearised(3000))
    joint_evidence = joint_of(TASKS).log_evidence
    assert found.log_evidence.sum() == pytest.approx(joint_evidence, abs=0.02)
    assert np.isnan(found.accuracy).all()
    prior = np.einsum("ni,ni->n", TASKS[0]["x"], TASKS[0]["x"]) + SD**2
    density = -0.5 * (TASKS[0]["y"] ** 2 / prior + np.log(2 * np.pi * prior))
    assert found.log_density[0] == pytest.approx(density.mean(), abs=0.1)
    assert found.rmse[0] == pytest.approx(np.sqrt(np.mean(TASKS[0]["y"] ** 2)), rel=0.1)


def test_class_labels_have_an_accuracy_and_filtered_beliefs_will_do():
    tasks = labelled(0)
    engine = LaplaceFilter(logistic, Dense())
    found = prequential(engine.run(0, tasks), tasks)
    assert (found.accuracy[1:] > 0.6).all()
    assert np.isnan(found.rmse).all()


# comparisons


def test_the_kernel_that_made_the_data_wins_by_evidence_and_by_loo(exact):
    still = smoothed(scale=0.02)
    table = compare_evidence({"still": still, "true": exact.filtered})
    assert table.names == ("true", "still")
    assert table.probability[0] > 0.99
    assert table.difference[1] == pytest.approx(
        joint_of(TASKS, 0.02).log_evidence - joint_of(TASKS).log_evidence, abs=0.5
    )
    by_loo = compare_loo({"still": leave_one_out(still, TASKS), "true": leave_one_out(exact, TASKS)})
    assert list(by_loo.index) == ["true", "still"]


def test_models_of_other_data_or_sizes_are_refused(exact):
    few = smoothed(tasks=TASKS[:2], scale=SCALE)
    with pytest.raises(ValueError, match="models have different numbers of tasks"):
        compare_evidence({"a": exact, "b": few})
    one = leave_one_out(exact, TASKS, num_samples=100)
    with pytest.raises(
        ValueError, match=r"different numbers of \(chains, draws\), \{'a': \(1, 100\), 'b': \(1, 150\)\}"
    ):
        compare_loo({"a": one, "b": leave_one_out(exact, TASKS, num_samples=150)})
    with pytest.raises(ValueError, match="different numbers of observed points"):
        compare_loo({"a": one, "b": leave_one_out(few, TASKS[:2], num_samples=100)})
    with pytest.raises(ValueError, match="at least two"):
        compare_evidence({"a": exact})


# distances


def test_gaussian_distances_are_the_closed_forms():
    a, b = np.diag([1.0, 4.0]), np.diag([2.0, 1.0])
    shift = np.array([1.0, -2.0])
    kl = 0.5 * (0.5 + 4 + 0.5 + 4 - 2 + np.log(2 / 4))
    assert gaussian_kl(np.zeros(2), a, shift, b) == pytest.approx(kl)
    assert gaussian_w2(np.zeros(2), a, shift, b) == pytest.approx(np.sqrt(5 + (1 - np.sqrt(2)) ** 2 + 1))
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    turned = [turn @ m @ turn.T for m in (a, b)]
    assert gaussian_w2(turn @ np.zeros(2), turned[0], turn @ shift, turned[1]) == pytest.approx(
        gaussian_w2(np.zeros(2), a, shift, b)
    )
    with pytest.raises(ValueError, match="covariance is not positive definite"):
        gaussian_kl(np.zeros(2), np.diag([1.0, -1.0]), shift, b)


def test_the_exact_smoother_is_near_the_reference_and_the_diagonal_is_not(exact, draws):
    near, far = gaussian_distance(exact, draws), gaussian_distance(smoothed(structure=Diagonal(), scale=SCALE), draws)
    assert (near.kl < 0.02).all()
    assert (near.mean_error < 0.1).all()
    assert (np.abs(near.sd_ratio - 1) < 0.1).all()
    assert (far.kl > 0.1).all()
    assert (far.kl > 10 * near.kl).all()
    with pytest.raises(ValueError, match="samples holds 29 draws of 3 weights: too few"):
        gaussian_distance(exact, {"net.weight": draws["net.weight"][:29]})
    with pytest.raises(ValueError, match=r"samples have no 'net\.weight'.*another program"):
        gaussian_distance(exact, {"other": draws["net.weight"]})


def test_functional_distance_to_draws_of_the_same_posterior_vanishes(exact, draws):
    found = functional_distance(exact, draws, TASKS, method=Linearised(4000))
    assert (found.w2 < 0.05).all()
    assert np.isnan(found.total_variation).all()
    off = functional_distance(exact, {"net.weight": draws["net.weight"] + 1.0}, TASKS)
    assert (off.w2 > 0.5).all()
    assert (functional_distance(exact, exact, TASKS).w2 == 0).all()
    with pytest.raises(ValueError, match="tasks holds 1 tasks, but the posterior has 5"):
        functional_distance(exact, draws, TASKS[:1])


@pytest.mark.slow
def test_a_small_network_against_nuts_by_its_functions():
    tasks = labelled(0, num_tasks=2, size=60)
    posterior = smoothed(logistic, tasks=tasks)
    moved = numpyro.handlers.reparam(
        logistic, config=dict.fromkeys(("net.hidden", "net.head"), ssm_nn.InnovationReparam())
    )
    mcmc = MCMC(NUTS(moved), num_warmup=500, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), ssm_nn.stack_tasks(tasks))
    samples = {name: mcmc.get_samples()[name] for name in ("net.hidden", "net.head")}
    found = functional_distance(posterior, samples, tasks)
    assert (found.total_variation < 0.1).all()
    by_nuts = loo_by_task(log_likelihood_tree(posterior, samples, tasks))
    ours = leave_one_out(posterior, tasks)
    assert ours.elpd == pytest.approx(by_nuts.elpd, abs=10)


def test_log_likelihoods_of_draws_go_through_the_network(exact, draws):
    tree = log_likelihood_tree(exact, {"net.weight": draws["net.weight"][:100]}, TASKS)
    means = np.einsum("tni,sti->stn", np.stack([t["x"] for t in TASKS]), draws["net.weight"][:100])
    y = np.stack([t["y"] for t in TASKS])
    expected = -0.5 * ((y - means) / SD) ** 2 - np.log(SD * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, rtol=1e-5)
    assert jnp.isfinite(loo_by_task(tree).elpd)


def test_what_is_no_posterior_is_named_by_every_function(exact):
    run, draws = exact.filtered, {}
    calls = {
        "importance_weights": lambda: importance_weights(run, TASKS),
        "innovations": lambda: innovations(run, TASKS),
        "kernel_test": lambda: kernel_test(run),
        "leave_one_out": lambda: leave_one_out(run, TASKS),
        "log_likelihood_tree": lambda: log_likelihood_tree(run, draws, TASKS),
        "gaussian_distance": lambda: gaussian_distance(run, draws),
        "functional_distance": lambda: functional_distance(run, exact, TASKS),
        "path_moments": lambda: path_moments(run),
        "warm_start": lambda: warm_start(run.program, run),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"posterior is Filtered; what engine\.smooth"):
            pytest.fail(f"{name} returned {call()}")
    with pytest.raises(ValueError, match=r"reference is Filtered; what engine\.smooth"):
        functional_distance(exact, run, TASKS)
    with pytest.raises(ValueError, match=r"filtered is list; what engine\.run or"):
        prequential([], TASKS)
    with pytest.raises(ValueError, match=r"models\['b'\] is DataTree; what engine\.run or"):
        compare_evidence({"a": exact, "b": exact.to_datatree(num_samples=2)})
