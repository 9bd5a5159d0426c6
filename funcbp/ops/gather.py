"""Rows of an array by index, and rows added to an array by index: each the other's transpose.

    gather        y_k = x_(i_k)
    scatter_add   y_n = x_n + sum of u_k over all k with i_k = n

Backward.
    gather        dx_n = sum of dy_k over all k with i_k = n
    scatter_add   dx = dy        du_k = dy_(i_k)

Saves: the indices and the shape of x.
Edge:  indices from -n to n - 1 count as in NumPy. Any other names no row: gather gives 0 for it,
       scatter_add leaves it out, and no gradient flows. So an index of n pads a list of edges.
Dtype: sums in float32 or wider, where autodiff sums bfloat16 rows in bfloat16.
Ref:   Gilmer et al., 2017, section 2 (messages along edges).
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops._windows import shape_only


def _place(x: Array, indices: Array, axis: int):
    return jnp.asarray(x).at[(slice(None),) * axis + (indices,)]


def _require_integers(indices):
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise InputError(f"indices must be integers, got {indices.dtype}; convert them with astype")


def plain(
    x: Float[Array, "..."],
    indices: Int[Array, "..."],
    *,
    axis: int = 0,
    indices_are_sorted: bool = False,
) -> Float[Array, "..."]:
    """The rows of x that indices names, along `axis`.

    Args:
      x: any shape with an axis.
      indices: any shape.
      axis: the axis that is indexed, from 0.
      indices_are_sorted: promises that indices never falls and has none below 0: faster backward.

    Returns:
      x's shape with that of indices in the place of `axis`, in x's dtype.

    Raises:
      InputError: there is no such axis, or indices are no integers.
    """
    return _place(x, indices, axis).get(
        mode="fill", fill_value=0, indices_are_sorted=indices_are_sorted
    )


def check(x, indices, *, axis, indices_are_sorted):
    """Raises if there is no such axis, or indices are no integers."""
    _require_integers(indices)
    if not 0 <= axis < x.ndim:
        raise InputError(
            f"axis must be from 0 to {x.ndim - 1} for x of shape {x.shape}, got {axis}; count a "
            "last axis from the front"
        )


def fwd(x, indices, *, axis, indices_are_sorted):
    y = plain(x, indices, axis=axis, indices_are_sorted=indices_are_sorted)
    return y, (indices, shape_only(x))


def bwd(saved, dy, *, axis, indices_are_sorted):
    indices, like = saved
    zeros = jnp.zeros(like.shape[1:], wide(dy).dtype)
    dx = _place(zeros, indices, axis).add(
        wide(dy), mode="drop", indices_are_sorted=indices_are_sorted
    )
    return dx, None


gather = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="gather",
    cases=(
        Case("duplicates, out of range", (5, 3), values([[1, 0, 1, 5], [1, 4, -1, -6]])),
        Case("inner axis, sorted", (2, 4, 3), values([0, 0, 2]), axis=1, indices_are_sorted=True),
        Case("vector, one index", (4,), values(2), transformed=False),
        Case("no indices", (3, 2), integers(0, high=3), transformed=False),
        Case("edges", (4096, 64), integers(65536, high=4096), bench=True),
    ),
)


def plain_scatter_add(
    x: Float[Array, "n *rest"],
    indices: Int[Array, "*k"],
    updates: Float[Array, "*k_and_rest"],
    *,
    indices_are_sorted: bool = False,
) -> Float[Array, "n *rest"]:
    """x with updates added to the rows that indices names.

    Args:
      x: [n, ...].
      indices: any shape.
      updates: the shape of indices, then that of a row of x.
      indices_are_sorted: promises that indices never falls and has none below 0, which is faster.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: the shapes do not fit, or indices are no integers.
    """
    updates = updates.astype(x.dtype)
    return _place(x, indices, 0).add(updates, mode="drop", indices_are_sorted=indices_are_sorted)


def check_scatter_add(x, indices, updates, *, indices_are_sorted):
    """Raises if the shapes do not fit, or indices are no integers."""
    _require_integers(indices)
    if x.ndim < 1 or updates.shape != indices.shape + x.shape[1:]:
        raise InputError(
            f"updates must have the shape of indices {indices.shape}, then that of a row of x "
            f"{x.shape}, got {updates.shape}; broadcast it first"
        )


def fwd_scatter_add(x, indices, updates, *, indices_are_sorted):
    y = plain_scatter_add(wide(x), indices, wide(updates), indices_are_sorted=indices_are_sorted)
    return y.astype(x.dtype), indices


def bwd_scatter_add(indices, dy, *, indices_are_sorted):
    return dy, None, plain(dy, indices, indices_are_sorted=indices_are_sorted)


scatter_add = op(
    plain_scatter_add,
    fwd_scatter_add,
    bwd_scatter_add,
    check=check_scatter_add,
    name="scatter_add",
    cases=(
        Case(
            "duplicates, out of range",
            (5, 3),
            values([[1, 0, 1], [5, -6, -1], [0, 4, 4]]),
            (3, 3, 3),
        ),
        Case("sorted", (4,), values([0, 0, 2]), (3,), indices_are_sorted=True),
        Case("no indices", (3, 2), integers(0, high=3), (0, 2), transformed=False),
        Case("edges", (4096, 64), integers(65536, high=4096), (65536, 64), bench=True),
    ),
)
