"""Cross-entropy of a linear layer's logits, which are never all in memory.

    z_rk = sum_i h_ri w_ik + b_k        x = cap tanh(z / cap), or z without a softcap
    loss_r = lse_r - sum_k q_rk x_rk + zeta lse_r^2        lse_r = log sum_k exp(x_rk)
    q_rk = (1 - epsilon) [k = c_r] + epsilon / v           c the label, of v classes
    y = sum_r a_r loss_r / sum_r a_r                       a the weights, 0 for an ignored row

Backward. With p the softmax of x and A = sum_r a_r
    dz_rk = a_r (p_rk (1 + 2 zeta lse_r) - q_rk) (1 - x_rk^2 / cap^2)        times dy / A
    dh_ri = sum_k dz_rk w_ik        dw_ik = sum_r h_ri dz_rk        db_k = sum_r dz_rk
    da_r = dy (loss_r - y) / A

Since y is one number, dy only scales these: so the forward pass makes them all, one chunk of rows
after the other, from logits that are thrown away, and the backward pass multiplies. A call that is
not differentiated leaves them out. With a `vocab_chunk` a chunk of rows takes its logits in parts,
twice: for lse, and for dz; that costs a fourth product for the three of autodiff.

Saves: dh, dw and db, before dy, and a loss a row: as large as the arguments, not as the logits.
Edge:  rows whose label is `ignore_index` count for nothing; if none is left y = 0, with no
       gradient. Any other label that is no class gives nan.
Dtype: products accumulate, and all the rest is done, in float32 or wider; dz is rounded to the
       arguments' dtype for its products. Returns the promoted dtype of h, w and bias.
Ref:   Wijmans et al., 2024 (Cut Your Losses); Hsu et al., 2024 (Liger Kernel), section 3.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, normal, uniform, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import loop_zeros, rows, wide
from funcbp.ops.linear import check as check_linear
from funcbp.ops.linear import product

# How many logits a chunk of rows has by default, and how many rows at least.
LOGITS, ROWS = 2**22, 128


def plain(
    h: Float[Array, "*batch d"],
    w: Float[Array, "d v"],
    labels: Int[Array, "*batch"],
    bias: Float[Array, " v"] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    row_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Float[Array, ""]:
    """The weighted mean over rows of the cross-entropy between softmax(h @ w + bias) and labels.

    Args:
      h: features, [..., d].
      w: weights of the layer, [d, v], a column a class.
      labels: a class from 0 to v - 1 for each row of h, [...].
      bias: [v], or None for none.
      weights: how much each row counts, [...]; None for 1.
      label_smoothing: the share of the label that is spread over all classes, from 0 to 1.
      z_loss: weight of the squared logarithm of the softmax's denominator.
      softcap: logits become softcap * tanh(logits / softcap); None for none.
      ignore_index: the label of rows that do not count, such as -100; None for none.
      row_chunk: rows whose logits are in memory at once; None for about 4 million logits.
      vocab_chunk: classes whose logits are in memory at once; None for all of a chunk of rows.

    Returns:
      The loss in nats, a scalar in the promoted dtype of h, w and bias.

    Raises:
      InputError: the shapes do not fit, or a setting is out of range.
    """
    x = h @ w if bias is None else h @ w + bias
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    m = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf))
    lse = jnp.log(jnp.sum(jnp.exp(x - m), axis=-1)) + jnp.squeeze(m, -1)
    hit = labels[..., None] == jnp.arange(w.shape[1])
    at_label = jnp.sum(jnp.where(hit, x, 0), axis=-1)
    loss = lse - (1 - label_smoothing) * at_label - label_smoothing * jnp.mean(x, axis=-1)
    loss = jnp.where((labels >= 0) & (labels < w.shape[1]), loss + z_loss * lse**2, jnp.nan)
    a = jnp.ones_like(loss) if weights is None else weights
    a = a if ignore_index is None else jnp.where(labels == ignore_index, 0, a)
    total = jnp.sum(a)
    mean = jnp.sum(jnp.where(a == 0, 0, a * loss)) / jnp.where(total == 0, 1, total)
    return mean.astype(jnp.result_type(x))


def check(h, w, labels, bias, weights, **settings):
    """Raises if the shapes do not fit or a setting is out of range."""
    check_linear(h, w, bias)
    for name, value in (("labels", labels), ("weights", weights)):
        if value is not None and value.shape != h.shape[:-1]:
            raise InputError(
                f"{name} must have the shape of h {h.shape} without its last axis, "
                f"{h.shape[:-1]}, got {value.shape}; give one for each row"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels must be integers, got {labels.dtype}; convert them with "
            "labels.astype(jnp.int32)"
        )
    for name in ("row_chunk", "vocab_chunk"):
        if settings[name] is not None and settings[name] < 1:
            raise InputError(
                f"{name} must be at least 1, got {settings[name]}; None lets the op choose"
            )


class Head(NamedTuple):
    """The layer and the settings of the loss."""

    w: Array
    bias: Array | None
    softcap: float | None
    smoothing: float
    z_loss: float
    chunk: int  # classes at once
    scale: float = 1.0  # of the product h w


class Rows(NamedTuple):
    """A chunk of rows."""

    h: Array  # [r, d]
    labels: Array  # [r, 1]
    a: Array  # [r, 1]


class _Seen(NamedTuple):
    """What the classes seen so far say of each row, [r, 1]."""

    m: Array  # the largest logit
    s: Array  # sum exp(x - m)
    at_label: Array
    total: Array  # sum x


class Cotangents(NamedTuple):
    """Of the weighted sum over rows, in float32 or wider."""

    h: Array
    w: Array
    bias: Array | None


def fwd(h, w, labels, bias, weights, *, label_smoothing, z_loss, softcap, ignore_index, **chunks):
    flat, c = rows(h), labels.reshape(-1, 1)
    dtype = jnp.result_type(h, w) if bias is None else jnp.result_type(h, w, bias)
    a = jnp.ones(c.shape, dtype) if weights is None else weights.reshape(-1, 1)
    a = wide(a if ignore_index is None else jnp.where(c == ignore_index, 0, a))
    v = w.shape[1]
    every = Rows(flat, c, a)
    head = Head(w, bias, softcap, label_smoothing, z_loss, min(chunks["vocab_chunk"] or v, v))
    losses, d = over_rows(head, every, chunks["row_chunk"])
    total = jnp.sum(a)
    y = jnp.sum(jnp.where(a == 0, 0, a * losses)) / jnp.where(total == 0, 1, total)
    dbias = None if d.bias is None else d.bias.astype(dtype)
    d = Cotangents(d.h.astype(dtype), d.w.astype(dtype), dbias)
    return y.astype(dtype), (h, w, labels, bias, weights, a, losses, y, d)


def bwd(saved, dy, **settings):
    h, _, labels, bias, weights, a, losses, y, d = saved
    total = jnp.sum(a)
    scale = jnp.where(total == 0, 0, wide(dy) / jnp.where(total == 0, 1, total))
    dweights = None
    if weights is not None:
        ignored = labels == settings["ignore_index"]
        dweights = jnp.where(ignored, 0, scale * (losses.reshape(labels.shape) - y))
    dbias = None if bias is None else scale * wide(d.bias)
    return scale * wide(d.h).reshape(h.shape), scale * wide(d.w), None, dbias, dweights


def over_rows(head: Head, every: Rows, r: int | None) -> tuple[Array, Cotangents]:
    """`(losses, cotangents)`, by r rows at a time."""
    n, like = len(every.h), (every, head.w, head.bias)
    r = min(r or max(LOGITS // max(head.w.shape[1], 1), ROWS), n)

    def step(i, state):
        losses, d = state
        # The last chunk starts early enough to be whole; the rows that it repeats weigh nothing.
        start = jnp.minimum(i * r, n - r)
        here = Rows(*(jax.lax.dynamic_slice_in_dim(x, start, r) for x in every))
        fresh = (start + jnp.arange(r) >= i * r)[:, None]
        seen, dh, dw, dbias = _chunk(head, here._replace(a=jnp.where(fresh, here.a, 0)), d)
        losses = jax.lax.dynamic_update_slice_in_dim(losses, _loss(head, here, seen), start, 0)
        dh = jnp.where(fresh, dh, jax.lax.dynamic_slice_in_dim(d.h, start, r))
        dh = jax.lax.dynamic_update_slice_in_dim(d.h, dh, start, 0)
        return losses, Cotangents(dh, dw, dbias)

    init = (
        loop_zeros((n, 1), like),
        Cotangents(
            loop_zeros(every.h.shape, like),
            loop_zeros(head.w.shape, like),
            None if head.bias is None else loop_zeros(head.bias.shape, like),
        ),
    )
    if r == n:  # no loop for one chunk, or for none
        return step(0, init) if n else init
    return jax.lax.fori_loop(0, -(-n // r), step, init)


def _chunk(head: Head, here: Rows, d: Cotangents) -> tuple[_Seen, Array, Array, Array | None]:
    """What is seen of the rows, their dh, and dw and dbias with theirs added."""
    like, v = (here, head.w, head.bias), head.w.shape[1]
    zeros = loop_zeros(here.a.shape, like)
    seen, dh = _Seen(zeros - jnp.inf, zeros, zeros, zeros), loop_zeros(here.h.shape, like)
    if head.chunk == v:
        x, _, column = _logits(head, here.h, 0)
        seen = _with(seen, here, x, column, None)
        return seen, *_added(head, here, seen, (dh, d.w, d.bias), x, column, None, 0)

    def look(j, seen):
        x, fresh, column = _logits(head, here.h, j)
        return _with(seen, here, x, column, fresh)

    def add(j, sums):
        x, fresh, column = _logits(head, here.h, j)
        return _added(head, here, seen, sums, x, column, fresh, column[0])

    parts = -(-v // head.chunk)
    seen = jax.lax.fori_loop(0, parts, look, seen)
    return seen, *jax.lax.fori_loop(0, parts, add, (dh, d.w, d.bias))


def _logits(head: Head, h: Array, j: Any) -> tuple[Array, Array, Array]:
    """`(x, fresh, column)`: part j of the logits, which of it is new, and its classes."""
    start = jnp.minimum(j * head.chunk, head.w.shape[1] - head.chunk)
    column = start + jnp.arange(head.chunk)
    x = product(h, jax.lax.dynamic_slice_in_dim(head.w, start, head.chunk, axis=1))
    x = x if head.scale == 1 else x * head.scale
    if head.bias is not None:
        x += wide(jax.lax.dynamic_slice_in_dim(head.bias, start, head.chunk))
    if head.softcap is not None:
        x = head.softcap * jnp.tanh(x / head.softcap)
    return x, column >= j * head.chunk, column


def _with(seen: _Seen, here: Rows, x: Array, column: Array, fresh: Array | None) -> _Seen:
    """What is seen with these logits, those that are not fresh left out."""

    def total(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    known = x if fresh is None else jnp.where(fresh, x, 0)
    x = x if fresh is None else jnp.where(fresh, x, -jnp.inf)
    m = jnp.maximum(seen.m, jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf))
    return _Seen(
        m,
        seen.s * jnp.exp(seen.m - m) + total(jnp.exp(x - m)),
        seen.at_label + total(jnp.where(column == here.labels, known, 0)),
        seen.total + total(known),
    )


def _loss(head: Head, here: Rows, seen: _Seen) -> Array:
    """A number a row; the differences first, as they are small where lse is large."""
    log_s, epsilon, v = jnp.log(seen.s), head.smoothing, head.w.shape[1]
    loss = log_s + (1 - epsilon) * (seen.m - seen.at_label)
    if epsilon:
        loss += epsilon * (seen.m - seen.total / v)
    loss += head.z_loss * jnp.square(seen.m + log_s)
    return jnp.where((here.labels >= 0) & (here.labels < v), loss, jnp.nan)


def _added(head, here, seen, sums, x, column, fresh, start):
    """(dh, dw, dbias) with the share of the classes from `start` on."""
    dh, dw, dbias = sums
    lse, epsilon = seen.m + jnp.log(seen.s), head.smoothing
    p_weight = here.a * (1 + 2 * head.z_loss * lse) / seen.s
    dz = jnp.exp(x - seen.m) * p_weight
    dz -= jnp.where(column == here.labels, here.a * (1 - epsilon), 0)
    if epsilon:
        dz -= here.a * (epsilon / head.w.shape[1])
    if head.softcap is not None:
        dz *= 1 - jnp.square(x / head.softcap)
    dz = dz if fresh is None else jnp.where(fresh, dz, 0)
    dz = dz if head.scale == 1 else dz * head.scale
    short = dz.astype(jnp.result_type(here.h, head.w))
    part = jax.lax.dynamic_slice_in_dim(head.w, start, head.chunk, axis=1)
    dh += product(short, part.T)
    dw = _added_at(dw, product(here.h.T, short), start, 1)
    if dbias is not None:
        dbias = _added_at(dbias, jnp.sum(dz, axis=0), start, 0)
    return dh, dw, dbias


def _added_at(total: Array, part: Array, start: Any, axis: int) -> Array:
    """total with the part added from `start` on along the axis, in place."""
    size = part.shape[axis]
    if size == total.shape[axis]:
        return total + part
    part += jax.lax.dynamic_slice_in_dim(total, start, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis)


linear_cross_entropy = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd, chunks", (5, 3), (3, 7), integers(5, high=7), row_chunk=2, vocab_chunk=3),
        Case(
            "everything",
            (2, 3, 4),
            normal(4, 7, std=2.0),
            integers(2, 3, high=7),
            (7,),
            uniform(2, 3),
            label_smoothing=0.1,
            z_loss=1e-2,
            softcap=3.0,
            ignore_index=2,
        ),
        Case("no row left", (2, 3), (3, 4), values([-1, -1]), ignore_index=-1),
        Case("empty batch", (0, 3), (3, 4), integers(0, high=4)),
        Case(
            "tokens",
            (2048, 256),
            normal(256, 32000, std=0.1),
            integers(2048, high=32000),
            bench=True,
        ),
    ),
)
