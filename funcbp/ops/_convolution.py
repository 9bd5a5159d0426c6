"""The three bilinear maps of a convolution: x is [batch, *spatial, i], kernels [*spatial, i, o].

    y_po = sum_ki x'_(p s + k d - low)i w_kio        x'_(q e) = x_q, and 0 between and outside

with strides s, the kernel's dilation d and the input's own, e. Each map is again a convolution:
with respect to x one of dy, where s and e change places and the kernel is turned round, and with
respect to w one of x with dy, where s and d change places and the batch is what is summed over.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcbp.core import InputError
from funcbp.ops._numeric import rows, wide

Numbers = int | tuple[int, ...]
# A CPU takes the weight gradient of this many examples at a time, in so many parts at most; ...
EXAMPLES, MOST_PARTS = 16, 8
# ... and of so many input channels of a grouped kernel.
CHANNELS, MOST_BLOCKS = 64, 16


class Geometry(NamedTuple):
    """How kernel and input meet; every field but the last has one entry per spatial axis."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    stretch: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def per_axis(n: Numbers, axes: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    return (n,) * axes if isinstance(n, int) else tuple(n)


def promoted(*arrays: Array) -> list[Array]:
    """The arrays in their promoted dtype, as lax wants them."""
    dtype = jnp.result_type(*arrays)
    return [a.astype(dtype) for a in arrays]


def convolve(x: Array, w: Array, g: Geometry, dtype: Any = None) -> Array:
    """y, in `dtype`, or that of x and w."""
    return lax.conv_general_dilated(
        x,
        w,
        g.strides,
        g.pads,
        lhs_dilation=g.stretch,
        rhs_dilation=g.dilation,
        dimension_numbers=_numbers(x.ndim, "N_C", "_IO", "N_C"),
        feature_group_count=g.groups,
        preferred_element_type=dtype,
    )


def convolved(x: Array, w: Array, b: Array | None, g: Geometry) -> Array:
    """y + b: summed in float32 or wider, in the promoted dtype of the three."""
    dtype = jnp.result_type(x, w) if b is None else jnp.result_type(x, w, b)
    x, w = promoted(x, w)
    y = convolve(x, w, g, _accumulator(x))
    return (y if b is None else y + wide(b)).astype(dtype)


def pullback(
    x: Array, w: Array, b: Array | None, dy: Array, g: Geometry
) -> tuple[Array | None, Array | None, Array | None]:
    """The cotangents of (x, w, b)."""
    if 0 in (*dy.shape, *x.shape, *w.shape):
        return None, None, None if b is None else jnp.zeros_like(b)
    db = None if b is None else jnp.sum(rows(wide(dy)), axis=0)
    return input_gradient(w, dy, g, x.shape), weight_gradient(x, dy, g, w.shape), db


def _accumulator(*arrays: Array):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _numbers(ndim: int, x: str, w: str, y: str) -> tuple[str, str, str]:
    """lax's names of the axes, with the spatial ones in place of _."""
    spatial = "DHW"[5 - ndim :]
    return x.replace("_", spatial), w.replace("_", spatial), y.replace("_", spatial)


def transposed(g: Geometry, kernel: Sequence[int], x: Sequence[int], y: Sequence[int]) -> Geometry:
    """The geometry of dy -> dx, for the spatial sizes of kernel, x and y."""
    pads = []
    for k, n, m, s, (low, _), e, d in zip(
        kernel, x, y, g.strides, g.pads, g.stretch, g.dilation, strict=True
    ):
        before = (k - 1) * d - low
        pads.append((before, (n - 1) * e - (m - 1) * s + (k - 1) * d - before))
    return Geometry(g.stretch, tuple(pads), g.strides, g.dilation, g.groups)


def turned(w: Array, groups: int) -> Array:
    """The kernel of dy -> dx: turned round in space, with in and out exchanged in each group."""
    *kernel, i, o = w.shape
    w = jnp.flip(w, range(len(kernel))).reshape(*kernel, i, groups, o // groups)
    return jnp.swapaxes(w, -3, -1).reshape(*kernel, o // groups, groups * i)


def input_gradient(w: Array, dy: Array, g: Geometry, shape: Sequence[int]) -> Array:
    """dx_q = sum_ko dy'_(q e + k d - low')o w_(K - k)o, for x of that shape."""
    w, dy = promoted(w, dy)
    back = transposed(g, w.shape[:-2], shape[1:-1], dy.shape[1:-1])
    return convolve(dy, turned(w, g.groups), back, _accumulator(dy))


def weight_gradient(x: Array, dy: Array, g: Geometry, shape: Sequence[int]) -> Array:
    """dw_kio = sum_bp x'_b(p s + k d - low)i dy_bpo, for w of that shape."""

    def by_library(x, dy):
        return correlate(x, dy, g, shape)

    def on_cpu(x, dy):
        if g.groups > 1:
            return _in_blocks(x, dy, g, shape)
        if max(g.stretch) > 1 == max(g.strides):
            # A kernel with holes, x, over a whole dy: the other way round costs more.
            kernel = shape[:-2]
            back = transposed(g, kernel, x.shape[1:-1], dy.shape[1:-1])
            return turned(_in_parts(dy, x, back, (*kernel, shape[-1], shape[-2])), 1)
        return _in_parts(x, dy, g, shape)

    x, dy = promoted(x, dy)
    return lax.platform_dependent(x, dy, cpu=on_cpu, default=by_library)


def _in_parts(x: Array, dy: Array, g: Geometry, shape: Sequence[int]) -> Array:
    """The weight gradient, a few examples at a time: a long batch slows XLA's convolution."""
    if math.prod(shape[:-2]) == 1 and g.pads == ((0, 0),) * len(g.pads) and max(g.stretch) == 1:
        ends = [(m - 1) * s + 1 for m, s in zip(dy.shape[1:-1], g.strides, strict=True)]
        met = lax.slice(x, [0] * x.ndim, [len(x), *ends, x.shape[-1]], [1, *g.strides, 1])
        dw = jnp.matmul(rows(met).T, rows(dy), preferred_element_type=_accumulator(x))
        return dw.reshape(shape)
    most = min(MOST_PARTS, -(-len(x) // EXAMPLES))
    parts = next(n for n in range(most, 0, -1) if len(x) % n == 0)
    terms = [
        correlate(x, dy, g, shape)
        for x, dy in zip(jnp.split(x, parts), jnp.split(dy, parts), strict=True)
    ]
    return sum(terms[1:], terms[0])


def correlate(x: Array, dy: Array, g: Geometry, shape: Sequence[int]) -> Array:
    sizes = zip(shape, x.shape[1:-1], dy.shape[1:-1], *g[:4], strict=False)
    pads = [
        (low, (m - 1) * s + (k - 1) * d - (n - 1) * e - low) for k, n, m, s, (low, _), e, d in sizes
    ]
    return lax.conv_general_dilated(
        x,
        dy,
        g.dilation,
        pads,
        lhs_dilation=g.stretch,
        rhs_dilation=g.strides,
        dimension_numbers=_numbers(x.ndim, "C_N", "I_O", "_NC"),
        batch_group_count=g.groups,
        preferred_element_type=_accumulator(x),
    )


def _in_blocks(x: Array, dy: Array, g: Geometry, shape: Sequence[int]) -> Array:
    """The weight gradient of a grouped kernel, from that of a dense one for each block of groups.

    XLA's grouped form is slow on a CPU. The dense form also has the products across groups, which
    are left out afterwards: of a block they are few enough.
    """
    *kernel, i, o = shape
    groups, o = g.groups, o // g.groups
    least = max(CHANNELS // i, -(-groups // MOST_BLOCKS), 1)
    size = next(n for n in range(min(least, groups), groups + 1) if groups % n == 0)
    dense = g._replace(groups=1)
    own = jnp.arange(size)
    blocks = []
    for first in range(0, groups, size):
        part = x[..., first * i : (first + size) * i], dy[..., first * o : (first + size) * o]
        dw = _in_parts(*part, dense, (*kernel, size * i, size * o))
        dw = dw.reshape(*kernel, size, i, size, o)
        # Of [group in, i, group out, o] the diagonal: the axis of groups comes first.
        blocks.append(jnp.moveaxis(dw, (-4, -2), (0, 1))[own, own])
    dw = jnp.moveaxis(jnp.concatenate(blocks), 0, -2)
    return dw.reshape(*kernel, i, groups * o)


def check_convolution(x, w, b, groups: int, **settings: Numbers) -> None:
    """Raises if the shapes, or settings with one number a spatial axis, do not fit each other."""
    if not 3 <= x.ndim <= 5 or w.ndim != x.ndim:
        raise InputError(
            "x must be [batch, *spatial, features] and w [*kernel, features in, out] with the same "
            f"1, 2 or 3 spatial axes, got x of shape {x.shape} and w of shape {w.shape}; add the "
            "axis that is missing, as in x[None]"
        )
    if groups < 1 or w.shape[-1] % groups or x.shape[-1] != groups * w.shape[-2]:
        raise InputError(
            f"x must have groups * w.shape[-2] = {groups * w.shape[-2]} features, and w a multiple "
            f"of groups = {groups} of them on its last axis, got x of shape {x.shape} and w of "
            f"shape {w.shape}; check which layer feeds this one"
        )
    check_bias(b, w.shape[-1])
    for name, n in settings.items():
        entries = per_axis(n, x.ndim - 2)
        if len(entries) != x.ndim - 2 or any(n < 1 for n in entries):
            raise InputError(
                f"{name} must be a positive number, or {x.ndim - 2} of them, one per spatial axis, "
                f"got {n}"
            )


def check_bias(b, features: int) -> None:
    """Raises if b is not one number for each output feature."""
    if b is not None and b.shape != (features,):
        raise InputError(
            f"b must have shape {(features,)}, one number for each output feature of w, got "
            f"{b.shape}; pass b=None for no bias"
        )
