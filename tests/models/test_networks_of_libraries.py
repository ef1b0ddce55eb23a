"""What a network of flax.nnx or equinox may hold: no batch normalisation, no active dropout, ties only where they hold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError

from ssm_nn.networks import as_network

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def linear(seed, fan_out=3):
    return eqx.nn.Linear(3, fan_out, key=jax.random.key(seed))


class EquinoxBatchNorm(eqx.Module):
    blocks: list

    def __init__(self):
        norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
        self.blocks = [linear(0), eqx.nn.Sequential([eqx.nn.Identity(), norm])]


class EquinoxSpectralNorm(eqx.Module):
    layer: eqx.nn.SpectralNorm

    def __init__(self):
        self.layer = eqx.nn.SpectralNorm(linear(0), "weight", key=jax.random.key(1))


@pytest.mark.parametrize("make", [EquinoxBatchNorm, eqx.nn.make_with_state(EquinoxBatchNorm)])
def test_batch_normalisation_of_equinox_is_refused_with_what_to_use_instead(make):
    with pytest.raises(
        ValueError, match=r"batch normalisation: .* stateless normaliser: LayerNorm, GroupNorm or RMSNorm"
    ):
        as_network(make())


@pytest.mark.parametrize("make", [EquinoxSpectralNorm, eqx.nn.make_with_state(EquinoxSpectralNorm)])
def test_other_state_of_equinox_is_refused_where_it_lies(make):
    with pytest.raises(
        ValueError, match=r"keeps state from call to call \(equinox.nn.StateIndex at 'layer.uv_index'\)"
    ):
        as_network(make())


def test_batch_normalisation_of_nnx_is_refused_with_what_to_use_instead():
    network = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="stateless normaliser: LayerNorm, GroupNorm or RMSNorm"):
        as_network(network)


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
def test_stateless_normalisers_of_nnx_are_taken(norm):
    network = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), norm(3, rngs=nnx.Rngs(0)))
    taken = as_network(network)
    np.testing.assert_allclose(taken.bind(taken.initial)(X), network(X), rtol=1e-6)


@pytest.mark.parametrize("norm", [eqx.nn.LayerNorm(3), eqx.nn.GroupNorm(3, 3), eqx.nn.RMSNorm(3)])
def test_stateless_normalisers_of_equinox_are_taken(norm):
    network = eqx.nn.Sequential([linear(0), norm])
    taken = as_network(network)
    np.testing.assert_allclose(taken.bind(taken.initial)(X[0]), network(X[0]), rtol=1e-6)


def test_active_dropout_is_refused_and_taken_once_it_is_off():
    network = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    with pytest.raises(
        ValueError, match=r"dropout at 'layers.1' that is active: .* switch it off with network.eval\(\)"
    ):
        as_network(network)
    network.eval()
    taken = as_network(network)
    out = jax.jit(lambda arrays: taken.bind(arrays)(X))(taken.initial)
    np.testing.assert_allclose(out, network(X), rtol=1e-6)
    harmless = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.0, rngs=nnx.Rngs(1)))
    assert len(as_network(harmless).initial) == 2

    other = eqx.nn.Sequential([linear(0), eqx.nn.Dropout(0.5)])
    with pytest.raises(
        ValueError, match=r"dropout at 'layers.1' that is active: .*equinox.nn.inference_mode\(network\)"
    ):
        as_network(other)
    off = eqx.nn.inference_mode(other)
    taken = as_network(off)
    np.testing.assert_allclose(taken.bind(taken.initial)(X[0]), off(X[0]), rtol=1e-6)


class Counted(nnx.Module):
    def __init__(self):
        self.layer, self.calls = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.layer(x)


def test_state_of_nnx_that_a_call_changes_fails_where_the_program_is_traced():
    taken = as_network(Counted())
    with pytest.raises(TraceContextError, match="Cannot mutate"):
        jax.jit(lambda arrays: taken.bind(arrays)(X))(taken.initial)


class NnxTied(nnx.Module):
    def __init__(self, tie):
        self.a, self.b = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(1))
        if tie == "variable":
            self.b.kernel = self.a.kernel
        elif tie == "module":
            self.b = self.a
        else:
            self.b.kernel = nnx.Param(self.a.kernel[...])

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class EquinoxTied(eqx.Module):
    a: eqx.nn.Linear
    b: eqx.nn.Linear

    def __init__(self):
        self.a = linear(0)
        self.b = eqx.tree_at(lambda layer: layer.weight, linear(1), self.a.weight)


class EquinoxShared(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self):
        pair = (linear(0), linear(1))
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, x):
        a, b = self.shared()
        return b(jnp.tanh(a(x)))


@pytest.mark.parametrize(
    ("network", "paths", "x"),
    [
        (NnxTied("variable"), ["a.bias", "a.kernel", "b.bias"], X),
        (NnxTied("module"), ["a.bias", "a.kernel"], X),
        (EquinoxShared(), ["shared.pytree.0.weight", "shared.pytree.0.bias", "shared.pytree.1.bias"], X[0]),
    ],
)
def test_tied_weights_are_one_leaf_that_serves_both_places(network, paths, x):
    taken = as_network(network)
    assert list(taken.initial) == paths
    np.testing.assert_allclose(taken.bind(taken.initial)(x), network(x), rtol=1e-6)
    name = next(path for path in paths if path.endswith(("kernel", "weight")))
    arrays = {path: np.asarray(leaf, np.float64) for path, leaf in taken.initial.items()}
    arrays[name] = arrays[name] + 0.1
    kernel = arrays[name] if name.endswith("kernel") else arrays[name].T
    first, last = (arrays[path] for path in ([*(p for p in paths if p.endswith("bias"))] * 2)[:2])
    expected = np.tanh(x @ kernel + first) @ kernel + last
    out = taken.bind({path: np.float32(leaf) for path, leaf in arrays.items()})(x)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (NnxTied("array"), r"'a.kernel' and 'b.kernel' hold one and the same array.*assign one Variable to both"),
        (EquinoxTied(), r"'a.weight' and 'b.weight' hold one and the same array.*wrap them in equinox.nn.Shared"),
    ],
)
def test_one_array_in_two_places_that_ties_nothing_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        as_network(network)


def test_leaves_of_a_pair_are_weights_of_their_own():
    array = np.ones((3, 3), np.float32)
    taken = as_network((lambda params, x: x @ params["a"] @ params["b"], {"a": array, "b": array}))
    assert list(taken.initial) == ["a", "b"]
    np.testing.assert_allclose(taken.bind({"a": array, "b": 2 * array})(X), 2 * X @ array @ array, rtol=1e-6)
