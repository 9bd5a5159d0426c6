"""Normalisation over space, for each channel of each example alone.

    m = mean_i x_i    s = (mean_i (x_i - m)^2 + epsilon)^1/2    over all i of one channel
    y_i = (x_i - m) / s scale + bias

Backward. That of `group_norm`, where each channel is a group. With g_i = dy_i scale:
    dx_i = (g_i - mean_k g_k - (x_i - m) mean_k g_k (x_k - m) / s^2) / s
    dscale = sum_i dy_i (x_i - m) / s        dbias = sum_i dy_i        over all examples

Saves: x and scale, arguments, and three numbers a channel of each example: s and m, the latter as
       the sum of two.
Edge:  a constant channel gives y = bias; one pixel gives dx = 0; an empty batch or empty space
       gives dscale = dbias = 0.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Ulyanov, Vedaldi and Lempitsky, 2016, equation 2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal
from funcbp.core import op
from funcbp.ops.group_norm import bwd as group_bwd
from funcbp.ops.group_norm import check as check_groups
from funcbp.ops.group_norm import fwd as group_fwd


def plain(
    x: Float[Array, "batch *space channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "batch *space channels"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over space.

    Args:
      x: [batch, ..., channels].
      scale: [channels], or None for 1.
      bias: [channels], or None for 0.
      epsilon: added to the variance; in the square of x's units.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: scale or bias does not have shape [channels].
    """
    space = tuple(range(1, x.ndim - 1))
    u = x - jnp.mean(x, axis=space, keepdims=True)
    y = u / jnp.sqrt(jnp.mean(jnp.square(u), axis=space, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def check(x, scale=None, bias=None, *, epsilon):
    """Raises if scale or bias does not fit the channels."""
    check_groups(x, scale, bias, groups=max(x.shape[-1], 1) if x.ndim else 1, epsilon=epsilon)


def fwd(x, scale=None, bias=None, *, epsilon):
    return group_fwd(x, scale, bias, groups=max(x.shape[-1], 1), epsilon=epsilon)


def bwd(saved, dy, *, epsilon):
    return group_bwd(saved, dy, groups=max(dy.shape[-1], 1), epsilon=epsilon)


instance_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("image", (2, 3, 5, 3), (3,), (3,)),
        Case("sequence, no scale", (3, 7, 2), None, (2,)),
        Case("offset", normal(2, 9, 4, mean=100.0), (4,), (4,), dtypes=("float32",)),
        Case("empty batch", (0, 4, 2), (2,), (2,)),
        Case("feature maps", (16, 64, 64, 64), (64,), (64,), bench=True),
    ),
)
