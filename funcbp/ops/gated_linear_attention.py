"""Linear attention whose memory fades, each key feature at its own rate.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T        S_0 = 0
    o_t = S_t^T q_t

In a chunk of steps that begins with the state S, with F_t = g_1 + ... + g_t and R_t = g_(t+1) + ...
up to its end, both of the chunk alone
    o_t = S^T (q_t exp(F_t)) + sum_(s <= t) p_ts v_s
    p_ts = sum_i q_ti k_si exp(g_(s+1)i + ... + g_ti)
    S' = diag(exp(F_end)) S + sum_s (k_s exp(R_s)) v_s^T

p is a product of matrices where the exponent is a sum of two parts, one of t and one of s. Halve
the chunk: for t in the later half and s in the earlier, F_t within the later half plus R_s within
the earlier; both are at most 0, so nothing overflows. Each half is halved again, down to single
steps, where p_tt = q_t . k_t.

Backward. With dS' the cotangent of the state after the chunk
    dv_s = sum_(t >= s) p_ts do_t + dS'^T (k_s exp(R_s))        dp_ts = do_t . v_s
    dq_t = exp(F_t) (S do_t) and, in each halving, exp(F_t) sum_s dp_ts (k_s exp(R_s))
    dk_s = exp(R_s) (dS' v_s) and, in each halving, exp(R_s) sum_t dp_ts (q_t exp(F_t))
    dS = diag(exp(F_end)) dS' + sum_t (q_t exp(F_t)) do_t^T
    dF_t = q_t dq_t        dR_s = k_s dk_s        dF_end = exp(F_end) sum_j S_j dS'_j, too
each with the F and R of its halving, and dg is the sum of those that it is part of. The usual form,
dg = the running sum of q dq - k dk, loses the digits of a small dg as the difference of large sums.

Saves: q, k, v and g, arguments, and the state before each chunk: t / chunk of what autodiff keeps.
Edge:  g = -inf forgets all that was before. Positive g are not refused; they may overflow.
Dtype: computes in float32 or wider, returns the promoted dtype of q, k, v and g.
Ref:   Yang et al., 2023 (Gated Linear Attention), section 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, uniform
from funcbp.core import InputError, op
from funcbp.ops._buffers import bits, floats
from funcbp.ops._chunks import filled, padded, taken
from funcbp.ops._numeric import loop_zeros, wide


def plain(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h e"],
    g: Float[Array, "b t h d"],
    *,
    chunk: int = 64,
) -> Float[Array, "b t h e"]:
    """o_t = S_t^T q_t with S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T, for each head.

    Args:
      q: queries, [batch, time, heads, d]; scale them first, if they should be.
      k: keys, [batch, time, heads, d].
      v: values, [batch, time, heads, e].
      g: logarithms of the gates, at most 0, [batch, time, heads, d].
      chunk: steps of one chunk, a power of two.

    Returns:
      o, [batch, time, heads, e], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or chunk is no power of two.
    """
    dtype = jnp.result_type(q, k, v, g)
    steps = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, g)]
    start = jnp.zeros_like(jnp.sum(k[..., None] * v[..., None, :] + (q * g)[..., None], axis=1))

    def step(s, now):
        q, k, v, g = now
        s = jnp.exp(g)[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2)

    return jnp.moveaxis(jax.lax.scan(step, start.astype(dtype), tuple(steps))[1], 0, 1)


def check(q, k, v, g, *, chunk):
    """Raises if the shapes do not fit, or chunk is no power of two."""
    for name, x in (("k", k), ("g", g)):
        if q.ndim != 4 or x.shape != q.shape:
            raise InputError(
                f"q, k and g must all be [batch, time, heads, d], got q {q.shape} and {name} "
                f"{x.shape}; add the axis that is missing, as in q[:, :, None]"
            )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise InputError(
            f"v must be [batch, time, heads, e] with the first axes of q {q.shape[:3]}, "
            f"got {v.shape}"
        )
    if chunk < 1 or chunk & (chunk - 1):
        raise InputError(f"chunk must be a power of two, got {chunk}; 64 is the default")


def fwd(q, k, v, g, *, chunk):
    size = _size(q, chunk)
    arrays = [padded(x, size) for x in (q, k, v, g)]

    def step(state, i):
        s, o = state
        here, mid = _heads_first(taken(arrays, i, size)), s
        part, s = _chunk(s, *here)
        return (s, filled(o, _heads_last(part), i, size)), mid

    dtype = jnp.result_type(q, k, v, g)
    like = (q, k, v, g)
    s = loop_zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), like)
    o = bits(loop_zeros(arrays[2].shape, like).astype(dtype))
    (_, o), states = jax.lax.scan(step, (s, o), jnp.arange(arrays[0].shape[1] // size))
    return floats(o, dtype)[:, : q.shape[1]], (q, k, v, g, states)


def bwd(saved, do, *, chunk):
    *arguments, states = saved
    size, steps = _size(do, chunk), do.shape[1]
    arrays = [padded(x, size) for x in (*arguments, do)]

    def step(state, now):
        ds, outs = state
        i, s = now
        ds, parts = _pulled(s, ds, *_heads_first(taken(arrays, i, size)))
        return (ds, filled(outs, [_heads_last(p) for p in parts], i, size)), None

    like = (*arguments, do)
    outs = [bits(loop_zeros(x.shape, like).astype(x.dtype)) for x in arrays[:-1]]
    ds = loop_zeros(states.shape[1:], like)
    chunks = (jnp.arange(len(states)), states)
    _, outs = jax.lax.scan(step, (ds, outs), chunks, reverse=True)[0]
    return tuple(floats(x, a.dtype)[:, :steps] for x, a in zip(outs, arguments, strict=True))


def _size(x, chunk):
    """Steps of a chunk: no more than the power of two that holds all."""
    return min(chunk, 1 << max(x.shape[1] - 1, 0).bit_length())


def _heads_first(arrays):
    return [wide(jnp.swapaxes(x, 1, 2)) for x in arrays]


def _heads_last(x):
    return jnp.swapaxes(x, 1, 2)


def _chunk(s, q, k, v, g):
    """`(o, S')` of a chunk that begins with the state s."""
    f, r = _sums(g)[-1]
    f, r = jnp.squeeze(f, -3), jnp.squeeze(r, -3)
    o = (q * jnp.exp(f)) @ s + _scores(q, k, g) @ v
    return o, _end(f) * s + jnp.swapaxes(k * jnp.exp(r), -1, -2) @ v


def _end(f):
    return jnp.exp(f[..., -1, :])[..., None]


def _sums(g):
    """For blocks of 1, 2, 4 ... steps the sums (F, R) within them, [..., blocks, steps, d]."""
    f = g[..., None, :]
    levels = [(f, jnp.zeros_like(f))]
    while f.shape[-3] > 1:
        (f, f2), (r, r2) = map(_halves, levels[-1])
        levels.append(
            (
                jnp.concatenate([f, f2 + f[..., -1:, :]], -2),
                jnp.concatenate([r + f2[..., -1:, :], r2], -2),
            )
        )
        f = levels[-1][0]
    return levels


def _halves(x):
    """The earlier and the later of each two blocks."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _blocks(x, steps):
    """[..., t, d] -> [..., t / steps, steps, d]."""
    return x.reshape(*x.shape[:-2], -1, steps, x.shape[-1])


def _faded(q, k, f, r):
    """The later queries and the earlier keys of each two blocks, faded to where these meet."""
    steps = f.shape[-2]
    later, earlier = jnp.exp(_halves(f)[1]), jnp.exp(_halves(r)[0])
    return (
        _halves(_blocks(q, steps))[1] * later,
        _halves(_blocks(k, steps))[0] * earlier,
        later,
        earlier,
    )


def _scores(q, k, g):
    """p, [..., t, t], 0 above the diagonal."""
    p = jnp.sum(q * k, axis=-1)[..., None, None]
    for f, r in _sums(g)[:-1]:
        later, earlier, *_ = _faded(q, k, f, r)
        across = later @ jnp.swapaxes(earlier, -1, -2)
        first, second = _halves(p)
        top = jnp.concatenate([first, jnp.zeros_like(across)], -1)
        p = jnp.concatenate([top, jnp.concatenate([across, second], -1)], -2)
    return jnp.squeeze(p, -3)


def _pulled(s, ds, q, k, v, g, do):
    """`(dS, (dq, dk, dv, dg))` of a chunk from the cotangents of its last state and of o."""
    levels = _sums(g)
    f, r = (jnp.squeeze(x, -3) for x in levels[-1])
    qf, kr = q * jnp.exp(f), k * jnp.exp(r)
    dv = jnp.swapaxes(_scores(q, k, g), -1, -2) @ do + kr @ ds
    dq = jnp.exp(f) * (do @ jnp.swapaxes(s, -1, -2))
    dk = jnp.exp(r) * (v @ jnp.swapaxes(ds, -1, -2))
    end = _end(f)
    df = (q * dq).at[..., -1, :].add(jnp.sum(end * s * ds, axis=-1))
    dp = do @ jnp.swapaxes(v, -1, -2)
    dq2, dk2, dg = _pulled_scores(dp, q, k, levels, df, k * dk)
    ds = end * ds + jnp.swapaxes(qf, -1, -2) @ do
    return ds, [dq + dq2, dk + dk2, dv, dg]


def _pulled_scores(dp, q, k, levels, df, dr):
    """(dq, dk, dg) from the cotangents of p and of the last level's sums."""
    diagonal = jnp.diagonal(dp, axis1=-2, axis2=-1)[..., None]
    dq, dk = diagonal * k, diagonal * q
    dp, df, dr = (x[..., None, :, :] for x in (dp, df, dr))
    for f, r in reversed(levels[:-1]):
        n = f.shape[-2]
        df, dr = _pulled_sums(df, dr)
        later, earlier, fade_later, fade_earlier = _faded(q, k, f, r)
        across = dp[..., n:, :n]
        dlater = fade_later * (across @ earlier)
        dearlier = fade_earlier * (jnp.swapaxes(across, -1, -2) @ later)
        nothing = jnp.zeros_like(dlater)
        dlater, dearlier = _pair(nothing, dlater), _pair(dearlier, nothing)
        df, dr = df + _blocks(q, n) * dlater, dr + _blocks(k, n) * dearlier
        dq, dk = dq + dlater.reshape(q.shape), dk + dearlier.reshape(k.shape)
        dp = _pair(dp[..., :n, :n], dp[..., n:, n:])
    return dq, dk, df.reshape(q.shape)


def _pulled_sums(df, dr):
    """The cotangents of the sums within halves, from those within whole blocks."""
    n = df.shape[-2] // 2
    f, f2, r, r2 = df[..., :n, :], df[..., n:, :], dr[..., :n, :], dr[..., n:, :]
    f = f.at[..., -1, :].add(jnp.sum(f2, axis=-2))
    f2 = f2.at[..., -1, :].add(jnp.sum(r, axis=-2))
    return _pair(f, f2), _pair(r, r2)


def _pair(first, second):
    """Blocks and blocks in turn: the inverse of `_halves`."""
    both = jnp.stack([first, second], -3)
    return both.reshape(*both.shape[:-4], -1, *both.shape[-2:])


gated_linear_attention = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case(
            "odd",
            (2, 7, 1, 3),
            (2, 7, 1, 3),
            (2, 7, 1, 2),
            uniform(2, 7, 1, 3, low=-3.0, high=0.0),
            chunk=4,
        ),
        Case(
            "one step",
            (1, 1, 2, 2),
            (1, 1, 2, 2),
            (1, 1, 2, 3),
            uniform(1, 1, 2, 2, low=-1.0, high=0.0),
            transformed=False,
        ),
        Case(
            "strong gates",
            (1, 16, 1, 2),
            (1, 16, 1, 2),
            (1, 16, 1, 2),
            uniform(1, 16, 1, 2, low=-60.0, high=0.0),
            transformed=False,
        ),
        Case(
            "no step",
            (1, 0, 1, 2),
            (1, 0, 1, 2),
            (1, 0, 1, 2),
            uniform(1, 0, 1, 2, low=-1.0, high=0.0),
            transformed=False,
        ),
        Case(
            "heads",
            (2, 1024, 4, 64),
            (2, 1024, 4, 64),
            (2, 1024, 4, 64),
            uniform(2, 1024, 4, 64, low=-0.2, high=0.0),
            bench=True,
        ),
    ),
)
