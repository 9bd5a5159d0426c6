"""Convolution of each feature with kernels of its own.

    y_bpc = sum_k x_b(p s + k d - low)c w_kc + bias_c

The letters are those of `conv`, of which this is the case groups = features. With m kernels a
feature, output feature c belongs to input feature c // m.

Backward. As in `conv`, without its sums over features:
    dx_bqc = sum over k and the p with p s = q + low - k d of dy_bpc w_kc
    dw_kc = sum_bp x_b(p s + k d - low)c dy_bpc        dbias_c = sum_bp dy_bpc

XLA walks the features one by one on a CPU. Here each k is one shift of the whole input: y and dx
are sums of shifted products, and dw_k the sum over one of them.

Saves: x and w, both arguments: nothing beyond the input.
Edge:  an empty batch, or a kernel that fits nowhere, gives dw = dbias = 0.
Dtype: sums in float32 or wider; the result has the promoted dtype of x, w and b.
Ref:   Sifre and Mallat, 2014, section 2; Howard et al., 2017, equation 3.
"""

import itertools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._convolution import (
    Geometry,
    Numbers,
    check_convolution,
    convolve,
    correlate,
    promoted,
    transposed,
    turned,
)
from funcbp.ops._numeric import rows, wide
from funcbp.ops._windows import MOST_TAPS, Padding, Windows, check_padding, in_parts, total
from funcbp.ops.conv import geometry
from funcbp.ops.conv import plain as plain_conv


def plain(
    x: Float[Array, "batch *spatial c"],
    w: Float[Array, "*kernel 1 o"],
    b: Float[Array, " o"] | None = None,
    *,
    strides: Numbers = 1,
    padding: Padding = "SAME",
    dilation: Numbers = 1,
) -> Float[Array, "batch *positions o"]:
    """`conv` with a group for each feature of x, plus b.

    Args:
      x: [batch, *spatial, c]: channels last, with 1, 2 or 3 spatial axes.
      w: kernels, [*kernel, 1, c * m]: m for each feature, those of the first feature first.
      b: bias, [c * m], or None for none.
      strides: the distance of neighbouring positions, one number or one per spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", or a pair (before, after) for each spatial axis.
      dilation: the distance of neighbouring kernel elements, one number or one per spatial axis.

    Returns:
      [batch, *positions, c * m], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes or settings do not fit.
    """
    return plain_conv(
        x, w, b, strides=strides, padding=padding, dilation=dilation, groups=x.shape[-1]
    )


def check(x, w, b=None, *, strides, padding, dilation):
    """Raises if shapes or settings do not fit."""
    if x.ndim and x.shape[-1] < 1:
        raise InputError(f"x must have at least one feature on its last axis, got shape {x.shape}")
    check_convolution(x, w, b, x.shape[-1], strides=strides, dilation=dilation)
    check_padding(padding, x.ndim - 2)


def _shifts(x, g, kernel, count):
    """For each k, in row-major order, the x_(p s + k d - low) at all p: [..., *count, c]."""
    lead = [(0, 0, 0)] * (x.ndim - len(kernel) - 1)
    margins = [(*pads, e - 1) for pads, e in zip(g.pads, g.stretch, strict=True)]
    if any(map(any, margins)):
        x = lax.pad(x, jnp.zeros((), x.dtype), [*lead, *margins, (0, 0, 0)])
    outer = x.shape[: len(lead)]

    def at(k):
        first = [i * d for i, d in zip(k, g.dilation, strict=True)]
        ends = [a + (m - 1) * s + 1 for a, m, s in zip(first, count, g.strides, strict=True)]
        starts, steps = (*[0] * len(lead), *first, 0), (*[1] * len(lead), *g.strides, 1)
        return wide(lax.slice(x, starts, (*outer, *ends, x.shape[-1]), steps))

    return [at(k) for k in itertools.product(*map(range, kernel))]


def _by_parts(f, g, kernel, *arrays):
    """`f(*arrays)`, a few examples at a time where f pads."""
    size = arrays[0].shape[1:-1]
    pads = tuple((int(e > 1 or any(p)), 0) for p, e in zip(g.pads, g.stretch, strict=True))
    return in_parts(f, Windows(size, tuple(kernel), g.strides, pads), *arrays)


def _convolve(x, w, g, count):
    """sum_k x_(p s + k d - low)c w_kc at `count` positions p, in float32 or wider."""
    kernel, dtype = w.shape[:-2], jnp.promote_types(x.dtype, jnp.float32)

    def by_library(x, w):
        return convolve(x, w, g, dtype)

    def by_shifts(x, w):
        taps = wide(w).reshape(-1, w.shape[-1])

        def summed(x):
            shifts = _shifts(x, g, kernel, count)
            return total([v * taps[k] for k, v in enumerate(shifts)])

        return _by_parts(summed, g, kernel, x)

    if math.prod(kernel) > MOST_TAPS:
        return by_library(x, w)
    return lax.platform_dependent(x, w, cpu=by_shifts, default=by_library)


def _weight_gradient(x, dy, g, kernel):
    """sum_bp x_b(p s + k d - low)c dy_bpc, in float32 or wider: [*kernel, 1, c]."""
    shape = (*kernel, 1, dy.shape[-1])

    def by_library(x, dy):
        return correlate(x, dy, g, shape)

    def by_shifts(x, dy):
        places = tuple(range(-1 - len(kernel), -1))
        count = dy.shape[1:-1]

        def of_each(x, dy):
            products = [v * wide(dy) for v in _shifts(x, g, kernel, count)]
            sums = jnp.stack([jnp.sum(v, axis=places) for v in products], axis=-2)
            return sums.reshape(*sums.shape[:-2], *kernel, x.shape[-1])

        return jnp.sum(_by_parts(of_each, g, kernel, x, dy), axis=0).reshape(shape)

    if math.prod(kernel) > MOST_TAPS:
        return by_library(x, dy)
    return lax.platform_dependent(x, dy, cpu=by_shifts, default=by_library)


def _repeated(x, features):
    """x with each feature as often as it has kernels."""
    return jnp.repeat(x, features // x.shape[-1], axis=-1)


def _geometry(x, w, strides, padding, dilation) -> Geometry:
    return geometry(x, w, strides, padding, dilation, w.shape[-1])


def fwd(x, w, b=None, *, strides, padding, dilation):
    dtype = jnp.result_type(x, w) if b is None else jnp.result_type(x, w, b)
    g = _geometry(x, w, strides, padding, dilation)
    count = _count(x, w, g)
    if 0 in (len(x), *count):
        return jnp.zeros((len(x), *count, w.shape[-1]), dtype), (x, w, b)
    v, taps = promoted(x, w)
    y = _convolve(_repeated(v, w.shape[-1]), taps, g, count)
    return (y if b is None else y + wide(b)).astype(dtype), (x, w, b)


def _count(x, w, g):
    """How many positions there are along each axis."""
    return tuple(
        max(0, (n + low + high - (k - 1) * d - 1) // s + 1)
        for n, k, s, (low, high), d in zip(
            x.shape[1:-1], w.shape, g.strides, g.pads, g.dilation, strict=False
        )
    )


def bwd(saved, dy, *, strides, padding, dilation):
    x, w, b = saved
    if 0 in dy.shape:
        return None, None, None
    g = _geometry(x, w, strides, padding, dilation)
    kernel, size = w.shape[:-2], x.shape[1:-1]
    back = transposed(g, kernel, size, dy.shape[1:-1])
    v, turned_w, dz = promoted(x, turned(w, w.shape[-1]), dy)
    dx = _convolve(dz, turned_w, back, size)
    dx = jnp.sum(dx.reshape(*x.shape, -1), axis=-1)
    dw = _weight_gradient(_repeated(v, w.shape[-1]), dz, g, kernel)
    return dx, dw, None if b is None else jnp.sum(rows(wide(dy)), axis=0)


depthwise_conv = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D", (2, 5, 4, 2), (3, 2, 1, 2), (2,), strides=(2, 1)),
        Case("1-D, two kernels a feature", (2, 9, 2), (3, 1, 4), None, dilation=2, padding="VALID"),
        Case(
            "3-D, uneven padding",
            (1, 3, 4, 2, 2),
            (2, 2, 1, 1, 2),
            padding=((1, 0), (0, 2), (1, 1)),
        ),
        Case("long kernel", (1, 70, 2), (65, 1, 2), (2,), strides=3),
        Case("empty batch", (0, 4, 2), (2, 1, 2), (2,)),
        Case("3x3", (32, 56, 56, 128), (3, 3, 1, 128), (128,), bench=True),
    ),
)
