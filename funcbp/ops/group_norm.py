"""Normalisation over space and groups of channels, for each example alone.

    m = mean_k x_k    s = (mean_k (x_k - m)^2 + epsilon)^1/2    over all k of one group
    y_i = (x_i - m) / s scale_c + bias_c                        c the channel of i

Backward. As in `layer_norm`, with g_i = dy_i scale_c and the means over the group:
    dx_i = (g_i - mean_k g_k - (x_i - m) mean_k g_k (x_k - m) / s^2) / s
    dscale_c = sum_i dy_i (x_i - m) / s        dbias_c = sum_i dy_i        over all i of channel c

All four sums follow from two numbers a channel, sum_i dy_i and sum_i dy_i (x_i - m).

Saves: x and scale, arguments, and three numbers a group of each example: s and m, the latter as
       the sum of two.
Edge:  a constant group gives y = bias, a group of one element dx = 0; an empty batch or empty
       space gives dscale = dbias = 0.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Wu and He, 2018, equations 1 to 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._moments import moments
from funcbp.ops._numeric import wide


def plain(
    x: Float[Array, "batch *space channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    groups: int,
    epsilon: float = 1e-5,
) -> Float[Array, "batch *space channels"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over space and a group of channels.

    Args:
      x: [batch, ..., channels]; each example is normalised alone.
      scale: [channels], or None for 1.
      bias: [channels], or None for 0.
      groups: how many groups the channels form, each of neighbours; must divide their number.
      epsilon: added to the variance; in the square of x's units.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: groups does not divide the channels, or scale or bias does not fit them.
    """
    u = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    axes = (*range(1, x.ndim - 1), -1)
    u = u - jnp.mean(u, axis=axes, keepdims=True)
    y = u / jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True) + epsilon)
    y = y.reshape(x.shape)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def check(x, scale=None, bias=None, *, groups, epsilon):
    """Raises if there are no channels, or groups, scale or bias does not fit them."""
    if x.ndim < 2:
        raise InputError(
            f"x must have a first axis of examples and a last of channels; got {x.shape}"
        )
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise InputError(
            f"groups must divide the {channels} channels of x {x.shape}, got {groups}; "
            f"{channels} gives each channel its own group, 1 puts all in one"
        )
    for name, v in (("scale", scale), ("bias", bias)):
        if v is not None and v.shape != (channels,):
            raise InputError(
                f"{name} must have shape {(channels,)}, one number for each channel "
                f"of x {x.shape}, got {v.shape}; check which layer feeds this one"
            )


def _flat(x):
    """[batch, ..., channels] -> [batch, space, channels], in float32 or wider."""
    space = x.size // max(x.shape[0] * x.shape[-1], 1)
    return wide(x).reshape(x.shape[0], space, x.shape[-1])


def _per_channel(x):
    """The sums over space, [batch, channels]."""
    return jnp.sum(x, axis=1)


def _group_mean(sums, space, groups):
    """[batch, channels] -> [batch, groups]: the mean over space and each group's channels."""
    channels = sums.shape[-1] // groups
    total = jnp.sum(sums.reshape(-1, groups, channels), axis=-1)
    return total / max(space * channels, 1)


def _at_channels(v, channels):
    """[batch, groups] -> [batch, 1, channels]: each group's number at each of its channels."""
    return jnp.repeat(v, channels // max(v.shape[-1], 1), axis=-1)[:, None]


def fwd(x, scale=None, bias=None, *, groups, epsilon):
    v = _flat(x)
    _, space, channels = v.shape

    def average(v):
        return _at_channels(_group_mean(_per_channel(v), space, groups), channels)

    m, shift, variance = moments(v, average)
    s = jnp.sqrt(variance + epsilon)
    y = ((v - m) - shift) / s
    y = y if scale is None else y * wide(scale)
    y = y if bias is None else y + wide(bias)
    each = slice(None, None, max(channels // groups, 1))
    return y.reshape(x.shape).astype(x.dtype), (
        x,
        scale,
        bias,
        *(t[..., each] for t in (m, shift, s)),
    )


def bwd(saved, dy, *, groups, epsilon):
    x, scale, bias, *statistics = saved
    w = 1 if scale is None else wide(scale)
    v, dy = _flat(x), _flat(dy)
    _, space, channels = v.shape
    m, shift, s = (_at_channels(t[:, 0], channels) for t in statistics)
    us = (v - m) - shift  # (x - m), that is u s
    sum_dy, sum_dyus = _per_channel(dy), _per_channel(dy * us)
    mean_g, mean_gus = (
        _at_channels(_group_mean(t * w, space, groups), channels) for t in (sum_dy, sum_dyus)
    )
    dx = ((dy * w - mean_g - us * (mean_gus / jnp.square(s))) / s).reshape(x.shape)
    dscale = None if scale is None else jnp.sum(sum_dyus / s[:, 0], axis=0)
    return dx, dscale, None if bias is None else jnp.sum(sum_dy, axis=0)


group_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("image", (2, 3, 2, 6), (6,), (6,), groups=3),
        Case("bare, no space", (3, 8), groups=2),
        Case("offset", normal(2, 9, 4, mean=100.0), (4,), (4,), groups=2, dtypes=("float32",)),
        Case("constant group", values([[[2.0, 2.0, 1.0, -3.0]]]), (4,), (4,), groups=2),
        Case("empty space", (2, 0, 2), (2,), (2,), groups=1),
        Case("feature maps", (32, 32, 32, 128), (128,), (128,), groups=32, bench=True),
    ),
)
