"""Softmax cross-entropy between logits and soft labels.

    loss = -sum_k t_k log p_k        p the softmax of x

Backward. dlog p_k / dx_j = [k = j] - p_j, so with S = sum_k t_k
    dx_j = dloss (p_j S - t_j)        dt_j = -dloss log p_j

With rest = sum_k exp(x_k - max) - 1, the largest logit has p_j S - t_j =
(S - t_j - t_j rest) / (1 + rest), which keeps the digits of a sure and right row.

Saves: x and the labels, arguments, and three numbers a row: the largest logit, rest and
       S.
Edge:  a row that is masked whole (`where`) gives loss 0 and no gradient, masked entries are left
       out. A logit of -inf gives nan, as in optax: 0 log 0; mask it instead.
Dtype: computes in float32 or wider, returns the promoted dtype of logits and labels.
Ref:   Bridle, 1990; optax.losses.softmax_cross_entropy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Num

from funcbp.case import Case, booleans, integers, normal, uniform, values
from funcbp.core import InputError, op
from funcbp.ops._losses import masked, summed_to
from funcbp.ops._numeric import largest, others, settled, wide

Axis = int | tuple[int, ...] | None


def plain(
    logits: Float[Array, "..."],
    labels: Num[Array, "..."],
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """-sum(labels * log_softmax(logits)) along `axis`.

    Args:
      logits: unnormalised log probabilities, the classes along `axis`.
      labels: a weight for each class, as probabilities or one-hot; broadcastable to logits.
      axis: the axis or axes of the classes; None for all.
      where: entries to include, in the shape of logits or of the loss.

    Returns:
      The loss in nats, in the shape of logits without `axis`.

    Raises:
      InputError: the shapes do not fit.
    """
    where = expanded(where, logits, axis)
    z = logits - jax.lax.stop_gradient(largest(logits, axis, where))
    e = masked(where, jnp.exp(masked(where, z)))
    total = jnp.sum(e, axis=axis, keepdims=True)
    log_p = masked(where, z) - jnp.log(jnp.where(total == 0, 1, total))
    return -jnp.sum(masked(where, labels * log_p), axis=axis)


def expanded(where: Array | None, logits: Array, axis: Axis) -> Array | None:
    """The mask with the axes of the classes."""
    if where is None or axis is None or where.ndim == logits.ndim:
        return where
    return jnp.expand_dims(where, axis)


def check(logits, labels, axis, where):
    """Raises if the labels do not broadcast to the logits."""
    try:
        fits = jnp.broadcast_shapes(logits.shape, labels.shape) == logits.shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"labels must be broadcastable to the shape of logits {logits.shape}, got "
            f"{labels.shape}; whole numbers for classes go to "
            "softmax_cross_entropy_with_integer_labels"
        )


class Row(NamedTuple):
    """What a rule keeps of each row."""

    m: Array  # the largest logit
    rest: Array  # sum exp(x - m) - 1
    total: Array  # S


def fwd(logits, labels, axis, where):
    mask = expanded(where, logits, axis)
    rest, m = others(logits, axis, mask)
    t = jnp.broadcast_to(wide(labels), logits.shape)
    total = settled(jnp.sum(masked(mask, t), axis=axis, keepdims=True))
    loss = jnp.sum(masked(mask, t * (jnp.log1p(rest) - (wide(logits) - m))), axis=axis)
    # XLA on CPU would write out what this sum and the backward pass both take of m.
    m, rest = jax.lax.optimization_barrier((m, rest))
    dtype = jnp.result_type(logits, labels)
    return loss.astype(dtype), (logits, labels, where, Row(m, rest, total))


def bwd(saved, dloss, *, axis):
    logits, labels, where, (m, rest, total) = saved
    where, t = expanded(where, logits, axis), wide(labels)
    z, dloss = wide(logits) - m, wide(dloss).reshape(m.shape)
    sure = ((total - t) - t * rest) / (1 + rest)
    dx = dloss * jnp.where(z == 0, sure, jnp.exp(z) / (1 + rest) * total - t)
    dt = dloss * (jnp.log1p(rest) - z)
    return masked(where, dx), summed_to(masked(where, dt), labels.shape), None


CASES = (
    Case("odd", (3, 5), uniform(3, 5)),
    Case(
        "sure",
        values([[0.0, 17.0, 3.0], [40.0, 0.0, 1.0]]),
        values([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    ),
    Case("masked entries", (6, 5), uniform(6, 5), where=booleans(6, 5, p=0.6)),
    Case("large, two axes", normal(3, 2, 4, std=9.0, mean=50.0), uniform(2, 4), axis=(0, -1)),
    Case("empty batch", (0, 3), (0, 3)),
    Case("vocabulary", (1024, 8192), uniform(1024, 8192, high=2 / 8192), bench=True),
)

softmax_cross_entropy = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.losses.softmax_cross_entropy,
    cases=(
        *CASES,
        Case(
            "masked rows, one-hot",
            (4, 3),
            integers(4, 3, high=2),
            where=values([True, False, True, True]),
        ),
    ),
)
