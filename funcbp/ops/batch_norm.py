"""Normalisation of each channel over all examples and places, in training and in inference.

    m = mean_i x_i    v = mean_i (x_i - m)^2    s = (v + epsilon)^1/2    over all i that count
    y_i = (x_i - m) / s scale + bias                                     for every i

Backward, of `batch_norm`, which returns (y, m, v) and gets (dy, dm, dv). Let g_i = dy_i scale, n
the number of i that count, and c_i = 1 if i counts, else 0. From y alone m gets -sum_i g_i / s and
v gets -sum_i g_i (x_i - m) / (2 s^3); each i that counts has a share of both and of dm and dv:
    dx_i = (g_i - c_i (sum_k g_k + (x_i - m) sum_k g_k (x_k - m) / s^2) / n) / s
           + c_i (dm + 2 (x_i - m) dv) / n
    dscale = sum_i dy_i (x_i - m) / s        dbias = sum_i dy_i

Backward, of `batch_norm_inference`, where m and v are arguments:
    dx_i = g_i / s    dm = -sum_i g_i / s    dv = -sum_i g_i (x_i - m) / (2 s^3)

Saves: x, mask and scale, arguments, and three numbers a channel: s and m, the latter as the sum of
       two. In inference nothing beyond the arguments.
Edge:  a constant channel gives y = bias. One i that counts gives dx = 0 but for dm. If none counts
       (a mask that is false, an empty batch), m = v = 0. What does not count must still be finite.
Dtype: computes in float32 or wider; y has x's dtype, m and v the promoted one of x, scale and bias.
Ref:   Ioffe and Szegedy, 2015, algorithm 1 and section 3.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from funcbp.case import Case, booleans, normal, uniform, values
from funcbp.core import InputError, op
from funcbp.ops._moments import moments
from funcbp.ops._numeric import rows, wide


def plain(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Float[Array, "*batch c"], Float[Array, " c"], Float[Array, " c"]]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, with the statistics of this batch.

    Args:
      x: [batch, ..., c].
      scale: [c], or None for 1.
      bias: [c], or None for 0.
      mask: [batch, ...]: the statistics count where it is true; None for everywhere.
      epsilon: added to the variance; in the square of x's units.

    Returns:
      (y, mean, variance): y of the shape and dtype of x; two arrays [c] for running averages. The
      variance is that of these numbers (divided by n, not by n - 1).

    Raises:
      InputError: scale, bias or mask does not fit x.
    """
    axes, dtype = tuple(range(x.ndim - 1)), _statistics_dtype(x, scale, bias)
    # The largest of (n, 1): without elements the sums are 0, and so are the means.
    n = jnp.maximum(_count(x, mask), 1).astype(dtype)
    c = 1 if mask is None else mask[..., None]
    v = x.astype(dtype)
    m = jnp.sum(v * c, axis=axes) / n
    variance = jnp.sum(jnp.square(v - m) * c, axis=axes) / n
    y = (v - m) / jnp.sqrt(variance + epsilon)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype), m, variance


def _statistics_dtype(x, scale, bias):
    return jnp.result_type(*[v for v in (x, scale, bias) if v is not None])


def _count(x, mask):
    """How many elements of each channel count."""
    return rows(x).shape[0] if mask is None else jnp.sum(mask)


def check(x, scale=None, bias=None, mask=None, *, epsilon):
    """Raises if scale, bias or mask does not fit x."""
    check_channels(x, scale=scale, bias=bias)
    if mask is not None and mask.shape != x.shape[:-1]:
        raise InputError(
            f"mask must have shape {x.shape[:-1]}, that of x without its channels, got "
            f"{mask.shape}; broadcast it first: jnp.broadcast_to(mask, x.shape[:-1])"
        )


def check_channels(x, **vectors):
    """Raises if x has no batch axis, or a vector is not one number for each channel."""
    if x.ndim < 2:
        raise InputError(
            f"x must have a first axis of examples and a last of channels; got shape {x.shape}"
        )
    for name, v in vectors.items():
        if v is not None and v.shape != x.shape[-1:]:
            raise InputError(
                f"{name} must have shape {x.shape[-1:]}, one number for each channel "
                f"of x {x.shape}, got {v.shape}; check which layer feeds this one"
            )


def _sums(x):
    """The sum of each channel, [c]."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def fwd(x, scale=None, bias=None, mask=None, *, epsilon):
    n = jnp.maximum(_count(x, mask), 1)

    def average(v):
        return _sums(v if mask is None else jnp.where(mask[..., None], v, 0)) / n

    m, shift, variance = moments(wide(x), average)
    s = jnp.sqrt(variance + epsilon)
    y = _affine((wide(x) - m) - shift, s, scale, bias).astype(x.dtype)
    dtype = _statistics_dtype(x, scale, bias)
    statistics = [_mapped_with(v.astype(dtype), scale, bias) for v in (m + shift, variance)]
    return (y, *statistics), (x, scale, bias, mask, m, shift, s)


def _mapped_with(v, *others):
    """v, but mapped under vmap wherever one of the others is.

    y is mapped there, and vmap runs the reverse rule once for each entry: the cotangent of an
    output that is not mapped would then count once for each of them.
    """
    for other in others:
        if other is not None:
            v = jnp.where(jnp.zeros(v.shape, bool), other.astype(v.dtype), v)
    return v


def _affine(u, s, scale, bias):
    y = u / s
    y = y if scale is None else y * wide(scale)
    return y if bias is None else y + wide(bias)


def bwd(saved, cotangents, *, epsilon):
    x, scale, bias, mask, m, shift, s = saved
    dy, dm, dv = map(wide, cotangents)
    w = 1 if scale is None else wide(scale)
    n = jnp.maximum(_count(x, mask), 1)
    us = (wide(x) - m) - shift  # (x - m), that is u s
    sum_dy, sum_dyus = _sums(dy), _sums(dy * us)
    from_y = sum_dy * w / n + us * (sum_dyus * w / n / jnp.square(s))
    from_statistics = dm / n + us * (2 * dv / n)
    if mask is not None:
        from_y = jnp.where(mask[..., None], from_y, 0)
        from_statistics = jnp.where(mask[..., None], from_statistics, 0)
    dx = (dy * w - from_y) / s + from_statistics
    return dx, *_vectors(scale, bias, sum_dyus / s, sum_dy), None


def _vectors(scale, bias, dscale, dbias):
    return None if scale is None else dscale, None if bias is None else dbias


batch_norm = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="batch_norm",
    cases=(
        Case("image", (3, 2, 3, 4), (4,), (4,)),
        Case("masked, no bias", (4, 5, 2), (2,), mask=booleans(4, 5)),
        Case("offset", normal(9, 4, mean=100.0), None, (4,), dtypes=("float32",)),
        Case("empty batch", (0, 4, 2), (2,), (2,)),
        Case("feature maps", (32, 56, 56, 64), (64,), (64,), bench=True),
    ),
)


def inference_plain(
    x: Float[Array, "*batch c"],
    mean: Float[Array, " c"],
    var: Float[Array, " c"],
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*batch c"]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, with statistics that are given.

    Args:
      x: [batch, ..., c].
      mean: [c], such as the running average of the means of batches.
      var: [c], of variances; not negative.
      scale: [c], or None for 1.
      bias: [c], or None for 0.
      epsilon: added to the variance; in the square of x's units.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: one of the others does not have shape [c].
    """
    y = (x - mean) / jnp.sqrt(var + epsilon)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def inference_check(x, mean, var, scale=None, bias=None, *, epsilon):
    """Raises if one of the others does not fit x."""
    check_channels(x, mean=mean, var=var, scale=scale, bias=bias)


def inference_fwd(x, mean, var, scale=None, bias=None, *, epsilon):
    s = jnp.sqrt(wide(var) + epsilon)
    return _affine(wide(x) - wide(mean), s, scale, bias).astype(x.dtype), (
        x,
        mean,
        var,
        scale,
        bias,
    )


def inference_bwd(saved, dy, *, epsilon):
    x, mean, var, scale, bias = saved
    dy, s = wide(dy), jnp.sqrt(wide(var) + epsilon)
    w = 1 if scale is None else wide(scale)
    sum_dy, sum_dyus = _sums(dy), _sums(dy * (wide(x) - wide(mean)))
    dvar = -sum_dyus * w / (2 * s * jnp.square(s))
    return dy * w / s, -sum_dy * w / s, dvar, *_vectors(scale, bias, sum_dyus / s, sum_dy)


batch_norm_inference = op(
    inference_plain,
    inference_fwd,
    inference_bwd,
    check=inference_check,
    name="batch_norm_inference",
    cases=(
        Case("image", (3, 2, 3, 4), (4,), uniform(4), (4,), (4,)),
        Case("no scale, variance 0", (4, 2), (2,), values([0.0, 4.0]), None, (2,), epsilon=1e-3),
        # The transformations turn signs, and no sum saves an empty one from a negative variance.
        Case("empty batch", (0, 4, 2), (2,), uniform(2), transformed=False),
        Case("feature maps", (32, 56, 56, 64), (64,), uniform(64), (64,), (64,), bench=True),
    ),
)
