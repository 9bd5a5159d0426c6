"""Attention with linear biases: what is added to a score, by the distance of query and key.

    y_hts = -m_h |p_t - s|        p_t = t + S - T: the queries are the last of the keys

Backward.
    dm_h = -sum_ts dy_hts |p_t - s|

Saves: the slopes m, an argument: distances are counted again, where autodiff keeps them, [T, S].
Edge:  keys after their query get the bias of those as far before it; a causal mask removes them.
       No queries or no keys give dm = 0.
Dtype: computes in float32 or wider, returns the slopes' dtype.
Ref:   Press, Smith and Lewis, 2021, section 3.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide


def plain(
    slopes: Float[Array, " heads"], *, query_length: int, key_length: int
) -> Float[Array, "heads t s"]:
    """The bias of each head for each query and key.

    Args:
      slopes: [heads], in score per token; see `alibi_slopes`.
      query_length: the number t of queries, which are the last t of the keys.
      key_length: the number s of keys.

    Returns:
      [heads, t, s], in the slopes' dtype: 0 for a query's own position, less with distance.

    Raises:
      InputError: slopes is no vector, or a length is negative.
    """
    return -slopes[:, None, None] * _distance(query_length, key_length).astype(slopes.dtype)


def _distance(query_length, key_length):
    queries = jnp.arange(query_length) + (key_length - query_length)
    return jnp.abs(queries[:, None] - jnp.arange(key_length))


def check(slopes, *, query_length, key_length):
    """Raises if slopes is no vector, or a length is negative."""
    if slopes.ndim != 1:
        raise InputError(f"slopes must have shape [heads], got {slopes.shape}; one for each head")
    if query_length < 0 or key_length < 0:
        raise InputError(
            f"query_length and key_length must be at least 0, got {query_length} and {key_length}"
        )


def fwd(slopes, *, query_length, key_length):
    distance = _distance(query_length, key_length)
    return (-wide(slopes)[:, None, None] * distance).astype(slopes.dtype), slopes


def bwd(slopes, dy, *, query_length, key_length):
    def head(dy):
        return -jnp.sum(wide(dy) * _distance(query_length, key_length))

    # One head at a time: XLA on CPU writes the terms of a sum out.
    return (lax.map(head, dy),)


def alibi_slopes(heads: int) -> Float[Array, " heads"]:
    """The slopes of the paper, 2^(-8/n) to 2^-8 for n heads, float32.

    Where n is no power of two: those of the power below, then every second one of twice as many.
    """
    if heads < 1:
        raise InputError(f"heads must be at least 1, got {heads}")
    n = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8 * np.arange(1, n + 1) / n)
    between = 2.0 ** (-4 * np.arange(1, 2 * n, 2) / n)
    return jnp.asarray(np.concatenate([first, between])[:heads], jnp.float32)


alibi_bias = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="alibi_bias",
    cases=(
        Case("odd", (3,), query_length=3, key_length=5),
        Case("more queries than keys", (2,), query_length=4, key_length=1),
        Case("no queries", (2,), query_length=0, key_length=3, transformed=False),
        Case("heads", (16,), query_length=1024, key_length=1024, bench=True),
    ),
)
