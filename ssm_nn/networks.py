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


# What is said of a network with batch normalisation, whichever library it comes from.
BATCH_NORMALISATION = (
    "network has batch normalisation: its outputs depend on the other examples of a batch and on running averages that "
    "are no weights, so a task has no likelihood of its own; use a stateless normaliser: LayerNorm, GroupNorm or RMSNorm"
)


def as_network(network: Any) -> Network:
    """Take apart a flax.nnx module, an equinox module, or a pair (apply, params).

    A network is a function of its weights and its inputs alone; what breaks that is refused. Weights that are tied
    (one nnx Variable in two places, one nnx module in two places, ``equinox.nn.Shared``) are one leaf, under the path
    where it is met first, with one prior and one kernel. The leaves of ``params`` are weights of their own, whatever
    ``apply`` does with them: to tie two layers, read one leaf twice. State of an nnx module that is not a Param stays
    as it is; a call that changes it (a counter, a cache, a stream of random numbers) fails with flax's
    TraceContextError where the program is traced.

    Raises:
        ValueError: for anything else; a network without weights; batch normalisation and other state from call to call;
            dropout that is active; one array of a module in two places that its library does not tie.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(network, nnx.Module):
        return _from_nnx(network, nnx)
    equinox = sys.modules.get("equinox")
    if equinox is not None:
        if isinstance(network, tuple) and len(network) == 2 and isinstance(network[1], equinox.nn.State):
            network = network[0]  # what make_with_state returns; whether the state is of use, the module tells
        if isinstance(network, equinox.Module):
            return _from_equinox(network, equinox)
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
        raise ValueError(BATCH_NORMALISATION)
    for path, part in nnx.iter_modules(module):
        rate = getattr(part, "rate", getattr(part, "dropout_rate", 0.0))
        if getattr(part, "deterministic", None) is False and rate > 0:
            _refuse_dropout(".".join(map(str, path)), "network.eval()")
    network = _from_tree(nnx.to_pure_dict(params), lambda tree: nnx.merge(graph, _filled(params, tree, nnx), rest))
    _check_aliases(network.initial, "assign one Variable to both places")
    return network


def _filled(state: Any, tree: Any, nnx: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the template must not be written to
    nnx.replace_by_pure_dict(state, tree)
    return state


def _from_equinox(module: Any, equinox: Any) -> Network:
    _check_equinox(module, equinox)
    params, static = equinox.partition(module, equinox.is_inexact_array)
    network = _from_tree(params, lambda tree: equinox.combine(tree, static))
    _check_aliases(network.initial, "wrap them in equinox.nn.Shared")
    return network


def _check_equinox(module: Any, equinox: Any) -> None:
    special = (equinox.nn.BatchNorm, equinox.nn.StateIndex, equinox.nn.Dropout)
    parts, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda part: isinstance(part, special))
    for path, part in parts:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        if isinstance(part, equinox.nn.BatchNorm):
            raise ValueError(BATCH_NORMALISATION)
        if isinstance(part, equinox.nn.StateIndex):
            raise ValueError(
                f"network keeps state from call to call (equinox.nn.StateIndex at {where!r}), so that its outputs are "
                "no function of weights and inputs; use layers without state"
            )
        if isinstance(part, equinox.nn.Dropout) and not part.inference and part.p > 0:
            _refuse_dropout(where, "equinox.nn.inference_mode(network)")


def _refuse_dropout(path: str, remedy: str) -> None:
    raise ValueError(
        f"network has dropout at {path!r} that is active: its outputs are random at given weights, so a task has no "
        f"likelihood; switch it off with {remedy} (the posterior over weights takes its part)"
    )


def _check_aliases(initial: Mapping[str, Any], remedy: str) -> None:
    """Refuse one array object under two paths: tied in the user's mind, two weights that part company in ours."""
    seen: dict[int, str] = {}
    for path, leaf in initial.items():
        first = seen.setdefault(id(leaf), path)
        if first != path:
            raise ValueError(
                f"network: {first!r} and {path!r} hold one and the same array, which ties nothing: they would be two "
                f"weights; to tie them {remedy}, to keep them apart copy the array"
            )


def _check(initial: Mapping[str, Any]) -> None:
    if not initial:
        raise ValueError("network has no weights: it holds no floating-point array")
    for path, leaf in initial.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"network: {path!r} has dtype {jnp.result_type(leaf)}; weights must be floating-point arrays"
            )
