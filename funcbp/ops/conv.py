"""Convolution over one, two or three spatial axes.

    y_bpo = sum_ki x_b(p s + k d - low)i w_kio + bias_o

p and k are positions (one number an axis) in the output and in the kernel, s the strides, d the
dilation and low the padding before; x is 0 in the padding. With groups, i and o run within one.

Backward. Each product x_bqi w_kio meets dy_bpo where q = p s + k d - low, so
    dx_bqi = sum over k, o and the p with p s = q + low - k d of dy_bpo w_kio
    dw_kio = sum_bp x_b(p s + k d - low)i dy_bpo        dbias_o = sum_bp dy_bpo

Both are convolutions again: dx of dy, s times stretched, with the kernel turned round; dw of x with
dy, where batch and features change places. On a CPU dw is taken in parts that XLA is fast at.

Saves: x and w, both arguments: nothing beyond the input.
Edge:  an empty batch, or a kernel that fits nowhere, gives dw = dbias = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of x, w and b.
Ref:   LeCun et al., 1989, section 4; strides and groups: Krizhevsky et al., 2012, section 3.5.
"""

from jax import lax
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import op
from funcbp.ops._convolution import (
    Geometry,
    Numbers,
    check_convolution,
    convolve,
    convolved,
    per_axis,
    promoted,
    pullback,
)
from funcbp.ops._windows import Padding, check_padding


def plain(
    x: Float[Array, "batch *spatial i"],
    w: Float[Array, "*kernel ig o"],
    b: Float[Array, " o"] | None = None,
    *,
    strides: Numbers = 1,
    padding: Padding = "SAME",
    dilation: Numbers = 1,
    groups: int = 1,
) -> Float[Array, "batch *positions o"]:
    """The sum of products of the kernel with the input, at each position, plus b.

    Args:
      x: [batch, *spatial, i]: channels last, with 1, 2 or 3 spatial axes.
      w: kernel, [*kernel, i // groups, o], with as many spatial axes.
      b: bias, [o], or None for none.
      strides: the distance of neighbouring positions, one number or one per spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", or a pair (before, after) for each spatial axis.
      dilation: the distance of neighbouring kernel elements, one number or one per spatial axis.
      groups: into so many parts features in and out are cut; each part sees only its own.

    Returns:
      [batch, *positions, o], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes or settings do not fit.
    """
    g = geometry(x, w, strides, padding, dilation, groups)
    x, w = promoted(x, w)
    y = convolve(x, w, g)
    return y if b is None else y + b


def geometry(x, w, strides, padding, dilation, groups) -> Geometry:
    """Where kernel and input meet."""
    axes = x.ndim - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(w.shape, dilation, strict=False)]
        padding = tuple(lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding))
    return Geometry(strides, padding, (1,) * axes, dilation, groups)


def check(x, w, b=None, *, strides, padding, dilation, groups):
    """Raises if shapes or settings do not fit."""
    check_convolution(x, w, b, groups, strides=strides, dilation=dilation)
    check_padding(padding, x.ndim - 2)


def fwd(x, w, b=None, *, strides, padding, dilation, groups):
    return convolved(x, w, b, geometry(x, w, strides, padding, dilation, groups)), (x, w, b)


def bwd(saved, dy, *, strides, padding, dilation, groups):
    x, w, b = saved
    return pullback(x, w, b, dy, geometry(x, w, strides, padding, dilation, groups))


conv = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D, groups", (2, 5, 4, 4), (3, 2, 2, 6), (6,), strides=(2, 1), groups=2),
        Case(
            "1-D, dilated, many",
            (34, 9, 3),
            (3, 3, 2),
            None,
            dilation=2,
            padding="VALID",
            strides=3,
        ),
        Case("1x1", (2, 3, 4, 3), (1, 1, 3, 2), (2,), strides=2, dtypes=("float32",)),
        Case(
            "3-D, uneven padding",
            (1, 3, 4, 2, 2),
            (2, 2, 1, 2, 3),
            padding=((1, 0), (0, 2), (1, 1)),
        ),
        Case("empty batch", (0, 4, 2), (2, 2, 3), (3,)),
        Case("3x3", (32, 56, 56, 64), (3, 3, 64, 64), (64,), bench=True),
    ),
)
