"""The factor of each likelihood against the Fisher information of its density, written out here by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import gammaln

from ssm_nn.likelihoods import likelihood_of

pytestmark = pytest.mark.usefixtures("x64")


def normal_log_density(eta, y):
    return -0.5 * ((y - eta[0]) / jnp.exp(eta[1])) ** 2 - eta[1] - 0.5 * jnp.log(2 * jnp.pi)


def student_log_density(df):
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return lambda eta, y: constant - eta[1] - (df + 1) / 2 * jnp.log1p(((y - eta[0]) / jnp.exp(eta[1])) ** 2 / df)


def binomial_log_density(total):
    def log_density(eta, y):
        choose = gammaln(total + 1) - gammaln(y + 1) - gammaln(total - y + 1)
        return choose + y * eta[0] - total * jnp.log1p(jnp.exp(eta[0]))

    return log_density


def multinomial_log_density(total):
    def log_density(eta, counts):
        choose = gammaln(total + 1) - jnp.sum(gammaln(counts + 1))
        return choose + counts @ eta - total * jax.nn.logsumexp(eta)

    return log_density


def poisson_log_density(eta, y):
    return y * eta[0] - jnp.exp(eta[0]) - gammaln(y + 1)


def categorical_log_density(eta, y):
    return eta[y] - jnp.log(jnp.sum(jnp.exp(eta)))


# substitution y = tan(u) covers the whole line, heavy tails too
_angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi - np.pi / 2
LINE, WEIGHT = np.tan(_angle), np.pi / 20_000 / np.cos(_angle) ** 2
COUNTS3 = np.array([(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)])
TWO, THREE = np.array([[0.3, -0.4], [-1.2, 0.5]]), np.array([[0.1, -2.0, 1.0], [3.0, 0.5, 0.0]])
ONE = np.array([[-1.3], [2.2]])

# name: distribution at outputs (2, K), log density, outputs, all values, their volume
CASES = {
    "Normal": (lambda e: dist.Normal(e[:, 0], jnp.exp(e[:, 1])), normal_log_density, TWO, LINE, WEIGHT),
    "StudentT": (lambda e: dist.StudentT(4.0, e[:, 0], jnp.exp(e[:, 1])), student_log_density(4.0), TWO, LINE, WEIGHT),
    "BernoulliLogits": (lambda e: dist.Bernoulli(logits=e[:, 0]), binomial_log_density(1), ONE, np.arange(2), 1),
    "BernoulliProbs": (
        lambda e: dist.Bernoulli(probs=jax.nn.sigmoid(e[:, 0])),
        binomial_log_density(1),
        ONE,
        np.arange(2),
        1,
    ),
    "BinomialLogits": (lambda e: dist.Binomial(5, logits=e[:, 0]), binomial_log_density(5), ONE, np.arange(6), 1),
    "BinomialProbs": (
        lambda e: dist.Binomial(5, probs=jax.nn.sigmoid(e[:, 0])),
        binomial_log_density(5),
        ONE,
        np.arange(6),
        1,
    ),
    "CategoricalLogits": (
        lambda e: dist.Categorical(logits=e),
        categorical_log_density,
        THREE,
        np.arange(3),
        1,
    ),
    "CategoricalProbs": (
        lambda e: dist.Categorical(probs=jax.nn.softmax(e)),
        categorical_log_density,
        THREE,
        np.arange(3),
        1,
    ),
    "MultinomialLogits": (
        lambda e: dist.Multinomial(3, logits=e),
        multinomial_log_density(3),
        THREE,
        COUNTS3,
        1,
    ),
    "MultinomialProbs": (
        lambda e: dist.Multinomial(3, probs=jax.nn.softmax(e)),
        multinomial_log_density(3),
        THREE,
        COUNTS3,
        1,
    ),
    "Poisson": (lambda e: dist.Poisson(jnp.exp(e[:, 0])), poisson_log_density, ONE, np.arange(80), 1),
}
VALUES = {"MultinomialLogits": COUNTS3[[1, 5]], "MultinomialProbs": COUNTS3[[1, 5]]}
each = pytest.mark.parametrize("name", CASES)


def fisher(log_density, outputs, values, volume):
    """E[-d^2 log p / d eta^2] by summation or quadrature over all values, (batch, K, K)."""

    @jax.jit
    @jax.vmap
    def expectation(eta):
        density = volume * jnp.exp(jax.vmap(log_density, (None, 0))(eta, values))
        hessian = jax.vmap(jax.hessian(log_density), (None, 0))(eta, values)
        return -jnp.tensordot(density, hessian, 1)

    return np.asarray(expectation(jnp.array(outputs)))


def information(likelihood, value=None):
    factor = likelihood.factor(value)
    return np.asarray(factor @ jnp.swapaxes(factor, -1, -2))


@each
def test_factor_is_a_root_of_the_fisher_information(name):
    make, log_density, outputs, values, volume = CASES[name]
    likelihood = likelihood_of(make(jnp.array(outputs)))
    assert likelihood.exact
    expected = fisher(log_density, outputs, values, volume)
    np.testing.assert_allclose(information(likelihood), expected, atol=1e-7)
    # the logits of probabilities are fixed but for a constant
    shifted = (
        likelihood.outputs - jnp.mean(likelihood.outputs, -1, keepdims=True)
        if outputs.shape[1] == 3
        else likelihood.outputs
    )
    centred = outputs - outputs.mean(-1, keepdims=True) if outputs.shape[1] == 3 else outputs
    np.testing.assert_allclose(shifted, centred, atol=1e-12)


@each
def test_rebuilt_at_its_outputs_it_is_the_same_distribution(name):
    make, log_density, outputs, _, _ = CASES[name]
    original = make(jnp.array(outputs))
    values = VALUES.get(name, jnp.array([0, 1]))
    likelihood = likelihood_of(original)
    rebuilt = likelihood.rebuild(likelihood.outputs)
    np.testing.assert_allclose(rebuilt.log_prob(values), original.log_prob(values), rtol=1e-12)
    # and at other outputs the distribution of those
    other = outputs[::-1] + 0.1
    expected = [log_density(jnp.array(eta), value) for eta, value in zip(other, values, strict=True)]
    np.testing.assert_allclose(likelihood.rebuild(jnp.array(other)).log_prob(values), expected, rtol=1e-10)


# one of each kind: two outputs, parameters that are held fixed, a count beside the output, a vector of outputs
@pytest.mark.parametrize("name", ["Normal", "StudentT", "BinomialLogits", "CategoricalLogits"])
@pytest.mark.parametrize("wrapper", ["plate", "event", "mask", "mask in event", "vmap"])
def test_wrappers_are_looked_through(name, wrapper):
    make, _, outputs, _, _ = CASES[name]
    outputs = jnp.array(outputs)
    plain = make(outputs)
    expected = information(likelihood_of(plain))
    if wrapper == "vmap":

        def one(eta):
            likelihood = likelihood_of(make(eta[None]))
            factor = likelihood.factor(None)
            return factor @ jnp.swapaxes(factor, -1, -2)

        np.testing.assert_allclose(jax.vmap(one)(outputs)[:, 0], expected, rtol=1e-12, atol=1e-15)
        return
    mask = jnp.array([True, False])
    wrapped = {
        "plate": lambda: plain.expand((3, 2)),
        "event": lambda: plain.to_event(1),
        "mask": lambda: plain.mask(mask),
        "mask in event": lambda: plain.mask(mask).to_event(1),
    }[wrapper]()
    likelihood = likelihood_of(wrapped)
    assert likelihood.exact
    if "mask" in wrapper:
        # what is masked says nothing
        expected = expected * mask[:, None, None]
    found = information(likelihood)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-12)
    assert likelihood.outputs.shape == (((3, 2) if wrapper == "plate" else (2,)) + outputs.shape[1:])
    values = jnp.array([[0, 1], [1, 1], [1, 0]]) if wrapper == "plate" else jnp.array([0, 1])
    rebuilt = likelihood.rebuild(likelihood.outputs)
    unmasked = plain.to_event(1) if "event" in wrapper else plain
    np.testing.assert_allclose(rebuilt.log_prob(values), unmasked.log_prob(values), rtol=1e-12)


def test_a_scalar_in_a_plate_is_expanded():
    """One output for many examples, as a constant noise or a bias alone would give."""
    likelihood = likelihood_of(dist.Normal(0.3, 0.5).expand((4,)))
    assert likelihood.outputs.shape == (4, 2)
    np.testing.assert_allclose(information(likelihood), np.broadcast_to(np.diag([4.0, 2.0]), (4, 2, 2)))

    def expanded_by_plate():
        with numpyro.plate("n", 4):
            numpyro.sample("y", dist.Bernoulli(logits=0.0), obs=jnp.zeros(4))

    with numpyro.handlers.trace() as trace:
        expanded_by_plate()
    np.testing.assert_allclose(information(likelihood_of(trace["y"]["fn"])), np.full((4, 1, 1), 0.25))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_finite_at_large_logits(dtype):
    logits = jnp.array([[1e4, -1e4, 0], [-1e4, -1e4, 1e4], [1e2, -1e2, 0]], dtype)
    distributions = {
        "Categorical": dist.Categorical(logits=logits),
        "Multinomial": dist.Multinomial(7, logits=logits),
        "Bernoulli": dist.Bernoulli(logits=logits),
        "Binomial": dist.Binomial(7, logits=logits),
    }
    for name, distribution in distributions.items():
        factor = likelihood_of(distribution).factor(None)
        assert bool(jnp.all(jnp.isfinite(factor))), name


def test_the_bernoulli_factor_does_not_cancel():
    """p (1 - p) at p = 1 - 1e-13, in float32."""
    factor = likelihood_of(dist.Bernoulli(logits=jnp.array([30.0, -30.0], jnp.float32))).factor(None)
    np.testing.assert_allclose(factor[:, 0, 0], np.exp(-15.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (lambda: dist.Gamma(jnp.array([2.0, 0.5]), jnp.array([1.0, 3.0])), [0.1, 5.0]),
        (lambda: dist.NegativeBinomial2(jnp.array([2.0, 0.5]), jnp.array([1.0, 3.0])), [0, 5]),
        (lambda: dist.Gamma(2.0, 1.0).expand((2,)), [0.1, 5.0]),
    ],
    ids=["Gamma", "NegativeBinomial2", "expanded"],
)
def test_any_other_likelihood_gives_the_positive_part_of_its_hessian(distribution, value):
    value = jnp.array(value)
    likelihood = likelihood_of(distribution())
    assert not likelihood.exact
    found = information(likelihood, value)
    hessian = jax.hessian(lambda eta: -jnp.sum(likelihood.rebuild(eta).log_prob(value)))(likelihood.outputs)
    scales, directions = np.linalg.eigh(hessian)
    np.testing.assert_allclose(found, directions * np.maximum(scales, 0) @ directions.T, atol=1e-9)
    assert np.linalg.eigvalsh(found).min() > -1e-12
    np.testing.assert_allclose(
        jnp.sum(likelihood.rebuild(likelihood.outputs).log_prob(value)), jnp.sum(distribution().log_prob(value))
    )


def test_a_likelihood_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no floating-point parameter"):
        likelihood_of(dist.DiscreteUniform(0, 3))
