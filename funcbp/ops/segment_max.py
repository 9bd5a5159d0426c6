"""The largest entry of each segment, in each column.

    y_s = max of x_i over all i with id_i = s

Backward. With m_s entries equal to y_s,
    dx_i = dy_s / m_s    where x_i = y_s, s = id_i, else 0

Saves: data and ids, both arguments, and y, the output.
Edge:  tied entries share the gradient equally, as in JAX. An empty segment gives -inf. An entry of
       -inf that is the largest shares with the -inf that an empty segment has, as in JAX. A row
       whose id is negative or too large is left out, and gets a gradient of 0.
Dtype: exact; m counts in float32 or wider.
Ref:   jax.ops.segment_max; Qi et al., 2017 (PointNet), equation 1.
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
    """The largest entry of data in each segment and column.

    Args:
      data, segment_ids, num_segments, indices_are_sorted, unique_indices, bucket_size, mode,
        out_sharding: as for segment_sum.

    Returns:
      [num_segments, ...], in data's dtype; -inf for a segment without rows.

    Raises:
      InputError: the shapes do not fit, or num_segments is unknown.
    """
    return jax.ops.segment_max(
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
    y = jax.ops.segment_max(data, segment_ids, **settings)
    return y, (data, segment_ids, y)


def bwd(saved, dy, *, num_segments, indices_are_sorted, unique_indices, mode, **settings):
    x, ids, y = saved
    largest = x == per_row(y, ids, mode, indices_are_sorted)
    m = jax.ops.segment_sum(
        largest.astype(wide(dy).dtype),
        ids,
        num_segments,
        indices_are_sorted,
        unique_indices,
        mode=mode,
    )
    shared = wide(dy) / (m + (y == -jnp.inf))
    return jnp.where(largest, per_row(shared, ids, mode, indices_are_sorted), 0), None


INF = float("inf")
TIED = [[1.0, -2.0, -INF], [0.5, 3.0, 0.0], [1.0, -2.0, -INF], [9.0, 9.0, 9.0], [1.0, -7.0, -INF]]
segment_max = op(
    plain,
    fwd,
    bwd,
    like=jax.ops.segment_max,
    check=check_segments,
    resolve=number_of_segments,
    cases=(
        Case("out of range and empty", (7, 3), values([2, 0, 2, -1, 4, 2, 5]), num_segments=5),
        Case("ties", values(TIED), values([1, 0, 1, 7, 1]), num_segments=3, transformed=False),
        Case(
            "sorted",
            (5,),
            values([0, 0, 2, 2, 2]),
            num_segments=4,
            indices_are_sorted=True,
            transformed=False,
        ),
        Case("no rows", (0, 2), integers(0, high=3), num_segments=3, transformed=False),
        Case("points", (65536, 64), integers(65536, high=4096), num_segments=4096, bench=True),
    ),
)
