"""The mean of each window.

    y_o = sum over i in window o of x_i / n_o        n_o the number of elements of window o

Backward. y is linear in x, so
    dx_i = sum over the windows o that hold i of dy_o / n_o

Saves: nothing: the rule needs the shape of x alone.
Edge:  the window's padding counts as zeros. With `count_include_pad` n_o is the window's full
       size; without it n_o leaves the padding out, and a window of padding alone gives nan and
       sends nothing. An empty batch gives an empty dx.
Dtype: sums in float32 or wider, returns x's dtype.
Ref:   LeCun et al., 1998, section II.B.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from funcbp.case import Case
from funcbp.core import op
from funcbp.ops._numeric import wide
from funcbp.ops._windows import (
    Padding,
    Windows,
    check_windows,
    gather,
    in_parts,
    shape_only,
    taps,
    total,
    windows,
)


def plain(
    inputs: Float[Array, "..."],
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Float[Array, "..."]:
    """The mean of each window, feature by feature; called as `flax.linen.avg_pool` is.

    Args:
      inputs: [..., *spatial, features].
      window_shape: the window's size along each spatial axis: 1, 2, 3 or more of them.
      strides: the distance of neighbouring windows along each spatial axis; None for 1.
      padding: "VALID", "SAME", "SAME_LOWER", or a pair (before, after) for each spatial axis.
      count_include_pad: divide by the window's full size; False: by its elements within inputs.

    Returns:
      [..., *windows, features], in the dtype of inputs.

    Raises:
      InputError: the settings do not fit the input.
    """
    w = windows(inputs.shape, window_shape, strides, padding)
    sums = lax.reduce_window(inputs, 0.0, lax.add, *w.full(inputs.ndim - len(w.shape) - 1))
    return sums / _sizes(w, count_include_pad, inputs.dtype)


def check(inputs, window_shape, strides, padding, count_include_pad):
    """Raises if the settings do not fit the input."""
    check_windows("inputs", inputs, window_shape, strides, padding)


def _sizes(w: Windows, count_include_pad: bool, dtype) -> Array:
    """n, [*count, 1]: a product over the axes, each of which is cut at its own ends."""
    if count_include_pad:
        return jnp.asarray(math.prod(w.shape), dtype)
    n = np.ones((1,) * (len(w.shape) + 1))
    for axis, (size, k, s, (low, _), m) in enumerate(zip(*w, w.count, strict=True)):
        starts = np.arange(m) * s - low
        inside = np.maximum(np.minimum(starts + k, size) - np.maximum(starts, 0), 0)
        n = n * np.expand_dims(inside, [a for a in range(n.ndim) if a != axis])
    return jnp.asarray(n, dtype)


def fwd(inputs, window_shape, strides, padding, count_include_pad):
    w = windows(inputs.shape, window_shape, strides, padding)
    if not w.short:
        y = plain(inputs, window_shape, strides, padding, count_include_pad)
        return y, shape_only(inputs)

    def mean(x):
        sums = total([wide(v) for v in taps(x, w, 0)])
        return (sums / _sizes(w, count_include_pad, sums.dtype)).astype(x.dtype)

    return in_parts(mean, w, inputs), shape_only(inputs)


def bwd(saved, dy, *, window_shape, strides, padding, count_include_pad):
    w = windows(saved.shape[1:], window_shape, strides, padding)

    def spread(dy):
        shares = wide(dy) / _sizes(w, count_include_pad, wide(dy).dtype)
        dx = gather(_same, w, (shares, 0)) if w.short else _gather_long(shares, w)
        return dx.astype(dy.dtype)

    return (in_parts(spread, w, dy),)


def _gather_long(shares, w):
    """The same for windows too long to unroll: windows of dilated shares, one for each element."""
    lead = shares.ndim - len(w.shape) - 1
    margins = []
    for n, k, s, (low, _), m in zip(*w, w.count, strict=True):
        before = k - 1 - low
        margins.append((before, n + k - 1 - before - max(0, (m - 1) * s + 1), s - 1))
    framed = lax.pad(
        shares, jnp.zeros((), shares.dtype), [*[(0, 0, 0)] * lead, *margins, (0, 0, 0)]
    )
    return lax.reduce_window(framed, 0.0, lax.add, w.full(lead)[0], (1,) * shares.ndim, "VALID")


def _same(position, share):
    return share


avg_pool = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D", (2, 4, 5, 6), window_shape=(2, 2), strides=(2, 2)),
        Case(
            "overlapping, remainder",
            (2, 7, 4, 2),
            window_shape=(3, 2),
            strides=(2, 1),
            padding="SAME",
        ),
        Case(
            "1-D, own elements only",
            (2, 7, 1),
            window_shape=(3,),
            strides=(2,),
            padding=((2, 1),),
            count_include_pad=False,
        ),
        Case("3-D, no batch axis", (3, 4, 2, 2), window_shape=(2, 3, 1), strides=(1, 2, 1)),
        Case("long window", (1, 70, 2), window_shape=(65,), strides=(2,)),
        Case("empty batch", (0, 4, 4, 2), window_shape=(2, 2)),
        Case("halving", (32, 64, 64, 64), window_shape=(2, 2), strides=(2, 2), bench=True),
        Case(
            "smoothing",
            (16, 56, 56, 64),
            window_shape=(3, 3),
            padding="SAME",
            count_include_pad=False,
            bench=True,
        ),
    ),
)
