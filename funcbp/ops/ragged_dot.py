"""Rows of groups of unequal size, each group times a matrix of its own.

    y_mn = sum_k x_mk w_gkn        g the group of row m: the first s_0 rows are group 0's, and so on

Backward.
    dx_mk = sum_n dy_mn w_gkn      dw_gkn = sum_m x_mk dy_mn over the rows of group g

Rows are taken a block at a time, no block across two groups, so that a group costs what its rows
cost. XLA on CPU makes one product for each group with all rows, most of them zeroed.

Saves: x, w and the sizes, all arguments.
Edge:  rows after the last group give y = 0 and dx = 0; a group of no rows gives dw = 0.
Dtype: products accumulate in float32 or wider; the result has the promoted dtype of x and w.
Ref:   Gale et al., 2022 (MegaBlocks), section 5; jax.lax.ragged_dot.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import loop_zeros
from funcbp.ops.linear import product

# Rows of one block, at most.
BLOCK = 128


def plain(
    lhs: Float[Array, "m k"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, " g"]
) -> Float[Array, "m n"]:
    """The rows of lhs, in groups, times the matrices of rhs.

    Args:
      lhs: [m, k], the rows of one group next to each other.
      rhs: [g, k, n], a matrix for each group.
      group_sizes: [g], how many rows each group has; their sum is at most m.

    Returns:
      [m, n], in the promoted dtype of lhs and rhs.

    Raises:
      InputError: the shapes do not fit.
    """
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(len(lhs))[:, None]
    mine = (row >= ends - group_sizes) & (row < ends)
    return jnp.einsum("mk,mg,gkn->mn", lhs, mine.astype(lhs.dtype), rhs)


def check(lhs, rhs, group_sizes):
    """Raises if the shapes do not fit."""
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise InputError(
            f"lhs and rhs must have shapes [m, k] and [groups, k, n], got {lhs.shape} and "
            f"{rhs.shape}; merge the batch axes of lhs first"
        )
    if group_sizes.shape != rhs.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(
            f"group_sizes must be {rhs.shape[0]} integers, one for each matrix of rhs "
            f"{rhs.shape}, got {group_sizes.dtype} {group_sizes.shape}"
        )


def over_blocks(m: int, group_sizes: Array, step: Any, init: Any) -> Any:
    """`step(g, start, rows, state)` for each block: `rows` says which of its rows are group g's."""
    size = min(BLOCK, max(m, 1))
    blocks = -(-group_sizes // size)
    last_block, ends = jnp.cumsum(blocks), jnp.cumsum(group_sizes)

    def one(i, state):
        g = jnp.searchsorted(last_block, i, side="right")
        first = ends[g] - group_sizes[g] + (i - (last_block[g] - blocks[g])) * size
        # The last block starts early enough to be whole.
        start = jnp.minimum(first, m - size)
        row = start + jnp.arange(size)
        return step(g, start, ((row >= first) & (row < ends[g]))[:, None], state)

    if m == 0 or len(group_sizes) == 0:
        return init
    return lax.fori_loop(0, last_block[-1], one, init)


def block(x, start):
    return lax.dynamic_slice_in_dim(x, start, min(BLOCK, len(x)))


def _times(x: Array, w: Array, group_sizes: Array) -> Array:
    """y, in float32 or wider."""

    def step(g, start, rows, y):
        part = product(block(x, start), lax.dynamic_index_in_dim(w, g, keepdims=False))
        part = jnp.where(rows, part, block(y, start))
        return lax.dynamic_update_slice_in_dim(y, part, start, 0)

    zeros = loop_zeros((len(x), w.shape[2]), (x, w, group_sizes))
    return over_blocks(len(x), group_sizes, step, zeros)


def fwd(lhs, rhs, group_sizes):
    y = _times(lhs, rhs, group_sizes)
    return y.astype(jnp.result_type(lhs, rhs)), (lhs, rhs, group_sizes)


def bwd(saved, dy):
    x, w, group_sizes = saved

    def step(g, start, rows, dw):
        part = product(block(x, start).T, jnp.where(rows, block(dy, start), 0))
        part += lax.dynamic_index_in_dim(dw, g, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, part, g, 0)

    zeros = loop_zeros(w.shape, (x, w, group_sizes, dy))
    dw = over_blocks(len(x), group_sizes, step, zeros)
    return _times(dy, jnp.swapaxes(w, 1, 2), group_sizes), dw, None


ragged_dot = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (7, 3), (3, 3, 2), values([2, 0, 4])),
        Case("one group", (5, 4), (1, 4, 3), values([5])),
        Case("rows left over", (6, 1), (2, 1, 5), values([1, 2])),
        Case("more than a block", (300, 3), (3, 3, 2), values([130, 1, 150]), transformed=False),
        Case("empty", (0, 3), (2, 3, 2), values([0, 0])),
        Case(
            "experts",
            (4096, 256),
            (8, 256, 512),
            values([100, 900, 512, 0, 1024, 500, 1000, 60]),
            bench=True,
        ),
    ),
)
