"""Predictions against their definitions, evidence, a walking head, and the published rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.evidence import tune_head
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical, Gaussian, Poisson
from ssm_nn.inference.last_layer.head_predictions import MeanField, MonteCarlo, Probit
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.moving import smooth_head
from ssm_nn.inference.last_layer.published_rule import PublishedRule
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.square_root import SquareRoot
from ssm_nn.models import OrnsteinUhlenbeck, RandomWalk

pytestmark = pytest.mark.usefixtures("x64")


def learnt(structure=None, num=12):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num, 3)), rng.integers(0, 3, num)
    engine = LastLayerFilter(feature_head(Categorical(3), 3, prior_precision=0.5), structure or Full())
    return engine, engine.update(engine.init(), {"x": x, "y": y})[0], x, y


def test_predictions_are_those_of_their_formulas():
    engine, state, x, y = learnt()
    phi = engine.features(x)
    f = phi @ np.asarray(state.mean).T
    matrix = np.asarray(state.belief.matrix).reshape(3, 4, 3, 4)
    covariance = np.einsum("nd,kdle,ne->nkl", phi, matrix, phi)
    variance = np.einsum("nkk->nk", covariance)
    probit = softmax(f / np.sqrt(1 + np.pi / 8 * variance), axis=1)
    made = engine.predict(state, {"x": x, "y": y})
    np.testing.assert_allclose(made.probabilities, probit, atol=1e-12)
    np.testing.assert_allclose(made.log_density, np.log(probit[np.arange(12), y]), atol=1e-12)
    between = variance[:, :, None] + variance[:, None] - 2 * covariance
    field = 1 / np.exp(-(f[:, :, None] - f[:, None]) / np.sqrt(1 + np.pi / 8 * between)).sum(axis=2)
    np.testing.assert_allclose(
        engine.predict(state, x, MeanField()).probabilities, field / field.sum(axis=1, keepdims=True), atol=1e-12
    )
    rng = np.random.default_rng(1)
    draws = np.stack([rng.multivariate_normal(f[n], covariance[n], 20_000) for n in range(12)])
    exact = softmax(draws, axis=2).mean(axis=1)
    monte = engine.predict(state, x, MonteCarlo(4_000), key=3)
    np.testing.assert_allclose(monte.probabilities, exact, atol=0.02)
    assert (monte.epistemic > 0).all()
    together = engine.sample_outputs(state, x, 4_000, key=4)
    np.testing.assert_allclose(np.cov(together[:, 0].T), covariance[0], atol=0.1 * covariance[0].max())
    np.testing.assert_allclose(softmax(together, axis=2).mean(axis=0), exact, atol=0.02)


def test_predictions_of_many_points_are_made_in_batches_that_agree(monkeypatch):
    engine, state, x, _ = learnt(num=8)
    whole = engine.predict(state, np.tile(x, (3, 1)), MeanField())
    monkeypatch.setattr("ssm_nn.inference.last_layer.head_predictions._BATCH", 8)
    parts = engine.predict(state, np.tile(x, (3, 1))[:20], MeanField())
    np.testing.assert_allclose(parts.probabilities, whole.probabilities[:20], atol=1e-14)
    assert isinstance(parts.probabilities, np.ndarray)


def test_gaussian_and_poisson_predictions_are_scored_by_their_integrals(rng):
    x = rng.normal(size=(8, 2))
    engine = LastLayerFilter(feature_head(Gaussian(0.5), 2), Full())
    state, first = engine.update(engine.init(), {"x": x, "y": x[:, 0]})
    _, second = engine.update(state, {"x": x[:1] + 1, "y": [0.3]})
    made = engine.predict(state, {"x": x[:1] + 1, "y": [0.3]}, Probit())
    assert float(made.log_density[0]) == pytest.approx(second.log_evidence, abs=1e-10)  # one-step log predictive
    assert np.isfinite(first.log_evidence)
    engine = LastLayerFilter(feature_head(Poisson(), 2), Full())
    state, _ = engine.update(engine.init(), {"x": x, "y": np.arange(8) % 3})
    made = engine.predict(state, {"x": x[:2], "y": [1, 4]})
    phi = engine.features(x[:2])
    f, v = (phi @ np.asarray(state.mean).T)[:, 0], np.asarray(state.belief.output_variance(jnp.asarray(phi)))[:, 0]
    np.testing.assert_allclose(made.mean, np.exp(f + v / 2), rtol=1e-6)
    from scipy.integrate import quad
    from scipy.stats import norm, poisson

    wide = [
        quad(lambda z, n=n: poisson.pmf([1, 4][n], np.exp(z)) * norm.pdf(z, f[n], np.sqrt(v[n])), f[n] - 9, f[n] + 9)[0]
        for n in range(2)
    ]
    np.testing.assert_allclose(made.log_density, np.log(wide), atol=1e-5)


def test_the_evidence_chooses_scale_and_noise_of_gaussian_labels(rng):
    x = rng.normal(size=(40, 3))
    y = x @ [1.0, -2.0, 0.5] + 0.3 * rng.normal(size=40)
    engine = LastLayerFilter(feature_head(Gaussian(1.0), 3), Full())
    state, _ = engine.update(engine.init(), {"x": x, "y": y})
    tuned = tune_head(engine, state)
    phi = np.column_stack([x, np.ones(40)])

    def evidence(scale, noise):
        total = scale**2 * phi @ phi.T + noise**2 * np.eye(40)
        return -0.5 * (y @ np.linalg.solve(total, y) + np.linalg.slogdet(2 * np.pi * total)[1])

    scale = float(tuned.engine.head.scale[0])
    best = evidence(scale, tuned.noise_scale)
    assert tuned.log_evidence == pytest.approx(best, abs=1e-8)
    for change in (0.99, 1.01):
        assert evidence(change * scale, tuned.noise_scale) < best
        assert evidence(scale, change * tuned.noise_scale) < best
    np.testing.assert_allclose(tuned.prior_precision, scale**-2)
    again, _ = tuned.engine.update(tuned.engine.init(), {"x": x, "y": y})
    np.testing.assert_allclose(tuned.engine.weights(tuned.state), tuned.engine.weights(again), atol=1e-8)


def test_the_evidence_of_classes_is_largest_at_the_tuned_scale():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(32, 3))
    y = np.argmax(2 * x + rng.normal(size=x.shape), axis=1)
    engine = LastLayerFilter(feature_head(Categorical(3), 3), Full())
    state, _ = engine.update(engine.init(), {"x": x, "y": y})
    tuned = tune_head(engine, state)
    assert tuned.converged

    def evidence(scale):
        other = engine.with_scale(scale)
        return other.update(other.init(), {"x": x, "y": y})[1].log_evidence

    scale = float(tuned.engine.head.scale[0])
    assert tuned.log_evidence == pytest.approx(evidence(scale), abs=1e-6)
    assert tuned.log_evidence > max(evidence(scale * change) for change in (0.5, 0.95, 1.05, 2.0))


@pytest.mark.parametrize(
    ("structure", "kernel"),
    [
        (Full(), OrnsteinUhlenbeck(0.8)),
        pytest.param(Full(), RandomWalk(0.4), marks=pytest.mark.slow),
        pytest.param(Shared(), RandomWalk(0.4), marks=pytest.mark.slow),
        (SquareRoot(), OrnsteinUhlenbeck(0.8)),
    ],
    ids=str,
)
def test_a_walking_head_with_gaussian_labels_is_the_dense_smoother(structure, kernel, rng):
    num_steps, per, width = 3, 4, 2
    x, y = rng.normal(size=(num_steps, per, width)), rng.normal(size=(num_steps, per))
    head = feature_head(Gaussian(0.5), width, prior_precision=0.5, transition=kernel)
    engine = LastLayerFilter(head, structure)
    state, evidence = engine.init(), 0.0
    for t in range(num_steps):
        if t == 1:
            state = engine.advance(state)  # a batch of which nothing is known
            continue
        state, info = engine.update(state, {"x": x[t], "y": y[t]})
        evidence += info.log_evidence
    # the joint Gaussian of all heads, and the labels of the first and the last batch
    d = width + 1
    gain, noise = float(head.gain[0]), float(head.noise[0])
    variances, blocks = [2.0], {}
    for _ in range(num_steps - 1):
        variances.append(gain**2 * variances[-1] + noise)
    for s in range(num_steps):
        for t in range(num_steps):
            blocks[s, t] = gain ** abs(s - t) * variances[min(s, t)] * np.eye(d)
    prior = np.block([[blocks[s, t] for t in range(num_steps)] for s in range(num_steps)])
    phi = np.zeros((2 * per, num_steps * d))
    for place, t in enumerate((0, 2)):
        phi[place * per : (place + 1) * per, t * d : (t + 1) * d] = np.column_stack([x[t], np.ones(per)])
    labels = np.r_[y[0], y[2]]
    total = phi @ prior @ phi.T + 0.25 * np.eye(2 * per)
    pull = np.linalg.solve(total, phi @ prior).T
    mean, covariance = pull @ labels, prior - pull @ phi @ prior
    path = smooth_head(engine, state)
    means = np.asarray(path.means)[:, 0] * head.scale
    np.testing.assert_allclose(means.ravel(), mean, atol=1e-9)
    np.testing.assert_allclose(engine.weights(state)[0], mean[-d:], atol=1e-9)
    spread = np.concatenate([np.asarray(b.variance())[0] * head.scale**2 for b in path.beliefs])
    np.testing.assert_allclose(spread, np.diag(covariance), atol=1e-9)
    assert evidence == pytest.approx(
        -0.5 * (labels @ np.linalg.solve(total, labels) + np.linalg.slogdet(2 * np.pi * total)[1]), abs=1e-9
    )
    swept, info = engine.sweep(state)
    assert info.status == 0
    np.testing.assert_allclose(swept.mean, state.mean, atol=1e-9)


def test_sweeping_a_walking_head_finds_the_mode_of_the_path_and_removal_leaves_no_trace(rng):
    x, y = rng.normal(size=(3, 6, 2)), rng.integers(0, 3, (3, 6))
    head = feature_head(Categorical(3), 2, transition=RandomWalk(0.5))
    engine = LastLayerFilter(head, Full())

    def run(keep):
        state = engine.init()
        for t in range(3):
            own = keep[t]
            state, _ = engine.update(state, {"x": x[t, own], "y": y[t, own]}, ids=6 * t + np.arange(6)[own])
        return state

    everything = [np.arange(6)] * 3
    swept, info = engine.sweep(run(everything))
    assert info.status == 0
    phi = jnp.asarray(np.concatenate([x, np.ones((3, 6, 1))], axis=2))

    def loss(path):
        w = path.reshape(3, 3, 3)
        fit = sum(jnp.sum(head.likelihood.log_prob(phi[t] @ w[t].T, jnp.asarray(y[t]))) for t in range(3))
        return -fit + 0.5 * jnp.sum(w[0] ** 2) + 0.5 / 0.25 * jnp.sum((w[1:] - w[:-1]) ** 2)

    path = np.asarray(smooth_head(engine, swept).means)
    assert float(jnp.abs(jax.grad(loss)(path.ravel())).max()) < 1e-7
    removed, _ = engine.remove(swept, [1, 8])
    removed, _ = engine.sweep(removed)
    never, _ = engine.sweep(run([np.delete(np.arange(6), 1), np.delete(np.arange(6), 2), np.arange(6)]))
    np.testing.assert_allclose(removed.mean, never.mean, atol=1e-8)
    np.testing.assert_allclose(removed.belief.matrix, never.belief.matrix, atol=1e-8)


def test_a_structure_that_cannot_walk_says_which_can(rng):
    head = feature_head(Categorical(3), 2, transition=RandomWalk(0.5))
    with pytest.raises(ValueError, match=r"KroneckerHead\(\) carries no head that moves.*SquareRoot\(\)"):
        LastLayerFilter(head, KroneckerHead())
    engine = LastLayerFilter(head, DiagonalHead())
    batch = {"x": rng.normal(size=(2, 2)), "y": [0, 1]}
    state, _ = engine.update(engine.init(), batch)
    assert engine.update(state, batch)[1].status == 0


def test_the_published_rule_is_its_formula_point_by_point():
    engine, state, x, _ = learnt(Shared())
    rule = PublishedRule(engine, gamma=3.0)
    start = rule.start(state)
    rng = np.random.default_rng(2)
    new, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
    after = rule.update(start, {"x": new, "y": labels})
    scale = engine.head.scale
    rows = np.column_stack([x, np.ones(12)])
    w = engine.weights(start)
    top = softmax(rows @ w.T, axis=1).max(axis=1)
    sigma = np.linalg.inv(np.diag(scale**-2.0) + (rows * (top * (1 - top))[:, None]).T @ rows)
    for row, label in zip(np.column_stack([new, np.ones(4)]), labels, strict=True):
        u = sigma @ row
        p = softmax(w @ row)
        sigma = sigma - np.outer(u, u) / (1 + row @ u)
        w = w + 3.0 * np.outer(np.eye(3)[label] - p, sigma @ row)
    np.testing.assert_allclose(engine.weights(after), w, atol=1e-9)
    np.testing.assert_allclose(np.asarray(after.belief.covariance) * np.outer(scale, scale), sigma, atol=1e-9)
    assert rule.update(after, {"x": new[:0], "y": labels[:0]}) is after
