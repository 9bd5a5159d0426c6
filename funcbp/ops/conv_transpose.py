"""Transposed convolution over one, two or three spatial axes.

    y_bpo = sum_ki x'_b(p + k d - low)i w_kio + bias_o        x'_(q s) = x_q, and 0 elsewhere

p and k are positions (one number an axis) in the output and in the kernel, s the strides, by which
the input is stretched, d the dilation and low the padding before.

Backward. Each product x_bqi w_kio meets dy_bpo where p = q s + low - k d, so
    dx_bqi = sum_ko dy_b(q s + low - k d)o w_kio
    dw_kio = sum_bq x_bqi dy_b(q s + low - k d)o        dbias_o = sum_bp dy_bpo

dx is a convolution of dy with strides s, and dw one of dy with the small x: neither stretches.

Saves: x and w, both arguments: nothing beyond the input.
Edge:  an empty batch gives dw = dbias = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of x, w and b.
Ref:   Zeiler et al., 2010, section 2; Dumoulin and Visin, 2016, section 4.
"""

from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
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
    w: Float[Array, "*kernel i o"],
    b: Float[Array, " o"] | None = None,
    *,
    strides: Numbers = 1,
    padding: Padding = "SAME",
    dilation: Numbers = 1,
) -> Float[Array, "batch *positions o"]:
    """The convolution of the stretched input, plus b: as `jax.lax.conv_transpose`.

    Args:
      x: [batch, *spatial, i]: channels last, with 1, 2 or 3 spatial axes.
      w: kernel, [*kernel, i, o], with as many spatial axes. It is not turned round.
      b: bias, [o], or None for none.
      strides: by what the input is stretched, one number or one per spatial axis.
      padding: "SAME" (the output is strides times the input), "VALID" (as large as the kernel
        reaches), or a pair (before, after) for each spatial axis, of the stretched input.
      dilation: the distance of neighbouring kernel elements, one number or one per spatial axis.

    Returns:
      [batch, *positions, o], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes or settings do not fit.
    """
    g = _geometry(x, w, strides, padding, dilation)
    x, w = promoted(x, w)
    y = convolve(x, w, g)
    return y if b is None else y + b


def _geometry(x, w, strides, padding, dilation) -> Geometry:
    axes = x.ndim - 2
    strides, dilation = per_axis(strides, axes), per_axis(dilation, axes)
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(w.shape, dilation, strict=False)]
        pads = _same if padding == "SAME" else _valid
        padding = tuple(pads(k, s) for k, s in zip(reach, strides, strict=True))
    return Geometry((1,) * axes, padding, strides, dilation)


def _same(k, s):
    before = k - 1 if s > k - 1 else -(-(k + s - 2) // 2)
    return before, k + s - 2 - before


def _valid(k, s):
    return k - 1, s - 1 + max(k - s, 0)


def check(x, w, b=None, *, strides, padding, dilation):
    """Raises if shapes or settings do not fit."""
    check_convolution(x, w, b, 1, strides=strides, dilation=dilation)
    if padding == "SAME_LOWER" or 0 in x.shape[1:-1]:
        raise InputError(
            "padding must be SAME, VALID or pairs (before, after), and no spatial axis of size 0, "
            f"got padding {padding!r} and x of shape {x.shape}; give the pairs instead"
        )
    check_padding(padding, x.ndim - 2)


def fwd(x, w, b=None, *, strides, padding, dilation):
    return convolved(x, w, b, _geometry(x, w, strides, padding, dilation)), (x, w, b)


def bwd(saved, dy, *, strides, padding, dilation):
    x, w, b = saved
    return pullback(x, w, b, dy, _geometry(x, w, strides, padding, dilation))


conv_transpose = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D", (2, 3, 4, 2), (3, 2, 2, 4), (4,), strides=(2, 1)),
        Case("1-D, gaps", (2, 5, 3), (2, 3, 2), None, strides=3, padding="VALID", dilation=2),
        Case(
            "3-D, pairs",
            (1, 2, 3, 2, 2),
            (2, 2, 1, 2, 1),
            strides=2,
            padding=((1, 1), (0, 2), (0, 0)),
        ),
        Case("empty batch", (0, 4, 2), (2, 2, 3), (3,)),
        Case("upsampling", (32, 28, 28, 64), (4, 4, 64, 64), (64,), strides=2, bench=True),
    ),
)
