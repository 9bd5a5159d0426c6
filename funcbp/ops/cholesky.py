"""The Cholesky factor of a positive definite matrix.

    a_ij = sum_k y_ik y_jk        y lower triangular, its diagonal positive

Backward. y^-1 da y^-T = p + p^T with p = y^-1 dy lower triangular, so p is its lower triangle with
the diagonal halved. With s = y^T dy, of which only that part counts, halved likewise,
    da = y^-T s y^-1        made symmetric, (da + da^T) / 2, where the input is
Without `symmetrize_input`, a is its lower triangle and the mirror image of that, on which nothing
else depends: da_ij + da_ji goes to i > j, and 0 to the upper triangle.

Saves: a, an argument, and the factor, which is the output.
Edge:  a that is not positive definite gives nan, in y and the gradient, as jnp.linalg.cholesky
       does.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Murray, 2016.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import op
from funcbp.ops._linalg import folded, kernel, mirrored, product, require_square
from funcbp.ops._numeric import wide


def plain(
    a: Float[Array, "... n n"], *, upper: bool = False, symmetrize_input: bool = True
) -> Float[Array, "... n n"]:
    """The lower triangular y with y @ y.T = a.

    Args:
      a: symmetric positive definite matrices, [..., n, n].
      upper: return y.T, upper triangular.
      symmetrize_input: factor (a + a.T) / 2; else only the lower triangle is read.

    Returns:
      The shape and dtype of a.

    Raises:
      InputError: a is not square.
    """
    x = wide(a) if symmetrize_input else mirrored(wide(a))
    factor = functools.partial(jnp.linalg.cholesky, upper=upper, symmetrize_input=symmetrize_input)
    # Matrix by matrix: on a mesh of Explicit axes JAX refuses a whole batch.
    return jnp.vectorize(factor, signature="(n,n)->(n,n)")(x).astype(a.dtype)


def check(a, *, upper, symmetrize_input):
    """Raises if a is not square."""
    require_square(a)


def fwd(a, *, upper, symmetrize_input):
    y = jax.lax.linalg.cholesky(wide(a), symmetrize_input=symmetrize_input)
    y = y.mT if upper else y
    return y.astype(a.dtype), (a, y)


def bwd(saved, dy, *, upper, symmetrize_input):
    _, y = saved
    y, dy = (y.mT, dy.mT) if upper else (y, dy)
    half = jnp.tril(jnp.ones(y.shape[-2:], y.dtype)) - 0.5 * jnp.eye(y.shape[-1], dtype=y.dtype)
    s = product(y.mT, wide(dy)) * half
    s = jax.lax.linalg.triangular_solve(y, s, left_side=True, lower=True, transpose_a=True)
    da = jax.lax.linalg.triangular_solve(y, s, lower=True)
    return ((da + da.mT) / 2 if symmetrize_input else folded(da),)


cholesky = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jnp.linalg.cholesky,
    cases=(
        Case("batch", values(kernel(2, 3))),
        Case("upper", values(kernel(4)), upper=True),
        Case("one triangle", values(kernel(4)), symmetrize_input=False),
        Case("one by one", values([[4.0]]), transformed=False),
        Case("empty", (2, 0, 0), transformed=False),
        Case("dense", values(kernel(16, 128)), bench=True),
    ),
)
