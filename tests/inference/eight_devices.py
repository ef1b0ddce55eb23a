"""Run by test_sharding.py in a process of its own: the same computations on one device and on a mesh of eight.

Writes numbers to the npz file of the first argument: for each part named by the others ``one/<part>/<name>`` and
``mesh/<part>/<name>``, and ``collectives/<piece>``, the largest result of a collective in a compiled piece of the filter.
"""

import os
import re
import sys
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.sharding import NamedSharding, PartitionSpec

import ssm_nn
from ssm_nn.extraction import describe
from ssm_nn.inference import Diagonal, GaussNewton, Kronecker, LaplaceFilter, LowRank, Minibatch
from ssm_nn.inference.batches import as_arrays, with_mask
from ssm_nn.inference.last_layer import Categorical, DiagonalHead, Full, Gaussian, LastLayerFilter, Shared, feature_head
from ssm_nn.inference.last_layer.split_conditioning import condition_in_parts
from ssm_nn.inference.map_problem import MapProblem
from ssm_nn.inference.mean_field import Batches, MeanFieldFilter, Window
from ssm_nn.inference.perturbation import FixedRank, PerturbationFilter
from ssm_nn.inference.sharding import checked_mesh, on_mesh
from ssm_nn.models import RandomWalk
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.moments import Moments
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, compress
from ssm_nn.tasks import as_task

P, R, K = 64, 5, 3
COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
MESH = jax.make_mesh((4, 2), ("weights", "data"))


def read_outs(precision, message, moments, wide, x, key):
    """Everything that a low-rank precision offers, by name."""
    cut = compress(wide, precision.diagonal, R)
    white = precision.whitening()
    predicted = precision.predict(moments)
    before = precision.message_before(message, moments)
    return {
        "matvec": precision.matvec(x),
        "solve": precision.solve(wide),
        "logdet": precision.logdet(),
        "variance": precision.variance(),
        "quadratic": precision.quadratic_form()(x),
        "sample": precision.sample(key),
        "whitened": jnp.sum(jnp.square(white.whiten(x))),
        "coloured": white.colour(white.whiten(x)),
        "predict": predicted.matvec(x),
        "gain": precision.smoother_gain(moments, x),
        "conditional": precision.sample_conditional(moments, key),
        "density": precision.conditional_log_density(moments, x),
        "message": before.matvec(x),
        "compress": cut.factor @ (cut.factor.T @ x) + cut.dropped_diagonal * x,
        "share": cut.dropped_share,
    }


def algebra(dtype):
    rng = np.random.default_rng(0)

    def array(*shape, low=-1.0, high=1.0):
        return jnp.asarray(rng.uniform(low, high, shape), dtype)

    precision = DiagonalPlusLowRank(array(P, low=0.5, high=2), array(P, R))
    message = DiagonalPlusLowRank(array(P, low=0, high=1), array(P, R))
    moments = Moments(array(P), array(P), array(P, low=0, high=0.3))
    arguments = (precision, message, moments, jnp.concatenate([precision.factor, array(P, K)], axis=1), array(P))
    compiled = jax.jit(read_outs)
    one = compiled(*arguments, jax.random.key(1))
    mesh = checked_mesh(MESH)
    with on_mesh(mesh):
        split = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("weights")))
        many = compiled(*split, jax.random.key(1))
    return one, many


def program_of(widths, likelihood):
    def program(tasks):
        net = ssm_nn.weights(
            "net", mlp(widths), prior=dist.Normal(0.0, 0.7), transition=RandomWalk(0.2), num_tasks=len(tasks)
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", likelihood(f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

    return program


def gaussian(outputs):
    # a noise for each output: with equal ones singular values come in threes, and a rank that parts them is ambiguous
    return dist.Normal(outputs, jnp.array([0.3, 0.4, 0.6], outputs.dtype)).to_event(1)


def classes(outputs):
    return dist.Categorical(logits=outputs)


def tasks_of(dtype, inputs, outputs, number, size=12):
    rng = np.random.default_rng(1)
    made = []
    for _ in range(number):
        y = rng.normal(size=(size, outputs)).astype(dtype) if dtype is not None else rng.integers(0, outputs, size)
        made.append({"x": rng.normal(size=(size, inputs)).astype(dtype or float), "y": y})
    return made


def filtered_and_smoothed(program, structure, tasks, mesh, estimator=None):
    estimator = GaussNewton(tolerance=1e-13) if estimator is None else estimator
    engine = LaplaceFilter(program, structure, estimator=estimator, mesh=mesh)
    filtered = engine.run(0, tasks)
    posterior = engine.smooth(filtered)
    found = {"evidence": np.asarray(filtered.log_evidence)}
    for t, belief in enumerate(posterior.beliefs):
        leaves = filtered.layout.leaves
        named = {"mean": leaves(belief.mean), "variance": leaves(belief.precision.variance())}
        found |= {f"{kind} {t} {name}": leaf for kind, of_kind in named.items() for name, leaf in of_kind.items()}
    if mesh is not None:
        spread = [belief.mean.sharding.spec for belief in (*filtered.beliefs, *posterior.beliefs)]
        assert all(spec == PartitionSpec("weights") for spec in spread), spread
        if isinstance(structure, Kronecker):
            for belief in (filtered.beliefs[-1], posterior.beliefs[0]):
                check_rows(belief.precision)
        path = posterior.sample_path(jax.random.key(0))
        assert np.isfinite(path).all()
        assert np.isfinite(posterior.log_density(path))
    return found


def check_rows(precision):
    """A quarter of each layer's bases of inputs, and of its eigenvalues, on each of four."""
    for block in precision.blocks:
        for leaf in (block.inputs, block.values):
            assert leaf.sharding.spec == PartitionSpec("weights"), leaf.sharding
            assert leaf.addressable_shards[0].data.size == leaf.size // 4


def mean_field(mesh):
    """Two blocks of batches on a network of 83 weights."""
    program = program_of((8, 6, 3), classes)
    engine = MeanFieldFilter(program, Window(50), mesh=mesh)
    state, info = engine.run(0, Batches(tasks_of(None, 8, 3, 1, 24)[0], 6))
    assert mesh is None or state.mean.sharding.spec == PartitionSpec("weights")
    layout = describe(engine.program, as_task(tasks_of(None, 8, 3, 1)[0]))
    named = {"mean": layout.leaves(state.mean), "sigma": layout.leaves(state.sigma)}
    found = {f"{kind} {name}": leaf for kind, leaves in named.items() for name, leaf in leaves.items()}
    said = ("free_energy", "divergence", "clipped_share", "sigma_quantiles")
    return found | {name: np.asarray(getattr(info, name)) for name in said}


def perturbation(mesh):
    """Three tasks of three classes; layers of 8 and 12 inputs, which four devices divide, and of 6, which they do not."""
    made, rng = multi_head(mlp((8, 12, 6, 3), "tanh"), "layers.2.*"), np.random.default_rng(0)
    # a fixed rank: chosen steps may be so long that training multiplies rounding
    search = Minibatch(optax.sgd(0.05), epochs=5, batch_size=8)
    engine = PerturbationFilter(made, minibatch=search, allocation=FixedRank(3), mesh=mesh)
    tasks = []
    for _ in range(3):
        x = rng.normal(size=(48, 8))
        tasks.append({"x": x, "y": np.argmax(x @ rng.normal(size=(8, 3)), axis=1)})
    state, infos = engine.run(0, tasks)
    found = {"growth": np.asarray(engine.storage(state).growth)}
    for t, task in enumerate(tasks):
        found |= {f"{t} {path}": np.asarray(leaf) for path, leaf in engine.weights(state, t)["net"].items()}
        found[f"{t} prediction"] = engine.predict(state, task, t)["y"].log_density
    if mesh is not None:
        kernel = state.base["net"]["layers.0.kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4, kernel.sharding
    assert all(sum(info.ranks.values()) for info in infos[1:]), infos
    return found


def last_layer(mesh):
    """All that a head does on a mesh, in each structure: D = 7, which four devices do not divide; batches of several parts."""
    found = {}
    for structure, likelihood in (
        (Full(), Categorical(3)),
        (Full(), Gaussian(0.3, 3)),
        (Shared(), Categorical(3)),
        (DiagonalHead(), Categorical(3)),
    ):
        name = f"{type(structure).__name__} {type(likelihood).__name__}"
        classify = isinstance(likelihood, Categorical)
        engine = LastLayerFilter(feature_head(likelihood, 6), structure, mesh=mesh)
        rng, state = np.random.default_rng(1), engine.init()
        for size in (30, 5, 150):
            y = rng.integers(0, 3, size) if classify else rng.normal(size=(size, 3))
            batch = {"x": rng.normal(size=(size, 6)), "y": y}
            state, info = engine.update(state, batch)
            found[f"{name} evidence {size}"] = np.asarray(info.log_evidence)
        found[f"{name} mean"] = engine.weights(state)
        found[f"{name} variance"] = np.asarray(state.belief.variance())[:, :7]
        found[f"{name} prediction"] = engine.predict(state, batch).log_density
        state, _ = engine.remove(state, np.arange(10, 60))
        found[f"{name} removed"] = engine.weights(state)
        state, info = engine.sweep(state)
        found |= {f"{name} swept": engine.weights(state), f"{name} all evidence": np.asarray(info.log_evidence)}
        if classify:
            engine, state = engine.grow(state, 1)
            state, _ = engine.update(state, {"x": batch["x"][:4], "y": [3, 3, 0, 1]})
            found[f"{name} grown"] = engine.weights(state)
        if mesh is not None:
            assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.belief))
            assert all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in jax.tree.leaves(state.belief))
    return found


def largest_in_a_head():
    """K = 3 classes on D = 256 features: S has 768^2 numbers, an update of two parts of 64 points 192 columns."""
    engine = LastLayerFilter(feature_head(Categorical(3), 255), Full(), mesh=MESH)
    state, points = engine.init(), np.zeros((128, 256), np.float32)
    with on_mesh(engine.mesh):
        inputs = engine._everywhere((points, np.zeros(128, np.int32), np.ones(128, np.float32)))
        phi, y, weight = inputs
        lowered = condition_in_parts.lower(state.belief, state.mean, phi, Categorical(3), y, weight, None, 64)
        return largest(lowered)


def largest(lowered):
    """Numbers in the largest result of a collective."""
    shapes = [
        s for found in COLLECTIVE.findall(lowered.compile().as_text()) for s in re.findall(r"\[([\d,]*)\]", found)
    ]
    return max(int(np.prod([int(n) for n in shape.split(",") if n], dtype=int)) for shape in shapes)


def largest_collectives():
    """By compiled piece; classes on (512, 32, 4) weights, 16 examples: R = 8, K = 64."""
    program = program_of((512, 32, 4), classes)
    engine = LaplaceFilter(program, LowRank(8), estimator=GaussNewton(), mesh=MESH)
    task = as_task({k: np.float32(v) if k == "x" else v for k, v in tasks_of(None, 512, 4, 1, 16)[0].items()})
    state = engine.init(0, task)
    sizes = {}
    with on_mesh(engine.mesh):
        placed = engine.program.everywhere(with_mask(as_arrays(task)))
        problem = MapProblem(state.mean, state.precision, placed, engine.hypers, jnp.float32(1))
        lowered = {
            "predict": engine._advance.lower(engine.hypers, state, placed, state.key),
            "laplace": engine._condition.lower(problem, state.mean, state.key),
        }
        for name, piece in lowered.items():
            sizes[name] = largest(piece)
    return sizes | {"head": largest_in_a_head()}


def pair(program, structure, tasks, estimator=None):
    return [filtered_and_smoothed(program, structure, tasks, mesh, estimator) for mesh in (None, MESH)]


def kronecker(dtype):
    """Two layers of 9 and 7 rows, which four devices do not divide, searched in batches.

    By plain steps: Adam makes steps of rounding along what softmax does not see.
    """
    tasks = [task | {"x": task["x"].astype(dtype)} for task in tasks_of(None, 8, 3, 3, 24)]
    search = Minibatch(optax.sgd(0.1), epochs=5, batch_size=6)
    return pair(program_of((8, 6, 3), classes), Kronecker(), tasks, search)


def linear(dtype, structure, number=2):
    """33 weights, which four devices do not divide."""
    return pair(program_of((10, 3), gaussian), structure, tasks_of(dtype, 10, 3, number))


def main():
    written, parts = {}, sys.argv[2:]
    for part in parts:
        print(part, round(time.perf_counter()), flush=True)
        with jax.enable_x64(not part.endswith("32")):
            if part.startswith("algebra"):
                one, many = algebra(np.dtype(part.replace("algebra", "float")))
            elif part.startswith("low-rank"):
                one, many = linear(np.dtype(part.replace("low-rank", "float")), LowRank(7))
            elif part == "diagonal64":
                one, many = linear(np.dtype("float64"), Diagonal())
            elif part.startswith("mean-field"):
                one, many = mean_field(None), mean_field(MESH)
            elif part == "perturbation64":
                one, many = perturbation(None), perturbation(MESH)
            elif part.startswith("last-layer"):
                one, many = last_layer(None), last_layer(MESH)
            elif part.startswith("kronecker"):
                one, many = kronecker(np.dtype(part.replace("kronecker", "float")))
            elif part == "network64":
                one, many = pair(program_of((8, 6, 3), classes), LowRank(7), tasks_of(None, 8, 3, 2))
            else:
                with jax.enable_x64(False):
                    written |= {f"collectives/{name}": np.array(size) for name, size in largest_collectives().items()}
                continue
        for name in one:
            written[f"one/{part}/{name}"] = np.asarray(one[name])
            written[f"mesh/{part}/{name}"] = np.asarray(many[name])
    np.savez(sys.argv[1], **written)


if __name__ == "__main__":
    main()
