"""Softmax among the rows of each segment, in each column.

    y_i = exp(x_i) / sum of exp(x_j) over all j with id_j = id_i

Backward. As softmax's, with the sum over the segment s = id_i:
    dx_i = y_i (dy_i - g_s)        g_s = sum of dy_j y_j over all j with id_j = s

Saves: y, the output, and the ids.
Edge:  a row whose id is negative or too large is in no segment: it gives 0, and gets a gradient of
       0. An entry of -inf does too, also where all of its segment are.
Dtype: computes in float32 or wider, returns data's dtype.
Ref:   Velickovic et al., 2018 (graph attention), equation 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, normal, values
from funcbp.core import op
from funcbp.ops._numeric import wide
from funcbp.ops._segments import check_segments, number_of_segments, per_row


def plain(
    data: Float[Array, "n *rest"],
    segment_ids: Int[Array, " n"],
    num_segments: int | None = None,
    indices_are_sorted: bool = False,
) -> Float[Array, "n *rest"]:
    """exp(data) over the sum of it in each segment.

    Args:
      data, segment_ids, num_segments, indices_are_sorted: as for segment_sum.

    Returns:
      [n, ...], in data's dtype; sums to 1 over each segment.

    Raises:
      InputError: the shapes do not fit, or num_segments is unknown.
    """
    settings = (segment_ids, num_segments, indices_are_sorted)
    # The maximum cancels: it needs no gradient.
    e = jnp.exp(data - _largest(jax.lax.stop_gradient(data), *settings))
    total = jax.ops.segment_sum(e, *settings)
    return e / per_row(_positive(total), segment_ids, fill=1)


def _largest(x, segment_ids, num_segments, indices_are_sorted):
    """The largest entry of each row's segment, 0 for -inf; inf, which leaves it out, for none."""
    m = jax.ops.segment_max(x, segment_ids, num_segments, indices_are_sorted)
    m = jnp.where(m == -jnp.inf, 0, m)
    return per_row(m, segment_ids, None, indices_are_sorted, fill=jnp.inf)


def _positive(total):
    """1 for the total of a segment of no rows, or of -inf alone."""
    return jnp.where(total > 0, total, 1)


def fwd(data, segment_ids, *, num_segments, indices_are_sorted):
    settings = (segment_ids, num_segments, indices_are_sorted)
    e = jnp.exp(wide(data) - wide(_largest(data, *settings)))
    total = jax.ops.segment_sum(e, *settings)
    factor = per_row(1 / _positive(total), segment_ids, None, indices_are_sorted)
    y = (e * factor).astype(data.dtype)
    return y, (y, segment_ids)


def bwd(saved, dy, *, num_segments, indices_are_sorted):
    y, ids = saved
    y, dy = wide(y), wide(dy)
    g = jax.ops.segment_sum(dy * y, ids, num_segments, indices_are_sorted)
    return y * (dy - per_row(g, ids, None, indices_are_sorted)), None


INF = float("inf")
LOGITS = [[1.0], [0.0], [1.0], [-90.0], [99.0], [-INF], [-INF], [-INF], [1e4]]
segment_softmax = op(
    plain,
    fwd,
    bwd,
    check=check_segments,
    resolve=number_of_segments,
    name="segment_softmax",
    cases=(
        Case("out of range and empty", (7, 3), values([2, 0, 2, -1, 4, 2, 5]), num_segments=5),
        Case(
            "ties and tails",
            values(LOGITS),
            values([0, 0, 0, 0, 3, 0, 1, 1, 2]),
            num_segments=3,
            transformed=False,
        ),
        Case(
            "sorted",
            normal(5, std=30.0),
            values([0, 0, 2, 2, 2]),
            num_segments=4,
            indices_are_sorted=True,
            transformed=False,
        ),
        Case("no rows", (0, 2), integers(0, high=3), num_segments=3, transformed=False),
        Case("edges", (65536, 8), integers(65536, high=4096), num_segments=4096, bench=True),
    ),
)
