"""The logarithm of the softmax along an axis.

    l_i = log y_i = x_i - log sum_k exp(x_k)        y the softmax

Backward. dl_i/dx_j = [i = j] - y_j, so
    dx_j = dl_j - y_j sum_i dl_i

Saves: x, an argument, and two numbers a row: the largest entry and the sum without its 1.
Edge:  a masked entry (`where` false) gives l = -inf and dx = 0; a row of masked entries alone
       gives just these. An entry +inf gives nan, as in JAX.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Bridle, 1990, equations 4 to 6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from funcbp.core import op
from funcbp.ops._numeric import largest, others, settled, wide
from funcbp.ops.softmax import CASES, Axis


def plain(
    x: Float[Array, "..."], axis: Axis = -1, where: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """x - log(sum(exp(x))) along `axis`.

    Args:
      x: any shape.
      axis: the axis or axes that are normalised together; None for all.
      where: broadcastable to x; entries where it is false are left out and give -inf.

    Returns:
      The shape and dtype of x.
    """
    z = x - jax.lax.stop_gradient(largest(x, axis, where))
    z = z if where is None else jnp.where(where, z, -jnp.inf)
    # The largest entries, z = 0, add expm1(0) = 0, and one of them the 1 in log1p.
    top = z == 0
    terms = jnp.where(top, jnp.expm1(jnp.where(top, z, 0)), jnp.exp(jnp.where(top, 0, z)))
    ties = jnp.maximum(jnp.sum(top, axis=axis, keepdims=True), 1)
    y = z - jnp.log1p(jnp.sum(terms, axis=axis, keepdims=True) + (ties - 1))
    return y if where is None else jnp.where(where, y, -jnp.inf)


def fwd(x, axis, where):
    rest, m = others(x, axis, where)
    # x - m first: the small logarithm would drown in a large m.
    y = (wide(x) - m) - jnp.log1p(rest)
    y = y if where is None else jnp.where(where, y, -jnp.inf)
    return y.astype(x.dtype), (x, m, rest, where)


def bwd(saved, dl, *, axis):
    x, m, rest, where = saved
    y, dl = jnp.exp(wide(x) - m) / (1 + rest), wide(dl)
    if where is not None:
        y, dl = jnp.where(where, y, 0), jnp.where(where, dl, 0)
    return dl - y * settled(jnp.sum(dl, axis=axis, keepdims=True)), None


log_softmax = op(plain, fwd, bwd, like=jax.nn.log_softmax, cases=CASES)
