"""Numerics that several rules share."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, tree


def wide(x: Array) -> Array:
    """x in float32, or in its own dtype where that is wider: what rules compute in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def contracted(spec: str, a: Array, b: Array) -> Array:
    """jnp.einsum, accumulated and returned in float32 or wider."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def loop_zeros(shape: tuple[int, ...], like: Any) -> Array:
    """Zeros that vary over the mesh axes that any of these arrays varies over, as a loop needs."""
    arrays = tree.leaves(like)
    dtypes = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    zeros = jnp.zeros(shape, jnp.promote_types(jnp.result_type(*dtypes), jnp.float32))
    for a in arrays:
        zeros += jnp.zeros_like(a, shape=(), dtype=zeros.dtype)
    return zeros


def rows(x: Array) -> Array:
    """x with all axes but the last merged: [..., n] -> [rows, n]."""
    # reshape(-1, n) cannot tell the number of rows when n is 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def shifted(x: Array, axis, where: Array | None) -> tuple[Array, Array]:
    """`(z, m)` with z = x - m, m the largest unmasked entry along `axis` (0 if none is finite)."""
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    m = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)
    m = jnp.where(jnp.isfinite(m), m, 0)
    return x - m, m


def others(x: Array, m: Array, axis, where: Array | None = None) -> tuple[Array, Array]:
    """`(rest, m)`: sum(exp(x - m)) - 1 along `axis`, kept, for the m that `shifted` gives.

    The largest entry adds exactly 1. Kept apart, the rest does not drown in it: log1p(rest) is the
    logarithm of the sum, and rest / (1 + rest) is what the largest softmax lacks to 1. With no
    unmasked entry it is 0.

    Two sums: of all but the largest, and of all, from which the number of the largest follows. XLA
    on CPU takes a sum of exponentials, products and minima without writing the terms out, but not
    one of comparisons, nor two at a time, nor one whose terms the backward pass takes as well: so a
    minimum, and barriers, one of which is on the m that is returned.
    """
    x = x if where is None else jnp.where(where, x, -jnp.inf)
    most = float(jnp.finfo(x.dtype).max)

    def total(terms):
        return jnp.sum(terms, axis=axis, keepdims=True)

    # An infinite entry would make it -inf; the other sum is inf then.
    rest = jnp.maximum(total(jnp.exp(x - m) * jnp.minimum((x - m) * -most, 1)), 0)
    m, rest = lax.optimization_barrier((m, rest))
    ties = jnp.round(total(jnp.exp(x - m)) - rest)
    return lax.optimization_barrier((rest + jnp.maximum(ties - 1, 0), m))


def near_root(x: Array, root: float, series: tuple[float, ...], else_: Array) -> Array:
    """`else_`, but within 1/4 of a root of the function its Taylor series there.

    The terms of a derivative cancel where it crosses zero, and their rounding errors remain. The
    series is in x - root, which is exact near a `root` that float32 represents; its first
    coefficient is what the function is at that float32, not quite 0.
    """
    inside = jnp.abs(x - root) < 0.25
    d = jnp.where(inside, x - root, 0)  # 0 outside keeps the branch not taken finite
    total = jnp.zeros_like(x)
    for c in reversed(series):
        total = total * d + c
    # The first term left out is below 1e-7 of the value within this window.
    return jnp.where(inside, total, else_)
