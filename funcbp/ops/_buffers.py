"""Arrays that a loop fills, a part at each step.

With JAX 0.10.2 XLA on CPU copies all of a bfloat16 array at each step that writes a part of it (not
of a float16 one): 90 us for a row into [4096, 1024], where float32 takes 0.5. So bfloat16 is held
as integers of the same bits.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, tree


def bits(x: Array) -> Array:
    """x as a buffer holds it: integers of the same bits if it is bfloat16."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def floats(x: Array, dtype: Any) -> Array:
    """The array of this dtype that the buffer x holds."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def put(buffer: Array, v: Array, start: Any, axis: int = 0) -> Array:
    """The buffer with v, in its dtype, from `start` on along the axis."""
    v = v.astype(jnp.bfloat16 if buffer.dtype == jnp.uint16 else buffer.dtype)
    return lax.dynamic_update_slice_in_dim(buffer, bits(v), start, axis)


def scan(
    step: Callable,
    init: Any,
    xs: Any,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """jax.lax.scan, with stacks that are held as `bits` while it fills them."""
    dtypes: Any = None

    def filling(carry, x):
        nonlocal dtypes
        carry, y = step(carry, x)
        dtypes = tree.map(lambda v: v.dtype, y)
        return carry, tree.map(bits, y)

    carry, ys = lax.scan(filling, init, xs, length, reverse, unroll)
    return carry, tree.map(floats, ys, dtypes)
