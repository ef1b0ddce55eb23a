"""A program over a mesh of devices: weights along the axis ``weights``, batches along ``data``.

The vector of all weights is laid out so that device d of n holds the d-th part of every leaf, cut along one of the leaf's own
axes:

    theta = [part 1 of leaf 1, part 1 of leaf 2, .. | part 2 of leaf 1, .. | .. ]

Then a leaf is a view of its parts where they lie: nothing is moved to read the network's arrays or to lay out a gradient,
and the columns of a task's information are made where they are kept. An axis that n does not divide is filled up with weights
that nothing reads: their prior has mean 0, and they learn nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssm_nn.extraction import Layout, Program, StateSpace
from ssm_nn.moments import Moments
from ssm_nn.program import TaskBody
from ssm_nn.tasks import Task, Tasks
from ssm_nn.weight_mesh import DATA, WEIGHTS

__all__ = [
    "LeafwiseProgram",
    "ShardedLayout",
    "ShardedProgram",
    "checked_mesh",
    "copied",
    "cut",
    "everywhere",
    "gathered",
    "leafwise",
    "on_mesh",
]

Array = Any

# the precision of the filling, in units of the largest of the prior: never the smallest of a belief, and exact in its logarithm
_FILLING_PRECISION = 2.0**20


def checked_mesh(mesh: Any) -> Mesh:
    """The mesh with axes that XLA shards by itself.

    Raises:
        ValueError: for no mesh, or one without an axis ``weights``, or with axes other than ``weights`` and ``data``.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh is {mesh!r}; a jax.sharding.Mesh with the axis 'weights', and perhaps 'data', is accepted"
        )
    if WEIGHTS not in mesh.axis_names or set(mesh.axis_names) - {WEIGHTS, DATA}:
        raise ValueError(f"mesh has the axes {mesh.axis_names}; 'weights', and perhaps 'data', are accepted")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The context in which the algebra of precisions finds the mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def everywhere[Tree](program: Program, tree: Tree) -> Tree:
    """The pytree on every device of the program's mesh; as it is where the program has none."""
    return program.everywhere(tree) if isinstance(program, ShardedProgram) else tree


def copied(mesh: Mesh, tree: Any) -> Any:
    """The pytree's arrays on every device of the mesh; with several processes, each gives the same."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def spread(leaf: Array) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(spread(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(spread, tree)


def gathered[Tree](program: Program, tree: Tree) -> Tree:
    """``everywhere`` inside a compiled function."""
    if not isinstance(program, ShardedProgram):
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(program.mesh, PartitionSpec()))


@dataclass(frozen=True)
class ShardedLayout(Layout):
    """``Layout`` with the parts of every leaf apart, one run of them a device.

    Args:
        sites: as in the plain layout; their ``start`` and ``stop`` refer to that.
        mesh: of n parts along ``weights``.
    """

    mesh: Mesh

    @property
    def shards(self) -> int:
        """n."""
        return self.mesh.shape[WEIGHTS]

    @property
    def size(self) -> int:
        """P, the filling counted."""
        return self.shards * sum(self._block(site.shape) for site in self.sites)

    def leaves(self, theta: Array) -> dict[str, Array]:
        """Site name -> leaf; leading axes of ``theta`` (..., P) are kept."""
        leading = theta.shape[:-1]
        parts = theta.reshape((*leading, self.shards, -1))
        found, end = {}, 0
        for site in self.sites:
            begin, end = end, end + self._block(site.shape)
            found[site.name] = self._leaf(parts[..., begin:end], leading, site.shape)
        return found

    def arrays(self, theta: Array) -> dict[str, dict[str, Array]]:
        """Network name -> path -> leaf, for one theta (P,)."""
        named: dict[str, dict[str, Array]] = {}
        leaves = self.leaves(theta)
        for site in self.sites:
            named.setdefault(site.network, {})[site.path] = leaves[site.name]
        return named

    def vector(self, leaves: Mapping[str, Array]) -> Array:
        """The inverse of ``leaves``: (P,); the filling is 0."""
        return self.filled(leaves, 0.0)

    def packed(self, arrays: Mapping[str, Mapping[str, Array]], filling: float = 0.0) -> Array:
        """The inverse of ``arrays``: (P,)."""
        return self.filled({site.name: arrays[site.network][site.path] for site in self.sites}, filling)

    def filled(self, leaves: Mapping[str, Array], filling: Any) -> Array:
        """``vector`` with another number in the filling."""
        parts = []
        for site in self.sites:
            axis, rows = _split_axis(site.shape, self.shards)
            leaf = jnp.moveaxis(jnp.atleast_1d(leaves[site.name]), axis, 0)
            padding = [(0, rows * self.shards - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
            wide = jnp.pad(leaf, padding, constant_values=filling)
            parts.append(self._cut(wide).reshape(self.shards, -1))
        return self._cut(jnp.concatenate(parts, axis=1).reshape(-1))

    def _cut(self, leaf: Array) -> Array:
        """Laid out along its first axis; the constraint holds for a gradient too."""
        if isinstance(leaf, np.ndarray):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, PartitionSpec(WEIGHTS)))

    def _block(self, shape: tuple[int, ...]) -> int:
        """Numbers of a leaf on one device."""
        axis, rows = _split_axis(shape, self.shards)
        return rows * int(np.prod(_without(shape or (1,), axis), dtype=int))

    def _leaf(self, parts: Array, leading: tuple[int, ...], shape: tuple[int, ...]) -> Array:
        axis, rows = _split_axis(shape, self.shards)
        size, rest = (shape or (1,))[axis], _without(shape or (1,), axis)
        wide = parts.reshape((*leading, self.shards * rows, *rest))
        if not leading:
            wide = self._cut(wide)
        cut = wide[(slice(None),) * len(leading) + (slice(size),)]
        front = len(leading)
        order = [*range(front + 1, front + 1 + axis), front, *range(front + 1 + axis, cut.ndim)]
        return cut.transpose([*range(front), *order]).reshape((*leading, *shape))


def _split_axis(shape: tuple[int, ...], shards: int) -> tuple[int, int]:
    """The axis along which a leaf is cut, the longest that is divisible or else the longest; and its rows on a device."""
    shape = shape or (1,)
    axis = max(range(len(shape)), key=lambda a: (shape[a] % shards == 0, shape[a]))
    return axis, -(-shape[axis] // shards)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


class ShardedProgram:
    """``program`` over a mesh: the same function, extracted in a ``ShardedLayout``.

    Args:
        program: a NumPyro program.
        mesh: as ``checked_mesh`` returns it.
    """

    def __init__(self, program: Program, mesh: Mesh):
        self.program, self.mesh = program, mesh

    def __call__(self, tasks: Tasks) -> Any:
        return self.program(tasks)

    def placed(self, space: StateSpace) -> StateSpace:
        """The state-space form in the sharded layout; called by ``extract``.

        Raises:
            ValueError: for a kernel that permutes or turns leaves, which would move them between devices.
        """
        if space.moments.permutation is not None:
            raise ValueError(
                "mesh: a kernel that permutes or turns leaves would move them between devices; run it without a mesh"
            )
        layout = ShardedLayout(space.layout.sites, self.mesh)

        def moved(vector: Array, filling: Any = 0.0) -> Array:
            return layout.filled(space.layout.leaves(vector), filling)

        still = Moments(moved(space.moments.gain, 1.0), moved(space.moments.shift), moved(space.moments.noise))
        return StateSpace(
            layout,
            moved(space.prior_mean),
            moved(space.prior_variance, jnp.min(space.prior_variance) / _FILLING_PRECISION),
            still,
            moved(space.initial),
            _SplitBody(space.body, self.mesh),
        )

    def everywhere(self, tree: Any) -> Any:
        """``copied`` on this mesh."""
        return copied(self.mesh, tree)


class LeafwiseProgram(ShardedProgram):
    """``program`` over a mesh for an engine that holds weights leaf by leaf: in the plain layout, examples along ``data``."""

    def placed(self, space: StateSpace) -> StateSpace:
        """The state-space form as it is, its examples spread."""
        return space._replace(body=_SplitBody(space.body, self.mesh))


def leafwise(program: Program, mesh: Mesh | None) -> Program:
    """A ``LeafwiseProgram``; the program itself without a mesh.

    Raises:
        ValueError: for another mesh than ``checked_mesh`` accepts, or for several processes.
    """
    if mesh is None:
        return program
    if jax.process_count() > 1:
        raise ValueError(f"mesh is of {jax.process_count()} processes; devices of one process are accepted")
    return LeafwiseProgram(program, checked_mesh(mesh))


def cut[Tree](program: Program, leaves: Tree) -> Tree:
    """Every leaf cut along its longest axis that the mesh's ``weights`` divides; whole on every device where none is.

    As they are where the program has no mesh.
    """
    if not isinstance(program, LeafwiseProgram):
        return leaves
    mesh = program.mesh

    def placed(leaf: Array) -> Array:
        axis, rows = _split_axis(leaf.shape, mesh.shape[WEIGHTS])
        whole = not leaf.shape or leaf.shape[axis] < rows * mesh.shape[WEIGHTS]
        spec = PartitionSpec() if whole else PartitionSpec(*(None,) * axis, WEIGHTS)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(placed, leaves)


class _SplitBody(TaskBody):
    """A task body whose examples are spread along ``data``, where their number allows it."""

    def __init__(self, body: TaskBody, mesh: Mesh):
        super().__init__(body.networks, body.observe, body.still)
        self.mesh = mesh

    def run(self, arrays: Mapping[str, Mapping[str, Any]], task: Task) -> None:
        shards = self.mesh.shape.get(DATA, 1)
        if shards > 1 and task.num_examples % shards == 0:
            spread = NamedSharding(self.mesh, PartitionSpec(DATA))
            data, mask = jax.lax.with_sharding_constraint((task.data, task.mask), spread)
            task = Task.tree_unflatten(None, (data, task.context, mask))
        super().run(arrays, task)
