"""The largest element of each window.

    y_o = max over i in window o of x_i        the window's padding counts as -inf

Backward. A window's cotangent goes to its largest element, a_o; an element that is the largest of
several overlapping windows gets the sum:
    dx_i = sum over the windows o that hold i, with a_o = i, of dy_o

Saves: x, an argument. The positions a are found again, one byte for each window.
Edge:  of equal elements the first in row-major order gets all of dy, as in XLA; elements equal to
       the padding too: a window of -inf that starts in the padding sends its dy there. A window
       with nan gives nan; its dy goes to one of its elements. An empty batch gives an empty dx.
Dtype: the value is exact; cotangents are summed in float32 or wider; returns x's dtype.
Ref:   LeCun et al., 1998, section II.B, with the maximum of Scherer, Müller and Behnke, 2010.
"""

import jax.numpy as jnp
from jax import lax, vjp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import op
from funcbp.ops._numeric import wide
from funcbp.ops._windows import (
    Padding,
    check_windows,
    first_maximum,
    gather,
    in_parts,
    maximum,
    windows,
)

ROWS = ((1.0, 1.0, 0.0, 2.0), (1.0, 3.0, 3.0, 2.0), (0.0, 3.0, -1.0, -1.0))
TIES = values([[[[v] for v in row] for row in ROWS]])


def plain(
    inputs: Float[Array, "..."],
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "..."]:
    """The maximum of each window, feature by feature; called as `flax.linen.max_pool` is.

    Args:
      inputs: [..., *spatial, features].
      window_shape: the window's size along each spatial axis: 1, 2, 3 or more of them.
      strides: the distance of neighbouring windows along each spatial axis; None for 1.
      padding: "VALID", "SAME", "SAME_LOWER", or a pair (before, after) for each spatial axis.

    Returns:
      [..., *windows, features], in the dtype of inputs.

    Raises:
      InputError: the settings do not fit the input.
    """
    w = windows(inputs.shape, window_shape, strides, padding)
    settings = w.full(inputs.ndim - len(w.shape) - 1)
    return lax.reduce_window(inputs, -jnp.inf, lax.max, *settings)


def check(inputs, window_shape, strides, padding):
    """Raises if the settings do not fit the input."""
    check_windows("inputs", inputs, window_shape, strides, padding)


def fwd(inputs, window_shape, strides, padding):
    w = windows(inputs.shape, window_shape, strides, padding)
    if not w.short:
        return plain(inputs, window_shape, strides, padding), inputs
    return in_parts(lambda x: maximum(x, w), w, inputs), inputs


def bwd(x, dy, *, window_shape, strides, padding):
    w = windows(x.shape, window_shape, strides, padding)
    if not w.short:
        return vjp(lambda x: plain(x, window_shape, strides, padding), x)[1](dy)

    def sent(position, a, dy):
        return jnp.where(a == position, dy, 0)

    def spread(x, dy):
        return gather(sent, w, (first_maximum(x, w), -1), (wide(dy), 0)).astype(x.dtype)

    return (in_parts(spread, w, x, dy),)


max_pool = op(
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
        Case("ties", TIES, window_shape=(2, 3), padding="SAME"),
        Case("1-D, gaps", (2, 7, 1), window_shape=(2,), strides=(3,), padding=((1, 2),)),
        Case("3-D, no batch axis", (3, 4, 2, 2), window_shape=(2, 3, 1), strides=(1, 2, 1)),
        Case("long window", (1, 70, 2), window_shape=(65,), strides=(2,)),
        Case("empty batch", (0, 4, 4, 2), window_shape=(2, 2)),
        Case("halving", (32, 64, 64, 64), window_shape=(2, 2), strides=(2, 2), bench=True),
        Case(
            "stem",
            (8, 112, 112, 64),
            window_shape=(3, 3),
            strides=(2, 2),
            padding="SAME",
            bench=True,
        ),
    ),
)
