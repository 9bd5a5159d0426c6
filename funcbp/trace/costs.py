"""What a computation costs: counted by XLA, and by the clock; and the product in either order."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# The clock says something about this many flops: below it measures the call, above it takes long.
MEASURED = 10**6, 2 * 10**9


def flops_of(f: Callable, *args: Any) -> int | None:
    """As XLA counts them, without compiling; None where the backend does not count."""
    try:
        cost = jax.jit(f).lower(*args).cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    flops = cost.get("flops") if isinstance(cost, dict) else None
    return None if flops is None else int(flops)


def seconds(f: Callable, *args: Any, rounds: int = 5, calls: int = 10) -> float:
    """Of one call once compiled: the best round's mean."""
    f = jax.jit(f)
    jax.block_until_ready(f(*args))
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(f(*args))
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def times(a: Array, b: Array) -> Array:
    """a @ b at full precision, on accelerators too."""
    return jnp.matmul(a, b, precision="highest")


def from_left(factors: Sequence[Array], parameter_factors: Sequence[Array]) -> Any:
    """The loss's rows, carried to the input; on the way, each step's parameters."""
    product, gradients = factors[-1], [parameter_factors[-1]]
    for factor, of_theta in zip(factors[-2::-1], parameter_factors[-2::-1], strict=True):
        gradients.append(times(product, of_theta))
        product = times(product, factor)
    return product, gradients


def from_right(factors: Sequence[Array], parameter_factors: Sequence[Array]) -> Array:
    """The columns of x and of each step's parameters, carried to the loss."""
    columns = jnp.concatenate([factors[0], parameter_factors[0]], axis=1)
    for factor, of_theta in zip(factors[1:], parameter_factors[1:], strict=True):
        columns = jnp.concatenate([times(factor, columns), of_theta], axis=1)
    return columns
