"""One scenario at one seed: its tasks, its network as a program, and the engines of every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from continual_scenarios import (
    KNOWN_PERMUTATION,
    KNOWN_ROTATION,
    STATIC_WORLD,
    TASK_CLASSES,
    Scenario,
    validation_data,
)
from continual_settings import BATCH_SIZE, CURVATURE_EXAMPLES, LEARNING_RATES, Budget, minibatch

import ssm_nn
from ssm_nn import ByPath, PerTask, Task
from ssm_nn.extraction import describe
from ssm_nn.inference import (
    Diagonal,
    Kronecker,
    KroneckerCurvature,
    LaplaceFilter,
    Lbfgs,
    LowRank,
    Minibatch,
    SketchedCurvature,
)
from ssm_nn.inference.beliefs import Belief
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.networks import cnn, mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import TaskStream
from ssm_nn.models.transitions import Permuted, Rotated, Static
from ssm_nn.networks import as_network

Array = Any
NEVER = -1e9  # logit of a class that the task has not: finite, so that nothing is nan


class Shape(NamedTuple):
    """A network: shape of its inputs, widths of hidden layers (None: convolutions), classes, seed of the first weights."""

    inputs: tuple[int, ...]
    hidden: tuple[int, ...] | None
    num_classes: int
    seed: int

    @property
    def groups(self) -> dict[str, str]:
        """Noises by layer: name -> pattern of its leaves."""
        if self.hidden is None:
            return {"all": "*"}
        return {f"layer{n}": f"layers.{n}.*" for n in range(len(self.hidden) + 1)}


@dataclass(frozen=True)
class Bench:
    """A scenario at one seed; with ``validation`` on training examples alone."""

    scenario: Scenario
    budget: Budget
    seed: int
    validation: bool = False
    learning_rate: float = LEARNING_RATES[0]

    @cached_property
    def stream(self) -> TaskStream:
        """Training and test tasks."""
        return stream_of(self.scenario, self.budget, self.seed, self.validation)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.stream)

    @cached_property
    def example(self) -> Task:
        """The first task, which gives shapes."""
        return self.stream.train[0]

    @cached_property
    def small(self) -> bool:
        """Whether a task fits into one batch: a search then reads it whole."""
        return self.example.num_examples <= BATCH_SIZE

    @cached_property
    def minibatch(self) -> Minibatch:
        """Of the size of the first task."""
        return self.minibatch_for(self.example.num_examples)

    def minibatch_for(self, num_examples: int) -> Minibatch:
        """The optimiser whose learning rate reaches 0 after so many examples times the epochs."""
        epochs = self.budget.small_epochs if self.small else self.budget.epochs
        return minibatch(epochs, num_examples, self.learning_rate)

    @property
    def network(self) -> tuple[Any, Any]:
        """(apply, params)."""
        return network_of(self.shape)

    @cached_property
    def shape(self) -> Shape:
        """Of its network."""
        hidden = None if self.scenario.network == "cnn" else self.budget.hidden
        classes = self.stream.num_classes
        assert classes is not None  # every scenario is a classification
        return Shape(self.stream.input_shape, hidden, classes, self.seed)

    @property
    def untold_world(self) -> str:
        """The scenario's world without the step into the task."""
        return self.scenario.world if self.scenario.whole_matrix else STATIC_WORLD

    def engine(
        self,
        structure: Any,
        power: float = 1.0,
        world: str | None = None,
        spread: float = 0.0,
        strength: float = 1.0,
    ) -> LaplaceFilter:
        """The filter of a structure; equal arguments share what is compiled, whatever the power.

        Args:
            structure: of the precision.
            power: of the likelihood.
            world: what the program is told, another than the scenario's.
            spread: of the draws over which a Kronecker curvature is averaged.
            strength: how often a Kronecker belief keeps the curvature.
        """
        search = Lbfgs() if self.small else self.minibatch
        told = self.scenario.world if world is None else world
        return self._engine(structure, search, told, spread, strength).with_power(power)

    def joint_trainer(self, num_examples: int) -> LaplaceFilter:
        """``trainer`` with the optimiser's schedule for so many examples together."""
        return self._engine(Diagonal(), self.minibatch_for(num_examples), self.untold_world)

    def _engine(
        self, structure: Any, estimator: Any, world: str, spread: float = 0.0, strength: float = 1.0
    ) -> LaplaceFilter:
        return engine_of(world, self.scenario.prior_scale, self.shape, structure, estimator, spread, strength)

    @cached_property
    def trainer(self) -> LaplaceFilter:
        """The engine whose program, prior and estimator the baselines take; they read no kernel."""
        return self.engine(Diagonal(), world=self.untold_world)

    def judge(self, belief: Belief, task: Task) -> tuple[float, float]:
        """Accuracy and NLL (nats an example) on a test task."""
        right, density = _at_mean(self._bind, self._layout, belief.mean, dict(task))
        return float(right), -float(density)

    @cached_property
    def _bind(self) -> Any:
        return as_network(self.network).bind

    @cached_property
    def _layout(self) -> Any:
        return describe(self.trainer.program, self.example, self.trainer.hypers)


def forget_compiled() -> None:
    """Give the memory of all engines back; a new seed has a new network."""
    engine_of.cache_clear()
    program_of.cache_clear()
    network_of.cache_clear()
    jax.clear_caches()


@cache
def dataset_of(name: str) -> Dataset:
    """Read once."""
    return load(name)


@lru_cache(maxsize=1)
def stream_of(scenario: Scenario, budget: Budget, seed: int, validation: bool) -> TaskStream:
    """The stream of a bench, made once for all its methods."""
    dataset = dataset_of(scenario.dataset)
    if validation:
        dataset = validation_data(dataset, budget.held_out, seed)
        scenario, budget = scenario.for_validation(budget)
    return scenario.tasks(dataset, budget, seed)


@cache
def network_of(shape: Shape) -> tuple[Any, Any]:
    """Dense layers with relu, or three convolutions and one dense layer."""
    if shape.hidden is None:
        return cnn(shape.inputs, num_outputs=shape.num_classes, seed=shape.seed)
    return mlp((*shape.inputs, *shape.hidden, shape.num_classes), "relu", seed=shape.seed)


@cache
def program_of(world: str, prior_scale: float, shape: Shape) -> Callable[..., None]:
    """The program of a world."""
    if world == STATIC_WORLD:
        return classification(network_of(shape), prior_scale, shape.groups)
    return _told_program(network_of(shape), prior_scale, world)


@cache
def engine_of(
    world: str, prior_scale: float, shape: Shape, structure: Any, estimator: Any, spread: float, strength: float
) -> LaplaceFilter:
    """Compiled once for all methods and scenarios that share it; its weights stand still."""
    if isinstance(structure, Kronecker):
        curvature: Any = KroneckerCurvature(CURVATURE_EXAMPLES, spread, strength)
    else:
        # two random columns for each direction of the sketch, where forty examples each would give fewer
        wanted = 2 * (structure.rank + 10) if isinstance(structure, LowRank) else 1
        curvature = SketchedCurvature(CURVATURE_EXAMPLES, column_batch=min(40, CURVATURE_EXAMPLES // wanted))
    return LaplaceFilter(
        program_of(world, prior_scale, shape),
        structure,
        hypers={f"noise.{name}": 0.0 for name in shape.groups} if world == STATIC_WORLD else {},
        estimator=estimator,
        curvature=curvature,
    )


def _told_program(network: Any, prior_scale: float, world: str) -> Callable[[Any], None]:
    """Weights that move by the task's known step; logits of the classes that the task has."""

    def kernel(context: Mapping[str, Array]) -> ByPath:
        first = Permuted(context["permutation"]) if world == KNOWN_PERMUTATION else Rotated(context["rotation"])
        return ByPath({"layers.0.kernel": first}, otherwise=Static())

    def observe(f: Callable[[Array], Array], task: Task) -> None:
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.CategoricalLogits(logits_of(f, task)), obs=task.get("y"))

    def program(tasks: Any) -> None:
        known = world in (KNOWN_PERMUTATION, KNOWN_ROTATION)
        net = ssm_nn.weights(
            "net",
            network,
            prior=dist.Normal(0.0, prior_scale),
            transition=PerTask(kernel, tasks.context) if known else Static(),
            num_tasks=len(tasks),
        )
        net.over(tasks, observe)

    assert world in (KNOWN_PERMUTATION, KNOWN_ROTATION, TASK_CLASSES)
    return program


def logits_of(f: Callable[[Array], Array], task: Task) -> Array:
    """Those of the network, of the task's own classes where it names them."""
    return jnp.where(task["classes"], f(task["x"]), NEVER) if "classes" in task else f(task["x"])


@partial(jax.jit, static_argnums=(0, 1))
def _at_mean(bind: Any, layout: Any, mean: Array, data: Mapping[str, Array]) -> tuple[Array, Array]:
    """Accuracy and mean log density of the network at its mean weights."""
    network = bind(layout.arrays(mean)["net"])
    by_class = jax.nn.log_softmax(logits_of(network, Task(data)))
    density = jnp.take_along_axis(by_class, data["y"][:, None], axis=1)
    return jnp.mean(jnp.argmax(by_class, axis=-1) == data["y"]), jnp.mean(density)
