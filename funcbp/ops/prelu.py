"""Leaky rectifier with a learned slope.

    y_i = x_i  for x_i > 0,  else  alpha_c x_i        c the last axis

Backward.
    dx_i = dy_i  or  alpha_c dy_i        dalpha_c = sum over rows of dy_i x_i where x_i <= 0

Saves: x and alpha, arguments.
Edge:  at 0 the slope is alpha.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   He et al., 2015, equation 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import rows, wide


def plain(x: Float[Array, "*batch n"], alpha: Float[Array, "*n"]) -> Float[Array, "*batch n"]:
    """x where it is positive, else alpha x.

    Args:
      x: [..., n].
      alpha: [n], a slope for each feature, or a scalar.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: alpha is neither a scalar nor of shape [n].
    """
    return jnp.where(x > 0, x, alpha * x)


def check(x, alpha):
    """Raises if alpha does not fit the last axis."""
    if alpha.ndim and alpha.shape != x.shape[-1:]:
        raise InputError(
            f"alpha must be a scalar or have shape {x.shape[-1:]}, one slope for each feature of "
            f"x {x.shape}, got {alpha.shape}; check which layer feeds this one"
        )


def fwd(x, alpha):
    y = jnp.where(x > 0, wide(x), wide(alpha) * wide(x))
    return y.astype(x.dtype), (x, alpha)


def bwd(saved, dy):
    x, alpha = saved
    dy = wide(dy)
    dx = jnp.where(x > 0, dy, wide(alpha) * dy)
    # XLA on CPU sums products and minima without writing them out, but not selections.
    falling = dy * jnp.minimum(wide(x), 0)
    return dx, jnp.sum(rows(falling), axis=0) if alpha.ndim else jnp.sum(falling)


prelu = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (3, 5), (5,)),
        Case("one slope", (2, 3, 4), ()),
        Case("zeros", values([[0.0, -0.0, 1.0], [-2.0, 3.0, 0.0]]), (3,)),
        Case("empty batch", (0, 4), (4,)),
        Case("activations", (4096, 1024), (1024,), bench=True),
    ),
)
