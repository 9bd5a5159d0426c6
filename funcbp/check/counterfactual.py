"""The derivative that a function would have if one place in it were differentiated otherwise.

A place is an equation of its jaxpr, also inside calls and loops, and a way to get it wrong: a path
cut, a pointwise slope taken as 1, a matrix used where its transpose belongs, a sum over a broadcast
axis left out. Values stay as they are; only what is pulled back through that place changes. All
places are compiled into one program, which a weight for each of them turns on.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from funcbp.check.evaluate import Evaluator, compiled

__all__ = ["Place", "counterfactuals", "straight_through"]

# Places that are tried; further ones of a long function are not.
PLACES = 400
# Pointwise functions, whose slope may be forgotten; and those that only move or add values.
CURVED = frozenset(
    """abs acos acosh asin asinh atan atanh cbrt clamp cos cosh digamma div erf erf_inv erfc exp
    exp2 expm1 integer_pow lgamma log log1p logistic max min pow rsqrt sign sin sinh sqrt square
    tan tanh""".split()  # noqa: SIM905 (a list of 37 lines says no more)
)
STRAIGHT = frozenset(
    ("add", "add_any", "convert_element_type", "copy", "mul", "neg", "select_n", "sub")
)
# Values that may have been kept in the place of another.
KEPT = 12
# Ancestors of one value from which a composed pointwise function may be skipped.
ANCESTORS = 12
OTHER_AXIS = "a sum is taken over another axis"


class Place(NamedTuple):
    """Where the derivative is changed and how.

    `kind`: cut, passed, transposed, first, mean, axis, repeated, conjugate or stale; `what` says it
    in words.
    """

    kind: str
    what: str


class _Hook:
    """Numbers the places as it meets them, and changes each by its weight.

    Weights are 1 for a place left as it is and 0 for one that is changed; without weights the hook
    counts.
    """

    def __init__(self, stale: bool, weights: Any = None, numbers: dict[Any, int] | None = None):
        self.stale, self.weights = stale, weights
        self.scopes: list[dict[Any, Any]] = []
        self.numbers = {} if numbers is None else numbers
        self.places: list[Place] = []
        # Of each pointwise value: those that it is made from, and whether by a curved function.
        self.made_from: dict[int, dict[int, tuple[Any, bool]]] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def weight(self, key: Any, kind: str, what: str) -> Any:
        """The weight of a place; None where it is not changed."""
        if (kind == "stale") != self.stale:
            return None
        if self.weights is None:
            self.numbers[key] = len(self.numbers)
            self.places.append(Place(kind, what))
            return None
        k = self.numbers.get(key, PLACES)
        return self.weights[k] if k < PLACES else None

    @contextlib.contextmanager
    def scope(self, values: dict[Any, Any]) -> Iterator[None]:
        """What a rule may have kept by mistake: any value of this body and of those around it."""
        self.scopes.append(values)
        try:
            yield
        finally:
            self.scopes.pop()

    def shared(self, path: tuple, number: Any, length: int, constants: list) -> list:
        """The constants of a loop get a sum over its steps: or only what one step brings."""
        changed = list(constants)
        for j, x in enumerate(constants):
            if not _inexact(x) or length < 2:
                continue
            for which, step in {"first": 0, "last": length - 1}.items():
                what = f"only the {which} step of a loop adds to it"
                w = self.weight((*path, "step", j, which), "repeated", what)
                only = jnp.where(number == step, x, jax.lax.stop_gradient(x))
                changed[j] = _blend(w, changed[j], only)
        return changed

    def __call__(self, path: tuple, eqn: Any, operands: list, run: Callable) -> list:
        name, aval = eqn.primitive.name, eqn.outvars[0].aval
        floating = [
            j
            for j, (x, v) in enumerate(zip(operands, eqn.invars, strict=True))
            if _inexact(x) and not isinstance(v, Literal)
        ]
        if len(eqn.outvars) != 1 or not jnp.issubdtype(aval.dtype, jnp.inexact) or not floating:
            return run(operands)
        sources, operands = [operands[j] for j in floating], list(operands)
        for j in floating:
            x = operands[j]
            if name in CURVED | STRAIGHT and x.ndim == len(aval.shape) and x.shape != aval.shape:
                spread = jnp.broadcast_to(x, aval.shape)
                operands[j] = self._broadcast((*path, j), x, range(x.ndim), spread)
        for j in floating if len(floating) > 1 else ():
            w = self.weight((*path, "cut", j), "cut", f"a term through {name}")
            operands[j] = _blend(w, operands[j], jax.lax.stop_gradient(operands[j]))
        (y,) = run(operands)
        if name in ("dot_general", "conv_general_dilated", "mul"):
            y = self._products(path, eqn, operands, floating, run, y)
        if name == "broadcast_in_dim":
            y = self._broadcast(path, operands[0], eqn.params["broadcast_dimensions"], y)
        if name == "reduce_sum":
            y = self._sum(path, operands[0], eqn, run, y)
        if name == "gather":
            y = self._gather(path, operands, run, y)
        if self.stale and len(floating) == 1 and name in CURVED:
            y = self._slopes(path, eqn, operands, floating[0], run, y)
        if name in CURVED | STRAIGHT or (len(floating) == 1 and _curved(eqn)):
            y = self._pointwise(path, eqn, sources, y)
        return [y]

    def _swapped(self, w: Any, y: Any, alternative: Any) -> Any:
        """y's value, with the derivative of the alternative where w is 0."""
        return _blend(w, y, alternative + jax.lax.stop_gradient(y - alternative))

    def _products(
        self, path: tuple, eqn: Any, operands: list, floating: list, run: Callable, y: Any
    ) -> Any:
        """Products use the other operand as it is, its transpose, its reverse or its conjugate."""
        if len(floating) != 2:
            return y
        for j in (0, 1):
            other = jax.lax.stop_gradient(operands[1 - j])
            changed = [*_changed(eqn, 1 - j, other), *self._others(eqn.invars[1 - j], other)]
            for kind, what, value in changed:
                w = self.weight((*path, kind, what, j), kind, what)
                mine, rest = list(operands), list(operands)
                mine[1 - j] = value
                rest[j] = jax.lax.stop_gradient(operands[j])
                y = self._swapped(w, y, run(mine)[0] + run(rest)[0])
        return y

    def _others(self, var: Any, value: Any) -> list[tuple[str, str, Any]]:
        """(kind, words, value) of the values that may have been kept in the place of one."""
        found = []
        for depth, scope in enumerate(reversed(self.scopes) if self.stale else ()):
            for k, (v, x) in enumerate(scope.items()):
                if v is not var and _inexact(x) and x.shape == value.shape and x.size > 1:
                    what = f"another value of its shape is used in its place ({depth}, {k})"
                    found.append(("stale", what, jax.lax.stop_gradient(x)))
        return found[:KEPT]

    def _slopes(self, path: tuple, eqn: Any, operands: list, j: int, run: Callable, y: Any) -> Any:
        """A pointwise function's slope taken at another value."""
        x = operands[j]

        def at(v):
            return run([v if i == j else o for i, o in enumerate(operands)])[0]

        for kind, what, other in self._others(eqn.invars[j], x):
            w = self.weight((*path, what), kind, what)
            slope = jax.jvp(at, (other,), (jnp.ones_like(other),))[1]
            y = self._swapped(w, y, jax.lax.stop_gradient(slope) * x)
        return y

    def _broadcast(self, path: tuple, x: Any, kept: Sequence[int], y: Any) -> Any:
        """What is broadcast forward is summed backward: or only one entry, the mean, another axis.

        `kept` has the axis of y for each axis of x.
        """
        new = [
            axis
            for axis, n in enumerate(y.shape)
            if n > 1 and (axis not in kept or x.shape[kept.index(axis)] == 1)
        ]
        still = jax.lax.stop_gradient(y)
        for axes in [new] + ([[a] for a in new] if len(new) > 1 else []):
            if not axes:
                continue
            n = math.prod(y.shape[a] for a in axes)
            for which, at in {"first": 0, "last": -1}.items():
                what = f"only the {which} entry of a broadcast is summed"
                w = self.weight((*path, "first", which, *axes), "first", what)
                y = _blend(w, y, jnp.where(_at(y.shape, axes, at), y, still))
            w = self.weight((*path, "mean", *axes), "mean", f"a mean over {n} is taken, not a sum")
            y = _blend(w, y, y / n + (1 - 1 / n) * still)
        for a in new:
            for b in kept:
                if y.shape[a] == y.shape[b] and b not in new:
                    w = self.weight((*path, "axis", a, b), "axis", OTHER_AXIS)
                    y = self._swapped(w, y, jnp.swapaxes(y, a, b))
        return y

    def _sum(self, path: tuple, x: Any, eqn: Any, run: Callable, y: Any) -> Any:
        """A sum's pullback spreads over the axis summed: or over another one of its size."""
        axis, *more = eqn.params["axes"]
        for other in range(x.ndim):
            if not more and other != axis and x.shape[other] == x.shape[axis] > 1:
                w = self.weight((*path, "axis", axis, other), "axis", OTHER_AXIS)
                y = self._swapped(w, y, run([jnp.swapaxes(x, axis, other)])[0])
        return y

    def _gather(self, path: tuple, operands: list, run: Callable, y: Any) -> Any:
        """What is gathered twice gets a sum: or only what the first or the last of them brings."""
        x, *rest = operands
        numbers = jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
        source = jnp.nan_to_num(run([numbers, *rest])[0], nan=-1).astype(int).ravel()
        order = jnp.arange(source.size)
        owner = jnp.full(x.size + 1, -1).at[source].max(order)
        first = jnp.full(x.size + 1, source.size).at[source].min(order)
        still = jax.lax.stop_gradient(y)
        for which, winner in {"last": owner, "first": first}.items():
            what = f"of an index that occurs more than once only the {which} counts"
            w = self.weight((*path, "repeated", which), "repeated", what)
            y = _blend(w, y, jnp.where((winner[source] == order).reshape(y.shape), y, still))
        return y

    def _pointwise(self, path: tuple, eqn: Any, operands: list, y: Any) -> Any:
        name = eqn.primitive.name
        same = [x for x in operands if x.shape == y.shape and x.dtype == y.dtype]
        bends = name not in STRAIGHT
        sources: dict[int, tuple[Any, bool]] = {}
        for x in same:
            older = self.made_from.get(id(x), {})
            for key, (ancestor, bent) in list(older.items())[-ANCESTORS:]:
                sources[key] = (ancestor, bent or bends or (name == "mul" and len(same) > 1))
            sources[id(x)] = (x, bends)
        what = f"the derivative of a pointwise {_said(eqn)} is left out"
        for order, (x, bent) in enumerate(sources.values()):
            if bent and (bends or name == "mul"):
                y = self._swapped(self.weight((*path, "passed", order), "passed", what), y, x)
        self.alive.append((y, sources))
        self.made_from[id(y)] = sources
        return y


def _curved(eqn: Any) -> bool:
    """Whether a call is of a pointwise function that is no straight line."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    if eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        return False
    shape = eqn.outvars[0].aval.shape
    pointwise = all(
        e.primitive.name in CURVED | STRAIGHT | {"broadcast_in_dim", "stop_gradient", "gt", "lt"}
        and all(v.aval.shape in ((), shape) for v in e.outvars)
        or _curved(e)
        for e in inner.eqns
    )
    return pointwise and any(e.primitive.name in CURVED or _curved(e) for e in inner.eqns)


def _changed(eqn: Any, j: int, other: Any) -> Iterator[tuple[str, str, Any]]:
    """(kind, words, value) of operand j as a product may use it wrongly."""
    name = eqn.primitive.name
    if jnp.issubdtype(other.dtype, jnp.complexfloating):
        yield "conjugate", "a factor is not conjugated, or is where it should not be", other.conj()
    if name == "dot_general":
        (contracted, batch) = (d[j] for d in eqn.params["dimension_numbers"])
        free = [a for a in range(other.ndim) if a not in contracted and a not in batch]
        for a in contracted:
            for b in free:
                if other.shape[a] == other.shape[b] > 1:
                    swapped = jnp.swapaxes(other, a, b)
                    yield "transposed", "a matrix is used where its transpose belongs", swapped
    if name == "conv_general_dilated" and j == 1:
        spec = eqn.params["dimension_numbers"].rhs_spec
        if any(other.shape[a] > 1 for a in spec[2:]):
            what = "a kernel is not turned round, or is where it should not be"
            yield "transposed", what, jnp.flip(other, spec[2:])
        if other.shape[spec[0]] == other.shape[spec[1]] > 1:
            what = "a kernel's channels in and out are swapped"
            yield "transposed", what, jnp.swapaxes(other, spec[0], spec[1])


def _blend(w: Any, y: Any, alternative: Any) -> Any:
    return y if w is None else jnp.where(w > 0.5, y, alternative)


def _at(shape: Sequence[int], axes: Sequence[int], place: int) -> Any:
    picked = np.ones(shape, bool)
    for a in axes:
        index = np.arange(shape[a]).reshape([-1 if i == a else 1 for i in range(len(shape))])
        picked = picked & (index == place % shape[a])
    return picked


def _said(eqn: Any) -> str:
    """The name of a pointwise function: that of a jitted one is its own."""
    return str(eqn.params.get("name", eqn.primitive.name))


def _inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def counterfactuals(
    closed: Any, leaves: dict[str, Any], fixed: list, name: str, dys: list, stale: bool = False
) -> list[tuple[Place, np.ndarray]]:
    """The cotangent of one argument with each place changed in turn, in float64.

    Args:
      closed: the primal's jaxpr; takes the leaves by name, then the fixed arrays.
      leaves: the floating arguments in double, by name.
      fixed: the others.
      name: the argument whose cotangent is asked for.
      dys: one cotangent for each floating output.
      stale: the places where another value may have been kept, in place of all others.
    """

    def value(v, hook):
        moved = leaves | {name: v}
        y = Evaluator(closed, promote=True, hook=hook)(*[moved[n] for n in sorted(moved)], *fixed)
        return [o for o in y if _inexact(o)]

    counter = _Hook(stale)

    def cotangent(weights):
        hook = _Hook(stale, weights, counter.numbers)
        y, pullback = jax.vjp(lambda v: value(v, hook), jnp.asarray(leaves[name]))
        return pullback([jnp.asarray(d, o.dtype) for d, o in zip(dys, y, strict=True)])[0]

    with jax.enable_x64(True):
        jax.eval_shape(lambda v: value(v, counter), leaves[name])
        places = counter.places[:PLACES]
        if not places:
            return []
        # One by one, then all of a kind at once: a fault repeated in each layer.
        alone = [[i] for i in range(len(places))]
        kinds: dict[Place, list[int]] = {}
        for i, place in enumerate(places if not stale else ()):
            kinds.setdefault(place, []).append(i)
        sets = alone + [group for group in kinds.values() if len(group) > 1]
        rows = np.ones((len(sets), PLACES))
        for row, chosen in zip(rows, sets, strict=True):
            row[chosen] = 0
        found = np.asarray(compiled(lambda rows: jax.lax.map(cotangent, rows))(rows))
    return [(places[chosen[0]], f) for chosen, f in zip(sets, found, strict=True)]


class _Steps:
    """A hook that gives each step the derivative 1."""

    def scope(self, values: dict[Any, Any]) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def shared(self, path: tuple, number: Any, length: int, constants: list) -> list:
        return constants

    def __call__(self, path: tuple, eqn: Any, operands: list, run: Callable) -> list:
        results = run(operands)
        if eqn.primitive.name in ("round", "floor", "ceil", "sign"):
            (y,), x = results, operands[0]
            return [x + jax.lax.stop_gradient(y - x)]
        return results


def straight_through(
    closed: Any, leaves: dict[str, Any], fixed: list, name: str, dys: list
) -> np.ndarray:
    """The cotangent of one argument, in float64, with every rounding and sign as an identity."""

    def value(v):
        moved = leaves | {name: v}
        y = Evaluator(closed, promote=True, hook=_Steps())(
            *[moved[n] for n in sorted(moved)], *fixed
        )
        return [o for o in y if _inexact(o)]

    with jax.enable_x64(True):
        y, pullback = jax.vjp(value, jnp.asarray(leaves[name]))
        return np.asarray(
            pullback([jnp.asarray(d, o.dtype) for d, o in zip(dys, y, strict=True)])[0]
        )
