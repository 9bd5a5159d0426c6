"""The body of a loop taken apart: what is constant, and the products with constants.

A product of a changing operand and a loop constant gets a zero, z, added to its result, and its
constant no gradient of its own: that is the product of the cotangents of z, stacked over the steps,
with the other operand, stacked. A sum of a changing operand and a constant likewise: its constant's
gradient is the sum of those cotangents.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from funcbp.closed import Program
from funcbp.jaxprs import bind, opened, variable

__all__ = [
    "Body",
    "Cut",
    "body_of",
    "dependent",
    "effectful",
    "inexact",
    "inlined",
    "parts",
    "run",
    "step",
]

PRODUCTS, SUMS = ("dot_general", "conv_general_dilated"), ("add", "add_any", "sub")


class Cut(NamedTuple):
    """An equation whose constant operand gets its gradient outside of the loop.

    Attributes:
      eqn: a product or a sum.
      side: which of its operands is the constant.
      constant: the place of that operand among the body's constants.
      x: the place of the other operand among the leaves of x, if it is one: then its gradient from
        this product is taken outside too.
    """

    eqn: Any
    side: int
    constant: int
    x: int | None

    @property
    def product(self) -> bool:
        return self.eqn.primitive.name in PRODUCTS

    def __str__(self) -> str:
        shapes = [list(a.aval.shape) for a in (self.other, self.eqn.invars[self.side])]
        return "{} {} with {}".format(self.eqn.primitive.name, *shapes)

    @property
    def sign(self) -> int:
        """Of the constant in a sum."""
        return -1 if self.eqn.primitive.name == "sub" and self.side == 1 else 1

    @property
    def other(self) -> Any:
        return self.eqn.invars[1 - self.side]


class Body(NamedTuple):
    """A body with its inner calls opened: equations, and variables.

    Attributes:
      held: values that the trace itself made, by variable.
      outside, inside: the equations that make the constants, and those of a step.
      given: the captured arrays, and then the carries that never change.
      still: the places of these among the carries.
      constants: what a step takes that is the same at each step.
      carry, x: the carries that change, and the leaves of x.
      new, y: what a step gives: the carries that change, and the leaves of y.
      cuts: what may be taken out of the loop.
    """

    held: dict
    outside: list
    inside: list
    given: list
    still: list
    constants: list
    carry: list
    x: list
    new: list
    y: list
    cuts: list


def inexact(leaf: Any) -> bool:
    """Whether an array, or an atom of a jaxpr, has a derivative."""
    return jnp.issubdtype(getattr(leaf, "aval", leaf).dtype, jnp.inexact)


def effectful(eqn: Any) -> bool:
    """Whether it does more than give results; to name a mesh axis is no deed."""
    return any(type(e).__name__ != "NamedAxisEffect" for e in eqn.effects)


def parts(values: Sequence, like: Iterable[Sequence]) -> list[list]:
    """Values in groups as long as these."""
    rest = iter(values)
    return [[next(rest) for _ in group] for group in like]


def run(eqns: Iterable, env: dict, wanted: Sequence) -> list:
    """Evaluates equations into `env`, and gives the values of these variables or literals."""

    def read(atom):
        return env[atom] if variable(atom) else atom.val

    for eqn in eqns:
        with eqn.ctx.manager:
            results = bind(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in wanted]


def dependent(eqns: Iterable, start: Iterable) -> set:
    """The variables that depend on these."""
    found = set(start)
    for eqn in eqns:
        if any(variable(a) and a in found for a in eqn.invars):
            found.update(eqn.outvars)
    return found


def inlined(jaxpr: Any) -> ClosedJaxpr:
    """The function of captured arrays and arguments, with its inner calls of `jax.jit` opened."""

    def evaluate(jaxpr, *args):
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
        for eqn in jaxpr.eqns:
            inner = _opened_call(eqn)
            if inner is None:
                run([eqn], env, ())
            else:
                operands = run((), env, eqn.invars)
                results = evaluate(opened(inner), *getattr(inner, "consts", ()), *operands)
                env.update(zip(eqn.outvars, results, strict=True))
        return run((), env, jaxpr.outvars)

    avals = [v.aval for v in (*jaxpr.constvars, *jaxpr.invars)]
    return jax.make_jaxpr(functools.partial(evaluate, jaxpr))(*avals)


def _opened_call(eqn: Any) -> Any:
    """The jaxpr of a call of `jax.jit` that says nothing about shardings."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    told = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    free = all(type(s).__name__ == "UnspecifiedValue" for s in told)
    return eqn.params["jaxpr"] if free else None


def body_of(program: Program) -> Body:
    """Takes the body `(carry, x) -> (carry, y)` of a loop apart."""
    closed = inlined(program.jaxpr)
    jaxpr = closed.jaxpr
    carries = [()] * program.arguments.children()[0].num_leaves
    captured, carry, x = parts(
        jaxpr.invars,
        (program.jaxpr.constvars, carries, program.jaxpr.invars[len(carries) :]),
    )
    new, y = jaxpr.outvars[: len(carry)], jaxpr.outvars[len(carry) :]
    still = [i for i, (a, b) in enumerate(zip(carry, new, strict=True)) if a is b]
    given = captured + [carry[i] for i in still]
    carry, new = ([a for i, a in enumerate(p) if i not in still] for p in (carry, new))
    changing = dependent(jaxpr.eqns, [*carry, *x])
    deeds = [e for e in jaxpr.eqns if effectful(e)]
    changing |= dependent(jaxpr.eqns, [v for e in deeds for v in e.outvars])
    inside = [e for e in jaxpr.eqns if e in deeds or not changing.isdisjoint(e.outvars)]
    outside = [e for e in jaxpr.eqns if e not in deeds and changing.isdisjoint(e.outvars)]
    used = [*(a for e in inside for a in e.invars), *new, *y]
    constants = [a for a in dict.fromkeys(filter(variable, used)) if a not in changing]
    learned = dependent(outside, filter(inexact, given))
    held = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    body = Body(held, outside, inside, given, still, constants, carry, x, new, y, [])
    return body._replace(cuts=list(_cuts(body, learned)))


def _cuts(body: Body, learned: set) -> Iterator[Cut]:
    """Products and sums of a changing operand and a constant with a gradient."""
    places = {a: i for i, a in enumerate(body.constants)}
    leaves = {a: i for i, a in enumerate(body.x)}
    for eqn in body.inside:
        if eqn.primitive.name not in (*PRODUCTS, *SUMS) or not inexact(eqn.outvars[0]):
            continue
        fixed = [not variable(a) or a in places for a in eqn.invars]
        if sum(fixed) != 1:
            continue
        side = fixed.index(True)
        constant, other = eqn.invars[side], eqn.invars[1 - side]
        if not variable(constant) or constant not in learned:
            continue
        cut = Cut(eqn, side, places[constant], leaves.get(other))
        if cut.product:
            yield cut
        elif constant.aval.ndim == eqn.outvars[0].aval.ndim:
            yield cut._replace(x=None)


@jax.custom_jvp
def _shifted(y, z):
    """y + z for a z that is 0."""
    return y


@_shifted.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] + tangents[1]


def step(body: Body, constants: list, carry: list, x: list, shifts: list) -> tuple[list, list]:
    """What a step gives, and the operands of the products that may be taken out.

    The constants of cuts have no gradient through them; instead their results are shifted.
    """
    env = dict(body.held)
    env.update(zip((*body.constants, *body.carry, *body.x), (*constants, *carry, *x), strict=True))
    cuts = {id(c.eqn): (c, z) for c, z in zip(body.cuts, shifts, strict=True)}
    for eqn in body.inside:
        if id(eqn) not in cuts:
            run([eqn], env, ())
            continue
        cut, z = cuts[id(eqn)]
        operands = [
            jax.lax.stop_gradient(v) if i == cut.side or cut.x is not None else v
            for i, v in enumerate(run((), env, eqn.invars))
        ]
        with eqn.ctx.manager:
            env[eqn.outvars[0]] = _shifted(*bind(eqn, operands), z)
    others = [c.other for c in body.cuts if c.product]
    return run((), env, (*body.new, *body.y)), run((), env, others)
