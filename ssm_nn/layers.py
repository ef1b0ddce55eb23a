"""Dense and convolutional layers found in a network by tracing it: their inputs, and the gradients at their outputs.

A layer is a leaf W that meets the data in one matrix product or convolution, y = a W (+ b), and nowhere else; a leaf b that is
added to y belongs to it. Its gradient is a sum over positions of outer products,

    d outputs / d [W; b] = sum_p [a_p; 1] g_p^T,   a_p (I,) input of position p, g_p (O,) gradient at the output there

(one position for a dense layer, one for each place of the window for a convolution). Nothing is asked of the network but
that it can be traced: flax.nnx, equinox and (apply, params) are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Literal,
)

__all__ = [
    "Layer",
    "TiedWeightsError",
    "Traced",
    "View",
    "bound",
    "find_layers",
    "moved_view",
    "read_data_alone",
    "run_layers",
    "run_with_products",
]

Array = Any
Arrays = Mapping[str, Mapping[str, Any]]
Name = tuple[str, str]  # network, path
Perturbations = Sequence[Array] | Callable[[int, Array], Array | None]
Products = Mapping[Name, Array]


class Layer(NamedTuple):
    """One layer, as static data.

    Attributes:
        kernel, bias: (network, path) of the leaves; no bias is None.
        input_axes, output_axis: of the kernel's leaf; rows of the layer's matrix run over the input axes in this order.
        positions: outputs of one example that share the weights.
        num_inputs, num_outputs: I without the bias, and O.
    """

    kernel: Name
    bias: Name | None
    input_axes: tuple[int, ...]
    output_axis: int
    positions: int
    num_inputs: int
    num_outputs: int


class Traced(NamedTuple):
    """``outputs`` (K,) of one example, and for each layer its inputs (positions, I)."""

    outputs: Array
    inputs: tuple[Array, ...]


class View(NamedTuple):
    """A leaf of ``size`` numbers, rearranged: axis i of the value is axis ``axes[i]`` of the leaf, -1 one that it has not."""

    name: Name
    axes: tuple[int, ...]
    size: int


class _Output(NamedTuple):
    """What a layer gives, rearranged: its outputs run along ``axis`` of the value."""

    layer: int
    axis: int


@dataclass
class _Tracer:
    """What a walk through the network finds, the perturbations that it adds to the layers' outputs, and products given."""

    perturbations: Perturbations | None
    products: Products = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    uses: dict[Name, list[str]] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)  # of each layer's output, before a bias is added or by the bias

    def use(self, view: View, primitive: str) -> None:
        self.uses.setdefault(view.name, []).append(primitive)


class TiedWeightsError(ValueError):
    """A leaf meets the data more than once, where a layer of its own was asked for.

    Attributes:
        fact: that, in words, without what is accepted instead: whoever catches it may accept something else.
    """

    def __init__(self, kernel: Name, uses: int):
        self.fact = (
            f"the weights {'.'.join(kernel)} are used {uses} times (tied weights, or a network called twice a task)"
        )
        super().__init__(
            f"{self.fact}: Kronecker factors belong to a layer that is used once; LowRank, Diagonal and Dense are accepted"
        )


def find_layers(outputs: Callable[[Arrays], Array], arrays: Arrays) -> tuple[Layer, ...]:
    """The layers of ``outputs``, by abstract evaluation. A leaf in none of them is one that no layer holds.

    Raises:
        TiedWeightsError: for a leaf that meets the data more than once.
    """
    tracer = _Tracer(None)
    jax.eval_shape(lambda arrays: _walk_all(outputs, arrays, tracer).outputs, arrays)
    for layer in tracer.layers:
        uses = tracer.uses[layer.kernel]
        if len(uses) > 1:
            raise TiedWeightsError(layer.kernel, len(uses))
    return tuple(
        _settled(layer, reads, tracer, arrays) for layer, reads in zip(tracer.layers, tracer.reads, strict=True)
    )


def _settled(layer: Layer, reads: int, tracer: _Tracer, arrays: Arrays) -> Layer:
    """The layer once all is seen: every axis of its leaf named, and a bias only where its gradient is that of the output."""
    network, path = layer.kernel
    missing = set(range(jnp.ndim(arrays[network][path]))) - {*layer.input_axes, layer.output_axis}  # of size 1
    alone = layer.bias is not None and len(tracer.uses[layer.bias]) == 1 and reads == 1
    return layer._replace(input_axes=(*sorted(missing), *layer.input_axes), bias=layer.bias if alone else None)


def run_layers(
    outputs: Callable[[Arrays], Array], arrays: Arrays, perturbations: Perturbations
) -> tuple[Array, tuple[Array, ...]]:
    """Outputs (K,), with ``perturbations`` (positions, O) added to the layers' outputs, and the layers' inputs.

    The gradient in a perturbation is g of its layer. A function in their place is called with a layer's number and its
    inputs (positions, I), as they are under the perturbations before it; None adds nothing.
    """
    traced = _walk_all(outputs, arrays, _Tracer(perturbations))
    return traced.outputs, traced.inputs


def run_with_products(outputs: Callable[[Arrays], Array], arrays: Arrays, products: Products) -> Array:
    """Outputs where some dense layers' products are given instead of made: kernel -> (positions, O).

    A kernel's leaf is then read for its shape alone; its bias is added as ever.

    Raises:
        ValueError: for a kernel that meets the data in no single matrix product.
    """
    tracer = _Tracer(None, products)
    traced = _walk_all(outputs, arrays, tracer)
    for name in products:
        if tracer.uses.get(name) != ["dot_general"]:
            raise ValueError(
                f"the weights {'.'.join(name)} meet the data in {tracer.uses.get(name)}; one product is accepted"
            )
    return traced.outputs


def read_data_alone(outputs: Callable[[Arrays], Array], arrays: Arrays) -> tuple[bool, ...]:
    """Whether what enters each layer depends on no weight: true of the first layer of most networks."""
    closed = jax.make_jaxpr(lambda arrays: run_layers(outputs, arrays, lambda number, rows: None)[1])(arrays)
    reached = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        if any(not isinstance(atom, Literal) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return tuple(isinstance(atom, Literal) or atom not in reached for atom in closed.jaxpr.outvars)


def _walk_all(outputs: Callable[[Arrays], Array], arrays: Arrays, tracer: _Tracer) -> Traced:
    named = {(network, path): leaf for network, leaves in arrays.items() for path, leaf in leaves.items()}

    def flat(leaves):
        nested: dict[str, dict[str, Array]] = {}
        for (network, path), leaf in zip(named, leaves, strict=True):
            nested.setdefault(network, {})[path] = leaf
        return outputs(nested)

    closed = jax.make_jaxpr(flat)(list(named.values()))
    tags = [View(name, tuple(range(jnp.ndim(leaf))), int(np.size(leaf))) for name, leaf in named.items()]
    ((result,), (tag,)) = _walk(closed, list(named.values()), tags, tracer)
    _read(tag, "output", tracer)
    return Traced(result, tuple(tracer.inputs))


def _walk(closed: ClosedJaxpr, values: list[Array], tags: list[Any], tracer: _Tracer) -> tuple[list[Array], list[Any]]:
    """Evaluate a program, following the leaves; a tag is a View, an _Output, or None."""
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
        results = _evaluate(equation, [g[0] for g in got], [g[1] for g in got], tracer)
        for variable, result in zip(equation.outvars, results, strict=True):
            env[variable] = result
    read_out = [read(atom) for atom in jaxpr.outvars]
    return [r[0] for r in read_out], [r[1] for r in read_out]


def _read(tag: Any, how: str, tracer: _Tracer) -> None:
    if isinstance(tag, View):
        tracer.use(tag, how)
    elif isinstance(tag, _Output):
        tracer.reads[tag.layer] += 1


def _evaluate(equation: Any, values: list[Array], tags: list[Any], tracer: _Tracer) -> list[tuple[Array, Any]]:
    name, params = equation.primitive.name, equation.params
    views = [tag if isinstance(tag, View) else None for tag in tags]
    if all(tag is None for tag in tags):
        return [(value, None) for value in bound(equation, values)]
    inner = params.get("jaxpr") if name in ("jit", "pjit", "closed_call") else None
    if inner is not None and isinstance(inner, ClosedJaxpr):
        return list(zip(*_walk(inner, values, tags, tracer), strict=True)) if inner.jaxpr.outvars else []
    moved = moved_view(name, params, tags[0], equation)
    if moved is not None:
        return [(bound(equation, values)[0], moved)]
    for tag in tags:
        if isinstance(tag, _Output):
            _read(tag, name, tracer)
    if name == "dot_general" and (views[0] is None) != (views[1] is None):
        return _product(equation, values, views, tracer)
    if name == "conv_general_dilated" and views[0] is None and views[1] is not None:
        return _convolution(equation, values, views[1], tracer)
    if name in ("add", "add_any"):
        for output, view in ((tags[0], views[1]), (tags[1], views[0])):
            if isinstance(output, _Output) and view is not None and _is_bias(tracer.layers[output.layer], output, view):
                tracer.use(view, "bias")
                tracer.layers[output.layer] = tracer.layers[output.layer]._replace(bias=view.name)
                return [(bound(equation, values)[0], None)]
    for view in views:
        if view is not None:
            tracer.use(view, name)
    return [(value, None) for value in bound(equation, values)]


def bound(equation: Any, values: list[Array]) -> list[Array]:
    """What an equation of a jaxpr gives for these inputs."""
    made = equation.primitive.get_bind_params(equation.params)
    subfuns, params = made if isinstance(made, tuple) else ((), made)  # a pair before JAX 0.12
    result = equation.primitive.bind(*subfuns, *values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def moved_view(name: str, params: Mapping[str, Any], tag: Any, equation: Any) -> Any:
    """The tag of a value that is its input in another arrangement; None where it is not."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if tag is None or name in ("convert_element_type", "copy", "copy_p"):
        return tag
    if isinstance(tag, _Output):
        return _moved_output(name, params, tag, before, after)
    if name == "transpose":
        return tag._replace(axes=tuple(tag.axes[i] for i in params["permutation"]))
    if name == "squeeze":
        return tag._replace(axes=tuple(a for i, a in enumerate(tag.axes) if i not in params["dimensions"]))
    if name == "reshape" and params.get("dimensions") is None and _without_ones(before) == _without_ones(after):
        kept = iter(a for a, n in zip(tag.axes, before, strict=True) if n != 1)
        return tag._replace(axes=tuple(next(kept) if n != 1 else -1 for n in after))
    if name == "broadcast_in_dim":
        axes = [-1] * len(after)
        for here, there in enumerate(params["broadcast_dimensions"]):
            if before[here] == after[there]:
                axes[there] = tag.axes[here]
        return tag._replace(axes=tuple(axes))
    return None


def _moved_output(
    name: str, params: Mapping[str, Any], tag: _Output, before: tuple[int, ...], after: tuple[int, ...]
) -> _Output | None:
    size = before[tag.axis]
    if name == "transpose":
        return tag._replace(axis=params["permutation"].index(tag.axis))
    if name == "squeeze" and tag.axis not in params["dimensions"]:
        return tag._replace(axis=tag.axis - sum(i < tag.axis for i in params["dimensions"]))
    if name == "broadcast_in_dim" and after[params["broadcast_dimensions"][tag.axis]] == size:
        return tag._replace(axis=params["broadcast_dimensions"][tag.axis])
    if name == "reshape" and params.get("dimensions") is None:
        # the axis stays whole where as many numbers stand in front of it as before
        same = [i for i, n in enumerate(after) if n == size and math.prod(after[:i]) == math.prod(before[: tag.axis])]
        return tag._replace(axis=same[0]) if same else None
    return None


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def _is_bias(layer: Layer, output: _Output, view: View) -> bool:
    """Whether a leaf of one number an output is added along the outputs, and the layer has no bias yet."""
    fits = layer.bias is None and view.size == layer.num_outputs
    return fits and (view.size == 1 or view.axes[output.axis] >= 0)


def _product(equation: Any, values: list[Array], views: list[Any], tracer: _Tracer) -> list[tuple[Array, Any]]:
    side = 0 if views[0] is not None else 1
    view, data = views[side], values[1 - side]
    (contract, batch) = equation.params["dimension_numbers"]
    weight_axes, data_axes = contract[side], contract[1 - side]
    free = [i for i in range(len(view.axes)) if i not in weight_axes]
    tracer.use(view, "dot_general")
    if batch[0] or len(free) != 1 or -1 in view.axes:
        tracer.use(view, "batched product")  # a second use: no layer of ours
        return [(bound(equation, values)[0], None)]
    rows = jnp.moveaxis(data, data_axes, range(-len(data_axes), 0))
    num_inputs = int(np.prod([data.shape[i] for i in data_axes], dtype=int))
    rows = rows.reshape(-1, num_inputs)
    layer = Layer(
        view.name,
        None,
        tuple(view.axes[i] for i in weight_axes),
        view.axes[free[0]],
        rows.shape[0],
        num_inputs,
        values[side].shape[free[0]],
    )
    # the outputs' axis stands last where the weights are the right operand, first where they are the left
    shape = equation.outvars[0].aval.shape
    place = len(shape) - 1 if side == 1 else 0
    given = tracer.products.get(view.name) if len(tracer.uses[view.name]) == 1 else None
    if given is None:
        result = bound(equation, values)[0]
    else:
        result = jnp.moveaxis(given.reshape(*np.delete(shape, place), layer.num_outputs), -1, place)
    return [_perturbed(result, place, layer, rows, tracer)]


def _convolution(equation: Any, values: list[Array], view: View, tracer: _Tracer) -> list[tuple[Array, Any]]:
    params, (data, _) = equation.params, values
    numbers = params["dimension_numbers"]
    tracer.use(view, "conv_general_dilated")
    result = bound(equation, values)[0]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1 or -1 in view.axes:
        tracer.use(view, "grouped convolution")
        return [(result, None)]
    out_dim, in_dim, *window = numbers.rhs_spec
    patches = jax.lax.conv_general_dilated_patches(
        data,
        [values[1].shape[i] for i in window],
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
    )
    # patches run over (input channel, window); the output's layout says where that axis stands
    channel = numbers.out_spec[1]
    num_inputs = patches.shape[channel]
    rows = jnp.moveaxis(patches, channel, -1).reshape(-1, num_inputs)
    layer = Layer(
        view.name,
        None,
        tuple(view.axes[i] for i in (in_dim, *window)),
        view.axes[out_dim],
        rows.shape[0],
        num_inputs,
        values[1].shape[out_dim],
    )
    return [_perturbed(result, channel, layer, rows, tracer)]


def _perturbed(result: Array, place: int, layer: Layer, rows: Array, tracer: _Tracer) -> tuple[Array, _Output]:
    output = _Output(len(tracer.layers), place)
    tracer.layers.append(layer)
    tracer.inputs.append(rows)
    tracer.reads.append(0)
    made = tracer.perturbations
    added = made(output.layer, rows) if callable(made) else made[output.layer] if made is not None else None
    if added is None:
        return result, output
    last = jnp.moveaxis(result, place, -1)
    return jnp.moveaxis(last + added.reshape(last.shape), -1, place), output
