"""What a call of an op costs outside jit, beside a bare `jax.custom_vjp` of the same maths."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from funcbp.core import Call, Op, recorded

ROUNDS, CALLS = 15, 40


class Overhead(NamedTuple):
    """Microseconds a call, and the median ratio with its quartiles, of calls in turn."""

    op: str
    ours: float
    bare: float
    ratio: float
    low: float
    high: float


def overhead(op: Op) -> Overhead:
    """Measures the calling overhead of an op on its first case, in float32.

    Both functions run in turn, A B A B, in rounds of 40 calls; each ratio is of two rounds that
    follow each other.
    """
    args, kwargs = op.cases[0].build()
    with recorded() as calls:
        jax.block_until_ready(op(*args, **kwargs))
    bare, arrays = _bare(calls[0])

    def ours() -> Any:
        return op(*args, **kwargs)

    def theirs() -> Any:
        return bare(*arrays)

    for warm_up in (ours, theirs):
        _seconds(warm_up)
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(ROUNDS)]
    ratios = statistics.quantiles([a / b for a, b in pairs], n=4)
    a, b = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
    return Overhead(op.name, a, b, ratios[1], ratios[0], ratios[2])


def _bare(call: Call) -> tuple[Callable, list[Any]]:
    """The op's forward and backward rule as one would register them by hand."""
    op, static = call.op, call.static

    def fwd(*arrays):
        return op.apply(op.fwd, dict(zip(op.arrays, arrays, strict=True)), static)

    def primal(*arrays):
        return fwd(*arrays)[0]

    def bwd(saved, dy):
        return op.bwd(saved, dy, **static)

    rule = jax.custom_vjp(primal)
    rule.defvjp(fwd, bwd)
    return rule, list(call.arrays.values())


def _seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        y = f()
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / CALLS
