"""A sequence in chunks of equal length, the axis of time being the second."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax, tree


def padded(x: Array, chunk: int) -> Array:
    """x with zeros at the end, up to a whole number of chunks, and to one at least."""
    short = -x.shape[1] % chunk if x.shape[1] else chunk
    return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) if short else x


def taken(arrays: Any, i: Any, chunk: int) -> Any:
    """Chunk i of each array."""
    return tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1), arrays)


def filled(arrays: Any, parts: Any, i: Any, chunk: int) -> Any:
    """The arrays with these as their chunk i, in place within a loop."""

    def put(x, part):
        return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * chunk, 1)

    return tree.map(put, arrays, parts)
