"""A tree whose data lie in one row, without masked examples: what functions that count every example ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

__all__ = ["without_masked"]

_DATA = ("posterior_predictive", "log_likelihood", "prior_predictive", "observed_data", "constant_data")
_GRID = ("task", "example")


def without_masked(tree: xarray.DataTree) -> xarray.DataTree:
    """The tree with task and example as one dimension ``observation``, and only the examples that count.

    Tasks of different sizes are padded under a mask; ``az.loo``, ``az.compare`` and ``az.loo_pit`` would take the padding for
    data. ``task`` and ``example`` stay as coordinates, so that scores can be summed by task:
    ``elpd_i.groupby("task").sum()``.

    Raises:
        ValueError: for a tree without observed data.
    """
    import xarray

    if "observed_data" not in tree.children:
        raise ValueError("tree has no group 'observed_data': give tasks to to_datatree")
    counted = _counted(tree)
    groups: dict[str, Any] = {}
    for place, node in tree.children.items():
        dataset = node.to_dataset()
        if place in _DATA:
            dataset = _in_a_row(dataset.drop_vars("mask", errors="ignore"), counted)
        groups[f"/{place}"] = dataset
    return xarray.DataTree.from_dict(groups)


def _counted(tree: xarray.DataTree) -> np.ndarray:
    """(T, N), true for examples that count."""
    if "constant_data" in tree.children and "mask" in tree["constant_data"].data_vars:
        return np.asarray(tree["constant_data"]["mask"].values, bool)
    first = next(iter(tree["observed_data"].data_vars.values()))
    return np.ones([first.sizes[axis] for axis in _GRID], bool)


def _in_a_row(dataset: xarray.Dataset, counted: np.ndarray) -> xarray.Dataset:
    import xarray

    rows = {}
    for name, values in dataset.data_vars.items():
        if set(_GRID) <= set(values.dims):
            stacked = values.stack(observation=_GRID).reset_index("observation")
            rows[name] = stacked.isel(observation=np.flatnonzero(counted)).transpose(
                *("observation" if axis == "task" else axis for axis in values.dims if axis != "example")
            )
        else:
            rows[name] = values
    return xarray.Dataset(rows, attrs=dataset.attrs)
