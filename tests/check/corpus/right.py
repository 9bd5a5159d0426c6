"""Custom rules that look suspicious and are right; each entry says what looks wrong and is not."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from .entry import Fine

ENTRIES: list[Fine] = []
BF16, F16 = jnp.bfloat16, jnp.float16
INF = math.inf


def add(f, why, *calls, name=None):
    ENTRIES.append(Fine(name or f.__name__, f, calls, why))


def saves(f):
    """The forward rule that keeps the arguments."""
    return lambda *args: (f(*args), args)


def summed_to(like, d):
    """The cotangent of an argument that was broadcast to the shape of d."""
    lead = d.ndim - jnp.ndim(like)
    d = jnp.sum(d, axis=tuple(range(lead)))
    stretched = tuple(i for i, n in enumerate(jnp.shape(like)) if n == 1 and d.shape[i] != 1)
    return jnp.sum(d, axis=stretched, keepdims=True)


def zeros_of(integers):
    """The cotangent of an integer argument."""
    return np.zeros(np.shape(integers), jax.dtypes.float0)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(seed, *shape, low=0.1, high=0.9, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), dtype)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def bools(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.6)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


def vector(*values, dtype=jnp.float32):
    return jnp.asarray(values, dtype)


def cplx(seed, *shape):
    return jax.lax.complex(normal(seed, *shape), normal(seed + 5000, *shape))


def full(value, *shape):
    return jnp.full(shape, value, jnp.float32)


def symmetric(seed, n):
    a = normal(seed, n, n)
    return a + a.T


def definite(seed, n):
    a = normal(seed, n, n)
    return a @ a.T / n + jnp.eye(n, dtype=jnp.float32)


def hilbert(n):
    i = jnp.arange(n, dtype=jnp.float32)
    return 1 / (i[:, None] + i[None, :] + 1)


# --- a kink: anything between the slopes of its sides is a subgradient


@jax.custom_vjp
def relu_slope_zero(x):
    return jnp.maximum(x, 0)


def relu_slope_zero_bwd(x, g):
    return (jnp.where(x > 0, g, 0),)


relu_slope_zero.defvjp(lambda x: (relu_slope_zero(x), x), relu_slope_zero_bwd)
add(
    relu_slope_zero,
    "slope 0 at 0, where autodiff says 1/2",
    (normal(1, 5, 7),),
    (vector(-1, 0, 0, 2, -0.0),),
)


@jax.custom_jvp
def relu_slope_half(x):
    return jnp.where(x > 0, x, 0)


@relu_slope_half.defjvp
def relu_slope_half_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu_slope_half(x), dx * jnp.heaviside(x, 0.5)


add(
    relu_slope_half,
    "slope 1/2 at 0, where autodiff says 0",
    (normal(2, 5, 7),),
    (full(0, 4),),
)


@jax.custom_vjp
def relu_slope_one(x):
    return jax.nn.relu(x)


def relu_slope_one_bwd(x, g):
    return (jnp.where(x >= 0, g, 0),)


relu_slope_one.defvjp(lambda x: (relu_slope_one(x), x), relu_slope_one_bwd)
add(
    relu_slope_one,
    "slope 1 at 0, where autodiff says 0",
    (normal(3, 5, 7),),
    (vector(-1, 0, 0, 2),),
)


@jax.custom_vjp
def magnitude(x):
    return jnp.abs(x)


def magnitude_bwd(x, g):
    return (jnp.where(x >= 0, g, -g),)


magnitude.defvjp(lambda x: (magnitude(x), x), magnitude_bwd)
add(
    magnitude, "slope 1 of abs at 0, where autodiff says 0", (normal(4, 5, 7),), (vector(-1, 0, 2),)
)


@jax.custom_jvp
def absolute_value(x):
    return jnp.sqrt(x * x)


@absolute_value.defjvp
def absolute_value_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return absolute_value(x), jnp.sign(x) * dx


add(
    absolute_value,
    "slope 0 at 0, where autodiff of sqrt(x^2) is nan",
    (normal(5, 5, 7),),
    (vector(-1, 0, 2),),
)


@jax.custom_vjp
def row_max(x):
    return jnp.max(x, axis=-1)


def row_max_bwd(x, g):
    first = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=g.dtype)
    return (first * g[..., None],)


row_max.defvjp(lambda x: (row_max(x), x), row_max_bwd)
add(
    row_max,
    "all of a tie's cotangent goes to the first of the largest, where autodiff shares it",
    (normal(6, 5, 7),),
    (vector(3, 1, 3, 3),),
)


@jax.custom_jvp
def largest_shared(x):
    return x[..., 0] if x.shape[-1] == 1 else jnp.sort(x, axis=-1)[..., -1]


@largest_shared.defjvp
def largest_shared_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = largest_shared(x)
    among = (x == y[..., None]).astype(x.dtype)
    return y, jnp.sum(among * dx, axis=-1) / jnp.sum(among, axis=-1)


add(
    largest_shared,
    "a tie's cotangent is shared, where autodiff of the sort gives it to one",
    (normal(7, 5, 7),),
    (vector(3, 1, 3, 3),),
)


@jax.custom_vjp
def elementwise_maximum(x, y):
    return jnp.maximum(x, y)


def elementwise_maximum_bwd(saved, g):
    x, y = saved
    return summed_to(x, jnp.where(x >= y, g, 0)), summed_to(y, jnp.where(x >= y, 0, g))


elementwise_maximum.defvjp(saves(elementwise_maximum), elementwise_maximum_bwd)
add(
    elementwise_maximum,
    "where x = y all of the cotangent goes to x",
    (normal(8, 5, 7), normal(9, 5, 7)),
    (vector(1, 2, 3), vector(1, 2, 4)),
    (normal(10, 5, 7), normal(11, 7)),
)


@jax.custom_vjp
def sorted_rows(x):
    return jnp.sort(x, axis=-1)


def sorted_rows_bwd(x, g):
    place = jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
    return (jnp.take_along_axis(g, place, axis=-1),)


sorted_rows.defvjp(lambda x: (sorted_rows(x), x), sorted_rows_bwd)
add(
    sorted_rows,
    "argsort of argsort, and equal elements are told apart by their place",
    (normal(12, 4, 6),),
    (vector(2, 1, 2, 1, 2),),
)


@jax.custom_vjp
def descending_equal_alike(x):
    return -jnp.sort(-x, axis=-1)


def descending_equal_alike_bwd(x, g):
    place = jnp.argsort(jnp.argsort(-x, axis=-1), axis=-1)
    d = jnp.take_along_axis(g, place, axis=-1)
    same = (x[..., :, None] == x[..., None, :]).astype(g.dtype)
    return (jnp.einsum("...ij,...j->...i", same, d) / jnp.sum(same, axis=-1),)


descending_equal_alike.defvjp(lambda x: (descending_equal_alike(x), x), descending_equal_alike_bwd)
add(
    descending_equal_alike,
    "equal elements share the mean of their cotangents: the middle of the subdifferential",
    (normal(13, 4, 6),),
    (vector(2, 1, 2, 1),),
)


@jax.custom_vjp
def median(x):
    ordered = jnp.sort(x, axis=-1)
    n = x.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def median_bwd(x, g):
    n = x.shape[-1]
    place = jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
    weight = 0.5 * (place == (n - 1) // 2) + 0.5 * (place == n // 2)
    return (weight.astype(g.dtype) * g[..., None],)


median.defvjp(lambda x: (median(x), x), median_bwd)
add(
    median,
    "of three equal elements one takes all, though moving any of them alone moves nothing",
    (normal(14, 3, 5),),
    (normal(15, 6),),
    (vector(1, 2, 2, 2, 5),),
)


@jax.custom_jvp
def median_shared(x):
    ordered = jnp.sort(x, axis=-1)
    n = x.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


@median_shared.defjvp
def median_shared_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    ordered, n = jnp.sort(x, axis=-1), x.shape[-1]
    dy = jnp.zeros(x.shape[:-1], x.dtype)
    for k in ((n - 1) // 2, n // 2):
        among = (x == ordered[..., k, None]).astype(x.dtype)
        dy += jnp.sum(among * dx, axis=-1) / jnp.sum(among, axis=-1) / 2
    return median_shared(x), dy


add(
    median_shared,
    "equal elements in the middle share the cotangent",
    (normal(16, 3, 5),),
    (normal(17, 6),),
    (vector(1, 2, 2, 5),),
)


@jax.custom_vjp
def hinge(score, sign):
    return jnp.maximum(0, 1 - sign * score)


def hinge_bwd(saved, g):
    score, sign = saved
    inside = 1 - sign * score >= 0
    d = jnp.where(inside, -sign.astype(g.dtype) * g, 0)
    return summed_to(score, d).astype(score.dtype), None


hinge.defvjp(saves(hinge), hinge_bwd)
add(
    hinge,
    "at the margin itself the slope is -y, where autodiff says -y / 2",
    (normal(18, 7), ints(1, -1, 1, 1, -1, -1, 1)),
    (vector(1, -1, 0.5), ints(1, -1, 1)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def huber(residual, delta=1.0):
    size = jnp.abs(residual)
    return jnp.where(size <= delta, 0.5 * residual * residual, delta * (size - 0.5 * delta))


def huber_fwd(residual, delta):
    return huber(residual, delta), residual


def huber_bwd(delta, residual, g):
    return (g * jnp.clip(residual, -delta, delta),)


huber.defvjp(huber_fwd, huber_bwd)
add(
    huber,
    "the clipped residual; autodiff of the branch not taken overflows in float16",
    (3 * normal(19, 5, 7), 1.0),
    (3 * normal(20, 5, 7), 0.3),
    (vector(-1, 1, 0, 1e6), 1.0),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clipped(x, low, high):
    return jnp.clip(x, low, high)


def clipped_fwd(x, low, high):
    return clipped(x, low, high), (x >= low) & (x <= high)


def clipped_bwd(low, high, inside, g):
    return (jnp.where(inside, g, 0),)


clipped.defvjp(clipped_fwd, clipped_bwd)
add(
    clipped,
    "slope 1 at the bounds themselves, where autodiff says 1/2",
    (normal(21, 5, 7), -0.7, 0.9),
    (vector(-1, -0.5, 0, 1, 2), -1.0, 1.0),
)


@jax.custom_jvp
def clip_between(x, low, high):
    return jnp.minimum(jnp.maximum(x, low), high)


@clip_between.defjvp
def clip_between_jvp(primals, tangents):
    (x, low, high), (dx, dlow, dhigh) = primals, tangents
    raised = jnp.where(x < low, dlow, dx)
    return clip_between(x, low, high), jnp.where(jnp.maximum(x, low) > high, dhigh, raised)


add(
    clip_between,
    "at a bound x keeps the cotangent; where all three are equal moving x alone moves nothing",
    (normal(22, 5, 7), -uniform(23, 7), uniform(24, 7)),
    (vector(-1, 0, 1), vector(-1, -1, -1), vector(1, 1, 1)),
)


@jax.custom_vjp
def norm_or_zero(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def norm_or_zero_bwd(saved, g):
    x, n = saved
    return (jnp.where(n > 0, g / jnp.where(n > 0, n, 1), 0)[..., None] * x,)


norm_or_zero.defvjp(lambda x: (n := norm_or_zero(x), (x, n)), norm_or_zero_bwd)
add(
    norm_or_zero,
    "0 at the origin, where autodiff is nan",
    (normal(25, 5, 7),),
    (full(0, 4),),
    (jnp.stack([full(0, 3), normal(26, 3)]),),
)


@jax.custom_vjp
def norm_without_overflow(x):
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    return (scale * jnp.sqrt(jnp.sum((x / scale) ** 2, axis=-1, keepdims=True)))[..., 0]


def norm_without_overflow_bwd(saved, g):
    x, n = saved
    positive = n > 0
    unit = jnp.where(positive[..., None], x / jnp.where(positive, n, 1)[..., None], 0)
    return (unit * g[..., None],)


norm_without_overflow.defvjp(
    lambda x: (n := norm_without_overflow(x), (x, n)), norm_without_overflow_bwd
)
add(
    norm_without_overflow,
    "finite at 0 and at 1e30, and without the derivative of the scale, which cancels",
    (normal(27, 5, 7),),
    (1e30 * normal(28, 5),),
    (full(0, 5),),
)


@jax.custom_jvp
def l1_penalty(w, strength):
    return strength * jnp.sum(jnp.abs(w))


@l1_penalty.defjvp
def l1_penalty_jvp(primals, tangents):
    (w, strength), (dw, dstrength) = primals, tangents
    total = jnp.sum(jnp.abs(w))
    return strength * total, dstrength * total + strength * jnp.sum(jnp.sign(w) * dw)


add(
    l1_penalty,
    "0 where a weight is 0",
    (normal(29, 5, 7), jnp.float32(0.1)),
    (vector(0, 1, -2, 0), jnp.float32(0.3)),
)


@jax.custom_vjp
def soft_threshold(x, threshold):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def soft_threshold_bwd(saved, g):
    x, threshold = saved
    d = jnp.where(jnp.abs(x) >= threshold, g, 0)
    return d, summed_to(threshold, -jnp.sign(x) * d)


soft_threshold.defvjp(saves(soft_threshold), soft_threshold_bwd)
add(
    soft_threshold,
    "the derivative by x has no sign and is 1 at the threshold itself",
    (normal(30, 5, 7), jnp.float32(0.4)),
    (vector(0.5, -0.5, 0, 1), jnp.float32(0.5)),
)


@jax.custom_jvp
def prelu(x, slope):
    return jnp.where(x >= 0, x, slope * x)


@prelu.defjvp
def prelu_jvp(primals, tangents):
    (x, slope), (dx, dslope) = primals, tangents
    return prelu(x, slope), jnp.where(x >= 0, dx, slope * dx + dslope * x)


add(
    prelu,
    "slope 1 at 0",
    (normal(31, 5, 7), uniform(32, 7)),
    (vector(0, -1, 2), jnp.float32(0.2)),
)


@jax.custom_vjp
def largest_magnitude(x):
    return jnp.max(jnp.abs(x), axis=-1)


def largest_magnitude_bwd(x, g):
    first = jax.nn.one_hot(jnp.argmax(jnp.abs(x), axis=-1), x.shape[-1], dtype=g.dtype)
    return (first * jnp.sign(x) * g[..., None],)


largest_magnitude.defvjp(lambda x: (largest_magnitude(x), x), largest_magnitude_bwd)
add(
    largest_magnitude,
    "one element of each row takes all, and none where the row is 0",
    (normal(33, 5, 7),),
    (vector(-2, 2, 1),),
    (full(0, 3),),
)


@jax.custom_jvp
def running_max(x):
    return jax.lax.cummax(x, axis=x.ndim - 1)


@running_max.defjvp
def running_max_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = running_max(x)
    place = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    latest = jax.lax.cummax(jnp.where(x == y, place, 0), axis=x.ndim - 1)
    return y, jnp.take_along_axis(dx, latest, axis=-1)


add(
    running_max,
    "the latest of equal maxima takes the cotangent",
    (normal(34, 4, 9),),
    (vector(1, 3, 2, 5, 4),),
)


@jax.custom_jvp
def total_variation(x):
    return jnp.sum(jnp.abs(jnp.diff(x, axis=-1)), axis=-1)


@total_variation.defjvp
def total_variation_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    step = jnp.sign(jnp.diff(x, axis=-1))
    return total_variation(x), jnp.sum(step * jnp.diff(dx, axis=-1), axis=-1)


add(total_variation, "0 where neighbours are equal", (normal(35, 4, 9),), (vector(1, 1, 2, 2, 0),))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def elu(x, alpha=1.0):
    return jnp.where(x > 0, x, alpha * jnp.expm1(x))


@elu.defjvp
def elu_jvp(alpha, primals, tangents):
    (x,), (dx,) = primals, tangents
    return elu(x, alpha), dx * jnp.where(x > 0, 1, alpha * jnp.exp(jnp.minimum(x, 0)))


add(
    elu,
    "the slope from the left at 0, and finite at 200, where autodiff is nan",
    (normal(36, 5, 7), 0.5),
    (vector(-1, 0, 200), 1.5),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def segment_largest(x, segments, num):
    found = jax.ops.segment_max(x, segments, num)
    filled = jax.ops.segment_sum(jnp.ones_like(segments), segments, num) > 0
    return jnp.where(filled, found, 0)


def segment_largest_fwd(x, segments, num):
    y = segment_largest(x, segments, num)
    return y, (x == y[segments], segments)


def segment_largest_bwd(num, saved, g):
    among, segments = saved
    among = among.astype(g.dtype)
    count = jax.ops.segment_sum(among, segments, num)
    return among * (g / jnp.maximum(count, 1))[segments], zeros_of(segments)


segment_largest.defvjp(segment_largest_fwd, segment_largest_bwd)
add(
    segment_largest,
    "ties share; an empty segment gets nothing; float0 for the segments",
    (normal(37, 8), ints(0, 2, 2, 0, 1, 2, 1, 0), 4),
    (vector(1, 1, 2, 2), ints(0, 0, 2, 2), 3),
)


@jax.custom_vjp
def table_lookup(table, x):
    low = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, table.shape[0] - 2)
    t = jnp.clip(x - low.astype(x.dtype), 0, 1)
    return (1 - t) * table[low] + t * table[low + 1]


def table_lookup_bwd(saved, g):
    table, x = saved
    low = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, table.shape[0] - 2)
    t = x - low.astype(x.dtype)
    inside = (t >= 0) & (t <= 1)
    t = jnp.clip(t, 0, 1)
    dtable = jnp.zeros_like(table).at[low].add((1 - t) * g).at[low + 1].add(t * g)
    return dtable, jnp.where(inside, g * (table[low + 1] - table[low]), 0)


table_lookup.defvjp(saves(table_lookup), table_lookup_bwd)
add(
    table_lookup,
    "at a knot the slope of one side; flat outside of the table",
    (normal(38, 6), uniform(39, 7, low=-1, high=6)),
    (normal(40, 4), vector(0, 1, 2, 3, 0.5)),
)


@jax.custom_jvp
def wrapped_angle(x):
    return x - 2 * math.pi * jnp.round(x / (2 * math.pi))


@wrapped_angle.defjvp
def wrapped_angle_jvp(primals, tangents):
    return wrapped_angle(*primals), tangents[0]


add(wrapped_angle, "slope 1, also where the angle jumps", (4 * normal(41, 5, 7),), (full(0, 3),))


@jax.custom_vjp
def simplex_projection(x):
    ordered = -jnp.sort(-x, axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    excess = (jnp.cumsum(ordered, axis=-1) - 1) / count
    support = jnp.sum(ordered > excess, axis=-1, keepdims=True)
    level = jnp.take_along_axis(excess, support - 1, axis=-1)
    return jnp.maximum(x - level, 0)


def simplex_projection_bwd(y, g):
    kept = (y > 0).astype(g.dtype)
    mean = jnp.sum(kept * g, axis=-1, keepdims=True) / jnp.sum(kept, axis=-1, keepdims=True)
    return (kept * (g - mean),)


simplex_projection.defvjp(lambda x: (y := simplex_projection(x), y), simplex_projection_bwd)
add(
    simplex_projection,
    "neither the sort nor the threshold is in the rule",
    (normal(42, 5, 7),),
    (vector(5, 0, 0, 0),),
)


# --- finite where autodiff of the function is nan or wrong


@jax.custom_jvp
def x_log_y(x, y):
    return jnp.where(x == 0, 0, x * jnp.log(y))


@x_log_y.defjvp
def x_log_y_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    log_y = jnp.log(jnp.where(y > 0, y, 1))
    ratio = jnp.where(x == 0, 0, x / jnp.where(x == 0, 1, y))
    return x_log_y(x, y), log_y * dx + ratio * dy


add(
    x_log_y,
    "at x = 0 the derivative is log y, where autodiff of the where says 0",
    (uniform(43, 5, 7), uniform(44, 5, 7)),
    (vector(0, 1, 2), vector(0.5, 0.3, 2)),
)


@jax.custom_vjp
def sinc(x):
    z = math.pi * x
    return jnp.where(z == 0, 1, jnp.sin(z) / jnp.where(z == 0, 1, z))


def sinc_bwd(x, g):
    z = math.pi * x
    small = jnp.abs(z) < 1
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = sum(
        (-1) ** k * 2 * k / math.factorial(2 * k + 1) * near ** (2 * k - 1) for k in range(1, 10)
    )
    return (math.pi * g * jnp.where(small, series, (jnp.cos(far) - jnp.sin(far) / far) / far),)


sinc.defvjp(lambda x: (sinc(x), x), sinc_bwd)
add(
    sinc,
    "a series near 0, where the quotient's derivative cancels",
    (normal(45, 5, 7),),
    (vector(0, 1e-4, -1e-3, 0.02, 1),),
)


@jax.custom_jvp
def masked_sqrt(x, mask):
    return jnp.where(mask, jnp.sqrt(x), 0)


@masked_sqrt.defjvp
def masked_sqrt_jvp(primals, tangents):
    (x, mask), (dx, _) = primals, tangents
    y = jnp.where(mask, jnp.sqrt(jnp.where(mask, x, 1)), 0)
    return y, jnp.where(mask, 0.5 * dx / jnp.where(mask, y, 1), 0)


add(
    masked_sqrt,
    "0 where masked, where autodiff of the where is nan",
    (uniform(46, 5, 7), bools(47, 5, 7)),
    (vector(0, 4, 0, 1), jnp.asarray([False, True, False, True])),
    (vector(-1, 4, -2, 1), jnp.asarray([False, True, False, True])),
)


@jax.custom_vjp
def root_of_positive_part(x):
    return jnp.where(x > 0, jnp.sqrt(x), 0)


def root_of_positive_part_bwd(y, g):
    return (jnp.where(y > 0, 0.5 * g / jnp.where(y > 0, y, 1), 0),)


root_of_positive_part.defvjp(
    lambda x: (y := root_of_positive_part(x), y), root_of_positive_part_bwd
)
add(
    root_of_positive_part,
    "0 below and at 0, between the slopes 0 and infinity; autodiff is nan",
    (normal(48, 5, 7),),
    (vector(-1, 2, -3, 0.5),),
)


@jax.custom_jvp
def ratio_or_zero(x, y):
    return jnp.where(y == 0, 0, x / y)


@ratio_or_zero.defjvp
def ratio_or_zero_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    safe = jnp.where(y == 0, 1, y)
    z = jnp.where(y == 0, 0, x / safe)
    return z, jnp.where(y == 0, 0, dx / safe) - z * dy / safe


add(
    ratio_or_zero,
    "0 where there is nothing to divide by, where autodiff is nan",
    (normal(49, 5, 7), normal(50, 5, 7)),
    (vector(1, 0, 3), vector(2, 0, 4)),
)


@jax.custom_jvp
def masked_ratio(x, y, mask):
    return jnp.where(mask, x / y, 0)


@masked_ratio.defjvp
def masked_ratio_jvp(primals, tangents):
    (x, y, mask), (dx, dy, _) = primals, tangents
    safe = jnp.where(mask, y, 1)
    z = jnp.where(mask, x / safe, 0)
    return z, jnp.where(mask, dx / safe, 0) - z * dy / safe


add(
    masked_ratio,
    "0 where masked, though y is 0 there",
    (normal(51, 5, 7), uniform(52, 5, 7), bools(53, 5, 7)),
    (vector(1, 2, 3), vector(2, 0, 4), jnp.asarray([True, False, True])),
)


@jax.custom_vjp
def log_sum_exp(x):
    largest = jnp.max(x, axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return jnp.log(jnp.sum(jnp.exp(x - largest), axis=-1)) + largest[..., 0]


def log_sum_exp_bwd(saved, g):
    x, y = saved
    y = y[..., None]
    p = jnp.where(jnp.isneginf(y), 0, jnp.where(x == y, 1, jnp.exp(x - y)))
    return (p * g[..., None],)


log_sum_exp.defvjp(lambda x: (y := log_sum_exp(x), (x, y)), log_sum_exp_bwd)
add(
    log_sum_exp,
    "0 for a row of -inf, where autodiff is nan",
    (normal(54, 5, 7),),
    (vector(0, -INF, 1),),
    (vector(-INF, -INF),),
)


@jax.custom_jvp
def log_add_exp(a, b):
    apart = a - b
    return jnp.where(
        jnp.isnan(apart), a + b, jnp.maximum(a, b) + jnp.log1p(jnp.exp(-jnp.abs(apart)))
    )


@log_add_exp.defjvp
def log_add_exp_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    apart = jnp.where(a == b, 0, a - b)
    return log_add_exp(a, b), jax.nn.sigmoid(apart) * da + jax.nn.sigmoid(-apart) * db


add(
    log_add_exp,
    "a half each where both are -inf",
    (normal(55, 5, 7), normal(56, 5, 7)),
    (vector(-INF, -INF, 1), vector(-INF, 0, 1)),
)


@jax.custom_vjp
def masked_softmax(x, mask):
    largest = jnp.max(jnp.where(mask, x, -INF), axis=-1, keepdims=True)
    e = jnp.where(mask, jnp.exp(x - jnp.where(jnp.isfinite(largest), largest, 0)), 0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def masked_softmax_bwd(y, g):
    return y * (g - jnp.sum(y * g, axis=-1, keepdims=True)), None


masked_softmax.defvjp(lambda x, mask: (y := masked_softmax(x, mask), y), masked_softmax_bwd)
add(
    masked_softmax,
    "0 for a row that is masked altogether, and where a masked score overflows",
    (normal(57, 4, 6), bools(58, 4, 6)),
    (
        jnp.asarray([[1.0, 200.0, 2.0], [3.0, 1.0, 2.0]]),
        jnp.asarray([[True, False, True], [False, False, False]]),
    ),
)


@jax.custom_jvp
def polar_angle(y, x):
    return jnp.arctan2(y, x)


@polar_angle.defjvp
def polar_angle_jvp(primals, tangents):
    (y, x), (dy, dx) = primals, tangents
    square = x * x + y * y
    safe = jnp.where(square == 0, 1, square)
    return polar_angle(y, x), (x / safe) * dy - (y / safe) * dx


add(
    polar_angle,
    "0 at the origin, where autodiff is nan",
    (normal(59, 5, 7), normal(60, 5, 7)),
    (vector(0, 1, -1), vector(0, 0, -2)),
)


@jax.custom_jvp
def power(x, y):
    return x**y


@power.defjvp
def power_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    by_x = jnp.where(y == 0, 0, y * x ** jnp.where(y == 0, 1, y - 1))
    by_y = jnp.where(x == 0, 0, x**y) * jnp.log(jnp.where(x > 0, x, 1))
    return x**y, by_x * dx + by_y * dy


add(
    power,
    "0 by the exponent at 0^y, where a naive 0 log 0 is nan",
    (uniform(61, 5, 7, high=2), normal(62, 5, 7)),
    (vector(0, 0, 2), vector(2, 1, 3)),
    (uniform(63, 5), jnp.float32(2.5)),
)


@jax.custom_vjp
def cosine_similarity(x, y):
    nx, ny = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1)
    size = nx * ny
    return jnp.where(size > 0, jnp.sum(x * y, axis=-1) / jnp.where(size > 0, size, 1), 0)


def cosine_similarity_bwd(saved, g):
    x, y = saved
    nx, ny = (jnp.sqrt(jnp.sum(v * v, axis=-1, keepdims=True)) for v in (x, y))
    some = (nx > 0) & (ny > 0)
    nx, ny = jnp.where(some, nx, 1), jnp.where(some, ny, 1)
    ux, uy = x / nx, y / ny
    c = jnp.sum(ux * uy, axis=-1, keepdims=True)
    g = jnp.where(some, g[..., None], 0)
    dx = summed_to(x, g * uy / nx) - summed_to(x, g * c * ux / nx)
    dy = summed_to(y, g * ux / ny) - summed_to(y, g * c * uy / ny)
    return dx, dy


cosine_similarity.defvjp(saves(cosine_similarity), cosine_similarity_bwd)
add(
    cosine_similarity,
    "0 for a vector of zeros, which has no direction; autodiff is nan",
    (normal(64, 5, 7), normal(65, 5, 7)),
    (jnp.stack([full(0, 3), normal(66, 3)]), normal(67, 2, 3)),
)


@jax.custom_vjp
def unit_vector(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-6))


def unit_vector_bwd(x, g):
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.maximum(square, 1e-6))
    along = r**3 * jnp.sum(x * g, axis=-1, keepdims=True)
    return (r * g - jnp.where(square > 1e-6, along * x, 0),)


unit_vector.defvjp(lambda x: (unit_vector(x), x), unit_vector_bwd)
add(
    unit_vector,
    "a slope of 1,000 at 0, which is true: the function is x / sqrt(eps) there",
    (normal(68, 5, 7),),
    (full(0, 4),),
    (1e-5 * normal(69, 4),),
)


@jax.custom_jvp
def expm1_over_x(x):
    return jnp.where(x == 0, 1, jnp.expm1(x) / jnp.where(x == 0, 1, x))


@expm1_over_x.defjvp
def expm1_over_x_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = expm1_over_x(x)
    small = jnp.abs(x) < 1
    near, far = jnp.where(small, x, 0), jnp.where(small, 1, x)
    slope = jnp.full_like(x, 18 / math.factorial(19))
    for k in range(17, 0, -1):
        slope = slope * near + k / math.factorial(k + 1)
    return y, dx * jnp.where(small, slope, (jnp.exp(far) - jnp.expm1(far) / far) / far)


add(
    expm1_over_x,
    "1/2 at 0, where autodiff of the where says 0",
    (normal(70, 5, 7),),
    (vector(0, 1e-5, -1e-3, 1, 30),),
)


@jax.custom_jvp
def log_cosh(x):
    return jnp.abs(x) + jnp.log1p(jnp.exp(-2 * jnp.abs(x))) - math.log(2)


@log_cosh.defjvp
def log_cosh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_cosh(x), jnp.tanh(x) * dx


add(
    log_cosh,
    "tanh x, though the formula has two kinks at 0",
    (normal(71, 5, 7),),
    (vector(0, 1e-3, -50, 200),),
)


@jax.custom_jvp
def clamped_arccos(x):
    return jnp.arccos(jnp.clip(x, -1, 1))


@clamped_arccos.defjvp
def clamped_arccos_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    inside = jnp.abs(x) < 1
    x = jnp.where(inside, x, 0)
    slope = jax.lax.rsqrt((1 - x) * (1 + x))
    return clamped_arccos(*primals), jnp.where(inside, -slope * dx, 0)


add(
    clamped_arccos,
    "0 outside, where autodiff is nan",
    (uniform(72, 5, 7, low=-0.9),),
    (vector(-3, 0, 0.5, 2),),
)


@jax.custom_jvp
def product_of_all(x):
    return jnp.exp(jnp.sum(jnp.log(jnp.abs(x)), axis=-1)) * jnp.prod(jnp.sign(x), axis=-1)


@product_of_all.defjvp
def product_of_all_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    one = jnp.ones_like(x[..., :1])
    before = jnp.cumprod(jnp.concatenate([one, x[..., :-1]], axis=-1), axis=-1)
    after = jnp.cumprod(jnp.concatenate([one, x[..., :0:-1]], axis=-1), axis=-1)[..., ::-1]
    return product_of_all(x), jnp.sum(before * after * dx, axis=-1)


add(
    product_of_all,
    "the product of the others, also where one is 0 and autodiff of the logarithms is nan",
    (normal(73, 4, 5),),
    (vector(2, 0, 3),),
    (vector(0, 0, 3),),
)


# --- ill-conditioned, cancelling, large


@jax.custom_jvp
def log1mexp(x):
    return jnp.where(x < math.log(2), jnp.log(-jnp.expm1(-x)), jnp.log1p(-jnp.exp(-x)))


@log1mexp.defjvp
def log1mexp_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log1mexp(x), dx / jnp.expm1(x)


add(
    log1mexp,
    "one formula where the function has two",
    (uniform(74, 5, 7, high=3),),
    (vector(1e-6, 0.6931, 20, 80),),
)


@jax.custom_jvp
def log_sub_exp(a, b):
    return a + jnp.log(-jnp.expm1(b - a))


@log_sub_exp.defjvp
def log_sub_exp_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return log_sub_exp(a, b), -da / jnp.expm1(b - a) - db / jnp.expm1(a - b)


add(
    log_sub_exp,
    "cotangents of thousands where a and b are close",
    (2 + uniform(75, 5, 7), uniform(76, 5, 7)),
    (vector(1.0001, 5), vector(1, 4.9)),
)


@jax.custom_jvp
def row_variance(x):
    return jnp.mean((x - jnp.mean(x, axis=-1, keepdims=True)) ** 2, axis=-1)


@row_variance.defjvp
def row_variance_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return row_variance(x), 2 * jnp.mean(centred * dx, axis=-1)


add(
    row_variance,
    "data far from 0; the mean's own derivative is 0",
    (normal(77, 5, 7),),
    (1000 + normal(78, 5, 7),),
    (vector(3, 3, 3),),
)


@jax.custom_vjp
def layer_norm(x, gain, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return centred * r * gain + bias


def layer_norm_fwd(x, gain, bias):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + 1e-5)
    return (x - mean) * r * gain + bias, (x, mean, r, gain, bias)


def layer_norm_bwd(saved, g):
    x, mean, r, gain, bias = saved
    z = (x - mean) * r
    d = g * gain
    d = d - jnp.mean(d, axis=-1, keepdims=True) - z * jnp.mean(d * z, axis=-1, keepdims=True)
    return r * d, summed_to(gain, g * z), summed_to(bias, g)


layer_norm.defvjp(layer_norm_fwd, layer_norm_bwd)
add(
    layer_norm,
    "two means of 512 terms cancel",
    (normal(79, 4, 512), 1 + 0.1 * normal(80, 512), normal(81, 512)),
    (normal(82, 2, 3, 8), normal(83, 8), normal(84, 8)),
    (full(2, 3, 8), normal(85, 8), normal(86, 8)),
)


@jax.custom_vjp
def solve(a, b):
    return jnp.linalg.solve(a, b)


def solve_bwd(saved, g):
    a, x = saved
    db = jnp.linalg.solve(a.T, g)
    return -jnp.outer(db, x), db


solve.defvjp(lambda a, b: (x := solve(a, b), (a, x)), solve_bwd)
add(
    solve,
    "the matrix has condition 5e5, so few digits are right",
    (normal(87, 5, 5) + 4 * jnp.eye(5), normal(88, 5)),
    (hilbert(5), normal(89, 5)),
)


@jax.custom_jvp
def inverse(a):
    return jnp.linalg.inv(a)


@inverse.defjvp
def inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    y = inverse(a)
    return y, -y @ da @ y


add(
    inverse,
    "no factorisation is differentiated; condition 1.5e4",
    (normal(90, 4, 4) + 3 * jnp.eye(4),),
    (hilbert(4),),
)


@jax.custom_vjp
def cholesky(a):
    return jnp.linalg.cholesky(a)


def cholesky_bwd(low, g):
    middle = jnp.tril(low.T @ g)
    middle = middle - 0.5 * jnp.diag(jnp.diag(middle))
    left = jax.scipy.linalg.solve_triangular(low, middle, trans=1, lower=True)
    s = jax.scipy.linalg.solve_triangular(low, left.T, trans=1, lower=True)
    return ((s + s.T) / 2,)


cholesky.defvjp(lambda a: (low := cholesky(a), low), cholesky_bwd)
add(
    cholesky,
    "the cotangent is symmetric, though only half of the matrix is needed",
    (definite(91, 4),),
    (hilbert(4) + 0.01 * jnp.eye(4),),
)


@jax.custom_vjp
def eigenvalues(a):
    return jnp.linalg.eigvalsh(a)


def eigenvalues_bwd(v, g):
    return ((v * g) @ v.T,)


eigenvalues.defvjp(lambda a: (jnp.linalg.eigvalsh(a), jnp.linalg.eigh(a)[1]), eigenvalues_bwd)
add(
    eigenvalues,
    "the eigenvectors are not differentiated",
    (symmetric(92, 5),),
    (jnp.diag(vector(1, 2, 4)),),
)


@jax.custom_vjp
def ground_state(a):
    energies, v = jnp.linalg.eigh(a)
    return energies[0], jnp.outer(v[:, 0], v[:, 0])


def ground_state_fwd(a):
    energies, v = jnp.linalg.eigh(a)
    return (energies[0], jnp.outer(v[:, 0], v[:, 0])), (energies, v)


def ground_state_bwd(saved, g):
    energies, v = saved
    d_energy, d_density = g
    lowest = v[:, 0]
    towards = v.T @ ((d_density + d_density.T) @ lowest)
    mixed = v[:, 1:] @ (towards[1:] / (energies[0] - energies[1:]))
    d = d_energy * jnp.outer(lowest, lowest) + jnp.outer(mixed, lowest)
    return ((d + d.T) / 2,)


ground_state.defvjp(ground_state_fwd, ground_state_bwd)
add(
    ground_state,
    "divides by gaps between eigenvalues, which must be distinct",
    (symmetric(93, 4),),
    (jnp.diag(vector(1, 1.5, 4)) + 0.1 * symmetric(94, 3),),
)


@jax.custom_jvp
def log_determinant(a):
    return jnp.linalg.slogdet(a)[1]


@log_determinant.defjvp
def log_determinant_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    return log_determinant(a), jnp.trace(jnp.linalg.solve(a, da))


add(
    log_determinant,
    "a solve with the tangent; right for either sign of the determinant",
    (normal(95, 4, 4),),
    (-definite(96, 3),),
    (hilbert(4),),
)


@jax.custom_vjp
def solve_lower(low, b):
    return jax.scipy.linalg.solve_triangular(low, b, lower=True)


def solve_lower_bwd(saved, g):
    low, x = saved
    db = jax.scipy.linalg.solve_triangular(low, g, trans=1, lower=True)
    return -jnp.tril(jnp.outer(db, x)), db


solve_lower.defvjp(lambda low, b: (x := solve_lower(low, b), (low, x)), solve_lower_bwd)
add(
    solve_lower,
    "0 above the diagonal, which the solver does not read",
    (jnp.tril(normal(97, 4, 4)) + 2 * jnp.eye(4), normal(98, 4)),
    (normal(99, 4, 4) + 3 * jnp.eye(4), normal(100, 4)),
)


@jax.custom_vjp
def nuclear_norm(a):
    return jnp.sum(jnp.linalg.svd(a, compute_uv=False))


def nuclear_norm_fwd(a):
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return jnp.sum(s), u @ vt


def nuclear_norm_bwd(uv, g):
    return (g * uv,)


nuclear_norm.defvjp(nuclear_norm_fwd, nuclear_norm_bwd)
add(
    nuclear_norm,
    "a subgradient where the matrix has not full rank",
    (normal(101, 3, 5),),
    (jnp.outer(vector(1, 2, 3), vector(1, -1)),),
)


@jax.custom_jvp
def exponential_minus_one(x):
    return jnp.expm1(x)


@exponential_minus_one.defjvp
def exponential_minus_one_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return exponential_minus_one(x), jnp.exp(x) * dx


add(
    exponential_minus_one,
    "e^x, not the output plus 1, which loses the digits of the tail",
    (normal(102, 5, 7),),
    (vector(-30, 1e-7, 80),),
)


@jax.custom_vjp
def sigmoid_with_tails(x):
    return 1 / (1 + jnp.exp(-x))


def sigmoid_with_tails_bwd(x, g):
    e = jnp.exp(-jnp.abs(x))
    return (g * (e / (1 + e)) / (1 + e),)


sigmoid_with_tails.defvjp(lambda x: (sigmoid_with_tails(x), x), sigmoid_with_tails_bwd)
add(
    sigmoid_with_tails,
    "1e-18 in the tail, where autodiff is 0 or nan",
    (normal(103, 5, 7),),
    (vector(-100, -40, 0, 40, 80),),
)


@jax.custom_vjp
def logistic_from_output(x):
    return jax.nn.sigmoid(x)


def logistic_from_output_bwd(y, g):
    return (g * y * (1 - y),)


logistic_from_output.defvjp(lambda x: (y := jax.nn.sigmoid(x), y), logistic_from_output_bwd)
add(
    logistic_from_output,
    "0 in the upper tail, as autodiff: the digits that the output lost",
    (normal(104, 5, 7),),
    (vector(-20, 0, 5),),
)


@jax.custom_jvp
def log_sigmoid(x):
    return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


@log_sigmoid.defjvp
def log_sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_sigmoid(x), jax.nn.sigmoid(-x) * dx


add(
    log_sigmoid,
    "smooth, though its formula has kinks at 0",
    (normal(105, 5, 7),),
    (vector(-90, 0, 90),),
)


@jax.custom_jvp
def gelu(x):
    return 0.5 * x * jax.scipy.special.erfc(-x / math.sqrt(2))


@gelu.defjvp
def gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * jax.scipy.special.erfc(-x / math.sqrt(2))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, dx * (cdf + x * density)


add(
    gelu,
    "the slope is above 1 and below 0 in places",
    (2 * normal(106, 5, 7),),
    (vector(-8, 0, 8),),
)


@jax.custom_jvp
def square(x):
    return x * x


@square.defjvp
def square_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return square(x), 2 * x * dx


add(square, "a small step at 1e4 is lost in the value", (1e4 * normal(107, 5, 7),), (full(0, 3),))


@jax.custom_jvp
def exponential(x):
    return jnp.exp(x)


@exponential.defjvp
def exponential_jvp(primals, tangents):
    y = exponential(*primals)
    return y, y * tangents[0]


add(
    exponential,
    "near the end of the range",
    (uniform(108, 5, low=70, high=85),),
    (normal(109, 5, 7),),
)


@jax.custom_vjp
def mean_square(x):
    return jnp.mean(x * x)


def mean_square_bwd(x, g):
    return (2 * g * x / x.size,)


mean_square.defvjp(lambda x: (mean_square(x), x), mean_square_bwd)
add(
    mean_square,
    "4,096 terms in float32, so that a single cotangent is below the value's rounding",
    (normal(110, 4096),),
    (1e4 * normal(111, 8, 16),),
)


@jax.custom_vjp
def big_sum(x):
    return jnp.sum(x)


def big_sum_bwd(like, g):
    return (jnp.broadcast_to(g, like.shape),)


big_sum.defvjp(lambda x: (jnp.sum(x), x), big_sum_bwd)
add(big_sum, "a sum of 1e8 cannot show a step of 1", (1e5 + normal(112, 32, 32),))


@jax.custom_vjp
def coulomb_energy(x):
    apart = x[:, None, :] - x[None, :, :]
    square = jnp.sum(apart**2, axis=-1) + jnp.eye(x.shape[0], dtype=x.dtype)
    return 0.5 * jnp.sum(jax.lax.rsqrt(square)) - 0.5 * x.shape[0]


def coulomb_energy_bwd(x, g):
    apart = x[:, None, :] - x[None, :, :]
    square = jnp.sum(apart**2, axis=-1) + jnp.eye(x.shape[0], dtype=x.dtype)
    return (-g * jnp.sum(apart * (square**-1.5)[..., None], axis=1),)


coulomb_energy.defvjp(lambda x: (coulomb_energy(x), x), coulomb_energy_bwd)
add(
    coulomb_energy,
    "cotangents from 1e-2 to 1e4 in one array",
    (3 * normal(113, 6, 3),),
    (jnp.asarray([[0, 0, 0], [0.01, 0, 0], [5.0, 1, 2]]),),
)


# --- half precision, accumulated in float32


def wide(dtype):
    """float32, or the dtype itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def matmul_f32_inside(x, w):
    return jnp.matmul(x, w, preferred_element_type=wide(x.dtype)).astype(x.dtype)


def matmul_f32_inside_bwd(saved, g):
    x, w = saved
    dx = jnp.matmul(g, w.T, preferred_element_type=wide(x.dtype))
    dw = jnp.matmul(x.T, g, preferred_element_type=wide(w.dtype))
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul_f32_inside.defvjp(saves(matmul_f32_inside), matmul_f32_inside_bwd)
add(
    matmul_f32_inside,
    "bfloat16 in and out",
    (normal(114, 5, 64, dtype=BF16), normal(115, 64, 3, dtype=BF16)),
    (normal(116, 2, 3), normal(117, 3, 4)),
)


@jax.custom_vjp
def rms_norm_half(x, gain):
    z = x.astype(wide(x.dtype))
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-6)
    return z.astype(x.dtype) * gain


def rms_norm_half_bwd(saved, g):
    x, gain = saved
    z, d = x.astype(wide(x.dtype)), (g * gain).astype(wide(x.dtype))
    r = jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-6)
    z = z * r
    dx = r * (d - z * jnp.mean(d * z, axis=-1, keepdims=True))
    return dx.astype(x.dtype), summed_to(gain, g * z.astype(g.dtype))


rms_norm_half.defvjp(saves(rms_norm_half), rms_norm_half_bwd)
add(
    rms_norm_half,
    "float32 inside, bfloat16 outside",
    (normal(118, 4, 32, dtype=BF16), 1 + 0.1 * normal(119, 32, dtype=BF16)),
    (normal(120, 4, 8), normal(121, 8)),
)


@jax.custom_jvp
def softmax_f16(x):
    return jax.nn.softmax(x.astype(wide(x.dtype)), axis=-1).astype(x.dtype)


@softmax_f16.defjvp
def softmax_f16_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    p, dx = jax.nn.softmax(x.astype(wide(x.dtype)), axis=-1), dx.astype(wide(x.dtype))
    dp = p * (dx - jnp.sum(p * dx, axis=-1, keepdims=True))
    return p.astype(x.dtype), dp.astype(x.dtype)


add(
    softmax_f16,
    "float32 inside, float16 outside",
    (normal(122, 5, 7, dtype=F16),),
    (30 * normal(123, 4, 6, dtype=BF16),),
)


@jax.custom_vjp
def mixed_dense(x, w, b):
    return x @ w.astype(x.dtype) + b.astype(x.dtype)


def mixed_dense_bwd(saved, g):
    x, w, b = saved
    dw = jnp.matmul(x.T, g, preferred_element_type=wide(w.dtype))
    db = summed_to(b, g.astype(wide(b.dtype)))
    return g @ w.T.astype(g.dtype), dw.astype(w.dtype), db.astype(b.dtype)


mixed_dense.defvjp(saves(mixed_dense), mixed_dense_bwd)
add(
    mixed_dense,
    "float32 cotangents for float32 weights that are used in bfloat16",
    (normal(124, 6, 8, dtype=BF16), normal(125, 8, 3), normal(126, 3)),
    (normal(127, 2, 3), normal(128, 3, 4), normal(129, 4)),
)


# --- randomness from a key


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x, key, rate):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def dropout_fwd(x, key, rate):
    return dropout(x, key, rate), key


def dropout_bwd(rate, key, g):
    keep = jax.random.bernoulli(key, 1 - rate, g.shape)
    return jnp.where(keep, g / (1 - rate), 0), None


dropout.defvjp(dropout_fwd, dropout_bwd)
add(
    dropout,
    "the mask is drawn again from the key in the backward pass",
    (normal(130, 5, 7), jax.random.key(1), 0.3),
    (normal(131, 9), jax.random.key(2), 0.5),
)


@jax.custom_vjp
def dropout_old_key(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)


def dropout_old_key_bwd(key, g):
    return dropout_old_key(g, key), zeros_of(key)


dropout_old_key.defvjp(lambda x, key: (dropout_old_key(x, key), key), dropout_old_key_bwd)
add(
    dropout_old_key,
    "the rule calls its own function on the cotangent",
    (normal(132, 5, 7), jax.random.PRNGKey(3)),
)


@jax.custom_jvp
def gaussian_sample(mean, log_std, key):
    noise = jax.random.normal(key, jnp.broadcast_shapes(mean.shape, log_std.shape), mean.dtype)
    return mean + jnp.exp(log_std) * noise


@gaussian_sample.defjvp
def gaussian_sample_jvp(primals, tangents):
    (mean, log_std, key), (dmean, dlog_std, _) = primals, tangents
    y = gaussian_sample(mean, log_std, key)
    return y, dmean + (y - mean) * dlog_std


add(
    gaussian_sample,
    "the noise is taken back out of the output",
    (normal(133, 5, 7), normal(134, 5, 7), jax.random.key(4)),
    (normal(135, 5, 7), normal(136, 7), jax.random.key(5)),
)


@jax.custom_vjp
def gumbel_softmax(logits, temperature, key):
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def gumbel_softmax_fwd(logits, temperature, key):
    z = (logits + jax.random.gumbel(key, logits.shape, logits.dtype)) / temperature
    y = jax.nn.softmax(z, axis=-1)
    return y, (y, z, temperature)


def gumbel_softmax_bwd(saved, g):
    y, z, temperature = saved
    d = y * (g - jnp.sum(y * g, axis=-1, keepdims=True)) / temperature
    return d, summed_to(temperature, -d * z), None


gumbel_softmax.defvjp(gumbel_softmax_fwd, gumbel_softmax_bwd)
add(
    gumbel_softmax,
    "random, and the temperature's cotangent holds the noise",
    (normal(137, 4, 6), jnp.float32(0.7), jax.random.key(6)),
)


# --- pytrees and arguments that are not differentiable


@jax.custom_vjp
def dense_of_dict(params, x):
    return x @ params["w"] + params["b"]


def dense_of_dict_bwd(saved, g):
    params, x = saved
    return {"w": x.T @ g, "b": summed_to(params["b"], g)}, g @ params["w"].T


dense_of_dict.defvjp(saves(dense_of_dict), dense_of_dict_bwd)
add(
    dense_of_dict,
    "a dict of cotangents",
    ({"w": normal(138, 4, 3), "b": normal(139, 3)}, normal(140, 5, 4)),
)


class Affine(NamedTuple):
    gain: Any
    offset: Any


@jax.custom_vjp
def affine(params, x):
    return x * params.gain + params.offset


def affine_bwd(saved, g):
    params, x = saved
    d = Affine(gain=summed_to(params.gain, g * x), offset=summed_to(params.offset, g))
    return d, summed_to(x, g * params.gain)


affine.defvjp(saves(affine), affine_bwd)
add(
    affine,
    "a namedtuple, broadcast against x",
    (Affine(normal(141, 7), normal(142, 7)), normal(143, 5, 7)),
    (Affine(jnp.float32(2), jnp.float32(1)), normal(144, 3)),
)


@jax.custom_jvp
def sum_of_squares(weights):
    return sum(jnp.sum(w * w) for w in weights)


@sum_of_squares.defjvp
def sum_of_squares_jvp(primals, tangents):
    (weights,), (dweights,) = primals, tangents
    slope = sum(2 * jnp.sum(w * dw) for w, dw in zip(weights, dweights, strict=True))
    return sum_of_squares(weights), slope


add(
    sum_of_squares,
    "a list of arrays",
    ([normal(145, 4, 3), normal(146, 3), jnp.float32(2)],),
    ([full(0, 0, 3), normal(147, 2)],),
)


@jax.custom_vjp
def dense_without_bias(params, x):
    y = x @ params["w"]
    return y if params["b"] is None else y + params["b"]


def dense_without_bias_bwd(saved, g):
    params, x = saved
    db = None if params["b"] is None else summed_to(params["b"], g)
    return {"w": x.T @ g, "b": db}, g @ params["w"].T


dense_without_bias.defvjp(saves(dense_without_bias), dense_without_bias_bwd)
add(
    dense_without_bias,
    "None among the parameters and among their cotangents",
    ({"w": normal(148, 4, 3), "b": None}, normal(149, 5, 4)),
    ({"w": normal(150, 4, 3), "b": normal(151, 3)}, normal(152, 5, 4)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def squared_error(pred, target, reduction="mean"):
    error = (pred - target) ** 2
    return {"mean": jnp.mean, "sum": jnp.sum, "none": lambda e: e}[reduction](error)


def squared_error_fwd(pred, target, reduction):
    return squared_error(pred, target, reduction), (pred, target)


def squared_error_bwd(reduction, saved, g):
    pred, target = saved
    d = 2 * (pred - target) * g
    d = d / d.size if reduction == "mean" else d
    return summed_to(pred, d), -summed_to(target, d)


squared_error.defvjp(squared_error_fwd, squared_error_bwd)
add(
    squared_error,
    "a string that changes the rule",
    (normal(153, 5, 7), normal(154, 5, 7), "mean"),
    (normal(155, 5, 7), normal(156, 5, 7), "sum"),
    (normal(157, 4), normal(158, 4), "none"),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(f, params, x):
    return f(params, x)


def recomputed_fwd(f, params, x):
    return f(params, x), (params, x)


def recomputed_bwd(f, saved, g):
    return jax.vjp(f, *saved)[1](g)


def two_layers(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


recomputed.defvjp(recomputed_fwd, recomputed_bwd)
add(
    recomputed,
    "takes a function, saves only its arguments and runs it again in the backward pass",
    (two_layers, {"in": normal(159, 4, 6), "out": normal(160, 6, 3)}, normal(161, 5, 4)),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def integer_power(x, n):
    return x**n


@integer_power.defjvp
def integer_power_jvp(n, primals, tangents):
    (x,), (dx,) = primals, tangents
    return x**n, (n * x ** (n - 1) if n else jnp.zeros_like(x)) * dx


add(
    integer_power,
    "an integer setting, 0 too",
    (normal(162, 5, 7), 3),
    (normal(163, 5), 0),
    (vector(0, 1, -2), 1),
)


@functools.partial(jax.custom_vjp, nondiff_argnames=("axis",))
def softmax_along(x, axis):
    return jax.nn.softmax(x, axis=axis)


def softmax_along_fwd(x, axis):
    y = jax.nn.softmax(x, axis=axis)
    return y, y


def softmax_along_bwd(axis, y, g):
    return (y * (g - jnp.sum(y * g, axis=axis, keepdims=True)),)


softmax_along.defvjp(softmax_along_fwd, softmax_along_bwd)
add(softmax_along, "a setting by name", (normal(164, 5, 7), 0), (normal(165, 5, 7), 1))


@dataclasses.dataclass(frozen=True)
class Scaler:
    factor: float

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(self, x):
        return self.factor * x

    def run_fwd(self, x):
        return self.run(self, x), None

    def run_bwd(self, _, g):
        return (self.factor * g,)

    run.defvjp(run_fwd, run_bwd)


add(Scaler.run, "a method; nothing is saved", (Scaler(1.7), normal(166, 5, 7)), name="Scaler.run")


@jax.custom_vjp
def gathered_rows(table, index):
    return table[index]


def gathered_rows_bwd(saved, g):
    table, index = saved
    return jnp.zeros_like(table).at[index].add(g), None


gathered_rows.defvjp(saves(gathered_rows), gathered_rows_bwd)
add(
    gathered_rows,
    "repeated indices add up; None for them",
    (normal(167, 6, 4), ints(0, 3, 3, 5)),
    (normal(168, 6, 4), integers(169, 6, 2, 3)),
    (normal(170, 3, 2), ints(-1, 0)),
)


@jax.custom_vjp
def embedding_with_padding(table, tokens):
    return jnp.where((tokens == 0)[..., None], 0, table[tokens])


def embedding_with_padding_bwd(saved, g):
    table, tokens = saved
    g = jnp.where((tokens == 0)[..., None], 0, g)
    summed = jax.ops.segment_sum(g.reshape(-1, g.shape[-1]), tokens.ravel(), table.shape[0])
    return summed, zeros_of(tokens)


embedding_with_padding.defvjp(saves(embedding_with_padding), embedding_with_padding_bwd)
add(
    embedding_with_padding,
    "row 0 stands for padding: its cotangent is 0, and so is its derivative",
    (normal(171, 6, 4), ints(1, 0, 2, 2, 0)),
    (normal(172, 6, 4), integers(173, 6, 2, 3)),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def segment_total(x, segments, num):
    return jax.ops.segment_sum(x, segments, num)


@segment_total.defjvp
def segment_total_jvp(num, primals, tangents):
    x, segments = primals
    return segment_total(x, segments, num), jax.ops.segment_sum(tangents[0], segments, num)


add(
    segment_total,
    "integer segments, one of them empty",
    (normal(174, 6, 3), ints(0, 2, 2, 0, 2, 0), 4),
)


@jax.custom_vjp
def cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def cross_entropy_bwd(saved, g):
    logits, labels = saved
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return (jax.nn.softmax(logits, axis=-1) - one_hot) * g[..., None], zeros_of(labels)


cross_entropy.defvjp(saves(cross_entropy), cross_entropy_bwd)
add(
    cross_entropy,
    "softmax minus one-hot, float0 for the labels",
    (normal(175, 6, 9), integers(176, 9, 6)),
    (40 * normal(177, 3, 4), integers(178, 4, 3)),
)


@jax.custom_vjp
def masked_mean(x, mask):
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def masked_mean_bwd(saved, g):
    x, mask = saved
    d = jnp.where(mask, g / jnp.maximum(jnp.sum(mask), 1), 0).astype(g.dtype)
    return summed_to(x, jnp.broadcast_to(d, jnp.broadcast_shapes(x.shape, mask.shape))), None


masked_mean.defvjp(saves(masked_mean), masked_mean_bwd)
add(
    masked_mean,
    "0 where nothing is selected",
    (normal(179, 5, 7), bools(180, 5, 7)),
    (normal(181, 4), jnp.zeros(4, bool)),
)


@jax.custom_jvp
def largest_and_place(x):
    place = jnp.argmax(x, axis=-1)
    return jnp.max(x, axis=-1), place


@largest_and_place.defjvp
def largest_and_place_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y, place = largest_and_place(x)
    dy = jnp.take_along_axis(dx, place[..., None], axis=-1)[..., 0]
    return (y, place), (dy, zeros_of(place))


add(
    largest_and_place,
    "an integer output, whose tangent is float0",
    (normal(182, 5, 7),),
    (vector(1, 4, 4),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def top_values(x, k):
    return jax.lax.top_k(x, k)


def top_values_fwd(x, k):
    values, places = jax.lax.top_k(x, k)
    return (values, places), (x, places)


def top_values_bwd(k, saved, g):
    x, places = saved
    one_hot = jax.nn.one_hot(places, x.shape[-1], dtype=x.dtype)
    return (jnp.einsum("...k,...kn->...n", g[0], one_hot),)


top_values.defvjp(top_values_fwd, top_values_bwd)
add(
    top_values,
    "the cotangent of the integer output is not used",
    (normal(183, 4, 6), 3),
    (vector(2, 2, 1, 2), 2),
)


@jax.custom_vjp
def summary(x):
    return {"mean": jnp.mean(x), "largest": jnp.max(x), "place": jnp.argmax(x), "count": x.size}


def summary_bwd(x, g):
    one_hot = jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype).reshape(x.shape)
    return (g["mean"] / x.size + g["largest"] * one_hot,)


summary.defvjp(lambda x: (summary(x), x), summary_bwd)
add(summary, "a dict of outputs, two of them integers", (normal(184, 5, 7),), (vector(1, 1),))


@jax.custom_vjp
def total_of(*arrays):
    return sum(jnp.sum(a) for a in arrays)


def total_of_bwd(arrays, g):
    return tuple(jnp.broadcast_to(g, a.shape) for a in arrays)


total_of.defvjp(lambda *arrays: (total_of(*arrays), arrays), total_of_bwd)
add(
    total_of,
    "any number of arguments, some without elements",
    (normal(185, 3), full(0, 0, 2), normal(186, 2, 2)),
    (normal(187, 3),),
)


@jax.custom_vjp
def spread_like(x, template):
    return jnp.broadcast_to(x, template.shape).astype(template.dtype)


def spread_like_bwd(x, g):
    return summed_to(x, g).astype(x.dtype), None


spread_like.defvjp(lambda x, template: (spread_like(x, template), x), spread_like_bwd)
add(
    spread_like,
    "None for a floating argument of which only the shape matters",
    (normal(188, 7), normal(189, 5, 7)),
    (jnp.float32(1), normal(190, 3)),
)


# --- forms that rules take


@jax.custom_jvp
def scaled_sine(x, template):
    return jnp.sin(x) * template.shape[0]


def scaled_sine_by_x(dx, y, x, template):
    return dx * jnp.cos(x) * template.shape[0]


scaled_sine.defjvps(scaled_sine_by_x, None)
add(
    scaled_sine,
    "defjvps, with None for an argument whose values do not matter",
    (normal(191, 5, 7), normal(192, 3)),
)


@jax.custom_jvp
def quotient(x, y):
    return x / y


def quotient_by_x(dx, z, x, y):
    return dx / y


def quotient_by_y(dy, z, x, y):
    return -z * dy / y


quotient.defjvps(quotient_by_x, quotient_by_y)
add(quotient, "defjvps, which adds the two", (normal(193, 5, 7), 1 + uniform(194, 5, 7)))


@jax.custom_jvp
def product(x, y):
    return x * y


@functools.partial(product.defjvp, symbolic_zeros=True)
def product_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    z = x * y
    terms = [d * v for d, v in ((dx, y), (dy, x)) if not isinstance(d, SymbolicZero)]
    return z, jnp.broadcast_to(sum(terms, jnp.zeros_like(z)), z.shape)


add(
    product,
    "skips the terms whose tangent is a symbolic zero",
    (normal(195, 5, 7), normal(196, 5, 7)),
    (normal(197, 5, 7), normal(198, 7)),
)


@jax.custom_vjp
def matmul_as_needed(x, w):
    return x @ w


def matmul_as_needed_fwd(x, w):
    saved = (w.value if x.perturbed else None, x.value if w.perturbed else None)
    return x.value @ w.value, saved


def matmul_as_needed_bwd(saved, g):
    w, x = saved
    if isinstance(g, SymbolicZero):
        return None, None
    return None if w is None else g @ w.T, None if x is None else x.T @ g


matmul_as_needed.defvjp(matmul_as_needed_fwd, matmul_as_needed_bwd, symbolic_zeros=True)
add(
    matmul_as_needed,
    "saves nothing, and returns None, for an argument that is not differentiated",
    (normal(199, 5, 4), normal(200, 4, 3)),
)


@jax.custom_vjp
def jitted_inside(x):
    return jax.jit(jnp.sinh)(x)


@jax.jit
def jitted_inside_bwd(x, g):
    return (g * jnp.cosh(x),)


jitted_inside.defvjp(jax.jit(lambda x: (jnp.sinh(x), x)), jitted_inside_bwd)
add(jitted_inside, "both halves of the rule are jitted", (normal(201, 5, 7),))


@jax.custom_vjp
def nested(x, w):
    return norm_or_zero(relu_slope_zero(x @ w))


def nested_fwd(x, w):
    z = x @ w
    h = relu_slope_zero(z)
    return norm_or_zero(h), (x, w, z)


def nested_bwd(saved, g):
    x, w, z = saved
    h, back = jax.vjp(relu_slope_zero, z)
    (dh,) = jax.vjp(norm_or_zero, h)[1](g)
    (dz,) = back(dh)
    return dz @ w.T, x.T @ dz


nested.defvjp(nested_fwd, nested_bwd)
add(
    nested,
    "calls other rules, and their pullbacks, inside",
    (normal(202, 5, 4), normal(203, 4, 3)),
    (full(0, 2, 4), normal(204, 4, 3)),
)


@jax.custom_jvp
def nested_swish(x):
    return x * logistic_from_output(x)


@nested_swish.defjvp
def nested_swish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    s = logistic_from_output(x)
    return x * s, dx * (s + x * s * (1 - s))


add(
    nested_swish,
    "forward mode around a rule that has reverse mode only",
    (normal(205, 5, 7),),
    (vector(0, -5, 5),),
)


@jax.custom_gradient
def softplus(x):
    def pullback(g):
        return g * jax.nn.sigmoid(x)

    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))), pullback


add(
    softplus,
    "made by custom_gradient: the rule is inside the function",
    (normal(206, 5, 7),),
    (vector(0, -90, 90),),
)


def projection_onto(basis):
    """A rule with an array of its own."""

    @jax.custom_vjp
    def project(x):
        return (x @ basis.T) @ basis

    def project_bwd(_, g):
        return ((g @ basis.T) @ basis,)

    project.defvjp(lambda x: (project(x), None), project_bwd)
    return project


add(
    projection_onto(0.5 * normal(207, 2, 5)),
    "the rule closes over an array and saves nothing",
    (normal(208, 3, 5),),
    name="projection_onto",
)


@jax.custom_batching.custom_vmap
def gram(x):
    return x @ x.T


@gram.def_vmap
def gram_vmap(size, batched, x):
    return jnp.einsum("bij,bkj->bik", x, x), True


@jax.custom_vjp
def gram_of_batches(x):
    return gram(x)


def gram_of_batches_bwd(x, g):
    return ((g + g.T) @ x,)


gram_of_batches.defvjp(lambda x: (gram(x), x), gram_of_batches_bwd)
add(
    gram_of_batches,
    "the function inside has a batching rule of its own, and no derivative without this one",
    (normal(209, 4, 3),),
)


def scan_of_rule(x, w):
    """A rule in a scan, under vmap and checkpoint."""

    @jax.checkpoint
    def step(h, _):
        h = jax.vmap(matmul_f32_inside, in_axes=(0, None))(h[:, None, :], w)[:, 0]
        return sigmoid_with_tails(h), None

    return jax.lax.scan(step, x, None, length=3)[0]


add(
    scan_of_rule,
    "rules inside scan, checkpoint and vmap",
    (normal(210, 5, 4), normal(211, 4, 4)),
)


# --- loops and implicit derivatives


@jax.custom_vjp
def newton_sqrt(a):
    tolerance = 4 * float(jnp.finfo(a.dtype).eps)

    def unfinished(state):
        old, new = state
        return jnp.any(jnp.abs(old - new) > tolerance * new)

    def step(state):
        y = state[1]
        return y, 0.5 * (y + a / y)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros_like(a), jnp.maximum(a, 1)))[1]


def newton_sqrt_bwd(y, g):
    return (0.5 * g / y,)


newton_sqrt.defvjp(lambda a: (y := newton_sqrt(a), y), newton_sqrt_bwd)
add(
    newton_sqrt,
    "a while loop, which has no reverse mode; the implicit derivative",
    (uniform(212, 5, 7, high=4),),
    (vector(1e-4, 1, 1e6),),
)


@jax.custom_jvp
def bisected_cubic_root(a):
    """The y of y^3 + y = a."""

    def step(_, bracket):
        low, high = bracket
        y = (low + high) / 2
        below = y * y * y + y < a
        return jnp.where(below, y, low), jnp.where(below, high, y)

    edge = 1 + jnp.abs(jax.lax.stop_gradient(a))
    low, high = jax.lax.fori_loop(0, 70, step, (-edge, edge))
    return (low + high) / 2


@bisected_cubic_root.defjvp
def bisected_cubic_root_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    y = bisected_cubic_root(a)
    return y, da / (3 * y * y + 1)


add(
    bisected_cubic_root,
    "autodiff of bisection is 0; the implicit derivative is not",
    (normal(213, 5, 7),),
    (vector(0, 1e3, -2),),
)


@jax.custom_jvp
def kepler(mean_anomaly, eccentricity):
    def step(_, e):
        error = e - eccentricity * jnp.sin(e) - mean_anomaly
        return e - error / (1 - eccentricity * jnp.cos(e))

    return jax.lax.fori_loop(0, 20, step, mean_anomaly + eccentricity * jnp.sin(mean_anomaly))


@kepler.defjvp
def kepler_jvp(primals, tangents):
    (mean, ecc), (dmean, decc) = primals, tangents
    e = kepler(mean, ecc)
    return e, (dmean + jnp.sin(e) * decc) / (1 - ecc * jnp.cos(e))


add(
    kepler,
    "Newton's method; the rule is that of the equation, for eccentricities below 1",
    (normal(214, 7), uniform(215, 7, high=0.7)),
    (vector(0, 0.1, 3), full(0.6, 3)),
)


def equilibrium_step(z, params, x):
    w = params["w"]
    return 0.5 * jnp.tanh(z @ (w / jnp.sqrt(1 + jnp.sum(w * w))) + x @ params["u"])


@jax.custom_vjp
def equilibrium(params, x):
    start = jnp.zeros((*x.shape[:-1], params["w"].shape[0]), x.dtype)
    return jax.lax.fori_loop(0, 40, lambda _, z: equilibrium_step(z, params, x), start)


def equilibrium_bwd(saved, g):
    z, params, x = saved
    back_z = jax.vjp(lambda z: equilibrium_step(z, params, x), z)[1]
    u = jax.lax.fori_loop(0, 40, lambda _, u: g + back_z(u)[0], g)
    return jax.vjp(lambda params, x: equilibrium_step(z, params, x), params, x)[1](u)


equilibrium.defvjp(lambda params, x: (z := equilibrium(params, x), (z, params, x)), equilibrium_bwd)
add(
    equilibrium,
    "implicit function theorem at a converged fixed point, by a second iteration",
    ({"w": normal(216, 4, 4), "u": normal(217, 3, 4)}, normal(218, 5, 3)),
)


def capacitance(diagonal, factor, v):
    return diagonal * v + factor * jnp.dot(factor, v)


def conjugate_gradients(diagonal, factor, b):
    return jax.scipy.sparse.linalg.cg(
        lambda v: capacitance(diagonal, factor, v), b, tol=1e-6, maxiter=50
    )[0]


@jax.custom_vjp
def low_rank_solve(diagonal, factor, b):
    return conjugate_gradients(diagonal, factor, b)


def low_rank_solve_fwd(diagonal, factor, b):
    x = conjugate_gradients(diagonal, factor, b)
    return x, (diagonal, factor, x)


def low_rank_solve_bwd(saved, g):
    diagonal, factor, x = saved
    db = conjugate_gradients(diagonal, factor, g)
    dfactor = -(db * jnp.dot(factor, x) + x * jnp.dot(factor, db))
    return -db * x, dfactor, db


low_rank_solve.defvjp(low_rank_solve_fwd, low_rank_solve_bwd)
add(
    low_rank_solve,
    "conjugate gradients forward and backward, instead of the iteration's derivative",
    (1 + uniform(219, 6), normal(220, 6), normal(221, 6)),
)


def cube_root(a):
    """By Newton, differentiated by custom_root."""

    def newton(f, y):
        del f

        def step(_, y):
            return (2 * y + a / (y * y)) / 3

        return jax.lax.fori_loop(0, 60, step, jnp.maximum(y, 1))

    def tangent_solve(linear, b):
        return b / linear(jnp.ones_like(b))

    return jax.lax.custom_root(lambda y: y * y * y - a, a, newton, tangent_solve)


@jax.custom_vjp
def cube_root_rule(a):
    return cube_root(a)


def cube_root_rule_bwd(y, g):
    return (g / (3 * y * y),)


cube_root_rule.defvjp(lambda a: (y := cube_root(a), y), cube_root_rule_bwd)
add(
    cube_root_rule,
    "lax.custom_root inside",
    (uniform(222, 5, high=5),),
    (vector(1, 8, 27),),
)


@jax.custom_vjp
def linear_recurrence(decay, x):
    def step(h, inputs):
        a, u = inputs
        h = a * h + u
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(x[0]), (decay, x))[1]


def linear_recurrence_bwd(saved, g):
    decay, h = saved

    def step(d, inputs):
        a, dh = inputs
        d = dh + d
        return a * d, d

    d = jax.lax.scan(step, jnp.zeros_like(g[0]), (decay, g), reverse=True)[1]
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    return d * before, d


linear_recurrence.defvjp(
    lambda decay, x: (h := linear_recurrence(decay, x), (decay, h)), linear_recurrence_bwd
)
add(
    linear_recurrence,
    "a scan forward, a reversed scan backward",
    (uniform(223, 9, 4), normal(224, 9, 4)),
    (normal(225, 1, 3), normal(226, 1, 3)),
)


def forward_messages(log_start, log_step, log_seen):
    def step(m, seen):
        m = jax.nn.logsumexp(m[:, None] + log_step, axis=0) + seen
        return m, m

    first = log_start + log_seen[0]
    return jnp.concatenate([first[None], jax.lax.scan(step, first, log_seen[1:])[1]])


@jax.custom_vjp
def markov_log_likelihood(log_start, log_step, log_seen):
    return jax.nn.logsumexp(forward_messages(log_start, log_step, log_seen)[-1])


def markov_log_likelihood_fwd(log_start, log_step, log_seen):
    ahead = forward_messages(log_start, log_step, log_seen)
    return jax.nn.logsumexp(ahead[-1]), (ahead, log_step)


def markov_log_likelihood_bwd(saved, g):
    ahead, log_step = saved

    def step(state, before):
        pairs = jax.nn.softmax(before[:, None] + log_step, axis=0) * state
        return jnp.sum(pairs, axis=1), (pairs, state)

    last = g * jax.nn.softmax(ahead[-1])
    first, (pairs, later) = jax.lax.scan(step, last, ahead[:-1], reverse=True)
    return first, jnp.sum(pairs, axis=0), jnp.concatenate([first[None], later])


markov_log_likelihood.defvjp(markov_log_likelihood_fwd, markov_log_likelihood_bwd)
add(
    markov_log_likelihood,
    "the cotangents are the marginals of the states, smoothed backward in time",
    (normal(227, 3), normal(228, 3, 3), normal(229, 6, 3)),
)


# --- complex


@jax.custom_vjp
def complex_abs(z):
    return jnp.abs(z)


def complex_abs_bwd(z, g):
    n = jnp.abs(z)
    return (jnp.where(n > 0, g / jnp.where(n > 0, n, 1), 0) * jnp.conj(z),)


complex_abs.defvjp(lambda z: (complex_abs(z), z), complex_abs_bwd)
add(
    complex_abs,
    "the conjugate, as JAX has it; 0 at 0",
    (cplx(230, 5, 7),),
    (jnp.asarray([0, 1 + 1j, -2], jnp.complex64),),
)


@jax.custom_vjp
def fourier(z):
    return jnp.fft.fft(z)


def fourier_bwd(_, g):
    return (jnp.fft.fft(g),)


fourier.defvjp(lambda z: (fourier(z), None), fourier_bwd)
add(fourier, "the transpose of the transform is itself, not its inverse", (cplx(231, 3, 8),))


@jax.custom_jvp
def conjugate(z):
    return jnp.conj(z)


@conjugate.defjvp
def conjugate_jvp(primals, tangents):
    return conjugate(*primals), jnp.conj(tangents[0])


add(conjugate, "not holomorphic", (cplx(232, 5, 7),))


@jax.custom_jvp
def complex_exp(z):
    return jnp.exp(z)


@complex_exp.defjvp
def complex_exp_jvp(primals, tangents):
    y = complex_exp(*primals)
    return y, y * tangents[0]


add(complex_exp, "holomorphic: no conjugate", (cplx(233, 5, 7),), (normal(234, 4),))


@jax.custom_vjp
def complex_matmul(a, b):
    return a @ b


def complex_matmul_bwd(saved, g):
    a, b = saved
    return g @ b.T, a.T @ g


complex_matmul.defvjp(saves(complex_matmul), complex_matmul_bwd)
add(complex_matmul, "transposed, not conjugated", (cplx(235, 3, 4), cplx(236, 4, 2)))


@jax.custom_vjp
def phasor(radius, angle):
    return radius * jnp.exp(1j * angle)


def phasor_bwd(saved, g):
    radius, angle = saved
    turned = g * jnp.exp(1j * angle)
    return summed_to(radius, jnp.real(turned)), summed_to(angle, -radius * jnp.imag(turned))


phasor.defvjp(saves(phasor), phasor_bwd)
add(phasor, "real arguments, complex output", (normal(237, 5, 7), normal(238, 5, 7)))


@jax.custom_vjp
def power_of_signal(z):
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2


def power_of_signal_bwd(z, g):
    return (2 * g * jnp.conj(z),)


power_of_signal.defvjp(lambda z: (power_of_signal(z), z), power_of_signal_bwd)
add(power_of_signal, "complex argument, real output", (cplx(239, 5, 7),), (cplx(240, 3) * 1e3,))


# --- convolution, pooling, attention, normalisation


@jax.custom_vjp
def circular_convolution(x, kernel):
    if kernel.shape[-1] != x.shape[-1]:
        raise ValueError(f"x and kernel must be of one length, got {x.shape} and {kernel.shape}")
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(kernel), x.shape[-1])


def circular_convolution_bwd(saved, g):
    x, kernel = saved
    n, spectrum = x.shape[-1], jnp.fft.rfft(g)
    dx = jnp.fft.irfft(spectrum * jnp.conj(jnp.fft.rfft(kernel)), n)
    dkernel = jnp.fft.irfft(spectrum * jnp.conj(jnp.fft.rfft(x)), n)
    return summed_to(x, dx), summed_to(kernel, dkernel)


circular_convolution.defvjp(saves(circular_convolution), circular_convolution_bwd)
add(
    circular_convolution,
    "correlation by another transform; odd and even lengths",
    (normal(241, 3, 8), normal(242, 8)),
    (normal(243, 2, 7), normal(244, 2, 7)),
)


def padded_for(x, taps):
    return jnp.pad(x, ((0, 0), ((taps - 1) // 2, taps // 2), (0, 0)))


@jax.custom_vjp
def convolution_same(x, w):
    n, taps = x.shape[1], w.shape[0]
    padded = padded_for(x, taps)
    return sum(jnp.einsum("bnc,cd->bnd", padded[:, t : t + n], w[t]) for t in range(taps))


def convolution_same_bwd(saved, g):
    x, w = saved
    n, taps = x.shape[1], w.shape[0]
    padded = padded_for(x, taps)
    dw = [jnp.einsum("bnc,bnd->cd", padded[:, t : t + n], g) for t in range(taps)]
    dpadded = jnp.zeros_like(padded)
    for t in range(taps):
        dpadded = dpadded.at[:, t : t + n].add(jnp.einsum("bnd,cd->bnc", g, w[t]))
    before = (taps - 1) // 2
    return dpadded[:, before : before + n], jnp.stack(dw)


convolution_same.defvjp(saves(convolution_same), convolution_same_bwd)
add(
    convolution_same,
    "zero padding that an even number of taps makes uneven",
    (normal(245, 2, 7, 3), normal(246, 3, 3, 4)),
    (normal(247, 1, 5, 2), normal(248, 4, 2, 3)),
)


def images_by_kernels(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def strided_convolution(x, kernel):
    return images_by_kernels(x, kernel)


def strided_convolution_bwd(saved, g):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: images_by_kernels(x, kernel), x)(g)
    (dkernel,) = jax.linear_transpose(lambda kernel: images_by_kernels(x, kernel), kernel)(g)
    return dx, dkernel


strided_convolution.defvjp(saves(strided_convolution), strided_convolution_bwd)
add(
    strided_convolution,
    "linear_transpose of each side",
    (normal(249, 2, 7, 6, 2), normal(250, 3, 3, 2, 3)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average_pool(x, window):
    n = x.shape[1] // window
    return jnp.mean(x[:, : n * window].reshape(x.shape[0], n, window, *x.shape[2:]), axis=2)


def average_pool_fwd(x, window):
    return average_pool(x, window), x


def average_pool_bwd(window, x, g):
    d = jnp.repeat(g / window, window, axis=1)
    rest = x.shape[1] - d.shape[1]
    return (jnp.pad(d, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2)),)


average_pool.defvjp(average_pool_fwd, average_pool_bwd)
add(
    average_pool,
    "0 for the tail that fills no window",
    (normal(251, 2, 8, 3), 2),
    (normal(252, 2, 7, 3), 3),
)


@jax.custom_vjp
def max_pool(x):
    return jnp.max(corners(x), axis=0)


def corners(x):
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return jnp.stack([x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)])


def max_pool_bwd(x, g):
    first = jax.nn.one_hot(jnp.argmax(corners(x), axis=0), 4, dtype=g.dtype, axis=0)
    return jax.vjp(corners, x)[1](first * g)


max_pool.defvjp(lambda x: (max_pool(x), x), max_pool_bwd)
add(
    max_pool,
    "the first of equal pixels takes all; odd rows are left out",
    (normal(253, 2, 6, 4, 3),),
    (jnp.round(normal(254, 1, 5, 5, 2)),),
)


def causal_scores(q, k):
    allowed = jnp.tril(jnp.ones((q.shape[0], k.shape[0]), bool))
    return jnp.where(allowed, q @ k.T / math.sqrt(q.shape[-1]), -INF)


@jax.custom_vjp
def causal_attention(q, k, v):
    return jax.nn.softmax(causal_scores(q, k), axis=-1) @ v


def causal_attention_fwd(q, k, v):
    scores = causal_scores(q, k)
    log_total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    out = jnp.exp(scores - log_total) @ v
    return out, (q, k, v, out, log_total)


def causal_attention_bwd(saved, g):
    q, k, v, out, log_total = saved
    p = jnp.exp(causal_scores(q, k) - log_total)
    ds = p * (g @ v.T - jnp.sum(g * out, axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return ds @ k, ds.T @ q, p.T @ g


causal_attention.defvjp(causal_attention_fwd, causal_attention_bwd)
add(
    causal_attention,
    "keeps a log-sum-exp a row instead of the weights",
    (normal(255, 6, 4), normal(256, 6, 4), normal(257, 6, 3)),
    (normal(258, 3, 4), normal(259, 5, 4), normal(260, 5, 4)),
)


def in_blocks(logits, block):
    n = logits.shape[-1]
    count = -(-n // block)
    padded = jnp.pad(logits, ((0, 0), (0, count * block - n)), constant_values=-INF)
    return jnp.moveaxis(padded.reshape(logits.shape[0], count, block), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def blocked_log_partition(logits, block):
    def step(total, part):
        return jnp.logaddexp(total, jax.nn.logsumexp(part, axis=-1)), None

    start = jnp.full(logits.shape[:1], -INF, logits.dtype)
    return jax.lax.scan(step, start, in_blocks(logits, block))[0]


def blocked_log_partition_fwd(logits, block):
    y = blocked_log_partition(logits, block)
    return y, (logits, y)


def blocked_log_partition_bwd(block, saved, g):
    logits, y = saved

    def step(_, part):
        return None, jnp.exp(part - y[:, None]) * g[:, None]

    d = jax.lax.scan(step, None, in_blocks(logits, block))[1]
    return (jnp.moveaxis(d, 0, 1).reshape(logits.shape[0], -1)[:, : logits.shape[1]],)


blocked_log_partition.defvjp(blocked_log_partition_fwd, blocked_log_partition_bwd)
add(
    blocked_log_partition,
    "by blocks that do not divide the length",
    (normal(261, 3, 10), 4),
    (normal(262, 2, 8), 4),
)


@jax.custom_vjp
def batch_norm(x, gain, bias, running):
    mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * gain + bias
    new = {"mean": mean, "var": var}
    new = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * jax.lax.stop_gradient(now), running, new)
    return y, new


def batch_norm_fwd(x, gain, bias, running):
    mean, r = jnp.mean(x, axis=0), jax.lax.rsqrt(jnp.var(x, axis=0) + 1e-5)
    return batch_norm(x, gain, bias, running), (x, mean, r, gain)


def batch_norm_bwd(saved, g):
    x, mean, r, gain = saved
    dy, drunning = g
    z = (x - mean) * r
    d = dy * gain
    dx = r * (d - jnp.mean(d, axis=0) - z * jnp.mean(d * z, axis=0))
    return dx, jnp.sum(dy * z, axis=0), jnp.sum(dy, axis=0), jax.tree.map(running_part, drunning)


def running_part(d):
    return 0.9 * d


batch_norm.defvjp(batch_norm_fwd, batch_norm_bwd)
add(
    batch_norm,
    "the running averages do not pass a gradient to x: the function stops it",
    (
        normal(263, 8, 3),
        1 + 0.1 * normal(264, 3),
        normal(265, 3),
        {"mean": normal(266, 3), "var": uniform(267, 3)},
    ),
)


@jax.custom_vjp
def distillation_loss(student, teacher):
    target = jax.lax.stop_gradient(jax.nn.softmax(teacher, axis=-1))
    return -jnp.sum(target * jax.nn.log_softmax(student, axis=-1))


def distillation_loss_bwd(saved, g):
    student, teacher = saved
    d = g * (jax.nn.softmax(student, axis=-1) - jax.nn.softmax(teacher, axis=-1))
    return d, jnp.zeros_like(teacher)


distillation_loss.defvjp(saves(distillation_loss), distillation_loss_bwd)
add(
    distillation_loss,
    "0 for the teacher: the function itself stops its gradient",
    (normal(268, 5, 7), normal(269, 5, 7)),
)


@jax.custom_vjp
def window_at(x, start):
    return jax.lax.dynamic_slice(x, (start,), (3,))


def window_at_bwd(saved, g):
    x, start = saved
    return jax.lax.dynamic_update_slice(jnp.zeros_like(x), g, (start,)), None


window_at.defvjp(saves(window_at), window_at_bwd)
add(
    window_at,
    "a start too far to the right is moved, forward and backward alike",
    (normal(271, 8), jnp.int32(2)),
    (normal(272, 8), jnp.int32(7)),
)


@jax.custom_vjp
def running_product(x):
    return jnp.cumprod(x, axis=-1)


def running_product_bwd(x, g):
    n = x.shape[-1]
    i, j = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
    others = jnp.where(j == i, jnp.ones((), x.dtype), x[..., None, :])
    return (jnp.sum(jnp.where(j >= i, jnp.cumprod(others, axis=-1), 0) * g[..., None, :], -1),)


running_product.defvjp(lambda x: (running_product(x), x), running_product_bwd)
add(
    running_product,
    "does not divide by x, which may be 0",
    (normal(273, 3, 5),),
    (vector(2, 0, 3, 0, 1),),
)


# --- rules that rebuild the input from the output


@jax.custom_vjp
def relu_in_place(x):
    return jnp.maximum(x, 0)


def relu_in_place_bwd(y, g):
    return (jnp.where(y > 0, g, 0),)


relu_in_place.defvjp(lambda x: (y := relu_in_place(x), y), relu_in_place_bwd)
add(relu_in_place, "keeps the output alone", (normal(274, 5, 7),), (vector(0, -1, 2),))


@jax.custom_vjp
def softmax_in_place(x):
    return jax.nn.softmax(x, axis=-1)


def softmax_in_place_bwd(y, g):
    return (y * (g - jnp.sum(y * g, axis=-1, keepdims=True)),)


softmax_in_place.defvjp(lambda x: (y := softmax_in_place(x), y), softmax_in_place_bwd)
add(
    softmax_in_place,
    "cotangents of 1e-30 in the tail",
    (normal(275, 5, 7),),
    (vector(0, 70, -30),),
)


@jax.custom_vjp
def leaky_norm_in_place(x):
    z = x - jnp.mean(x, axis=0)
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=0) + 1e-5)
    return jnp.where(z >= 0, z, 0.1 * z)


def leaky_norm_in_place_fwd(x):
    centred = x - jnp.mean(x, axis=0)
    r = jax.lax.rsqrt(jnp.mean(centred * centred, axis=0) + 1e-5)
    y = jnp.where(centred >= 0, centred * r, 0.1 * centred * r)
    return y, (y, r)


def leaky_norm_in_place_bwd(saved, g):
    y, r = saved
    z = jnp.where(y >= 0, y, 10 * y)
    d = jnp.where(y >= 0, g, 0.1 * g)
    return (r * (d - jnp.mean(d, axis=0) - z * jnp.mean(d * z, axis=0)),)


leaky_norm_in_place.defvjp(leaky_norm_in_place_fwd, leaky_norm_in_place_bwd)
add(
    leaky_norm_in_place,
    "undoes the activation to find what was normalised",
    (normal(276, 8, 3),),
    (5 + normal(277, 6, 2),),
)


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def coupled(w, x):
    return jnp.tanh(x @ w)


@jax.custom_vjp
def reversible_block(params, x):
    a, b = halves(x)
    a = a + coupled(params["f"], b)
    b = b + coupled(params["g"], a)
    return jnp.concatenate([a, b], axis=-1)


def reversible_block_bwd(saved, g):
    params, y = saved
    a_new, b_new = halves(y)
    da, db = halves(g)
    shift, back = jax.vjp(coupled, params["g"], a_new)
    b = b_new - shift
    dw_g, extra = back(db)
    da = da + extra
    dw_f, extra = jax.vjp(coupled, params["f"], b)[1](da)
    return {"f": dw_f, "g": dw_g}, jnp.concatenate([da, db + extra], axis=-1)


reversible_block.defvjp(
    lambda params, x: (y := reversible_block(params, x), (params, y)), reversible_block_bwd
)
add(
    reversible_block,
    "saves its output and computes the input from it",
    ({"f": normal(278, 3, 3), "g": normal(279, 3, 3)}, normal(280, 5, 6)),
)


# --- no elements, scalars


@jax.custom_vjp
def sum_of_cubes(x):
    return jnp.sum(x**3, axis=0)


def sum_of_cubes_bwd(x, g):
    return (3 * x * x * g,)


sum_of_cubes.defvjp(lambda x: (sum_of_cubes(x), x), sum_of_cubes_bwd)
add(
    sum_of_cubes,
    "no rows at all",
    (full(0, 0, 3),),
    (normal(281, 4, 3),),
    (full(0, 3, 0),),
)


@jax.custom_jvp
def hypotenuse(x, y):
    return jnp.hypot(x, y)


@hypotenuse.defjvp
def hypotenuse_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    r = hypotenuse(x, y)
    safe = jnp.where(r > 0, r, 1)
    return r, (x / safe) * dx + (y / safe) * dy


add(
    hypotenuse,
    "scalars, and 0 at the origin",
    (jnp.float32(3), jnp.float32(-4)),
    (jnp.float32(0), jnp.float32(0)),
    (normal(282, 5), normal(283, 5)),
)


@jax.custom_jvp
def log_beta(a, b):
    return jax.lax.lgamma(a) + jax.lax.lgamma(b) - jax.lax.lgamma(a + b)


@log_beta.defjvp
def log_beta_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    psi, both = jax.lax.digamma, jax.lax.digamma(a + b)
    return log_beta(a, b), (psi(a) - both) * da + (psi(b) - both) * db


add(
    log_beta,
    "the difference of two digammas cancels for large arguments",
    (uniform(284, 5, high=4), uniform(285, 5, high=4)),
    (jnp.float32(1000), jnp.float32(1)),
)


@jax.custom_jvp
def bessel_i0e(x):
    return jax.lax.bessel_i0e(x)


@bessel_i0e.defjvp
def bessel_i0e_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = bessel_i0e(x)
    return y, dx * (jax.lax.bessel_i1e(x) - jnp.sign(x) * y)


add(
    bessel_i0e,
    "0 at the kink at 0, which the scaling makes",
    (normal(286, 5, 7),),
    (vector(0, 30, -2),),
)
