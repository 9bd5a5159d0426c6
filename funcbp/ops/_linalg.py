"""What the rules of linear algebra share: products, solves with a factor, and safe reciprocals."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcbp.core import InputError

# Gaps of at most so many units in the last place of the largest eigenvalue or singular value are
# taken for 0. LAPACK separates equal ones by up to 7 (n = 500, float32).
ULPS = 16


def product(a: Array, b: Array) -> Array:
    """a @ b in the full precision of its dtype, also where the default is less."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def diagonal(a: Array) -> Array:
    """The diagonals of matrices: [..., n, n] -> [..., n]."""
    return jnp.diagonal(a, axis1=-2, axis2=-1)


def eye_like(a: Array) -> Array:
    """Identities in the shape and dtype of a."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def mirrored(a: Array, lower: bool = True) -> Array:
    """The symmetric matrices of which one triangle is given; the other is not read."""
    return jnp.tril(a) + jnp.tril(a, -1).mT if lower else jnp.triu(a) + jnp.triu(a, 1).mT


def folded(da: Array, lower: bool = True) -> Array:
    """The cotangent of a in `mirrored` from that of the result: all on the triangle read."""
    return jnp.tril(da) + jnp.triu(da, 1).mT if lower else jnp.triu(da) + jnp.tril(da, -1).mT


def reciprocal(gap: Array, scale: Array) -> Array:
    """1 / gap, and 0 where |gap| is within rounding errors of `scale`."""
    zero = jnp.abs(gap) <= ULPS * jnp.finfo(gap.dtype).eps * scale
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, gap))


def lu_solve(lu: Array, permutation: Array, b: Array) -> Array:
    """a^-1 b from `lax.linalg.lu(a)`: [..., n, n], [..., n] and [..., n, k] of one batch shape."""
    b = jnp.take_along_axis(b, permutation[..., None], axis=-2)
    y = lax.linalg.triangular_solve(lu, b, left_side=True, lower=True, unit_diagonal=True)
    return lax.linalg.triangular_solve(lu, y, left_side=True)


def lu_solve_transposed(lu: Array, permutation: Array, b: Array) -> Array:
    """a^-T b from `lax.linalg.lu(a)`."""
    y = lax.linalg.triangular_solve(lu, b, left_side=True, transpose_a=True)
    z = lax.linalg.triangular_solve(
        lu, y, left_side=True, lower=True, transpose_a=True, unit_diagonal=True
    )
    return jnp.take_along_axis(z, jnp.argsort(permutation)[..., None], axis=-2)


def require_square(a: Array) -> None:
    """Raises InputError if a is not [..., n, n]."""
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(
            f"a must have shape [..., n, n], square matrices on its last two axes, got {a.shape}"
        )


def kernel(*shape: int) -> np.ndarray:
    """Positive definite matrices [..., n, n], each with its own distance: exp(-|i - j| / d)."""
    *batch, n = shape
    count = math.prod(batch)
    distance = np.abs(np.arange(n)[:, None] - np.arange(n))
    scale = 1.0 + np.arange(count)[:, None, None] / count
    return np.exp(-distance / scale).reshape(*batch, n, n)
