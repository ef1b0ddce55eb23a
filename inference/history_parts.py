"""Arrays of a mesh on the host: of each, the parts that lie on this process's devices, each once.

An array that one process holds whole is copied whole. One that is spread over several processes is a stack of this process's
parts (n, *part), in the order of their places; ``back`` lays them out as they were, and nothing is gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["back", "expected", "parts"]

Array = Any


def parts(leaf: Any) -> Any:
    """Of an array or a typed key, what this process holds; anything else as it is."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # a key of one process is small and stays where it is
        return leaf if leaf.is_fully_addressable else parts(jax.random.key_data(leaf))
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    held = {_place(shard.index): shard.data for shard in leaf.addressable_shards}
    return np.stack([np.asarray(held[place]) for place in sorted(held)])


def expected(like: Any) -> Any:
    """What ``parts`` gives of an array like ``like``, an array or a ``ShapeDtypeStruct``, without its numbers."""
    if not _is_spread(like):
        return like
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        like = jax.random.key_data(like)
    shape = (len(set(_places(like).values())), *like.sharding.shard_shape(like.shape))
    return np.broadcast_to(np.zeros((), like.dtype), shape)


def back(kept: Any, like: Any) -> Any:
    """The array again, laid out like ``like``."""
    if not _is_spread(like):
        abstract = isinstance(kept, np.ndarray) and isinstance(like, jax.ShapeDtypeStruct)
        return jax.device_put(kept, like.sharding) if abstract else kept
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(back(kept, jax.random.key_data(like)), impl=jax.random.key_impl(like))
    places = _places(like)
    order = {place: number for number, place in enumerate(sorted(set(places.values())))}
    own = [jax.device_put(kept[order[place]], device) for device, place in places.items()]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, own)


def _is_spread(like: Any) -> bool:
    sharding = getattr(like, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def _places(like: Any) -> dict[Any, tuple[int, ...]]:
    return {
        device: _place(index) for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
    }


def _place(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)
