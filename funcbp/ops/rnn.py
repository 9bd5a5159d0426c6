"""The plain recurrent layer over a sequence, in one direction.

    h_t = f(x_t w + h_(t-1) u + b)        f = tanh or relu        y_t = h_t

Backward. From the last step to the first, with dh what h_t receives from y_t and from the step
after it:
    dz = dh (1 - h_t^2) for tanh, dh [h_t > 0] for relu        dh_(t-1) = dz u^T
and outside of the loop over steps, as matrix products over many steps at once,
    dx_t = dz_t w^T    dw = sum_t x_t^T dz_t    du = sum_t h_(t-1)^T dz_t    db = sum_t dz_t

Saves: y, the output, and the state at the start of each chunk of steps, a small part of y.
Edge:  a step beyond its row's length gives y = 0 and leaves the state as it is, in reverse too, so
       the last state is that of the last step that counts. Length 0 gives the initial state.
       The derivative of relu is 0 at 0.
Dtype: computes and carries the state in float32 or wider; stores and returns the promoted dtype of
       the arguments.
Ref:   Elman, 1990; Werbos, 1990 (backpropagation through time).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops import _recurrent
from funcbp.ops._recurrent import Cell, Layer
from funcbp.ops._steps import counted, masked, select


def plain(
    x: Float[Array, "batch time n"],
    w: Float[Array, "n m"],
    u: Float[Array, "m m"],
    b: Float[Array, " m"] | None = None,
    state: Float[Array, "batch m"] | None = None,
    lengths: Int[Array, " batch"] | None = None,
    *,
    activation: str = "tanh",
    time_major: bool = False,
    reverse: bool = False,
) -> tuple[Float[Array, "batch time m"], Float[Array, "batch m"]]:
    """y, h = the outputs of all steps and the state after the last.

    Args:
      x: the sequences, [batch, time, n].
      w: weights of the input, [n, m].
      u: weights of the output of the step before, [m, m].
      b: bias, [m], or None for none.
      state: what the first step starts from, [batch, m]; None for 0.
      lengths: how many steps of each row count, from the first; None for all.
      activation: "tanh" or "relu".
      time_major: x and y are [time, batch, ...].
      reverse: go from the last step that counts to the first.

    Returns:
      y [batch, time, m] and the last state h [batch, m].

    Raises:
      InputError: the shapes do not fit, or there is no such activation.
    """
    (start,) = _recurrent.initial(_layer(x, w, u, b, state, lengths), time_major, 1)
    x = x if time_major else jnp.moveaxis(x, 1, 0)
    valid = counted(lengths, 0, len(x))
    f = jnp.tanh if activation == "tanh" else jax.nn.relu

    def step(h, now):
        x, valid = now
        z = x @ w + h @ u
        after = f(z if b is None else z + b)
        return select(valid, after, h), masked(valid, after)

    last, y = jax.lax.scan(step, start, (x, valid), reverse=reverse)
    return y if time_major else jnp.moveaxis(y, 0, 1), last


def _layer(x, w, u, b, state, lengths):
    return Layer(x, w, u, b, None, None if state is None else (state,), lengths)


def check(x, w, u, b, state, lengths, *, activation, time_major, reverse):
    """Raises if the shapes do not fit or there is no such activation."""
    if activation not in CELLS:
        raise InputError(f"activation must be one of {', '.join(CELLS)}, got {activation!r}")
    _recurrent.check(_layer(x, w, u, b, state, lengths), 1, 1, time_major)


def tanh_step(z, q, state):
    return (jnp.tanh(z + q),), ()


def tanh_pull(kept, before, after, dstate):
    (dh,), (h,) = dstate, after
    return dh * (1 - h) * (1 + h), None, (0,)


def relu_step(z, q, state):
    return (jnp.maximum(z + q, 0),), ()


def relu_pull(kept, before, after, dstate):
    (dh,), (h,) = dstate, after
    return jnp.where(h > 0, dh, 0), None, (0,)


CELLS = {"tanh": Cell(tanh_step, tanh_pull), "relu": Cell(relu_step, relu_pull)}


def fwd(x, w, u, b, state, lengths, *, activation, **settings):
    layer = _layer(x, w, u, b, state, lengths)
    y, (last,), saved = _recurrent.forward(CELLS[activation], layer, 1, **settings)
    return (y, last), saved


def bwd(saved, dys, *, activation, **settings):
    dy, dlast = dys
    d = _recurrent.backward(CELLS[activation], saved, dy, (dlast,), **settings)
    return d.x, d.w, d.u, d.b, None if d.state is None else d.state[0], None


rnn = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (4, 5, 3), (3, 2), (2, 2), (2,), (4, 2), values([3, 0, 5, 1])),
        # In bfloat16 a z near 0 has one sign or the other, and relu one slope or the other.
        Case(
            "relu, time first, reverse",
            *((5, 3, 1), (1, 3), (3, 3)),
            activation="relu",
            time_major=True,
            reverse=True,
            dtypes=("float32",),
            transformed=False,
        ),
        Case("chunks", (120, 5, 2), (2, 2), (2, 2), dtypes=("float32",), transformed=False),
        Case("no step", (2, 0, 3), (3, 1), (1, 1), dtypes=("float32",), transformed=False),
        Case(
            "sequence",
            (32, 128, 128),
            normal(128, 256, std=0.06),
            normal(256, 256, std=0.06),
            normal(256, std=0.1),
            bench=True,
        ),
    ),
)
