"""Which of a program's weights its tasks share, which are a task's own, and which of those belong to its head."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Layout, Program, StateSpace, extract
from ssm_nn.inference.batches import rows, with_mask
from ssm_nn.inference.perturbation.blocks import Block, Name
from ssm_nn.inference.perturbation.factored import find_blocks
from ssm_nn.inference.perturbation.fitting import Anchor
from ssm_nn.layers import find_layers
from ssm_nn.tasks import Task

__all__ = ["Reading", "read_program"]

Array = Any


class Reading(NamedTuple):
    """What a filter must know of a program.

    Attributes:
        layout: of all weights.
        blocks: shared kernels, which never move in the program.
        heads: own leaves that start anew with every task: kernels of layers of their own, and their biases.
        initial: the network's own weights, network -> path -> leaf.
        prior: of all weights.
    """

    layout: Layout
    blocks: tuple[Block, ...]
    heads: frozenset[Name]
    initial: Any
    prior: Anchor

    def shared(self, arrays: Any) -> Any:
        """The shared kernels among ``arrays``."""
        return _chosen(arrays, {block.name for block in self.blocks})

    def own(self, arrays: Any) -> Any:
        """The other leaves."""
        shared = {block.name for block in self.blocks}
        return _chosen(arrays, {(s.network, s.path) for s in self.layout.sites} - shared)

    def head(self, arrays: Any) -> Any:
        """The leaves of the head among ``arrays``."""
        return _chosen(arrays, set(self.heads))


def _chosen(arrays: Any, names: set[Name]) -> Any:
    made: dict[str, dict[str, Any]] = {}
    for network, leaves in arrays.items():
        for path, leaf in leaves.items():
            if (network, path) in names:
                made.setdefault(network, {})[path] = leaf
    return made


def read_program(program: Program, hypers: Any, task: Task, cap: int | None) -> Reading:
    """Read a program at one task with data.

    Raises:
        ValueError: for a leaf that neither stands still nor is drawn anew with every task; for no shared leaf; for a shared
            leaf that is no kernel of a dense or convolutional layer, or is used more than once.
    """
    if not task.data:
        raise ValueError("the first task has no data: its shapes are needed to find the network's layers")
    space = extract(program, task, hypers)
    gain, noise = np.asarray(space.moments.gain), np.asarray(space.moments.noise)
    if space.moments.permutation is not None:
        raise ValueError("the program's kernel maps its weights; PerturbationFilter takes Static leaves and fresh ones")
    shared: set[Name] = set()
    for site in space.layout.sites:
        here = slice(site.start, site.stop)
        still = bool(np.all(gain[here] == 1) and np.all(noise[here] == 0))
        if not still and not np.all(gain[here] == 0):
            raise ValueError(
                f"the weights {site.name} move from task to task; PerturbationFilter takes leaves that stand still "
                "(Static: shared) and leaves drawn anew with every task (OrnsteinUhlenbeck(0): the task's own)"
            )
        if still:
            shared.add((site.network, site.path))
    if not shared:
        raise ValueError("the program shares no weights between tasks: declare some leaf Static")
    example = rows(with_mask(jax.tree.map(jnp.asarray, task)), jnp.arange(1))
    arrays = space.layout.arrays(space.initial)
    blocks = find_blocks(lambda a: space.outputs_at(a, example), arrays, shared, cap)
    return Reading(space.layout, blocks, _heads(space, arrays, example, shared), arrays, _prior(space))


def _heads(space: StateSpace, arrays: Any, example: Task, shared: set[Name]) -> frozenset[Name]:
    layers = find_layers(lambda a: space.outputs_at(a, example), arrays)
    own = [layer for layer in layers if layer.kernel not in shared]
    return frozenset(name for layer in own for name in (layer.kernel, layer.bias) if name is not None)


def _prior(space: StateSpace) -> Anchor:
    arrays = space.layout.arrays
    return Anchor(arrays(space.prior_mean), arrays(1 / space.prior_variance))
