"""Dense and convolutional layers found in a network by tracing it: their inputs, and the gradients at their outputs.

A layer is a leaf W that meets the data in one matrix product or convolution, y = a W (+ b), and nowhere else; a leaf b that is
added to y belongs to it. Its gradient is a sum over positions of outer products,

    d outputs / d [W; b] = sum_p [a_p; 1] g_p^T,   a_p (I,) input of position p, g_p (O,) gradient at the output there

(one position for a dense layer, one for each place of the window for a convolution). Nothing is asked of the network but
that it can be traced: flax.nnx, equinox and (apply, params) are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["Layer", "Traced", "find_layers", "run_layers"]

Array = Any
Arrays = Mapping[str, Mapping[str, Any]]
Name = tuple[str, str]  # network, path


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


class _View(NamedTuple):
    """A leaf seen through transpositions: axis i of the value is axis ``axes[i]`` of the leaf, -1 an axis of size 1."""

    name: Name
    axes: tuple[int, ...]


@dataclass
class _Tracer:
    """What a walk through the network finds, and the perturbations that it adds to the layers' outputs."""

    perturbations: Sequence[Array] | None
    layers: list[Layer] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    uses: dict[Name, list[str]] = field(default_factory=dict)

    def use(self, view: _View, primitive: str) -> None:
        self.uses.setdefault(view.name, []).append(primitive)


def find_layers(outputs: Callable[[Arrays], Array], arrays: Arrays) -> tuple[Layer, ...]:
    """The layers of ``outputs``, by abstract evaluation. A leaf in none of them is one that no layer holds.

    Raises:
        ValueError: for a leaf that meets the data more than once (tied weights).
    """
    tracer = _Tracer(None)
    jax.eval_shape(lambda arrays: _walk_all(outputs, arrays, tracer).outputs, arrays)
    for layer in tracer.layers:
        uses = tracer.uses[layer.kernel]
        if len(uses) > 1:
            raise ValueError(
                f"the weights {'.'.join(layer.kernel)} are used {len(uses)} times (tied weights, or a network called twice a "
                "task): Kronecker factors belong to a layer that is used once; LowRank, Diagonal and Dense are accepted"
            )
    biased = [layer.bias for layer in tracer.layers if layer.bias is not None]
    return tuple(
        layer._replace(bias=None) if layer.bias is not None and len(tracer.uses[layer.bias]) > 1 else layer
        for layer in tracer.layers
        if biased.count(layer.kernel) == 0
    )


def run_layers(
    outputs: Callable[[Arrays], Array], arrays: Arrays, perturbations: Sequence[Array]
) -> tuple[Array, tuple[Array, ...]]:
    """Outputs (K,), with ``perturbations`` (positions, O) added to the layers' outputs, and the layers' inputs.

    The gradient in a perturbation is g of its layer.
    """
    traced = _walk_all(outputs, arrays, _Tracer(perturbations))
    return traced.outputs, traced.inputs


def _walk_all(outputs: Callable[[Arrays], Array], arrays: Arrays, tracer: _Tracer) -> Traced:
    named = {(network, path): leaf for network, leaves in arrays.items() for path, leaf in leaves.items()}

    def flat(leaves):
        nested: dict[str, dict[str, Array]] = {}
        for (network, path), leaf in zip(named, leaves, strict=True):
            nested.setdefault(network, {})[path] = leaf
        return outputs(nested)

    closed = jax.make_jaxpr(flat)(list(named.values()))
    tags = [_View(name, tuple(range(jnp.ndim(leaf)))) for name, leaf in named.items()]
    ((result,), _) = _walk(closed, list(named.values()), tags, tracer)
    return Traced(result, tuple(tracer.inputs))


def _walk(closed: ClosedJaxpr, values: list[Array], tags: list[Any], tracer: _Tracer) -> tuple[list[Array], list[Any]]:
    """Evaluate a program, following the leaves; a tag is a _View, the number of the layer that made a value, or None."""
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
    for _, tag in read_out:
        if isinstance(tag, _View):
            tracer.use(tag, "output")
    return [r[0] for r in read_out], [r[1] for r in read_out]


def _evaluate(equation: Any, values: list[Array], tags: list[Any], tracer: _Tracer) -> list[tuple[Array, Any]]:
    name, params = equation.primitive.name, equation.params
    views = [tag if isinstance(tag, _View) else None for tag in tags]
    if all(tag is None for tag in tags):
        return [(value, None) for value in _bound(equation, values)]
    inner = params.get("jaxpr") if name in ("jit", "pjit", "closed_call") else None
    inner = params.get("call_jaxpr", inner) if name in ("custom_jvp_call", "custom_vjp_call") and any(views) else inner
    if inner is not None and isinstance(inner, ClosedJaxpr):
        return list(zip(*_walk(inner, values, tags, tracer), strict=True)) if inner.jaxpr.outvars else []
    if name == "dot_general" and (views[0] is None) != (views[1] is None):
        return _product(equation, values, views, tracer)
    if name == "conv_general_dilated" and views[0] is None and views[1] is not None:
        return _convolution(equation, values, views[1], tracer)
    moved = _moved(name, params, tags, equation)
    if moved is not None:
        return [(_bound(equation, values)[0], moved)]
    if name in ("add", "add_any"):
        for layer, view in ((tags[0], views[1]), (tags[1], views[0])):
            if isinstance(layer, int) and view is not None and _is_bias(tracer.layers[layer], view, equation):
                tracer.use(view, "bias")
                tracer.layers[layer] = tracer.layers[layer]._replace(bias=view.name)
                return [(_bound(equation, values)[0], None)]
    for view in views:
        if view is not None:
            tracer.use(view, name)
    return [(value, None) for value in _bound(equation, values)]


def _bound(equation: Any, values: list[Array]) -> list[Array]:
    made = equation.primitive.get_bind_params(equation.params)
    subfuns, params = made if isinstance(made, tuple) else ((), made)  # a pair before JAX 0.12
    result = equation.primitive.bind(*subfuns, *values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _moved(name: str, params: Mapping[str, Any], tags: list[Any], equation: Any) -> Any:
    """The tag of a value that is its input in another arrangement; None where it is not."""
    tag = tags[0]
    if name in ("convert_element_type", "copy", "copy_p"):
        return tag
    if isinstance(tag, int):
        # a layer's output keeps its number only where its axes stay: squeezing and reshaping of size 1 at the front
        shape = equation.outvars[0].aval.shape
        before = equation.invars[0].aval.shape
        same_end = bool(shape) and bool(before) and shape[-1] == before[-1]
        return tag if name in ("reshape", "squeeze", "broadcast_in_dim") and same_end and len(tags) == 1 else None
    if not isinstance(tag, _View):
        return None
    if name == "transpose":
        return _View(tag.name, tuple(tag.axes[i] for i in params["permutation"]))
    if name == "squeeze":
        return _View(tag.name, tuple(a for i, a in enumerate(tag.axes) if i not in params["dimensions"]))
    if name == "reshape" and params.get("dimensions") is None:
        before = [n for n in equation.invars[0].aval.shape if n != 1]
        after = equation.outvars[0].aval.shape
        if before == [n for n in after if n != 1]:
            kept = iter(a for a, n in zip(tag.axes, equation.invars[0].aval.shape, strict=True) if n != 1)
            return _View(tag.name, tuple(next(kept) if n != 1 else -1 for n in after))
    if name == "broadcast_in_dim":
        shape, dims = params["shape"], params["broadcast_dimensions"]
        axes = [-1] * len(shape)
        for here, there in enumerate(dims):
            if equation.invars[0].aval.shape[here] == shape[there]:
                axes[there] = tag.axes[here]
        return _View(tag.name, tuple(axes))
    return None


def _is_bias(layer: Layer, view: _View, equation: Any) -> bool:
    """Whether a one-dimensional leaf is added along the last axis of a layer's output, and the layer has no bias yet."""
    shape = equation.outvars[0].aval.shape
    return (
        layer.bias is None
        and view.axes[-1:] == (0,)
        and set(view.axes[:-1]) <= {-1}
        and (shape[-1] == layer.num_outputs)
    )


def _product(equation: Any, values: list[Array], views: list[Any], tracer: _Tracer) -> list[tuple[Array, Any]]:
    side = 0 if views[0] is not None else 1
    view, data = views[side], values[1 - side]
    (contract, batch) = equation.params["dimension_numbers"]
    weight_axes, data_axes = contract[side], contract[1 - side]
    free = [i for i in range(len(view.axes)) if i not in weight_axes]
    tracer.use(view, "dot_general")
    result = _bound(equation, values)[0]
    if batch[0] or len(free) != 1 or -1 in view.axes:
        tracer.use(view, "batched product")  # a second use: no layer of ours
        return [(result, None)]
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
    place = result.ndim - 1 if side == 1 else 0
    return [
        (_perturbed(result, place, layer, rows, tracer), len(tracer.layers) - 1 if place == result.ndim - 1 else None)
    ]


def _convolution(equation: Any, values: list[Array], view: _View, tracer: _Tracer) -> list[tuple[Array, Any]]:
    params, (data, _) = equation.params, values
    numbers = params["dimension_numbers"]
    tracer.use(view, "conv_general_dilated")
    result = _bound(equation, values)[0]
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
    made = _perturbed(result, channel, layer, rows, tracer)
    return [(made, len(tracer.layers) - 1 if channel == result.ndim - 1 else None)]


def _perturbed(result: Array, place: int, layer: Layer, rows: Array, tracer: _Tracer) -> Array:
    number = len(tracer.layers)
    tracer.layers.append(layer)
    tracer.inputs.append(rows)
    if tracer.perturbations is None:
        return result
    last = jnp.moveaxis(result, place, -1)
    return jnp.moveaxis(last + tracer.perturbations[number].reshape(last.shape), -1, place)
