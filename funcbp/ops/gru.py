"""Gated recurrent unit over a sequence: one layer in one direction.

    (zr, zs, zn) = x_t w + b        (qr, qs, qn) = h_(t-1) u + bu        side by side, in this order
    r, s = sigmoid(zr + qr, zs + qs)        n = tanh(zn + r qn)
    h_t = (1 - s) n + s h_(t-1)             y_t = h_t

Backward. From the last step to the first, with dh what h_t receives from y_t and from the step
after it:
    dzn = dh (1 - s) (1 - n^2)       dqn = dzn r
    dzr = dqr = dzn qn r (1 - r)     dzs = dqs = dh (h_(t-1) - n) s (1 - s)
    dh_(t-1) = dh s + dq u^T
and outside of the loop over steps, as matrix products over many steps at once,
    dx_t = dz_t w^T    dw = sum_t x_t^T dz_t    du = sum_t h_(t-1)^T dq_t
    db = sum_t dz_t    dbu = sum_t dq_t

Saves: y, and for each step r, s, n and qn: 4 times y more. With `remat_every` y and the state at
       each k-th step only, from which the backward pass runs forward again.
Edge:  a step beyond its row's length gives y = 0 and leaves the state as it is, in reverse too, so
       the last state is that of the last step that counts. Length 0 gives the initial state.
Dtype: computes and carries the state in float32 or wider; stores and returns the promoted dtype of
       the arguments.
Ref:   Cho et al., 2014; the reset gate r after the product, as in cuDNN and PyTorch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, normal, values
from funcbp.core import op
from funcbp.ops import _recurrent
from funcbp.ops._recurrent import Cell, Layer
from funcbp.ops._steps import counted, masked, select


def plain(
    x: Float[Array, "batch time n"],
    w: Float[Array, "n gates"],
    u: Float[Array, "m gates"],
    b: Float[Array, " gates"] | None = None,
    bu: Float[Array, " gates"] | None = None,
    state: Float[Array, "batch m"] | None = None,
    lengths: Int[Array, " batch"] | None = None,
    *,
    time_major: bool = False,
    reverse: bool = False,
    remat_every: int | None = None,
) -> tuple[Float[Array, "batch time m"], Float[Array, "batch m"]]:
    """y, h = the outputs of all steps and the state after the last.

    Args:
      x: the sequences, [batch, time, n].
      w: weights of the input, [n, 3 m]; columns for the gates r, z, n, as in PyTorch's rows.
      u: weights of the output of the step before, [m, 3 m].
      b: bias of x w, [3 m], or None for none.
      bu: bias of h u, [3 m], or None for none.
      state: what the first step starts from, [batch, m]; None for 0.
      lengths: how many steps of each row count, from the first; None for all.
      time_major: x and y are [time, batch, ...].
      reverse: go from the last step that counts to the first.
      remat_every: None keeps the gates of every step for the backward pass; k keeps the state of
        each k-th step and computes the rest again.

    Returns:
      y [batch, time, m] and the last state h [batch, m].

    Raises:
      InputError: the shapes do not fit.
    """
    del remat_every  # of the backward pass alone
    (start,) = _recurrent.initial(_layer(x, w, u, b, bu, state, lengths), time_major, 1)
    x = x if time_major else jnp.moveaxis(x, 1, 0)
    valid = counted(lengths, 0, len(x))

    def step(h, now):
        x, valid = now
        z, q = x @ w, h @ u
        zr, zs, zn = jnp.split(z if b is None else z + b, 3, axis=-1)
        qr, qs, qn = jnp.split(q if bu is None else q + bu, 3, axis=-1)
        r, s = jax.nn.sigmoid(zr + qr), jax.nn.sigmoid(zs + qs)
        after = (1 - s) * jnp.tanh(zn + r * qn) + s * h
        return select(valid, after, h), masked(valid, after)

    last, y = jax.lax.scan(step, start, (x, valid), reverse=reverse)
    return y if time_major else jnp.moveaxis(y, 0, 1), last


def _layer(x, w, u, b, bu, state, lengths):
    return Layer(x, w, u, b, bu, None if state is None else (state,), lengths)


def check(x, w, u, b, bu, state, lengths, *, time_major, reverse, remat_every):
    """Raises if the shapes do not fit."""
    layer = _layer(x, w, u, b, bu, state, lengths)
    _recurrent.check(layer, 3, 1, time_major, remat_every)


def step(z, q, state):
    (zr, zs, zn), (qr, qs, qn) = (jnp.split(v, 3, axis=-1) for v in (z, q))
    r, s = jax.nn.sigmoid(zr + qr), jax.nn.sigmoid(zs + qs)
    n = jnp.tanh(zn + r * qn)
    return ((1 - s) * n + s * state[0],), (r, s, n, qn)


def pull(kept, before, after, dstate):
    r, s, n, qn = kept
    (dh,) = dstate
    dzn = dh * (1 - s) * (1 - n) * (1 + n)
    dzr, dzs = dzn * qn * r * (1 - r), dh * (before[0] - n) * s * (1 - s)
    dz, dq = (jnp.concatenate([dzr, dzs, v], axis=-1) for v in (dzn, dzn * r))
    return dz, dq, (dh * s,)


CELL = Cell(step, pull)


def fwd(x, w, u, b, bu, state, lengths, **settings):
    layer = _layer(x, w, u, b, bu, state, lengths)
    y, (last,), saved = _recurrent.forward(CELL, layer, 1, **settings)
    return (y, last), saved


def bwd(saved, dys, **settings):
    dy, dlast = dys
    d = _recurrent.backward(CELL, saved, dy, (dlast,), **settings)
    return d.x, d.w, d.u, d.b, d.c, None if d.state is None else d.state[0], None


gru = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case(
            "odd",
            *((4, 5, 3), (3, 6), (2, 6), (6,), (6,), (4, 2), values([3, 0, 5, 1])),
            transformed=False,
        ),
        Case(
            "recomputed, time first, reverse",
            *((7, 3, 1), (1, 9), (3, 9), None, (9,)),
            time_major=True,
            reverse=True,
            remat_every=3,
        ),
        Case("no step", (2, 0, 3), (3, 3), (1, 3), dtypes=("float32",), transformed=False),
        Case(
            "sequence",
            (32, 128, 128),
            normal(128, 768, std=0.06),
            normal(256, 768, std=0.06),
            normal(768, std=0.1),
            normal(768, std=0.1),
            bench=True,
        ),
    ),
)
