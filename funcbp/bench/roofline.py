"""What this machine can do: its measured matmul rate and copy bandwidth."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Roofline", "roofline"]

SIDE, LENGTH, ROUNDS = 2048, 2**25, 5


class Roofline(NamedTuple):
    """Rates of the default device.

    Attributes:
        flops: floating point operations a second of a square matmul, by dtype.
        bandwidth: bytes a second that a copy reads and writes.
    """

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, dtype: str, flops: float, size: float) -> float:
        """The least time for so many operations and for moving so many bytes once."""
        return max(flops / self.flops[dtype], size / self.bandwidth)


def roofline(dtypes: tuple[str, ...]) -> Roofline:
    """Measures both."""
    rates = {}
    for dtype in dtypes:
        a = jax.random.normal(jax.random.key(0), (SIDE, SIDE)).astype(dtype)
        rates[dtype] = 2 * SIDE**3 / _seconds(jax.jit(jnp.matmul), a, a)
    x = jnp.arange(LENGTH, dtype=jnp.float32)
    return Roofline(rates, 2 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x))


def _seconds(f: Any, *args: Any) -> float:
    jax.block_until_ready(f(*args))
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
