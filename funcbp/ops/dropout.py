"""Dropout: zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

    y_i = x_i k_i / (1 - rate)        k_i = 1 with probability 1 - rate, else 0

Backward. k does not depend on x, so
    dx_i = dy_i k_i / (1 - rate)

Saves: the key alone: the mask is drawn again from it.
Edge:  rate 0 is the identity; rate 1 gives 0 and dx = 0.
Dtype: that of x.
Ref:   Srivastava et al., 2014, section 4, with the scaling at training time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from funcbp.case import Case, key
from funcbp.core import InputError, op


def plain(key: Key[Array, ""], x: Float[Array, "..."], *, rate: float) -> Float[Array, "..."]:
    """x with elements zeroed at random, the rest scaled so that the mean stays.

    Args:
      key: one PRNG key, from `jax.random.key` (or `PRNGKey`).
      x: any shape.
      rate: the probability that an element is zeroed, in [0, 1].

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: rate is outside [0, 1].
    """
    if rate in (0, 1):
        return x * (1 - rate)
    # float32 whatever the dtype of x, so that the mask depends on key, rate and shape alone.
    kept = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def check(key, x, *, rate):
    """Raises if rate is no probability."""
    if not 0 <= rate <= 1:
        raise InputError(
            f"rate must be a probability, from 0 to 1, got {rate}; it is the share "
            "of elements that are zeroed, not that are kept"
        )


def fwd(key, x, *, rate):
    return plain(key, x, rate=rate), key


def bwd(key, dy, *, rate):
    return None, plain(key, dy, rate=rate)


dropout = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("half", key(3), (5, 3), rate=0.5),
        Case("tenth", key(1), (2, 3, 7), rate=0.1),
        Case("none", key(0), (4,), rate=0.0),
        Case("all", key(0), (4,), rate=1.0),
        Case("empty", key(0), (0, 2), rate=0.5),
        Case("activations", key(0), (2048, 1024), rate=0.1, bench=True),
    ),
)
