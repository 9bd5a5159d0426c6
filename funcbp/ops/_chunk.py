"""Some steps of a loop: their forward pass, and their backward pass out of what that stored."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcbp.core import fit
from funcbp.jaxprs import variable
from funcbp.ops._body import inexact, run
from funcbp.ops._buffers import scan
from funcbp.ops._loop import Loop, zeros
from funcbp.ops._products import of_constant, of_operand, reduced

__all__ = ["Steps", "backward", "constants_of", "forward", "steady_of", "totals_of"]


class Steps(NamedTuple):
    """Some steps: how many, backwards or not, and so many in one turn of the loop."""

    length: int
    reverse: bool
    unroll: int | bool

    def of(self, length: int) -> "Steps":
        """So many steps, run in the same way."""
        return self._replace(length=length)

    def scan(self, step: Any, carry: Any, xs: Any, back: bool = False) -> Any:
        return scan(step, carry, xs, self.length, self.reverse != back, self.unroll)


def constants_of(loop: Loop, given: Sequence) -> list:
    """The loop constants that a step takes."""
    body = loop.body
    env = {**body.held, **_named(body.given, given)}
    return run(body.outside, env, body.constants)


def steady_of(loop: Loop, constants: list) -> dict:
    """All that a step and its reverse rule take that is the same at each step, by variable."""
    env = {**loop.held, **_named(loop.constants, constants)}
    return _named(loop.steady, run(loop.once, env, loop.steady))


def totals_of(constants: list) -> list:
    """Zeros for the cotangents of the constants, in float32 or wider; None if there is none."""
    return [_wider(jnp.zeros_like(c)) if inexact(c) else None for c in constants]


def forward(
    loop: Loop, steady: dict, carry: list, xs: list, steps: Steps, store: bool
) -> tuple[list, list, list]:
    """The carry after these steps, ys, and what is stored."""
    y = {v: i for i, v in enumerate(loop.y) if variable(v)}
    extra = [v for v in loop.stored if v not in y] if store else []

    def step(carry, x):
        env = steady | _named(loop.carry, carry) | _named(loop.x, x)
        out = run(loop.forward, env, (*loop.new, *loop.y, *extra))
        return out[: len(carry)], out[len(carry) :]

    carry, out = steps.scan(step, carry, xs)
    ys, rest = out[: len(loop.y)], iter(out[len(loop.y) :])
    return carry, ys, [ys[y[v]] if v in y else next(rest) for v in loop.stored if store]


def backward(
    loop: Loop,
    constants: list,
    steady: dict,
    start: list,
    xs: list,
    stored: list,
    dnew: list,
    dys: list,
    totals: list,
    steps: Steps,
) -> tuple[list, list, list]:
    """The cotangents of the carry and xs, floating leaves alone, and `totals` with more added.

    None among those of xs is 0.
    """
    kept = _named(loop.stored, stored)
    for v, place, new in loop.shifted:
        kept[v] = _shifted(start[place], kept[new], steps.reverse)
    kept = {v: kept[v] for v in loop.kept}
    dx = [v for v in loop.dx if v is not None]
    shifts = loop.shifts

    def step(state, at):
        (dnew, sums), (x, kept, dy) = state, at
        env = steady | _named(loop.x, x) | _named(loop.kept, kept)
        env |= _named(loop.dnew, dnew) | _named(loop.dy, dy)
        run((*loop.again, *loop.backward), env, ())
        dcarry = [
            jnp.zeros_like(d) if v is None else run((), env, [v])[0]
            for v, d in zip(loop.dcarry, dnew, strict=True)
        ]
        sums = [s + env[v].astype(s.dtype) for s, (_, v, _) in zip(sums, loop.sums, strict=True)]
        return (dcarry, sums), run((), env, (*dx, *shifts))

    sums = [_wider(zeros(v.aval)) for _, v, _ in loop.sums]
    (dcarry, sums), out = steps.scan(step, (dnew, sums), (xs, [*kept.values()], dys), back=True)
    stacks = _named(shifts, out[len(dx) :])
    rest = iter(out)
    dxs: list[Any] = [None if v is None else next(rest) for v in loop.dx]
    totals = list(totals)

    def add(place, d):
        totals[place] += fit(d, jax.typeof(totals[place]))

    for d, (place, _, sign) in zip(sums, loop.sums, strict=True):
        add(place, sign * reduced(d, constants[place]))
    for o, operand in zip(loop.outside, _operands(loop, steady, kept, xs), strict=True):
        place, d = o.cut.constant, stacks[o.shift]
        add(place, of_constant(o.cut, operand, d, constants[place]))
        if o.cut.x is not None:
            i = _floating_place(loop.x, o.cut.x)
            dx = fit(of_operand(o.cut, constants[place], d, xs[o.cut.x]), jax.typeof(xs[o.cut.x]))
            dxs[i] = dx if (other := dxs[i]) is None else dx + other
    return dcarry, dxs, totals


def _floating_place(atoms: Sequence, i: int) -> int:
    """The place of an atom among the floating ones."""
    return sum(inexact(a) for a in atoms[:i])


def _operands(loop: Loop, steady: dict, kept: dict, xs: list) -> list:
    """The other operands of what is taken out of the loop, stacked; None for a sum."""
    wanted = [o.operand for o in loop.outside if o.cut.product]

    def operands(kept, xs):
        env = steady | _named(loop.x, xs) | _named(loop.kept, kept)
        return run(loop.operands, env, wanted)

    found = iter(jax.vmap(operands)([*kept.values()], xs) if wanted else ())
    return [next(found) if o.cut.product else None for o in loop.outside]


def _wider(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shifted(first: Array, nexts: Array, reverse: bool) -> Array:
    """What each step began with, from what it ended with."""
    if not len(nexts):
        return nexts
    both = (nexts[1:], first[None]) if reverse else (first[None], nexts[:-1])
    return jnp.concatenate(both)


def _named(variables: Sequence, values: Sequence) -> dict:
    return dict(zip(variables, values, strict=True))
