"""Checkpoints: to the last bit, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.beliefs import FilterState, Info
from ssm_nn.inference.checkpoints import CheckpointError, load, replacing, save
from ssm_nn.moments import Moments
from ssm_nn.precision_low_rank import DiagonalPlusLowRank


def tree(key):
    """A state and an Info with every kind of leaf."""
    precision = DiagonalPlusLowRank(jax.random.uniform(key, (7,)), jax.random.normal(key, (7, 3)))
    state = FilterState(jnp.int32(4), jax.random.key(3), jax.random.normal(key, (7,)), precision)
    moments = Moments(jnp.ones(7), jnp.zeros(7), jnp.full(7, 1e-40), jnp.arange(7))
    info = Info(moments, precision, -0.1, float("nan"), 0.1 + 0.2, 0.0, 12, 1, 1e-300)
    return (
        state,
        info,
        {"half": jnp.ones(2, jnp.bfloat16), "host": np.arange(3), "flag": True, "empty": jnp.zeros((7, 0))},
    )


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes(), np.asarray(leaf).dtype, np.shape(leaf)


def test_a_tree_comes_back_bit_for_bit(tmp_path, key):
    made = tree(key)
    save(tmp_path / "deep" / "a.npz", made)
    back = load(tmp_path / "deep" / "a.npz", jax.tree.map(lambda leaf: leaf, made))
    assert jax.tree.structure(back) == jax.tree.structure(made)
    for here, there in zip(jax.tree.leaves(back), jax.tree.leaves(made), strict=True):
        assert bits(here) == bits(there)
        assert type(here) is type(there)


def test_a_loaded_key_draws_the_same(tmp_path):
    save(tmp_path / "key.npz", jax.random.key(5))
    back = load(tmp_path / "key.npz", jax.random.key(0))
    np.testing.assert_array_equal(jax.random.normal(back, (3,)), jax.random.normal(jax.random.key(5), (3,)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_an_error(tmp_path, key, share):
    file = tmp_path / "a.npz"
    save(file, tree(key))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="cut short or altered"):
        load(file, tree(key))


def test_an_altered_array_is_an_error(tmp_path, key):
    file = tmp_path / "a.npz"
    save(file, tree(key))
    with np.load(file) as content:
        arrays = dict(content)
    arrays["leaf_2"] = arrays["leaf_2"] + 1
    np.savez(file, **arrays)
    with pytest.raises(CheckpointError, match="sha256"):
        load(file, tree(key))


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path, rng):
    file, made = tmp_path / "a.npz", {"x": jnp.arange(5.0)}
    save(file, made)
    content = bytearray(file.read_bytes())
    for place in rng.choice(len(content), 60, replace=False):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        file.write_bytes(changed)
        try:
            back = load(file, made)
        except CheckpointError:
            continue
        np.testing.assert_array_equal(back["x"], made["x"])  # a byte of the archive's own that nobody reads


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"x": jnp.zeros(4)}, "float32 of shape \\(3,\\), where x: float32 of shape \\(4,\\)"),
        ({"y": jnp.zeros(3)}, "where y"),
        ({"x": jnp.zeros(3, jnp.int32)}, "int32"),
        ({"x": 1.0}, "a float"),
        ({"x": jnp.zeros(3), "z": 1}, "1 leaves, where 2"),
    ],
)
def test_another_structure_is_an_error_that_names_the_leaf(tmp_path, like, words):
    save(tmp_path / "a.npz", {"x": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "a.npz", like)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "none.npz", 1)


@pytest.mark.parametrize("leaf", ["text", object(), np.array([None])])
def test_what_is_no_number_is_refused(tmp_path, leaf):
    with pytest.raises(ValueError, match="are accepted"):
        save(tmp_path / "a.npz", {"x": leaf})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")

    def write():
        with replacing(file) as stream:
            stream.write(b"new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_bytes() == b"old"
