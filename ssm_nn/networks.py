"""A network of any library as a pure function of named arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Network", "as_network"]


class Network(NamedTuple):
    """``bind(arrays)`` is the network, ready to be called, at the weights ``arrays`` (dotted path -> array).

    Attributes:
        bind: from arrays to a callable (a merged flax or equinox module, or ``apply`` at its parameters).
        initial: the network's own initial weights by dotted path.
    """

    bind: Callable[[Mapping[str, Any]], Callable]
    initial: dict[str, Any]


def as_network(network: Any) -> Network:
    """Take apart a flax.nnx module, an equinox module, or a pair (apply, params).

    Raises:
        ValueError: for anything else, a network without weights, or one with batch normalisation.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(network, nnx.Module):
        return _from_nnx(network, nnx)
    equinox = sys.modules.get("equinox")
    if equinox is not None and isinstance(network, equinox.Module):
        params, static = equinox.partition(network, equinox.is_inexact_array)
        return _from_tree(params, lambda tree: equinox.combine(tree, static))
    if isinstance(network, tuple) and len(network) == 2 and callable(network[0]):
        apply, params = network
        return _from_tree(params, lambda tree: lambda *inputs: apply(tree, *inputs))
    raise ValueError(
        f"network is of type {type(network).__name__}; accepted are a flax.nnx module, an equinox module, and a pair "
        "(apply, params) with apply(params, x)"
    )


def _from_tree(params: Any, rebuild: Callable[[Any], Callable]) -> Network:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") or "weight" for path, _ in leaves]
    initial = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
    _check(initial)
    return Network(lambda arrays: rebuild(jax.tree.unflatten(treedef, [arrays[path] for path in paths])), initial)


def _from_nnx(module: Any, nnx: Any) -> Network:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    if any(isinstance(variable, nnx.BatchStat) for _, variable in nnx.to_flat_state(rest)):
        raise ValueError(
            "network has batch normalisation: its outputs depend on the other examples of a batch and on running "
            "averages that are no weights, so a task has no likelihood of its own; use LayerNorm, GroupNorm or RMSNorm"
        )
    return _from_tree(nnx.to_pure_dict(params), lambda tree: nnx.merge(graph, _filled(params, tree, nnx), rest))


def _filled(state: Any, tree: Any, nnx: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the template must not be written to
    nnx.replace_by_pure_dict(state, tree)
    return state


def _check(initial: Mapping[str, Any]) -> None:
    if not initial:
        raise ValueError("network has no weights: it holds no floating-point array")
    for path, leaf in initial.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"network: {path!r} has dtype {jnp.result_type(leaf)}; weights must be floating-point arrays"
            )
