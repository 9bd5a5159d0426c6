"""The mean over all spatial axes.

    y_c = sum_i x_ic / n        i one of the n places

Backward. Each place has the same share:
    dx_ic = dy_c / n

Saves: nothing: the rule needs the shape of x alone.
Edge:  an empty batch gives an empty dx; an axis without places is refused.
Dtype: sums in float32 or wider, returns x's dtype.
Ref:   Lin, Chen and Yan, 2014, section 3.2.

Autodiff of the mean does the same work: the rule is as fast, not faster.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import op
from funcbp.ops._numeric import wide
from funcbp.ops._windows import check_places, shape_only


def plain(
    x: Float[Array, "batch *spatial c"], *, keepdims: bool = False
) -> Float[Array, "batch *ones c"]:
    """The mean of each feature over the axes between the first and the last.

    Args:
      x: [batch, *spatial, features].
      keepdims: keep each spatial axis, with size 1.

    Returns:
      [batch, features], or [batch, 1, ..., features], in the dtype of x.

    Raises:
      InputError: x has no spatial axis, or one of size 0.
    """
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=keepdims)


def check(x, *, keepdims):
    """Raises if there is nothing to take the mean of."""
    check_places(x)


def fwd(x, *, keepdims):
    return plain(x, keepdims=keepdims), shape_only(x)


def bwd(saved, dy, *, keepdims):
    batch, *spatial, c = saved.shape[1:]
    share = (wide(dy) / math.prod(spatial)).astype(dy.dtype)
    return (jnp.broadcast_to(share.reshape(batch, *[1] * len(spatial), c), saved.shape[1:]),)


global_avg_pool = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D", (2, 4, 6, 3)),
        Case("1-D, axes kept", (2, 5, 1), keepdims=True),
        Case("3-D, one place", (3, 1, 1, 1, 2)),
        Case("empty batch", (0, 3, 2, 2)),
        Case("head", (64, 8, 8, 2048), bench=True),
    ),
)
