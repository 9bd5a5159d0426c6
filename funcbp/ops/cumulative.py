"""Running sums, products and maxima.

    cumsum    y_t = y_(t-1) + x_t
    cumprod   y_t = y_(t-1) x_t
    cummax    y_t = max(y_(t-1), x_t)

Backward. With g_t the cotangent of y_t from all that follows
    cumsum    dx_t = g_t                    g_t = dy_t + g_(t+1)
    cumprod   dx_t = g_t y_(t-1)            g_t = dy_t + x_(t+1) g_(t+1)        y_0 = 1
    cummax    dx_t = g_t if t is new        g_t = dy_t + g_(t+1) unless t + 1 is new

where t is new if x_t exceeds all before it. No rule divides, so a product with zeros has the
gradient that it should.

Saves: cumsum nothing; cumprod x, an argument, and y, the result; cummax x, and a byte for each
       number: whether it is new.
Edge:  of equal maxima the first that is met gets all of the cotangent. From a nan on all is nan; in
       cummax the nan gets the cotangents of all that.
Dtype: runs in float32 or wider, returns operand's dtype.
Ref:   Blelloch, 1990, section 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops._recurrence import before, pulled, row_shape, running, time_first


def plain_cumsum(
    operand: Float[Array, "..."], axis: int = 0, reverse: bool = False
) -> Float[Array, "..."]:
    """The running sum along `axis`.

    Args:
      operand: any shape with an axis.
      axis: the axis to run along, from 0.
      reverse: run from the end.

    Returns:
      The shape and dtype of operand.

    Raises:
      InputError: there is no such axis.
    """
    return jax.lax.cumsum(operand, axis, reverse)


def plain_cumprod(
    operand: Float[Array, "..."], axis: int = 0, reverse: bool = False
) -> Float[Array, "..."]:
    """The running product along `axis`; see cumsum for the arguments."""
    return jax.lax.cumprod(operand, axis, reverse)


def plain_cummax(
    operand: Float[Array, "..."], axis: int = 0, reverse: bool = False
) -> Float[Array, "..."]:
    """The running maximum along `axis`; see cumsum for the arguments."""
    return jax.lax.associative_scan(_larger, operand, reverse=reverse, axis=axis)


def _larger(before, x):
    return jnp.where((x > before) | jnp.isnan(x), x, before)


def check(operand, axis, reverse):
    """Raises if there is no such axis."""
    if not 0 <= axis < operand.ndim:
        raise InputError(
            f"axis must be from 0 to {operand.ndim - 1} for an operand of shape {operand.shape}, "
            f"got {axis}; count a last axis from the front"
        )


def fwd_cumsum(operand, axis, reverse):
    return _sum(operand, axis, reverse), ()


def bwd_cumsum(saved, dy, *, axis, reverse):
    return (_sum(dy, axis, not reverse),)


def _sum(x, axis, reverse):
    if axis == x.ndim - 1:  # a sum is too little work to transpose for
        return jax.lax.cumsum(wide(x), axis, reverse).astype(x.dtype)
    return running(jnp.add, jax.lax.cumsum, x, axis, reverse)


def fwd_cumprod(operand, axis, reverse):
    y = running(jnp.multiply, jax.lax.cumprod, operand, axis, reverse)
    return y, (operand, y)


def bwd_cumprod(saved, dy, *, axis, reverse):
    x, y = saved
    one = jnp.ones(row_shape(y, axis), y.dtype)
    return (pulled(x, dy, axis, reverse, before(y, one, axis, reverse)),)


def fwd_cummax(operand, axis, reverse):
    y = running(jnp.maximum, jax.lax.cummax, operand, axis, reverse)
    return y, (operand, _new(y, axis, reverse))


def bwd_cummax(saved, dy, *, axis, reverse):
    _, new = saved
    return (pulled(~new, dy, axis, reverse, new),)


def _new(y, axis, reverse):
    """Whether each running maximum is one that was not there before; the first is."""

    def new(axis, y):
        last = before(y, jnp.zeros(row_shape(y, axis), y.dtype), axis, reverse)
        t = jax.lax.broadcasted_iota(jnp.int32, y.shape, axis)
        return (t == (y.shape[axis] - 1 if reverse else 0)) | (y != last) & (last == last)

    return time_first(new, axis, y)


def _cumulative(plain, fwd, bwd, *cases):
    name = fwd.__name__.removeprefix("fwd_")
    return op(plain, fwd, bwd, check=check, like=getattr(jax.lax, name), name=name, cases=cases)


LONG = Case("sequences", (1024, 1024), axis=0, bench=True)
cumsum = _cumulative(
    plain_cumsum,
    fwd_cumsum,
    bwd_cumsum,
    Case("odd", (5, 33)),
    Case("last axis, reverse", (2, 7), axis=1, reverse=True),
    Case("none", (0, 3)),
    LONG,
)
ZEROS = values([[2.0, 0.0, -3.0, 1.5, 0.0, 0.5], [0.0, 1.0, 2.0, -1.0, 3.0, 0.5]])
cumprod = _cumulative(
    plain_cumprod,
    fwd_cumprod,
    bwd_cumprod,
    Case("odd", (5, 33)),
    Case("zeros, reverse", ZEROS, axis=1, reverse=True),
    Case("none", (0, 3)),
    LONG,
)
TIES = values([[1.0, 1.0, -1.0, 2.0, 2.0], [-2.0, 0.0, -0.0, 0.0, 0.0]])
NOT_FINITE = values([float("-inf"), float("-inf"), 1.0, float("inf"), float("nan"), 2.0])
cummax = _cumulative(
    plain_cummax,
    fwd_cummax,
    bwd_cummax,
    Case("odd", (5, 33)),
    Case("ties, reverse", TIES, axis=1, reverse=True),
    # The derivative of the tests' sine at infinity is nan.
    Case("not finite", NOT_FINITE, transformed=False),
    Case("none", (0, 3)),
    LONG,
)
