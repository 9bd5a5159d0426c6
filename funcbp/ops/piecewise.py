"""Pointwise functions in pieces: rectifiers and hard limits.

At a border the slope is that of the piece to which the border belongs, as the `where` in the
formula says; jax.nn's forms by `minimum` and `maximum` give the mean of both sides there.

Saves: x.
Dtype: computes in float32 or wider, returns x's dtype.
"""

import jax
import jax.numpy as jnp

from funcbp.case import Case, values
from funcbp.ops.pointwise import CASES, X, pointwise

# Klambauer et al., 2017, section 2.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

LIMITS = values([-1e30, -40.0, -3.0, -2.999, -1.5, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, 6.0, 7.0, 1e30])
PIECES = (CASES[0], Case("borders and tails", LIMITS, transformed=False), *CASES[3:])


def _relu6(x: X) -> X:
    """min(max(x, 0), 6)."""
    return jnp.where(x > 0, jnp.where(x < 6, x, 6), 0)


def _relu6_slope(x):
    return ((x > 0) & (x < 6)).astype(x.dtype)


relu6 = pointwise(_relu6, _relu6_slope, like=jax.nn.relu6, cases=PIECES)


def _leaky_relu(x: X, negative_slope: float = 0.01) -> X:
    """x for x >= 0, else negative_slope x."""
    return jnp.where(x >= 0, x, negative_slope * x)


def _leaky_relu_slope(x, negative_slope):
    return jnp.where(x >= 0, 1, negative_slope).astype(x.dtype)


leaky_relu = pointwise(_leaky_relu, _leaky_relu_slope, like=jax.nn.leaky_relu, cases=PIECES)


# --- elu: y = x for x > 0, else a (e^x - 1),  y' = 1 or a e^x


def _elu(x: X, alpha: float = 1.0) -> X:
    """x for x > 0, else alpha (exp(x) - 1).

    Ref: Clevert et al., 2016, equation 15.
    """
    return jnp.where(x > 0, x, alpha * jnp.expm1(_below(x)))


def _below(x):
    """min(x, 0): keeps the exponential of the branch not taken finite."""
    return jnp.where(x > 0, 0, x)


def _elu_slope(x, alpha):
    return jnp.where(x > 0, 1, _exponential(x, alpha))


def _exponential(x, factor):
    """factor exp(x) for x < 0, a normal number where the product is one and exp(x) is not."""
    half = jnp.exp(0.5 * _below(x))
    return half * (half * factor)


elu = pointwise(
    _elu, _elu_slope, like=jax.nn.elu, cases=(*PIECES, Case("steep", LIMITS, alpha=1.7))
)


# --- celu: y = x for x > 0, else a (e^(x/a) - 1),  y' = 1 or e^(x/a)


def _celu(x: X, alpha: float = 1.0) -> X:
    """x for x > 0, else alpha (exp(x / alpha) - 1): smooth at 0 for any alpha.

    Ref: Barron, 2017, equation 2.
    """
    return jnp.where(x > 0, x, alpha * jnp.expm1(_below(x) / alpha))


def _celu_slope(x, alpha):
    return jnp.where(x > 0, 1, jnp.exp(_below(x) / alpha))


celu = pointwise(
    _celu, _celu_slope, like=jax.nn.celu, cases=(*PIECES, Case("steep", LIMITS, alpha=1.7))
)


def _selu(x: X) -> X:
    """scale elu(x, alpha), whose constants keep mean 0 and variance 1 from layer to layer."""
    return SELU_SCALE * _elu(x, SELU_ALPHA)


def _selu_slope(x):
    return jnp.where(x > 0, SELU_SCALE, _exponential(x, SELU_SCALE * SELU_ALPHA))


selu = pointwise(_selu, _selu_slope, like=jax.nn.selu, cases=PIECES)


# --- hard_sigmoid: y = min(max(x + 3, 0), 6) / 6,  hard_silu: x times that


def _hard_sigmoid(x: X) -> X:
    """(x + 3) / 6, at least 0 and at most 1."""
    return _relu6(x + 3) / 6


def _hard_sigmoid_slope(x):
    return _relu6_slope(x + 3) / 6


hard_sigmoid = pointwise(_hard_sigmoid, _hard_sigmoid_slope, like=jax.nn.hard_sigmoid, cases=PIECES)


def _hard_silu(x: X) -> X:
    """x hard_sigmoid(x), also called hard_swish.

    Ref: Howard et al., 2019, section 5.2.
    """
    return x * _hard_sigmoid(x)


def _hard_silu_slope(x):
    inside = (x + 1.5) / 3  # exact in the sum around the zero at -1.5
    return jnp.where(x > -3, jnp.where(x < 3, inside, 1), 0)


hard_silu = pointwise(_hard_silu, _hard_silu_slope, like=jax.nn.hard_silu, cases=PIECES)


def _hard_tanh(x: X) -> X:
    """min(max(x, -1), 1)."""
    return jnp.where(x > 1, 1, jnp.where(x < -1, -1, x))


def _hard_tanh_slope(x):
    return (jnp.abs(x) <= 1).astype(x.dtype)


hard_tanh = pointwise(_hard_tanh, _hard_tanh_slope, like=jax.nn.hard_tanh, cases=PIECES)
