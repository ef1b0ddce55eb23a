"""A tree on disk, drawn and written a portion at a time: memory does not grow with the draws.

The draws are those of ``to_datatree`` to the last bit, whatever the portions. The tree is written beside its place and
renamed when it is whole: what lies at ``path`` is never half a tree.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssm_nn.inference.beliefs import Filtered
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.datatree import TreeMaker
from ssm_nn.inference.marginals import Marginals
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

__all__ = ["write_datatree"]

Array = Any

# one file of metadata is part of this format, and readers look for it first
_FORMAT: dict[str, Any] = {"zarr_format": 2, "consolidated": False}
_PORTION_NUMBERS = (
    2**24
)  # weights drawn and written together: 64 MiB in float32, a few times over while they are stacked


def write_datatree(
    path: str | Path,
    posterior: Smoothed | Filtered | Marginals,
    *,
    num_samples: int = 200,
    key: Array | int = 0,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]] | None = None,
    keep: Sequence[str] = ("*",),
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write what ``to_datatree`` would return into a Zarr folder, which ``xarray.open_datatree(path)`` reads lazily.

    Args:
        path: a folder that does not exist yet, by custom ``*.zarr``.
        posterior, num_samples, key, tasks, keep: as for ``to_datatree``.
        chunk: draws made and written together; None takes as many as have some ten million weights.
        progress: called with the number of draws that are written.

    Returns:
        ``path``.

    Raises:
        ValueError: a path where something lies, no zarr, and as for ``to_datatree``.
    """
    try:
        import zarr
    except ImportError:
        raise ValueError("path is to be a Zarr folder, and zarr is not installed: pip install 'ssm-nn[zarr]'") from None
    path = Path(path)
    if path.exists():
        raise ValueError(f"path is {path}, where something lies already; a folder that does not exist is accepted")
    maker = TreeMaker(posterior, num_samples, key, tasks, keep)
    if chunk is None:
        chunk = max(_PORTION_NUMBERS // (len(posterior) * posterior.layout.size), 1)
    check_count(chunk=chunk)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for place, dataset in maker.fixed().items():
            dataset.to_zarr(temporary, group=place, mode="a", **_FORMAT)
        for start in range(0, num_samples, chunk):
            stop = min(start + chunk, num_samples)
            for place, dataset in maker.sampled(start, stop).items():
                where: dict[str, Any] = {"append_dim": "draw"} if start else {"mode": "a"}
                dataset.to_zarr(temporary, group=place, **_FORMAT, **where)
            if progress is not None:
                progress(stop)
        zarr.consolidate_metadata(str(temporary))
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path
