"""A head above several bodies, against the exact posterior over both, computed with dense NumPy from all points at once."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

import ssm_nn
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical, Gaussian
from ssm_nn.inference.last_layer.head_predictions import MonteCarlo
from ssm_nn.inference.last_layer.heads import feature_head, network_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.last_layer_mixture import LastLayerMixture
from ssm_nn.inference.last_layer.program_heads import draw_bodies, program_head, program_heads
from ssm_nn.models import RandomWalk, Static
from ssm_nn.models.networks import mlp
from ssm_nn.precision_diagonal import DiagonalPrecision

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, HIDDEN, NOISE, PRIOR = 2, 3, 0.4, 1.5
WEIGHTS = np.array([0.5, 0.1, 0.3, 0.1])


@pytest.fixture(scope="module")
def bodies():
    return np.random.default_rng(3).normal(size=(len(WEIGHTS), WIDTH, HIDDEN))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(14, WIDTH))
    return x, np.sin(x[:, 0]) + 0.4 * rng.normal(size=14)


def heads_of(bodies, likelihood):
    def network(body):
        params = {"first": jnp.asarray(body), "last": jnp.zeros((HIDDEN, likelihood.num_outputs))}
        return (lambda p, x: jnp.tanh(x @ p["first"]) @ p["last"]), params

    example = np.zeros((1, WIDTH))
    return [network_head(network(body), likelihood, example, prior_precision=PRIOR**-2) for body in bodies]


def dense(bodies, x, y, new, weights=WEIGHTS):
    """Weights of the bodies, and mean and variance of the mixture's prediction, from one Gaussian a body."""
    evidence, means, variances = [], [], []
    for body in bodies:
        phi, phi_new = np.tanh(x @ body), np.tanh(new @ body)
        total = PRIOR**2 * phi @ phi.T + NOISE**2 * np.eye(len(x))
        evidence.append(multivariate_normal.logpdf(y, np.zeros(len(x)), total))
        pull = np.linalg.solve(total, PRIOR**2 * phi @ phi_new.T).T
        means.append(pull @ y)
        covariance = PRIOR**2 * phi_new @ phi_new.T - PRIOR**2 * pull @ phi @ phi_new.T
        variances.append(np.diag(covariance) + NOISE**2)
    joint = np.log(weights) + np.array(evidence)
    p = softmax(joint)
    mean = p @ np.array(means)
    return p, mean, p @ (np.array(variances) + (np.array(means) - mean) ** 2), float(logsumexp(joint))


def test_finite_bodies_with_gaussian_labels_are_the_exact_posterior_mixture(bodies, data):
    x, y = data
    mixture = LastLayerMixture(heads_of(bodies, Gaussian(NOISE)), Full(), weights=WEIGHTS)
    state, evidence = mixture.init(), 0.0
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        state, info = mixture.update(state, {"x": x[start:stop], "y": y[start:stop]})
        evidence += info.log_evidence
    p, mean, variance, whole = dense(bodies, x[:13], y[:13], x)
    assert np.sort(p)[-2] > 0.05  # more than one body counts
    np.testing.assert_allclose(state.weights, p, atol=1e-10)
    assert evidence == pytest.approx(whole, abs=1e-9)
    assert info.effective_bodies == pytest.approx(1 / np.sum(p**2))
    made = mixture.predict(state, {"x": x, "y": y})
    np.testing.assert_allclose(made.mean[:, 0], mean, atol=1e-10)
    np.testing.assert_allclose(made.variance[:, 0], variance, atol=1e-10)
    _, last = mixture.update(state, {"x": x[13:], "y": y[13:]})
    assert made.log_density[13] == pytest.approx(last.log_evidence, abs=1e-10)  # the one-step log predictive
    # points taken out leave no trace, in the heads or in the weights
    left, info = mixture.remove(state, [0, 7])
    keep = np.setdiff1d(np.arange(13), [0, 7])
    p, mean, _, _ = dense(bodies, x[keep], y[keep], x)
    np.testing.assert_allclose(left.weights, p, atol=1e-10)
    np.testing.assert_allclose(mixture.predict(left, x).mean[:, 0], mean, atol=1e-10)
    assert info.num_points == 2


def test_points_that_the_bodies_have_seen_teach_the_heads_and_weigh_no_body(bodies, data):
    x, y = data
    mixture = LastLayerMixture(heads_of(bodies, Gaussian(NOISE)), Full(), weights=WEIGHTS)
    state = mixture.init(seen={"x": x[:6], "y": y[:6]})
    np.testing.assert_allclose(state.weights, WEIGHTS, atol=1e-12)
    state, _ = mixture.update(state, {"x": x[6:], "y": y[6:]})
    # the weights before are p(body | seen): dividing by the evidence of the seen points makes them a prior
    seen = np.array([dense([body], x[:6], y[:6], x, np.ones(1))[3] for body in bodies])
    p, mean, _, _ = dense(bodies, x, y, x, WEIGHTS / np.exp(seen))
    np.testing.assert_allclose(state.weights, p, atol=1e-9)
    np.testing.assert_allclose(mixture.predict(state, x).mean[:, 0], mean, atol=1e-9)
    swept, _ = mixture.sweep(state)
    np.testing.assert_allclose(swept.weights, p, atol=1e-9)
    with pytest.raises(ValueError, match=r"ids holds \[3\], which the bodies' belief has learnt from"):
        mixture.remove(state, [3, 8])


@pytest.mark.parametrize("likelihood", [Categorical(3), pytest.param(Gaussian(NOISE), marks=pytest.mark.slow)], ids=str)
def test_one_body_is_the_filter_of_a_fixed_body(likelihood, bodies, data):
    x = data[0]
    y = np.arange(14) % 3
    (head,) = heads_of(bodies[:1], likelihood)
    engine, mixture = LastLayerFilter(head, Full()), LastLayerMixture([head], Full())
    one, many = engine.init(), mixture.init()
    for part in (slice(0, 8), slice(8, 14)):
        one, own = engine.update(one, {"x": x[part], "y": y[part]})
        many, info = mixture.update(many, {"x": x[part], "y": y[part]})
        assert info.log_evidence == pytest.approx(own.log_evidence, abs=1e-12)
    np.testing.assert_array_equal(one.mean, many.heads[0].mean)
    for method in (MonteCarlo(50), None):
        given = () if method is None else (method,)
        for ours, theirs in zip(
            mixture.predict(many, {"x": x, "y": y}, *given), engine.predict(one, {"x": x, "y": y}, *given), strict=True
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, atol=1e-12)


def program_of():
    def program(tasks):
        net = ssm_nn.weights(
            "net",
            mlp((WIDTH, HIDDEN, 1), "tanh"),
            prior=dist.Normal(0.0, 1.0),
            transition=Static(),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with numpyro.plate("n", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"])[:, 0], NOISE), obs=task.get("y"))

        net.over(tasks, observe)

    return program


def test_bodies_drawn_from_another_engines_belief_are_those_of_its_program(data, rng):
    x, y = data
    task = {"x": x, "y": y}
    size = WIDTH * HIDDEN + HIDDEN + HIDDEN + 1
    belief = Belief(jnp.asarray(rng.normal(size=size)), DiagonalPrecision(jnp.linspace(0.5, 2.0, size)))
    drawn = draw_bodies(belief, 3, key=1)
    many = draw_bodies(belief, 4000)
    np.testing.assert_allclose(many.mean(axis=0), belief.mean, atol=0.1)
    np.testing.assert_allclose(many.var(axis=0), belief.precision.variance(), rtol=0.15)
    heads = program_heads(program_of(), task, drawn)
    for head, weights in zip(heads, drawn, strict=True):
        alone = program_head(program_of(), task, weights=weights)
        np.testing.assert_allclose(head.features(task), alone.features(task), atol=1e-12)
        np.testing.assert_allclose(head.scale, alone.scale)
    assert not np.allclose(heads[0].features(task), heads[1].features(task))
    mixture = LastLayerMixture(heads)
    state, info = mixture.update(mixture.init(seen=task), {"x": x[:2] + 1, "y": y[:2]})
    assert 1 <= info.effective_bodies <= 3
    assert np.isfinite(mixture.predict(state, task).log_density).all()


def test_what_a_mixture_refuses(bodies, data):
    x, y = data
    heads = heads_of(bodies, Gaussian(NOISE))
    for make, words in (
        (lambda: LastLayerMixture([]), "heads is empty"),
        (lambda: LastLayerMixture([heads[0], *heads_of(bodies[:1], Gaussian(1.0))]), "heads differ"),
        (lambda: LastLayerMixture(heads, weights=[1.0, -1.0, 1.0, 1.0]), "4 finite numbers >= 0"),
        (lambda: LastLayerMixture(heads, weights=np.zeros(4)), "not all 0"),
        (lambda: LastLayerMixture(heads, weights=np.ones(3)), "4 finite numbers >= 0"),
        (lambda: program_heads(program_of(), {"x": x, "y": y}, np.zeros(3)), r"bodies has shape \(3,\)"),
        (lambda: program_heads(program_of(), {"x": x, "y": y}, np.zeros((2, 3))), r"weights has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    mixture = LastLayerMixture(heads)
    state, info = mixture.update(mixture.init(), {"x": x[:0], "y": y[:0]})
    assert info.num_points == 0
    np.testing.assert_array_equal(state.weights, np.full(4, 0.25))
    state, _ = mixture.update(state, {"x": x, "y": y})
    with pytest.raises(ValueError, match="which no point has"):
        mixture.remove(state, [99])
    same, _ = mixture.remove(state, [])
    assert same is state
    moving = [feature_head(Gaussian(NOISE), WIDTH, transition=RandomWalk(0.1))] * 2
    walking = LastLayerMixture(moving)
    walked, _ = walking.update(walking.init(), {"x": x, "y": y})
    for call in (lambda: walking.sweep(walked), lambda: walking.remove(walked, [0])):
        with pytest.raises(ValueError, match="the head moves between batches"):
            call()
