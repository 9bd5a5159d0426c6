"""What a computation costs: counted by XLA, and by the clock; and the product in either order."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from funcbp.jaxprs import opened
from funcbp.trace import origin

# The clock says something about this many flops: below it measures the call, above it takes long.
MEASURED = 10**6, 2 * 10**9
# What moves numbers and computes none.
MOVES = (
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "gather",
    "concatenate", "pad", "rev", "copy", "convert_element_type", "bitcast_convert_type", "select_n",
    "stop_gradient", "funcbp_mark", "iota", "split",
)  # fmt: skip


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


def flops_by_layer(jaxpr: Any) -> dict[str, int]:
    """Flops of each path of scopes in a traced program; loops of unknown length count one step.

    A multiplication and an addition are 1 each, any other operation 1 for each number it makes.
    """
    totals: dict[str, int] = {}
    _count(jaxpr, (), 1, totals)
    return totals


def _count(jaxpr: Any, outer: tuple, times: int, totals: dict[str, int]) -> None:
    for eqn in jaxpr.eqns:
        stacks = (*outer, eqn.source_info.name_stack)
        inside = list(_programs(eqn))
        for program in inside:
            _count(program, stacks, times * eqn.params.get("length", 1), totals)
        if not inside:
            name = origin.layer(*stacks)
            totals[name] = totals.get(name, 0) + times * _flops(eqn)


def _programs(eqn: Any) -> Iterator[Any]:
    """The programs inside an equation; of branches the first."""
    for name in ("jaxpr", "call_jaxpr", "body_jaxpr", "branches"):
        inside = eqn.params.get(name)
        inside = inside[0] if isinstance(inside, tuple) else inside
        if inside is not None:
            yield opened(inside)


def _flops(eqn: Any) -> int:
    made = max((v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")), default=0)
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * made * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * made * kernel.size // max(outputs, 1)
    if name.startswith("reduce"):
        return eqn.invars[0].aval.size
    return 0 if name in MOVES else made
