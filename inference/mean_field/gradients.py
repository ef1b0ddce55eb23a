"""Expected gradient and curvature of a batch under a mean-field belief, by reparameterisation.

    C(mu, sigma) = E_{w ~ N(mu, diag sigma^2)} [ - sum_n log p(y_n | x_n, w) ]
    g = dC/dmu = E[grad],   H = (dC/dsigma) / sigma = 2 dC/d(sigma^2) = E[diagonal of the Hessian]

``WeightSampling`` draws whole networks, w = mu + sigma e. ``LocalReparameterisation`` draws the outputs of each layer
instead, one by one and for every example,

    z = a M + b + sqrt(a^2 V + v_b) e,     M, V means and variances of the layer's weights, b, v_b of its bias,

which has the same expectations (Kingma, Salimans, Welling 2015, arXiv 1506.02557): given the input a the outputs of a layer
are independent normals, and an example's loss knows of the layer's weights through them alone. That holds for a leaf that
meets an example in one product with one vector. It does not where weights are shared inside an example: a convolution's
outputs at two places are correlated, and drawing them apart would change C. So layers with several positions, tied weights and
all other leaves (scales of a normalisation, ...) are drawn as weights, in the same pass; of layers a warning says so. They are
found by tracing the program's likelihood, whatever library the network comes from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Arrays, StateSpace
from ssm_nn.inference.batches import single
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.predictive import class_log_probabilities
from ssm_nn.layers import Layer, TiedWeightsError, find_layers, run_layers
from ssm_nn.tasks import Task

__all__ = [
    "Estimator",
    "Gathered",
    "LocalReparameterisation",
    "Outcome",
    "WeightSampling",
    "drawn_as_outputs",
    "layers_of",
]

Array = Any
Tree = dict[str, dict[str, Array]]  # network -> path -> leaf

_DRAWN_NUMBERS = 2**25  # drawn numbers held together: 128 MiB in float32


class Outcome(NamedTuple):
    """What the draws say of a batch before it is learnt from; sums over its counted examples.

    Attributes:
        free_energy: C at the belief under which the batch was met, a bound from above on minus its log predictive density.
        log_predictive: log of the mean over the draws of p(y_n | x_n, w).
        correct: examples whose most probable class was theirs; nan where no single site has classes.
        epistemic: mutual information between label and weights, in nats; nan likewise.
        counted: the examples.
    """

    free_energy: Array
    log_predictive: Array
    correct: Array
    epistemic: Array
    counted: Array


class Gathered(NamedTuple):
    """g and H by leaf, and what the draws predicted."""

    gradient: Tree
    curvature: Tree
    outcome: Outcome


class Estimator(Protocol):
    """Finds g and H of a batch; hashable, and fit for ``jit``."""

    def gather(self, space: StateSpace, mean: Tree, sigma: Tree, batch: Task, key: Array) -> Gathered:
        """At the belief N(mean, sigma^2), for a batch that has a mask."""
        ...


@dataclass(frozen=True)
class _Draws:
    """How many draws.

    Args:
        draws: S >= 1 of every random number, a batch.
        antithetic: draws come in pairs e, -e, which takes the odd noise out of H: S is even then.
    """

    draws: int = 10
    antithetic: bool = True

    def __post_init__(self):
        check_count(draws=self.draws)
        if self.antithetic and self.draws % 2:
            raise ValueError(
                f"draws is {self.draws}; antithetic pairs need an even number, antithetic=False accepts any"
            )

    def _gather(
        self, space: StateSpace, mean: Tree, sigma: Tree, batch: Task, key: Array, layers: tuple[Layer | None, ...]
    ) -> Gathered:
        """With outputs drawn in ``layers``, None where a layer's weights are; the rest is drawn as weights."""
        local = {name for layer in layers if layer for name in (layer.kernel, layer.bias) if name}
        count = batch.mask.shape[0]
        widths = [layer.num_outputs if layer else 0 for layer in layers]
        sampled = [(n, p) for n, leaves in mean.items() for p in leaves if (n, p) not in local]
        sizes = [mean[n][p].size for n, p in sampled]
        total = sum(sizes) + count * sum(widths)
        dtype = jnp.result_type(*jax.tree.leaves(mean))

        def of_draw(mean: Tree, spread: Tree, noise: Array) -> Array:
            """(B, 1 + K): log likelihood and class log probabilities of the examples; ``spread`` is sigma^2 for the local
            leaves and sigma for the others."""
            # by example, so that an example's draws do not depend on how many come after it
            of_outputs = _cut(noise[sum(sizes) :].reshape(count, -1), widths)
            arrays = {network: dict(leaves) for network, leaves in mean.items()}
            for (n, p), part in zip(sampled, _cut(noise, sizes), strict=True):
                arrays[n][p] = mean[n][p] + spread[n][p] * part.reshape(mean[n][p].shape)

            def of_example(data: Any, mask: Array, own: list[Array]) -> Array:
                def added(number: int, rows: Array) -> Array | None:
                    layer = layers[number]
                    return None if layer is None else _deviation(layer, spread, rows) * own[number]

                example = single(batch, data, mask)
                if not local:
                    return _report(space, arrays, example)
                return run_layers(lambda a: _report(space, a, example), arrays, added)[0]

            return jax.vmap(of_example)(batch.data, batch.mask, of_outputs)

        def of_key(mean: Tree, spread: Tree, key: Array) -> Array:
            noise = jax.random.normal(key, (total,), dtype)
            noises = jnp.stack([noise, -noise]) if self.antithetic else noise[None]
            return jax.vmap(lambda e: of_draw(mean, spread, e))(noises)

        def loss(mean: Tree, spread: Tree, keys: Array) -> tuple[Array, Array]:
            reports = jax.vmap(lambda k: of_key(mean, spread, k))(keys)
            reports = reports.reshape(-1, *reports.shape[2:])
            return -jnp.sum(reports[..., 0]) / self.draws, reports

        squared = {n: {p: jnp.square(s) if (n, p) in local else s for p, s in ls.items()} for n, ls in sigma.items()}
        keys = jax.random.split(key, self.draws // 2 if self.antithetic else self.draws)
        chunk = max(_DRAWN_NUMBERS // max(2 * total, 1), 1)
        gradients, reports = _in_chunks(jax.grad(loss, (0, 1), has_aux=True), mean, squared, keys, chunk)
        gradient, spread_gradient = gradients
        curvature = {
            n: {p: 2 * d if (n, p) in local else d / sigma[n][p] for p, d in ls.items()}
            for n, ls in spread_gradient.items()
        }
        return Gathered(gradient, curvature, _outcome(space, mean, reports, batch))


@dataclass(frozen=True)
class WeightSampling(_Draws):
    """Draws of whole networks, the same for all examples of the batch: right for every program.

    The cost a draw is one random number a weight, and a forward and a backward pass.
    """

    def gather(self, space: StateSpace, mean: Tree, sigma: Tree, batch: Task, key: Array) -> Gathered:
        """See ``Estimator``."""
        return self._gather(space, mean, sigma, batch, key, ())


@dataclass(frozen=True)
class LocalReparameterisation(_Draws):
    """Draws of the outputs of dense layers, by example, and of the weights that no such layer holds.

    The cost a draw is one random number an output; the products with the weights, and the outer products that make their
    gradients, are made once for all draws in the first layer.
    """

    def gather(self, space: StateSpace, mean: Tree, sigma: Tree, batch: Task, key: Array) -> Gathered:
        """See ``Estimator``."""
        layers = self._layers(space, mean, batch)
        return self._gather(space, mean, sigma, batch, key, tuple(drawn_as_outputs(layer) for layer in layers))

    def _layers(self, space: StateSpace, mean: Tree, batch: Task) -> tuple[Layer, ...]:
        """The layers; what is drawn as weights though outputs were asked for is said."""
        try:
            layers = layers_of(space, mean, batch)
        except TiedWeightsError as error:
            _warn_drawn_as_weights(
                f"{error.fact}, and their outputs cannot be drawn apart", "the weights of all layers"
            )
            return ()
        if not layers:
            _warn_drawn_as_weights("no layer was found in the likelihood", "all weights")
        shared = [".".join(layer.kernel) for layer in layers if drawn_as_outputs(layer) is None]
        if shared:
            names = ", ".join(shared)
            why = f"the layers {names} meet an example in several positions, and their outputs cannot be drawn apart"
            _warn_drawn_as_weights(why, "their weights")
        return layers


def layers_of(space: StateSpace, arrays: Tree, batch: Task) -> tuple[Layer, ...]:
    """The layers in the likelihood of one example, by abstract evaluation.

    Raises:
        TiedWeightsError: for a leaf that an example meets more than once.
    """
    example = single(batch, jax.tree.map(lambda a: a[0], batch.data), batch.mask[0])
    return find_layers(lambda a: _report(space, a, example), arrays)


def drawn_as_outputs(layer: Layer) -> Layer | None:
    """The layer where its outputs may be drawn one by one: where it meets an example in one position."""
    return layer if layer.positions == 1 else None


def _warn_drawn_as_weights(why: str, which: str) -> None:
    warnings.warn(f"{why}: {which} are drawn instead of outputs", stacklevel=5)


def _report(space: StateSpace, arrays: Arrays, example: Task) -> Array:
    """(1 + K,): log likelihood of one example, and log probabilities of its classes where one site alone has some."""
    sites = list(space.observed_at(arrays, example).values())
    total = jnp.asarray(sum(jnp.sum(site.log_likelihood()) for site in sites))
    classes = class_log_probabilities(sites[0].distribution) if len(sites) == 1 else None
    if classes is None or classes.shape[:-1] != (1,):
        return total[None]
    return jnp.concatenate([total[None], classes[0].astype(total.dtype)])


def _outcome(space: StateSpace, mean: Tree, reports: Array, batch: Task) -> Outcome:
    """From the reports (S, B, 1 + K) of all draws."""
    counted = jnp.sum(batch.mask)
    log_density = jax.nn.logsumexp(reports[..., 0], axis=0) - jnp.log(reports.shape[0])
    free_energy = -jnp.mean(jnp.sum(reports[..., 0], axis=1))
    correct = epistemic = jnp.full((), jnp.nan, reports.dtype)
    if reports.shape[-1] > 1:
        by_class = reports[..., 1:]
        mixture = jax.nn.logsumexp(by_class, axis=0) - jnp.log(reports.shape[0])
        site = next(iter(space.observed_at(mean, batch).values()))
        right = (jnp.argmax(mixture, axis=-1) == site.value) & batch.mask
        correct = jnp.sum(right).astype(reports.dtype)
        information = _entropy(mixture) - jnp.mean(_entropy(by_class), axis=0)
        epistemic = jnp.sum(jnp.where(batch.mask, jnp.maximum(information, 0.0), 0.0))
    return Outcome(free_energy, jnp.sum(jnp.where(batch.mask, log_density, 0.0)), correct, epistemic, counted)


def _entropy(log_probabilities: Array) -> Array:
    finite = jnp.where(log_probabilities > -jnp.inf, log_probabilities, 0.0)
    return -jnp.sum(finite * jnp.exp(log_probabilities), axis=-1)


def _deviation(layer: Layer, variance: Tree, rows: Array) -> Array:
    """Standard deviation (O,) of a layer's outputs at its one input (1, I)."""
    kernel = variance[layer.kernel[0]][layer.kernel[1]]
    matrix = jnp.moveaxis(kernel, (*layer.input_axes, layer.output_axis), range(kernel.ndim))
    total = jnp.square(rows[0]) @ matrix.reshape(layer.num_inputs, layer.num_outputs)
    if layer.bias is not None:
        total = total + jnp.ravel(variance[layer.bias[0]][layer.bias[1]])
    # an input of zeros leaves no deviation, and a root has no derivative there
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0)


def _cut(noise: Array, sizes: list[int]) -> list[Array]:
    """Pieces of the last axis."""
    ends = np.cumsum([0, *sizes])
    return [noise[..., start:stop] for start, stop in pairwise(ends)]


def _in_chunks(function: Any, mean: Tree, spread: Tree, keys: Array, chunk: int) -> tuple[Any, Array]:
    """Sum of the gradients and all reports; so many keys at a time as memory allows."""
    if chunk >= keys.shape[0]:
        return function(mean, spread, keys)
    while keys.shape[0] % chunk:
        chunk -= 1

    def step(summed: Any, some: Array) -> tuple[Any, Array]:
        gradients, reports = function(mean, spread, some)
        return jax.tree.map(jnp.add, summed, gradients), reports

    nothing = jax.tree.map(jnp.zeros_like, (mean, spread))
    summed, reports = jax.lax.scan(step, nothing, keys.reshape(-1, chunk))
    return summed, reports.reshape(-1, *reports.shape[2:])
