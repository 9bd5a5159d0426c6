"""A step of a loop together with its reverse rule, and what has to be kept between the two.

JAX derives the reverse rule of a step; both are read as one program, whose equations are sorted:
those of loop constants alone run once, outside; those of the forward pass at each step; those that
depend on a cotangent at each step of the backward pass. Kept is a smallest set of values from which
the backward pass has the rest by cheap arithmetic.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbp.closed import Program
from funcbp.jaxprs import variable
from funcbp.mesh import vary, varying
from funcbp.ops import _cut
from funcbp.ops._body import (
    Body,
    Cut,
    body_of,
    dependent,
    effectful,
    inexact,
    inlined,
    parts,
    step,
)

__all__ = ["Loop", "Outside", "loop_of", "zeros"]

# What is cheap to compute again: arithmetic and layout, without exponentials, sums and products.
CHEAP = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate", "conj",
    "convert_element_type", "copy", "copy_p", "div", "eq", "expand_dims", "ge", "gt", "imag",
    "integer_pow", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or",
    "pad", "pvary", "real", "reshape", "rev", "select_n", "sign", "slice", "split", "square",
    "squeeze", "sub", "transpose", "xor",
}  # fmt: skip


class Outside(NamedTuple):
    """A cut in the program of a step: variables of the other operand and of z's cotangent."""

    cut: Cut
    operand: Any
    shift: Any


class Loop(NamedTuple):
    """A step and its reverse rule: variables, and the equations of each part.

    Attributes:
      body: the step before its reverse rule was derived.
      held: values that the trace itself made, by variable.
      constants, carry, x: what a step takes.
      new, y: what it gives.
      dnew, dy: the cotangents that the reverse rule takes, of floating values alone.
      dcarry, dx: those that it gives, of floating values alone; None is 0.
      sums: (place of a constant, variable, sign) whose sum over the steps is its cotangent.
      outside: what is taken out of the loop.
      once: the equations of `steady`, values that every step takes.
      kept: what the backward pass takes of each step.
      stored: of that, and of y and the new carry, what is stacked.
      shifted: carries that are kept as what the step before them gave: variable, place, variable
        of the new carry, which is stored.
      forward, again, backward: equations of a step; `again` makes the rest out of what is kept.
      operands: equations that make the operands of what is taken out, out of what is kept.
    """

    body: Body
    held: dict
    constants: list
    carry: list
    x: list
    new: list
    y: list
    dnew: list
    dy: list
    dcarry: list
    dx: list
    sums: list
    outside: list
    once: list
    steady: list
    kept: list
    stored: list
    shifted: list
    forward: list
    again: list
    backward: list
    operands: list

    @property
    def shifts(self) -> list:
        """The cotangents to be stacked, each once."""
        return list(dict.fromkeys(o.shift for o in self.outside))

    @property
    def gains(self) -> bool:
        return any(o.cut.product for o in self.outside)


@functools.lru_cache(maxsize=512)
def loop_of(program: Program) -> Loop:
    """Analyses the body `(carry, x) -> (carry, y)` of a loop."""
    body = body_of(program)
    joint = _joint(body)
    closed = inlined(joint.jaxpr)
    jaxpr, count = closed.jaxpr, len(joint.consts)
    held = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    held.update(zip(jaxpr.invars, joint.consts, strict=False))
    constants, carry, x, dnew, dy = parts(
        jaxpr.invars[count:],
        (body.constants, body.carry, body.x, *(_floating(p) for p in (body.new, body.y))),
    )
    places = [i for i, v in enumerate(constants) if inexact(v)]
    new, y, operands, *cotangents = parts(
        jaxpr.outvars,
        (body.new, body.y, [c for c in body.cuts if c.product],
         places, _floating(carry), _floating(x), body.cuts),
    )  # fmt: skip
    late = dependent(jaxpr.eqns, [*dnew, *dy])
    # A cotangent that depends on none is 0.
    dconstants, dcarry, dx, shifts = (
        [a if variable(a) and a in late else None for a in part] for part in cotangents
    )
    sums = [(i, d, 1) for i, d in zip(places, dconstants, strict=True)]
    outside = []
    rest = iter(operands)
    stacked = {z for c, z in zip(body.cuts, shifts, strict=True) if c.product}
    for cut, z in zip(body.cuts, shifts, strict=True):
        operand = next(rest) if cut.product else None
        if z in stacked:
            outside.append(Outside(cut, operand, z))
        else:
            sums.append((cut.constant, z, cut.sign))
    sums = [s for s in sums if s[1] is not None]
    outside = [o for o in outside if o.shift is not None]
    loop = Loop(body, held, constants, carry, x, new, y, dnew, dy, dcarry, dx, sums, outside,
                [], [], [], [], [], [], [], [], [])  # fmt: skip
    return _sorted(loop, jaxpr.eqns, late)


def _floating(atoms: Iterable) -> list:
    return [a for a in atoms if inexact(a)]


def _joint(body: Body) -> Any:
    """The jaxpr of a step with its reverse rule.

    It takes constants, carry, x, and the cotangents of the floating leaves of the new carry and y;
    it gives the new carry, y, the operands of the products taken out, and the cotangents of the
    floating leaves of constants, carry and x, and of the shifts.
    """
    groups = (body.constants, body.carry, body.x)
    values = [v for group in groups for v in group]
    results = _floating((*body.new, *body.y))

    def joint(*args):
        given, cotangents = parts(args, (values, results))

        def forward(floating, shifts):
            rest = iter(floating)
            args = [next(rest) if inexact(v) else v for v in given]
            constants, carry, x = parts(args, groups)
            out, others = step(body, constants, carry, x, shifts)
            return [v for v in out if inexact(v)], (out, others)

        shifts = [zeros(c.eqn.outvars[0].aval) for c in body.cuts]
        pulled = jax.vjp(forward, [v for v in given if inexact(v)], shifts, has_aux=True)
        _, pullback, (out, others) = pulled
        floating, shifts = pullback(cotangents)
        return *out, *others, *floating, *shifts

    return jax.make_jaxpr(joint)(*[v.aval for v in (*values, *results)])


def zeros(aval: Any) -> jax.Array:
    """Zeros of this type, varying over the mesh axes that it does."""
    return vary(jnp.zeros(aval.shape, aval.dtype), varying(aval))


def _sorted(loop: Loop, eqns: Sequence, late: set) -> Loop:
    """The loop with its equations in their places."""
    moving = dependent(eqns, [*loop.carry, *loop.x])
    deeds = [e for e in eqns if effectful(e) and late.isdisjoint(e.outvars)]
    moving |= dependent(eqns, [v for e in deeds for v in e.outvars])
    moving -= late
    backward = [e for e in eqns if not late.isdisjoint(e.outvars)]
    forward = [e for e in eqns if e in deeds or not moving.isdisjoint(e.outvars)]
    once = [e for e in eqns if e not in deeds and (late | moving).isdisjoint(e.outvars)]
    results = [*loop.dcarry, *loop.dx, *(d for _, d, _ in loop.sums), *loop.shifts]
    results = [a for a in results if a is not None]
    backward = _needed(backward, results, {*loop.dnew, *loop.dy})
    taken = [*(a for e in backward for a in e.invars), *results]
    taken = [a for a in dict.fromkeys(filter(variable, taken)) if a in moving]
    operands = [o.operand for o in loop.outside if o.cut.product]
    kept = _kept(loop, forward, moving, [*taken, *operands])
    stored, shifted = _stored(loop, kept)
    known = {*kept, *loop.x}
    loop = loop._replace(
        kept=kept,
        stored=stored,
        shifted=shifted,
        forward=_needed(forward, [*loop.new, *loop.y, *stored], set(), deeds),
        again=_needed(forward, taken, known),
        backward=backward,
        operands=_needed(forward, operands, known),
    )
    steps = (*loop.forward, *loop.again, *loop.backward, *loop.operands)
    used = [*(a for e in steps for a in e.invars), *loop.new, *loop.y, *results]
    fixed = {*loop.constants, *loop.held, *(v for e in once for v in e.outvars)}
    steady = [a for a in dict.fromkeys(filter(variable, used)) if a in fixed]
    return loop._replace(steady=steady, once=_needed(once, steady, set()))


def _needed(eqns: Sequence, wanted: Iterable, known: set, always: Sequence = ()) -> list:
    """The equations that give what is wanted from what is known."""
    missing = {a for a in wanted if variable(a)} - known
    taken = []
    for eqn in reversed(eqns):
        if eqn in always or not missing.isdisjoint(eqn.outvars):
            taken.append(eqn)
            missing |= {a for a in eqn.invars if variable(a)} - known
    return taken[::-1]


def _kept(loop: Loop, forward: Sequence, moving: set, wanted: Sequence) -> list:
    """What to keep of each step, so that the rest of what is wanted is cheap."""
    here = [*loop.carry, *(v for e in forward for v in e.outvars)]
    y = set(filter(variable, loop.y))  # kept by whoever called
    costs = {v: 0 if v in y else _bytes(v.aval) for v in here if v in moving}
    parents = {
        v: [a for a in e.invars if variable(a)]
        for e in forward
        if e.primitive.name in CHEAP and not effectful(e)
        for v in e.outvars
    }
    return _cut.smallest(costs, parents, wanted)


def _stored(loop: Loop, kept: list) -> tuple[list, list]:
    """What to stack, and the carries that the next carry gives, which is stacked anyway."""
    anyway = {*kept, *filter(variable, loop.y)}
    shifted = [
        (v, i, new)
        for i, (v, new) in enumerate(zip(loop.carry, loop.new, strict=True))
        if v in kept and v not in loop.y and variable(new) and new in anyway
    ]
    through = {v: new for v, _, new in shifted}
    return list(dict.fromkeys(through.get(v, v) for v in kept)), shifted


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
