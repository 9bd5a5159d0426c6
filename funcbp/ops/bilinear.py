"""Bilinear map of two inputs.

    z_bo = sum_ij x_bi w_ijo y_bj + b_o

Backward. With u_bjo = sum_i x_bi w_ijo and du_bjo = y_bj dz_bo
    dx_bi = sum_jo du_bjo w_ijo        dy_bj = sum_o u_bjo dz_bo
    dw_ijo = sum_b x_bi du_bjo         db_o = sum_b dz_bo

Three products, as autodiff takes. u is large, [batch, j, o]; not to keep it costs a fourth.

Saves: x, y and w, arguments, and u, in the promoted dtype, as autodiff does: no gain in memory.
Edge:  an empty batch gives dw = db = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of all.
Ref:   Tenenbaum and Freeman, 2000, equation 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import contracted, rows, wide
from funcbp.ops.linear import product


def plain(
    x: Float[Array, "*batch i"],
    y: Float[Array, "*batch j"],
    w: Float[Array, "i j o"],
    b: Float[Array, " o"] | None = None,
) -> Float[Array, "*batch o"]:
    """sum_ij x_i w_ijo y_j + b.

    Args:
      x: first input, [..., i].
      y: second input, [..., j].
      w: weights, [i, j, o].
      b: bias, [o], or None for none.

    Returns:
      [..., o], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit.
    """
    z = jnp.einsum("...jo,...j->...o", jnp.einsum("...i,ijo->...jo", x, w), y)
    return z if b is None else z + b


def check(x, y, w, b=None):
    """Raises if the shapes do not fit."""
    if w.ndim != 3:
        raise InputError(f"w must have three axes, [i, j, out], got shape {w.shape}")
    if x.shape[:-1] != y.shape[:-1] or (*x.shape[-1:], *y.shape[-1:]) != w.shape[:2]:
        raise InputError(
            f"x and y must have the same batch axes, and {w.shape[0]} and {w.shape[1]} features, "
            f"as w {w.shape} says; got {x.shape} and {y.shape}; broadcast the batch axes first"
        )
    if b is not None and b.shape != w.shape[2:]:
        raise InputError(
            f"b must have shape {w.shape[2:]}, one number for each output of w, got {b.shape}"
        )


def _matrix(w):
    return w.reshape(w.shape[0], w.shape[1] * w.shape[2])


def fwd(x, y, w, b=None):
    u = product(x, _matrix(w)).reshape(*x.shape[:-1], *w.shape[1:])
    z = contracted("...jo,...j->...o", u.astype(jnp.result_type(x, w)), y)
    z = z if b is None else z + wide(b)
    dtype = jnp.result_type(*[a for a in (x, y, w, b) if a is not None])
    return z.astype(dtype), (x, y, w, b, u.astype(dtype))


def bwd(saved, dz):
    x, y, w, b, u = saved
    du = y[..., None] * dz[..., None, :]
    flat = du.reshape(*x.shape[:-1], _matrix(w).shape[1]).astype(dz.dtype)
    dx = product(flat, _matrix(w).T)
    dw = product(rows(x).T, rows(flat)).reshape(w.shape)
    dy = contracted("...jo,...o->...j", u, dz)
    return dx, dy, dw, None if b is None else jnp.sum(rows(wide(dz)), axis=0)


bilinear = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (5, 3), (5, 2), (3, 2, 7), (7,)),
        Case("no bias, two batch axes", (2, 3, 4), (2, 3, 4), (4, 4, 2)),
        Case("vectors", (4,), (3,), (4, 3, 1), (1,)),
        Case("empty batch", (0, 3), (0, 2), (3, 2, 2), (2,)),
        Case("pairs", (1024, 128), (1024, 64), (128, 64, 64), (64,), bench=True),
    ),
)
