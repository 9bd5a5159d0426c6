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


def settled(x: Array) -> Array:
    """x itself, by a step that ends the fusion of what comes before it.

    XLA on CPU gives a sum, with all arithmetic around it, to a library: a number a row, used at
    each entry of the row, is written out in full size there, and two sums become one slow loop.
    """
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def rows(x: Array) -> Array:
    """x with all axes but the last merged: [..., n] -> [rows, n]."""
    # reshape(-1, n) cannot tell the number of rows when n is 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def largest(x: Array, axis, where: Array | None) -> Array:
    """The largest unmasked entry along `axis`, kept, in x's dtype; 0 if it is not finite."""
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    m = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.isfinite(m), m, 0)


def others(x: Array, axis, where: Array | None = None) -> tuple[Array, Array]:
    """`(rest, m)`: m = `largest`, and sum(exp(x - m)) - 1 along `axis`, kept, both wide.

    The largest entry adds exactly 1. Kept apart, the rest does not drown in it: log1p(rest) is the
    logarithm of the sum, and rest / (1 + rest) is what the largest softmax lacks to 1. With no
    unmasked entry it is 0.

    Two sums: the terms of all but the largest, and their number; on CPU only where some row needs
    them, else it is the sum less 1. XLA on CPU takes a sum of exponentials, products and minima
    without writing the terms out, but not one of comparisons, nor one whose terms the backward pass
    takes as well, and it writes out a constant as large as x. So a minimum, constants a row, and a
    barrier on the m that is returned.
    """
    m = wide(largest(x, axis, where))
    x = wide(x if where is None else jnp.where(where, x, -jnp.inf))

    def total(terms):
        return settled(jnp.sum(terms, axis=axis, keepdims=True))

    def apart(m):
        zero = m - m
        most, one = zero - float(jnp.finfo(m.dtype).max), zero + 1

        def below(m, most, one):  # 1 for an entry below m, 0 for one that is m
            return jnp.minimum((x - m) * most, one)

        # An infinite entry makes it -inf, and the number of the largest inf.
        rest = total(jnp.exp(x - m) * below(m, most, one))
        ties = x.size // max(m.size, 1) - total(below(*lax.optimization_barrier((m, most, one))))
        return jnp.maximum(rest, 0) + jnp.maximum(ties - 1, 0)

    def quick(m):
        whole = total(jnp.exp(x - m))
        return lax.cond(jnp.all(whole > 1.5), lambda m: whole - 1, apart, m)

    # Elsewhere the test would be a wait for other devices.
    rest = lax.platform_dependent(m, cpu=quick, default=apart)
    return lax.optimization_barrier((rest, m))


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
