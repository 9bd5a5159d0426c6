"""The logarithm of the size of the determinant.

    y = log |det a|

Backward. d det(a) = det(a) sum_ij z_ij da_ij with z the inverse transpose, sum_i a_ij z_ik = 1 if
j = k else 0, so
    da_ij = dy z_ij

Saves: a, an argument, and its LU factors, in one array of its size, with a row of pivots.
Edge:  a singular a gives y = -inf and a gradient of inf or nan, as jnp.linalg.slogdet does. The
       determinant of no rows is 1: y = 0. The sign of the determinant does not matter.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Giles, 2008, section 2.2.4 (Jacobi's formula).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import op
from funcbp.ops._linalg import diagonal, eye_like, lu_solve_transposed, require_square
from funcbp.ops._numeric import wide


def plain(a: Float[Array, "... n n"]) -> Float[Array, "..."]:
    """log(abs(det(a))), which neither overflows nor underflows as det(a) does.

    Args:
      a: square matrices, [..., n, n].

    Returns:
      [...], in a's dtype.

    Raises:
      InputError: a is not square.
    """
    return jnp.linalg.slogdet(wide(a))[1].astype(a.dtype)


def check(a):
    """Raises if a is not square."""
    require_square(a)


def fwd(a):
    lu, _, permutation = jax.lax.linalg.lu(wide(a))
    y = jnp.sum(jnp.log(jnp.abs(diagonal(lu))), axis=-1)
    return y.astype(a.dtype), (a, lu, permutation)


def bwd(saved, dy):
    _, lu, permutation = saved
    return (lu_solve_transposed(lu, permutation, eye_like(lu) * wide(dy)[..., None, None]),)


logdet = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("batch", (2, 3, 3)),
        Case("negative determinant", values([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 3.0]])),
        Case("five", normal(5, 5)),
        Case("one by one", normal(1, 1, mean=3.0), transformed=False),
        Case("empty", (2, 0, 0), transformed=False),
        Case("dense", (16, 128, 128), bench=True),
    ),
)
