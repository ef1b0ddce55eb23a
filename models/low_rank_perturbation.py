"""Task weights as a low-rank perturbation of a static base, as latent sites of a program.

    W_t = diag(s_t) W_0 diag(r_t) + V_t U_t          r, s ~ N(1, scales^2),   V, U ~ N(0, factors^2),   fresh for every task

for each kernel W_0 (..., I, O) of a network, with s (I,), r (O,), V (I, k), U (k, O); at every position of a window alike.
Given W_0 the tasks are independent: the graph is a star. The moments of W_t given W = W_0, one position:

    E[W_t] = W,   Cov[vec W_t] = scales^2 (G_s G_s^T + G_r G_r^T) + scales^4 diag(vec W^2) + k factors^4 I
    G_s[:, i] = vec(e_i e_i^T W),   G_r[:, j] = vec(W e_j e_j^T)

diagonal plus low rank, exact, though W_t is not Gaussian. Source: Li et al. 2024 (arXiv 2311.15161), whose matrices are
ours transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ssm_nn.models.transitions import OrnsteinUhlenbeck, Static
from ssm_nn.networks import as_network
from ssm_nn.path_patterns import assign
from ssm_nn.program import ByPath, Weights, weights

__all__ = ["LowRankPerturbation", "PerturbationMoments"]

Array = Any

_FRESH = OrnsteinUhlenbeck(0.0)
_PARTS = ("inputs", "outputs", "left", "right")


class PerturbationMoments(NamedTuple):
    """Of vec W_t (I O,), rows of W one after another: ``mean``, and ``Cov = diag(diagonal) + factor factor^T``.

    Attributes:
        mean, diagonal: (I O,).
        factor: (I O, I + O).
    """

    mean: Array
    diagonal: Array
    factor: Array

    def dense(self) -> Array:
        """The covariance (I O, I O)."""
        return jnp.diag(self.diagonal) + self.factor @ self.factor.T


class LowRankPerturbation(NamedTuple):
    """The kernel between a base and its tasks.

    Attributes:
        rank: k >= 0.
        scales: standard deviation of r and s, > 0.
        factors: standard deviation of the entries of V and U, > 0.
    """

    rank: int
    scales: Array = 0.1
    factors: Array = 0.1

    def weights(
        self, name: str, network: Any, *, own: str | None = None, prior: dist.Normal, num_tasks: int
    ) -> Weights:
        """Declare a network whose kernels are perturbed by every task; the counterpart of ``ssm_nn.weights``.

        The sites are ``name.base.<path>`` of the kernels (static), ``name.<part>.<path>`` with the parts inputs (s), outputs
        (r), left (V) and right (U), and ``name.own.<path>`` of the leaves that a task has for itself: those of fewer than two
        axes, and those that fit ``own``.

        Args:
            name: of the network in the program.
            network: a flax.nnx module, an equinox module, or a pair (apply, params); its kernels have inputs and outputs as
                last two axes.
            own: pattern of further own leaves, such as those of a head, ``"layers.1.*"``.
            prior: Normal of the base and of the own leaves.
            num_tasks: T.

        Raises:
            ValueError: a rank below 0, a pattern that fits no leaf, no kernel left to share.
        """
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank is {self.rank!r}; a whole number >= 0 is accepted")
        made = as_network(network)
        chosen = {} if own is None else assign({own: True}, list(made.initial), "own", False)
        kernels = [path for path, leaf in made.initial.items() if jnp.ndim(leaf) >= 2 and not chosen.get(path)]
        if not kernels:
            raise ValueError(
                f"own is {own!r}, which leaves no kernel to share; the leaves are {', '.join(made.initial)}"
            )
        params = self._initial(made.initial, kernels)
        apply = _perturbed_apply(made.bind, kernels)
        one = dist.Normal(1.0, self.scales)
        priors = {"base": prior, "own": prior, "inputs": one, "outputs": one}
        priors |= dict.fromkeys(("left", "right"), dist.Normal(0.0, self.factors))
        transitions = {f"{part}.*": Static() if part == "base" else _FRESH for part in params}
        return weights(
            name,
            (apply, params),
            prior=ByPath({f"{part}.*": priors[part] for part in params}),
            transition=ByPath(transitions),
            num_tasks=num_tasks,
        )

    def _initial(self, initial: Mapping[str, Array], kernels: list[str]) -> dict[str, dict[str, Array]]:
        params: dict[str, dict[str, Array]] = {"base": {path: initial[path] for path in kernels}}
        own = {path: leaf for path, leaf in initial.items() if path not in kernels}
        params |= {"own": own} if own else {}
        params |= {part: {} for part in (_PARTS if self.rank else _PARTS[:2])}
        for path in kernels:
            (rows, columns), dtype = jnp.shape(initial[path])[-2:], jnp.result_type(initial[path])
            params["inputs"][path] = jnp.ones(rows, dtype)
            params["outputs"][path] = jnp.ones(columns, dtype)
            if self.rank:
                params["left"][path] = jnp.zeros((rows, self.rank), dtype)
                params["right"][path] = jnp.zeros((self.rank, columns), dtype)
        return params

    def moments(self, matrix: Array) -> PerturbationMoments:
        """Of the task's weights given a base kernel W (I, O)."""
        rows, columns = jnp.shape(matrix)
        flat, tau = jnp.ravel(matrix), jnp.asarray(self.scales)
        where = np.arange(rows * columns)
        of_rows = jnp.zeros((rows * columns, rows), flat.dtype).at[where, where // columns].set(flat)
        of_columns = jnp.zeros((rows * columns, columns), flat.dtype).at[where, where % columns].set(flat)
        diagonal = tau**4 * jnp.square(flat) + self.rank * jnp.asarray(self.factors) ** 4
        return PerturbationMoments(flat, diagonal, tau * jnp.concatenate([of_rows, of_columns], axis=1))


def _perturbed_apply(bind: Callable[[Mapping[str, Array]], Callable], kernels: list[str]) -> Callable[..., Array]:
    def apply(params: Any, *inputs: Any) -> Array:
        leaves = dict(params.get("own", {}))
        for path in kernels:
            kernel = params["inputs"][path][:, None] * params["base"][path] * params["outputs"][path]
            if "left" in params:
                kernel = kernel + params["left"][path] @ params["right"][path]
            leaves[path] = kernel
        return bind(leaves)(*inputs)

    return apply
