"""A function whose captured arrays are its leaves, so that a rule can differentiate it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from funcbp.mesh import vary, varying

__all__ = ["Closed"]


class Program(NamedTuple):
    """A traced function without its captured arrays, and the trees that it takes and gives."""

    jaxpr: Any
    arguments: Any
    results: Any

    # Two traces are never the same function to JAX's caches, which compare what is static.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@jax.tree_util.register_pytree_node_class
class Closed:
    """A traced function, called as the function is; a pytree of the arrays that it closes over.

    An op's rule gets it for each argument that is a function. Being a pytree, it can be
    differentiated like any argument, `jax.vjp(lambda f, z: f(z), f, z)`, and its cotangent has the
    same structure.

    Attributes:
        program: the jaxpr, whose constants are the captured arrays.
        captured: those arrays, in the order of `program.jaxpr.constvars`.
    """

    def __init__(self, program: Program, captured: Sequence[Any]):
        self.program, self.captured = program, captured

    @classmethod
    def of(cls, f: Callable, *examples: Any) -> "Closed":
        """Traces f on arguments of the types of these examples, arrays or pytrees of them."""
        if isinstance(f, cls):
            return f
        traced, results = jax.make_jaxpr(f, return_shape=True)(*examples)
        arguments, results = jax.tree.structure(examples), jax.tree.structure(results)
        return cls(Program(traced.jaxpr, arguments, results), tuple(traced.consts))

    def __call__(self, *args: Any) -> Any:
        flat, tree = jax.tree.flatten(args)
        if tree != self.program.arguments:
            raise TypeError(f"traced on arguments {self.program.arguments}, called with {tree}")
        jaxpr = self.program.jaxpr
        # Some may be the same on all devices where what f was traced on is not.
        flat = [vary(a, varying(v.aval)) for v, a in zip(jaxpr.invars, flat, strict=True)]
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr, self.captured))
        return jax.tree.unflatten(self.program.results, run(*flat))

    def tree_flatten(self):
        return tuple(self.captured), self.program

    @classmethod
    def tree_unflatten(cls, program, captured):
        return cls(program, captured)
