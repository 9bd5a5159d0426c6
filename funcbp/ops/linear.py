"""Linear map with bias.

    y_bj = sum_i x_bi w_ij + b_j

Backward. dL = sum_bj dy_bj (sum_i dx_bi w_ij + sum_i x_bi dw_ij + db_j), so
    dx_bi = sum_j dy_bj w_ij        dw_ij = sum_b x_bi dy_bj        db_j = sum_b dy_bj

Saves: x and w, both arguments: nothing beyond the input.
Edge:  an empty batch gives dw = db = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of x, w and b.
Ref:   Rumelhart, Hinton and Williams, 1986, equations 4 to 6.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import rows, wide


def plain(
    x: Float[Array, "*batch n"], w: Float[Array, "n m"], b: Float[Array, " m"] | None = None
) -> Float[Array, "*batch m"]:
    """x @ w + b.

    Args:
      x: input, [..., n].
      w: weights, [n, m].
      b: bias, [m], or None for none.

    Returns:
      [..., m], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit.
    """
    y = x @ w
    return y if b is None else y + b


def product(x: Array, w: Array) -> Array:
    """x @ w, accumulated and returned in float32 or wider."""
    dtype = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def affine(x: Array, w: Array, b: Array | None) -> tuple[Array, jnp.dtype]:
    """`(x @ w + b, dtype)`: in float32 or wider, and the dtype that the result should have."""
    y = product(x, w)
    dtype = jnp.result_type(x, w) if b is None else jnp.result_type(x, w, b)
    return (y if b is None else y + wide(b)), dtype


def pullback(x: Array, w: Array, b: Array | None, dz: Array) -> tuple[Array, Array, Array | None]:
    """The cotangents of (x, w, b) from dz = that of x @ w + b."""
    db = None if b is None else jnp.sum(rows(wide(dz)), axis=0)
    return product(dz, w.T), product(rows(x).T, rows(dz)), db


def check(x, w, b=None):
    """Raises if the shapes do not fit."""
    if w.ndim != 2:
        raise InputError(f"w must have two axes, [features in, out], got shape {w.shape}")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise InputError(
            f"x must have {w.shape[0]} features on its last axis, as w has rows; got x of shape "
            f"{x.shape} and w of shape {w.shape}; check which layer feeds this one"
        )
    if b is not None and b.shape != w.shape[1:]:
        raise InputError(
            f"b must have shape {w.shape[1:]}, one number for each column of w, "
            f"got {b.shape}; pass b=None for no bias"
        )


def fwd(x, w, b=None):
    y, dtype = affine(x, w, b)
    return y.astype(dtype), (x, w, b)


def bwd(saved, dy):
    x, w, b = saved
    return pullback(x, w, b, dy)


linear = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (5, 3), (3, 7), (7,)),
        Case("no bias, two batch axes", (2, 3, 5), (5, 1), None),
        Case("vector", (4,), (4, 4), (4,)),
        Case("empty batch", (0, 3), (3, 2), (2,)),
        Case("mlp", (1024, 1024), (1024, 1024), (1024,), bench=True),
    ),
)
