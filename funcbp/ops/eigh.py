"""Eigenvalues and eigenvectors of symmetric matrices, with gradients that are finite at ties.

    sum_j a_ij v_jk = v_ik w_k        sum_i v_ik v_il = 1 if k = l else 0

Backward. With m = v^T da v, perturbation theory gives dw_k = m_kk and dv = v (f * m), where
f_kl = 1 / (w_l - w_k) off the diagonal and 0 on it. So
    da = v (diag(dw) + f * (v^T dv)) v^T        made symmetric: (da + da^T) / 2
Without `symmetrize_input`, a is one triangle and the mirror image of that, on which nothing else
depends: da_ij + da_ji goes to the triangle that is read, and 0 to the other.

Saves: a, an argument, and the outputs w and v.
Edge:  equal eigenvalues have no single eigenvectors: f_kl = 0 where |w_l - w_k| is at most 16 eps
       max_k |w_k|. That is exact for what does not change as eigenvalues cross: sums over all of
       f(w_k), projections on all eigenvectors of a repeated value. It is not for v f(w) v^T, whose
       derivative between two eigenvectors of one value, f'(w), no rule can find in dw and dv;
       there the gradient is finite but lacks that part. Autodiff of jnp.linalg.eigh gives nan.
       Signs of eigenvectors are LAPACK's.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Giles, 2008, section 3.1; Magnus, 1985, theorem 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import InputError, op
from funcbp.ops._linalg import (
    diagonal,
    folded,
    kernel,
    mirrored,
    product,
    reciprocal,
    require_square,
)
from funcbp.ops._numeric import wide


class EighResult(NamedTuple):
    """What `eigh` returns; the eigenvectors are columns, in the order of the eigenvalues."""

    eigenvalues: Float[Array, "... n"]
    eigenvectors: Float[Array, "... n n"]


def plain(
    a: Float[Array, "... n n"], UPLO: str | None = None, symmetrize_input: bool = True
) -> EighResult:
    """Eigenvalues, in ascending order, and orthonormal eigenvectors of symmetric matrices.

    Args:
      a: symmetric matrices, [..., n, n].
      UPLO: the triangle that is read, "L" (as with None) or "U"; both are where a is symmetrized.
      symmetrize_input: decompose (a + a.T) / 2; else only that triangle is read.

    Returns:
      `(eigenvalues, eigenvectors)`, [..., n] and [..., n, n], in a's dtype.

    Raises:
      InputError: a is not square, or UPLO is another letter.
    """
    x, lower = wide(a), UPLO != "U"
    x = (x + x.mT) / 2 if symmetrize_input else mirrored(x, lower)
    w, v = decomposed(x, lower)
    return EighResult(w.astype(a.dtype), v.astype(a.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def decomposed(a: Array, lower: bool) -> tuple[Array, Array]:
    """`(w, v)` of the matrix of which one triangle is given, in any order of differentiation."""
    v, w = jax.lax.linalg.eigh(a, lower=lower, symmetrize_input=False)
    return w, v


@decomposed.defjvp
def _decomposed_jvp(lower, primals, tangents):
    w, v = decomposed(*primals, lower)
    m = product(product(v.mT, tangents[0]), v)
    return (w, v), (diagonal(m), product(v, _inverse_gaps(w) * m))


def _inverse_gaps(w):
    gaps = w[..., None, :] - w[..., :, None]
    return reciprocal(gaps, jnp.max(jnp.abs(w), axis=-1, initial=0)[..., None, None])


def check(a, UPLO, symmetrize_input):
    """Raises if a is not square, or UPLO is another letter."""
    require_square(a)
    if UPLO not in (None, "L", "U"):
        raise InputError(f"UPLO must be None, 'L' or 'U', got {UPLO!r}")


def fwd(a, UPLO, symmetrize_input):
    v, w = jax.lax.linalg.eigh(wide(a), lower=UPLO != "U", symmetrize_input=symmetrize_input)
    return EighResult(w.astype(a.dtype), v.astype(a.dtype)), (a, w, v)


def bwd(saved, dy, *, UPLO, symmetrize_input):
    _, w, v = saved
    dw, dv = map(wide, dy)
    m = _inverse_gaps(w) * product(v.mT, dv)
    m = (m + m.mT) / 2 + dw[..., None] * jnp.eye(w.shape[-1], dtype=w.dtype)
    da = product(product(v, m), v.mT)
    return (da if symmetrize_input else folded(da, UPLO != "U"),)


# Of larger matrices LAPACK gives some eigenvectors another sign in float32 than in float64.
SMALL = [[1.0, 0.02, -0.03], [0.02, 2.5, 0.05], [-0.03, 0.05, -1.0]]
eigh = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jnp.linalg.eigh,
    name="eigh",
    cases=(
        Case("batch", (4, 2, 2)),
        Case("three", values(SMALL)),
        Case("one triangle", values(SMALL), UPLO="U", symmetrize_input=False),
        Case("ties and zeros", values([[[0.0, 0, 0]] * 3, [[2.0, 0, 0], [0, 1, 0], [0, 0, 2]]])),
        Case("one by one", (1, 1), transformed=False),
        Case("empty", (2, 0, 0), transformed=False),
        Case("dense", values(kernel(16, 128)), bench=True),
    ),
)
