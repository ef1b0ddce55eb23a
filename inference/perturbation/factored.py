"""Networks run with perturbed kernels that are never formed.

    dense          y = ((x s) W_0) r + (x V c) U
    convolution    y = (conv(x s, W_0)) r + box(x V c) U        box sums over the window, with its strides and padding

The network is traced, and at the product or convolution that holds a shared kernel the right side takes its place: any
function of the weights serves, a log likelihood as well as outputs. A gradient then costs no product of the kernel's size but
those with W_0 itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Literal,
)

from ssm_nn.inference.perturbation.blocks import Block, Factors, Name
from ssm_nn.layers import View, bound, moved_view

__all__ = ["find_blocks", "run_perturbed"]

Array = Any
Arrays = Mapping[str, Mapping[str, Any]]

ACCEPTED = (
    "a shared kernel must meet the data in one matrix product or one ungrouped convolution; declare other leaves as the "
    "task's own (patterns of `own`)"
)


class _Handler(Protocol):
    def product(self, view: View, equation: Any, values: list[Array], side: int) -> Array: ...

    def convolution(self, view: View, equation: Any, values: list[Array]) -> Array: ...


def find_blocks(
    function: Callable[[Arrays], Any], arrays: Arrays, shared: set[Name], cap: int | None
) -> tuple[Block, ...]:
    """The blocks of the leaves ``shared``, by abstract evaluation, in the order in which the data meet them.

    Args:
        function: of the weights, such as the outputs of one example.
        arrays: network -> path -> leaf.
        shared: names of the leaves that every task perturbs.
        cap: most directions a layer; None is min(I, O).

    Raises:
        ValueError: for a leaf that is no kernel of a dense or convolutional layer, or that is used more than once.
    """
    finder = _Finder({name: jnp.shape(arrays[name[0]][name[1]]) for name in shared}, cap)
    jax.eval_shape(lambda arrays: _run(function, arrays, shared, finder), arrays)
    for name in sorted(shared - {block.name for block in finder.blocks}):
        raise ValueError(f"the weights {'.'.join(name)} meet no data: {ACCEPTED}")
    return tuple(finder.blocks)


def run_perturbed(function: Callable[[Arrays], Any], arrays: Arrays, factors: Mapping[Name, Factors]) -> Any:
    """``function`` at the kernels that ``factors`` make of those in ``arrays``; the other leaves are taken as they are."""
    return _run(function, arrays, set(factors), _Perturber(factors))


def _run(function: Callable[[Arrays], Any], arrays: Arrays, shared: set[Name], handler: _Handler) -> Any:
    named = {(network, path): leaf for network, leaves in arrays.items() for path, leaf in leaves.items()}

    def flat(leaves):
        nested: dict[str, dict[str, Array]] = {}
        for (network, path), leaf in zip(named, leaves, strict=True):
            nested.setdefault(network, {})[path] = leaf
        return function(nested)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(list(named.values()))
    tags = [
        View(name, tuple(range(jnp.ndim(leaf))), int(np.size(leaf))) if name in shared else None
        for name, leaf in named.items()
    ]
    results, last = _walk(closed, list(named.values()), tags, handler)
    for tag in last:
        if tag is not None:
            _refuse(tag, "output")
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _walk(closed: ClosedJaxpr, values: list[Array], tags: list[Any], handler: _Handler) -> tuple[list[Array], list]:
    jaxpr = closed.jaxpr
    env: dict[Any, tuple[Array, Any]] = {}
    for variable, const in zip(jaxpr.constvars, closed.consts, strict=True):
        env[variable] = const, None
    for variable, value, tag in zip(jaxpr.invars, values, tags, strict=True):
        env[variable] = value, tag

    def read(atom):
        return (atom.val, None) if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        got = [read(atom) for atom in equation.invars]
        results = _evaluate(equation, [g[0] for g in got], [g[1] for g in got], handler)
        for variable, result in zip(equation.outvars, results, strict=True):
            env[variable] = result
    read_out = [read(atom) for atom in jaxpr.outvars]
    return [r[0] for r in read_out], [r[1] for r in read_out]


def _evaluate(equation: Any, values: list[Array], tags: list[Any], handler: _Handler) -> list[tuple[Array, Any]]:
    if all(tag is None for tag in tags):
        return [(value, None) for value in bound(equation, values)]
    name, params = equation.primitive.name, equation.params
    inner = params.get("jaxpr") if name in ("jit", "pjit", "closed_call") else None
    if inner is not None and isinstance(inner, ClosedJaxpr):
        return list(zip(*_walk(inner, values, tags, handler), strict=True)) if inner.jaxpr.outvars else []
    moved = moved_view(name, params, tags[0], equation)
    if moved is not None:
        return [(bound(equation, values)[0], moved)]
    if name == "dot_general" and (tags[0] is None) != (tags[1] is None):
        side = 0 if tags[0] is not None else 1
        return [(handler.product(tags[side], equation, values, side), None)]
    if name == "conv_general_dilated" and tags[0] is None:
        return [(handler.convolution(tags[1], equation, values), None)]
    return _refuse(next(tag for tag in tags if tag is not None), name)


def _refuse(view: View, how: str) -> Any:
    raise ValueError(f"the weights {'.'.join(view.name)} meet the data in {how!r}: {ACCEPTED}")


@dataclass
class _Finder:
    """Notes what each kernel's axes are."""

    shapes: Mapping[Name, tuple[int, ...]]
    cap: int | None
    blocks: list[Block] = field(default_factory=list)

    def product(self, view: View, equation: Any, values: list[Array], side: int) -> Array:
        (contract, batch) = equation.params["dimension_numbers"]
        free = [i for i in range(len(view.axes)) if i not in contract[side]]
        if batch[0] or len(free) != 1 or -1 in view.axes:
            _refuse(view, "a batched or outer product")
        inputs = tuple(view.axes[i] for i in contract[side])
        self._note(view, inputs, (), view.axes[free[0]])
        return bound(equation, values)[0]

    def convolution(self, view: View, equation: Any, values: list[Array]) -> Array:
        params = equation.params
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1 or -1 in view.axes:
            _refuse(view, "a grouped convolution")
        out_dim, in_dim, *window = params["dimension_numbers"].rhs_spec
        window = tuple(view.axes[i] for i in window)
        self._note(view, (view.axes[in_dim],), window, view.axes[out_dim])
        return bound(equation, values)[0]

    def _note(self, view: View, inputs: tuple[int, ...], window: tuple[int, ...], output: int) -> None:
        if any(block.name == view.name for block in self.blocks):
            raise ValueError(
                f"the weights {'.'.join(view.name)} are used more than once (tied weights, or a network called twice a "
                f"task): {ACCEPTED}"
            )
        shape = self.shapes[view.name]
        missing = tuple(sorted(set(range(len(shape))) - {*inputs, *window, output}))  # axes of size 1, squeezed away
        block = Block(view.name, shape, (*missing, *inputs), window, output, 0)
        limits = [block.num_inputs, block.num_outputs, *([] if self.cap is None else [self.cap])]
        self.blocks.append(block._replace(cap=min(limits)))


@dataclass
class _Perturber:
    """Puts the perturbed product in the place of the plain one."""

    factors: Mapping[Name, Factors]

    def product(self, view: View, equation: Any, values: list[Array], side: int) -> Array:
        f, (contract, _) = self.factors[view.name], equation.params["dimension_numbers"]
        weights, data = values[side], values[1 - side]
        free = next(i for i in range(weights.ndim) if i not in contract[side])
        matrix = weights.transpose((*contract[side], free)).reshape(-1, weights.shape[free])
        rows = jnp.moveaxis(data, contract[1 - side], range(-len(contract[1 - side]), 0))
        lead = rows.shape[: rows.ndim - len(contract[1 - side])]
        rows = rows.reshape(*lead, matrix.shape[0])
        result = ((rows * f.inputs) @ matrix) * f.outputs + ((rows @ f.left) * f.keep) @ f.right
        wanted = equation.outvars[0].aval
        return (result if side == 1 else jnp.moveaxis(result, -1, 0)).astype(wanted.dtype)

    def convolution(self, view: View, equation: Any, values: list[Array]) -> Array:
        f, params, (data, kernel) = self.factors[view.name], equation.params, values
        numbers = params["dimension_numbers"]
        batch, channel, *spatial = numbers.lhs_spec
        out_batch, out_channel, *out_spatial = numbers.out_spec
        _, _, *window = numbers.rhs_spec
        plain = bound(equation, [data * _along(f.inputs, channel, data.ndim), kernel])[0]
        # channels last, where the products with V and U stand
        low = jnp.transpose(data, (batch, *spatial, channel)) @ (f.left * f.keep)

        def everywhere(of_window: Any, elsewhere: Any) -> tuple:
            return (elsewhere, *of_window, elsewhere)

        summed = lax.reduce_window(
            low,
            np.zeros((), low.dtype),
            lax.add,
            everywhere([kernel.shape[i] for i in window], 1),
            everywhere(params["window_strides"], 1),
            everywhere([tuple(pair) for pair in params["padding"]], (0, 0)),
            everywhere(params["lhs_dilation"], 1),
            everywhere(params["rhs_dilation"], 1),
        )
        back = np.argsort((out_batch, *out_spatial, out_channel)).tolist()
        added = jnp.transpose(summed @ f.right, back)
        return plain * _along(f.outputs, out_channel, plain.ndim) + added


def _along(values: Array, axis: int, rank: int) -> Array:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])
