"""InfoNCE: each query must find its own key among the keys of the batch.

    s_ij = sum_k q_ik k_jk / tau        y = sum_i (log sum_j exp(s_ij) - s_ii) / n

Backward. With p the softmax of s along j
    ds_ij = (p_ij - [i = j]) dy / (n tau)
    dq_ik = sum_j ds_ij k_jk        dk_jk = sum_i ds_ij q_ik

This is linear_cross_entropy with the keys for weights and i for the label of row i: the forward
pass makes both cotangents, some rows of s at a time, and the backward pass multiplies by dy.

Saves: dq and dk, before dy: as large as the arguments, not as s.
Edge:  an empty batch gives 0. Keys that occur twice are each other's negatives.
Dtype: products accumulate, and all the rest is done, in float32 or wider; ds is rounded to the
       arguments' dtype for its products. Returns the promoted dtype of both.
Ref:   van den Oord, Li and Vinyals, 2018, equation 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops.linear_cross_entropy import Head, Rows, over_rows


def plain(
    queries: Float[Array, "n d"], keys: Float[Array, "n d"], *, temperature: float
) -> Float[Array, ""]:
    """The mean over rows of -log softmax(queries @ keys.T / temperature) at the diagonal.

    Args:
      queries: [n, d]; of length 1 each if the similarity is to be a cosine.
      keys: [n, d]; row i is the positive of query i, all other rows are its negatives.
      temperature: what similarities are divided by, above 0. A learned one belongs into the
        queries: queries / t, and temperature=1.

    Returns:
      The loss in nats, a scalar. The loss of keys against queries is another call.

    Raises:
      InputError: the shapes differ, or the temperature is not above 0.
    """
    s = queries @ keys.T / temperature
    m = jax.lax.stop_gradient(jnp.max(s, axis=1, keepdims=True, initial=-jnp.inf))
    lse = jnp.log(jnp.sum(jnp.exp(s - m), axis=1)) + m[:, 0]
    own = jnp.sum(jnp.where(jnp.eye(len(s), dtype=bool), s, 0), axis=1)
    return jnp.sum(lse - own) / max(len(s), 1)


def check(queries, keys, temperature):
    """Raises if the shapes differ or the temperature is not above 0."""
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise InputError(
            f"queries and keys must both have shape [rows, features], row i of both a pair; got "
            f"{queries.shape} and {keys.shape}"
        )
    if temperature <= 0:
        raise InputError(f"temperature must be above 0, got {temperature}; try 0.07")


def fwd(queries, keys, *, temperature):
    n = len(queries)
    labels = jnp.arange(n, dtype=jnp.int32)[:, None]
    every = Rows(queries, labels, jnp.ones((n, 1), wide(queries).dtype))
    head = Head(keys.T, None, None, 0.0, 0.0, n, 1 / temperature)
    losses, d = over_rows(head, every, None)
    dtype = jnp.result_type(queries, keys)
    y = (jnp.sum(losses) / max(n, 1)).astype(dtype)
    return y, (queries, keys, d.h.astype(dtype), d.w.T.astype(dtype))


def bwd(saved, dy, *, temperature):
    queries, _, dq, dk = saved
    scale = wide(dy) / max(len(queries), 1)
    return scale * wide(dq), scale * wide(dk)


info_nce = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (5, 3), (5, 3), temperature=0.5),
        Case("sure", values([[9.0, 0.0], [0.0, 9.0], [-9.0, 1.0]]), normal(3, 2), temperature=1.0),
        Case("one pair", (1, 4), (1, 4), temperature=0.07),
        # XLA cannot compile it inside shard_map (JAX 0.10.2).
        Case("empty batch", (0, 3), (0, 3), temperature=1.0, transformed=False),
        Case(
            "pairs",
            normal(4096, 256, std=0.06),
            normal(4096, 256, std=0.06),
            temperature=0.07,
            bench=True,
        ),
    ),
)
