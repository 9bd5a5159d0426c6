"""Sliding windows over the spatial axes of [..., *spatial, features], as pooling rules need them.

XLA's own reduce_window and select_and_scatter walk the windows one by one on a CPU. Whole arrays
move faster: the windows' first elements are one strided slice of the input, their second elements
another. And what flows back to an input element comes from few windows, at known distances.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcbp.core import InputError
from funcbp.ops._buffers import scan

Padding = str | tuple[tuple[int, int], ...]
PADDINGS = ("SAME", "SAME_LOWER", "VALID")
# More positions than this make too long a program: then reduce_window does the work.
MOST_TAPS = 64
# How many elements a CPU takes at a time where it needs a padded copy: they stay in its cache.
PART = 2**18


class Windows(NamedTuple):
    """Where the windows lie; every field has one entry per spatial axis."""

    size: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def count(self) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        return tuple(
            max(0, (n + low + high - k) // s + 1)
            for n, k, s, (low, high) in zip(*self, strict=True)
        )

    @property
    def short(self) -> bool:
        """Whether to unroll: there are windows, and not too many positions inside one."""
        return 0 < math.prod(self.shape) <= MOST_TAPS and 0 not in self.count

    def full(self, lead: int) -> tuple:
        """`(shape, strides, pads)` for all axes, `lead` of them before the spatial ones."""
        one, none = (1,) * lead, ((0, 0),) * lead
        return (
            (*one, *self.shape, 1),
            (*one, *self.strides, 1),
            (*none, *self.pads, (0, 0)),
        )


def windows(
    x_shape: tuple[int, ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    padding: Padding,
) -> Windows:
    """The windows of that shape over the last axes but one of an array of shape `x_shape`."""
    size = x_shape[-1 - len(shape) : -1]
    strides = strides or (1,) * len(shape)
    named = isinstance(padding, str)
    pads = lax.padtype_to_pads(size, shape, strides, padding) if named else padding
    return Windows(size, shape, strides, tuple((int(low), int(high)) for low, high in pads))


def shape_only(x: Array) -> Array:
    """An array of no bytes, [0, *x.shape], in x's dtype: for rules that need no more of x."""
    return jnp.zeros((0, *x.shape), x.dtype)


def check_windows(name: str, x: Array, shape, strides, padding) -> None:
    """Raises if window shape, strides and padding do not fit x or each other."""
    k = len(shape)
    if k < 1 or x.ndim < k + 1:
        raise InputError(
            f"{name} must have an axis for each entry of window_shape {shape} and then one of "
            f"features, got shape {x.shape}; give one window size per spatial axis"
        )
    for setting, entries in (("window_shape", shape), ("strides", strides or (1,) * k)):
        if len(entries) != k or any(n < 1 for n in entries):
            raise InputError(
                f"{setting} must be {k} positive numbers, one per spatial axis, got {entries}"
            )
    check_padding(padding, k)


def check_places(x: Array) -> None:
    """Raises if x is not [batch, *spatial, features] with at least one place."""
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise InputError(
            "x must be [batch, *spatial, features] with at least one spatial axis, none of size 0, "
            f"got shape {x.shape}; add the axis that is missing, as in x[None]"
        )


def check_padding(padding: Padding, k: int) -> None:
    """Raises if the padding is neither a known name nor k pairs."""
    if isinstance(padding, str):
        fits = padding in PADDINGS
    else:
        fits = [len(p) for p in padding] == [2] * k and all(n >= 0 for p in padding for n in p)
    if not fits:
        raise InputError(
            f"padding must be one of {', '.join(PADDINGS)}, or a tuple of {k} pairs (before, "
            f"after) of numbers from 0, one per spatial axis, got {padding!r}"
        )


def in_parts(f: Callable, w: Windows, *arrays: Array) -> Array:
    """`f(*arrays)`, on a CPU a few examples at a time where f pads: copies then stay small.

    The arrays, and f's result, are [..., *spatial, features].
    """
    axes = len(w.shape) + 1
    outer = arrays[0].shape[:-axes]
    size = max(math.prod(a.shape[-axes:]) for a in arrays)
    batch = math.prod(outer)
    part = next((n for n in range(PART // max(size, 1), 1, -1) if batch % n == 0), 1)
    if part >= batch or not any(map(any, w.pads)):
        return f(*arrays)

    def one_by_one(*arrays):
        group = (batch // part, part) if part > 1 else (batch,)
        grouped = [a.reshape(*group, *a.shape[-axes:]) for a in arrays]
        _, y = scan(lambda _, several: (None, f(*several)), None, grouped)
        return y.reshape(*outer, *y.shape[-axes:])

    # Elsewhere all examples at once: a loop over them would idle most of the device.
    return lax.platform_dependent(*arrays, cpu=one_by_one, default=f)


def taps(x: Array, w: Windows, fill: float) -> list[Array]:
    """For each position inside a window, in row-major order, the elements there: [..., count, c].

    Padding holds `fill`.
    """
    lead = x.ndim - len(w.shape) - 1
    shape, strides, pads = w.full(lead)
    if any(low or high for low, high in pads):
        x = lax.pad(x, jnp.asarray(fill, x.dtype), [(low, high, 0) for low, high in pads])
    counts = (*x.shape[:lead], *w.count, x.shape[-1])
    return [
        lax.slice(x, at, _ends(at, counts, strides), strides)
        for at in itertools.product(*map(range, shape))
    ]


def _ends(starts, counts, strides):
    return [
        a + (n - 1) * s + 1 if n else a for a, n, s in zip(starts, counts, strides, strict=True)
    ]


def gather(term: Callable, w: Windows, *arrays: tuple[Array, float]) -> Array:
    """For each input element the sum, over the windows that hold it, of what they send to it.

    An element at q s + r (padding included, s the stride, r < s) lies in window q - j at position
    r + s j, for the j that keep the position inside the window. So the input is cut into rows of s,
    and each j is one shift of the windows.

    Args:
      term: `term(position, *values)`: what windows send to their element at that row-major
        position; the values are those of the arrays at the windows.
      w: the windows.
      *arrays: pairs of an array [..., count, c] and what it shall hold for windows that are not.

    Returns:
      [..., size, c].
    """
    lead, k = arrays[0][0].ndim - len(w.shape) - 1, len(w.shape)
    reach = [-(-n // s) for n, s in zip(w.shape, w.strides, strict=True)]
    cuts = [-(-(n + low) // s) for n, (low, _), s in zip(w.size, w.pads, w.strides, strict=True)]
    outer, c = arrays[0][0].shape[:lead], arrays[0][0].shape[-1]
    cut_shape = (*outer, *itertools.chain(*zip(cuts, w.strides, strict=True)), c)
    rows = (*range(lead), *range(lead, lead + 2 * k, 2), lead + 2 * k)
    margins = [
        *[(0, 0, 0)] * lead,
        *[(j - 1, q - n, 0) for j, q, n in zip(reach, cuts, w.count, strict=True)],
        (0, 0, 0),
    ]
    framed = [lax.pad(a, jnp.asarray(fill, a.dtype), margins) for a, fill in arrays]
    residues = [
        lax.broadcasted_iota(jnp.int32, cut_shape, lead + 2 * i + 1).astype(_small(w))
        for i in range(k)
    ]

    def sent(shift):
        starts = (*[0] * lead, *[n - 1 - j for n, j in zip(reach, shift, strict=True)], 0)
        ends = (*outer, *[a + q for a, q in zip(starts[lead:-1], cuts, strict=True)], c)
        values = [lax.broadcast_in_dim(lax.slice(a, starts, ends), cut_shape, rows) for a in framed]
        position, inside = jnp.zeros((), _small(w)), True
        for r, n, s, j in zip(residues, w.shape, w.strides, shift, strict=True):
            position = position * n + (r + s * j)
            if s * (j + 1) > n:
                inside &= r + s * j < n
        value = term(position, *values)
        return value if inside is True else jnp.where(inside, value, 0)

    merged = total([sent(shift) for shift in itertools.product(*map(range, reach))])
    merged = merged.reshape(*outer, *[q * s for q, s in zip(cuts, w.strides, strict=True)], c)
    lows = (*[0] * lead, *[low for low, _ in w.pads], 0)
    ends = (*outer, *[low + n for n, (low, _) in zip(w.size, w.pads, strict=True)], c)
    return lax.slice(merged, lows, ends)


def _small(w: Windows):
    """A dtype for positions: narrow, because they are written out once per window."""
    return jnp.int8 if math.prod(w.shape) + max(w.strides) < 128 else jnp.int32


def maximum(x: Array, w: Windows) -> Array:
    """The largest element of each window, nan if there is one."""
    best, *others = taps(x, w, -jnp.inf)
    for v in others:
        # Not jnp.maximum, whose own derivative would share a tie.
        best = jnp.where(_beats(v, best), v, best)
    return best


def first_maximum(x: Array, w: Windows) -> Array:
    """The position of that element; of equal elements the first."""
    best, *others = taps(x, w, -jnp.inf)
    at = jnp.zeros(best.shape, _small(w))
    for i, v in enumerate(others, 1):
        better = _beats(v, best)
        best, at = jnp.where(better, v, best), jnp.where(better, jnp.asarray(i, at.dtype), at)
    return at


def _beats(v, best):
    return (v > best) | (v != v)


def total(terms: Sequence[Array]) -> Array:
    """The sum of the terms, in their order."""
    result, *rest = terms
    for t in rest:
        result = result + t
    return result
