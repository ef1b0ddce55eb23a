"""What all methods of the continual-learning benchmark have in common: optimiser, budget, prior, and how much is run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import optax

from ssm_nn.inference import Minibatch

LEARNING_RATES = (1e-2, 1e-3)  # of Adam at the start of every task; it falls to 0 as a cosine. Filters take the first.
BATCH_SIZE = 256
PRIOR_SCALE = 0.2
CURVATURE_EXAMPLES = 10_000
REPLAYED = 200  # examples of each past task
VALIDATION_SEED = 1000  # of the stream on which strengths are tuned; seeds below it are reported


@dataclass(frozen=True)
class Budget:
    """How much is run of every scenario; None sets no bound of its own.

    Attributes:
        epochs: a task.
        hidden: widths of the dense network for images in grey.
        num_tasks, examples, test_examples: at most, the latter two a task.
        joint_examples: of joint training, over all tasks.
        ranks: of the low-rank form: the middle one in most scenarios, all of them in one.
        strengths: tried of each grid, from its start; 1 tunes nothing.
        validation_tasks, validation_examples: of the stream on which strengths are tuned.
        held_out: training examples that no validation task learns; the candidates are scored on them.
        small_epochs: a task, where it has no more than BATCH_SIZE examples.
    """

    epochs: int = 5
    hidden: tuple[int, ...] = (100, 100)
    num_tasks: int | None = None
    examples: int | None = None
    test_examples: int | None = None
    joint_examples: int = 600_000
    ranks: tuple[int, ...] = (10, 20, 50, 100, 200)
    strengths: int | None = None
    validation_tasks: int = 3
    validation_examples: int = 30_000
    held_out: int = 5_000
    small_epochs: int = 300

    @property
    def rank(self) -> int:
        """Where one is enough."""
        return self.ranks[len(self.ranks) // 2]


FULL = Budget()
QUICK = Budget(
    epochs=1,
    num_tasks=3,
    examples=6_000,
    test_examples=1_000,
    joint_examples=18_000,
    ranks=(10,),
    strengths=1,
    small_epochs=50,
)


@cache
def minibatch(epochs: int, num_examples: int, learning_rate: float) -> Minibatch:
    """Adam on mini-batches, of every method; one object for equal arguments, so that it is compiled for once."""
    steps = epochs * -(-num_examples // BATCH_SIZE)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return Minibatch(optimizer, epochs=epochs, batch_size=min(BATCH_SIZE, num_examples))


def common(budget: Budget) -> dict[str, Any]:
    """Everything here that a result depends on."""
    return {
        "batch_size": BATCH_SIZE,
        "prior_scale": PRIOR_SCALE,
        "curvature_examples": CURVATURE_EXAMPLES,
        "replayed": REPLAYED,
        "validation_seed": VALIDATION_SEED,
        "budget": asdict(budget)
        | {"hidden": list(budget.hidden), "ranks": []},  # the ranks choose methods and change none
    }
