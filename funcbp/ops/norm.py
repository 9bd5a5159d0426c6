"""Square root, length and direction of vectors, with a gradient that is finite at 0.

    sqrt           y = x^1/2
    norm           y = (sum_i x_i^2)^1/2
    l2_normalize   y_i = x_i / n        n the norm, along `axis`

Backward.
    sqrt           dx = dy / (2 y)
    norm           dx_i = dy x_i / y
    l2_normalize   dx_i = (dy_i - y_i sum_k dy_k y_k) / n

Saves: x, an argument, and for the last two the norm, a number a row.
Edge:  at x = 0 the derivative of sqrt has a pole and that of the norm depends on the direction:
       the gradient is 0 there, the mean over directions. A row of zeros has y = 0. Autodiff gives
       inf or nan for all three. sqrt of less than 0 gives nan. Squares overflow from 1.8e19 on,
       in float32 and bfloat16, as in JAX, and underflow below 1e-23.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Petersen and Pedersen, 2012, section 2.6.1 (derivatives of the Euclidean norm).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, uniform, values
from funcbp.core import op
from funcbp.ops._numeric import settled, wide
from funcbp.ops.pointwise import pointwise

Axis = int | tuple[int, ...] | None


def _sqrt(x: Float[Array, "..."], /) -> Float[Array, "..."]:
    """Square root, with a gradient of 0 at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _sqrt_slope(x):
    return jnp.where(x == 0, 0, 0.5 / jnp.sqrt(x))


sqrt = pointwise(
    _sqrt,
    _sqrt_slope,
    like=jnp.sqrt,
    cases=(
        Case("positive", uniform(3, 5, high=4.0)),
        Case("zeros", values([0.0, -0.0, 1e-7, 1.0, 3.0])),
        Case("ends", values([1e-30, 1e30, float("inf"), -1.0]), transformed=False),
        Case("empty", (0, 3), transformed=False),
        Case("activations", uniform(2048, 4096), bench=True),
    ),
)


def plain(x: Float[Array, "..."], axis: Axis = -1, keepdims: bool = False) -> Float[Array, "..."]:
    """The Euclidean norm along `axis`.

    Args:
      x: any shape.
      axis: the axis or axes of one vector; None for all.
      keepdims: keep these axes, with length 1.

    Returns:
      The norm, in the shape of x without `axis`.
    """
    return _sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims))


def _length(x: Array, axis: Axis) -> Array:
    """The norm, kept."""
    return settled(_sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True)))


def fwd(x, axis, keepdims):
    n = _length(wide(x), axis)
    return (n if keepdims else jnp.squeeze(n, axis)).astype(x.dtype), (x, n)


def bwd(saved, dy, *, axis, keepdims):
    x, n = saved
    return (wide(dy).reshape(n.shape) * (wide(x) / jnp.where(n == 0, 1, n)),)


CASES = (
    Case("odd", (3, 5)),
    Case("zeros and ties", values([[0.0, 0.0, 0.0], [3.0, -0.0, 4.0], [1.0, 1.0, 1.0]])),
    # The second derivatives overflow.
    Case(
        "tiny and huge",
        values([[1e-15, -2e-15, 0.0], [1e15, 3e15, -1e10]]),
        axis=1,
        transformed=False,
    ),
    Case("two axes", normal(3, 2, 4, std=9.0), axis=(0, -1)),
    # The second derivatives are 0, as differences of numbers that grow near 0.
    Case("one feature", (3, 1), transformed=False),
    Case("empty batch", (0, 4)),
    Case("embeddings", (8192, 1024), bench=True),
)
norm = op(plain, fwd, bwd, cases=CASES, name="norm")


def plain_normalize(x: Float[Array, "..."], axis: Axis = -1) -> Float[Array, "..."]:
    """x divided by its Euclidean norm along `axis`.

    Args:
      x: any shape.
      axis: the axis or axes of one vector; None for all.

    Returns:
      Vectors of length 1, or of zeros where x is, in the shape and dtype of x.
    """
    total = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    # A row of zeros is a constant: its own derivative would be nan.
    zero = total == 0
    return jnp.where(zero, 0, x) / jnp.sqrt(jnp.where(zero, 1, total))


def fwd_normalize(x, axis):
    n = _length(wide(x), axis)
    return (wide(x) / jnp.where(n == 0, 1, n)).astype(x.dtype), (x, n)


def bwd_normalize(saved, dy, *, axis):
    x, n = saved
    dy, inverse = wide(dy), jnp.where(n == 0, 0, 1 / jnp.where(n == 0, 1, n))
    y = wide(x) * inverse
    return ((dy - y * jnp.sum(dy * y, axis=axis, keepdims=True)) * inverse,)


l2_normalize = op(plain_normalize, fwd_normalize, bwd_normalize, cases=CASES, name="l2_normalize")
