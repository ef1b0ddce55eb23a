"""One call: a good engine has no red light, and each way to fail lights its own."""

import io
import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from judged_tasks import SCALE, SD, D, T, labelled, logistic, regression, tasks_of
from rich.console import Console

import ssm_nn
from ssm_nn.inference import Dense, Diagonal, FilterWarning, GaussNewton, LaplaceFilter, LowRank, Minibatch
from ssm_nn.inference.diagnosis import Colour, diagnose
from ssm_nn.inference.diagnosis.lights import precision_light
from ssm_nn.inference.diagnosis.rounding import rounding
from ssm_nn.inference.mean_field import AtPrior, MeanFieldFilter, WeightSampling, filter_path, smooth_path
from ssm_nn.models import RandomWalk
from ssm_nn.precision_dense import DensePrecision

TASKS = tasks_of(0)


def diagnosis(structure=None, *, scale=SCALE, tasks=TASKS, program=regression, **settings):
    engine = LaplaceFilter(
        program, structure or Dense(), hypers={"scale": scale} if program is regression else {}, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        posterior = engine.smooth(engine.run(0, tasks))
    return diagnose(posterior, tasks, num_samples=200)


@pytest.fixture(scope="module")
def good():
    return diagnosis()


def test_a_good_engine_lights_nothing_red(good):
    assert [light.name for light in good.lights if light.colour == Colour.RED] == []
    names = {light.name for light in good.lights}
    expected = {"MAP search", "Structure", "Kernel", "Rounding", "Importance weights", "Innovations", "Coverage"}
    assert names == expected | {"Leave-one-out"}
    for name in expected:
        assert good.light(name).colour == Colour.GREEN, good.light(name)


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        ({"scale": SCALE / 30}, "Kernel", "q is too small: the weights net.weight move further"),
        ({"scale": SCALE / 30}, "Innovations", "times as much as the filter expects"),
        ({"tasks": tasks_of(0, noise=10 * SD)}, "Coverage", "too narrow"),
    ],
)
def test_what_is_wrong_lights_its_own_light_in_words(settings, name, words):
    light = diagnosis(**settings).light(name)
    assert light.colour == Colour.RED, light
    assert words in light.finding
    assert light.advice


def wide(tasks):
    """Thirty weights that a task's twenty examples see through a few directions; the noise is small."""
    net = ssm_nn.weights(
        "net",
        (lambda params, x: x @ params, jnp.zeros(30)),
        prior=dist.Normal(0.0, 1.0),
        transition=RandomWalk(0.1),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), SD), obs=task["y"])

    net.over(tasks, observe)


def wide_tasks():
    rng = np.random.default_rng(0)
    theta, tasks = rng.normal(size=30), []
    for _ in range(3):
        x = rng.normal(size=(20, 30))
        tasks.append({"x": x.astype("float32"), "y": (x @ theta + SD * rng.normal(size=20)).astype("float32")})
        theta = theta + 0.1 * rng.normal(size=30)
    return tasks


@pytest.mark.slow
def test_a_rank_too_low_is_red_and_a_full_one_is_not():
    tasks = wide_tasks()
    low = diagnosis(LowRank(2), program=wide, tasks=tasks)
    assert low.light("Structure").colour == Colour.RED
    assert "the rank is too low" in low.light("Structure").finding
    assert low.light("Importance weights").colour == Colour.RED
    assert "no reweighting mends it" in low.light("Importance weights").finding
    full = diagnosis(LowRank(60), program=wide, tasks=tasks)
    assert full.light("Structure").colour == Colour.GREEN
    assert full.structure.lost.max() < 0.05


@pytest.mark.slow
def test_a_map_search_that_stops_short_is_red():
    light = diagnosis(program=logistic, tasks=labelled(0), estimator=GaussNewton(max_steps=1)).light("MAP search")
    assert light.colour == Colour.RED
    assert "did not converge for task" in light.finding


@pytest.mark.slow
def test_a_mean_field_path_is_judged_like_a_filter():
    """One update a task is far from the posterior, and the search judged nothing."""
    engine = MeanFieldFilter(regression, estimator=WeightSampling(), start=AtPrior(), hypers={"scale": SCALE})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        found = diagnose(smooth_path(filter_path(engine, 0, TASKS)), TASKS, num_samples=200)
    assert found.light("MAP search").colour == Colour.AMBER
    assert found.light("Importance weights").colour == Colour.RED
    assert found.light("Rounding").colour == Colour.GREEN


@pytest.mark.slow
def test_a_fixed_budget_is_amber():
    found = diagnosis(program=logistic, tasks=labelled(0), estimator=Minibatch(epochs=30))
    assert found.light("MAP search").colour == Colour.AMBER
    assert found.light("Structure").colour == Colour.GREY


def test_rounding_is_red_in_float32_and_green_in_float64():
    """Two directions known fifty million times as precisely as the third: float32 has seven digits."""
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE})
    posterior = engine.smooth(engine.run(0, TASKS))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    stiff = DensePrecision(jnp.asarray((basis * [5e7, 5e7, 1.0]) @ basis.T, jnp.float32))
    beliefs = (*posterior.filtered.beliefs[:-1], posterior.filtered.beliefs[-1]._replace(precision=stiff))
    made = replace(posterior, filtered=replace(posterior.filtered, beliefs=beliefs))
    light = diagnose(made, TASKS, num_samples=100).light("Rounding")
    assert light.colour == Colour.RED, light
    assert "float32 changes variances of task 4" in light.finding
    with jax.enable_x64(True):
        double = [{name: value.astype("float64") for name, value in task.items()} for task in TASKS]
        light = precision_light(rounding(engine.smooth(engine.run(0, double))))
        assert light.finding == "computed in float64"


def test_one_task_leaves_kernel_and_coverage_unjudged():
    found = diagnosis(tasks=TASKS[:1])
    for name in ("Kernel", "Innovations", "Coverage"):
        assert found.light(name).colour == Colour.GREY
    assert found.worst != Colour.RED


def test_a_tempered_likelihood_is_named():
    light = diagnosis(power=2.0).light("Likelihood")
    assert light.colour == Colour.AMBER
    assert "counted the likelihood 2 times" in light.finding


@pytest.mark.slow
def test_a_diagonal_is_told_what_it_loses():
    found = diagnosis(Diagonal())
    assert found.structure.lost.sum() > 0.5
    assert found.light("Structure").colour in (Colour.AMBER, Colour.RED)


def test_the_page_is_self_contained_and_escaped(good, tmp_path):
    page = replace(good, title="<script>alert(1)</script> & more").html
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert not re.search(r'(src|href)="?http', page)
    for light in good.lights:
        assert light.name in page
    written = good.write_html(tmp_path / "diagnosis.html")
    assert written.read_text(encoding="utf-8").count("<tr>") == T + 1


def test_table_and_tree_hold_the_same_findings(good, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(good)
    text = console.export_text()
    assert all(light.name in text for light in good.lights)
    tree = good.to_datatree()
    assert tree["diagnosis"]["khat"].dims == ("task",)
    assert tree["diagnosis"].sizes["task"] == T
    assert set(tree["lights"]["colour"].values) <= {"green", "amber", "red", "grey"}
    tree.to_netcdf(tmp_path / "diagnosis.nc")
    with xarray.open_datatree(tmp_path / "diagnosis.nc") as again:
        xarray.testing.assert_allclose(again["diagnosis"].to_dataset(), tree["diagnosis"].to_dataset())


def test_bad_input_is_refused():
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE})
    posterior = engine.smooth(engine.run(0, TASKS))
    with pytest.raises(ValueError, match="the site 'y' inside the task body is not observed"):
        diagnose(posterior, [{"x": task["x"]} for task in TASKS])
    with pytest.raises(ValueError, match="num_samples is 20: too few draws"):
        diagnose(posterior, TASKS, num_samples=20)
    with pytest.raises(ValueError, match="tasks are not those the posterior was made from"):
        diagnose(posterior, tasks_of(9))
    with pytest.raises(ValueError, match="tasks do not fit the posterior's program"):
        diagnose(posterior, [{"z": task["x"]} for task in TASKS])
    with pytest.raises(ValueError, match="posterior is Filtered"):
        diagnose(posterior.filtered, TASKS)
