"""A linear recurrence, number by number.

    h_t = a_t h_(t-1) + b_t        h_0 given, or 0

Backward. h_t goes on to h_(t+1) alone, so with g_t the cotangent of h_t from all that follows
    g_t = dh_t + a_(t+1) g_(t+1)
    db_t = g_t        da_t = g_t h_(t-1)        dh_0 = a_1 g_1

On CPU one loop over time reads each row once and holds the state in cache; elsewhere the steps are
joined in a tree, whose depth is the logarithm of the length. Autodiff of the loop writes out
h_(t-1) and a_t once more; autodiff of the tree keeps what each of its levels made.

Saves: a and h_0, arguments, and h, the result.
Edge:  an a of one row, or one that is broadcast to b otherwise, gets the sum; a length of 0 gives
       an empty h and no gradient to h_0.
Dtype: the state is in float32 or wider; h has the promoted dtype of a, b and h_0.
Ref:   Blelloch, 1990, section 1.4; Martin and Cundy, 2018, section 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, uniform
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops._recurrence import at, before, pulled, row_shape, states


def plain(
    a: Float[Array, "..."],
    b: Float[Array, "*batch t d"],
    h0: Float[Array, "*batch d"] | None = None,
    *,
    axis: int = -2,
    reverse: bool = False,
) -> Float[Array, "*batch t d"]:
    """h_t = a_t h_(t-1) + b_t along `axis`.

    Args:
      a: factors, in a shape that broadcasts to b's: [..., t, d], [t, 1], [d] ...
      b: inputs, [..., t, d], or any shape with the axis of time at `axis`.
      h0: the state before the first step, b's shape without time; None for 0.
      axis: the axis of time in b; by default the last but one.
      reverse: run from the last step to the first; h0 is then the state after the last.

    Returns:
      h, all states: the shape of b, the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or b has no such axis.
    """
    dtype = _dtype(a, b, h0)
    a, b = (jnp.moveaxis(x.astype(dtype), axis, 0) for x in jnp.broadcast_arrays(a, b))
    start = jnp.zeros_like(jnp.sum(a * b, axis=0))  # lies on the devices where the states will
    h0 = start if h0 is None else start + h0.astype(dtype)

    def step(h, ab):
        h = ab[0] * h + ab[1]
        return h, h

    return jnp.moveaxis(jax.lax.scan(step, h0, (a, b), reverse=reverse)[1], 0, axis)


def _dtype(a, b, h0):
    return jnp.result_type(a, b) if h0 is None else jnp.result_type(a, b, h0)


def check(a, b, h0, *, axis, reverse):
    """Raises if the shapes do not fit, or b has no such axis."""
    if not -b.ndim <= axis < b.ndim:
        raise InputError(
            f"axis must be an axis of b, whose shape is {b.shape}, got {axis}; b of shape [t] "
            "needs axis=0"
        )
    if a.ndim > b.ndim or any(
        n not in (1, m) for n, m in zip(a.shape[::-1], b.shape[::-1], strict=False)
    ):
        raise InputError(
            f"a must broadcast to the shape of b {b.shape}, got {a.shape}; add axes of size 1, as "
            "in a[:, None]"
        )
    row = row_shape(b, axis % b.ndim)
    if h0 is not None and h0.shape != row:
        raise InputError(
            f"h0 must have the shape of b {b.shape} without the axis of time, {row}, "
            f"got {h0.shape}; broadcast it first"
        )


def fwd(a, b, h0, *, axis, reverse):
    axis %= b.ndim
    like = jax.ShapeDtypeStruct(b.shape, _dtype(a, b, h0))
    start = jnp.zeros(row_shape(b, axis), like.dtype) if h0 is None else h0
    h = states(_full_rank(a, b), b, start, like, axis, reverse)
    return h, (a, h0, h)


def bwd(saved, dh, *, axis, reverse):
    a, h0, h = saved
    axis %= h.ndim
    factors = _full_rank(a, h)
    g = pulled(factors, dh, axis, reverse)
    start = jnp.zeros(row_shape(h, axis), h.dtype) if h0 is None else h0
    da = wide(g) * wide(before(h, start.astype(h.dtype), axis, reverse))
    summed = [i for i, n in enumerate(factors.shape) if n != h.shape[i]]
    da = jnp.sum(da, axis=summed, keepdims=True).reshape(a.shape)
    dh0 = None
    if h0 is not None and h.shape[axis]:
        first = h.shape[axis] - 1 if reverse else 0
        dh0 = jnp.broadcast_to(wide(at(factors, first, axis)) * wide(at(g, first, axis)), h0.shape)
    return da, g, dh0


def _full_rank(a, b):
    return a.reshape((1,) * (b.ndim - a.ndim) + a.shape)


linear_recurrence = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", uniform(5, 33, low=-1.0), (5, 33), (33,)),
        Case(
            "batch, no start, reverse",
            uniform(2, 3, 2),
            (2, 3, 2),
            None,
            reverse=True,
            transformed=False,
        ),
        Case("one factor a step", uniform(3, 1, low=0.5), (2, 3, 5), (2, 5), transformed=False),
        Case(
            "one factor a feature",
            uniform(33, 1, low=0.5),
            (33, 4),
            None,
            axis=1,
            transformed=False,
        ),
        Case("no step", (0, 3), (0, 3), (3,)),
        Case("sequence", uniform(4096, 512, low=0.8), (4096, 512), None, bench=True),
    ),
)
