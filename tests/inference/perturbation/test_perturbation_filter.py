"""PerturbationFilter on small tasks: its limits, what it keeps, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from ssm_nn import Task
from ssm_nn.extraction import extract
from ssm_nn.inference import AtMean, FilterWarning, Linearised, Minibatch, predictive
from ssm_nn.inference.checkpoints import CheckpointError
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.inference.perturbation import curvature, fitting, proposal
from ssm_nn.inference.perturbation.allocation import FixedRank, PaperShare, dropped_loss
from ssm_nn.inference.perturbation.blocks import composed
from ssm_nn.inference.perturbation.curvature import drop_quadratic, kernel_statistics
from ssm_nn.inference.perturbation.directions import PlainSVD
from ssm_nn.inference.perturbation.factored import run_perturbed
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.graphs import Chain, InitialStar, UncertainBase
from ssm_nn.inference.perturbation.pruning import AllTasks, Growth, OwnTask
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted

SETTINGS = Minibatch(optax.adam(5e-3), epochs=25, batch_size=64)
NETWORK = mlp((64, 20, 12, 10), "relu")
PROGRAM = multi_head(NETWORK, "layers.2.*", prior_scale=0.5)
STREAM = permuted(load("digits"), 4, train_size=320, test_size=100)
TASKS = [STREAM.train[t] for t in range(4)]


def engine(**changed):
    return PerturbationFilter(PROGRAM, **{"minibatch": SETTINGS, "curvature_examples": 100, **changed})


@pytest.fixture(scope="module")
def learnt():
    """An engine, its states after every task, and its infos."""
    made = engine(growth=Growth(4.0, 4))
    states, infos = [made.init(0, TASKS[0])], []
    for task in TASKS:
        state, info = made.update(states[-1], task)
        states.append(state)
        infos.append(info)
    return made, states, infos


def probabilities(made, state, t):
    return made.predict(state, STREAM.test[t])["y"].probabilities


def test_old_tasks_keep_every_bit_of_their_outputs(learnt):
    made, states, _ = learnt
    for t in range(4):
        then = probabilities(made, states[t + 1], t)
        assert np.array_equal(then, probabilities(made, states[4], t))
        assert (then.argmax(1) == STREAM.test[t]["y"]).mean() > 0.5


def test_the_factored_path_predicts_what_the_materialised_weights_do(learnt):
    made, states, _ = learnt
    record = states[4].records[2]
    x = STREAM.test[2]["x"]
    blocks = made._known().blocks
    factors = {
        b.name: f.padded(b.cap + 3) for b, f in zip(blocks, record.factors, strict=True)
    }  # padding changes nothing
    arrays = {"net": {**states[4].base["net"], **record.own["net"]}}

    def logits(a):
        tree = {"layers": [{k: a["net"][f"layers.{n}.{k}"] for k in ("kernel", "bias")} for n in range(3)]}
        return NETWORK[0](tree, x)

    expected = jax.nn.softmax(run_perturbed(logits, arrays, factors))
    np.testing.assert_allclose(probabilities(made, states[4], 2), expected, atol=2e-6)


def test_all_directions_give_the_free_weights(learnt):
    made, states, _ = learnt
    found = made.propose(states[1], TASKS[1])
    arrays = {"net": {**found.free["net"], **found.reference["net"]}}
    whole = composed(made._known().blocks, arrays, found.factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, found.free)


@pytest.fixture(scope="module")
def quadratic(learnt):
    """Proposal, weights, and the task as the curvature sees it."""
    made, states, _ = learnt
    found = made.propose(states[1], TASKS[1])
    return found, {"net": {**found.free["net"], **found.reference["net"]}}, made._checked(1, TASKS[1])


@pytest.mark.slow
def test_curvature_does_not_depend_on_the_batch_size(learnt, quadratic):
    made, (proposed, arrays, task) = learnt[0], quadratic
    blocks = made._known().blocks
    found = [drop_quadratic(PROGRAM, blocks, {}, arrays, proposed.factors, task, 60, chunk=c) for c in (60, 7)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


def test_the_gram_formula_equals_derivatives_along_the_directions(learnt, quadratic):
    """By forward differentiation of the materialised network, and the softmax Hessian written out."""
    made, (proposed, arrays, task) = learnt[0], quadratic
    blocks, n = made._known().blocks, 40
    x, y = task["x"][:n], np.asarray(task["y"][:n])
    small = Task({"x": x, "y": task["y"][:n]}, mask=jnp.ones(n, bool))
    found = drop_quadratic(PROGRAM, blocks, {}, arrays, proposed.factors, small, n)

    def logits(keep):
        factors, start = [], 0
        for f in proposed.factors:
            factors.append(f._replace(keep=keep[start : start + f.keep.shape[0]]))
            start += f.keep.shape[0]
        leaves = composed(blocks, arrays, factors)["net"]
        tree = {"layers": [{k: leaves[f"layers.{m}.{k}"] for k in ("kernel", "bias")} for m in range(3)]}
        return NETWORK[0](tree, x)

    ones = jnp.ones(sum(b.cap for b in blocks))
    t = np.asarray(jax.jacfwd(logits)(ones), float)  # (n, 10, A)
    p = np.asarray(jax.nn.softmax(logits(ones)), float)
    hessian = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    matrix = np.einsum("nca,ncd,ndb->ab", t, hessian, t) / n
    linear = -np.einsum("nca,nc->a", t, p - np.eye(10)[y]) / n
    np.testing.assert_allclose(found.matrix, matrix, atol=2e-5)
    np.testing.assert_allclose(found.linear, linear, atol=2e-5)
    np.testing.assert_allclose(found.loss, -np.log(p[np.arange(n), y]).mean(), rtol=1e-5)


def test_kronecker_factors_are_sums_over_examples(learnt, quadratic):
    """By the Jacobian in the biases, which is the gradient at a layer's outputs, and the softmax Hessian written out."""
    made, (_, arrays, task) = learnt[0], quadratic
    blocks, n = made._known().blocks, 40
    x, y = task["x"][:n], np.asarray(task["y"][:n])
    small = Task({"x": x, "y": task["y"][:n]}, mask=jnp.ones(n, bool))
    found = kernel_statistics(PROGRAM, blocks, {}, arrays, small, n)
    leaves = arrays["net"]

    def logits(biases, x):
        tree = {"layers": [{"kernel": leaves[f"layers.{m}.kernel"], "bias": biases[m]} for m in range(3)]}
        return NETWORK[0](tree, x[None])[0]

    biases = [leaves[f"layers.{m}.bias"] for m in range(3)]
    jacobians = jax.vmap(jax.jacrev(logits), (None, 0))(biases, x)
    p = np.asarray(jax.nn.softmax(jax.vmap(logits, (None, 0))(biases, x)), float)
    hessian = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    inputs = np.asarray(x, float)
    for m, (side, sensitivity) in enumerate(zip(found.sides, found.sensitivity, strict=True)):
        j = np.asarray(jacobians[m], float)
        np.testing.assert_allclose(side.inputs, inputs.T @ inputs / n, atol=1e-4)
        np.testing.assert_allclose(side.outputs, np.einsum("nca,ncd,ndb->ab", j, hessian, j) / n, atol=1e-4)
        slopes = np.einsum("nc,nco->no", p - np.eye(10)[y], j)
        squares = np.sum((inputs**2).sum(1) * (slopes**2).sum(1))
        size = np.size(leaves[f"layers.{m}.kernel"])
        np.testing.assert_allclose(sensitivity, squares / (n * size), rtol=1e-3)
        inputs = np.maximum(inputs @ np.asarray(leaves[f"layers.{m}.kernel"]) + np.asarray(biases[m]), 0)


@pytest.mark.slow
def test_the_score_ranks_single_drops_as_the_loss_does(learnt, quadratic):
    made, (proposed, arrays, task) = learnt[0], quadratic
    blocks = made._known().blocks
    found = drop_quadratic(PROGRAM, blocks, {}, arrays, proposed.factors, task, 320)
    scores = proposed.scores._replace(linear=np.asarray(found.linear), matrix=np.asarray(found.matrix))
    size = len(scores.layer)
    space = extract(PROGRAM, task, {})

    @jax.jit
    def loss(keep):
        leaves = composed(blocks, arrays, made_factors(keep))
        return -space.log_likelihood_at(leaves, task) / 320

    def made_factors(keep):
        return [f._replace(keep=k) for f, k in zip(proposed.factors, jnp.split(keep, [blocks[0].cap]), strict=True)]

    whole = loss(jnp.ones(size))
    true = [float(loss(jnp.ones(size).at[a].set(0.0)) - whole) for a in range(size)]
    predicted = [dropped_loss(scores, np.arange(size) != a) for a in range(size)]
    assert spearmanr(true, predicted).statistic > 0.99


def test_the_choice_is_the_candidate_with_the_least_loss_on_examples_that_the_quadratic_has_not_seen(learnt):
    _, states, _ = learnt
    made = engine(growth=Growth(1.0, 4))
    made.init(0, TASKS[0])
    found = made.propose(states[1], TASKS[1])
    candidates = made.allocation.candidates(found.scores, found.budget)
    assert len(candidates) > 3
    seen = np.linspace(0, 319, 100).round().astype(int)
    others = np.setdiff1d(np.arange(320), seen)
    judged = others[np.linspace(0, len(others) - 1, 100).round().astype(int)]
    examples = Task({name: np.asarray(TASKS[1][name])[judged] for name in ("x", "y")}, TASKS[1].context)
    losses = []
    for gains in candidates:
        state = made.truncated_state(states[1], TASKS[1], found, gains)
        losses.append(-made.predict(state, examples)["y"].log_density.mean())
    assert np.array_equal(made.choose(states[1], TASKS[1], found), candidates[int(np.argmin(losses))])
    assert max(losses) > min(losses) + 1e-3


def test_one_compiled_program_serves_all_ranks_and_tasks(learnt):
    first, states, _ = learnt
    first.predict(states[3], STREAM.test[2])  # compiled here, whichever tests this process has run before
    compiled = fitting._epoch, proposal._decomposed, predictive._outputs, curvature._statistics
    before = [function._cache_size() for function in compiled]
    for rank in (1, 7):
        made = engine(allocation=FixedRank(rank))
        made.init(0, TASKS[0])
        state, info = made.update(states[2], TASKS[2])
        made.predict(state, STREAM.test[2])
        assert set(info.ranks.values()) == {rank}
    assert [function._cache_size() for function in compiled] == before
    assert before[0] >= 2  # the first task's epoch, and that of all others


def test_growth_keeps_to_its_budget_and_counts_everything(learnt):
    _, states, infos = learnt
    record = states[4].records[3]
    numbers = sum(a.size for a in record.own["net"].values())
    for f in record.factors:
        numbers += f.inputs.size + f.outputs.size + f.left.size + f.right.size
    assert infos[-1].storage.by_task[-1] == numbers
    assert infos[-1].storage.base == 64 * 20 + 20 + 20 * 12 + 12 + 12 * 10 + 10
    tight = engine(growth=Growth(1.0, 4))
    _, tight_infos = tight.run(0, TASKS)
    for t, info in enumerate(tight_infos):
        assert info.storage.growth <= 1.0 * t / 3 + 1e-9
    assert tight_infos[-1].storage.growth > 0.9


def test_a_budget_below_rank_zero_says_what_the_minimum_is():
    made = engine(growth=Growth(0.2, 4))
    with pytest.raises(ValueError, match="the minimum is") as error:
        made.update(made.init(0, TASKS[0]), TASKS[0])
    least = float(str(error.value).rsplit(" ", 1)[1])
    rank_zero = 84 + 32 + 32 + 130  # scales of two kernels, biases, head
    assert least == pytest.approx(3 * rank_zero / 1682, abs=1e-4)
    enough = engine(growth=Growth(least, 4))
    state, _ = enough.update(enough.init(0, TASKS[0]), TASKS[0])
    _, info = enough.update(state, TASKS[1])
    assert set(info.ranks.values()) == {0}


@pytest.mark.slow
def test_pruning_of_the_own_task_leaves_the_others_alone_and_the_papers_does_not():
    budget = Growth(1.2, 4)
    own = engine(allocation=PaperShare(0.95), directions=PlainSVD(), growth=budget, pruning=OwnTask())
    _, infos = own.run(0, TASKS[:3])
    assert infos[-1].pruned > 0
    assert infos[-1].storage.growth <= 1.2 * 2 / 3
    everyone = engine(allocation=PaperShare(0.95), directions=PlainSVD(), growth=Growth(0.8), pruning=AllTasks())
    begun, _ = everyone.run(0, TASKS[:2])
    after, info = everyone.update(begun, TASKS[2])
    assert info.pruned > 0
    assert info.storage.growth <= 0.8
    assert not np.array_equal(begun.records[1].factors[0].left, after.records[1].factors[0].left)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, learnt):
    made, states, _ = learnt
    made.run(0, TASKS[:2], tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("task-*.npz")}
    state, infos = engine(growth=Growth(4.0, 4)).run(0, TASKS, tmp_path)
    assert [info.identity for info in infos] == [2, 3]
    for one, two in zip(jax.tree.leaves(state.records), jax.tree.leaves(states[4].records), strict=True):
        assert np.array_equal(one, two)
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())
    _, infos = engine(growth=Growth(4.0, 4)).run(0, TASKS, tmp_path)
    assert not infos
    with pytest.raises(ValueError, match="task 0 has the identity 0; here it has 1"):
        engine(growth=Growth(4.0, 4)).run(0, TASKS[1:], tmp_path)
    (damaged,) = tmp_path.glob("task-0002*.npz")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        engine(growth=Growth(4.0, 4)).run(0, TASKS, tmp_path)


@pytest.mark.slow
def test_a_chain_starts_from_the_task_before_it(learnt):
    made = engine(graph=Chain(), allocation=FixedRank(2))
    state, _ = made.run(0, TASKS[:3])
    blocks = made._known().blocks
    own = state.records
    kernels = state.base
    for record in own[1:]:
        kernels = composed(blocks, kernels, record.factors)
    weights = made.weights(state, 2)
    for block in blocks:
        np.testing.assert_allclose(weights["net"][block.name[1]], kernels["net"][block.name[1]], rtol=1e-5, atol=1e-6)
    earlier = state._replace(records=own[:2])
    assert np.array_equal(probabilities(made, earlier, 1), probabilities(made, state, 1))


def test_around_the_networks_own_kernels_a_task_does_not_depend_on_the_first():
    made = engine(graph=InitialStar(), allocation=FixedRank(2))
    states = [made.run(0, [first, TASKS[1]])[0] for first in (TASKS[0], TASKS[2])]
    for one, two in zip(*(jax.tree.leaves(made.weights(state, 1)) for state in states), strict=True):
        assert np.array_equal(one, two)
    reading = made._known()
    own = reading.shared(reading.initial)
    for state, first in zip(states, (0, 2), strict=True):
        learnt = made.weights(state, 1)
        composed_ = composed(reading.blocks, own, state.records[1].factors)
        for block in reading.blocks:
            assert np.array_equal(made.weights(state, first)["net"][block.name[1]], state.base["net"][block.name[1]])
            np.testing.assert_allclose(learnt["net"][block.name[1]], composed_["net"][block.name[1]], atol=1e-6)
    assert np.array_equal(made.posterior(states[0], TASKS[0]).mean, reading.layout.packed(made.weights(states[0], 0)))


def test_around_the_networks_own_kernels_no_order_changes_a_later_task():
    made = engine(graph=InitialStar(), allocation=FixedRank(2))
    one, _ = made.run(0, TASKS[:3])
    two, _ = made.run(0, [TASKS[0], TASKS[2], TASKS[1]])
    for t in range(3):
        assert np.array_equal(probabilities(made, one, t), probabilities(made, two, t))


@pytest.mark.slow
def test_an_uncertain_base_is_refined_by_later_tasks(learnt):
    made = engine(graph=UncertainBase(), allocation=FixedRank(2))
    state, _ = made.update(made.init(0, TASKS[0]), TASKS[0])
    after, _ = made.update(state, TASKS[1])
    for path, leaf in state.precision["net"].items():
        assert np.all(after.precision["net"][path] >= leaf)
        moved = np.abs(np.asarray(after.base["net"][path] - state.base["net"][path]))
        assert moved.max() > 0
    assert made.storage(after).base == 1682 + 64 * 20 + 20 * 12


@pytest.mark.slow
def test_laplace_over_the_own_parameters_gives_predictions_between_sure_and_unsure(learnt):
    made, states, _ = learnt
    belief = made.posterior(states[4], TASKS[2])
    assert np.array_equal(belief.mean, made._known().layout.packed(made.weights(states[4], 2)))
    sure = made.predict(states[4], STREAM.test[2])["y"]
    drawn = made.predict(states[4], STREAM.test[2], belief=belief, method=Linearised(20))["y"]
    assert np.all(drawn.epistemic >= 0)
    assert drawn.epistemic.mean() > 0.01
    assert drawn.probabilities.max(1).mean() < sure.probabilities.max(1).mean()
    same = made.predict(states[4], STREAM.test[2], belief=belief, method=AtMean())["y"]
    assert np.array_equal(same.probabilities, sure.probabilities)


def test_bad_input_is_named(learnt):
    made, states, _ = learnt
    for call, words in [
        (lambda: made.predict(states[4], STREAM.test[0], identity=9), "task identity 9 was never seen"),
        (lambda: made.predict(states[4], {"x": TASKS[0]["x"]}), "identity is None"),
        (lambda: made.update(states[4], TASKS[1]), "task identity 1 was learnt before"),
        (lambda: made.update(None, TASKS[1]), "state is None; what init"),
        (lambda: made.predict((), STREAM.test[0], identity=1), r"state is \(\); what init"),
        (lambda: made.update(states[4], None), "no data"),
        (lambda: made.update(states[4], Task({"x": TASKS[0]["x"], "y": TASKS[0]["y"] + 3}, {"task": 7})), "support"),
        (lambda: made.update(states[4], Task({"x": TASKS[0]["x"] * np.nan, "y": TASKS[0]["y"]})), "not finite"),
        (lambda: made.predict(states[4], STREAM.test[0], method=Linearised(3)), "give the belief"),
        (lambda: engine(cap=0), "cap is 0"),
        (
            lambda: made.update(states[4], Task({"x": TASKS[0]["x"][:, :60], "y": TASKS[0]["y"]}, {"task": 7})),
            r"'x' \(N, 60\)",
        ),
        (lambda: made.predict(states[4], {"x": TASKS[0]["x"][:, :60]}, 1), r"'x' \(N, 60\).*first had 'x' \(N, 64\)"),
        (lambda: made.update(states[4], Task({"x": TASKS[0]["x"], "y": TASKS[0]["y"] / 2}, {"task": 7})), "integer"),
        (lambda: made.update(states[4], Task({"x": TASKS[0]["x"].astype(str)}, {"task": 7})), "arrays of numbers"),
        (lambda: made.update(states[4], Task({"z": TASKS[0]["x"]}, {"task": 7})), "has no 'x'"),
        (lambda: made.update(states[4], Task(TASKS[0].data, {"task": 1.5})), "'task' is .*1.5.*whole number"),
        (lambda: made.predict(states[4], STREAM.test[0], "1"), "identity is '1'"),
        (lambda: engine(allocation="paper"), "allocation is 'paper'; accepted are PaperShare"),
        (lambda: engine(allocation=PaperShare), "allocation is <class"),
        (lambda: engine(growth=0.6), "growth is 0.6; a Growth"),
        (lambda: OwnTask(2.0, refit=3), "refit is 3"),
        (lambda: engine().init("a", TASKS[0]), "key is 'a'"),
        (lambda: engine(pruning=OwnTask()), "without growth"),
        (lambda: Growth(0.0), "limit is 0"),
        (lambda: Growth("0.6"), "limit is '0.6'"),
        (lambda: fitting.SitePrior(l1="1"), "l1 is '1'"),
        (lambda: Growth(1.0, 1), "num_tasks is 1"),
        (lambda: fitting.SitePrior(scales=0.0), "scales is 0"),
        (lambda: fitting.SitePrior(l1=-1.0), "l1 is -1"),
        (lambda: engine().run(0, []), "tasks is empty"),
        (lambda: engine().run(0, None), "tasks is of type NoneType"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_head_of_another_size_is_refused():
    programs = [multi_head(mlp((64, 20, classes), "relu"), "layers.1.*") for classes in (5, 10)]

    def of_two_sizes(tasks):
        programs[tasks["y"].shape[1] > 200](tasks)

    made = PerturbationFilter(of_two_sizes, minibatch=SETTINGS)
    state = made.init(0, TASKS[0])
    small = {name: TASKS[0][name][:64] for name in ("x", "y")}
    with pytest.raises(ValueError, match="a head keeps its size"):
        made.update(state, Task(small | {"y": small["y"] % 5}, {"task": 1}))

    def made_inside(tasks):
        multi_head(mlp((64, 20, 5 + 5 * (tasks["y"].shape[1] > 200)), "relu"), "layers.1.*")(tasks)

    made = PerturbationFilter(made_inside, minibatch=SETTINGS)
    with pytest.raises(ValueError, match="A head keeps its size"):
        made.update(made.init(0, TASKS[0]), TASKS[0])


def test_training_that_diverges_is_reported():
    made, huge = engine(), Task({"x": TASKS[0]["x"] * 1e30, "y": TASKS[0]["y"]}, TASKS[0].context)
    with pytest.warns(FilterWarning, match="task 0: training is not finite"):
        state, info = made.update(made.init(0, TASKS[0]), huge)
    assert info.status == NOT_FINITE
    assert np.array_equal(made.weights(state, 0)["net"]["layers.0.kernel"], NETWORK[1]["layers"][0]["kernel"])
