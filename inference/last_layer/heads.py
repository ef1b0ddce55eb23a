"""A linear head on fixed features: what a last-layer engine sees of a feature matrix, a network or a program.

    f_n = W phi_n,  W (K, D),  prior N(loc, diag(scale^2)) with one scale for each feature

The engine works with whitened weights V = W / scale and features phi * scale, whose prior covariance is the identity. A bias
is a feature that is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.layers import Layer, find_layers, run_layers
from ssm_nn.moments import Leaf, Moments, Transition, check_moments, moments_of
from ssm_nn.networks import as_network

__all__ = ["Head", "feature_head", "network_head"]

Array = Any


def _holds_y(batch: Mapping[str, Any]) -> bool:
    return "y" in batch


def _y_of(batch: Mapping[str, Any]) -> Any:
    return _array(batch, "y")


@dataclass(frozen=True)
class _GivenFeatures:
    """Features that lie in the batch, and a 1; a class, so that estimators that hold it can be pickled."""

    num_features: int
    intercept: bool

    def __call__(self, batch: Mapping[str, Any]) -> np.ndarray:
        x = np.asarray(_array(batch, "x"))
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {x.shape}; (n, {self.num_features}) is accepted")
        x = x.astype(_float(), copy=False)
        return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1) if self.intercept else x


@dataclass(frozen=True, eq=False)
class Head:
    """What the engine reads; made by ``feature_head``, ``network_head`` and ``program_head``.

    Attributes:
        likelihood: of the outputs.
        features: from a batch (a mapping of arrays) to phi (n, D), the bias counted.
        labels: from a batch to the labels as they are; the likelihood checks them.
        loc, scale: (K, D) and (D,) of the prior.
        gain, shift, noise: of the step between batches; (D,), (K, D), (D,), in units of W.
        inputs: name of the array that the features are made of.
        has_labels: whether a batch holds labels.
    """

    likelihood: HeadLikelihood
    features: Callable[[Mapping[str, Any]], Array]
    labels: Callable[[Mapping[str, Any]], Any]
    loc: Array
    scale: Array
    gain: Array
    shift: Array
    noise: Array
    inputs: str = "x"
    has_labels: Callable[[Mapping[str, Any]], bool] = _holds_y

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.likelihood.num_outputs

    @property
    def num_features(self) -> int:
        """D."""
        return int(np.shape(self.scale)[0])

    @property
    def moving(self) -> bool:
        """Whether anything happens between batches."""
        return bool(np.any(self.gain != 1) or np.any(self.shift != 0) or np.any(self.noise != 0))

    def with_scale(self, scale: Any) -> Head:
        """At another prior scale, one number or (D,)."""
        scale = np.broadcast_to(np.asarray(scale, self.scale.dtype), self.scale.shape)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"scale is {scale}; finite numbers > 0 are accepted")
        return replace(self, scale=scale)

    def filled(self, num_new: int) -> Head:
        """With ``num_new`` features more that are always 0, whose weights learn nothing: for a number that a mesh divides."""
        if not num_new:
            return self

        def wide(rows: np.ndarray, value: float) -> np.ndarray:
            return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, num_new)], constant_values=value)

        return replace(
            self,
            features=lambda batch: wide(np.asarray(self.features(batch)), 0.0),
            loc=wide(self.loc, 0.0),
            scale=wide(self.scale, 1.0),
            gain=wide(self.gain, 1.0),
            shift=wide(self.shift, 0.0),
            noise=wide(self.noise, 0.0),
        )

    def grown(self, num_new: int) -> Head:
        """With more classes, whose weights have the prior of the first."""
        likelihood = self.likelihood.grown(num_new)

        def wide(rows: np.ndarray) -> np.ndarray:
            if not (rows == rows[:1]).all():
                raise ValueError("the prior's mean or the step's shift differs between classes; new ones have none")
            return np.concatenate([rows, np.repeat(rows[:1], num_new, axis=0)])

        return replace(self, likelihood=likelihood, loc=wide(self.loc), shift=wide(self.shift))


def feature_head(
    likelihood: HeadLikelihood,
    num_features: int,
    *,
    prior_precision: float = 1.0,
    intercept: bool = True,
    transition: Transition | Callable[[Leaf], Moments] | None = None,
) -> Head:
    """``W_kd ~ N(0, 1 / prior_precision)`` on features that are given: batches hold "x" (n, num_features) and "y".

    Args:
        likelihood: ``Categorical(K)``, ``Bernoulli()``, ``Poisson()`` or ``Gaussian(noise_scale, K)``.
        num_features: columns of "x".
        prior_precision: tau > 0, of the bias as well.
        intercept: append a feature that is 1.
        transition: the step between batches, ``RandomWalk(scale)`` for example; None keeps the head as it is.

    Raises:
        ValueError: for a prior precision that is not positive, and for batches of another width.
    """
    if not hasattr(likelihood, "weigh"):
        raise ValueError(
            f"likelihood is {likelihood!r}; Categorical(K), Bernoulli(), Poisson() and Gaussian(noise_scale) are accepted"
        )
    if isinstance(num_features, bool) or not isinstance(num_features, int | np.integer) or num_features < 1:
        raise ValueError(f"num_features is {num_features!r}; a whole number >= 1 is accepted")
    if not 0 < prior_precision < float("inf"):
        raise ValueError(f"prior_precision is {prior_precision}; a finite number > 0 is accepted")

    width = int(num_features) + bool(intercept)
    features = _GivenFeatures(int(num_features), bool(intercept))
    return _made(likelihood, features, width, np.full(width, prior_precision**-0.5), transition)


def network_head(
    network: Any,
    likelihood: HeadLikelihood,
    example: Any,
    *,
    prior_precision: float = 1.0,
    layer: str | None = None,
    transition: Transition | Callable[[Leaf], Moments] | None = None,
) -> Head:
    """The last layer of a network on the features below it, which stay as they are.

    Args:
        network: a flax.nnx module, an equinox module, or a pair (apply, params); called with a batch, or where it takes none
            with one example.
        likelihood: as for ``feature_head``; its outputs are the network's.
        example: inputs (n, ...) as the network takes them; values are read to check what was found.
        prior_precision: tau > 0 of the head's weights and bias.
        layer: path of the head's weights, where the layer that gives the outputs is not to be searched.
        transition: as for ``feature_head``.

    Raises:
        ValueError: no such layer, or one whose output is not that of the network.
    """
    if not 0 < prior_precision < float("inf"):
        raise ValueError(f"prior_precision is {prior_precision}; a finite number > 0 is accepted")
    made = as_network(network)
    arrays = {"net": made.initial}
    apply, _ = over_examples(lambda arrays, x: made.bind(arrays["net"])(x), arrays, example)
    found = find_head(apply, arrays, example, layer)
    if found.num_outputs != likelihood.num_outputs:
        raise ValueError(f"the network has {found.num_outputs} outputs, the likelihood {likelihood.num_outputs}")
    scale = np.full(found.num_features, prior_precision**-0.5)
    features = lambda batch: found.features(arrays, _array(batch, "x"))  # noqa: E731
    return _made(likelihood, features, found.num_features, scale, transition)


def over_examples(
    apply: Callable[[Any, Any], Array], arrays: Any, example: Any
) -> tuple[Callable[[Any, Any], Array], bool]:
    """``apply`` for a batch, and whether it had to be mapped, since the network takes one example, as equinox modules do."""
    rows = [jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(example)]
    # as many examples as nothing else in their shapes is long: what fits, is not taken for a batch by chance
    num = max([1, *(length for row in rows for length in row)]) + 1
    many = jax.tree.map(lambda a: jax.ShapeDtypeStruct((num, *jnp.shape(a)[1:]), jnp.asarray(a).dtype), example)
    each = lambda arrays, x: jax.vmap(lambda row: apply(arrays, row))(x)  # noqa: E731
    refusals = []
    for called, mapped in ((apply, False), (each, True)):
        try:
            if jax.eval_shape(called, arrays, many).shape[:1] == (num,):
                return called, mapped
        except Exception as refusal:  # whatever a network raises where it is given what it does not take
            refusals.append(str(refusal))
    raise ValueError(
        f"the network takes neither a batch of examples of shape {rows} nor one of them: {'; '.join(refusals)}"
    )


def _made(
    likelihood: HeadLikelihood,
    features: Callable[[Mapping[str, Any]], Array],
    width: int,
    scale: np.ndarray,
    transition: Transition | Callable[[Leaf], Moments] | None,
) -> Head:
    shape, dtype = (likelihood.num_outputs, width), _float()
    gain, shift, noise = np.ones(width, dtype), np.zeros(shape, dtype), np.zeros(width, dtype)
    if transition is not None:
        leaf = Leaf("head", shape, 0.0, scale)
        moments = moments_of(transition, leaf)
        check_moments(moments, leaf)
        gain, shift, noise = step_of(moments, shape, dtype)
    return Head(
        likelihood,
        features,
        _y_of,
        np.zeros(shape, dtype),
        scale.astype(dtype),
        gain,
        shift,
        noise,
    )


def step_of(moments: Moments, shape: tuple[int, int], dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain (D,), shift (K, D) and noise (D,) of a step; ValueError where gain or noise differ between outputs."""
    if moments.permutation is not None:
        raise ValueError("the transition permutes the head; gains, shifts and noises are accepted")
    wide = [np.broadcast_to(np.asarray(part, dtype), shape) for part in (moments.gain, moments.shift, moments.noise)]
    return one_row("gain", wide[0]), wide[1], one_row("noise", wide[2])


def one_row(name: str, rows: np.ndarray) -> np.ndarray:
    """The row (D,) that all outputs share."""
    if not np.allclose(rows, rows[:1]):
        raise ValueError(f"the {name} of the head's weights differs between outputs; one for each feature is accepted")
    return np.array(rows[0])


@dataclass(frozen=True, eq=False)
class FoundHead:
    """A network's last layer: where its weights lie, and what it sees under ``arrays``: features (n, D), the bias counted."""

    layer: Layer
    features: Callable[[Mapping[str, Mapping[str, Any]], Any], Array]
    num_features: int
    num_outputs: int

    def matrix(self, arrays: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
        """(K, D) of what lies at the layer's leaves: weights, variances, gains."""
        network, path = self.layer.kernel
        leaf = np.asarray(arrays[network][path]).transpose(*self.layer.input_axes, self.layer.output_axis)
        rows = leaf.reshape(-1, self.num_outputs).T
        if self.layer.bias is None:
            return rows
        network, path = self.layer.bias
        return np.concatenate([rows, np.asarray(arrays[network][path]).reshape(-1, 1)], axis=1)


def find_head(
    apply: Callable[[Any, Any], Array], arrays: Mapping[str, Mapping[str, Any]], example: Any, name: str | None = None
) -> FoundHead:
    """The layer that gives the outputs of ``apply(arrays, x)``, searched or named; checked on ``example``."""
    first = jax.tree.map(lambda a: jnp.asarray(a)[:1], example)

    def outputs(arrays: Any, x: Any = first) -> Array:
        return jnp.ravel(apply(arrays, x))

    layers = find_layers(outputs, arrays)
    place = _place(layers, name)
    layer = layers[place]
    label = ".".join(layer.kernel)
    if layer.positions != 1:
        raise ValueError(f"the layer {label!r} is used at {layer.positions} positions of an example; a head has one")

    def perturbations(change: Array) -> list[Array]:
        still = [jnp.zeros((one.positions, one.num_outputs), change.dtype) for one in layers]
        return [change[None] if n == place else zero for n, zero in enumerate(still)]

    dtype = jnp.result_type(*jax.tree.leaves(arrays))
    change = jnp.arange(1.0, layer.num_outputs + 1).astype(dtype)
    before, _ = run_layers(outputs, arrays, perturbations(0 * change))
    after, _ = run_layers(outputs, arrays, perturbations(change))
    scale = jnp.max(jnp.abs(before)) + layer.num_outputs
    if before.shape != change.shape or not jnp.allclose(after - before, change, rtol=0, atol=1e-4 * scale):
        raise ValueError(f"the outputs of the layer {label!r} are not those of the network; name its last layer")

    @jax.jit
    def traced(arrays: Mapping[str, Mapping[str, Any]], x: Any) -> Array:
        def one(row):
            single = jax.tree.map(lambda a: a[None], row)
            _, inputs = run_layers(lambda arrays: outputs(arrays, single), arrays, perturbations(0 * change))
            return inputs[place][0]

        phi = jax.vmap(one)(jax.tree.map(jnp.asarray, x))
        return phi if layer.bias is None else jnp.concatenate([phi, jnp.ones((len(phi), 1), phi.dtype)], axis=1)

    def features(arrays: Mapping[str, Mapping[str, Any]], x: Any) -> Array:
        x = jnp.asarray(x) if isinstance(first, jax.Array) else x  # a list too
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
        wanted = [leaf.shape[1:] for leaf in jax.tree.leaves(first)]
        if [shape[1:] for shape in shapes if shape] != wanted:
            words = ", ".join(str(("n", *shape)).replace("'", "") for shape in wanted)
            raise ValueError(f"the inputs have shape {', '.join(map(str, shapes))}; {words} is accepted")
        return traced(arrays, x)

    found = FoundHead(layer, features, layer.num_inputs + (layer.bias is not None), layer.num_outputs)
    linear = features(arrays, first)[0] @ found.matrix(arrays).T
    if not jnp.allclose(linear, before, rtol=0, atol=1e-4 * scale):
        raise ValueError(f"the outputs of the network are not a linear function of what the layer {label!r} sees")
    return found


def _place(layers: tuple[Layer, ...], name: str | None) -> int:
    labels = [".".join(layer.kernel) for layer in layers]
    if not layers:
        raise ValueError("the network has no dense layer whose weights meet the data once")
    if name is None:
        return len(layers) - 1
    for place, (label, layer) in enumerate(zip(labels, layers, strict=True)):
        if name in (label, layer.kernel[1]):
            return place
    raise ValueError(f"layer is {name!r}; the layers found are {labels}")


def _array(batch: Mapping[str, Any], name: str) -> Any:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a mapping of arrays, not {type(batch).__name__}")
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}; it has {sorted(batch)}")
    return batch[name]


def _float() -> Any:
    return jax.dtypes.canonicalize_dtype(float)
