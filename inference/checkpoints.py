"""Pytrees of arrays on disk: written whole or not at all, and read back bit for bit or not at all.

One npz file holds the leaves, a description of the structure, and a sha256 over both. It is written beside its place,
flushed to the disk, and renamed: a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["CheckpointError", "load", "replacing", "save"]

_STRUCTURE, _DIGEST = "structure", "sha256"
_SCALARS: dict[type, str] = {bool: "bool", int: "int", float: "float"}  # bool first: it is an int
_RAW = {
    2: np.uint16,
    1: np.uint8,
}  # how an extension type (bfloat16, float8) lies in the file, which knows none of them


# what reading a damaged archive raises; MemoryError where its header asks for an array of any size
_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, NotImplementedError, MemoryError, zipfile.BadZipFile)


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, altered, or of another structure."""


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A new binary file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    A process that is killed leaves ``.<name>.<process>.tmp`` behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: str | Path, tree: Any) -> None:
    """Write a pytree to ``path`` (an npz file), replacing what lies there in one step.

    Args:
        path: the file; its folder is made where it is missing.
        tree: a pytree of JAX arrays (typed PRNG keys too), NumPy arrays, and Python's bool, int and float.

    Raises:
        ValueError: for a leaf of another type.
    """
    described, arrays = _flatten(tree)
    structure = json.dumps(described)
    content = {f"leaf_{i}": array for i, array in enumerate(arrays)}
    content[_STRUCTURE] = np.array(structure)
    content[_DIGEST] = np.array(_digest(structure, arrays))
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **content)


def load[Tree](path: str | Path, like: Tree) -> Tree:
    """Read a pytree that ``save`` wrote, to the last bit.

    Args:
        path: the file.
        like: a pytree of the same structure, shapes and dtypes; its values are not read. A ``jax.ShapeDtypeStruct`` stands
            for a JAX array, laid out by its sharding where it has one.

    Returns:
        The tree; a leaf is a JAX array, a NumPy array or a Python number as its leaf in ``like`` is.

    Raises:
        CheckpointError: no such file, a file cut short or altered, or one that does not fit ``like``.
    """
    try:
        # opened here: of a damaged file NumPy would leave its own handle open
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            structure = str(file[_STRUCTURE])
            described = json.loads(structure)
            arrays = [file[f"leaf_{i}"] for i in range(len(described))]
            digest = str(file[_DIGEST])
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except _DAMAGE as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read, it is cut short or altered: {error}") from error
    if _digest(structure, arrays) != digest:
        raise CheckpointError(f"the checkpoint {path} is altered: its sha256 does not fit its content")
    wanted = [_description(*leaf)[0] for leaf in jax.tree_util.tree_flatten_with_path(like)[0]]
    if len(wanted) != len(described):
        raise CheckpointError(f"the checkpoint {path} has {len(described)} leaves, where {len(wanted)} are expected")
    for found, expected in zip(described, wanted, strict=True):
        if found != expected:
            raise CheckpointError(f"the checkpoint {path} holds {_words(found)}, where {_words(expected)} is expected")
    leaves, treedef = jax.tree.flatten(like)
    made = [_as_leaf(array, leaf, note) for array, leaf, note in zip(arrays, leaves, described, strict=True)]
    return jax.tree.unflatten(treedef, made)


def _flatten(tree: Any) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """A description of every leaf (path, kind, dtype, shape), and its bits as an array that npz can hold."""
    described, arrays = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        note, value = _description(path, leaf)
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ValueError(
                f"tree holds an array of Python objects at {note['path']!r}; arrays of numbers are accepted"
            )
        described.append(note)
        arrays.append(array.view(_RAW[array.itemsize]) if array.dtype.kind == "V" else array)
    return described, arrays


def _description(path: Any, leaf: Any) -> tuple[dict[str, Any], Any]:
    """Path, kind, dtype and shape of a leaf, and what holds its numbers."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    kind, value = next((word for scalar, word in _SCALARS.items() if type(leaf) is scalar), None), leaf
    if kind is not None:
        value = np.asarray(leaf)
    elif isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind, value = f"key {jax.random.key_impl(leaf)}", jax.random.key_data(leaf)
    elif isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        kind = "array"
    else:
        raise ValueError(f"tree holds {type(leaf).__name__} at {name!r}; arrays, keys and numbers are accepted")
    return {"path": name, "kind": kind, "dtype": str(value.dtype), "shape": list(value.shape)}, value


def _as_leaf(array: np.ndarray, like: Any, note: Mapping[str, Any]) -> Any:
    array = array.view(jnp.dtype(note["dtype"])) if str(array.dtype) != note["dtype"] else array
    if type(like) in _SCALARS:
        return type(like)(array.item())
    if note["kind"].startswith("key "):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=note["kind"].removeprefix("key "))
    if isinstance(like, np.ndarray | np.generic):
        return array
    sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _digest(structure: str, arrays: list[np.ndarray]) -> str:
    total = hashlib.sha256(structure.encode())
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode())
        if array.size:  # nothing of an array is no buffer; otherwise read where it lies, without a copy
            total.update(memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B"))
    return total.hexdigest()


def _words(note: Mapping[str, Any]) -> str:
    what = f"{note['dtype']} of shape {tuple(note['shape'])}" if note["kind"] == "array" else f"a {note['kind']}"
    return f"{note['path'] or 'the leaf'}: {what}"
