"""Mean and variance that keep the digits of numbers far from zero."""

import jax.numpy as jnp
from jax import Array


def moments(x: Array, average) -> tuple[Array, Array, Array]:
    """`(m, shift, variance)`: the mean is m + shift, where shift is the rounding error of m.

    As the sum of two numbers the mean is known to more digits than one number holds, so that
    (x - m) - shift has all of its own even where x varies little around a large mean.

    Args:
      x: any array, in float32 or wider.
      average: the mean over some axes, kept.
    """
    m = average(x)
    u = x - m
    shift = average(u)
    return m, shift, jnp.maximum(average(jnp.square(u)) - jnp.square(shift), 0)
