"""What the normalisation rules share: sums over rows that cost few temporary arrays.

A weighted sum is a product with a vector: else XLA on CPU writes the weights out in full size.
"""

import jax
import jax.numpy as jnp
from jax import Array

from funcbp.ops._numeric import rows, settled


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
