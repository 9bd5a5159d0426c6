"""Softmax cross-entropy for training: smoothed labels, a loss on the normaliser, rows left out.

    lse = log sum_k exp(x_k)        q_k = (1 - epsilon) [k = c] + epsilon / n
    loss = a (lse - sum_k q_k x_k + zeta lse^2)        c the label, a the weight, n the classes

Backward. With p the softmax of x
    dx_j = dloss a (p_j (1 + 2 zeta lse) - q_j)        da = dloss (lse - sum_k q_k x_k + zeta lse^2)

Saves: x, labels and weights, arguments, and two numbers a row: the largest logit and rest = sum_k
       exp(x_k - max) - 1.
Edge:  a row whose label is `ignore_index` gives 0 with no gradient, whatever its logits. Any other
       label outside 0 to n - 1 gives nan. A logit of -inf gives nan if labels are smoothed.
Dtype: computes in float32 or wider, returns the logits' dtype.
Ref:   Szegedy et al., 2016, section 7 (smoothing); de Brebisson and Vincent, 2016 (z-loss).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, normal, uniform, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import largest, others, wide


def plain(
    logits: Float[Array, "*rows n"],
    labels: Int[Array, "*rows"],
    weights: Float[Array, "*rows"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
) -> Float[Array, "*rows"]:
    """Cross-entropy between softmax(logits) and labels, a number a row.

    Args:
      logits: unnormalised log probabilities, [..., n].
      labels: a class from 0 to n - 1 for each row, [...].
      weights: by which each row's loss is multiplied, [...]; None for 1.
      label_smoothing: the share of the label that is spread over all classes, from 0 to 1.
      z_loss: weight of the squared logarithm of the softmax's denominator.
      ignore_index: the label of rows that do not count, such as -100; None for none.

    Returns:
      The loss in nats, [...], in the dtype of logits.

    Raises:
      InputError: the shapes do not fit, or label_smoothing is no share.
    """
    counts = _counts(labels, ignore_index)
    # A row that does not count is a constant: what it holds must not reach the gradient.
    x = jnp.where(counts[..., None], logits, 0)
    n = logits.shape[-1]
    hit = labels[..., None] == jnp.arange(n)
    # log(sum) = log(e^label + the others' sum): so a sure label keeps its digits.
    at_label = jnp.sum(jnp.where(hit, x, 0), axis=-1)
    m = jax.lax.stop_gradient(largest(x, -1, ~hit))
    total = jnp.sum(jnp.where(hit, 0, jnp.exp(jnp.where(hit, 0, x - m))), axis=-1)
    margin = jnp.log(jnp.where(total > 0, total, 1)) + jnp.squeeze(m, -1) - at_label
    loss = jnp.logaddexp(jnp.where(total > 0, margin, -jnp.inf), 0)
    lse = loss + at_label
    if label_smoothing:
        loss += label_smoothing * (at_label - jnp.mean(x, axis=-1))
    loss += z_loss * lse**2
    loss = jnp.where(_valid(labels, n), loss, jnp.nan)
    loss = jnp.where(counts, loss, 0)
    return (loss if weights is None else loss * weights).astype(logits.dtype)


def _counts(labels, ignore_index):
    return labels != ignore_index if ignore_index is not None else jnp.ones(labels.shape, bool)


def _valid(labels, n):
    return (labels >= 0) & (labels < n)


def check(logits, labels, weights, *, label_smoothing, z_loss, ignore_index):
    """Raises if the shapes do not fit or a setting is out of range."""
    for name, value in (("labels", labels), ("weights", weights)):
        if value is not None and value.shape != logits.shape[:-1]:
            raise InputError(
                f"{name} must have the shape of logits {logits.shape} without the last axis, "
                f"{logits.shape[:-1]}, got {value.shape}; give one for each row"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels must be integers, got {labels.dtype}; probabilities for each class go to "
            "softmax_cross_entropy"
        )
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must be from 0 to 1, got {label_smoothing}; try 0.1")


def fwd(logits, labels, weights, *, label_smoothing, z_loss, ignore_index):
    x = wide(logits)
    rest, m = others(logits, -1)
    n = logits.shape[-1]
    log_total = jnp.log1p(rest[..., 0])
    index = jnp.clip(labels, 0, n - 1)[..., None]
    at_label = (jnp.take_along_axis(x, index, axis=-1) - m)[..., 0]
    loss = log_total - at_label
    if label_smoothing:
        loss += label_smoothing * (at_label - jnp.mean(x - m, axis=-1))
    if z_loss:
        loss += z_loss * jnp.square(m[..., 0] + log_total)
    loss = jnp.where(_valid(labels, n), loss, jnp.nan)
    loss = jnp.where(_counts(labels, ignore_index), loss, 0)
    y = loss if weights is None else loss * wide(weights)
    kept = None if weights is None else loss
    return y.astype(logits.dtype), (logits, labels, weights, m, rest, kept)


def bwd(saved, dloss, *, label_smoothing, z_loss, ignore_index):
    logits, labels, weights, m, rest, loss = saved
    dloss = wide(dloss)
    dweights = None if weights is None else dloss * loss
    scale = dloss if weights is None else dloss * wide(weights)
    counts = _counts(labels, ignore_index)
    z, n = wide(logits) - m, logits.shape[-1]
    hit = labels[..., None] == jnp.arange(n)
    e = jnp.exp(z)
    # p - 1 without the difference where the label's is the largest logit.
    slope = jnp.where(hit, jnp.where(z == 0, -rest, e - (1 + rest)), e) / (1 + rest)
    if z_loss:
        slope += 2 * z_loss * (m + jnp.log1p(rest)) * (e / (1 + rest))
    if label_smoothing:
        slope += label_smoothing * (hit - 1 / n)
    dx = jnp.where(counts[..., None], scale[..., None] * slope, 0)
    return dx, None, dweights


cross_entropy = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="cross_entropy",
    cases=(
        Case("odd", (3, 5), integers(3, high=5)),
        Case("sure", values([[0.0, 17.0, 3.0], [40.0, 0.0, 1.0]]), values([1, 0])),
        Case(
            "everything",
            normal(2, 3, 7, std=3.0),
            integers(2, 3, high=7),
            uniform(2, 3),
            label_smoothing=0.1,
            z_loss=1e-2,
            ignore_index=2,
        ),
        Case("ignored rows", (4, 3), values([-100, 2, -100, 0]), ignore_index=-100),
        Case("one class", (3, 1), values([0, 0, 0]), label_smoothing=0.2),
        Case("empty batch", (0, 3), integers(0, high=3)),
        Case(
            "vocabulary",
            (1024, 8192),
            integers(1024, high=8192),
            label_smoothing=0.1,
            z_loss=1e-4,
            bench=True,
        ),
    ),
)
