"""Rows of a table, and the logits of that table.

    embedding     y_b = t_(i_b)                i the ids
    unembedding   z_bv = sum_d h_bd t_vd       the tied output projection

Backward.
    embedding     dt_v = sum of dy_b over all b whose id is v
    unembedding   dh_bd = sum_v dz_bv t_vd     dt_vd = sum_b dz_bv h_bd

One table in both gets the sum of both.

Saves: the ids and the shape of the table; for unembedding h and the table, arguments.
Edge:  ids from -n to n - 1 index as in NumPy; any other gives a row of nan, and no gradient, as
       jnp.take does. A row that no id names gets 0.
Dtype: dt is summed in float32 or wider, where autodiff sums bfloat16 rows in bfloat16; returns the
       table's dtype, unembedding the promoted one.
Ref:   Bengio et al., 2003, section 2; Press and Wolf, 2017 (tying).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import rows, wide
from funcbp.ops._windows import shape_only
from funcbp.ops.linear import product


def plain(ids: Int[Array, "..."], table: Float[Array, "n d"]) -> Float[Array, "... d"]:
    """table[ids].

    Args:
      ids: rows of the table, any shape.
      table: [n, d].

    Returns:
      [..., d], in the table's dtype.

    Raises:
      InputError: the table is no matrix, or ids are no integers.
    """
    return jnp.take(table, ids, axis=0, mode="fill")


def check(ids, table):
    """Raises if the table is no matrix, or ids are no integers."""
    if table.ndim != 2:
        raise InputError(f"table must have two axes, [rows, features], got shape {table.shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"ids must be integers, got {ids.dtype}; convert them with astype")


def fwd(ids, table):
    return plain(ids, table), (ids, shape_only(table))


def bwd(saved, dy):
    ids, like = saved
    zeros = jnp.zeros(like.shape[1:], wide(dy).dtype)
    dtable = zeros.at[ids.reshape(-1)].add(rows(wide(dy)), mode="drop")
    return None, dtable


embedding = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("duplicates", values([[1, 0, 1], [1, 4, -1]]), (5, 3)),
        Case("out of range", values([7, 2, -9, 0]), (4, 2)),
        Case("one id", values(2), (3, 4)),
        Case("no ids", integers(0, high=3), (3, 2)),
        Case("tokens", integers(8192, high=32000), (32000, 256), bench=True),
    ),
    name="embedding",
)


def plain_unembedding(
    h: Float[Array, "*batch d"], table: Float[Array, "n d"]
) -> Float[Array, "*batch n"]:
    """h @ table.T: the logits of a model whose embedding is `table`.

    Args:
      h: features, [..., d].
      table: [n, d].

    Returns:
      [..., n], in the promoted dtype of both.

    Raises:
      InputError: the shapes do not fit.
    """
    return h @ table.T


def check_unembedding(h, table):
    """Raises if the shapes do not fit."""
    if table.ndim != 2 or h.ndim < 1 or h.shape[-1] != table.shape[1]:
        raise InputError(
            f"h must have as many features on its last axis as the table [rows, features], got "
            f"{h.shape} and {table.shape}; do not transpose the table"
        )


def fwd_unembedding(h, table):
    return product(h, table.T).astype(jnp.result_type(h, table)), (h, table)


def bwd_unembedding(saved, dz):
    h, table = saved
    return product(dz, table), product(rows(h).T, rows(dz)).T


unembedding = op(
    plain_unembedding,
    fwd_unembedding,
    bwd_unembedding,
    check=check_unembedding,
    name="unembedding",
    cases=(
        Case("odd", (5, 3), (7, 3)),
        Case("two batch axes", (2, 3, 4), (4, 4)),
        Case("vector", (4,), (1, 4)),
        Case("empty batch", (0, 3), (2, 3)),
        Case("vocabulary", (512, 256), (16000, 256), bench=True),
    ),
)
