"""The solution of linear equations.

    sum_j a_ij x_jk = b_ik

Backward. sum_j da_ij x_jk + a_ij dx_jk = db_ik, so with z the solution of sum_i a_ij z_ik = dx_jk
    db_ik = z_ik        da_ij = -sum_k z_ik x_jk

and each is summed over the batch axes along which its argument was repeated.

Saves: a and b, arguments; the LU factors of a, in one array of its size, with a row of pivots; and
       x, the output.
Edge:  a singular a gives inf or nan, in x and in both gradients, as jnp.linalg.solve does. No
       equations, or no right-hand sides, give da = 0.
Dtype: computes in float32 or wider, returns the promoted dtype of a and b.
Ref:   Giles, 2008, section 2.3.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._linalg import lu_solve, lu_solve_transposed, require_square
from funcbp.ops._numeric import wide


def plain(a: Float[Array, "... n n"], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The solution x of a @ x = b.

    Args:
      a: square matrices, [..., n, n].
      b: right-hand sides: [n], or [..., n, k] with batch axes that broadcast with those of a.

    Returns:
      [..., n] where b is a vector, else [..., n, k], in the promoted dtype of a and b.

    Raises:
      InputError: the shapes do not fit.
    """
    return jnp.linalg.solve(wide(a), wide(b)).astype(jnp.result_type(a, b))


def check(a, b):
    """Raises if the shapes do not fit."""
    require_square(a)
    n = a.shape[-1]
    if b.ndim < 1 or (b.shape[0] if b.ndim == 1 else b.shape[-2]) != n:
        raise InputError(
            f"b must be [{n}] or [..., {n}, k], as a {a.shape} has {n} rows; got {b.shape}; for a "
            "batch of vectors pass b[..., None]"
        )
    try:
        jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise InputError(
            f"the batch axes of a and b must broadcast; got a {a.shape} and b {b.shape}"
        ) from None


def fwd(a, b):
    dtype = jnp.promote_types(wide(a).dtype, wide(b).dtype)
    lu, _, permutation = jax.lax.linalg.lu(a.astype(dtype))
    x = _each(lu_solve, lu, permutation, _columns(b).astype(dtype))
    y = (x[..., 0] if b.ndim == 1 else x).astype(jnp.result_type(a, b))
    return y, (a, b, lu, permutation, x)


def bwd(saved, dx):
    a, b, lu, permutation, x = saved
    dx = (dx[..., None] if b.ndim == 1 else dx).astype(lu.dtype)
    z = _each(lu_solve_transposed, lu, permutation, dx)
    db = _summed_to(_columns(b).shape[:-2], z, "ik->ik")
    da = -_summed_to(a.shape[:-2], z, "ik,jk->ij", x)
    return da, db[..., 0] if b.ndim == 1 else db


def _columns(b):
    return b[:, None] if b.ndim == 1 else b


def _each(solve, lu, permutation, b):
    """`solve` for each entry of the batch, which both broadcast to: a factor is used in place."""
    return jnp.vectorize(solve, signature="(m,m),(m),(m,k)->(m,k)")(lu, permutation, b)


def _summed_to(batch, first, spec, *rest):
    """The einsum of matrices with the leading axes of `first`, summed to the leading axes `batch`.

    The sum is part of the product: no matrix is made for each entry that is summed over.
    """
    count = first.ndim - 2
    kept = [i for i in range(-len(batch), 0) if batch[i] == first.shape[i - 2]]
    axes = [chr(ord("A") + i) for i in range(count)]
    inputs, output = spec.split("->")
    inputs = ",".join("".join(axes) + s for s in inputs.split(","))
    out = "".join(axes[i] for i in kept) + output
    y = jnp.einsum(f"{inputs}->{out}", first, *rest, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*batch, *y.shape[-2:])


WELL = [[3.0, -1.0, 0.5], [0.25, 1.0, 0.0], [2.0, 1.0, -4.0]]
solve = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jnp.linalg.solve,
    cases=(
        Case("batch", (2, 3, 3), (2, 3, 4)),
        Case("vector", values(WELL), (3,)),
        Case("one matrix for all", (3, 3), (2, 3, 1)),
        Case("broadcast both ways", (2, 1, 2, 2), (3, 2, 1), transformed=False),
        Case("one equation", normal(1, 1, mean=3.0), (1, 2), transformed=False),
        Case("no right-hand side", (2, 2), (2, 0), transformed=False),
        Case("dense", (512, 512), (512, 64), bench=True),
    ),
)
