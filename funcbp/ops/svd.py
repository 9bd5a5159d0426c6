"""The singular value decomposition, with gradients that are finite at ties and zeros.

    a_ij = sum_k u_ik s_k v_jk        k = min(m, n) columns, orthonormal; s descending

Backward. Let c = u^T da v, du = u p and dv = v q, with p and q antisymmetric. Then
    c = p s + diag(ds) - s q
so ds_k = c_kk, and c + c^T = (p + q) s - s (p + q), c - c^T = (p - q) s + s (p - q) off the
diagonal. With f_kl = 1 / (s_l - s_k), 0 on the diagonal, and h_kl = 1 / (s_k + s_l),
    p = (f * (c + c^T) + h * (c - c^T)) / 2        q = (f * (c + c^T) - h * (c - c^T)) / 2
So with x = u^T du - du^T u and y = v^T dv - dv^T v
    da = u (diag(ds) + (f * (x + y) + h * (x - y)) / 2) v^T
Where m > n, du also has a part outside of the columns of u, (1 - u u^T) da v / s, so
    da += (1 - u u^T) (du / s) v^T        and likewise with v where n > m
The columns b that `full_matrices` adds turn with them: db = -u r^T b, where r = da v / s.

Saves: a, an argument, and the factors u, s and v, also where only s is asked for.
Edge:  equal singular values, and two that are zero, have no single vectors: f, h and 1 / s are 0
       where their denominator is at most 16 eps max_k s_k. That is exact for what does not change
       as singular values cross: sums over all of f(s_k), projections on all vectors of a repeated
       value. It is not for u f(s) v^T, whose derivative between two vectors of one value no rule
       can find in du, ds and dv. At s = 0 the gradient of sum_k s_k is u v^T, a subgradient. Signs
       are LAPACK's. Autodiff of jnp.linalg.svd gives nan at ties.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Townsend, 2016; Giles, 2008, section 3.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._linalg import diagonal, product, reciprocal
from funcbp.ops._numeric import wide


class SVDResult(NamedTuple):
    """What `svd` returns: left singular vectors, singular values, right singular vectors."""

    U: Float[Array, "... m k"]
    S: Float[Array, "... k"]
    Vh: Float[Array, "... k n"]


def plain(
    a: Float[Array, "... m n"],
    full_matrices: bool = True,
    compute_uv: bool = True,
    hermitian: bool = False,
    subset_by_index: tuple[int, int] | None = None,
) -> SVDResult | Float[Array, "... k"]:
    """The singular values, in descending order, and orthonormal singular vectors of matrices.

    Args:
      a: [..., m, n].
      full_matrices: complete the vectors to bases, m columns of U and n rows of Vh; else there are
        k = min(m, n) of each.
      compute_uv: False returns S alone.
      hermitian: False; for a symmetric matrix take `eigh`.
      subset_by_index: None.

    Returns:
      `(U, S, Vh)`, [..., m, k], [..., k] and [..., k, n], in a's dtype; or S.

    Raises:
      InputError: a is no matrix, or the last two settings are others.
    """
    u, s, vh = decomposed(wide(a), full_matrices and compute_uv)
    if not compute_uv:
        return s.astype(a.dtype)
    return SVDResult(u.astype(a.dtype), s.astype(a.dtype), vh.astype(a.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def decomposed(a: Array, full: bool) -> tuple[Array, Array, Array]:
    """`(u, s, vh)`, in any order of differentiation."""
    u, s, vh = jax.lax.linalg.svd(a, full_matrices=full)
    return u, s, vh


@decomposed.defjvp
def _decomposed_jvp(full, primals, tangents):
    u, s, vh = decomposed(*primals, full)
    (da,), v, k = tangents, vh.mT, s.shape[-1]
    right, left = product(da, v[..., :k]), product(da.mT, u[..., :k])
    c = product(u[..., :k].mT, right)
    f, h, inverse = _reciprocals(s)
    even, odd = f * (c + c.mT) / 2, h * (c - c.mT) / 2
    du = _turned(u, even + odd, right * inverse)
    dv = _turned(v, even - odd, left * inverse)
    return (u, s, vh), (du, diagonal(c), dv.mT)


def _turned(u, p, r):
    """The tangent of a frame: u p, and what of r lies outside of its first columns."""
    k = p.shape[-1]
    u, b = u[..., :k], u[..., k:]
    du = product(u, p)
    if u.shape[-2] > k:
        du += r - product(u, product(u.mT, r))
    return jnp.concatenate([du, -product(u, product(r.mT, b))], axis=-1)


def _reciprocals(s):
    """1 / (s_l - s_k), 1 / (s_k + s_l) and a row of 1 / s_l; 0 where there is none."""
    row, column = s[..., None, :], s[..., :, None]
    most = jnp.max(s, axis=-1, initial=0)[..., None, None]
    return [reciprocal(x, most) for x in (row - column, row + column, row)]


def check(a, full_matrices, compute_uv, hermitian, subset_by_index):
    """Raises if a is no matrix, or a setting is not supported."""
    if a.ndim < 2:
        raise InputError(f"a must have shape [..., m, n], got {a.shape}")
    if hermitian:
        raise InputError("hermitian must be False, got True; for symmetric matrices call eigh")
    if subset_by_index is not None:
        raise InputError(
            f"subset_by_index must be None, got {subset_by_index}; slice U, S and Vh instead"
        )


def fwd(a, full_matrices, compute_uv, hermitian, subset_by_index):
    u, s, vh = jax.lax.linalg.svd(wide(a), full_matrices=full_matrices and compute_uv)
    y = SVDResult(u.astype(a.dtype), s.astype(a.dtype), vh.astype(a.dtype))
    return y if compute_uv else y.S, (a, u, s, vh)


def bwd(saved, dy, *, full_matrices, compute_uv, hermitian, subset_by_index):
    _, u, s, vh = saved
    if not compute_uv:
        return (product(u * wide(dy)[..., None, :], vh),)
    du, ds, dv = wide(dy.U), wide(dy.S), wide(dy.Vh).mT
    v, k = vh.mT, s.shape[-1]
    f, h, inverse = _reciprocals(s)
    x, y = (product(b[..., :k].mT, db[..., :k]) for b, db in ((u, du), (v, dv)))
    even, odd = f * (x - x.mT + y - y.mT), h * (x - x.mT - y + y.mT)
    core = (even + odd) / 2 + ds[..., None] * jnp.eye(k, dtype=s.dtype)
    da = product(product(u[..., :k], core), vh[..., :k, :])
    if u.shape[-2] > k:
        da += product(_outside(u, du, x) * inverse, vh[..., :k, :])
    if v.shape[-2] > k:
        da += product(u[..., :k], (_outside(v, dv, y) * inverse).mT)
    return (da,)


def _outside(u, du, x):
    """The cotangent of r in `_turned`; x is that of its first columns within these."""
    k = x.shape[-1]
    first, b = u[..., :k], u[..., k:]
    return du[..., :k] - product(first, x) - product(b, product(du[..., k:].mT, first))


# Of larger matrices LAPACK gives some vectors another sign in float32 than in float64.
SMALL = [[3.0, 0.02, -0.03, 0.01], [0.04, 2.0, 0.05, 0.0], [-0.03, 0.05, -1.0, 0.06]]
TIES = [[[0.0, 0, 0], [0, 0, 0]], [[2.0, 0, 0], [0, 2, 0]], [[1.0, 0, 0], [0, 0, 0]]]
svd = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jnp.linalg.svd,
    name="svd",
    cases=(
        Case("tall", (4, 3, 2), full_matrices=False),
        Case("wide", values(SMALL), full_matrices=False, transformed=False),
        Case("full", (2, 2, 2)),
        Case("ties and zeros", values(TIES), full_matrices=False, transformed=False),
        Case("all columns", values(SMALL), transformed=False),
        Case("values alone", (2, 3, 3), compute_uv=False),
        Case("one column", (3, 1), full_matrices=False, transformed=False),
        Case("empty", (0, 3), full_matrices=False, transformed=False),
        Case("dense", (16, 128, 64), full_matrices=False, bench=True),
    ),
)
