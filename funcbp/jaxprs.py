"""What reads and runs jaxprs shares: where their equations hold programs, and how to run one."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

__all__ = ["CALLS", "QUICKLY", "SILENT", "bind", "equations", "opened", "programs", "scanned",
           "variable"]  # fmt: skip

# The parameter that holds the function of a call which is run in its place.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
}
# What has no results that matter.
SILENT = {"debug_callback", "debug_print"}
# XLA's options for programs that run a few times: half the time goes into making code fast.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def variable(atom: Any) -> bool:
    """Whether it is a variable, not a literal."""
    return not isinstance(atom, Literal)


def opened(jaxpr: Any) -> Any:
    """A jaxpr without its constants, whether it came closed or open."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def programs(values: Any) -> Iterator[Any]:
    """The jaxprs among parameters of an equation, in tuples too."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple):
            yield from programs(value)


def equations(value: Any) -> Iterator[Any]:
    """The equations of a jaxpr, or of a tuple of them, and of the jaxprs that these hold."""
    for jaxpr in programs((value,)):
        for eqn in jaxpr.eqns:
            yield eqn
            yield from equations(tuple(eqn.params.values()))


def bind(eqn: Any, operands: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """The results of an equation, with these parameters for its own."""
    params = eqn.params if params is None else params
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def scanned(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries the operands of a `scan` begin with."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, *_ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carries
