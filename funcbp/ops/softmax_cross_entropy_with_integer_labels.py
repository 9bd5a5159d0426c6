"""Softmax cross-entropy between logits and integer labels.

    loss = log sum_k exp(x_k) - x_c        c the label

Backward. The first term's derivative is the softmax p, so
    dx_j = dloss (p_j - [j = c])

With rest = sum_k exp(x_k - max) - 1, a label that is the largest has p_c - 1 = -rest / (1 + rest),
which keeps the digits that the difference loses once the model is sure of the right class (p_c
rounds to 1 at a margin of 17 in float32).

Saves: x and the labels, arguments, and two numbers a row: the largest logit and rest.
Edge:  labels from -n to n - 1 index as in NumPy; any other gives loss nan and dx = dloss p. A row
       that is masked whole (`where`) gives loss 0 and dx = 0; masked entries are left out of the
       sum, and of the gradient unless they are the label's.
Dtype: computes in float32 or wider, returns the logits' dtype.
Ref:   Bridle, 1990; optax.losses.softmax_cross_entropy_with_integer_labels.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from funcbp.case import Case, booleans, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import largest, others, wide
from funcbp.ops.softmax_cross_entropy import expanded


def plain(
    logits: Float[Array, "..."],
    labels: Int[Array, "..."],
    axis: int | tuple[int, ...] = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """log(sum(exp(logits))) - logits[label], along `axis`.

    Args:
      logits: unnormalised log probabilities, the classes along `axis`.
      labels: the shape of logits without `axis`; a class, or with several axes a flat index.
      axis: the axis or axes of the classes.
      where: entries to include, in the shape of logits or of labels.

    Returns:
      The loss, in nats, in the shape of labels and the dtype of logits.

    Raises:
      InputError: the shapes do not fit.
    """
    where = expanded(where, logits, axis)
    hit, valid = _label(logits.shape, labels, axis)
    at_label = jnp.sum(jnp.where(hit, logits, 0), axis=axis)
    rivals = ~hit if where is None else ~hit & where
    # log(sum) = log(e^label + the others' sum): so a sure label keeps its digits.
    m = jax.lax.stop_gradient(largest(logits, axis, rivals))
    total = jnp.sum(jnp.where(rivals, jnp.exp(jnp.where(rivals, logits - m, 0)), 0), axis=axis)
    margin = jnp.log(jnp.where(total > 0, total, 1)) + jnp.squeeze(m, axis) - at_label
    margin = jnp.where(total > 0, margin, -jnp.inf)
    loss = jnp.logaddexp(margin, 0)
    if where is not None:
        label_counts = jnp.any(hit & where, axis)
        loss = jnp.where(jnp.any(where, axis), jnp.where(label_counts, loss, margin), 0)
    return jnp.where(valid, loss, jnp.nan)


def check(logits, labels, axis, where):
    """Raises if the labels' shape is not that of the logits without `axis`."""
    gone = _axes(axis, logits.ndim)
    expected = tuple(n for i, n in enumerate(logits.shape) if i not in gone)
    if labels.shape != expected:
        raise InputError(
            f"labels must have the shape of logits {logits.shape} without axis {axis}, "
            f"{expected}, got {labels.shape}; one-hot labels want argmax first"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels must be integers, got {labels.dtype}; convert them with "
            "labels.astype(jnp.int32)"
        )


def _axes(axis, ndim):
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def _label(shape, labels, axis):
    """`(hit, valid)`: which entry of the logits is the label's, and which labels are in range."""
    axes = _axes(axis, len(shape))
    classes = math.prod(shape[a] for a in axes)
    index = jnp.zeros((1,) * len(shape), jnp.int32)
    for a in axes:  # the flat index: later axes of `axis` run faster
        steps = jax.lax.broadcasted_iota(
            jnp.int32, tuple(n if i == a else 1 for i, n in enumerate(shape)), a
        )
        index = index * shape[a] + steps
    wrapped = jnp.where(labels < 0, labels + classes, labels)
    return jnp.expand_dims(wrapped, axes) == index, (wrapped >= 0) & (wrapped < classes)


def _at_label(logits, labels, axis):
    """The logit of each label; of any label where it is out of range."""
    axes = _axes(axis, logits.ndim)
    last = tuple(range(logits.ndim - len(axes), logits.ndim))
    classes = math.prod(logits.shape[a] for a in axes)
    flat = jnp.moveaxis(logits, axes, last).reshape(*labels.shape, classes)
    index = jnp.clip(jnp.where(labels < 0, labels + classes, labels), 0, classes - 1)
    return jnp.take_along_axis(flat, index[..., None], axis=-1)[..., 0]


def fwd(logits, labels, axis, where):
    mask = expanded(where, logits, axis)
    rest, m = others(logits, axis, mask)
    _, valid = _label(logits.shape, labels, axis)
    # A masked label still counts, as in optax: so its logit is taken before the mask.
    at_label = wide(_at_label(logits, labels, axis)) - jnp.squeeze(m, axis)
    loss = jnp.squeeze(jnp.log1p(rest), axis) - at_label
    if mask is not None:
        loss = jnp.where(jnp.any(mask, axis), loss, 0)
    loss = jnp.where(valid, loss, jnp.nan)
    return loss.astype(logits.dtype), (logits, labels, where, m, rest)


def bwd(saved, dloss, *, axis):
    logits, labels, where, m, rest = saved
    where = expanded(where, logits, axis)
    hit, _ = _label(logits.shape, labels, axis)
    dloss, z = jnp.expand_dims(wide(dloss), axis), wide(logits) - m
    e = jnp.exp(z)
    # p - 1 without the difference where the label's is the largest logit.
    minus_one = jnp.where(z == 0, -rest, e - (1 + rest))
    dlogits = dloss / (1 + rest) * jnp.where(hit, minus_one, e)
    if where is not None:
        some = jnp.any(where, axis, keepdims=True)
        dlogits = jnp.where(where, dlogits, jnp.where(hit & some, -dloss, 0))
    return dlogits, None, None


softmax_cross_entropy_with_integer_labels = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.losses.softmax_cross_entropy_with_integer_labels,
    cases=(
        Case("odd", (3, 5), integers(3, high=5)),
        Case("sure", values([[0.0, 17.0, 3.0], [40.0, 0.0, 1.0]]), values([1, 0])),
        Case("negative labels", (4, 3), values([-1, -3, 0, 2])),
        Case("leading axis", (5, 4), integers(4, high=5), axis=0),
        Case("two axes", (2, 3, 4), integers(2, high=12), axis=(1, 2)),
        Case("masked rows", (4, 3), integers(4, high=3), where=values([True, False, True, True])),
        Case("masked entries", (6, 5), integers(6, high=5), where=booleans(6, 5, p=0.7)),
        Case("empty batch", (0, 3), integers(0, high=3)),
        Case("vocabulary", (1024, 8192), integers(1024, high=8192), bench=True),
    ),
)
