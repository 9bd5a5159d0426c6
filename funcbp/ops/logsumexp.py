"""The logarithm of a sum of exponentials, weighted by b if it is given.

    y = log |t|        t = sum_i b_i exp(a_i)

Backward. dy/dt = 1 / t, so
    da_i = dy b_i exp(a_i) / t        db_i = dy exp(a_i) / t

Saves: the arguments, and two numbers a row: the largest entry m and t exp(-m).
Edge:  a row that is masked whole, whose entries are all -inf, or whose t is 0 gives y = -inf and
       no gradient, where JAX gives nan. t < 0 gives nan and no gradient, or with `return_sign`
       log |t| and -1. An entry with b = 0 has its true db, where JAX gives 0. An entry +inf
       gives +inf, and a gradient of nan.
Dtype: computes in float32 or wider, returns the promoted dtype of a and b.
Ref:   Blanchard, Higham and Higham, 2021, section 2; jax.scipy.special.logsumexp.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from funcbp.case import Case, booleans, normal, values
from funcbp.core import op
from funcbp.ops._losses import masked, summed_to
from funcbp.ops._numeric import largest, wide

Axis = int | tuple[int, ...] | None


def plain(
    a: Float[Array, "..."],
    axis: Axis = None,
    b: Float[Array, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log(sum(b * exp(a))) along `axis`.

    Args:
      a: any shape.
      axis: the axis or axes to sum over; None for all.
      b: weights, broadcastable to a; None for 1.
      keepdims: keep the summed axes, with length 1.
      return_sign: return the logarithm of |sum| and the sum's sign.
      where: entries to include, broadcastable to a.

    Returns:
      The logarithm in the shape of a without `axis`, or with `return_sign` that and the sign.
    """
    m = _largest(a, axis, b, where)
    z = _exponents(a - m, b, where)
    m = jax.lax.stop_gradient(m)
    e = jnp.exp(z)
    total = jnp.sum(masked(where, e if b is None else b * e), axis=axis, keepdims=True)
    some = total != 0
    # A logarithm of 0 would have a derivative of nan even where it is not taken.
    y = jnp.where(some, jnp.log(jnp.abs(jnp.where(some, total, 1))) + m, -jnp.inf)
    return _finished(y, jnp.sign(total), axis, b, keepdims, return_sign)


def _largest(a, axis, b, where):
    """The largest entry that counts."""
    counts = where if b is None else masked(where, b != 0, False)
    return largest(jax.lax.stop_gradient(a), axis, counts)


def _exponents(z, b, where):
    """z, but 0 where masked."""
    z = masked(where, z)
    return z if b is None else _capped(z, b)


def _capped(z, b):
    """z, but where b is 0 at most what exp can take: there exp(z) is db, and can overflow."""
    limit = math.log(float(jnp.finfo(z.dtype).max)) - 8
    return jnp.where(b == 0, jnp.minimum(z, limit), z)


def _finished(y, sign, axis, b, keepdims, return_sign):
    if b is not None and not return_sign:
        y = jnp.where(sign < 0, jnp.nan, y)
    if not keepdims:
        y, sign = jnp.squeeze(y, axis), jnp.squeeze(sign, axis)
    return (y, sign) if return_sign else y


def fwd(a, axis, b, keepdims, return_sign, where):
    dtype = a.dtype if b is None else jnp.result_type(a, b)
    m = wide(_largest(a, axis, b, where))
    e = jnp.exp(_exponents(wide(a) - m, b, where))
    total = jnp.sum(masked(where, e if b is None else wide(b) * e), axis=axis, keepdims=True)
    y, sign = (jnp.log(jnp.abs(total)) + m).astype(dtype), jnp.sign(total).astype(dtype)
    return _finished(y, sign, axis, b, keepdims, return_sign), (a, b, where, m, total)


def bwd(saved, dy, *, axis, keepdims, return_sign):
    a, b, where, m, total = saved
    dy = wide(dy[0] if return_sign else dy).reshape(m.shape)
    counts = (total != 0) if return_sign else (total > 0)
    dy = jnp.where(counts, dy / jnp.where(counts, total, 1), 0)
    if b is None:
        return masked(where, dy * jnp.exp(wide(a) - m)), None, None
    db = masked(where, dy * jnp.exp(_capped(wide(a) - m, b)))
    return summed_to(db * wide(b), a.shape), summed_to(db, b.shape), None


INF = float("inf")
logsumexp = op(
    plain,
    fwd,
    bwd,
    like=jax.nn.logsumexp,
    cases=(
        Case("odd", (3, 5), axis=-1),
        Case("nothing", values([[-INF, -INF], [0.0, -INF], [1.0, 1.0]]), axis=1, keepdims=True),
        Case("masked", (4, 5), axis=-1, where=booleans(4, 5, p=0.3)),
        Case("weighted", (3, 5), axis=0, b=normal(5), return_sign=True),
        Case(
            "weights of 0 and less", (2, 3), b=values([[0.0, 1.0, 2.0], [-0.1, 0.5, 0.0]]), axis=1
        ),
        Case("all axes, large", normal(3, 2, 4, std=30.0, mean=1e4), dtypes=("float32",)),
        Case("empty batch", (0, 3), axis=1),
        Case("logits", (4096, 1024), axis=-1, bench=True),
    ),
)
