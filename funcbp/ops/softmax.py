"""Softmax along an axis.

    y_i = exp(x_i) / sum_k exp(x_k)

Backward. dy_i/dx_j = y_i ([i = j] - y_j), so
    dx_j = y_j (dy_j - sum_i dy_i y_i)

Saves: y, the output.
Edge:  a masked entry (`where` false) gives y = 0 and dx = 0; a row of masked entries alone gives
       just these. An entry -inf gives y = 0 and dx = 0. An entry +inf gives nan, as in JAX.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Bridle, 1990, equations 4 to 6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from funcbp.case import Case, booleans, normal, values
from funcbp.core import op
from funcbp.ops._numeric import largest, settled, wide

Axis = int | tuple[int, ...] | None
MASK = [[True, True, False], [False, False, False], [True, False, False]]
CASES = (
    Case("odd", (3, 5)),
    Case("ties and tails", values([[1.0, 1.0, -90.0, -float("inf")], [0.0, -0.0, 30.0, 30.0]])),
    Case("one-hot row", values([[0.0, 40.0, 3.0], [0.0, 17.0, 0.0]])),
    Case("leading axis", (4, 3, 2), axis=0),
    Case("two axes, large", normal(3, 2, 4, std=30.0, mean=1e4), axis=(0, -1), dtypes=("float32",)),
    Case("masked", (3, 3), where=values(MASK)),
    Case("broadcast mask", (4, 2, 3), where=booleans(2, 3)),
    Case("single", (1,)),
    Case("empty batch", (0, 4)),
    Case("logits", (4096, 1024), bench=True),
)


def plain(
    x: Float[Array, "..."], axis: Axis = -1, where: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """exp(x) / sum(exp(x)) along `axis`.

    Args:
      x: any shape.
      axis: the axis or axes that are normalised together; None for all.
      where: broadcastable to x; entries where it is false are left out and give 0.

    Returns:
      The shape and dtype of x; sums to 1 along `axis`, or is 0 where everything is masked.
    """
    # Rows that are masked whole would be 0 / 0.
    total = jnp.sum(e := _exp_shifted(x, axis, where), axis=axis, keepdims=True)
    return e / jnp.where(total > 0, total, 1)


def _exp_shifted(x, axis, where):
    m = jax.lax.stop_gradient(largest(x, axis, where))
    if where is None:
        return jnp.exp(x - m)
    return jnp.where(where, jnp.exp(jnp.where(where, x - m, 0)), 0)


def fwd(x, axis, where):
    x_, m = wide(x if where is None else jnp.where(where, x, -jnp.inf)), largest(x, axis, where)
    e = jnp.exp(x_ - wide(m))
    total = settled(jnp.sum(e, axis=axis, keepdims=True))
    y = (e / jnp.where(total == 0, 1, total)).astype(x.dtype)
    return y, y


def bwd(y, dy, *, axis):
    y, dy = wide(y), wide(dy)
    return y * (dy - jnp.sum(dy * y, axis=axis, keepdims=True)), None


softmax = op(plain, fwd, bwd, like=jax.nn.softmax, cases=CASES)
