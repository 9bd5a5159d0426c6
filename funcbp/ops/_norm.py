"""What the normalisation rules share: sums over rows that cost few temporary arrays.

XLA on CPU gives a sum, with all arithmetic around it, to a library that wants each operand in full
size: a number a row or a column is first written out as a whole array. Two things avoid it here.
`settled` ends such a fusion behind a sum, and a weighted sum is a product with a vector.
"""

import jax
import jax.numpy as jnp
from jax import Array

from funcbp.ops._numeric import rows


def settled(x: Array) -> Array:
    """x itself, by a step that ends the fusion of what comes before it on CPU."""
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def mean(x: Array) -> Array:
    """The mean along the last axis, kept."""
    return settled(jnp.mean(x, axis=-1, keepdims=True))


def weighted_mean(x: Array, w: Array | None) -> Array:
    """mean_i x_i w_i along the last axis, kept; w = None for 1."""
    if w is None:
        return mean(x)
    return _product(x, w)[..., None] / x.shape[-1]


def weighted_sum(w: Array, x: Array) -> Array:
    """sum over rows of w_b x_bi, for x [..., n] and one number a row, w [..., 1]."""
    return _product(w.ravel(), rows(x))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
