"""Recurrences along an axis: a loop over its rows on CPU, a tree of steps elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from funcbp.ops._buffers import bits, floats
from funcbp.ops._numeric import loop_zeros, wide

# A row of fewer numbers is not worth the step of a loop.
ROW = 32


def row_shape(x: Array, axis: int) -> tuple[int, ...]:
    """The shape of x without the axis, which is counted from the front."""
    return x.shape[:axis] + x.shape[axis + 1 :]


def at(x: Array, t: Any, axis: int) -> Array:
    """Row t of x; where x has one row, that one."""
    return lax.dynamic_index_in_dim(x, t if x.shape[axis] > 1 else 0, axis, keepdims=False)


def time_first(f: Callable, axis: int, *args: Array) -> Array:
    """`f(axis, *args)`; where time is the last of several axes, with that axis moved to the front.

    There rows are scattered over memory. f's result has the axes of the first argument; arguments
    that have fewer have no time. Next to each other, moves there and back cost nothing.
    """
    last = args[0].ndim - 1
    if not axis == last > 0:
        return f(axis, *args)
    moved = [jnp.moveaxis(x, -1, 0) if x.ndim > last else x for x in args]
    return jnp.moveaxis(f(0, *moved), 0, -1)


def before(h: Array, h0: Array, axis: int, reverse: bool) -> Array:
    """h_(t-1) in the place of h_t, and h0 in that of the first."""

    def shifted(axis, h, h0):
        first, n = jnp.expand_dims(h0, axis), h.shape[axis]
        if reverse:
            return jnp.concatenate([lax.slice_in_dim(h, min(n, 1), n, axis=axis), first], axis)
        return jnp.concatenate([first, lax.slice_in_dim(h, 0, max(n - 1, 0), axis=axis)], axis)

    return time_first(shifted, axis, h, h0)


def along(step: Callable, init: Array, like: Any, axis: int, reverse: bool, within: Any) -> Array:
    """All y_t of `state, y_t = step(t, state)`, in the shape and dtype of `like`.

    Args:
      step: t runs along the axis, from its end if `reverse`.
      init: the first state.
      like: what y is like.
      axis: that of time.
      reverse: whether time runs from the end.
      within: the arrays that `step` takes rows of.
    """
    size, zero = like.shape[axis], loop_zeros((), (init, within))

    def one(i, both):
        state, y = both
        t = size - 1 - i if reverse else i
        state, row = step(t, state)
        return state, lax.dynamic_update_index_in_dim(y, bits(row.astype(like.dtype)), t, axis)

    y = bits(jnp.zeros(like.shape, like.dtype) + zero.astype(like.dtype))
    return floats(lax.fori_loop(0, size, one, (init + zero, y))[1], like.dtype)


def by_platform(sequential: Callable, tree: Callable, like: Any, axis: int, *args: Any) -> Array:
    """`sequential(axis, *args)` on CPU if the rows of `like` are worth it, else `tree(*args)`."""

    def loop(*args):
        return time_first(sequential, axis, *args)

    if math.prod(row_shape(like, axis)) < ROW:
        return tree(*args)
    return lax.platform_dependent(*args, cpu=loop, default=tree)


def running(combine: Callable, tree: Callable, x: Array, axis: int, reverse: bool) -> Array:
    """y_t = combine(y_(t-1), x_t), in x's dtype; `tree(x, axis, reverse)` is the other way."""
    first = x.shape[axis] - 1 if reverse else 0

    def sequential(axis, x):
        def step(t, y):
            row = wide(at(x, t, axis))
            y = jnp.where(t == first, row, combine(y, row))
            return y, y

        return along(step, jnp.zeros(row_shape(x, axis), wide(x).dtype), x, axis, reverse, x)

    def by_tree(x):
        return tree(wide(x), axis, reverse).astype(x.dtype)

    return by_platform(sequential, by_tree, x, axis, x)


def states(a: Array, b: Array, h0: Array, like: Any, axis: int, reverse: bool) -> Array:
    """h_t = a_t h_(t-1) + b_t, in the dtype of `like`."""

    def sequential(axis, b, a, h0):
        def step(t, h):
            h = wide(at(a, t, axis)) * h + wide(at(b, t, axis))
            return h, h

        h = jax.ShapeDtypeStruct(b.shape, like.dtype)  # time may be another axis than in like
        return along(step, wide(h0), h, axis, reverse, (a, b))

    def tree(b, a, h0):
        factor, h = _tree(wide(a), wide(b), axis, reverse)
        return (h + factor * jnp.expand_dims(wide(h0), axis)).astype(like.dtype)

    return by_platform(sequential, tree, like, axis, b, a, h0)


def pulled(a: Array, dh: Array, axis: int, reverse: bool, weights: Array | None = None) -> Array:
    """g_t = dh_t + a_(t+1) g_(t+1), or weights_t g_t, for states that ran as `reverse` says.

    In dh's dtype. a and the weights may be masks: then 0 times an infinite g is 0.
    """

    def sequential(axis, dh, a, *weights):
        def step(t, carried):
            g = wide(at(dh, t, axis)) + carried
            return _times(at(a, t, axis), g), _times(at(weights[0], t, axis), g) if weights else g

        init = jnp.zeros(row_shape(dh, axis), wide(dh).dtype)
        return along(step, init, dh, axis, not reverse, (a, dh, weights))

    def tree(dh, a, *weights):
        a = jnp.broadcast_to(a, dh.shape).astype(wide(dh).dtype)
        # The factor of the last step meets no state.
        a = before(a, jnp.zeros(row_shape(a, axis), a.dtype), axis, not reverse)
        g = _tree(a, wide(dh), axis, not reverse)[1]
        return (_times(weights[0], g) if weights else g).astype(dh.dtype)

    more = () if weights is None else (weights,)
    return by_platform(sequential, tree, dh, axis, dh, a, *more)


def _times(factor, g):
    return jnp.where(factor, g, 0) if factor.dtype == bool else wide(factor) * g


def _tree(a: Array, b: Array, axis: int, reverse: bool) -> tuple[Array, Array]:
    """The steps h -> a h + b up to each: `(factors, states)` from a state of 0."""

    def then(first, second):
        (a, b), (a2, b2) = first, second
        return a * a2, a2 * b + b2

    steps = (jnp.broadcast_to(a, b.shape), b)
    return jax.lax.associative_scan(then, steps, axis=axis, reverse=reverse)
