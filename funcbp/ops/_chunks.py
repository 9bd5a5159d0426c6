"""A sequence in chunks of equal length, the axis of time being the second."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax, tree

from funcbp.ops._buffers import put


def padded(x: Array, chunk: int) -> Array:
    """x with zeros at the end, up to a whole number of chunks, and to one at least."""
    short = -x.shape[1] % chunk if x.shape[1] else chunk
    return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) if short else x


def taken(arrays: Any, i: Any, chunk: int) -> Any:
    """Chunk i of each array."""
    return tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1), arrays)


def filled(arrays: Any, parts: Any, i: Any, chunk: int) -> Any:
    """The arrays, held as `bits`, with these as their chunk i, in place within a loop."""
    return tree.map(lambda x, part: put(x, part, i * chunk, 1), arrays, parts)
