"""Layer normalisation over the last axis.

    m = mean_i x_i    s = (mean_i (x_i - m)^2 + epsilon)^1/2    u_i = (x_i - m) / s
    y_i = u_i scale_i + bias_i

Backward. Let g_i = dy_i scale_i. Then du/dx has the two terms of m and s:
    dx_i = (g_i - mean_k g_k - u_i mean_k g_k u_k) / s
    dscale_i = sum over rows of dy_i u_i        dbias_i = sum over rows of dy_i

Saves: x and scale, arguments, and two numbers a row: m and s. Never u.
Edge:  a constant row gives u = 0 and s = epsilon^1/2; one feature gives dx = 0; an empty batch
       gives dscale = dbias = 0.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Ba, Kiros and Hinton, 2016, equation 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._norm import mean
from funcbp.ops._numeric import rows, wide


def plain(
    x: Float[Array, "*batch n"],
    scale: Float[Array, " n"] | None = None,
    bias: Float[Array, " n"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*batch n"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axis.

    Args:
      x: [..., n].
      scale: [n], or None for 1.
      bias: [n], or None for 0.
      epsilon: added to the variance; in the square of x's units.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: scale or bias does not have shape [n].
    """
    u = x - jnp.mean(x, axis=-1, keepdims=True)
    y = u / jnp.sqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def check(x, scale=None, bias=None, *, epsilon):
    """Raises if scale or bias does not fit the last axis."""
    if x.ndim < 1:
        raise InputError("x must have at least one axis, the one that is normalised; got a scalar")
    for name, v in (("scale", scale), ("bias", bias)):
        if v is not None and v.shape != x.shape[-1:]:
            raise InputError(
                f"{name} must have shape {x.shape[-1:]}, one number for each feature "
                f"of x {x.shape}, got {v.shape}; check which layer feeds this one"
            )


def fwd(x, scale=None, bias=None, *, epsilon):
    m = mean(wide(x))
    # The rounding of m shifts u; its mean says by how much, in the pass that the variance needs.
    u = wide(x) - m
    shift = mean(u)
    s = jnp.sqrt(jnp.maximum(mean(jnp.square(u)) - jnp.square(shift), 0) + epsilon)
    m += shift
    y = (wide(x) - m) / s
    y = y if scale is None else y * wide(scale)
    y = y if bias is None else y + wide(bias)
    return y.astype(x.dtype), (x, scale, bias, m, s)


def bwd(saved, dy, *, epsilon):
    x, scale, bias, m, s = saved
    dy = wide(dy)
    u = (wide(x) - m) / s
    g = dy if scale is None else dy * wide(scale)
    dx = (g - mean(g) - u * mean(g * u)) / s
    dscale = None if scale is None else jnp.sum(rows(dy * u), axis=0)
    dbias = None if bias is None else jnp.sum(rows(dy), axis=0)
    return dx, dscale, dbias


layer_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (3, 5), (5,), (5,)),
        Case("no scale", (2, 3, 4), None, (4,)),
        Case("bare", (4, 7)),
        Case("offset", normal(3, 9, mean=100.0), (9,), (9,), dtypes=("float32",)),
        Case("constant row", values([[2.0] * 5, [1.0, 2.0, 4.0, -3.0, 0.5]]), (5,), (5,)),
        Case("one feature", (3, 1), (1,), (1,)),
        Case("empty batch", (0, 4), (4,), (4,)),
        Case("transformer", (4096, 1024), (1024,), (1024,), bench=True),
    ),
)
