"""A network under the last-layer benchmark: 64-64-10 on digits, trained on the points before, and anew on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssm_nn.models.networks import mlp

SIZES = (64, 64, 10)
EPOCHS, BATCH, RATE, DECAY = 200, 32, 3e-3, 1e-3  # of Adam with decoupled weight decay, whichever points are learnt

Network = tuple[Callable[[Any, Any], Any], Any]
APPLY = mlp(SIZES, "relu")[0]


def trained(x: np.ndarray, y: np.ndarray, seed: int) -> Network:
    """(apply, params) after training from its own start."""
    size = (
        -(-len(x) // BATCH) * BATCH
    )  # the last batch is filled up with points of weight 0: one shape for similar sizes
    weight = np.zeros(size, np.float32)
    weight[: len(x)] = 1
    rows = np.concatenate([np.arange(len(x)), np.zeros(size - len(x), int)])
    params = _train(mlp(SIZES, "relu", seed)[1], jnp.asarray(x[rows], jnp.float32), jnp.asarray(y[rows]), weight, seed)
    return APPLY, params


@jax.jit
def _train(params: Any, x: Any, y: Any, weight: Any, seed: Any) -> Any:
    optimizer = optax.adamw(RATE, weight_decay=DECAY)

    def loss(params, rows):
        each = optax.softmax_cross_entropy_with_integer_labels(APPLY(params, x[rows]), y[rows])
        return jnp.sum(weight[rows] * each) / jnp.maximum(jnp.sum(weight[rows]), 1)

    def step(carry, rows):
        params, state = carry
        change, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, change), state), None

    def epoch(carry, key):
        return jax.lax.scan(step, carry, jax.random.permutation(key, len(x)).reshape(-1, BATCH))

    keys = jax.random.split(jax.random.key(seed), EPOCHS)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[0][0]
