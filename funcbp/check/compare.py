"""The yardstick: a rule and autodiff, in the case's dtype, against the plain function in float64.

No tolerance is set by hand. Autodiff of the plain function shows what error the dtype, the shape
and the values bring with them; the rule may be at most twice as far off, plus 2 ulp. Elements are
judged one by one, each against what autodiff reaches at the same place in other draws and on
elements of its own size, so that an error in a small element does not hide behind a large one.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.case import Case
from funcbp.check.evaluate import compiled
from funcbp.core import InputError, Op

# The error of autodiff on one element may be 0 by luck; its error on many is what the dtype allows.
# So draws are repeated, at least and at most this often, until this many elements are pooled.
DRAWS, POOL = (8, 32), 512
# Of two functions equally far off, one may still meet the badly conditioned draw. What exceeds the
# allowed error by less than this ratio is drawn on, so often at most, before it is called wrong.
NEAR, LAST = 16.0, 512
# Each draw of the arguments is taken at these scales: as well or badly conditioned, with zeros and
# ties where they were, but rounded anew.
SCALES = (1.0, 31 / 32, 15 / 16, 29 / 32)
# An element is judged beside those up to this many times larger, and at least so many of them.
SIZE, NEIGHBOURS = 64, 16


class WrongRule(AssertionError):
    """A rule is further from float64 than the yardstick allows."""


class Row(NamedTuple):
    """One compared array: the value, or the cotangent of one argument.

    `rule` and `autodiff` are the largest errors, in units of the largest true element; `excess`
    is the largest ratio of the rule's error to what is allowed (right is at most 1), at `index`.
    """

    what: str
    shape: tuple[int, ...]
    dtype: str
    rule: float
    autodiff: float
    excess: float
    index: tuple[int, ...]
    got: float
    truth: float

    @property
    def ok(self) -> bool:
        return self.excess <= 1

    def __str__(self) -> str:
        size = f"{self.what} {self.dtype}{list(self.shape)}"
        line = f"{size}: rule {self.rule:.2g}, autodiff {self.autodiff:.2g}"
        if self.ok:
            return line
        return (
            f"{line}; WRONG at {list(self.index)}: the rule gives {self.got:.9g}, float64 says "
            f"{self.truth:.9g}, {self.excess:.3g} times the allowed error"
        )


class Comparison(NamedTuple):
    """What `compare` found: a row for the value and for each floating argument's cotangent."""

    name: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        verdict = "right" if self.ok else "WRONG"
        return "\n  ".join([f"{self.name}: {verdict}", *map(str, self.rows)])

    def raise_if_wrong(self) -> None:
        """Raises WrongRule with the whole table if any row is wrong."""
        if not self.ok:
            raise WrongRule(str(self))


def compare(
    f: Callable,
    *args: Any,
    reference: Callable | None = None,
    seed: int = 0,
    cotangents: bool = True,
    **kwargs: Any,
) -> Comparison:
    """Compares a rule with autodiff and with float64: its value and each cotangent.

    Args:
      f: an op, a `jax.custom_vjp`, or any function with a custom rule inside.
      *args: its arguments, or one `Case`, which is drawn afresh for each seed.
      reference: the same function without the rule. Not needed for an op (its `plain`) or for a
        `jax.custom_vjp` (the function that it decorates).
      seed: of the random cotangents, and of the case. Cotangents are dense and normal.
      cotangents: False compares the value alone.
      **kwargs: passed to both functions; arrays among them are compared too.

    Returns:
      A `Comparison`: `.ok`, `.rows`, `.raise_if_wrong()`; prints as a table.

    Raises:
      InputError: no reference is given and none is known.
    """
    reference = reference or _reference(f)
    name = getattr(f, "name", None) or getattr(f, "__name__", type(f).__name__)
    case = args[0] if len(args) == 1 and isinstance(args[0], Case) else None
    if case is not None:
        name = f"{name}, {case.name}"
    pools: dict[str, list[_Sample]] = {}
    measured = _Measure(f, reference, cotangents)
    rows, due = (), DRAWS[0]
    for draw in range(LAST):
        if case is not None:
            args, kwargs = case.build(seed + draw)
        scale = SCALES[draw % len(SCALES)]
        for sample in measured(_scaled(args, kwargs, scale), [seed, draw]):
            pools.setdefault(sample.what, []).append(sample)
        enough = draw + 1 >= due and all(len(p) * p[0].truth.size >= POOL for p in pools.values())
        if enough or draw + 1 in (DRAWS[1], LAST):
            rows = tuple(_judge(pool) for pool in pools.values())
            if not any(1 < row.excess < NEAR for row in rows):
                break
            due = 2 * (draw + 1)
    return Comparison(name, rows)


def _reference(f: Callable) -> Callable:
    if isinstance(f, Op):
        return f.plain
    if isinstance(f, jax.custom_vjp | jax.custom_jvp):
        return f.fun
    raise InputError(
        f"reference must be given for {f!r}: the same function without the rule; only an op and a "
        "jax.custom_vjp bring their own"
    )


class _Sample(NamedTuple):
    """One draw of one array: from the rule, from autodiff, and the truth."""

    what: str
    rule: np.ndarray
    autodiff: np.ndarray
    truth: np.ndarray
    dtype: Any


class _Same:
    """A function as a key: itself alone, hashable or not."""

    def __init__(self, f: Callable):
        self.f = f

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.f is other.f

    def __hash__(self) -> int:
        return id(self.f)


@functools.lru_cache(maxsize=4)
def _programs(same: _Same, cotangents: bool) -> tuple[Any, Any]:
    """f with its cotangents, and the shapes of its value: traced once for draws and calls alike."""
    f = same.f
    # What pulls back itself is a large program, of which the digits are not the point.
    jit = jax.jit if cotangents else compiled
    value = jax.jit(
        lambda layout, floating, fixed: layout.call(f, floating, fixed), static_argnums=0
    )
    return jit(_value_and_cotangents(f), static_argnums=0), value.eval_shape


class _Measure:
    """Runs the three."""

    def __init__(self, f: Callable, reference: Callable, cotangents: bool):
        self.cotangents = cotangents
        self.run_rule, _ = _programs(_Same(f), cotangents)
        self.run_reference, self.value = _programs(_Same(reference), cotangents)

    def __call__(self, arguments: "Arguments", seed: list[int]) -> list[_Sample]:
        layout, floating, fixed = arguments
        double = any(v.dtype in (np.float64, np.complex128) for v in floating.values())
        with jax.enable_x64(True) if double else contextlib.nullcontext():
            dy = None
            if self.cotangents:
                y = self.value(layout, floating, fixed)
                dy = _cotangents(y, np.random.default_rng([*seed, 17]))
            rule = self.run_rule(layout, floating, fixed, dy)
            autodiff = self.run_reference(layout, floating, fixed, dy)
        with jax.enable_x64(True):
            truth = self.run_reference(layout, _promoted(floating), fixed, _promoted(dy))
        return [
            _Sample(
                what,
                widened(rule[what]),
                widened(autodiff[what]),
                np.asarray(truth[what]),
                rule[what].dtype,
            )
            for what in truth
        ]


def _value_and_cotangents(f: Callable) -> Callable:
    """(layout, floating, fixed, dy) -> the value's leaves and the cotangents, by name."""

    def run(layout, floating, fixed, dy):
        if dy is None:
            return _by_name("value", layout.call(f, floating, fixed))
        y, pullback = jax.vjp(lambda floating: layout.call(f, floating, fixed), floating)
        (cotangents,) = pullback(dy)
        return _by_name("value", y) | {f"cotangent of {n}": d for n, d in cotangents.items()}

    return run


class Layout(NamedTuple):
    """Where the arrays of a call belong: hashable, the same for each draw of a case.

    `entries` has, for each leaf of (args, kwargs), the name of a floating array, the number of
    another array, or the leaf itself, wrapped.
    """

    tree: Any
    entries: tuple[Any, ...]

    @property
    def settings(self) -> set[str]:
        """The names of what is passed by keyword."""
        return set(jax.tree.unflatten(self.tree, self.entries)[1])

    def call(self, f: Callable, floating: dict[str, Any], fixed: list[Any]) -> Any:
        """Calls f with these arrays in their places."""
        leaves = [
            floating[e] if isinstance(e, str) else fixed[e] if isinstance(e, int) else e.leaf
            for e in self.entries
        ]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return f(*args, **kwargs)


class _Static(NamedTuple):
    """A leaf that is no array."""

    leaf: Any


class Arguments(NamedTuple):
    """The arguments of a call: where they belong, the floating arrays by name, the other arrays."""

    layout: Layout
    floating: dict[str, Any]
    fixed: list[Any]


def split(args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Takes the arguments of a call apart."""
    leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    entries, floating, fixed = [], {}, []
    for path, leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray):
            entries.append(_Static(leaf))
        elif _inexact(leaf):
            entries.append(named(path))
            floating[named(path)] = jnp.asarray(leaf)
        else:
            entries.append(len(fixed))
            fixed.append(leaf)
    return Arguments(Layout(tree, tuple(entries)), floating, fixed)


def _scaled(args: tuple, kwargs: dict[str, Any], scale: float) -> Arguments:
    layout, floating, fixed = split(args, kwargs)
    if scale != 1:
        floating = {n: (v * scale).astype(v.dtype) for n, v in floating.items()}
    return Arguments(layout, floating, fixed)


def named(path: Sequence[Any]) -> str:
    """`argument 0`, or `where` for a keyword; `argument 0['w']` for a leaf inside one."""
    keyword = path[0].idx == 1
    first = path[1]
    head = first.key if keyword else f"argument {first.idx}"
    return head + jax.tree_util.keystr(tuple(path[2:]))


def _by_name(what: str, tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {what + jax.tree_util.keystr(p): v for p, v in leaves if _inexact(v)}


def _inexact(v: Any) -> bool:
    return jnp.issubdtype(v.dtype, jnp.inexact)


def _cotangents(y: Any, rng: np.random.Generator) -> Any:
    """Dense random cotangents for the shapes of y; float0 for outputs that have none."""

    def draw(aval):
        if not _inexact(aval):
            return np.zeros(aval.shape, jax.dtypes.float0)
        real = rng.standard_normal(aval.shape)
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            real = real + 1j * rng.standard_normal(aval.shape)
        return jnp.asarray(real, aval.dtype)

    return jax.tree.map(draw, y)


def _promoted(tree: Any) -> Any:
    def promote(v):
        if v.dtype == jax.dtypes.float0 or not _inexact(v):
            return v
        wide = np.complex128 if jnp.issubdtype(v.dtype, jnp.complexfloating) else np.float64
        return jnp.asarray(np.asarray(v).astype(wide))

    return jax.tree.map(promote, tree)


def widened(v: Any) -> np.ndarray:
    v = np.asarray(v)
    return v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)


def _judge(pool: list[_Sample]) -> Row:
    """One row from all draws of one array."""
    what, shape, dtype = pool[0].what, pool[0].truth.shape, pool[0].dtype
    if not pool[0].truth.size:
        return Row(what, shape, str(dtype), 0.0, 0.0, 0.0, (), 0.0, 0.0)
    rule, autodiff, truth = (np.stack([np.ravel(s[i]) for s in pool]) for i in (1, 2, 3))
    error, error_of_autodiff = distance(rule, truth), distance(autodiff, truth)
    excess = error / allowed(error_of_autodiff, truth, dtype)
    scale = np.max(np.abs(truth), initial=0.0, where=np.isfinite(truth)) or 1.0
    at = np.unravel_index(np.argmax(excess), excess.shape)
    return Row(
        what,
        shape,
        str(dtype),
        float(np.max(error) / scale),
        float(np.max(error_of_autodiff) / scale),
        float(excess[at]),
        tuple(map(int, np.unravel_index(at[1], shape))),
        float(np.real(rule[at])),
        float(np.real(truth[at])),
    )


def distance(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|got - truth|, 0 where both are nan or the same infinity, infinite where only one is."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(got - truth)
    same = (got == truth) | (np.isnan(got) & np.isnan(truth))
    return np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))


def allowed(error_of_autodiff: np.ndarray, truth: np.ndarray, dtype: Any) -> np.ndarray:
    """What error each element may have: twice autodiff's, plus 2 ulp.

    Takes [draws, elements]. Autodiff's error is the largest it makes at this place in any draw,
    or on elements of this size (up to `SIZE` times as large) or smaller. Where it is not finite it
    is no measure and does not count.
    """
    info, exact = jnp.finfo(dtype), jnp.finfo(np.float64)
    errors = np.where(np.isfinite(error_of_autodiff), error_of_autodiff, 0.0)
    size = np.where(np.isfinite(truth), np.abs(truth), 0.0)
    order = np.argsort(size, axis=None, kind="stable")
    ordered = size.ravel()[order]
    reach = np.searchsorted(ordered, SIZE * ordered, side="right") - 1
    reach = np.maximum(reach, np.minimum(np.arange(size.size) + NEIGHBOURS, size.size - 1))
    of_this_size = np.empty(size.size)
    of_this_size[order] = np.maximum.accumulate(errors.ravel()[order])[reach]
    envelope = np.maximum(of_this_size.reshape(size.shape), np.max(errors, axis=0))
    # The truth is rounded too; and below the smallest normal number devices may flush to zero.
    floor = 8 * float(exact.eps) * np.max(size, axis=1, keepdims=True) + float(info.tiny)
    return 2 * envelope + 2 * float(info.eps) * size + floor


def saved_bytes(f: Callable, *args: Any, **kwargs: Any) -> int:
    """Bytes that the forward pass of f keeps for the backward pass, arguments not counted."""
    layout, floating, fixed = split(args, kwargs)
    free = {id(leaf) for leaf in (*floating.values(), *fixed)}
    _, pullback = jax.vjp(lambda floating: layout.call(f, floating, fixed), floating)
    kept = {id(a): a.nbytes for a in jax.tree.leaves(pullback) if id(a) not in free}
    return sum(kept.values())
