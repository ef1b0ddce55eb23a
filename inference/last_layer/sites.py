"""What is kept of each point: enough to take it back, and to linearise it anew.

Point n with features phi_n, linearised at f_n, stands in the belief as the Gaussian factor with

    precision  w_n Lambda(f_n) (x) phi_n phi_n^T,    shift  w_n [Lambda(f_n) f_n + g(f_n)] (x) phi_n

so that (phi_n, f_n, y_n, w_n), D + K + 2 numbers, are all there is to it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Sites"]

Array = Any

_USED: dict[int, int] = {}  # rows in use of each buffer that has room behind, by its id; an entry goes with its buffer
_CLAIMS = threading.Lock()


class Sites(NamedTuple):
    """N points, on the host.

    Attributes:
        features: (N, D), whitened.
        outputs: (N, K), where each was linearised.
        labels: (N, ...).
        weights: (N,), >= 0.
        ids: (N,), each once.
        steps: (N,), the number of the batch in which each came.
    """

    features: np.ndarray
    outputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    steps: np.ndarray

    @classmethod
    def none(cls, num_features: int, num_outputs: int, labels: np.ndarray, dtype: Any) -> Sites:
        """No point; ``labels`` (0, ...) gives dtype and shape."""
        whole = np.zeros(0, np.int64)
        return cls(
            np.zeros((0, num_features), dtype),
            np.zeros((0, num_outputs), dtype),
            labels,
            np.zeros(0, dtype),
            whole,
            whole,
        )

    @property
    def num_points(self) -> int:
        """N."""
        return len(self.ids)

    def checked(self, phi: np.ndarray, labels: np.ndarray, ids: Any, weights: Any, step: int) -> Sites:
        """New points (n, D) that fit beside these, not linearised yet; see ``LastLayerFilter.update``.

        Raises:
            ValueError: another number of labels, ids or weights; weights that are negative or not finite; ids met before.
        """
        num, dtype = len(phi), self.features.dtype
        if len(labels) != num:
            raise ValueError(f"the batch has {num} inputs and {len(labels)} labels; as many of each are accepted")
        w = np.ones(num, dtype) if weights is None else np.asarray(weights, dtype)
        if w.shape != (num,) or not (np.isfinite(w) & (w >= 0)).all():
            raise ValueError(f"weights has shape {w.shape}; {num} finite numbers >= 0 are accepted")
        if ids is None:
            ids = np.arange(num) + (int(self.ids.max()) + 1 if len(self.ids) else 0)
        ids = checked_ids(ids)
        if ids.shape != (num,):
            raise ValueError(f"ids has shape {ids.shape}; one for each of the {num} points is accepted")
        met = ids[np.isin(ids, self.ids)]
        if met.size:
            raise ValueError(f"ids holds {met[:5].tolist()}, which points of the state have already; remove them first")
        outputs = np.zeros((num, self.outputs.shape[1]), dtype)
        return Sites(phi, outputs, labels, w, ids, np.full(num, step, np.int64))

    def plus(self, more: Sites) -> Sites:
        """These points and more; many small additions copy a point a few times in all."""
        if not self.num_points:
            return more
        return Sites(*(_appended(own, new) for own, new in zip(self, more, strict=True)))

    def at(self, places: np.ndarray) -> Sites:
        """The points at ``places``, indices or booleans."""
        return Sites(*(part[places] for part in self))

    def places(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the points with these ids lie.

        Raises:
            ValueError: for an id that no point has, or that is given twice.
        """
        asked = checked_ids(ids)
        order = np.argsort(self.ids, kind="stable")
        found = np.searchsorted(self.ids, asked, sorter=order)
        inside = found < len(order)
        places = order[np.where(inside, found, 0)] if len(order) else np.zeros(len(asked), int)
        known = inside & (self.ids[places] == asked) if len(order) else np.zeros(len(asked), bool)
        if not known.all():
            unknown = asked[~known]
            raise ValueError(
                f"ids holds {unknown[:5].tolist()}{' and others' if len(unknown) > 5 else ''}, which no point has; the "
                f"state holds {self.num_points} points"
            )
        return places


def _appended(old: np.ndarray, more: np.ndarray) -> np.ndarray:
    """``old`` and ``more`` (n, ...), in the room behind ``old`` where nobody has taken it, else in a new buffer half as large
    again. States stay values: what a state sees of a buffer is written once."""
    count = len(old) + len(more)
    with _CLAIMS:
        buffer = old.base
        if not (isinstance(buffer, np.ndarray) and _is_head_of(old, buffer) and count <= len(buffer)) or (
            buffer.dtype != np.result_type(old, more)
        ):
            buffer = np.empty((count + count // 2, *old.shape[1:]), np.result_type(old, more))
            buffer[: len(old)] = old
            weakref.finalize(buffer, _USED.pop, id(buffer), None).atexit = False
        buffer[len(old) : count] = more
        _USED[id(buffer)] = count
    return buffer[:count]


def _is_head_of(array: np.ndarray, buffer: np.ndarray) -> bool:
    """Whether an array is all that is in use of a buffer of ours."""
    same = array.ctypes.data == buffer.ctypes.data and array.strides == buffer.strides
    return same and array.shape[1:] == buffer.shape[1:] and _USED.get(id(buffer)) == len(array)


def checked_ids(ids: Any) -> np.ndarray:
    """Whole numbers (n,), each once."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids has shape {ids.shape} and dtype {ids.dtype}; whole numbers of shape (n,) are accepted")
    ids = ids.astype(np.int64)
    if len(np.unique(ids)) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise ValueError(f"ids holds {int(values[counts > 1][0])} more than once; each point has an id of its own")
    return ids


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """(n, ...) as (size, ...), filled with copies of the first row; zeros where there is none."""
    missing = size - len(array)
    if missing == 0:
        return array
    filling = (
        np.repeat(array[:1], missing, axis=0) if len(array) else np.zeros((missing, *array.shape[1:]), array.dtype)
    )
    return np.concatenate([array, filling])


def padded_size(num_points: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..., beyond 1,024 the next of its multiples: few shapes, little work on copies."""
    if num_points > 1024:
        return -(-num_points // 1024) * 1024
    power = 1 << max(num_points - 1, 0).bit_length()
    return power - power // 4 if power >= 4 and num_points <= power - power // 4 else power
