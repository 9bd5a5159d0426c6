"""Gated units: one array times an activation of another.

    swiglu(a, b) = silu(a) b      geglu(a, b) = gelu(a) b      glu(x) = a sigmoid(b), [a, b] = x

Backward, for y = f(a) b with f's slope f':
    da = dy b f'(a)        db = dy f(a)

Saves: the arguments, which are free: autodiff keeps both factors.
Dtype: computes in float32 or wider, returns the arguments' dtype.
Ref:   Dauphin et al., 2017, section 2; Shazeer, 2020, equation 5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops.pointwise import FORMULAS

X = Float[Array, "..."]
TAILS = values([-90.0, -17.0, -1.278, -0.752, -0.0, 0.0, 0.5, 3.1, 17.0, 90.0])
CASES = (
    Case("odd", (3, 5), (3, 5)),
    Case("tails", TAILS, (10,)),
    Case("empty", (0, 3), (0, 3), transformed=False),
    Case("hidden layer", (2048, 2048), (2048, 2048), bench=True),
)


def check(a, b):
    """Raises if the shapes differ."""
    if a.shape != b.shape:
        raise InputError(
            f"both halves must have one shape, got {a.shape} and {b.shape}; a product of two "
            "projections wants the same number of features from both"
        )


def _unit(name: str, plain: Callable):
    value, slope, _ = FORMULAS[name]

    def fwd(a, b):
        return (value(wide(a)) * wide(b)).astype(a.dtype), (a, b)

    def bwd(saved, dy):
        a, b = map(wide, saved)
        dy = wide(dy)
        return dy * b * slope(a), dy * value(a)

    return op(plain, fwd, bwd, check=check, cases=CASES, name=plain.__name__.strip("_"))


def _swiglu(a: X, b: X) -> X:
    """silu(a) b.

    Args:
      a: what is activated.
      b: its factor, of the same shape.

    Returns:
      The shape and dtype of a.

    Raises:
      InputError: the shapes differ.
    """
    return FORMULAS["silu"].plain(a) * b


swiglu = _unit("silu", _swiglu)


def _geglu(a: X, b: X) -> X:
    """gelu(a) b, gelu in its tanh form.

    Args:
      a: what is activated.
      b: its factor, of the same shape.

    Returns:
      The shape and dtype of a.

    Raises:
      InputError: the shapes differ.
    """
    return FORMULAS["gelu"].plain(a) * b


geglu = _unit("gelu", _geglu)


def _glu(x: X, axis: int = -1) -> X:
    """a sigmoid(b), a and b the halves of x along `axis`.

    Args:
      x: any shape with an even number along `axis`.
      axis: of the halves.

    Returns:
      Half as long along `axis`, in x's dtype.

    Raises:
      InputError: `axis` has odd length.
    """
    a, b = jnp.split(x, 2, axis)
    return a * FORMULAS["sigmoid"].plain(b)


def _check_glu(x, axis):
    """Raises if x has no two halves."""
    if x.ndim < 1 or x.shape[axis] % 2:
        raise InputError(
            f"glu must have an even number of features along axis {axis}, got x {x.shape}; make "
            "the projection before it twice as wide as its result"
        )


def _glu_fwd(x, axis):
    a, b = jnp.split(wide(x), 2, axis)
    return (a * FORMULAS["sigmoid"].value(b)).astype(x.dtype), x


def _glu_bwd(x, dy, axis):
    a, b = jnp.split(wide(x), 2, axis)
    dy = wide(dy)
    s, slope, _ = FORMULAS["sigmoid"]
    return (jnp.concatenate([dy * s(b), dy * a * slope(b)], axis),)


glu = op(
    _glu,
    _glu_fwd,
    _glu_bwd,
    check=_check_glu,
    like=jax.nn.glu,
    cases=(
        Case("odd", (3, 10)),
        Case("leading axis", (4, 3), axis=0),
        Case("tails", values([[1.0, -2.0, 3.0, 90.0, -90.0, 17.0]])),
        Case("empty", (0, 4), transformed=False),
        Case("hidden layer", (2048, 4096), bench=True),
    ),
)
