"""Linear map with frozen weights and a trained change of low rank.

    h = x a        y = x w + s h b        w frozen, s the scale

Backward. With dh = s dy b^T
    dx = dy w^T + dh a^T        da = x^T dh        db = s h^T dy        dw = 0

dw, the largest product of a linear layer's backward pass, is not taken.

Saves: x, w, a and b, arguments, and h, the rank's share of x.
Edge:  w gets a gradient of 0. An empty batch gives da = db = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of all.
Ref:   Hu et al., 2021, equation 3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import rows, wide
from funcbp.ops.linear import check as check_linear
from funcbp.ops.linear import product


def plain(
    x: Float[Array, "*batch n"],
    w: Float[Array, "n m"],
    a: Float[Array, "n r"],
    b: Float[Array, "r m"],
    *,
    scale: float = 1.0,
) -> Float[Array, "*batch m"]:
    """x @ stop_gradient(w) + scale * (x @ a) @ b.

    Args:
      x: input, [..., n].
      w: frozen weights, [n, m].
      a: [n, r]; usually drawn at random.
      b: [r, m]; usually zeros at first.
      scale: of the change.

    Returns:
      [..., m], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit.
    """
    return x @ jax.lax.stop_gradient(w) + scale * ((x @ a) @ b)


def check(x, w, a, b, *, scale):
    """Raises if the shapes do not fit."""
    check_linear(x, w)
    if a.ndim != 2 or a.shape[0] != w.shape[0] or b.shape != (a.shape[1], w.shape[1]):
        raise InputError(
            f"a and b must have shapes [{w.shape[0]}, rank] and [rank, {w.shape[1]}] for w "
            f"{w.shape}, got {a.shape} and {b.shape}"
        )


def fwd(x, w, a, b, *, scale):
    dtype = jnp.result_type(x, w, a, b)
    h = product(x, a).astype(dtype)
    return (product(x, w) + scale * product(h, b)).astype(dtype), (x, w, a, b, h)


def bwd(saved, dy, *, scale):
    x, w, a, b, h = saved
    dh = (scale * product(dy, b.T)).astype(dy.dtype)
    dx = product(dy, w.T) + product(dh, a.T)
    da, db = product(rows(x).T, rows(dh)), scale * product(rows(h).T, rows(dy))
    return dx, jnp.zeros_like(wide(w)), da, db


lora_linear = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (5, 3), (3, 7), (3, 2), (2, 7), scale=0.5),
        Case("rank 1, two batch axes", (2, 3, 5), (5, 1), (5, 1), (1, 1)),
        Case("vector", (4,), (4, 4), (4, 2), (2, 4)),
        Case("empty batch", (0, 3), (3, 2), (3, 1), (1, 2)),
        Case("projection", (1024, 1024), (1024, 1024), (1024, 16), (16, 1024), bench=True),
    ),
)
