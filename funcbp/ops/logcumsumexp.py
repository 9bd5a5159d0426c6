"""The logarithm of the running sum of exponentials.

    y_i = log sum_{j <= i} exp(x_j)

Backward. dy_i/dx_j = exp(x_j - y_i) for j <= i, so
    dx_j = exp(x_j - y_j) g_j        g_j = sum_{i >= j} dy_i exp(y_j - y_i)

g follows from its next: g_j = dy_j + exp(y_j - y_{j+1}) g_{j+1}. y never falls, so no factor
exceeds 1 and nothing overflows, whatever the range of x.

Saves: x, an argument, and y, the output, in float32 or wider.
Edge:  where x has been -inf from the start y is -inf and dx = 0, where JAX gives nan. An entry
       +inf gives +inf from there on, and a gradient of nan.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Blelloch, 1990, section 1.4: a linear recurrence as a scan.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops._recurrence import before, pulled, row_shape, running


def plain(
    operand: Float[Array, "..."], axis: int = 0, reverse: bool = False
) -> Float[Array, "..."]:
    """log(cumsum(exp(operand))) along `axis`.

    Args:
      operand: any shape with an axis.
      axis: the axis to run along, from 0.
      reverse: run from the end.

    Returns:
      The shape and dtype of operand.

    Raises:
      InputError: there is no such axis.
    """
    # The least number stands for -inf, between two of which the difference would be nan.
    least = jnp.finfo(operand.dtype).min
    y = jax.lax.cumlogsumexp(jnp.maximum(operand, least), axis, reverse)
    return jnp.where(y <= least, -jnp.inf, y)


def check(operand, axis, reverse):
    """Raises if there is no such axis."""
    if not 0 <= axis < operand.ndim:
        raise InputError(
            f"axis must be from 0 to {operand.ndim - 1} for an operand of shape {operand.shape}, "
            f"got {axis}; count a last axis from the front"
        )


def fwd(operand, axis, reverse):
    y = running(jnp.logaddexp, _tree, wide(operand), axis, reverse)
    return y.astype(operand.dtype), (operand, y)


def _tree(x, axis, reverse):
    return jax.lax.associative_scan(jnp.logaddexp, x, axis=axis, reverse=reverse)


def bwd(saved, dy, *, axis, reverse):
    x, y = saved
    last = before(y, jnp.full(row_shape(y, axis), -jnp.inf, y.dtype), axis, reverse)
    factor = jnp.where(last == -jnp.inf, 0, jnp.exp(last - y))
    share = jnp.where(y == -jnp.inf, 0, jnp.exp(wide(x) - y))
    return (pulled(factor, dy, axis, reverse, share),)


INF = float("inf")
LATE = [[-INF, -INF, 0.0, -INF, 2.0], [3.0, -INF, 3.0, 1.0, 3.0]]
logcumsumexp = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jax.lax.cumlogsumexp,
    name="logcumsumexp",
    cases=(
        Case("odd", (5, 3)),
        # The transformations turn signs: -inf becomes inf, whose gradient is nan.
        Case("nothing first", values(LATE), axis=1, transformed=False),
        Case("far apart, reverse", normal(2, 7, std=60.0), axis=1, reverse=True),
        Case("single", (1,), axis=0),
        Case("empty batch", (0, 3), axis=1),
        Case("sequences", (1024, 1024), axis=0, bench=True),
    ),
)
