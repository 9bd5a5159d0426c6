"""Runs a jaxpr without its custom rules, in its own precision or promoted to double.

The truth of a gradient is the autodiff of the plain function in float64. The function's own code
may pin its dtypes (a carry, a cast, an accumulator), so it is not called again with float64 inputs:
its jaxpr is evaluated equation by equation with every floating type made double. Custom rules are
replaced by the functions that they belong to.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from funcbp.jaxprs import CALLS, QUICKLY, SILENT, bind, opened, scanned, variable

__all__ = ["Evaluator", "compiled", "double"]

# The parameters by which primitives name the type of their result.
DTYPES = ("new_dtype", "dtype", "preferred_element_type", "accumulator_dtype", "out_dtype")
# What runs in its own precision: bits, and code outside of JAX.
NARROW = {"bitcast_convert_type", "pure_callback", "io_callback", "ffi_call", "pallas_call"}
# The steps after which a `while` is taken for one that does not end.
STEPS = 100_000


def compiled(f: Callable, **settings: Any) -> Callable:
    """`jax.jit` that compiles quickly rather than to fast code."""
    options = QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(f, compiler_options=options, **settings)


def double(dtype: Any) -> Any:
    """The double type of a floating or complex dtype; any other dtype as it is."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64


class Evaluator:
    """Evaluates a closed jaxpr without custom rules.

    Args:
      closed: what to run.
      promote: in double; needs `jax.enable_x64`. Primitives that cannot be promoted run in their
        own precision and are listed in `limited`.
      hook: called for each equation, inside calls, loops and branches too, with its path (the
        same each time it is met), the equation, its operands and the function that runs it on
        operands; returns the results to use. `hook.scope(values)` is a context for the body of the
        whole and of each scan, with all values computed in it; `hook.shared(path, number, length,
        constants)` returns what a step of a scan takes for its constants.
      further: each `while` and each `scan` without inputs runs its body so many steps on.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        promote: bool = False,
        hook: Any = None,
        further: int = 0,
    ):
        self.closed, self.promote, self.hook, self.further = closed, promote, hook, further
        self.limited: collections.Counter[str] = collections.Counter()
        self._path: tuple[int, ...] = ()
        self._scoped = False  # whether the next jaxpr is a scope of its own

    def __call__(self, *leaves: Any) -> list[Any]:
        self._scoped = True
        return self._closed(self.closed, leaves)

    def _closed(self, closed: ClosedJaxpr, leaves: Sequence[Any]) -> list[Any]:
        return self._run(closed.jaxpr, closed.consts, leaves)

    def _any(self, jaxpr: Any, leaves: Sequence[Any]) -> list[Any]:
        """Runs a closed jaxpr, or an open one without constants."""
        if hasattr(jaxpr, "consts"):
            return self._closed(jaxpr, leaves)
        return self._run(jaxpr, (), leaves)

    def _run(self, jaxpr: Any, consts: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = {}
        values.update(zip(jaxpr.constvars, map(self._own, consts), strict=True))
        values.update(zip(jaxpr.invars, map(self._own, leaves), strict=True))
        if self.hook is not None and self._scoped:
            self._scoped = False
            with self.hook.scope(self._all(jaxpr, dict(values))):
                return self._equations(jaxpr, values)
        return self._equations(jaxpr, values)

    def _all(self, jaxpr: Any, values: dict[Any, Any]) -> dict[Any, Any]:
        """Every value of a jaxpr, each kept."""
        hook, self.hook = self.hook, None
        try:
            for eqn in jaxpr.eqns:
                operands = [self._read(values, v) for v in eqn.invars]
                values.update(zip(eqn.outvars, self._equation(eqn, operands), strict=True))
        finally:
            self.hook = hook
        return values

    def _read(self, values: dict[Any, Any], atom: Any) -> Any:
        return self._own(atom.val) if isinstance(atom, Literal) else values[atom]

    def _equations(self, jaxpr: Any, values: dict[Any, Any]) -> list[Any]:
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if variable(v)}
        keep = {v for v in jaxpr.outvars if variable(v)}
        for i, eqn in enumerate(jaxpr.eqns):
            results = self._equation(eqn, [self._read(values, v) for v in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
            for v in eqn.invars:  # a value is let go after its last use
                if variable(v) and last[v] == i and v not in keep:
                    values.pop(v, None)
        return [self._read(values, v) for v in jaxpr.outvars]

    def _own(self, value: Any) -> Any:
        """The value in the precision of this evaluation."""
        if not self.promote:
            return value
        dtype = getattr(value, "dtype", None)
        if dtype is None:
            dtype = jnp.result_type(value)
        wide = double(dtype)
        if wide == dtype:
            return value
        return jax.lax.convert_element_type(value, wide)

    def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        outer, self._path = self._path, (*self._path, id(eqn))
        try:
            if self.hook is None:
                return self._results(eqn, operands)
            return self.hook(self._path, eqn, operands, lambda xs: self._results(eqn, xs))
        finally:
            self._path = outer

    def _results(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in SILENT:
            return [None for _ in eqn.outvars]
        if name in CALLS and CALLS[name] in eqn.params:
            return self._any(eqn.params[CALLS[name]], operands)
        structured = getattr(self, f"_{name}", None)
        if structured is None:
            return self._primitive(eqn, operands)
        return structured(eqn.params, operands)

    def _primitive(self, eqn: Any, operands: list[Any]) -> list[Any]:
        if not self.promote:
            return bind(eqn, operands, eqn.params)
        if eqn.primitive.name not in NARROW:
            params = {n: self._promoted_parameter(n, v) for n, v in eqn.params.items()}
            try:
                return [self._own(r) for r in bind(eqn, operands, params)]
            except (TypeError, ValueError, NotImplementedError):
                pass
        if any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars):
            self.limited[eqn.primitive.name] += 1
        narrow = [
            x
            if getattr(x, "dtype", v.aval.dtype) == v.aval.dtype
            else jax.lax.convert_element_type(x, v.aval.dtype)
            for x, v in zip(operands, eqn.invars, strict=True)
        ]
        return [self._own(r) for r in bind(eqn, narrow, eqn.params)]

    def _promoted_parameter(self, name: str, value: Any) -> Any:
        if name in DTYPES and value is not None:
            return double(value)
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            return self._region(value)
        return None if name == "precision" else value

    def _region(self, jaxpr: Any) -> Any:
        """The scalar function of a reduction or scatter, in double."""
        invars = opened(jaxpr).invars
        avals = [jax.ShapeDtypeStruct(v.aval.shape, double(v.aval.dtype)) for v in invars]
        wide = jax.make_jaxpr(lambda *leaves: self._any(jaxpr, leaves))(*avals)
        return wide if hasattr(jaxpr, "jaxpr") else opened(wide)

    def _call_hi_primitive(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        """A primitive of hijax, and custom_vjp under `jax_custom_vjp3`: what it expands to."""
        prim = params["_prim"]
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.tree.leaves(prim.in_avals)]

        def expanded(*leaves):
            return jax.tree.leaves(prim.expand(*jax.tree.unflatten(prim.in_tree, leaves)))

        return self._any(jax.make_jaxpr(expanded)(*avals), operands)

    def _scan(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        consts, carries = scanned(params)
        fixed, init, xs = (
            operands[:consts],
            operands[consts : consts + carries],
            operands[consts + carries :],
        )
        body = params["jaxpr"]

        def step(carry, numbered):
            x, number = numbered
            shared = fixed
            if self.hook is not None:
                self._scoped = True
                shared = self.hook.shared(self._path, number, params["length"], fixed)
            out = self._any(body, [*shared, *carry, *x])
            return [_like(new, old) for new, old in zip(out, carry, strict=False)], out[carries:]

        numbers = jnp.arange(params["length"])
        carry, ys = jax.lax.scan(step, init, (xs, numbers), reverse=params["reverse"])
        if self.further and not xs:
            carry = jax.lax.scan(step, carry, (xs, jnp.arange(self.further)))[0]
        return [*carry, *ys]

    def _while(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed, init = operands[:n], operands[n : n + m], operands[n + m :]

        def test(carry):
            return self._any(params["cond_jaxpr"], [*tested, *carry])[0]

        def condition(state):
            count, carry = state
            return jnp.any(test(carry)) & (count < STEPS)

        def step(carry):
            out = self._any(params["body_jaxpr"], [*fixed, *carry])
            new = [_like(new, old) for new, old in zip(out, carry, strict=True)]
            on = test(carry)
            if not jnp.ndim(on):
                return new
            # Under vmap each entry of the batch goes on for as long as its own test holds.
            return [
                jnp.where(on.reshape(on.shape + (1,) * (n.ndim - on.ndim)), n, o)
                for n, o in zip(new, carry, strict=True)
            ]

        def counted(state):
            count, carry = state
            return count + 1, step(carry)

        count, carry = jax.lax.while_loop(condition, counted, (0, init))
        # On values that nobody meant a loop may never end: then it has no value.
        carry = [
            jnp.where(count < STEPS, v, jnp.nan) if jnp.issubdtype(v.dtype, jnp.inexact) else v
            for v in map(jnp.asarray, carry)
        ]
        if self.further:
            carry = jax.lax.fori_loop(0, self.further, lambda _, carry: step(carry), carry)
        return carry

    def _cond(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        index, *rest = operands
        branches = [lambda *rest, b=b: self._any(b, rest) for b in params["branches"]]
        outs = [jax.eval_shape(b, *rest) for b in branches]
        types = [jnp.result_type(*column) for column in zip(*outs, strict=True)]

        def fit(branch):
            def run(*rest):
                out = branch(*rest)
                if not self.promote:
                    return out
                return [
                    r if jnp.result_type(r) == t else jax.lax.convert_element_type(r, t)
                    for r, t in zip(out, types, strict=True)
                ]

            return run

        return jax.lax.switch(index, [fit(b) for b in branches], *rest)

    def _custom_linear_solve(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        names = ("matvec", "vecmat", "solve", "transpose_solve")
        consts, at = {}, 0
        for n in names:
            length = getattr(params["const_lengths"], n)
            consts[n], at = operands[at : at + length], at + length

        def part(n):
            jaxpr = getattr(params["jaxprs"], n)
            return lambda b: self._any(jaxpr, [*consts[n], *b])

        transposed = params["jaxprs"].transpose_solve
        return jax.lax.custom_linear_solve(
            part("matvec"),
            operands[at:],
            lambda _, b: part("solve")(b),
            (lambda _, b: part("transpose_solve")(b)) if transposed is not None else None,
        )


def _like(new: Any, old: Any) -> Any:
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jax.lax.convert_element_type(new, dtype)
