"""Primitives of `jax.experimental.hijax` that carry their own rules, in the shape of a rule.

Such a primitive is made for arguments of given types; `expand` is its function, `vjp_fwd` and
`vjp_bwd_retval` its rule. JAX's own (indexing, checkpoint, `custom_vjp` itself) are left alone.
Under `jax_custom_vjp3`, JAX 0.10 makes another class than `jax.custom_vjp` of a rule.
"""

import contextlib
import functools
from typing import Any

import jax
from jax.experimental import hijax

__all__ = ["RULES", "Adapter", "Primitive", "as_rule"]

BASE: Any = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive
THIRD: Any = None
if jax.custom_vjp.__new__ is not object.__new__:
    with contextlib.suppress(ImportError):
        from jax._src.hijax import custom_vjp3 as THIRD
# What has a rule and is called: the classes that a watch looks at.
RULES: tuple[Any, ...] = tuple(
    c for c in (jax.custom_vjp, jax.custom_jvp, BASE, THIRD) if c is not None
)


class Adapter:
    """What is called, with the names that `jax.custom_vjp` has; equal where that is."""

    nondiff_argnums: tuple[int, ...] = ()

    def __init__(self, made: Any):
        self.made = made
        self.declared_surrogate = getattr(made, "declared_surrogate", False)

    def __call__(self, *args: Any) -> Any:
        return self.made(*args)

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.made == other.made

    def __hash__(self) -> int:
        return hash(self.made)


class Primitive(Adapter):
    """One primitive with its settings: called like a `jax.custom_vjp`, with `fun` as its function.

    Args:
      made: an instance of a subclass of hijax's base class.
    """

    def __init__(self, made: Any):
        super().__init__(made)
        self.kind = type(made)

        @functools.wraps(made.expand)
        def fun(*args):
            self._require(args)
            return made.expand(*args)

        fun.__module__, fun.__doc__ = self.kind.__module__, self.kind.__doc__
        fun.__name__, fun.__qualname__ = self.kind.__name__, self.kind.__qualname__
        self.fun, self.__doc__ = fun, self.kind.__doc__

    @property
    def own(self) -> bool:
        """Whether it is JAX's own."""
        return self.kind.__module__.partition(".")[0] == "jax"

    @property
    def forward(self) -> bool:
        """Whether it has a rule for tangents as well."""
        return self.kind.jvp is not BASE.jvp

    def __call__(self, *args: Any) -> Any:
        self._require(args)
        return super().__call__(*args)

    def _require(self, args: tuple) -> None:
        given = [jax.typeof(x) for x in jax.tree.leaves(args)]
        wanted = jax.tree.leaves(self.made.in_avals)
        if [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in wanted]:
            raise TypeError(
                f"{self.kind.__qualname__} was made for {', '.join(map(str, wanted))}, "
                f"got {', '.join(map(str, given))}"
            )


class _Third(Adapter):
    """A rule made under `jax_custom_vjp3`."""

    def __init__(self, made: Any):
        super().__init__(made)
        self.fun, self.fwd, self.bwd = made.f, made.fwd, made.bwd
        self.nondiff_argnums, self.symbolic_zeros = tuple(made.static_argnums), made.symz
        self.__doc__ = made.__doc__


def as_rule(called: Any) -> Any:
    """An instance of one of `RULES` with the attributes of a `jax.custom_vjp`."""
    if isinstance(called, BASE):
        return Primitive(called)
    return _Third(called) if THIRD is not None and isinstance(called, THIRD) else called
