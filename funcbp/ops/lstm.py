"""Long short-term memory over a sequence: one layer in one direction.

    (zi, zf, zg, zo) = x_t w + h_(t-1) u + b            the gates side by side, in this order
    i, f, o = sigmoid(zi, zf, zo)    g = tanh(zg)
    c_t = f c_(t-1) + i g            h_t = o tanh(c_t)            y_t = h_t

Backward. From the last step to the first, with m = tanh(c_t), dh what h_t receives from y_t and
from the step after it, dc what c_t receives from the step after it:
    dc += dh o (1 - m^2)
    dzi = dc g i (1 - i)     dzf = dc c_(t-1) f (1 - f)     dzg = dc i (1 - g^2)
    dzo = dh m o (1 - o)     dh_(t-1) = dz u^T              dc_(t-1) = dc f
and outside of the loop over steps, as matrix products over many steps at once,
    dx_t = dz_t w^T    dw = sum_t x_t^T dz_t    du = sum_t h_(t-1)^T dz_t    db = sum_t dz_t

Saves: y, and for each step the four gates and c: 5 times y more. With `remat_every` y and the state
       at each k-th step only, from which the backward pass runs forward again.
Edge:  a step beyond its row's length gives y = 0 and leaves the state as it is, in reverse too, so
       the last state is that of the last step that counts. Length 0 gives the initial state.
Dtype: computes and carries the state in float32 or wider; stores and returns the promoted dtype of
       the arguments.
Ref:   Hochreiter and Schmidhuber, 1997; Gers, Schmidhuber and Cummins, 2000 (the gate f).
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
    state: tuple[Float[Array, "batch m"], Float[Array, "batch m"]] | None = None,
    lengths: Int[Array, " batch"] | None = None,
    *,
    time_major: bool = False,
    reverse: bool = False,
    remat_every: int | None = None,
) -> tuple[Float[Array, "batch time m"], tuple[Float[Array, "batch m"], Float[Array, "batch m"]]]:
    """y, (h, c) = the outputs of all steps and the state after the last.

    Args:
      x: the sequences, [batch, time, n].
      w: weights of the input, [n, 4 m]; columns for the gates i, f, g, o, as in PyTorch's rows.
      u: weights of the output of the step before, [m, 4 m].
      b: bias, [4 m], or None for none.
      state: what the first step starts from, (h, c), both [batch, m]; None for 0.
      lengths: how many steps of each row count, from the first; None for all.
      time_major: x and y are [time, batch, ...].
      reverse: go from the last step that counts to the first.
      remat_every: None keeps the gates of every step for the backward pass; k keeps the state of
        each k-th step and computes the rest again.

    Returns:
      y [batch, time, m] and the last state (h, c), both [batch, m].

    Raises:
      InputError: the shapes do not fit.
    """
    del remat_every  # of the backward pass alone
    start = _recurrent.initial(Layer(x, w, u, b, None, state, lengths), time_major, 2)
    x = x if time_major else jnp.moveaxis(x, 1, 0)
    valid = counted(lengths, 0, len(x))

    def step(state, now):
        h, c = state
        x, valid = now
        z = x @ w + h @ u
        i, f, g, o = jnp.split(z if b is None else z + b, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return select(valid, (h, c), state), masked(valid, h)

    last, y = jax.lax.scan(step, start, (x, valid), reverse=reverse)
    return y if time_major else jnp.moveaxis(y, 0, 1), last


def check(x, w, u, b, state, lengths, *, time_major, reverse, remat_every):
    """Raises if the shapes do not fit."""
    layer = Layer(x, w, u, b, None, state, lengths)
    _recurrent.check(layer, 4, 2, time_major, remat_every)


def step(z, q, state):
    zi, zf, zg, zo = jnp.split(z + q, 4, axis=-1)
    i, f, o = (jax.nn.sigmoid(v) for v in (zi, zf, zo))
    g = jnp.tanh(zg)
    c = f * state[1] + i * g
    return (o * jnp.tanh(c), c), (i, f, g, o)


def pull(kept, before, after, dstate):
    i, f, g, o = kept
    dh, dc = dstate
    m = jnp.tanh(after[1])
    dc += dh * o * (1 - m) * (1 + m)
    dzi, dzf = dc * g * i * (1 - i), dc * before[1] * f * (1 - f)
    dzg, dzo = dc * i * (1 - g) * (1 + g), dh * m * o * (1 - o)
    return jnp.concatenate([dzi, dzf, dzg, dzo], axis=-1), None, (0, dc * f)


CELL = Cell(step, pull)


def fwd(x, w, u, b, state, lengths, **settings):
    layer = Layer(x, w, u, b, None, state, lengths)
    y, last, saved = _recurrent.forward(CELL, layer, 2, **settings)
    return (y, last), saved


def bwd(saved, dys, **settings):
    d = _recurrent.backward(CELL, saved, *dys, **settings)
    structure = jax.tree.structure(saved.layer.state)
    return d.x, d.w, d.u, d.b, jax.tree.unflatten(structure, jax.tree.leaves(d.state)), None


# Of the size at which gates are neither closed nor open.
WEIGHTS = (normal(128, 1024, std=0.06), normal(256, 1024, std=0.06), normal(1024, std=0.1))

lstm = op(
    plain,
    fwd,
    bwd,
    check=check,
    arrays=("x", "w", "u", "b", "state", "lengths"),
    cases=(
        Case("odd", (4, 5, 3), (3, 8), (2, 8), (8,), [(4, 2), (4, 2)], values([3, 0, 5, 1])),
        Case(
            "recomputed, time first, reverse",
            *((7, 3, 1), (1, 12), (3, 12)),
            time_major=True,
            reverse=True,
            remat_every=3,
            transformed=False,
        ),
        Case("no step", (2, 0, 3), (3, 4), (1, 4), dtypes=("float32",), transformed=False),
        Case("sequence", (32, 128, 128), *WEIGHTS, bench=True),
        Case("long, recomputed", (32, 1024, 128), *WEIGHTS, remat_every=16, bench=True),
    ),
)
