"""The selective state space of Mamba: a linear recurrence whose steps depend on the input.

    h_tin = exp(delta_ti A_in) h_(t-1)in + delta_ti x_ti B_tn        h_0 = 0
    y_ti = sum_n C_tn h_tin + D_i x_ti

Backward. With e_tin = exp(delta_ti A_in), g_tin the cotangent of h_tin from all that follows, and
w_tin = g_tin e_tin h_(t-1)in
    g_tin = C_tn dy_ti + e_(t+1)in g_(t+1)in
    u_ti = sum_n g_tin B_tn
    dx_ti = delta_ti u_ti + D_i dy_ti        ddelta_ti = x_ti u_ti + sum_n w_tin A_in
    dA_in = sum_t w_tin delta_ti             dD_i = sum_t x_ti dy_ti
    dB_tn = sum_i g_tin delta_ti x_ti        dC_tn = sum_i h_tin dy_ti

The state is n times as large as x. It is kept before each chunk of steps only; the states of one
chunk at a time are made again, on the way back.

Saves: the arguments, and the state before each chunk: [t / chunk, batch, n, d].
Edge:  a length of 0 gives an empty y. delta is taken as it is: apply softplus first.
Dtype: computes in float32 or wider, returns the promoted dtype of the arguments.
Ref:   Gu and Dao, 2023 (Mamba), section 3.3 and algorithm 2; its official code for delta_ti B_tn.
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
    x: Float[Array, "b t d"],
    delta: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    D: Float[Array, " d"] | None = None,
    *,
    chunk: int = 32,
) -> Float[Array, "b t d"]:
    """y_t = C_t h_t + D x_t with h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t.

    Args:
      x: inputs, [batch, time, d].
      delta: step sizes, at least 0, [batch, time, d].
      A: rates, below 0 for a state that fades, [d, n].
      B: what enters the state, [batch, time, n].
      C: what leaves it, [batch, time, n].
      D: the share of x in y, [d], or None for none.
      chunk: steps between two states that are kept.

    Returns:
      y, [batch, time, d], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or chunk is less than 1.
    """
    dtype = _dtype(x, delta, A, B, C, D)
    A = A.astype(dtype)
    steps = tuple(jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, delta, B, C))

    def step(h, now):
        x, delta, b, c = now
        h = jnp.exp(delta[..., None] * A) * h + (delta * x)[..., None] * b[..., None, :]
        return h, jnp.sum(h * c[..., None, :], axis=-1)

    start = jnp.zeros_like(jnp.sum(x * delta, axis=1)[..., None] * A * jnp.sum(B * C, 1)[:, None])
    y = jnp.moveaxis(jax.lax.scan(step, start.astype(dtype), steps)[1], 0, 1)
    return y if D is None else y + (D * x).astype(dtype)


def _dtype(*arrays):
    return jnp.result_type(*(a for a in arrays if a is not None))


def check(x, delta, A, B, C, D, *, chunk):
    """Raises if the shapes do not fit, or chunk is less than 1."""
    if x.ndim != 3 or delta.shape != x.shape:
        raise InputError(
            f"x and delta must both be [batch, time, d], got {x.shape} and {delta.shape}; add the "
            "axis of the batch, or broadcast delta"
        )
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise InputError(f"A must be [d, n] with the d of x {x.shape[2]}, got {A.shape}")
    for name, a in (("B", B), ("C", C)):
        if a.shape != (*x.shape[:2], A.shape[1]):
            raise InputError(
                f"{name} must be [batch, time, n], {(*x.shape[:2], A.shape[1])}, got {a.shape}"
            )
    if D is not None and D.shape != x.shape[2:]:
        raise InputError(f"D must be [d], {x.shape[2:]}, got {D.shape}; None for none")
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}; 32 is the default")


def fwd(x, delta, A, B, C, D, *, chunk):
    size = max(min(chunk, x.shape[1]), 1)
    arrays = [padded(a, size) for a in (x, delta, B, C)]
    rates = wide(A).T

    def over_chunk(state, i):
        h, y = state
        here = taken(arrays, i, size)

        def step(t, state):
            h, y = state
            x, delta, b, c = _now(here, t)
            h = jnp.exp(delta * rates) * h + delta * x * b
            return h, jax.lax.dynamic_update_index_in_dim(y, jnp.sum(h * c, axis=1), t, 1)

        part = loop_zeros((len(x), size, x.shape[2]), like)
        end, part = jax.lax.fori_loop(0, size, step, (h, part))
        if D is not None:
            part += wide(D) * wide(here[0])
        return (end, filled(y, part, i, size)), h

    dtype = _dtype(x, delta, A, B, C, D)
    like = (x, delta, A, B, C)
    h = loop_zeros((len(x), *rates.shape), like)
    y = bits(loop_zeros(arrays[0].shape, (*like, D)).astype(dtype))
    (_, y), states = jax.lax.scan(over_chunk, (h, y), jnp.arange(arrays[0].shape[1] // size))
    return floats(y, dtype)[:, : x.shape[1]], (x, delta, A, B, C, D, states)


def _now(arrays, t):
    """Step t of (x, delta, B, C ...), as [batch, 1, d] or [batch, n, 1]."""
    rows = [wide(jax.lax.dynamic_index_in_dim(a, t, 1, keepdims=False)) for a in arrays]
    return [a[:, :, None] if i in (2, 3) else a[:, None] for i, a in enumerate(rows)]


def bwd(saved, dy, *, chunk):
    x, delta, A, B, C, D, states = saved
    size = max(min(chunk, x.shape[1]), 1)
    arrays = [padded(a, size) for a in (x, delta, B, C, dy)]
    rates = wide(A).T
    like = (x, delta, A, B, C, dy)

    def over_chunk(state, now):
        carried, dA, outs = state
        i, h = now
        here = taken(arrays, i, size)
        kept = _states(here, h, rates, size, like)
        parts = [loop_zeros((len(x), size, a.shape[2]), like) for a in (x, delta, B, C)]
        carried, dA, parts = _back(here, kept, rates, (carried, dA, parts))
        return (carried, dA, filled(outs, parts, i, size)), None

    zeros = loop_zeros(states.shape[1:], like)
    outs = [bits(loop_zeros(a.shape, like).astype(a.dtype)) for a in arrays[:4]]
    init = (zeros, zeros, outs)
    chunks = (jnp.arange(len(states)), states)
    (_, dA, outs), _ = jax.lax.scan(over_chunk, init, chunks, reverse=True)
    dx, ddelta, dB, dC = (
        floats(d, a.dtype)[:, : x.shape[1]] for d, a in zip(outs, arrays, strict=False)
    )
    dD = None
    if D is not None:
        dx = wide(dx) + wide(D) * wide(dy)
        dD = jnp.sum(wide(x) * wide(dy), axis=(0, 1))
    return dx, ddelta, jnp.sum(dA, axis=0).T, dB, dC, dD


def _states(here, h, rates, size, like):
    """The states before the steps of a chunk, and after the last: [size + 1, batch, n, d]."""

    def step(t, state):
        h, kept = state
        x, delta, b, *_ = _now(here, t)
        h = jnp.exp(delta * rates) * h + delta * x * b
        return h, jax.lax.dynamic_update_index_in_dim(kept, h, t + 1, 0)

    kept = loop_zeros((size + 1, *h.shape), like)
    kept = jax.lax.dynamic_update_index_in_dim(kept, h, 0, 0)
    return jax.lax.fori_loop(0, size, step, (h, kept))[1]


def _back(here, kept, rates, init):
    """Through the steps of a chunk, from the last to the first."""
    size = len(kept) - 1

    def step(i, state):
        carried, dA, parts = state
        t = size - 1 - i
        x, delta, b, c, dy = _now(here, t)
        e = jnp.exp(delta * rates)
        g = c * dy + carried
        carried = g * e
        w = carried * kept[t]
        u = jnp.sum(g * b, axis=1, keepdims=True)
        dx = delta * u
        ddelta = x * u + jnp.sum(w * rates, axis=1, keepdims=True)
        dB = jnp.sum(g * (delta * x), axis=2)
        dC = jnp.sum(kept[t + 1] * dy, axis=2)
        rows = (dx[:, 0], ddelta[:, 0], dB, dC)
        parts = [
            jax.lax.dynamic_update_index_in_dim(a, row, t, 1)
            for a, row in zip(parts, rows, strict=True)
        ]
        return carried, dA + w * delta, parts

    return jax.lax.fori_loop(0, size, step, init)


selective_scan = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case(
            "odd",
            (2, 7, 3),
            uniform(2, 7, 3),
            uniform(3, 2, low=-2.0, high=0.0),
            (2, 7, 2),
            (2, 7, 2),
            (3,),
            chunk=3,
        ),
        Case(
            "one step, no D",
            (1, 1, 2),
            uniform(1, 1, 2),
            uniform(2, 1, low=-2.0, high=0.0),
            (1, 1, 1),
            (1, 1, 1),
            transformed=False,
        ),
        Case(
            "no step", (2, 0, 3), (2, 0, 3), (3, 2), (2, 0, 2), (2, 0, 2), (3,), transformed=False
        ),
        Case(
            "tokens",
            (2, 1024, 256),
            uniform(2, 1024, 256, high=0.1),
            uniform(256, 16, low=-16.0, high=-1.0),
            (2, 1024, 16),
            (2, 1024, 16),
            (256,),
            bench=True,
        ),
    ),
)
