"""Other inputs for a rule, made from those it was seen with.

Half of the faults do not show on the caller's own call: they need a zero, a tie, a repeated index,
a length that no block divides. The variants keep what the seen arguments have in common (positive
numbers stay positive, symmetric matrices symmetric, rows that sum to 1 do so), because a rule is
only asked to be right where its function is meant to be used.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.compare import Layout, split

__all__ = [
    "Trait",
    "Variant",
    "is_index",
    "lengthened",
    "rebuilt",
    "recast",
    "resampled",
    "reshaped",
    "revalued",
    "shrunk",
    "smaller",
    "unrestricted",
    "usual",
    "yes_or_no",
]

SMALL = 600  # elements of the arguments up to which a rule is explored at its own shapes
ODD = (3, 5, 7, 4, 6, 9)


class Variant(NamedTuple):
    """Arguments to try: what is particular about them, in words, and the regime it belongs to."""

    what: str
    regime: str
    args: tuple


class Trait(NamedTuple):
    """What the values of one floating array have in common."""

    kinds: frozenset[str]
    scale: float

    @classmethod
    def of(cls, array: Any) -> "Trait":
        """Looks at an array."""
        v = np.asarray(array)
        if np.iscomplexobj(v) or not v.size:
            return cls(frozenset({"complex"} if np.iscomplexobj(v) else ()), 1.0)
        v = v.astype(np.float64)
        f = v[np.isfinite(v)]
        kinds = set()
        if not f.size:
            return cls(frozenset({"constant"}), 1.0)
        tests = {
            "scalar": v.size == 1,
            "constant": v.size > 1 and bool(np.all(v == v.flat[0])),
            "binary": v.size > 1 and bool(np.all((v == 0) | (v == 1))),
            "whole": v.size > 1 and bool(np.all(f == np.round(f))),
            "positive": bool(np.all(f > 0)),
            "nonnegative": bool(np.all(f >= 0)),
            "negative": bool(np.all(f < 0)),
            "unit": bool(np.all((f >= 0) & (f <= 1))),
            "bounded": bool(np.all(np.abs(f) <= 1)),
            "infinite": f.size < v.size,
        }
        kinds |= {k for k, held in tests.items() if held}
        if v.ndim and v.shape[-1] > 1 and f.size == v.size:
            if np.all(v >= 0) and np.allclose(v.sum(-1), 1, atol=1e-3):
                kinds.add("simplex")
            if np.allclose((v**2).sum(-1), 1, atol=1e-3):
                kinds.add("sphere")
            if v.shape[-1] > 2 and np.all(np.diff(v, axis=-1) > 0):
                kinds.add("sorted")
        if v.ndim >= 2 and v.shape[-1] == v.shape[-2] > 1 and f.size == v.size:
            if np.array_equal(v, np.swapaxes(v, -1, -2)) and "constant" not in kinds:
                kinds.add("symmetric")
                if np.all(np.linalg.eigvalsh(v) > 0):
                    kinds.add("definite")
            elif np.array_equal(v, np.tril(v)) and v.shape[-1] > 2:
                kinds.add("lower")
            elif np.array_equal(v, np.triu(v)) and v.shape[-1] > 2:
                kinds.add("upper")
        spread = float(np.median(np.abs(f[f != 0]))) if np.any(f != 0) else 1.0
        return cls(frozenset(kinds), spread)

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Values with these traits, generic otherwise: no zeros, ties or infinities."""
        values = self._drawn(shape, rng)
        return np.sort(values, axis=-1) if "sorted" in self.kinds and shape else values

    def _drawn(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        z = rng.standard_normal(shape)
        scale = self.scale if 1e-3 <= self.scale <= 30 else 1.0
        kinds = self.kinds
        if "scalar" in kinds and math.prod(shape) > 1:
            kinds = kinds - {"scalar", "whole", "unit", "bounded", "nonnegative"}
        if "complex" in kinds:
            return z + 1j * rng.standard_normal(shape)
        if "simplex" in kinds:
            e = np.exp(z)
            return e / e.sum(-1, keepdims=True)
        if "definite" in kinds and len(shape) >= 2 and shape[-1] == shape[-2]:
            return z @ np.swapaxes(z, -1, -2) / shape[-1] + np.eye(shape[-1])
        if "symmetric" in kinds and len(shape) >= 2 and shape[-1] == shape[-2]:
            return (z + np.swapaxes(z, -1, -2)) / 2 * scale
        if "lower" in kinds or "upper" in kinds:
            m = np.tril(z) if "lower" in kinds else np.triu(z)
            return m / 3 + 1.5 * np.eye(shape[len(shape) - 2], shape[len(shape) - 1])
        if "sphere" in kinds and shape:
            return z / np.linalg.norm(z, axis=-1, keepdims=True)
        if "scalar" in kinds:
            return np.full(shape, self.scale * (1 + 0.3 * rng.random()) * self._sign())
        if "constant" in kinds:
            return 1 + 0.3 * np.tanh(z) if "positive" in kinds else 0.5 * z
        if "binary" in kinds:
            return (z > 0).astype(float)
        if "unit" in kinds:
            return 1 / (1 + np.exp(-z))
        if "positive" in kinds or "nonnegative" in kinds:
            return scale * np.exp(0.5 * z)
        if "negative" in kinds:
            return -scale * np.exp(0.5 * z)
        if "bounded" in kinds:
            return np.tanh(z)
        return scale * z

    def _sign(self) -> float:
        return -1.0 if "negative" in self.kinds else 1.0

    def free(self) -> bool:
        """Whether any real value may be meant."""
        return not self.kinds & {
            "simplex",
            "definite",
            "symmetric",
            "lower",
            "upper",
            "sphere",
            "binary",
            "complex",
        }


def rebuilt(layout: Layout, floating: dict[str, Any], fixed: list[Any]) -> tuple:
    """The arguments of a call from their arrays."""
    return layout.call(lambda *args: args, floating, fixed)


def _bound(value: np.ndarray, floating: dict[str, Any]) -> int:
    """The exclusive upper end of an index: the smallest axis that holds those seen."""
    top = int(value.max(initial=0))
    sizes = {s for v in floating.values() for s in np.shape(v) if s > top}
    return min(sizes) if sizes else top + 1


def is_index(v: Any) -> bool:
    """Whether an array may hold indices, labels or lengths."""
    return hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.integer) and np.size(v) > 0


def resampled(args: Sequence[Any], seed: int = 0, scale: float | None = None) -> Variant:
    """Generic values of the same shapes, and of the same scale or of the one given."""
    layout, floating, fixed = split(tuple(args), {})
    rng = np.random.default_rng([seed, 41])
    traits = {n: Trait.of(v) for n, v in floating.items()}
    if scale is not None:
        traits = {n: t._replace(scale=scale) for n, t in traits.items()}
    new = {n: _cast(t.draw(floating[n].shape, rng), floating[n]) for n, t in traits.items()}
    return Variant("generic values", "generic", rebuilt(layout, new, fixed))


def unrestricted(args: Sequence[Any], seed: int = 0) -> tuple:
    """Normal values, whatever those seen have in common."""
    layout, floating, fixed = split(tuple(args), {})
    rng = np.random.default_rng([seed, 53])
    new = {n: _cast(rng.standard_normal(v.shape), v) for n, v in floating.items()}
    return rebuilt(layout, new, fixed)


def _cast(values: np.ndarray, like: Any) -> jax.Array:
    with np.errstate(all="ignore"):  # by numpy, which compiles nothing
        return jnp.asarray(np.asarray(values).astype(like.dtype))


def revalued(args: Sequence[Any], seed: int = 0) -> Iterator[Variant]:
    """Other values at the same shapes, from the ordinary to the extreme."""
    layout, floating, fixed = split(tuple(args), {})
    rng = np.random.default_rng([seed, 43])
    traits = {n: Trait.of(v) for n, v in floating.items()}
    base = {n: _cast(t.draw(floating[n].shape, rng), floating[n]) for n, t in traits.items()}

    def made(new, ints=fixed):
        return rebuilt(layout, new, ints)

    yield Variant("generic values", "generic", made(base))
    yield from _whole(floating, fixed, base, made, rng)
    for regime, what, change in EDGES:
        if regime == "negative" and len(traits) > 1:
            continue  # a variance or a rate is positive for a reason
        changed = {
            n: _cast(new, base[n])
            for n, t in traits.items()
            if "complex" not in t.kinds
            and (new := change(np.asarray(base[n], np.float64), t, rng)) is not None
        }
        if len(changed) > 1:
            for n in list(changed)[:5]:
                alone = base | {n: changed[n]}
                yield Variant(f"{what} in {n}", regime, made(alone))
        # Two arguments that are large together are further out than either.
        if changed and not (len(changed) > 1 and regime in ("large", "offset")):
            yield Variant(what, regime, made(base | changed))


def _whole(
    floating: dict, fixed: list, base: dict, made: Callable, rng: np.random.Generator
) -> Iterator[Variant]:
    """Integers and booleans: ends, repeats, permutations; all, none, one row."""
    for k, v in enumerate(fixed):
        if is_index(v):
            for what, regime, new in _integers(np.asarray(v), floating, rng):
                ints = [*fixed[:k], jnp.asarray(new, v.dtype), *fixed[k + 1 :]]
                yield Variant(f"integers {what}", regime, made(base, ints))
        elif getattr(v, "dtype", None) == jnp.bool_:
            v = np.asarray(v)
            row = np.array(v) | True
            if v.ndim:
                row[(0,) * max(v.ndim - 1, 1)] = False
            masks = {
                "random": rng.random(v.shape) < 0.6,
                "all true": v | True,
                "one row false": row,
                "all false": v & False,
            }
            for what, new in masks.items():
                yield Variant(
                    f"booleans {what}",
                    "mask",
                    made(base, [*fixed[:k], jnp.asarray(new), *fixed[k + 1 :]]),
                )


def _integers(
    v: np.ndarray, floating: dict, rng: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Other integers in the place of an index, a label, a length."""
    low, bound = _range(v, floating)
    if yes_or_no(v):
        yield "random", "generic", _random(v, v.shape, bound, rng)
        yield "at the lower end", "index", np.full_like(v, low)
        yield "at the upper end", "index", np.full_like(v, bound - 1)
        return
    if v.size <= bound - low and v.size > 1:
        distinct = low + rng.permutation(bound - low)[: v.size].reshape(v.shape)
        yield "all different", "generic", distinct
    repeats = np.unique(v).size < v.size
    random = _random(v, v.shape, bound, rng)
    yield "random", "generic" if repeats or v.size == 1 else "repeated", random
    if v.size > 1:
        yield "permuted", "generic", rng.permutation(v.ravel()).reshape(v.shape)
        yield "repeated", "repeated", np.full_like(v, min(1, bound - 1))
    yield "at the lower end", "index", np.full_like(v, low)
    yield "at the upper end", "index", np.full_like(v, bound - 1)


def yes_or_no(v: np.ndarray) -> bool:
    """Whether integers are labels 0 and 1, or -1 and 1, rather than indices."""
    seen = np.unique(v)
    return v.size > 1 and seen.size <= 2 and bool(np.all(np.isin(seen, (-1, 0, 1))))


def _range(v: np.ndarray, floating: dict[str, Any]) -> tuple[int, int]:
    """The integers that may be meant: the lowest, and one more than the highest."""
    if yes_or_no(v):
        return int(v.min(initial=0)), 2
    return max(min(int(v.min()), 0), -1), _bound(v, floating)


def _random(
    v: np.ndarray, shape: tuple[int, ...], bound: int, rng: np.random.Generator
) -> np.ndarray:
    """Integers like those of v in another shape."""
    if yes_or_no(v) and int(v.min()) == -1:
        return rng.choice(np.unique(v), shape)
    low = max(min(int(v.min()), 0), -1)
    return rng.integers(low, max(bound, low + 1), shape)


def _scaled(factor: float) -> Callable:
    def change(v, trait, rng):
        if trait.kinds & {"simplex", "sphere", "binary", "complex", "unit", "sorted"}:
            return None
        return v * factor

    return change


def _spread(factor: float) -> Callable:
    """Times a factor, for arrays whose values are free."""

    def change(v, trait, rng):
        return v * factor if trait.free() and "scalar" not in trait.kinds else None

    return change


def _zeros(v, trait, rng):
    if not trait.free() or trait.kinds >= {"scalar", "positive"}:
        return None
    return np.zeros_like(v)


def _some_zeros(v, trait, rng):
    if not trait.free() or v.size < 2:
        return None
    return np.where(rng.random(v.shape) < 0.4, 0.0, v)


def _one_at(end: float) -> Callable:
    def change(v, trait, rng):
        if "unit" not in trait.kinds or not trait.free() or v.size < 2:
            return None
        new = v.copy()
        new.flat[v.size // 2] = end
        return new

    return change


def _multiple_of_identity(v, trait, rng):
    if v.ndim < 2 or v.shape[-1] != v.shape[-2] or "complex" in trait.kinds:
        return None
    if not trait.kinds & {"symmetric", "definite"}:
        return None
    return np.broadcast_to(1.5 * np.eye(v.shape[-1]), v.shape).copy()


def _infinite_row(v, trait, rng):
    if "infinite" not in trait.kinds or v.ndim < 2:
        return None
    new = v.copy()
    new[(0,) * (v.ndim - 1)] = -np.inf
    return new


def _zero_row(v, trait, rng):
    if not trait.free() or v.ndim < 2 or "positive" in trait.kinds:
        return None
    new = v.copy()
    new[(0,) * (v.ndim - 1)] = 0.0
    return new


def _ties(v, trait, rng):
    if not trait.free() or v.size < 2:
        return None
    return np.round(v / trait.scale) * trait.scale


def _equal(v, trait, rng):
    if not trait.free() or v.size < 2 or "sorted" in trait.kinds:
        return None
    return np.full_like(v, v.flat[0])


def _mirrored(v, trait, rng):
    if not trait.free() or "scalar" in trait.kinds or v.size < 2:
        return None
    return -v


def _offset(v, trait, rng):
    if not trait.free() or "scalar" in trait.kinds or trait.kinds & {"unit", "bounded"}:
        return None
    return v + 30.0 * min(trait.scale, 10.0)


def _asymmetric(v, trait, rng):
    if "symmetric" not in trait.kinds or "definite" in trait.kinds:
        return None  # a covariance is symmetric for a reason
    return v + 0.2 * np.abs(v).max() * np.triu(rng.standard_normal(v.shape), 1)


def _one_infinite(sign: float) -> Callable:
    def change(v, trait, rng):
        if not trait.free() or v.size < 3 or trait.kinds & {"positive", "sorted", "unit"}:
            return None
        new = v.copy()
        new.flat[v.size // 2] = sign * np.inf
        return new

    return change


EDGES: tuple[tuple[str, str, Callable], ...] = (
    ("factor", "other factors", _scaled(1.7)),
    ("negative", "signs turned", _mirrored),
    ("asymmetric", "matrices without symmetry", _asymmetric),
    ("zero", "zeros among the values", _some_zeros),
    ("tie", "ties", _ties),
    ("zero", "all zero", _zeros),
    ("zero", "a row of zeros", _zero_row),
    ("zero", "one value 0", _one_at(0.0)),
    ("zero", "one value 1", _one_at(1.0)),
    ("tie", "all equal", _equal),
    ("tie", "a multiple of the identity", _multiple_of_identity),
    ("large", "values 8 times as large", _spread(8.0)),
    ("large", "values 60 times as large", _spread(60.0)),
    ("large", "values 1,000 times as large", _spread(1e3)),
    ("tiny", "values 1,000 times as small", _spread(1e-3)),
    ("tiny", "values 1e-8 times as large", _spread(1e-8)),
    ("offset", "values far from 0 beside their spread", _offset),
    ("infinite", "one value -inf", _one_infinite(-1.0)),
    ("infinite", "one value inf", _one_infinite(1.0)),
    ("infinite", "a row of -inf", _infinite_row),
)


def usual(args: Sequence[Any]) -> bool:
    """Whether all values are of the sizes that are drawn."""
    _, floating, _ = split(tuple(args), {})
    return all(1e-3 <= Trait.of(v).scale <= 30 for v in floating.values())


def recast(args: Sequence[Any], dtype: str) -> Variant | None:
    """The arguments with their real floating arrays in another precision."""
    layout, floating, fixed = split(tuple(args), {})
    real = {n: v for n, v in floating.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if not real or any(v.dtype == np.float64 for v in real.values()):
        return None
    if all(v.dtype == jnp.dtype(dtype) for v in real.values()):
        return None
    new = floating | {n: _retyped(v, jnp.dtype(dtype)) for n, v in real.items()}
    return Variant(f"values in {dtype}", dtype, rebuilt(layout, new, fixed))


def _retyped(v: Any, dtype: Any) -> jax.Array:
    """Values in another type; in a wider one with digits that the narrower did not hold."""
    values, eps = np.asarray(v), float(jnp.finfo(v.dtype).eps)
    if float(jnp.finfo(dtype).eps) < eps and Trait.of(v).free():
        digits = np.random.default_rng([v.size, 61]).standard_normal(v.shape)
        values = values.astype(np.float64) * (1 + eps / 4 * digits)
    with np.errstate(all="ignore"):
        return jnp.asarray(values.astype(dtype))


class _Axes:
    """The axes of all arrays; those of one size go together unless told otherwise."""

    def __init__(self, args: Sequence[Any], accepts: Callable[[tuple], bool]):
        self.layout, self.floating, self.fixed = split(tuple(args), {})
        self.accepts = accepts
        self.traits = {n: Trait.of(v) for n, v in self.floating.items()}
        arrays: list[tuple[Any, Any]] = [*self.floating.items()]
        arrays += [(k, v) for k, v in enumerate(self.fixed) if _resizable(v)]
        self.places: list[tuple[Any, int, int]] = [
            (n, axis, size) for n, v in arrays for axis, size in enumerate(v.shape)
        ]
        self.sizes = sorted({s for *_, s in self.places if s > 1}, reverse=True)

    def made(self, sizes: dict[Any, int], seed: int) -> tuple | None:
        """Arguments with some axes, (array, axis), resized; None where the function refuses."""
        rng = np.random.default_rng([seed, 47])

        def shape(n: Any, v: Any) -> Any:
            return tuple(sizes.get((n, axis), s) for axis, s in enumerate(v.shape))

        floating = {
            n: _cast(self.traits[n].draw(shape(n, v), rng), v) for n, v in self.floating.items()
        }
        fixed = list(self.fixed)
        for k, v in enumerate(self.fixed):
            if not _resizable(v):
                continue
            old = np.asarray(v)
            if is_index(v):
                _, bound = _range(old, self.floating)
                held = [sizes.get((n, a), s) for n, a, s in self.places if s == bound]
                bound = min(held) if held and not yes_or_no(old) else bound
                new = _random(old, shape(k, v), bound, rng)
            else:
                new = rng.random(shape(k, v)) < max(0.5, float(np.mean(old)))
            fixed[k] = jnp.asarray(new, old.dtype)
        args = rebuilt(self.layout, floating, fixed)
        return args if self.accepts(args) else None

    def of_size(self, size: int) -> list[tuple]:
        return [(n, axis) for n, axis, s in self.places if s == size]


def _resizable(v: Any) -> bool:
    return (
        hasattr(v, "dtype")
        and (jnp.issubdtype(v.dtype, jnp.integer) or v.dtype == jnp.bool_)
        and np.ndim(v) > 0
    )


def _accepts(primal: Callable) -> Callable[[tuple], bool]:
    def accepts(args):
        layout, floating, fixed = split(tuple(args), {})
        try:
            jax.eval_shape(lambda fl, fx: layout.call(primal, fl, fx), floating, fixed)
        except Exception:
            return False
        return True

    return accepts


def shrunk(args: Sequence[Any], primal: Callable) -> tuple:
    """Arguments with few elements, where the function takes them; else the same."""
    _, floating, fixed = split(tuple(args), {})
    if sum(np.size(v) for v in [*floating.values(), *fixed]) <= SMALL:
        return tuple(args)
    axes = _Axes(args, _accepts(primal))
    for choice in (ODD, (4, 6, 8, 12, 16), (8, 4, 2, 16)):
        big = [s for s in axes.sizes if s > 8]
        sizes = {}
        for size, small in zip(big, itertools.cycle(choice), strict=False):
            sizes |= dict.fromkeys(axes.of_size(size), small)
        new = axes.made(sizes, 5)
        if new is not None:
            return new
    for size in axes.sizes:  # at least the longest axes that can be shortened alone
        new = axes.made(dict.fromkeys(axes.of_size(size), 4), 5)
        if new is not None:
            return new
    return tuple(args)


def lengthened(args: Sequence[Any], primal: Callable) -> tuple:
    """Arguments whose axes of length 1 are longer, where the function takes them; else the same."""
    axes = _Axes(args, _accepts(primal))
    ones = axes.of_size(1)
    for places in (ones, *([place] for place in ones[:4])) if ones else ():
        new = axes.made(dict.fromkeys(places, 3), 6)
        if new is not None:
            return new
    return tuple(args)


def smaller(args: Sequence[Any], primal: Callable) -> Iterator[Variant]:
    """Fewer elements, where the function takes them: axes of length 2, then 3."""
    axes = _Axes(args, _accepts(primal))
    count = sum(np.size(v) for v in jax.tree.leaves(tuple(args)))
    for length in (2, 3):
        long = {(n, axis): length for n, axis, size in axes.places if size > length}
        new = axes.made(long, 11) if long else None
        if new is not None and sum(np.size(v) for v in jax.tree.leaves(new)) < count:
            yield Variant("fewer elements", "generic", new)


def reshaped(args: Sequence[Any], primal: Callable) -> Iterator[Variant]:
    """Other shapes: odd and all different, length 1, longer, empty."""
    axes = _Axes(args, _accepts(primal))
    sizes = axes.sizes
    seen: set[tuple] = set()

    def variant(what, regime, change, seed):
        key = tuple(sorted((str(k), v) for k, v in change.items()))
        if key in seen:
            return None
        seen.add(key)
        new = axes.made(change, seed)
        return None if new is None else Variant(what, regime, new)

    def all_of(choice):
        change = {}
        for size, small in zip(sizes, itertools.cycle(choice), strict=False):
            change |= dict.fromkeys(axes.of_size(size), small)
        return change

    found = [variant("odd lengths, all different", "shape", all_of(ODD), 1)]
    for size in sizes[:4]:
        found += _split_squares(axes, size, variant)
    for size in sizes[:4]:
        places = axes.of_size(size)
        found.append(variant(f"length 1 for {size}", "one", dict.fromkeys(places, 1), 2))
        for step in (1, size + 3):
            longer = dict.fromkeys(places, size + step)
            found.append(variant(f"length {size + step} for {size}", "shape", longer, 3))
    ones = axes.of_size(1)
    if ones:
        found.append(variant("length 3 for 1", "shape", dict.fromkeys(ones, 3), 6))
        for place in ones[:4]:
            found.append(variant("length 3 for 1", "shape", {place: 3}, 7))
    for size in sizes[:1]:
        found.append(variant("a long axis", "long", dict.fromkeys(axes.of_size(sizes[0]), 700), 8))
        found.append(variant("an empty axis", "empty", dict.fromkeys(axes.of_size(size), 0), 9))
    yield from (v for v in found if v is not None)


def _split_squares(axes: _Axes, size: int, variant: Callable) -> list[Variant | None]:
    """Axes of one size that need not be: a square weight made oblong."""
    places = axes.of_size(size)
    if not 2 <= len(places) <= 7:
        return []
    found = []
    for r in range(1, len(places)):
        for subset in itertools.combinations(places, r):
            if len({n for n, _ in subset}) < min(2, r):
                continue
            new = variant("oblong instead of square", "oblong", dict.fromkeys(subset, size + 2), 10)
            if new is not None:
                found.append(new)
            if len(found) >= 3:
                return found
    return found
