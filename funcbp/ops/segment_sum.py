"""Sums and means of the rows of each segment.

    segment_sum    y_s = sum of x_i over all i with id_i = s
    segment_mean   y_s = 1/n_s sum of x_i over all i with id_i = s, n_s their number

Backward.
    segment_sum    dx_i = dy_s          s = id_i
    segment_mean   dx_i = dy_s / n_s

Saves: the ids; for the mean also n, one number a segment.
Edge:  an empty segment gives 0. A row whose id is negative or too large is left out, and gets a
       gradient of 0.
Dtype: sums in float32 or wider, where autodiff sums bfloat16 rows in bfloat16; returns data's
       dtype.
Ref:   jax.ops.segment_sum; Gilmer et al., 2017, equation 1 (the sum of messages).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import op
from funcbp.ops._numeric import wide
from funcbp.ops._segments import check_segments, number_of_segments, per_row


def plain(
    data: Float[Array, "n *rest"],
    segment_ids: Int[Array, " n"],
    num_segments: int | None = None,
    indices_are_sorted: bool = False,
    unique_indices: bool = False,
    bucket_size: int | None = None,
    mode: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "s *rest"]:
    """The sum of the rows of data in each segment.

    Args:
      data: [n, ...].
      segment_ids: [n], the segment of each row, from 0; in any order.
      num_segments: how many segments there are; None for max(segment_ids) + 1, where the ids are
        no tracers.
      indices_are_sorted: promises that segment_ids never falls, which is faster.
      unique_indices: promises that no two ids are equal.
      bucket_size: sums so many rows at a time, then these sums.
      mode: what happens to ids out of range, a jax.lax.GatherScatterMode; None leaves them out.
      out_sharding: of the result, on Explicit axes.

    Returns:
      [num_segments, ...], in data's dtype.

    Raises:
      InputError: the shapes do not fit, or num_segments is unknown.
    """
    return jax.ops.segment_sum(
        data,
        segment_ids,
        num_segments,
        indices_are_sorted,
        unique_indices,
        bucket_size,
        mode,
        out_sharding,
    )


def fwd(data, segment_ids, *, out_sharding, **settings):
    y = jax.ops.segment_sum(wide(data), segment_ids, **settings)
    return y.astype(data.dtype), segment_ids


def bwd(segment_ids, dy, *, indices_are_sorted, mode, **settings):
    return per_row(dy, segment_ids, mode, indices_are_sorted), None


UNSORTED = values([2, 0, 2, -1, 4, 2, 5])
SORTED = values([0, 0, 2, 2, 2])
CASES = (
    Case("out of range and empty", (7, 3), UNSORTED, num_segments=5),
    Case("sorted", (5,), SORTED, num_segments=4, indices_are_sorted=True),
    Case("no rows", (0, 2), integers(0, high=3), num_segments=3, transformed=False),
    Case("messages", (65536, 64), integers(65536, high=4096), num_segments=4096, bench=True),
)
segment_sum = op(
    plain,
    fwd,
    bwd,
    like=jax.ops.segment_sum,
    check=check_segments,
    resolve=number_of_segments,
    cases=CASES,
)


def plain_mean(
    data: Float[Array, "n *rest"],
    segment_ids: Int[Array, " n"],
    num_segments: int | None = None,
    indices_are_sorted: bool = False,
) -> Float[Array, "s *rest"]:
    """The mean of the rows of data in each segment, 0 for one without rows.

    Args:
      data, segment_ids, num_segments, indices_are_sorted: as for segment_sum.

    Returns:
      [num_segments, ...], in data's dtype.

    Raises:
      InputError: the shapes do not fit, or num_segments is unknown.
    """
    ones = jnp.ones_like(data)
    total, n = (
        jax.ops.segment_sum(v, segment_ids, num_segments, indices_are_sorted) for v in (data, ones)
    )
    return total / jnp.maximum(n, 1)


def fwd_mean(data, segment_ids, *, num_segments, indices_are_sorted):
    x, ids = wide(data), segment_ids
    total = jax.ops.segment_sum(x, ids, num_segments, indices_are_sorted)
    # Sums of ones are exact to 2^24 in float32: beyond, they stop growing.
    n = jax.ops.segment_sum(jnp.ones_like(ids), ids, num_segments, indices_are_sorted)
    n = jnp.maximum(n, 1).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return (total / n).astype(data.dtype), (ids, n)


def bwd_mean(saved, dy, *, num_segments, indices_are_sorted):
    ids, n = saved
    return per_row(wide(dy) / n, ids, None, indices_are_sorted), None


segment_mean = op(
    plain_mean,
    fwd_mean,
    bwd_mean,
    check=check_segments,
    resolve=number_of_segments,
    name="segment_mean",
    cases=CASES,
)
