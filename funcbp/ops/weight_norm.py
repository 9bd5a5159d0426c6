"""Weight normalisation: a kernel by its direction and, for each output feature, its length.

    s_j = (sum_i v_ij^2 + epsilon)^1/2        w_ij = g_j v_ij / s_j

i runs over all axes but the last.

Backward. ds_j/dv_ij = v_ij / s_j, so
    dv_ij = g_j (dw_ij - v_ij sum_k dw_kj v_kj / s_j^2) / s_j
    dg_j = sum_i dw_ij v_ij / s_j

Of a kernel of one row nothing turns: the terms in brackets cancel but for dw_ij epsilon / s_j^2.

Saves: v and g, arguments, and one number for each output feature: s.
Edge:  a column of zeros gives w = 0 and dv = g dw / epsilon^1/2; no rows give dg = 0.
Dtype: computes in float32 or wider; w has v's dtype.
Ref:   Salimans and Kingma, 2016, equations 2 and 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide


def plain(
    v: Float[Array, "*in o"], g: Float[Array, " o"], *, epsilon: float = 1e-12
) -> Float[Array, "*in o"]:
    """g * v / |v|, with the length |v| of each output feature's weights.

    Args:
      v: direction, [..., o]: a kernel with output features last.
      g: length, [o].
      epsilon: added to the square of |v|; in the square of v's units.

    Returns:
      The shape and dtype of v.

    Raises:
      InputError: g does not have shape [o].
    """
    axes = tuple(range(v.ndim - 1))
    return (g * (v / jnp.sqrt(jnp.sum(jnp.square(v), axis=axes) + epsilon))).astype(v.dtype)


def check(v, g, *, epsilon):
    """Raises if g does not fit the last axis of v."""
    if v.ndim < 2 or g.shape != v.shape[-1:]:
        raise InputError(
            "v must have axes of inputs and then one of output features, and g one number for each "
            f"of the latter, got v of shape {v.shape} and g of shape {g.shape}; for g that keeps "
            "the weights as they are take their lengths"
        )


def _sums(v):
    return jnp.sum(v, axis=tuple(range(v.ndim - 1)))


def fwd(v, g, *, epsilon):
    s = jnp.sqrt(_sums(jnp.square(wide(v))) + epsilon)
    return (wide(g) * (wide(v) / s)).astype(v.dtype), (v, g, s)


def bwd(saved, dw, *, epsilon):
    v, g, s = saved
    v, dw = wide(v), wide(dw)
    along = _sums(dw * v)
    one_row = v.size == v.shape[-1]
    turning = dw * (epsilon / jnp.square(s)) if one_row else dw - v * (along / jnp.square(s))
    return wide(g) * (turning / s), along / s


weight_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("kernel", (3, 2, 2, 5), (5,)),
        Case("column of zeros", values([[0.0, 1.0], [0.0, -2.0], [0.0, 0.5]]), (2,), epsilon=1e-4),
        Case("one row", (1, 3), (3,)),
        Case("no rows", (0, 2), (2,)),
        Case("mlp", (4096, 1024), (1024,), bench=True),
    ),
)
