"""Images of another size, by the nearest pixel or by linear interpolation.

    y_bpc = sum_q x_bqc prod_a W^a_(q_a p_a)        one matrix W^a for each spatial axis a

W is fixed by the two sizes n -> m and the method. Pixel i of n has its centre at (i + 1/2) / n. For
"nearest" W_qp is 1 where q = floor((p + 1/2) n / m); for "bilinear" it is proportional to
max(0, 1 - |(p + 1/2) n / m - (q + 1/2)| / r), with columns of sum 1, where r is 1, or n / m where
that is larger and `antialias` is set.

Backward. y is linear in x, so
    dx_bqc = sum_p dy_bpc prod_a W^a_(q_a p_a)

one axis after the other. Few elements of a row or column of W are not 0; XLA on CPU is slow at a
product with all of W, and at the scatter that autodiff makes of "nearest".

Saves: nothing: the rule needs the shape of x alone.
Edge:  an axis that keeps its size is left as it is. A pixel that no output uses gets 0.
Dtype: sums in float32 or wider, returns x's dtype.
Ref:   Jaderberg et al., 2015, equations 5 and 6.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops._windows import shape_only, total

METHODS = ("nearest", "bilinear")
# From so many pixels for one on, a product of matrices is faster than a sum of shifts.
MOST_TAPS = 8


def plain(
    x: Float[Array, "batch *spatial c"],
    *,
    size: tuple[int, ...],
    method: str = "bilinear",
    antialias: bool = True,
) -> Float[Array, "batch *size c"]:
    """x with its spatial axes resized, as `jax.image.resize`.

    Args:
      x: [batch, *spatial, c].
      size: the new spatial size in pixels, one number for each spatial axis.
      method: "nearest" or "bilinear" (linear along each axis, of any number).
      antialias: average over more pixels where a bilinear image shrinks.

    Returns:
      [batch, *size, c], in the dtype of x.

    Raises:
      InputError: size does not fit x, or there is no such method.
    """
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), method, antialias)


def check(x, *, size, method, antialias):
    """Raises if size does not fit x, or the method is unknown."""
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise InputError(
            "x must be [batch, *spatial, c] with at least one spatial axis, none of size 0, got "
            f"shape {x.shape}; add the axis that is missing, as in x[None]"
        )
    if len(size) != x.ndim - 2 or any(n < 1 for n in size):
        raise InputError(
            f"size must be {x.ndim - 2} positive numbers, one per spatial axis of x {x.shape}, "
            f"got {size}"
        )
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _weights(n: int, m: int, method: str, antialias: bool) -> np.ndarray:
    """W, [n, m]."""
    pixels = np.arange(n)[:, None]
    if method == "nearest":
        # In float32 as JAX does, for the same choice where two pixels are as near.
        at = (np.arange(m, dtype=np.float32) + np.float32(0.5)) * np.float32(n) / np.float32(m)
        return (np.floor(at) == pixels).astype(float)
    at = (np.arange(m) + 0.5) * n / m - 0.5
    reach = max(n / m, 1) if antialias else 1
    w = np.maximum(0, 1 - np.abs(at - pixels) / reach)
    return w / np.sum(w, axis=0)


def _along(x, axis, w):
    """sum_q x_q w_qp along one axis."""
    n, m = w.shape
    first = np.argmax(w != 0, axis=0)
    last = n - 1 - np.argmax((w != 0)[::-1], axis=0)
    reach = np.max(np.where(w.any(axis=0), last - first, 0)) + 1
    if reach > MOST_TAPS:
        y = jnp.tensordot(x, jnp.asarray(w, x.dtype), (axis, 0), precision=lax.Precision.HIGHEST)
        return jnp.moveaxis(y, -1, axis)
    # All but a few rows of a column are 0. Those few move whole pixels, which a product with W
    # would first turn into columns.
    column = [m if a == axis else 1 for a in range(x.ndim)]
    terms = []
    for i in range(reach):
        q = np.minimum(first + i, n - 1)
        weight = np.where(first + i < n, w[q, np.arange(m)], 0).reshape(column)
        terms.append(jnp.take(x, q, axis=axis, mode="clip") * jnp.asarray(weight, x.dtype))
    return total(terms)


def fwd(x, *, size, method, antialias):
    if method == "nearest":
        return plain(x, size=size, method=method, antialias=antialias), shape_only(x)
    y = wide(x)
    # Those that shrink first: what follows has less to do.
    for axis in sorted(range(1, x.ndim - 1), key=lambda a: size[a - 1] / x.shape[a]):
        n, m = x.shape[axis], size[axis - 1]
        y = y if n == m else _along(y, axis, _weights(n, m, method, antialias))
    return y.astype(x.dtype), shape_only(x)


def bwd(saved, dy, *, size, method, antialias):
    shape = saved.shape[1:]
    dx = wide(dy)
    for axis in sorted(range(1, dy.ndim - 1), key=lambda a: shape[a] / size[a - 1]):
        n, m = shape[axis], size[axis - 1]
        dx = dx if n == m else _along(dx, axis, _weights(n, m, method, antialias).T)
    return (dx,)


resize = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("up and down", (2, 3, 5, 2), size=(7, 4)),
        Case("nearest", (2, 3, 6, 2), size=(6, 4), method="nearest"),
        Case("1-D, no antialias", (2, 7, 3), size=(3,), antialias=False),
        Case("3-D, nearest, one pixel", (1, 2, 1, 4, 2), size=(3, 1, 9), method="nearest"),
        Case("empty batch", (0, 4, 2), size=(3,)),
        Case("doubling", (32, 28, 28, 128), size=(56, 56), bench=True),
    ),
)
