"""Filters over a mesh: the numbers of one device, and no array of all weights and columns ever gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.sharding import Mesh

import ssm_nn
from ssm_nn.extraction import describe, extract
from ssm_nn.inference import Dense, LaplaceFilter, LowRank
from ssm_nn.inference.kronecker import find_places
from ssm_nn.inference.last_layer import Categorical, Full, KroneckerHead, LastLayerFilter, SquareRoot, feature_head
from ssm_nn.inference.sharding import ShardedLayout, ShardedProgram, checked_mesh
from ssm_nn.models import Permuted, RandomWalk
from ssm_nn.models.networks import mlp
from ssm_nn.tasks import Task
from ssm_nn.weight_mesh import tall_skinny_qr

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = {"32": 1e-5, "64": 1e-10}
# points of little noise take most of S away, one part after another, which float32 does to 1e-7 of S as it was
DOWNDATED, DOWNDATED_TOLERANCE = "last-layer32/Full Gaussian", 1e-3


def in_a_process(script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_eight_devices(folder, *parts):
    in_a_process("eight_devices.py", str(folder / "found.npz"), *parts)
    with np.load(folder / "found.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return on_eight_devices(tmp_path_factory.mktemp("quick"), "algebra32", "algebra64", "low-rank64", "collectives")


def check_equal(found, part):
    names = [name.removeprefix("one/") for name in found if name.startswith(f"one/{part}/")]
    assert names
    for name in names:
        one, mesh = found[f"one/{name}"], found[f"mesh/{name}"]
        scale = max(1.0, float(np.abs(one).max()))
        tolerance = DOWNDATED_TOLERANCE if name.startswith(DOWNDATED) else TOLERANCE[part[-2:]]
        np.testing.assert_allclose(mesh, one, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("part", ["algebra32", "algebra64", "low-rank64"])
@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(quick, part):
    check_equal(quick, part)


@pytest.mark.slow
def test_more_filters_on_eight_devices_give_the_numbers_of_one(tmp_path):
    parts = ("low-rank32", "diagonal64", "network64", "kronecker32", "kronecker64", "mean-field32", "mean-field64")
    parts += ("last-layer32", "last-layer64", "perturbation64")
    found = on_eight_devices(tmp_path, *parts)
    for part in parts:
        check_equal(found, part)


@pytest.mark.slow
def test_no_collective_moves_an_array_of_weights_and_columns(quick):
    """P = 16,516, R = 8, K = 64 columns on 4 x 2 devices: what moves is (R + K)^2 numbers from each of four, no more."""
    weights, rank, columns, shards = 16_516, 8, 64, 4
    assert quick["collectives/predict"] <= rank**2
    assert quick["collectives/laplace"] <= shards * (rank + columns) ** 2
    assert quick["collectives/laplace"] < weights * rank / shards


@pytest.mark.slow
def test_no_collective_of_a_head_moves_its_covariance_or_all_of_its_columns(quick):
    """K D = 768 weights, parts of 192 columns, four devices: what moves is a quarter of the columns at a time."""
    weights, columns, shards = 768, 192, 4
    assert quick["collectives/head"] <= max(weights // shards * columns, columns**2)


# one process


def mesh_of_one(*names):
    return Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(names)), names)


def program(tasks, transition=None):
    net = ssm_nn.weights(
        "net",
        mlp((5, 3, 2)),
        prior=dist.Normal(0.0, 1.0),
        transition=transition or RandomWalk(0.1),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

    net.over(tasks, observe)


TASK = Task({"x": np.ones((4, 5), np.float32), "y": np.array([0, 1, 0, 1])})


class FakeMesh:
    """Stands for a mesh of n parts where nothing is placed."""

    def __init__(self, shards):
        self.shape = {"weights": shards}


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_a_sharded_layout_returns_every_leaf(rng, shards):
    plain = describe(program, TASK)
    layout = ShardedLayout(plain.sites, FakeMesh(shards))
    theta = rng.normal(size=plain.size)
    leaves = plain.leaves(theta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedLayout, "_cut", lambda self, leaf: leaf)
        packed = np.asarray(layout.vector(leaves))
        filled = np.asarray(layout.filled(leaves, 7.0))
    assert packed.shape == (layout.size,)
    assert layout.size % shards == 0
    assert np.sum(filled == 7.0) == layout.size - plain.size
    back = layout.leaves(packed)
    many = layout.leaves(np.stack([packed, 2 * packed]))
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(back[name], leaf.astype(packed.dtype))
        np.testing.assert_array_equal(many[name][1], 2 * leaf.astype(packed.dtype))


def test_without_a_mesh_the_decomposition_is_the_usual_one(rng):
    tall = rng.normal(size=(9, 4)).astype(np.float32)
    for here, there in zip(tall_skinny_qr(tall), np.linalg.qr(tall), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("eight", "mesh is 'eight'"),
        (mesh_of_one("data"), "mesh has the axes \\('data',\\)"),
        (mesh_of_one("weights", "model"), "'weights', and perhaps 'data', are accepted"),
    ],
)
def test_another_mesh_is_refused(mesh, words):
    with pytest.raises(ValueError, match=words):
        LaplaceFilter(program, LowRank(2), mesh=mesh)


def test_a_structure_that_does_not_shard_is_refused():
    with pytest.raises(ValueError, match="mesh serves LowRank, Diagonal and Kronecker, not Dense"):
        LaplaceFilter(program, Dense(), mesh=mesh_of_one("weights"))


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_layers_are_found_in_a_sharded_layout(rng, shards, monkeypatch):
    """Matrices and rest of the plain layout, with rows of no weight up to a multiple of the parts; and back."""
    monkeypatch.setattr(ShardedLayout, "_cut", lambda self, leaf: leaf)
    plain = extract(program, TASK)
    layout = ShardedLayout(plain.layout.sites, FakeMesh(shards))
    spread = plain._replace(layout=layout, prior_mean=layout.vector(plain.layout.leaves(plain.prior_mean)))
    here, there = find_places(plain, TASK), find_places(spread, TASK)
    # as if the second kernel and its bias were in no layer
    here, there = here._replace(layers=here.layers[:1]), there._replace(layers=there.layers[:1])
    theta = jnp.asarray(rng.normal(size=here.size), jnp.float32)
    moved = layout.vector(plain.layout.leaves(theta))
    for matrix, wide in zip(here.matrices(theta), there.matrices(moved, filling=7.0), strict=True):
        assert wide.shape[0] % shards == 0
        np.testing.assert_array_equal(wide[: len(matrix)], matrix)
        np.testing.assert_array_equal(wide[len(matrix) :], 7.0)
    np.testing.assert_array_equal(there.firsts(moved), here.firsts(theta))
    np.testing.assert_array_equal(there.rest_of(moved), here.rest_of(theta))
    np.testing.assert_array_equal(there.join(there.matrices(moved), there.rest_of(moved)), moved)
    assert there.rest_size == here.rest_size
    assert there.length == layout.size


@pytest.mark.parametrize("structure", [KroneckerHead(), SquareRoot()])
def test_a_head_that_does_not_shard_is_refused(structure):
    head = feature_head(Categorical(3), 4)
    with pytest.raises(ValueError, match="mesh serves Full\\(\\), Shared\\(\\) and DiagonalHead\\(\\)"):
        LastLayerFilter(head, structure, mesh=mesh_of_one("weights"))
    moving = feature_head(Categorical(3), 4, transition=RandomWalk(0.1))
    with pytest.raises(ValueError, match="heads that stand still"):
        LastLayerFilter(moving, Full(), mesh=mesh_of_one("weights"))


def test_a_head_on_a_mesh_of_one_device_says_what_it_says_without():
    batch = {"x": np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32), "y": np.arange(90) % 3}
    found = []
    for mesh in (None, mesh_of_one("weights", "data")):
        engine = LastLayerFilter(feature_head(Categorical(3), 4), Full(), mesh=mesh)
        state, info = engine.update(engine.init(), batch)
        found.append((engine.weights(state), info.log_evidence, engine.predict(state, batch).probabilities))
        if mesh is not None:
            with pytest.raises(ValueError, match="sample_outputs needs the whole covariance on one device"):
                engine.sample_outputs(state, batch, 2)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_moves_weights_between_devices_is_refused():
    permuting = ShardedProgram(
        lambda tasks: program(
            tasks, ssm_nn.ByPath({"layers.0.kernel": Permuted(np.arange(5)[::-1].copy())}, otherwise=RandomWalk(0.1))
        ),
        checked_mesh(mesh_of_one("weights")),
    )
    with pytest.raises(ValueError, match="permutes or turns leaves"):
        extract(permuting, TASK)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Two processes of two devices each, joined by jax.distributed on this machine."""
    in_a_process("two_processes.py", str(tmp_path))
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert first == second
    for name, value in alone.items():
        # eigenvectors in float32 take more of rounding than sums do: 1e-5 is reached just so
        tolerance = 3e-5 if name.startswith("factors") else 1e-5
        np.testing.assert_allclose(first[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
