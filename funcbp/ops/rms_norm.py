"""Root mean square normalisation over the last axis.

    s = (mean_i x_i^2 + epsilon)^1/2        y_i = x_i scale_i / s

Backward. Let g_i = dy_i scale_i. ds/dx_i = x_i / (n s), so
    dx_i = (g_i - x_i mean_k g_k x_k / s^2) / s
    dscale_i = sum over rows of dy_i x_i / s

Saves: x and scale, arguments, and one number a row: s.
Edge:  a row of zeros gives y = 0 and dx = g / epsilon^1/2; an empty batch gives dscale = 0; a
       square that overflows (|x| above 1e19 in float32) gives y = 0.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Zhang and Sennrich, 2019, equation 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._norm import mean, weighted_mean, weighted_sum
from funcbp.ops._numeric import settled, wide


def plain(
    x: Float[Array, "*batch n"],
    scale: Float[Array, " n"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*batch n"]:
    """x / sqrt(mean(x^2) + epsilon) * scale, over the last axis.

    Args:
      x: [..., n].
      scale: [n], or None for 1.
      epsilon: added to the mean square; in the square of x's units.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: scale does not have shape [n].
    """
    y = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (y if scale is None else y * scale).astype(x.dtype)


def check(x, scale=None, *, epsilon):
    """Raises if scale does not fit the last axis."""
    if x.ndim < 1:
        raise InputError("x must have at least one axis, the one that is normalised; got a scalar")
    if scale is not None and scale.shape != x.shape[-1:]:
        raise InputError(
            f"scale must have shape {x.shape[-1:]}, one number for each feature of x {x.shape}, "
            f"got {scale.shape}; check which layer feeds this one"
        )


def fwd(x, scale=None, *, epsilon):
    s = settled(jnp.sqrt(mean(jnp.square(wide(x))) + epsilon))
    y = wide(x) / s
    y = y if scale is None else y * wide(scale)
    return y.astype(x.dtype), (x, scale, s)


def bwd(saved, dy, *, epsilon):
    x, scale, s = saved
    w = None if scale is None else wide(scale)
    dy, x = wide(dy), wide(x)
    dyx = dy * x
    g = dy if w is None else dy * w
    dx = (g - x * (weighted_mean(dyx, w) / jnp.square(s))) / s
    return dx, None if w is None else weighted_sum(1 / s, dyx)


rms_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (3, 5), (5,)),
        Case("bare", (4, 7)),
        Case("two batch axes", (2, 3, 4), (4,)),
        Case("vector", (6,), (6,), epsilon=0.0),
        Case("offset", normal(3, 9, mean=100.0), (9,)),
        Case("row of zeros", values([[0.0] * 5, [1.0, -2.0, 4.0, 1e-3, -0.0]]), (5,)),
        Case("tiny and huge", values([[1e-18, -2e-18, 0.0], [1e18, 3e18, -1e10]]), (3,)),
        Case("one feature", (3, 1), (1,)),
        Case("empty batch", (0, 4), (4,)),
        Case("transformer", (4096, 1024), (1024,), bench=True),
    ),
)
