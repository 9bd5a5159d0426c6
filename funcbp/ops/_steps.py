"""Steps over time, in chunks: which there are, where they lie, in what order they go."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# So many rows (steps times batch) make one product: enough for its rate, small enough for a cache.
ROWS = 256


class Steps(NamedTuple):
    """How many steps there are, on which axis of x and y, in what chunks and which order."""

    length: int
    axis: int
    size: int
    reverse: bool

    @classmethod
    def of(
        cls, x: Array, time_major: bool, reverse: bool, remat_every: int | None = None
    ) -> "Steps":
        axis = 0 if time_major else 1
        size = remat_every or max(ROWS // max(x.shape[1 - axis], 1), 1)
        return cls(x.shape[axis], axis, max(min(size, x.shape[axis]), 1), reverse)

    @property
    def chunks(self) -> int:
        return -(-self.length // self.size)

    def over_chunks(self, chunk: Callable, carry: Any, *, backward: bool = False) -> Any:
        """carry = chunk(carry, number, start, size) for each chunk, in its order.

        The chunks lie at start = number * size. The last may be shorter; `size` is static.
        """
        if self.length == 0:
            return carry
        whole, rest = divmod(self.length, self.size)
        descending = self.reverse != backward

        def step(i, carry):
            number = whole - 1 - i if descending else i
            return chunk(carry, number, number * self.size, self.size)

        if rest and descending:
            carry = chunk(carry, whole, whole * self.size, rest)
        carry = step(0, carry) if whole == 1 else jax.lax.fori_loop(0, whole, step, carry)
        if rest and not descending:
            carry = chunk(carry, whole, whole * self.size, rest)
        return carry

    def before(self, first: Array, v: Array) -> Array:
        """[size, ...]: v of the step that came before; for the chunk's first step, `first`."""
        return jnp.concatenate((v[1:], first[None]) if self.reverse else (first[None], v[:-1]))


def counted(lengths: Array | None, start: Any, size: int) -> Array | None:
    """[size, batch, 1]: which steps from `start` on count; None for all."""
    if lengths is None:
        return None
    return (start + jnp.arange(size)[:, None] < lengths)[..., None]


def taken(v: Array, start: Any, size: int, axis: int = 0) -> Array:
    """v[start : start + size] along `axis`, which comes to the front."""
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(v, start, size, axis), axis, 0)


def select(valid: Array | None, a: Any, b: Any) -> Any:
    """a where valid, else b; trees."""
    return a if valid is None else jax.tree.map(lambda a, b: jnp.where(valid, a, b), a, b)


def masked(valid: Array | None, a: Any) -> Any:
    """a where valid, else 0; a tree."""
    return a if valid is None else jax.tree.map(lambda a: jnp.where(valid, a, 0), a)
