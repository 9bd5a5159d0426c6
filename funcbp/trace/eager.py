"""Runs a program equation by equation, and keeps where each NaN and infinity was born.

A value that is not finite carries its origin. It is passed on to what is computed from the value,
and gone once a result is finite. Loops and branches run whole, and again step by step only where
something was born inside.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from funcbp.jaxprs import CALLS, SILENT, bind, opened, programs, scanned, variable

__all__ = ["Frame", "Origin", "Run", "Step", "Trouble", "Value", "trouble_of"]

LOOPS = ("scan", "while", "cond")
# Where these make an infinity, it is at the same place of each operand.
ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "rem", "pow", "integer_pow", "square", "sqrt", "cbrt"),
    *("rsqrt", "exp", "exp2", "expm1", "log", "log1p", "sinh", "cosh", "tan", "max", "min"),
    *("convert_element_type",),
}


class Trouble(enum.IntEnum):
    """The worst that an array holds."""

    NONE, INFINITY, NAN = range(3)


class Frame(NamedTuple):
    """A jaxpr that runs, and the equations that it is inside of, outermost first."""

    jaxpr: Any
    path: tuple[Any, ...]
    outer: "Frame | None"
    atoms: dict[Any, Any]  # the outer frame's atom for each variable that comes in

    @classmethod
    def of(cls, jaxpr: Any, path: tuple = (), outer: "Frame | None" = None, atoms=()) -> "Frame":
        return cls(jaxpr, path, outer, dict(zip(jaxpr.invars, atoms, strict=False)))

    def maker(self, atom: Any) -> "tuple[Frame, Any] | None":
        """The equation that made a value, inside of calls and loops too, and its frame."""
        if isinstance(atom, Literal):
            return None
        if atom in self.atoms:
            return self.outer.maker(self.atoms[atom]) if self.outer else None
        for eqn in self.jaxpr.eqns:
            if atom in eqn.outvars:
                inner = _inner(eqn)
                if inner is None:
                    return self, eqn
                frame = Frame.of(inner, (*self.path, eqn), self, eqn.invars)
                return frame.maker(inner.outvars[eqn.outvars.index(atom)])
        return None


class Step(NamedTuple):
    """An equation as it ran; `result` is the one that is not finite."""

    number: int
    frame: Frame
    eqn: Any
    operands: tuple[Any, ...]
    result: Any

    @property
    def path(self) -> tuple[Any, ...]:
        """The equation, after those that it is inside of."""
        return (*self.frame.path, self.eqn)


class Origin(NamedTuple):
    """Where a NaN or an infinity came from.

    Attributes:
        kind: "event" for an operation that made it; "argument" or "constant", if none did.
        step: that operation; else the first that read it, if any.
        name: of the argument.
        turned: the first step that made a NaN of an infinity.
    """

    kind: str
    step: Step | None = None
    name: str = ""
    turned: Step | None = None

    @property
    def number(self) -> int:
        """Its place in the order of the program."""
        return self.step.number if self.kind == "event" and self.step else -1


class Value(NamedTuple):
    """An array and, if it is not finite, why."""

    array: Any
    trouble: Trouble = Trouble.NONE
    origin: Origin | None = None

    @classmethod
    def of(cls, array: Any, origin: Origin | None) -> "Value":
        """The value with its origin, which only one that is not finite keeps."""
        trouble = trouble_of(array)
        return cls(array, trouble, origin if trouble else None)


def trouble_of(array: Any) -> Trouble:
    """Whether it is finite; integers, booleans and keys are."""
    if array is None or not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
        return Trouble.NONE
    numbers = np.asarray(array)
    if np.isfinite(numbers).all():
        return Trouble.NONE
    return Trouble.NAN if np.isnan(numbers).any() else Trouble.INFINITY


class Run:
    """One run of a program.

    Attributes:
        dropped: the numbers of the steps whose NaN or infinity a select did not take.
    """

    def __init__(self):
        self.dropped: set[int] = set()
        self._number = 0
        self._compiled = functools.cache(lambda body: jax.jit(jaxpr_as_fun(body)))

    def __call__(self, closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        """The program's results."""
        return self._run(Frame.of(closed.jaxpr), closed.consts, arguments)

    def _run(self, frame: Frame, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        jaxpr = frame.jaxpr
        constants = [Value.of(c, Origin("constant")) for c in consts]
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))
        last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if variable(v)}
        keep = {v for v in jaxpr.outvars if variable(v)}

        def read(atom):
            return Value.of(atom.val, Origin("constant")) if not variable(atom) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            results = self._equation(frame, eqn, [read(v) for v in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
            for v in eqn.invars:  # a value is let go after its last use
                if variable(v) and last[v] == i and v not in keep:
                    values.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, frame: Frame, eqn: Any, operands: list[Value]) -> list[Value]:
        self._number += 1
        name = eqn.primitive.name
        if name in SILENT:
            return [Value(None) for _ in eqn.outvars]
        if CALLS.get(name) in eqn.params:
            inner = eqn.params[CALLS[name]]
            jaxpr = opened(inner)
            call = Frame.of(jaxpr, (*frame.path, eqn), frame, eqn.invars)
            return self._run(call, getattr(inner, "consts", ()), operands)
        results = _bind(eqn, [v.array for v in operands])
        troubles = [trouble_of(r) for r in results]
        if name in LOOPS and _news(operands, troubles):
            inside = getattr(self, f"_{name}")(frame, eqn, operands)
        else:
            inside = [None for _ in results]
        if name == "select_n" and not any(troubles):
            self.dropped |= {v.origin.number for v in operands if v.origin}
        return [
            Value(r, t, origin or self._origin(frame, eqn, operands, r, t) if t else None)
            for r, t, origin in zip(results, troubles, inside, strict=True)
        ]

    def _origin(
        self, frame: Frame, eqn: Any, operands: Sequence[Value], result: Any, trouble: Trouble
    ) -> Origin:
        """Where a result that is not finite came from."""
        step = Step(self._number, frame, eqn, tuple(v.array for v in operands), result)
        worst = _worst(operands)
        if worst is None or worst.origin is None or _is_born(eqn, operands, worst, result, trouble):
            return Origin("event", step)
        origin = worst.origin
        if origin.step is None:
            origin = origin._replace(step=step)
        if trouble is Trouble.NAN and worst.trouble is not Trouble.NAN and not origin.turned:
            origin = origin._replace(turned=step)
        return origin

    def _body(self, frame: Frame, body: Any, inputs: Sequence[Value]) -> list[Value]:
        """One step of a loop, or a branch: compiled, and equation by equation if it goes bad."""
        results = self._compiled(body)(*(v.array for v in inputs))
        troubles = [trouble_of(r) for r in results]
        if any(troubles) and _news(inputs, troubles):
            return self._run(frame, body.consts, inputs)
        worst = _worst(inputs)
        origin = worst.origin if worst else None
        return [Value(r, t, origin if t else None) for r, t in zip(results, troubles, strict=True)]

    def _scan(self, frame: Frame, eqn: Any, operands: list[Value]) -> list[Origin | None]:
        params, body = eqn.params, _closed(eqn.params["jaxpr"])
        consts, carries = scanned(params)
        fixed, carry = operands[:consts], operands[consts : consts + carries]
        xs = operands[consts + carries :]
        inner = Frame.of(opened(body), (*frame.path, eqn), frame, eqn.invars)
        origins: list[Origin | None] = [None] * (len(eqn.outvars) - carries)
        numbers = range(params["length"])
        for i in reversed(numbers) if params["reverse"] else numbers:
            out = self._body(inner, body, [*fixed, *carry, *(_row(x, i) for x in xs)])
            carry = out[:carries]
            origins = [o or v.origin for o, v in zip(origins, out[carries:], strict=True)]
        return [*(v.origin for v in carry), *origins]

    def _while(self, frame: Frame, eqn: Any, operands: list[Value]) -> list[Origin | None]:
        params, body = eqn.params, _closed(eqn.params["body_jaxpr"])
        n, m = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed, carry = operands[:n], operands[n : n + m], operands[n + m :]
        inner = Frame.of(opened(body), (*frame.path, eqn), frame, eqn.invars[n:])
        test = self._compiled(_closed(params["cond_jaxpr"]))
        while True:
            on = np.asarray(test(*(v.array for v in (*tested, *carry)))[0])
            if not on.any():
                return [v.origin for v in carry]
            new = self._body(inner, body, [*fixed, *carry])
            carry = [_chosen(on, a, b) for a, b in zip(new, carry, strict=True)]

    def _cond(self, frame: Frame, eqn: Any, operands: list[Value]) -> list[Origin | None]:
        branches = eqn.params["branches"]
        taken = int(np.clip(np.asarray(operands[0].array), 0, len(branches) - 1))
        body = _closed(branches[taken])
        inner = Frame.of(opened(body), (*frame.path, eqn), frame, eqn.invars[1:])
        return [v.origin for v in self._body(inner, body, operands[1:])]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def _inner(eqn: Any) -> Any:
    """The jaxpr whose variables are one for one those of a call, or of a scan."""
    name = eqn.primitive.name
    key = "jaxpr" if name == "scan" else CALLS.get(name)
    return opened(eqn.params[key]) if key in eqn.params else None


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    def run(*operands):
        return bind(eqn, operands)

    # What holds a program of its own runs compiled, as it does for its user.
    return (jax.jit(run) if any(programs(eqn.params.values())) else run)(*operands)


def _worst(operands: Sequence[Value]) -> Value | None:
    """The operand that a bad result is bad by: a NaN first, one that an operation made first."""
    bad = [v for v in operands if v.trouble]
    return max(bad, key=lambda v: (v.trouble, _made(v)), default=None)


def _made(value: Value) -> bool:
    return value.origin is not None and value.origin.kind == "event"


def _news(operands: Sequence[Value], troubles: Sequence[Trouble]) -> bool:
    """Whether something may have been born: a NaN of none, an infinity of those that were given."""
    worst = _worst(operands)
    before = worst.trouble if worst else Trouble.NONE
    given = worst is None or not _made(worst) and before is Trouble.INFINITY
    return max(troubles, default=Trouble.NONE) > before or given and any(troubles)


def _is_born(
    eqn: Any, operands: Sequence[Value], worst: Value, result: Any, trouble: Trouble
) -> bool:
    """Whether this equation made it, although there is a bad operand."""
    if _made(worst) or worst.trouble is Trouble.NAN:
        return False
    if trouble is Trouble.NAN:
        return True
    shape = np.shape(result)
    if eqn.primitive.name not in ELEMENTWISE:
        return False
    of_finite = np.isinf(np.asarray(result))
    for v in operands:
        if np.shape(v.array) in (shape, ()):
            of_finite = of_finite & np.isfinite(np.asarray(v.array))
    return bool(of_finite.any())


def _row(x: Value, i: int) -> Value:
    row = jax.lax.dynamic_index_in_dim(x.array, i, keepdims=False)
    return Value.of(row, x.origin) if x.trouble else Value(row)


def _chosen(on: np.ndarray, new: Value, old: Value) -> Value:
    """Under vmap each entry of the batch goes on for as long as its own test holds."""
    if on.all():
        return new
    mask = on.reshape(on.shape + (1,) * (np.ndim(new.array) - on.ndim))
    array = jnp.where(mask, new.array, old.array)
    return Value.of(array, new.origin or old.origin)
