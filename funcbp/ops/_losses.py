"""What the rules of losses share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from funcbp.core import InputError


def summed_to(d: Array, shape: tuple[int, ...]) -> Array:
    """The cotangent of an argument of this shape that was broadcast to the shape of d."""
    if d.shape == shape:
        return d
    d = jnp.sum(d, axis=tuple(range(d.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and d.shape[i] != 1)
    return jnp.sum(d, axis=stretched, keepdims=True)


def check_broadcast(first: str, x: Array, second: str, t: Array | None) -> None:
    """Raises if the two do not broadcast together."""
    try:
        jnp.broadcast_shapes(x.shape, () if t is None else t.shape)
    except ValueError:
        raise InputError(
            f"{first} and {second} must have shapes that broadcast together, got {x.shape} and "
            f"{() if t is None else t.shape}; reshape one of them"
        ) from None


def masked(where: Array | None, x: Array, otherwise: Any = 0) -> Array:
    """x where the mask is true or there is none."""
    return x if where is None else jnp.where(where, x, otherwise)


def pair_check(first: str, second: str) -> Callable:
    """A check for two arguments of these names that must broadcast together."""

    def check(**arguments):
        check_broadcast(first, arguments[first], second, arguments[second])

    return check
