"""Tasks on disk, one file each: written when a task is learnt, never again unless it changes.

base.npz          the shared kernels, and their precision where they are uncertain
task-<n>.npz      own leaves and unpadded factors of the task that came as number n
state.json        step, identities, ranks: written last, so that a kill between the two costs one task
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checkpoints import CheckpointError, load, replacing, save
from ssm_nn.inference.perturbation.blocks import Factors
from ssm_nn.inference.perturbation.state import PerturbationState, TaskRecord

__all__ = ["PerturbationFolder"]


@dataclass(frozen=True)
class PerturbationFolder:
    """A folder that holds a state."""

    folder: Path

    def add(self, state: PerturbationState) -> None:
        """Store the state; files that hold what they should are left alone."""
        known = self._written()
        pieces: dict[str, Any] = {
            "base.npz": (state.base, {} if state.precision is None else state.precision),
            "key.npz": state.key,
        }
        for number, record in enumerate(state.records):
            pieces[f"task-{number:04}.npz"] = (record.own, tuple(tuple(f) for f in record.factors))
        digests = {name: _digest(tree) for name, tree in pieces.items()}
        names = {name: f"{name.removesuffix('.npz')}-{digests[name][:16]}.npz" for name in pieces}
        for name, tree in pieces.items():
            if names[name] not in known or not (self.folder / names[name]).exists():
                save(self.folder / names[name], tree)
        tasks = [
            {
                "file": names[f"task-{number:04}.npz"],
                "identity": record.identity,
                "shapes": [[list(np.shape(a)) for a in f] for f in record.factors],
            }
            for number, record in enumerate(state.records)
        ]
        content = {
            "step": state.step,
            "base": names["base.npz"],
            "key": names["key.npz"],
            "uncertain": state.precision is not None,
            "tasks": tasks,
        }
        with replacing(self.folder / "state.json") as file:
            file.write(json.dumps(content, indent=1).encode())
        for old in known - set(names.values()):
            (self.folder / old).unlink(missing_ok=True)

    def read(self, begun: PerturbationState, own: Any) -> PerturbationState:
        """The stored state, or ``begun`` where there is none.

        Args:
            begun: what ``init`` gave, for structures and shapes.
            own: leaves of a task's own, likewise.

        Raises:
            CheckpointError: for a damaged file, or one of another network.
        """
        content = self._content()
        if content is None:
            return begun
        like = jax.tree.map(np.asarray, own)
        uncertain = begun.base if content["uncertain"] else {}
        base, precision = load(self.folder / content["base"], (begun.base, uncertain))
        key = load(self.folder / content["key"], begun.key)
        dtype = jax.tree.leaves(begun.base)[0].dtype
        records = []
        for task in content["tasks"]:
            factors = tuple(tuple(np.zeros(shape, dtype) for shape in shapes) for shapes in task["shapes"])
            stored_own, stored = load(self.folder / task["file"], (like, factors))
            records.append(TaskRecord(task["identity"], stored_own, tuple(Factors(*f) for f in stored)))
        return PerturbationState(
            content["step"], key, base, precision if content["uncertain"] else None, tuple(records)
        )

    def _content(self) -> Any:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / 'state.json'} cannot be read: {error}") from error

    def _written(self) -> set[str]:
        content = self._content()
        return (
            set()
            if content is None
            else {content["base"], content["key"], *(task["file"] for task in content["tasks"])}
        )


def _digest(tree: Any) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        keyed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if keyed else leaf)
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
