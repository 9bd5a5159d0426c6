"""Softplus and its relatives: smooth pointwise functions whose slopes stay accurate in the tails.

Saves: x.
Dtype: computes in float32 or wider, returns x's dtype.
"""

import jax
import jax.numpy as jnp

from funcbp.case import Case, uniform, values
from funcbp.ops._numeric import near_root
from funcbp.ops.pointwise import CASES, FORMULAS, X, pointwise

SMOOTH = (*CASES[:2], *CASES[3:])
# Where mish's slope crosses zero, in float32, and its Taylor coefficients there (by 60 digits).
MISH_ROOT = -1.1924312114715576
MISH_SERIES = (
    8.12572793366e-10,
    0.266947915296,
    0.204731264463,
    0.0419078207968,
    -0.0202718229575,
    -0.0158211266231,
    -0.00336068490375,
    0.00109240556505,
    0.000989818109091,
)
# Beyond this, the square of x would overflow float32, and b does not count beside it.
FAR = 1e15

_logistic = FORMULAS["sigmoid"].value


# --- softplus: y = log(1 + e^x),  y' = 1 / (1 + e^-x)


def _softplus(x: X) -> X:
    """log(1 + exp(x))."""
    # The pieces' slopes at 0, 1 and -1/2, add up to the whole's.
    return jnp.where(x < 0, 0, x) + jnp.log1p(jnp.exp(-jnp.where(x < 0, -x, x)))


def _softplus_plain(x: X) -> X:
    """log(1 + exp(x)); its derivative at 0 is 1/2, which a formula by |x| does not say."""
    return jnp.logaddexp(x, 0)


softplus = pointwise(_softplus, _logistic, _softplus_plain, like=jax.nn.softplus, cases=SMOOTH)


def _log_sigmoid(x: X) -> X:
    """log(sigmoid(x)) = -softplus(-x)."""
    return -_softplus(-x)


def _log_sigmoid_slope(x):
    return _logistic(-x)


def _log_sigmoid_plain(x: X) -> X:
    """log(sigmoid(x)) = -log(1 + exp(-x))."""
    return -jnp.logaddexp(-x, 0)


log_sigmoid = pointwise(
    _log_sigmoid, _log_sigmoid_slope, _log_sigmoid_plain, like=jax.nn.log_sigmoid, cases=SMOOTH
)


# --- squareplus: y = (x + r) / 2, r = sqrt(x^2 + b),  y' = (1 + x / r) / 2
#     For x < 0 both lose their digits: x + r = b / (r - x).


def _squareplus(x: X, b: float = 4) -> X:
    """(x + sqrt(x^2 + b)) / 2.

    Ref: Barron, 2021, equation 1.
    """
    r = _hypotenuse(x, b)
    return 0.5 * jnp.where(x < 0, b / (r - jnp.where(x < 0, x, 0)), x + r)


def _hypotenuse(x, b):
    near = jnp.abs(x) < FAR
    return jnp.where(near, jnp.sqrt(jnp.square(jnp.where(near, x, 0)) + b), jnp.abs(x))


def _squareplus_slope(x, b):
    r = _hypotenuse(x, b)
    return 0.5 * jnp.where(x < 0, b / r / (r - jnp.where(x < 0, x, 0)), 1 + x / r)


squareplus = pointwise(
    _squareplus,
    _squareplus_slope,
    like=jax.nn.squareplus,
    cases=(*SMOOTH, Case("narrow", (3, 5), b=0.5)),
)


# --- soft_sign: y = x / (1 + |x|),  y' = 1 / (1 + |x|)^2


def _soft_sign(x: X) -> X:
    """x / (1 + |x|)."""
    return x / (1 + jnp.where(x < 0, -x, x))


def _soft_sign_slope(x):
    return jnp.square(1 / (1 + jnp.abs(x)))


soft_sign = pointwise(_soft_sign, _soft_sign_slope, like=jax.nn.soft_sign, cases=SMOOTH)


# --- mish: y = x tanh(softplus(x)). With w = e^x, tanh(softplus(x)) = w (w + 2) / (w^2 + 2 w + 2),
#     y' = w (w + 2) / d + 4 x w (w + 1) / d^2, d = w^2 + 2 w + 2; for x > 0 both over w^2.


def _mish(x: X) -> X:
    """x tanh(softplus(x)).

    Ref: Misra, 2020, equation 1.
    """
    e = jnp.exp(-jnp.where(x < 0, -x, x))
    above = (1 + 2 * e) / (1 + 2 * e * (1 + e))
    below = e * (e + 2) / (e * (e + 2) + 2)
    return x * jnp.where(x < 0, below, above)


def _mish_slope(x):
    half = jnp.exp(-0.5 * jnp.abs(x))
    e = jnp.square(half)
    d = 1 + 2 * e * (1 + e)
    above = (1 + 2 * e + 4 * x * e * (1 + e) * e / d) / d
    # Below -87 e is no normal number while the slope, larger by x, still is.
    d = e * (e + 2) + 2
    below = half * (half * ((e + 2 + 4 * x * (e + 1) / d) / d))
    return near_root(x, MISH_ROOT, MISH_SERIES, jnp.where(x < 0, below, above))


mish = pointwise(_mish, _mish_slope, like=jax.nn.mish, cases=SMOOTH)


# --- log1mexp: y = log(1 - e^-x), x > 0,  y' = 1 / (e^x - 1)


def _log1mexp(x: X) -> X:
    """log(1 - exp(-x)), for x > 0.

    Ref: Maechler, 2012, equation 7.
    """
    far = x > 0.6931471805599453
    near = jnp.log(-jnp.expm1(-jnp.where(far, 1, x)))
    return jnp.where(far, jnp.log1p(-jnp.exp(-jnp.where(far, x, 1))), near)


def _log1mexp_slope(x):
    return 1 / jnp.expm1(x)


log1mexp = pointwise(
    _log1mexp,
    _log1mexp_slope,
    like=jax.nn.log1mexp,
    cases=(
        Case("positive", uniform(3, 5, low=0.01, high=5.0)),
        Case(
            "tails",
            values([1e-30, 1e-5, 0.5, 0.69, 0.7, 9.0, 17.0, 40.0, 88.0, 1e30]),
            transformed=False,  # float32 holds no second derivative at 1e-30
        ),
        Case("empty", (0, 3)),
        Case("log survivals", uniform(2048, 4096, low=0.01, high=20.0), bench=True),
    ),
)
