"""Where the beliefs of all tasks live while a filter runs and a smoother reads them backwards.

    InMemory()        on the device, the default
    OnHost()          in the host's memory
    OnDisk(folder)    a checkpoint a task, written whole or not at all, while the next task is learnt

With several processes each keeps its own part of every array, on disk in a folder of its own inside ``folder``.
A filter or smoother holds the arrays of one task or two whatever their number; what it leaves is read as it is asked for.
A filter that finds the first tasks of the same run in a folder goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from ssm_nn.inference.checkpoints import CheckpointError, load, replacing, save
from ssm_nn.inference.history_parts import back, expected, parts

__all__ = ["History", "InMemory", "OnDisk", "OnHost", "Recalled"]

Array = Any


class History(Protocol):
    """One pytree a task."""

    def begin(self, like: Callable[[], Any], mark: str) -> int:
        """Make ready for pytrees like ``like()`` of the run that ``mark`` names; how many tasks it holds already."""
        ...

    def put(self, t: int, tree: Any) -> None:
        """Keep the pytree of task ``t``."""
        ...

    def get(self, t: int) -> Any:
        """The pytree of task ``t``."""
        ...

    def flush(self) -> None:
        """Return when everything put is kept."""
        ...

    def beside(self, name: str) -> History:
        """Another history of the same kind, for what is derived from this one; empty."""
        ...


class InMemory:
    """Pytrees as they are, on the device."""

    def __init__(self):
        self._trees: dict[int, Any] = {}

    def begin(self, like: Callable[[], Any], mark: str) -> int:
        """Forget everything."""
        del like, mark
        self._trees.clear()
        return 0

    def put(self, t: int, tree: Any) -> None:
        """Keep a reference."""
        self._trees[t] = tree

    def get(self, t: int) -> Any:
        """The same pytree."""
        return self._trees[t]

    def flush(self) -> None:
        """Nothing to wait for."""

    def beside(self, name: str) -> InMemory:
        """A new one."""
        del name
        return InMemory()


class OnHost(InMemory):
    """Pytrees in the host's memory; each comes back to the devices it came from."""

    def put(self, t: int, tree: Any) -> None:
        """Copy to the host."""
        self._trees[t] = jax.tree.map(_abstract, tree), jax.tree.leaves(jax.tree.map(parts, tree))

    def get(self, t: int) -> Any:
        """Copy back."""
        like, kept = self._trees[t]
        leaves, structure = jax.tree.flatten(like)
        return jax.tree.unflatten(structure, [back(*pair) for pair in zip(kept, leaves, strict=True)])

    def beside(self, name: str) -> OnHost:
        """A new one."""
        del name
        return OnHost()


class OnDisk:
    """One file a task in ``folder``, with a sha256 each; see ``inference.checkpoints`` for what is promised of a file.

    A file is written in the background; ``put`` waits for the one before, so that two tasks are in memory at most.
    The last file may be missing or damaged after a crash: the task is then learnt again. Nothing is unpickled.

    Args:
        folder: made where it is missing; of one run, which its ``history.json`` names.

    Raises:
        ValueError: when it holds another run, or cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._like: Any = None
        self._kept: Any = None
        self._pending: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="history")

    def begin(self, like: Callable[[], Any], mark: str) -> int:
        """Count the tasks that lie here whole, and remove what lies behind them."""
        own = self._own
        file = own / "history.json"
        digest = hashlib.sha256(mark.encode()).hexdigest()
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
            if found is None:
                with replacing(file) as stream:
                    stream.write(json.dumps({"run": digest, "of": mark}, indent=2).encode())
        except (OSError, ValueError) as error:
            raise ValueError(f"folder is {str(self.folder)!r}, which cannot be used for a history: {error}") from error
        if found is not None and found.get("run") != digest:
            raise ValueError(
                f"folder is {str(self.folder)!r}, which holds the history of another run ({found.get('of')}), "
                f"not of this one ({mark}); give a new folder"
            )
        self._like = jax.tree.map(_abstract, like())
        self._kept = jax.tree.map(expected, self._like)
        for leftover in own.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        done = 0
        while self._file(done).exists() and self._is_whole(done):
            done += 1
        if jax.process_count() > 1:
            done = int(np.min(process_allgather(np.int32(done))))  # what all of them hold
        for file in own.glob("task-*.npz"):
            if int(file.stem.removeprefix("task-")) >= done:
                file.unlink()
        return done

    def put(self, t: int, tree: Any) -> None:
        """Write in the background."""
        self.flush()
        # copied to the host here: the caller may donate its arrays to the next step
        self._pending = self._writer.submit(save, self._file(t), jax.tree.map(parts, tree))

    def get(self, t: int) -> Any:
        """Read, and lay out as it was.

        Raises:
            CheckpointError: for a file that is missing or damaged.
        """
        self.flush()
        return jax.tree.map(back, load(self._file(t), self._kept), self._like)

    def flush(self) -> None:
        """Wait for the writer; its error is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def beside(self, name: str) -> OnDisk:
        """In a folder inside this one."""
        return OnDisk(self.folder / name)

    @property
    def _own(self) -> Path:
        """Of this process: no other writes or tidies there."""
        if jax.process_count() == 1:
            return self.folder
        return self.folder / f"process-{jax.process_index()}-of-{jax.process_count()}"

    def _file(self, t: int) -> Path:
        return self._own / f"task-{t:06d}.npz"

    def _is_whole(self, t: int) -> bool:
        try:
            load(self._file(t), self._kept)
        except CheckpointError:
            return False
        return True


def _abstract(leaf: Any) -> Any:
    """Shape, dtype and place of an array, without its numbers."""
    if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


class Recalled[Item](Sequence[Item]):
    """A sequence whose items are made when they are asked for; a slice is one too.

    Args:
        item: t -> the item.
        places: the t of each.
    """

    def __init__(self, item: Callable[[int], Item], places: Sequence[int]):
        self._item, self._places = item, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Recalled[Item]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Recalled(self._item, self._places[index])
        return self._item(self._places[index])

    def __iter__(self) -> Iterator[Item]:
        return (self._item(t) for t in self._places)
