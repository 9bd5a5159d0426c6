"""The inverse of matrices.

    sum_j a_ij y_jk = 1 if i = k else 0

Backward. dy = -y da y, so
    da_ij = -sum_kl y_ki dy_kl y_jl

Two products, where autodiff solves with the factors again.

Saves: a, an argument, and y, the output.
Edge:  a singular a gives inf or nan, in y and the gradient, as jnp.linalg.inv does.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Giles, 2008, section 2.2.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import op
from funcbp.ops._linalg import eye_like, lu_solve, product, require_square
from funcbp.ops._numeric import wide


def plain(a: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """The inverse of each matrix.

    Args:
      a: square matrices, [..., n, n].

    Returns:
      The shape and dtype of a.

    Raises:
      InputError: a is not square.
    """
    x = wide(a)
    # As jnp.linalg.inv, but the identity has the sharding of a, without which a mesh refuses it.
    eye = jnp.zeros_like(x) + jnp.eye(a.shape[-1], dtype=x.dtype)
    return jnp.linalg.solve(x, eye).astype(a.dtype)


def check(a):
    """Raises if a is not square."""
    require_square(a)


def fwd(a):
    lu, _, permutation = jax.lax.linalg.lu(wide(a))
    y = lu_solve(lu, permutation, eye_like(lu))
    return y.astype(a.dtype), (a, y)


def bwd(saved, dy):
    _, y = saved
    return (-product(y.mT, product(wide(dy), y.mT)),)


WELL = [[3.0, -1.0, 0.5], [0.25, 1.0, 0.0], [2.0, 1.0, -4.0]]
inv = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jnp.linalg.inv,
    cases=(
        Case("batch", (2, 3, 3)),
        Case("rows are swapped", values([[0.0, 2.0], [1.0, 0.0]])),
        Case("five", normal(5, 5)),
        Case("one by one", normal(1, 1, mean=3.0), transformed=False),
        Case("empty", (2, 0, 0), transformed=False),
        Case("dense", (16, 128, 128), bench=True),
    ),
)
