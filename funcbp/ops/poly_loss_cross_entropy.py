"""PolyLoss: softmax cross-entropy with another weight for the first power of 1 - p.

    loss = -sum_k t_k log p_k + epsilon sum_k t_k (1 - p_k)        p the softmax of x

Backward. With S = sum_k t_k and T = sum_k t_k p_k
    dx_j = dloss (p_j S - t_j - epsilon p_j (t_j - T))
    dt_j = dloss (epsilon (1 - p_j) - log p_j)

Saves: x and the labels, arguments, and four numbers a row: the largest logit, sum
       exp(x - max), S and T.
Edge:  as softmax_cross_entropy.
Dtype: computes in float32 or wider, returns the promoted dtype of logits and labels.
Ref:   Leng et al., 2022, equation 3 (Poly-1); optax.losses.poly_loss_cross_entropy.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from funcbp.case import Case
from funcbp.core import op
from funcbp.ops._losses import masked, summed_to
from funcbp.ops._numeric import largest, wide
from funcbp.ops.softmax import plain as plain_softmax
from funcbp.ops.softmax_cross_entropy import CASES, Axis
from funcbp.ops.softmax_cross_entropy import check as check_shapes
from funcbp.ops.softmax_cross_entropy import plain as plain_cross_entropy


def plain(
    logits: Float[Array, "..."],
    labels: Float[Array, "..."],
    *,
    epsilon: float = 2.0,
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """softmax_cross_entropy(logits, labels) + epsilon * sum(labels * (1 - softmax(logits))).

    Args:
      logits: unnormalised log probabilities, the classes along `axis`.
      labels: probabilities of the classes, or one-hot; broadcastable to logits.
      epsilon: the weight added to the first power: 2 for images, -1 for detection (the paper's).
      axis: the axis or axes of the classes; None for all.
      where: entries to include, in the shape of logits.

    Returns:
      The loss, in the shape of logits without `axis`.

    Raises:
      InputError: the shapes do not fit.
    """
    wrong = masked(where, labels * (1 - plain_softmax(logits, axis, where)))
    entropy = plain_cross_entropy(logits, labels, axis, where)
    return entropy + epsilon * jnp.sum(wrong, axis=axis)


def check(logits, labels, epsilon, axis, where):
    """Raises if the labels do not broadcast to the logits."""
    check_shapes(logits, labels, axis, where)


class Row(NamedTuple):
    """What the rule keeps of each row, [.., 1]."""

    m: Array  # the largest logit
    r: Array  # sum exp(x - m), so that p = exp(x - m) / r
    s: Array  # S
    w: Array  # T r


def fwd(logits, labels, *, epsilon, axis, where):
    m = wide(largest(logits, axis, where))
    z, t = wide(logits) - m, wide(labels)
    e = masked(where, jnp.exp(z))

    def total(x):
        return jnp.sum(masked(where, x), axis=axis, keepdims=True)

    r = total(e)
    r = jnp.where(r == 0, 1, r)
    s, w = total(t + jnp.zeros_like(z)), total(t * e)
    loss = jnp.log(r) * s - total(t * z) + epsilon * (s - w / r)
    loss = jnp.squeeze(loss, axis).astype(jnp.result_type(logits, labels))
    return loss, (logits, labels, where, Row(m, r, s, w))


def bwd(saved, dloss, *, epsilon, axis):
    logits, labels, where, (m, r, s, w) = saved
    t, z, dloss = wide(labels), wide(logits) - m, wide(dloss).reshape(m.shape)
    p = jnp.exp(z) / r
    dx = dloss * (p * (s + epsilon * (w / r - t)) - t)
    dt = dloss * (epsilon * (1 - p) + (jnp.log(r) - z))
    return masked(where, dx), summed_to(masked(where, dt), labels.shape), None


poly_loss_cross_entropy = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.losses.poly_loss_cross_entropy,
    cases=(
        *CASES,
        Case("one axis of two", (4, 3), (4, 3), epsilon=-1.0, axis=0),
    ),
)
