"""What the recurrent ops share: the loops over time, forward and backward, for any cell.

A cell sees z_t = x_t w + b and q_t = h_(t-1) u + c and makes the next state, whose first part is h.
Time runs in chunks. A chunk takes its inputs' product with w as one matrix product before its
steps, and the gradients of w, u and x as one each after them, so no step touches the gradient of a
weight. What the cell keeps of each step is stored; with `remat_every` it is not, and the backward
pass runs each chunk again from the state it started with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcbp.core import InputError
from funcbp.ops._buffers import bits, floats, put
from funcbp.ops._numeric import loop_zeros, rows, wide
from funcbp.ops._steps import Steps, counted, masked, select, taken
from funcbp.ops.linear import product


class Cell(NamedTuple):
    """One step and its pullback; a state is a tuple of [batch, hidden] with h first.

    step(z, q, state) -> (state, kept): `kept` is a tuple of arrays, [batch, ...].
    pull(kept, before, after, dstate) -> (dz, dq, dbefore), the last without what comes through q.
    dq is None where it is dz.
    """

    step: Callable
    pull: Callable


class Layer(NamedTuple):
    """The arguments of a recurrent op; all but x, w and u may be None."""

    x: Array
    w: Array
    u: Array
    b: Array | None
    c: Array | None
    state: tuple[Array, ...] | None
    lengths: Array | None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the outputs."""
        return jnp.result_type(*jax.tree.leaves(self._replace(lengths=None)))


class Saved(NamedTuple):
    """Residuals.

    `starts` has the state at the start of each chunk. `kept`, and `states` without h, which is in
    y, have all steps, time first; they are None where the chunks run again.
    """

    layer: Layer
    y: Array
    starts: tuple[Array, ...]
    kept: tuple[Array, ...] | None
    states: tuple[Array, ...] | None


def initial(layer: Layer, time_major: bool, parts: int) -> tuple[Array, ...]:
    """The state, of so many parts, that `plain` starts with."""
    # It must have the type that a step gives, sharding included.
    hidden = layer.u.shape[0]
    like = jnp.sum(layer.x, 0 if time_major else 1) @ layer.w[:, :hidden]
    like += jnp.sum(layer.u[:, :hidden], 0)
    zeros = (jnp.zeros_like(like) + loop_zeros((), layer)).astype(layer.dtype)
    if layer.state is None:
        return (zeros,) * parts
    return tuple(zeros + v for v in layer.state)


def check(
    layer: Layer, gates: int, parts: int, time_major: bool, remat_every: int | None = None
) -> None:
    """Raises InputError if the shapes do not fit a cell with so many gates and parts of a state."""
    x, w, u = layer.x, layer.w, layer.u
    if x.ndim != 3:
        raise InputError(
            f"x must have three axes, [batch, time, features], got shape {x.shape}; "
            "add the missing axis with x[None]"
        )
    if u.ndim != 2 or u.shape[1] != gates * u.shape[0]:
        raise InputError(
            f"u must have shape [hidden, {gates} hidden], got {u.shape}; "
            f"it holds {gates} square blocks side by side"
        )
    hidden, batch = u.shape[0], x.shape[1 if time_major else 0]
    if w.shape != (x.shape[2], gates * hidden):
        raise InputError(
            f"w must have shape {(x.shape[2], gates * hidden)}, x's features by {gates} times "
            f"the hidden size of u {u.shape}, got {w.shape}"
        )
    for b in (layer.b, layer.c):
        if b is not None and b.shape != u.shape[1:]:
            raise InputError(
                f"a bias must have shape {u.shape[1:]}, a number for each column of u, "
                f"got {b.shape}; pass None for no bias"
            )
    if layer.state is not None:
        shapes = [jnp.shape(v) for v in layer.state if v is not None]
        if shapes != [(batch, hidden)] * parts:
            raise InputError(
                f"the initial state must have {parts} of shape {(batch, hidden)}, batch and "
                f"hidden size, got {shapes}; pass None for zeros"
            )
    if layer.lengths is not None and layer.lengths.shape != (batch,):
        raise InputError(
            f"lengths must have shape {(batch,)}, a number for each row of x {x.shape}, "
            f"got {layer.lengths.shape}; pass None if all steps count"
        )
    if remat_every is not None and remat_every < 1:
        raise InputError(f"remat_every must be at least 1, or None, got {remat_every}")


def run(cell: Cell, layer: Layer, steps: Steps, state: tuple, start: Any, size: int) -> tuple:
    """(state, (kept, states)) after and of the steps of one chunk."""
    z = product(taken(layer.x, start, size, steps.axis), layer.w)
    z = z if layer.b is None else z + wide(layer.b)

    def step(state, now):
        z, valid = now
        q = product(state[0].astype(layer.dtype), layer.u)
        q = q if layer.c is None else q + wide(layer.c)
        after, kept = cell.step(z, q, state)
        after = select(valid, after, state)
        return after, (kept, after)

    now = (z, counted(layer.lengths, start, size))
    return jax.lax.scan(step, state, now, reverse=steps.reverse)


def forward(cell: Cell, layer: Layer, parts: int, **settings) -> tuple[Array, tuple, Saved]:
    """(y, the last state, what to save) of a cell whose state has so many parts."""
    steps = Steps.of(layer.x, **settings)
    x, lengths, hidden = layer.x, layer.lengths, layer.u.shape[0]
    batch = x.shape[1 - steps.axis]

    def zeros(*shape):
        return loop_zeros(shape, layer)

    def chunk(carry, number, start, size):
        state, y, starts, store = carry
        starts = tuple(put(s, v[None], number) for s, v in zip(starts, state, strict=True))
        state, (kept, states) = run(cell, layer, steps, state, start, size)
        valid = counted(lengths, start, size)
        y = put(y, jnp.moveaxis(masked(valid, states[0]), 0, steps.axis), start, steps.axis)
        if store is not None:
            store = jax.tree.map(lambda s, v: put(s, v, start), store, (kept, states[1:]))
        return state, y, starts, store

    state = (zeros(batch, hidden),) * parts
    if layer.state is not None:
        state = tuple(v + s for v, s in zip(state, layer.state, strict=True))
    starts = tuple(zeros(steps.chunks, *v.shape) for v in state)
    store = None
    if settings.get("remat_every") is None:
        z = jax.ShapeDtypeStruct((batch, layer.w.shape[1]), state[0].dtype)
        after, kept = jax.eval_shape(cell.step, z, z, state)
        store = jax.tree.map(
            lambda v: zeros(steps.length, *v.shape).astype(layer.dtype), (kept, after[1:])
        )
    y = zeros(*x.shape[:2], hidden).astype(layer.dtype)
    y, store = jax.tree.map(bits, (y, store))
    state, y, starts, store = steps.over_chunks(chunk, (state, y, starts, store))
    y, store = jax.tree.map(lambda v: floats(v, layer.dtype), (y, store))
    state = tuple(v.astype(layer.dtype) for v in state)
    return y, state, Saved(layer, y, starts, *(store or (None, None)))


def backward(cell: Cell, saved: Saved, dy: Array, dstate: tuple, **settings) -> Layer:
    """The cotangents of the arguments, from those of y and of the last state."""
    layer = saved.layer
    steps = Steps.of(layer.x, **settings)
    dtype, (w, u) = layer.dtype, (layer.w, layer.u)
    wt, ut = w.T, u.T

    def chunk(carry, number, start, size):
        dstate, dx, dweights = carry
        valid = counted(layer.lengths, start, size)
        kept, before, after = _steps_of(cell, saved, steps, number, start, size)

        def step(dstate, now):
            kept, before, after, dy, valid = now
            arriving = (dstate[0] + masked(valid, wide(dy)), *dstate[1:])
            dz, dq, dbefore = cell.pull(kept, before, after, arriving)
            through = product((dz if dq is None else dq).astype(dtype), ut)
            dbefore = (dbefore[0] + through, *dbefore[1:])
            return select(valid, dbefore, dstate), masked(valid, (dz, dq))

        now = (kept, before, after, taken(dy, start, size, steps.axis), valid)
        dstate, (dz, dq) = jax.lax.scan(step, dstate, now, reverse=not steps.reverse)
        dz = dz.astype(dtype)
        dq = dz if dq is None else dq.astype(dtype)
        dx = put(dx, jnp.moveaxis(product(dz, wt), 0, steps.axis), start, steps.axis)
        xs, h = taken(layer.x, start, size, steps.axis), before[0].astype(dtype)
        sums = (_weight(xs, dz), _weight(h, dq), _bias(layer.b, dz), _bias(layer.c, dq))
        return dstate, dx, jax.tree.map(jnp.add, dweights, sums)

    def zeros(v):
        return loop_zeros(v.shape, (saved, dy, dstate))

    init = (
        tuple(zeros(v) + v for v in dstate),
        bits(zeros(layer.x).astype(layer.x.dtype)),
        jax.tree.map(zeros, (w, u, layer.b, layer.c)),
    )
    dstate, dx, dweights = steps.over_chunks(chunk, init, backward=True)
    dx, (dw, du, db, dc) = floats(dx, layer.x.dtype), dweights
    return Layer(dx, dw, du, db, dc, None if layer.state is None else dstate, None)


def _steps_of(cell: Cell, saved: Saved, steps: Steps, number: Any, start: Any, size: int) -> tuple:
    """(kept, the states before, those after) of each step of a chunk: stored, or made again."""
    layer = saved.layer
    first = tuple(jax.lax.dynamic_index_in_dim(v, number, 0, False) for v in saved.starts)
    if saved.kept is None:
        _, (kept, after) = run(cell, layer, steps, first, start, size)
    else:
        # A step that does not count leaves the state as it was, but its output is 0.
        h = wide(taken(saved.y, start, size, steps.axis))
        h = select(counted(layer.lengths, start, size), h, jnp.broadcast_to(first[0], h.shape))
        stored = saved.kept, saved.states
        kept, rest = jax.tree.map(lambda v: wide(taken(v, start, size)), stored)
        after = (h, *rest)
    return kept, jax.tree.map(steps.before, first, after), after


def _weight(x: Array, dz: Array) -> Array:
    # A product whose left operand is stored transposed is slower than copy and product on CPU.
    return product(jax.lax.optimization_barrier(rows(x).T), rows(dz))


def _bias(b: Array | None, dz: Array) -> Array | None:
    return None if b is None else jnp.sum(rows(wide(dz)), axis=0)
