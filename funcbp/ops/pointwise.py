"""Pointwise functions: y_i = f(x_i), so dx_i = dy_i f'(x_i).

Each is a formula and its derivative (the slope). The rule saves x, which is an argument and so
costs nothing, and takes the slope from it. The textbook forms in y (sigmoid' = y(1 - y),
tanh' = 1 - y^2) cost a copy of y and lose all digits where y rounds to 1: at x = 17 the first
gives 0 for 4.1e-8. The slopes below keep full relative precision as long as they are normal
numbers, by exponentials of -|x| and, where a slope crosses zero, its series around the root.

Saves: x.
Dtype: computes in float32 or wider, returns x's dtype.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import Op, op
from funcbp.ops._numeric import near_root, wide

X = Float[Array, "..."]

# v = V1 x + V3 x^3 is the argument of the approximate gelu's sigmoid.
V1 = 2 * math.sqrt(2 / math.pi)
V3 = 0.044715 * V1
# The normal density at 0.
DENSITY = math.sqrt(0.5 / math.pi)

# Where the slopes cross zero, in float32, and their Taylor coefficients there (by 60 digits).
SILU_ROOT = -1.2784645557403564
SILU_SERIES = (
    -2.82703966836e-09,
    0.217811701913,
    0.146648796262,
    0.0188748150141,
    -0.0152226547944,
    -0.00660658914822,
    0.000126627337531,
    0.000798521862557,
    0.00018570724839,
)
GELU_ROOT = -0.7517915368080139
GELU_SERIES = (
    -5.22731210458e-09,
    0.431493982906,
    0.388284983652,
    -0.0181996708741,
    -0.114008232402,
    -0.0147715235599,
    0.0194216794533,
    0.00453922859617,
    -0.00223953798686,
)
GELU_TANH_ROOT = -0.7524614334106445
GELU_TANH_SERIES = (
    -4.88057699095e-09,
    0.430400082236,
    0.387518446673,
    -0.0157828483535,
    -0.113944482139,
    -0.0166193296822,
    0.0196823090422,
    0.0052610594747,
    -0.00242273175122,
)

TAILS = [
    -1e30,
    -88.0,
    -40.0,
    -17.0,
    -9.01,
    -2.5,
    -1.278,
    -0.752,
    -1e-20,
    -0.0,
    0.0,
    1e-20,
    0.5,
    1.0,
    3.1,
    9.01,
    17.0,
    40.0,
    88.0,
    1e30,
]
CASES = (
    Case("normal", (3, 5)),
    Case("tails", values(TAILS)),
    Case("scalar", (), transformed=False),
    Case("empty", (0, 3), transformed=False),
    Case("activations", (2048, 4096), bench=True),
)


class Formula(NamedTuple):
    """A pointwise function, its derivative and its yardstick, all of x."""

    value: Callable[..., Array]
    slope: Callable[..., Array]
    plain: Callable[..., Array]


# The pointwise functions by name, for the ops that fuse one, as `dense` does.
FORMULAS: dict[str, Formula] = {}


def pointwise(
    formula: Callable,
    slope: Callable,
    plain: Callable | None = None,
    *,
    like: Callable | None = None,
    cases: tuple[Case, ...] = CASES,
) -> Op:
    """Declares y = formula(x) with dx = dy * slope(x).

    Args:
      formula: x -> y; settings follow x. It may assume float32 or wider.
      slope: x -> dy/dx, same settings.
      plain: the yardstick, if autodiff of `formula` is not accurate enough in float64.
      like: the public function whose signature and values the op has.
      cases: its cases.
    """

    def fwd(x, **static):
        return formula(wide(x), **static).astype(x.dtype), x

    def bwd(x, dy, **static):
        return (wide(dy) * slope(wide(x), **static),)

    name = formula.__name__.strip("_")
    FORMULAS[name] = Formula(formula, slope, plain or formula)
    return op(plain or formula, fwd, bwd, like=like, cases=cases, name=name)


def _magnitude(x: Array) -> Array:
    """|x| with derivative 1 at 0, so that a formula in it differentiates there from the right."""
    return jnp.where(x < 0, -x, x)


# --- sigmoid: y = 1 / (1 + e^-x),  y' = e^-|x| / (1 + e^-|x|)^2


def _sigmoid(x: X) -> X:
    """1 / (1 + exp(-x)), by exp(-|x|), which cannot overflow."""
    e = jnp.exp(-_magnitude(x))
    return jnp.where(x < 0, e, 1) / (1 + e)


def _sigmoid_slope(x):
    e = jnp.exp(-jnp.abs(x))
    return e / jnp.square(1 + e)


sigmoid = pointwise(_sigmoid, _sigmoid_slope, like=jax.nn.sigmoid)


# --- tanh: y' = 1 - tanh(x)^2 = (2 t / (1 + t^2))^2, t = e^-|x|


def _tanh(x: X, /) -> X:
    return jnp.tanh(x)


def _tanh_slope(x):
    t = jnp.exp(-jnp.abs(x))
    return jnp.square(2 * t / (1 + jnp.square(t)))


def _tanh_plain(x: X, /) -> X:
    """Hyperbolic tangent; by e^-2|x| beyond 1, where 1 - tanh^2 would lose its digits."""
    t = jnp.exp(-2 * _magnitude(x))
    far = (1 - t) / (1 + t)
    return jnp.where(jnp.abs(x) < 1, jnp.tanh(x), jnp.where(x < 0, -far, far))


tanh = pointwise(_tanh, _tanh_slope, _tanh_plain, like=jnp.tanh)


# --- relu: y = max(x, 0),  y' = 1 where x > 0, else 0 (at 0 too, as jax.nn.relu)


def _relu(x: X) -> X:
    """max(x, 0)."""
    return jnp.where(x > 0, x, jnp.zeros_like(x))


def _relu_slope(x):
    return (x > 0).astype(x.dtype)


relu = pointwise(_relu, _relu_slope, like=jax.nn.relu)


# --- silu: y = x s, s = sigmoid(x),  y' = s (1 + x (1 - s))


def _silu(x: X) -> X:
    """x sigmoid(x), also called swish."""
    return x * _sigmoid(x)


def _silu_slope(x):
    slope = _gated_slope(x, jnp.exp(-0.5 * jnp.abs(x)), x)
    return near_root(x, SILU_ROOT, SILU_SERIES, slope)


def _gated_slope(x, half, xdv):
    """s + x ds/dx for s = sigmoid(v), v of x's sign: s (1 + x v' (1 - s)).

    Takes half = exp(-|v| / 2): below v = -87 s is no normal number while the slope, larger by
    x v', still is, so one half goes in before that factor and one after.
    """
    e = jnp.square(half)
    factor = (1 + xdv * jnp.where(x < 0, 1, e) / (1 + e)) / (1 + e)
    return jnp.where(x < 0, half * (half * factor), factor)


silu = pointwise(_silu, _silu_slope, like=jax.nn.silu)


# --- gelu: exact, y = x P(x) with P, p the normal distribution and density: y' = P + x p
#     approximate, y = x s, s = sigmoid(v), v = 2 sqrt(2/pi) (x + 0.044715 x^3):
#     y' = s (1 + x v' (1 - s))


def _plain_gelu(x: X, approximate: bool = True) -> X:
    """x P(X <= x) for a standard normal X; `approximate` takes the tanh formula.

    Ref: Hendrycks and Gimpel, 2016, section 2.
    """
    if approximate:
        return x * _sigmoid(_gelu_argument(_clipped(x)))
    return x * (0.5 * jax.lax.erfc(-x * math.sqrt(0.5)))


def _gelu(x, approximate=True):
    if approximate:
        _, e, t = _gelu_sigmoid(_clipped(x))
        return x * (jnp.where(x < 0, e, 1) * t)
    return _plain_gelu(x, approximate=False)


def _gelu_slope(x, approximate=True):
    x = _clipped(x)
    if approximate:
        half, e, t = _gelu_sigmoid(x)
        xdv = x * (V1 + 3 * V3 * jnp.square(x))
        factor = t * (1 + xdv * (jnp.where(x < 0, 1, e) * t))
        slope = jnp.where(x < 0, half * (half * factor), factor)  # as in _gated_slope
        return near_root(x, GELU_TANH_ROOT, GELU_TANH_SERIES, slope)
    half = jnp.exp(-0.25 * jnp.square(x))
    slope = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + half * (half * x * DENSITY)
    # In the tail P = p / |x| (1 - 1/x^2 + 3/x^4 ...), which stays normal as long as x p does.
    t = 1 / jnp.square(jnp.minimum(x, -1))
    tail = half * (half * x * DENSITY * (1 - t * (1 - t * (1 - 3 * t))))
    slope = jnp.where(x < -8, tail, slope)
    return near_root(x, GELU_ROOT, GELU_SERIES, slope)


def _gelu_argument(x):
    return x * (V1 + V3 * jnp.square(x))


def _gelu_sigmoid(x):
    """What value and slope have in common: exp(-|v| / 2), its square e, and 1 / (1 + e)."""
    half = jnp.exp(-0.5 * jnp.abs(_gelu_argument(x)))
    e = jnp.square(half)
    return half, e, 1 / (1 + e)


def _clipped(x):
    """x within +-40, beyond which the slope is 0 or 1 in float64 too: keeps x^3 and x p finite."""
    return jnp.clip(x, -40, 40)


gelu = pointwise(
    _gelu,
    _gelu_slope,
    _plain_gelu,
    like=jax.nn.gelu,
    cases=(*CASES, Case("exact", values(TAILS), approximate=False)),
)
