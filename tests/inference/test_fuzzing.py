"""Random programs on random tasks: beliefs are finite with positive variances, or the Info says that they are not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ssm_nn
from ssm_nn.inference import Dense, Diagonal, FilterWarning, GaussNewton, LaplaceFilter, LowRank
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.models import OrnsteinUhlenbeck, RandomWalk, ShrinkAndPerturb, Static
from ssm_nn.tasks import Task

INPUTS, CLASSES = 3, 3

LIKELIHOODS = {
    "normal": (lambda f: dist.Normal(f[:, 0], 0.5), lambda rng, n: rng.normal(size=n)),
    "bernoulli": (lambda f: dist.Bernoulli(logits=f[:, 0]), lambda rng, n: rng.integers(0, 2, n)),
    "categorical": (lambda f: dist.Categorical(logits=f), lambda rng, n: rng.integers(0, CLASSES, n)),
    "poisson": (lambda f: dist.Poisson(jnp.exp(f[:, 0])), lambda rng, n: rng.poisson(1.0, n)),
}
KERNELS = st.sampled_from(
    [Static(), RandomWalk(0.0), RandomWalk(1e-4), RandomWalk(10.0), OrnsteinUhlenbeck(0.5), ShrinkAndPerturb(0.3, 0.1)]
)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (1, 1, 2)])


def network(shapes):
    """A leaf of any shape is the last layer over its own fixed features."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(INPUTS, int(np.prod(shape, dtype=int)))) for shape in shapes]

    def apply(params, x):
        outputs = jnp.zeros((x.shape[0], CLASSES), x.dtype)
        for i, project in enumerate(maps):
            leaf = jnp.ravel(params[f"leaf{i}"])
            phases = jnp.arange(CLASSES, dtype=x.dtype)[:, None]
            features = jnp.tanh(x @ jnp.asarray(project, x.dtype))
            outputs = outputs + features @ jnp.sin(leaf + phases * leaf).T
        return outputs

    return apply, {f"leaf{i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}


@st.composite
def problems(draw):
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    return {
        "shapes": shapes,
        "kernels": [draw(KERNELS) for _ in shapes],
        "scale": draw(st.sampled_from([1e-2, 1.0, 30.0])),
        "likelihood": draw(st.sampled_from(sorted(LIKELIHOODS))),
        "structure": draw(st.sampled_from([Dense(), Diagonal(), LowRank(0), LowRank(2), LowRank(40)])),
        "sizes": draw(st.lists(st.sampled_from([None, 0, 1, 1, 4]), min_size=1, max_size=3)),
        "size of inputs": draw(st.sampled_from([0.0, 1.0, 1e4])),
        "bits": draw(st.sampled_from([32, 64])),
        "seed": draw(st.integers(0, 99)),
    }


def check(problem):
    with jax.enable_x64(problem["bits"] == 64), warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)  # said once is said; the Info is checked below
        likelihood, values = LIKELIHOODS[problem["likelihood"]]
        dtype = np.dtype(f"float{problem['bits']}")
        kernels = ssm_nn.ByPath({f"leaf{i}": kernel for i, kernel in enumerate(problem["kernels"])})

        def program(tasks):
            net = ssm_nn.weights(
                "net",
                network(problem["shapes"]),
                prior=dist.Normal(0.0, problem["scale"]),
                transition=kernels,
                num_tasks=len(tasks),
            )

            def observe(f, task):
                with numpyro.plate("examples", task["x"].shape[0]):
                    numpyro.sample("y", likelihood(f(task["x"])), obs=task.get("y"))

            net.over(tasks, observe)

        rng = np.random.default_rng(problem["seed"])
        tasks = []
        for size in problem["sizes"]:
            x = (problem["size of inputs"] * rng.normal(size=(size or 0, INPUTS))).astype(dtype)
            tasks.append(None if size is None else Task({"x": x, "y": values(rng, size)}))
        engine = LaplaceFilter(program, problem["structure"], estimator=GaussNewton(max_steps=30))
        filtered = engine.run(0, tasks)
        posterior = engine.smooth(filtered)
        for info in filtered.infos:
            assert info.status == NOT_FINITE or np.isfinite(info.log_evidence), info
        for before, after in zip(filtered.beliefs, posterior.beliefs, strict=True):
            narrow, wide = (np.asarray(belief.precision.variance()) for belief in (after, before))
            assert np.isfinite(before.mean).all()
            assert np.isfinite(after.mean).all()
            assert (narrow > 0).all()
            assert np.isfinite(wide).all()
            assert (narrow <= wide * (1 + 1e-3)).all()
        assert np.isfinite(posterior.sample_path(jax.random.key(0))).all()


few = settings(
    max_examples=2, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@few
@given(problem=problems())
def test_a_random_program_gives_finite_beliefs(problem):
    check(problem)


@pytest.mark.slow
@settings(few, max_examples=200, derandomize=False)
@given(problem=problems())
def test_many_random_programs_give_finite_beliefs(problem):
    check(problem)
