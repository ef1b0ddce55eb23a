"""The Kronecker-eigen precision against dense numpy algebra in float64; entries placed into theta by hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.coordinate_map import CoordinateMap, LeafMap
from ssm_nn.inference.disturbances import product_diagonal
from ssm_nn.layer_places import LayerPlace, Places
from ssm_nn.moments import Moments
from ssm_nn.precision_kronecker import EigenBlock, KroneckerEigen
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

# theta: 2 of the rest, bias and kernel (in, out) of A, 3 of the rest, kernel (out, in) of B, bias and kernel (out, in,
# height, width) of C
P = 31
PLACES = Places(
    (
        LayerPlace("A", 4, (3, 2), (0,), 1, 2),
        LayerPlace("B", 13, (2, 4), (1,), 0, None),
        LayerPlace("C", 23, (2, 2, 2, 1), (1, 2, 3), 0, 21),
    ),
    P,
)
THETA = np.arange(P)
ENTRIES = [
    np.array([[4, 5], [6, 7], [8, 9], [2, 3]]),
    np.array([[13, 17], [14, 18], [15, 19], [16, 20]]),
    np.array([[23, 27], [24, 28], [25, 29], [26, 30], [21, 22]]),
]
REST = np.array([0, 1, 10, 11, 12])
# zero gain, zero noise, and both beside ordinary numbers
LAYER_GAIN, LAYER_NOISE = (0.7, 1.0, 0.0), (0.3, 0.0, 0.5)
REST_GAIN, REST_NOISE = np.array([0.7, 0.0, 1.0, -0.5, 1.0]), np.array([0.3, 0.5, 0.0, 0.2, 0.0])

pytestmark = pytest.mark.usefixtures("x64")


def by_layer(numbers, rest):
    made = np.zeros(P)
    for entries, number in zip(ENTRIES, numbers, strict=True):
        made[entries] = number
    made[REST] = rest
    return made


GAIN, NOISE = by_layer(LAYER_GAIN, REST_GAIN), by_layer(LAYER_NOISE, REST_NOISE)


class Case(NamedTuple):
    precision: KroneckerEigen
    dense: np.ndarray


def orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def make_case(seed=0, blocks=None, smallest=0.3) -> Case:
    """``blocks``: (V_A, V_G, S) of each layer, by default random."""
    rng = np.random.default_rng(seed)
    if blocks is None:
        blocks = [
            (orthogonal(rng, i), orthogonal(rng, o), rng.uniform(smallest, 5, (i, o)))
            for i, o in (entries.shape for entries in ENTRIES)
        ]
    diagonal, factor = rng.uniform(smallest, 2, len(REST)), rng.normal(size=(len(REST), 2))
    dense = np.zeros((P, P))
    for entries, (inputs, outputs, values) in zip(ENTRIES, blocks, strict=True):
        wide = np.kron(inputs, outputs)
        dense[np.ix_(entries.ravel(), entries.ravel())] = wide @ np.diag(values.ravel()) @ wide.T
    dense[np.ix_(REST, REST)] = np.diag(diagonal) + factor @ factor.T
    # numpy arrays: they are float64 before a test asks for it
    made = tuple(EigenBlock(*block) for block in blocks)
    return Case(KroneckerEigen(made, DiagonalPlusLowRank(diagonal, factor), PLACES), dense)  # type: ignore[arg-type]


CASE, SITE = make_case(0), make_case(1, smallest=0.0)
X = np.random.default_rng(2).normal(size=P)
WIDE = np.random.default_rng(3).normal(size=(P, 4))


def moments(gain=GAIN, noise=NOISE) -> Moments:
    return Moments(jnp.array(gain), jnp.zeros(P), jnp.array(noise), None)


def predicted(dense, gain=GAIN, noise=NOISE):
    return np.linalg.inv(np.diag(gain) @ np.linalg.inv(dense) @ np.diag(gain) + np.diag(noise))


def gain_matrix(dense, gain=GAIN, noise=NOISE):
    return np.linalg.inv(dense) @ np.diag(gain) @ predicted(dense, gain, noise)


def conditional(dense, gain=GAIN, noise=NOISE):
    covariance = np.linalg.inv(dense)
    return covariance - gain_matrix(dense, gain, noise) @ np.diag(gain) @ covariance


def assert_close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def test_read_outs_equal_dense_algebra():
    @jax.jit
    def read(p, x, wide):
        return {
            "to_dense": p.to_dense(),
            "matvec": p.matvec(x),
            "solve": p.solve(x),
            "solve many": p.solve(wide),
            "solver": p.solver()(x),
            "logdet": p.logdet(),
            "diagonal": p.precision_diagonal(),
            "variance": p.variance(),
            "quadratic": p.quadratic(x),
            "quadratic form": p.quadratic_form()(x),
        }

    covariance = np.linalg.inv(CASE.dense)
    expected = {
        "to_dense": CASE.dense,
        "matvec": CASE.dense @ X,
        "solve": covariance @ X,
        "solve many": covariance @ WIDE,
        "logdet": np.linalg.slogdet(CASE.dense)[1],
        "diagonal": np.diag(CASE.dense),
        "variance": np.diag(covariance),
        "quadratic": X @ CASE.dense @ X,
        "quadratic form": X @ CASE.dense @ X,
    }
    found = read(CASE.precision, X, WIDE)
    for name, value in expected.items():
        assert_close(found[name], value)


def test_the_whitening_is_a_square_root_of_the_precision():
    whitening = CASE.precision.whitening()
    root = np.asarray(jax.vmap(whitening.whiten, out_axes=1)(jnp.eye(P)))
    assert_close(root.T @ root, CASE.dense)
    assert_close(jax.vmap(whitening.colour, in_axes=1, out_axes=1)(jnp.array(root)), np.eye(P))
    assert 0 < whitening.smallest <= np.linalg.eigvalsh(CASE.dense)[0] * (1 + 1e-12)


def test_a_prior_is_held_exactly():
    values = np.random.default_rng(4).uniform(0.5, 2, P)
    made = KroneckerEigen.diagonal(jnp.array(values), PLACES, 3)
    assert_close(made.to_dense(), np.diag(values), 1e-15)
    assert_close(made.no_information().to_dense(), np.zeros((P, P)), 0)


def with_rows_of_no_weight(case, filling):
    """The same belief with 3, 4, .. rows more a layer."""
    layers = tuple(layer._replace(filling=3 + k) for k, layer in enumerate(PLACES.layers))
    blocks = []
    for block, layer in zip(case.precision.blocks, layers, strict=True):
        inputs = np.eye(len(block.inputs) + layer.filling)
        inputs[: len(block.inputs), : len(block.inputs)] = block.inputs
        values = np.concatenate([block.values, np.full((layer.filling, block.values.shape[1]), filling)])
        blocks.append(EigenBlock(inputs, block.outputs, values))
    return KroneckerEigen(tuple(blocks), case.precision.rest, PLACES._replace(layers=layers))


def test_rows_of_no_weight_change_nothing():
    moments = Moments(jnp.array(GAIN), jnp.zeros(P), jnp.array(NOISE))
    x, key = jnp.array(X), jax.random.key(0)
    both = CASE.precision, with_rows_of_no_weight(CASE, 0.01)
    site = SITE.precision, with_rows_of_no_weight(SITE, 0.0)
    for of in (
        lambda p, s: p.to_dense(),
        lambda p, s: p.solve(x),
        lambda p, s: p.logdet(),
        lambda p, s: p.variance(),
        lambda p, s: p.precision_diagonal(),
        lambda p, s: p.quadratic(x),
        lambda p, s: p.whitening().smallest,
        lambda p, s: p.whitening().colour(p.whitening().whiten(x)),
        lambda p, s: p.sample(key),
        lambda p, s: p.add(s).to_dense(),
        lambda p, s: p.absorb(s).to_dense(),
        lambda p, s: p.predict(moments).to_dense(),
        lambda p, s: p.smoother_gain(moments, x),
        lambda p, s: p.sample_conditional(moments, key),
        lambda p, s: p.conditional_log_density(moments, x),
        lambda p, s: p.message_before(s, moments).to_dense(),
        lambda p, s: type(p).diagonal(jnp.square(x), p.places, 1).logdet(),
        lambda p, s: product_diagonal(s, moments.gain, p),
    ):
        assert_close(of(both[1], site[1]), of(both[0], site[0]))


def test_few_columns_are_added_by_woodbury():
    expected = np.linalg.solve(CASE.dense + WIDE @ WIDE.T, X)
    assert_close(CASE.precision.add_columns(jnp.array(WIDE)).solve(jnp.array(X)), expected)


def test_step_equals_dense_algebra():
    """Prediction, gain, conditional density and backward message, gains and noises with zeros."""

    @jax.jit
    def read(p, site, step, x):
        return {
            "predict": p.predict(step).to_dense(),
            "gain": jax.vmap(lambda e: p.smoother_gain(step, e), out_axes=1)(jnp.eye(P)),
            "conditional": p.conditional_log_density(step, x),
            "message": p.message_before(site, step).to_dense(),
        }

    found = read(CASE.precision, SITE.precision, moments(), X)
    assert_close(found["predict"], predicted(CASE.dense))
    assert_close(found["gain"], gain_matrix(CASE.dense))
    moves = NOISE > 0
    covariance = conditional(CASE.dense)[np.ix_(moves, moves)]
    logdet = np.linalg.slogdet(2 * np.pi * covariance)[1]
    assert_close(found["conditional"], -0.5 * (X[moves] @ np.linalg.solve(covariance, X[moves]) + logdet))
    message = SITE.dense @ np.linalg.inv(np.eye(P) + np.diag(NOISE) @ SITE.dense)
    assert_close(found["message"], np.diag(GAIN) @ message @ np.diag(GAIN))


def test_draws_have_the_stated_covariance(key):
    """Five standard errors of a normal's sample moments."""
    number = 20_000

    @jax.jit
    def draw(p, step, keys):
        return jax.vmap(p.sample)(keys), jax.vmap(lambda k: p.sample_conditional(step, k))(keys)

    draws = draw(CASE.precision, moments(), jax.random.split(key, number))
    for drawn, covariance in zip(draws, (np.linalg.inv(CASE.dense), conditional(CASE.dense)), strict=True):
        drawn, scale = np.asarray(drawn), np.maximum(np.diag(covariance), 0)
        error = np.sqrt((np.outer(scale, scale) + covariance**2) / number)
        assert np.all(np.abs(drawn.T @ drawn / number - covariance) <= 5 * error + 1e-12)
        assert np.all(np.abs(drawn.mean(0)) <= 5 * np.sqrt(scale / number) + 1e-12)


def test_a_step_without_motion_is_the_identity_to_the_last_bit():
    still = moments(np.ones(P), np.zeros(P))
    moved = CASE.precision.predict(still)
    for found, block in zip(moved.blocks, CASE.precision.blocks, strict=True):
        np.testing.assert_array_equal(found.values, block.values)
    np.testing.assert_array_equal(moved.rest.diagonal, CASE.precision.rest.diagonal)
    np.testing.assert_array_equal(CASE.precision.smoother_gain(still, jnp.array(X)), X)
    assert_close(CASE.precision.message_before(SITE.precision, still).to_dense(), SITE.dense, 1e-13)
    np.testing.assert_array_equal(CASE.precision.sample_conditional(still, jax.random.key(0)), 0)


def test_two_steps_equal_one_of_twice_the_noise():
    once = CASE.precision.predict(moments(np.ones(P), 2 * NOISE)).to_dense()
    twice = CASE.precision.predict(moments(np.ones(P), NOISE)).predict(moments(np.ones(P), NOISE))
    assert_close(twice.to_dense(), once)


def test_large_noise_forgets_its_layer_only():
    large = by_layer((0.0, 1e9, 0.0), 0.0)
    covariance = np.linalg.inv(np.asarray(CASE.precision.predict(moments(np.ones(P), large)).to_dense()))
    own = ENTRIES[1].ravel()
    kept = np.setdiff1d(THETA, own)
    assert_close(covariance[np.ix_(own, own)] / 1e9, np.eye(len(own)), 1e-7)
    assert_close(covariance[np.ix_(kept, kept)], np.linalg.inv(CASE.dense)[np.ix_(kept, kept)], 1e-8)
    pulled = CASE.precision.smoother_gain(moments(np.ones(P), large), jnp.array(X))
    assert np.abs(pulled[own]).max() < 1e-7
    assert_close(pulled[kept], X[kept])


def test_message_is_what_the_next_state_tells_of_this_one():
    """In one basis, Lambda plus the message is the precision of theta_t after an observation of theta_t+1."""
    site_values = np.random.default_rng(5)
    blocks = tuple(
        block._replace(values=jnp.array(site_values.uniform(0, 3, block.values.shape)))
        for block in CASE.precision.blocks
    )
    site = KroneckerEigen(blocks, SITE.precision.rest, PLACES)
    message = CASE.precision.message_before(site, moments())
    covariance = np.linalg.inv(CASE.dense)
    gain = gain_matrix(CASE.dense)
    seen = np.linalg.inv(np.asarray(site.to_dense()) + predicted(CASE.dense))
    after = covariance - gain @ np.diag(GAIN) @ covariance + gain @ seen @ gain.T
    assert_close(np.linalg.inv(np.asarray(CASE.precision.add(message).to_dense())), after, 1e-8)


def turn_matrix(leaf):
    """One leaf's map as a matrix of its entries."""
    turn = np.asarray(leaf.turn)
    turn = np.eye(len(turn))[turn] if turn.ndim == 1 else turn
    before, after = np.prod(leaf.shape[: leaf.axis], dtype=int), np.prod(leaf.shape[leaf.axis + 1 :], dtype=int)
    return np.kron(np.kron(np.eye(before), turn), np.eye(after))


def turns(kind, size, seed=0):
    return jnp.array(
        np.roll(np.arange(size), 1) if kind == "permutation" else orthogonal(np.random.default_rng(seed), size)
    )


MAPS = {
    "inputs": lambda kind: [LeafMap(turns(kind, 3), 4, (3, 2), 0)],
    "inputs of a transposed leaf": lambda kind: [LeafMap(turns(kind, 4), 13, (2, 4), 1)],
    "channels": lambda kind: [LeafMap(turns(kind, 2, 1), 23, (2, 2, 2, 1), 1)],
    "rows of the window": lambda kind: [LeafMap(turns(kind, 2, 1), 23, (2, 2, 2, 1), 2)],
    "outputs with their bias": lambda kind: [
        LeafMap(turns(kind, 2, 1), 2, (2,), 0),
        LeafMap(turns(kind, 2, 1), 4, (3, 2), 1),
        LeafMap(turns(kind, 2, 2), 21, (2,), 0),
        LeafMap(turns(kind, 2, 2), 23, (2, 2, 2, 1), 0),
    ],
    "outputs without bias": lambda kind: [LeafMap(turns(kind, 2, 1), 13, (2, 4), 0)],
    "the rest": lambda kind: [
        LeafMap(turns("permutation", 2, 1), 0, (2,), 0),
        LeafMap(turns(kind, 4), 13, (2, 4), 1),
        LeafMap(turns("permutation", 3), 10, (3,), 0),
    ],
}


@pytest.mark.parametrize("kind", ["permutation", "matrix"])
@pytest.mark.parametrize("where", MAPS)
def test_known_maps_equal_dense_algebra(where, kind):
    leaves = sorted(MAPS[where](kind), key=lambda leaf: leaf.start)
    coordinates = CoordinateMap(tuple(leaves))
    matrix = np.eye(P)
    for leaf in leaves:
        matrix[leaf.start : leaf.stop, leaf.start : leaf.stop] = turn_matrix(leaf)
    moved = jax.jit(lambda p, m: p.mapped(m))(CASE.precision, coordinates)
    assert_close(moved.to_dense(), matrix @ CASE.dense @ matrix.T)
    assert_close(moved.mapped(coordinates.inverse()).to_dense(), CASE.dense)
    assert np.abs(matrix - np.eye(P)).max() > 0.1


@pytest.mark.parametrize("leaf", [LeafMap(jnp.array([1, 0]), 2, (2,), 0), LeafMap(jnp.array([1, 0]), 4, (3, 2), 1)])
def test_outputs_mapped_in_kernel_or_bias_alone_are_refused(leaf):
    with pytest.raises(
        ValueError, match=r"maps the outputs of 'A' in its weights or in its bias alone.*Dense, Diagonal"
    ):
        CASE.precision.mapped(CoordinateMap((leaf,)))


def test_a_matrix_is_refused_for_the_weights_outside_the_layers():
    leaf = LeafMap(turns("matrix", 3), 10, (3,), 0)
    with pytest.raises(ValueError, match="permutations only; Kronecker and Dense carry matrices too"):
        CASE.precision.mapped(CoordinateMap((leaf,)))


def on_inputs(seed):
    """Blocks M (x) I: what a linear model with Gaussian outputs says."""
    rng = np.random.default_rng(seed)
    return make_case(
        seed,
        [
            (orthogonal(rng, i), orthogonal(rng, o), np.repeat(rng.uniform(0.3, 5, (i, 1)), o, axis=1))
            for i, o in (entries.shape for entries in ENTRIES)
        ],
    )


@pytest.mark.parametrize("method", ["add", "absorb"])
def test_a_sum_that_is_a_product_with_the_identity_is_exact(method):
    one, two = on_inputs(6), on_inputs(7)
    total = one.precision.add(two.precision)
    if method == "absorb":
        site = KroneckerEigen(
            tuple(
                EigenBlock(b.inputs, b.outputs, two_.in_basis(b.inputs, b.outputs))
                for b, two_ in zip(total.blocks, two.precision.blocks, strict=True)
            ),
            two.precision.rest,
            PLACES,
        )
        # the site itself is no product in that basis: only the diagonal of the sum is
        for found, expected in zip(one.precision.absorb(site).blocks, total.blocks, strict=True):
            assert_close(found.values, expected.values)
    else:
        assert_close(total.to_dense(), one.dense + two.dense)


@pytest.mark.parametrize("method", ["add", "absorb"])
def test_of_any_other_sum_the_trace_and_the_diagonal_in_the_basis_are_exact(method):
    total = getattr(CASE.precision, method)(SITE.precision)
    dense = CASE.dense + SITE.dense
    for entries, block in zip(ENTRIES, total.blocks, strict=True):
        here = dense[np.ix_(entries.ravel(), entries.ravel())]
        wide = np.kron(block.inputs, block.outputs)
        assert_close(wide.T @ wide, np.eye(len(here)))
        assert_close(np.ravel(block.values), np.diag(wide.T @ here @ wide))
        assert_close(jnp.sum(block.values), np.trace(here))
    assert_close(np.asarray(total.to_dense())[np.ix_(REST, REST)], dense[np.ix_(REST, REST)])
    assert np.linalg.eigvalsh(np.asarray(total.to_dense())).min() > 0
    if method == "absorb":
        np.testing.assert_array_equal(total.blocks[0].inputs, SITE.precision.blocks[0].inputs)


def test_adding_no_information_changes_nothing():
    for one, two in ((CASE, CASE.precision.no_information()), (CASE, SITE.precision.no_information())):
        assert_close(one.precision.add(two).to_dense(), one.dense)


def test_partial_traces_are_those_of_the_dense_block():
    for entries, block in zip(ENTRIES, CASE.precision.blocks, strict=True):
        i, o = entries.shape
        here = CASE.dense[np.ix_(entries.ravel(), entries.ravel())].reshape(i, o, i, o)
        over_outputs, over_inputs = block.traces()
        assert_close(over_outputs, np.einsum("iojo->ij", here))
        assert_close(over_inputs, np.einsum("ioip->op", here))


def test_float32_stays_positive_definite():
    """20 steps at a largest precision of 1e4 and a noise of 1e-6, beside the same in float64."""
    rng = np.random.default_rng(0)
    blocks = [
        (orthogonal(rng, i), orthogonal(rng, o), 10.0 ** rng.uniform(-1, 4, (i, o)))
        for i, o in (entries.shape for entries in ENTRIES)
    ]
    start = jax.tree.map(lambda a: a.astype(jnp.float32), make_case(0, blocks).precision)

    def moved(dtype):
        precision = jax.tree.map(lambda a: a.astype(dtype), start)
        step = Moments(jnp.ones(P, dtype), jnp.zeros(P, dtype), jnp.full(P, 1e-6, dtype))
        precision, _ = jax.lax.scan(lambda p, _: (p.predict(step), None), precision, length=20)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(precision))
        return np.asarray(jax.tree.map(lambda a: a.astype(jnp.float64), precision).to_dense()), precision.variance()

    (single, single_variance), (double, double_variance) = moved(jnp.float32), moved(jnp.float64)
    root = np.linalg.inv(np.linalg.cholesky(double))
    assert np.abs(np.linalg.eigvalsh(root @ single @ root.T) - 1).max() < 1e-4
    np.testing.assert_allclose(single_variance, double_variance, rtol=1e-4)
