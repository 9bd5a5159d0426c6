"""Inputs on which a function takes another branch than on those that were seen.

The function's own code says what it is meant for: where it compares with 0, both sides are; where
it compares integers with -100, that is one of them; where it sorts, the order is any.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check import explore
from funcbp.check.compare import split
from funcbp.check.evaluate import Evaluator, compiled
from funcbp.check.explore import Trait, Variant
from funcbp.check.program import Program

__all__ = ["branches"]

ONE_SIDED = {"positive", "nonnegative", "negative"}
# Constants next to which an integer is tried, by the comparison. JAX itself writes `i < 0` for each
# index, so that one says nothing.
BESIDE = {"eq": (0,), "ne": (0,), "ge": (0, -1), "gt": (0, 1), "le": (0, 1)}
LOOPS = {"scan", "while", "cond"}


class _Comparisons:
    """An evaluator's hook that notes what is compared with a constant, outside of loops."""

    def __init__(self):
        self.integers: set[int] = set()
        self.sides: dict[tuple[int, ...], Any] = {}  # whether each element is above the constant
        self.sorts = False
        self._looping = False

    def scope(self, values: dict) -> Any:
        return contextlib.nullcontext()

    def shared(self, path: tuple, number: Any, length: int, constants: list) -> list:
        return constants

    def __call__(self, path: tuple, eqn: Any, operands: list, run: Any) -> list:
        name, looping = eqn.primitive.name, self._looping
        self._looping = looping or name in LOOPS
        try:
            results = run(operands)
        finally:
            self._looping = looping
        self.sorts = self.sorts or name == "sort"
        constant = [
            np.ndim(x) == 0 and not isinstance(x, jax.core.Tracer)  # type: ignore
            for x in operands
        ]
        if len(operands) == 2 and constant[0] != constant[1]:
            moving, fixed = operands if constant[1] else reversed(operands)
            self._compared(path, name, moving, fixed)
        return results

    def _compared(self, path: tuple, name: str, moving: Any, fixed: Any) -> None:
        kind = np.dtype(fixed.dtype).kind if hasattr(fixed, "dtype") else "O"
        if kind in "iu" and name in BESIDE:
            self.integers |= {int(fixed) + step for step in BESIDE[name]}
        if kind == "f" and name in ("gt", "lt", "ge", "le", "max", "min") and not self._looping:
            self.sides[path] = moving > fixed


def branches(program: Program, args: Sequence[Any], seed: int = 0) -> Iterator[Variant]:
    """Variants of the arguments that turn a comparison, or an order, round."""
    layout, floating, fixed = split(tuple(args), {})
    found = _Comparisons()
    evaluate = Evaluator(program.closed, hook=found)
    with program.precision():
        jax.eval_shape(lambda *leaves: evaluate(*leaves), *_leaves(floating, fixed))
    rng = np.random.default_rng([seed, 59])
    generic = split(explore.resampled(args, seed).args, {}).floating
    for k, v in enumerate(fixed):
        # Labels 0 and 1, or -1 and 1, have no other value, though they are compared with one.
        if explore.is_index(v) and not explore.yes_or_no(np.asarray(v)):
            for c in sorted(found.integers - set(np.unique(v).tolist())):
                if c < 0 and v.dtype.kind == "u":
                    continue
                new = np.where(rng.random(v.shape) < 0.4, c, np.asarray(v))
                new.flat[0] = c
                ints = [*fixed[:k], jnp.asarray(new, v.dtype), *fixed[k + 1 :]]
                what = f"integers {c}, which the function compares with"
                yield Variant(what, "generic", explore.rebuilt(layout, generic, ints))
    traits = {n: Trait.of(v) for n, v in floating.items()}
    if found.sorts:
        for n in (n for n, t in traits.items() if "sorted" in t.kinds):
            new = generic | {n: jnp.asarray(rng.permuted(generic[n], axis=-1))}
            what = f"{n} in no order, for the function sorts"
            yield Variant(what, "generic", explore.rebuilt(layout, new, fixed))
    if found.sides:
        yield from _other_sides(program, layout, traits, (floating, generic, fixed), rng)


def _other_sides(
    program: Program, layout: Any, traits: dict[str, Trait], seen: tuple, rng: np.random.Generator
) -> Iterator[Variant]:
    """Values with signs that no argument had, where that turns a comparison round."""
    floating, generic, fixed = seen
    free = [
        n
        for n, t in traits.items()
        if t.kinds & ONE_SIDED and t.free() and not t.kinds & {"scalar", "binary"}
    ]
    if not free:
        return

    @compiled
    def outcomes(floating, fixed):
        hook = _Comparisons()
        Evaluator(program.closed, hook=hook)(*_leaves(floating, fixed))
        return [jnp.stack([jnp.any(s), jnp.any(~s)]) for s in hook.sides.values()]

    def taken(floating):
        with program.precision():
            return np.array(outcomes(floating, fixed))

    known = taken(floating) | taken(generic)
    mirrored = {n: -generic[n] for n in free}
    either = {
        n: jnp.asarray(generic[n] * rng.choice((-1, 1), v.shape)).astype(v.dtype)
        for n, v in mirrored.items()
    }
    alone = [{n: v} for both in (mirrored, either) for n, v in both.items()]
    for change in [*alone, mirrored, either]:
        new = generic | change
        there = taken(new)
        if np.any(there & ~known):
            known |= there
            what = f"other signs in {', '.join(change)}, which the function tells apart"
            yield Variant(what, "generic", explore.rebuilt(layout, new, fixed))


def _leaves(floating: dict[str, Any], fixed: list[Any]) -> list[Any]:
    return [*(floating[n] for n in sorted(floating)), *fixed]
