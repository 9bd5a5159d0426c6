"""One call of a loop: its arrays in their places, its steps all at once or in chunks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcbp.closed import Closed, Program
from funcbp.mesh import vary, varying
from funcbp.ops import _chunk
from funcbp.ops._body import inexact
from funcbp.ops._buffers import scan
from funcbp.ops._chunk import Steps
from funcbp.ops._loop import loop_of

__all__ = ["Called", "Chunks", "carried", "keeps_its_type", "lasting"]


def lasting(f: Any, init: Any, x: Any) -> Any:
    """The types of a carry that begins as init, once they do not change any more.

    What f gives makes a weak type strong, and lets more mesh axes vary.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for _ in range(2):
        leaves, tree = jax.tree.flatten(init)
        if not manual and not any(getattr(a, "weak_type", False) for a in leaves):
            break
        program = Closed.of(f, init, x).program
        if not _same_trees(program):
            break
        new = [v.aval for v in program.jaxpr.outvars]
        init = jax.tree.unflatten(tree, [_joined(a, b) for a, b in zip(leaves, new, strict=False)])
    return init


def _joined(a: Any, new: Any) -> Any:
    """The type of a carry that begins as `a`, where f gives `new`."""
    if getattr(a, "weak_type", False):
        a = a.update(dtype=jnp.promote_types(a.dtype, new.dtype), weak_type=False)
    if a.shape != new.shape or not varying(new) > varying(a):
        return a
    return a.update(sharding=new.sharding, manual_axis_type=new.manual_axis_type)


def _same_trees(program: Program) -> bool:
    """Whether f gives a pair, and the carry in it has the tree of the carry that it takes."""
    given = program.results.children()
    return len(given) == 2 and given[0] == program.arguments.children()[0]


def keeps_its_type(program: Program) -> bool:
    """Whether f gives a carry of the type that it takes."""
    if not _same_trees(program):
        return False
    count = program.arguments.children()[0].num_leaves
    pairs = zip(program.jaxpr.invars[:count], program.jaxpr.outvars, strict=False)
    return all(_kind(a.aval) == _kind(b.aval) for a, b in pairs)


def _kind(aval: Any) -> tuple:
    return aval.shape, aval.dtype, aval.manual_axis_type


def carried(f: Closed, init: Any) -> Any:
    """init in the types of the carry on which f was traced."""
    leaves, tree = jax.tree.flatten(init)
    avals = [v.aval for v in f.program.jaxpr.invars]
    return jax.tree.unflatten(tree, [_cast(v, a) for v, a in zip(leaves, avals, strict=False)])


def _cast(v: Array, aval: Any) -> Array:
    v = v if v.dtype == aval.dtype else v.astype(aval.dtype)
    return vary(v, varying(aval))


class Chunks(NamedTuple):
    """Steps in chunks of one size, and a shorter one, the last to run, if some are left over."""

    steps: Steps
    size: int

    @property
    def count(self) -> int:
        return self.steps.length // self.size

    @property
    def left(self) -> int:
        return self.steps.length % self.size

    def first(self, i: Any) -> Any:
        """Where chunk i starts; they are counted from the front."""
        return i * self.size + (self.left if self.steps.reverse else 0)

    @property
    def rest(self) -> int:
        """Where the steps left over start."""
        return 0 if self.steps.reverse else self.count * self.size

    def scan(self, step: Callable, state: Any, xs: Any, back: bool = False) -> Any:
        """`step(state, first, x)` over the chunks of full size."""

        def one(state, at):
            return step(state, *at)

        firsts = self.first(jnp.arange(self.count))
        return scan(one, state, (firsts, xs), reverse=self.steps.reverse != back)

    def joined(self, chunks: Any, rest: Any) -> Any:
        """Stacks of chunks and what the steps left over gave, as one."""

        def join(c, r):
            c = c.reshape(self.count * self.size, *c.shape[2:])
            return jnp.concatenate([r, c] if self.steps.reverse else [c, r])

        if not self.left:
            return jax.tree.map(lambda c: c.reshape(self.steps.length, *c.shape[2:]), chunks)
        return jax.tree.map(join, chunks, rest)


class Called:
    """A loop at its arrays.

    Attributes:
      loop: the analysis of f.
      given: the captured arrays, and the carries that never change.
      constants: what is made of these; `steady`: all that every step takes, by variable.
      start: the carries that change, where the loop begins.
      xs: leaves.
    """

    def __init__(self, f: Closed, init: Any, xs: Any):
        self.f, self.loop = f, loop_of(f.program)
        still = self.loop.body.still
        self.carry = jax.tree.leaves(carried(f, init))
        self.given = [*f.captured, *(self.carry[i] for i in still)]
        self.constants = _chunk.constants_of(self.loop, self.given)
        self.steady = _chunk.steady_of(self.loop, self.constants)
        self.start = [c for i, c in enumerate(self.carry) if i not in still]
        self.xs = jax.tree.leaves(xs)

    def forward(self, steps: Steps, size: int | None) -> tuple[Any, list]:
        """The value of the loop, and what is stored: of each step, or the carry of each chunk."""
        if size is None:
            new, ys, stored = self._steps(self.start, self.xs, steps, store=True)
            return self._value(new, ys), stored
        chunks = Chunks(steps, size)

        def chunk(carry, first, _):
            new, ys, _ = self._steps(carry, _part(self.xs, first, size), steps.of(size))
            return new, (carry, ys)

        new, (starts, ys) = chunks.scan(chunk, self.start, None)
        stored, rest = [starts, new], None
        if chunks.left:
            xs = _part(self.xs, chunks.rest, chunks.left)
            new, rest, _ = self._steps(new, xs, steps.of(chunks.left))
        return self._value(new, chunks.joined(ys, rest)), stored

    def _steps(self, carry, xs, steps, store=False):
        return _chunk.forward(self.loop, self.steady, carry, xs, steps, store)

    def _value(self, new: list, ys: list) -> Any:
        carry = list(self.carry)
        moving = iter(new)
        carry = [c if i in self.loop.body.still else next(moving) for i, c in enumerate(carry)]
        return jax.tree.unflatten(self.f.program.results, [*carry, *ys])

    def backward(self, stored: list, dy: Any, steps: Steps, size: int | None) -> tuple:
        """The cotangents of f, init and xs, from that of the value."""
        leaves, still = jax.tree.leaves(dy), self.loop.body.still
        carries, dys = leaves[: len(self.carry)], _floating(leaves[len(self.carry) :])
        dnew = _floating([d for i, d in enumerate(carries) if i not in still])
        totals = _chunk.totals_of(self.constants)
        if size is None:
            back = self._steps_back(self.start, self.xs, stored, dnew, dys, totals, steps)
        else:
            back = self._chunks_back(Chunks(steps, size), stored, dnew, dys, totals)
        dcarry, dxs, totals = back
        dcaptured, dstill = self._through_constants(totals)
        dstill = [None if d is None else d + carries[i] for i, d in zip(still, dstill, strict=True)]
        moving = [c for i, c in enumerate(self.carry) if i not in still]
        rest, others = iter(_spread(dcarry, moving)), iter(dstill)
        dinit = [next(others) if i in still else next(rest) for i in range(len(self.carry))]
        return dcaptured, dinit, _spread(dxs, self.xs)

    def _steps_back(self, start, xs, stored, dnew, dys, totals, steps):
        loop, fixed = self.loop, (self.constants, self.steady)
        return _chunk.backward(loop, *fixed, start, xs, stored, dnew, dys, totals, steps)

    def _chunks_back(self, chunks: Chunks, stored: list, dnew, dys, totals) -> tuple:
        steps, size = chunks.steps, chunks.size
        starts, last = stored

        def again(start, first, length, dnew, totals):
            xs, d = (_part(t, first, length) for t in (self.xs, dys))
            within = steps.of(length)
            _, _, stored = self._steps(start, xs, within, store=True)
            dnew, dxs, totals = self._steps_back(start, xs, stored, dnew, d, totals, within)
            return (dnew, totals), dxs

        def chunk(state, first, start):
            return again(start, first, size, *state)

        state, rest = (dnew, totals), None
        if chunks.left:
            state, rest = again(last, chunks.rest, chunks.left, *state)
        (dcarry, totals), dxs = chunks.scan(chunk, state, starts, back=True)
        return dcarry, chunks.joined(dxs, rest), totals

    def _through_constants(self, totals: list) -> tuple[list, list]:
        """The cotangents of what is given, from those of the constants made of it."""

        def constants(floating):
            rest = iter(floating)
            given = [next(rest) if inexact(v) else v for v in self.given]
            return _floating(_chunk.constants_of(self.loop, given))

        made, pullback = jax.vjp(constants, _floating(self.given))
        totals = [t for t in totals if t is not None]
        (d,) = pullback([t.astype(c.dtype) for t, c in zip(totals, made, strict=True)])
        d = _spread(d, self.given)
        return d[: len(self.f.captured)], d[len(self.f.captured) :]


def _floating(values: Sequence) -> list:
    return [v for v in values if inexact(v)]


def _spread(floating: Sequence, like: Sequence) -> list:
    """The values in the places of the floating leaves of `like`, and None in the others."""
    rest = iter(floating)
    return [next(rest) if inexact(v) else None for v in like]


def _part(leaves: list, first: Any, length: int) -> list:
    return [lax.dynamic_slice_in_dim(v, first, length) for v in leaves]
