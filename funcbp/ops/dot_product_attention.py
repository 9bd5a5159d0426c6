"""Scaled dot-product attention, whose scores are never all in memory.

    x_ij = cap tanh(scale sum_h q_ih k_jh / cap) + bias_ij        without the tanh if cap is None
    p_ij = exp(x_ij - lse_i) over the keys j that query i sees        lse_i = log sum_j exp(x_ij)
    o_ih = sum_j p_ij r_ij v_jh        r_ij = 0 for what dropout drops, 1 / (1 - rate) else, or 1

for each batch entry and each head; queries of N / K heads share the keys and values of one.

Backward. With dp_ij = r_ij sum_h do_ih v_jh
    dx_ij = p_ij (dp_ij - sum_k p_ik dp_ik)
    dbias_ij = dx_ij, summed over the axes that bias lacks
    dz_ij = scale dx_ij (1 - c_ij^2 / cap^2)        c_ij = x_ij - bias_ij
    dq_ih = sum_j dz_ij k_jh        dk_jh = sum_i dz_ij q_ih        dv_jh = sum_i p_ij r_ij do_ih

x, p and r are made again, for a block of queries and the keys that any of them may see; what
causality or the window hides from all of them costs nothing.

Saves: the arguments, and for each query and head two numbers: the largest score m, and
       sum_j exp(x_ij - m). Their logarithm as one number would not do: rounded, it puts all of a
       row off alike.
Edge:  a query that sees no key (masked, past its length, alone in its segment, or all its biases
       -inf) gives 0, with lse -inf and no gradient; jax.nn gives the mean of the values there if
       only the mask or the key's length hides them. lse has no gradient, as jax.nn's.
Dtype: computes in float32 or wider, also where jax.nn takes float32 for float64; returns the
       dtype of the query.
Ref:   Rabe and Staats, 2021; Dao, 2023 (FlashAttention-2), section 3.1; Vaswani et al., 2017.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from funcbp.case import Case, booleans, key, values
from funcbp.core import op
from funcbp.ops._attention import backward, forward
from funcbp.ops._attention_blocks import Extras, Rules, cap, kept, visible
from funcbp.ops._attention_checks import check
from funcbp.ops._numeric import wide


def plain(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k h"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " b"] | None = None,
    key_value_seq_lengths: Int[Array, " b"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    query_segment_ids: Int[Array, "*b t"] | None = None,
    key_value_segment_ids: Int[Array, "*b s"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*b t n h"] | tuple[Float[Array, "*b t n h"], Float[Array, "*b t n"]]:
    """softmax(scale * query @ key^T + bias) @ value, for each head.

    Args:
      query: [batch, t, heads, width], or without batch.
      key: [batch, s, key heads, width]; the number of heads is a multiple of that of key heads.
      value: the shape of key.
      bias: added to the scores; broadcasts to [batch, heads, t, s].
      mask: True where a query sees a key; broadcasts to [batch, heads, t, s].
      scale: of the scores; None for 1 / sqrt(width).
      is_causal: query i sees the keys 0 to i only.
      query_seq_lengths: [batch], how many queries count; the others see nothing.
      key_value_seq_lengths: [batch], how many keys are seen.
      local_window_size: (l, r), or one number for both: query i sees the keys i - l to i + r only.
      implementation: "cudnn" for jax.nn's on GPUs that have it, whose rule runs the forward pass
        again; None or "xla" for this op's own.
      return_residual: also return the logarithm of each softmax's denominator.
      softcap: scores become softcap * tanh(score / softcap), before bias; None for none.
      query_segment_ids: [batch, t]; a query sees the keys of its own segment only.
      key_value_segment_ids: [batch, s], given if and only if those of the queries are.
      dropout_rate: the probability that a weight is zeroed, in [0, 1); the rest is scaled up.
      dropout_key: one PRNG key, needed if the rate is not 0.

    Returns:
      The shape and dtype of query, or with `return_residual` a tuple of it and [batch, t, heads].

    Raises:
      InputError: the shapes do not fit, or a setting is out of range.
    """
    q, k, v = (wide(a[None] if a.ndim == 3 else a) for a in (query, key, value))
    (b, t, n, _), s = q.shape, k.shape[1]
    heads = (k.shape[2], n // k.shape[2])  # a group of queries' heads for each of the keys'
    q = q.reshape(b, t, *heads, q.shape[-1])
    rules = Rules.of(q.shape[-1], scale, is_causal, local_window_size, softcap, dropout_rate)
    x = cap(rules, jnp.einsum("btkgh,bskh->bkgts", q, k) * rules.scale).reshape(b, n, t, s)
    x = x if bias is None else x + bias
    row, column = jnp.arange(t)[:, None], jnp.arange(s)
    seen = x > -jnp.inf
    for condition in (visible(rules, row, column), mask):
        seen = seen if condition is None else seen & condition
    if query_seq_lengths is not None:
        seen &= row < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        seen &= column < key_value_seq_lengths[:, None, None, None]
    if query_segment_ids is not None and key_value_segment_ids is not None:
        theirs = key_value_segment_ids.reshape(b, 1, 1, s)
        seen &= query_segment_ids.reshape(b, 1, t, 1) == theirs
    x = jnp.where(seen, x, jnp.finfo(x.dtype).min)
    p = jnp.where(seen, jax.nn.softmax(x), 0)
    if dropout_rate:
        p *= kept(dropout_key, dropout_rate, jnp.arange(b * n * t), s).reshape(b, n, t, s)
    o = jnp.einsum("bkgts,bskh->btkgh", p.reshape(b, *heads, t, s), v)
    lse = jax.lax.stop_gradient(jax.nn.logsumexp(x, axis=-1, where=seen))
    return _shaped(query, o, jnp.swapaxes(lse, 1, 2), return_residual)


def _shaped(query, o, lse, return_residual):
    """The output, and with `return_residual` lse, in the dtype and with the batch axes of query."""
    o = o.reshape(query.shape).astype(query.dtype)
    return (o, lse.reshape(query.shape[:-1]).astype(query.dtype)) if return_residual else o


# What only this op has, beside the signature of jax.nn's.
OWN = ("softcap", "query_segment_ids", "key_value_segment_ids", "dropout_rate", "dropout_key")


def _batched(query, key, value, bias, mask, settings):
    """`(q, k, v, extras, rules)` as the blocks take them, with a batch axis."""
    given = {"bias": bias, "mask": mask, **settings}

    def batched(name, axes):
        a = given[name]
        return a[None] if a is not None and a.ndim == axes else a

    q, k, v = (a[None] if a.ndim == 3 else a for a in (query, key, value))
    extras = Extras(
        batched("bias", 3),
        batched("mask", 3),
        given["query_seq_lengths"],
        given["key_value_seq_lengths"],
        batched("query_segment_ids", 1),
        batched("key_value_segment_ids", 1),
        given["dropout_key"],
    )
    names = ("scale", "is_causal", "local_window_size", "softcap", "dropout_rate")
    return q, k, v, extras, Rules.of(q.shape[-1], *(given[name] for name in names))


def _cudnn(settings):
    """jax.nn's function of (query, key, value, bias, mask)."""
    theirs = {n: v for n, v in settings.items() if n not in OWN}

    def attention(*arrays):
        return jax.nn.dot_product_attention(*arrays, **theirs)

    return attention


def fwd(query, key, value, bias, mask, **settings):
    given = {name: settings[name] for name in ARRAYS[5:]}
    if settings["implementation"] == "cudnn":
        y = _cudnn(settings)(query, key, value, bias, mask)
        return y, (query, key, value, bias, mask, given, None)
    o, softmax = forward(*_batched(query, key, value, bias, mask, settings))
    y = _shaped(query, o, softmax.lse(), settings["return_residual"])
    return y, (query, key, value, bias, mask, given, softmax)


def bwd(saved, dy, **settings):
    query, key, value, bias, mask, given, softmax = saved
    settings |= given
    if settings["implementation"] == "cudnn":

        def attention(query, key, value, bias):
            return _cudnn(settings)(query, key, value, bias, mask)

        return *jax.vjp(attention, query, key, value, bias)[1](dy), *[None] * 6
    do = dy[0] if settings["return_residual"] else dy
    q, k, v, extras, rules = _batched(query, key, value, bias, mask, settings)
    d = backward(q, k, v, extras, softmax, do.reshape(q.shape), rules)
    dbias = None if d.bias is None else d.bias.reshape(bias.shape)
    dq, dk, dv = d.q.reshape(query.shape), d.k.reshape(key.shape), d.v.reshape(value.shape)
    return dq, dk, dv, dbias, *[None] * 6


ARRAYS = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
    "dropout_key",
)
dot_product_attention = op(
    plain,
    fwd,
    bwd,
    arrays=ARRAYS,
    check=check,
    like=jax.nn.dot_product_attention,
    cases=(
        Case("odd, causal, grouped", (2, 5, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3), is_causal=True),
        Case(
            "bias, mask",
            (2, 3, 2, 2),
            (2, 7, 1, 2),
            (2, 7, 1, 2),
            (1, 2, 3, 7),
            booleans(2, 1, 1, 7, p=0.7),
        ),
        Case(
            "segments, lengths, queries that see nothing",
            (4, 2, 3),
            (6, 1, 3),
            (6, 1, 3),
            (1, 4, 1),
            query_seq_lengths=values([3]),
            key_value_seq_lengths=values([5]),
            query_segment_ids=values([0, 3, 1, 1]),
            key_value_segment_ids=values([0, 1, 1, 1, 2, 2]),
            softcap=2.0,
            scale=0.9,
            return_residual=True,
            transformed=False,
        ),
        Case(
            "dropout",
            (1, 4, 1, 3),
            (1, 6, 1, 3),
            (1, 6, 1, 3),
            dropout_rate=0.3,
            dropout_key=key(1),
            transformed=False,
        ),
        Case(
            "blocks, window",
            (300, 1, 2),
            (300, 1, 2),
            (300, 1, 2),
            is_causal=True,
            local_window_size=(9, 0),
            dtypes=("float32",),
            transformed=False,
        ),
        Case(
            "single",
            (1, 1, 3),
            (1, 1, 3),
            (1, 1, 3),
            dtypes=("float32",),
            transformed=False,
        ),
        Case(
            "no key",
            (1, 2, 1, 3),
            (1, 0, 1, 3),
            (1, 0, 1, 3),
            dtypes=("float32",),
            transformed=False,
        ),
        Case(
            "language model",
            (2, 1024, 8, 64),
            (2, 1024, 8, 64),
            (2, 1024, 8, 64),
            is_causal=True,
            bench=True,
        ),
    ),
)
