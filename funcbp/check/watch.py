"""Finds the custom rules that a function calls, with the values that reach them.

While a watch is open, every call of a `jax.custom_vjp`, a `jax.custom_jvp` or a primitive of hijax
is noted: the rule, its settings, where it was called from and inside which transformations. The
values come from a callback placed beside the call, so that they are seen inside jit, scan, cond and
vmap, and inside a function that differentiates, whose jaxpr holds the rules no more. The watch is
part of the key of JAX's caches: functions that were traced before are traced again for it, and the
watched traces are not used afterwards.
"""

import contextlib
import contextvars
import inspect
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.hijax import RULES, Primitive, as_rule

__all__ = [
    "Sighting",
    "completed",
    "location",
    "parameters",
    "plain_name",
    "telling",
    "watching",
]

_token = jax.make_user_context(default_value=0)
_tokens = itertools.count(1)
_watch: contextvars.ContextVar["list[Sighting] | None"] = contextvars.ContextVar(
    "watch", default=None
)
# Callbacks arrive on threads of the runtime.
_lock = threading.Lock()

# How many sets of values are kept for one call site and shape.
KEPT = 2
# Names of JAX's own functions that say which transformation a frame belongs to.
TRANSFORMATIONS = {
    "vmap_f": "vmap",
    "scan": "scan",
    "while_loop": "while",
    "fori_loop": "fori_loop",
    "cond": "cond",
    "switch": "switch",
    "cache_miss": "jit",
    "value_and_grad_f": "grad",
    "vjp": "vjp",
    "jvp": "jvp",
    "linearize": "linearize",
    "shard_map": "shard_map",
    "remat_f": "checkpoint",
    "fun_remat": "checkpoint",
    "pmap": "pmap",
}
_JAX = os.path.dirname(jax.__file__)
_HERE = os.path.dirname(os.path.dirname(__file__))


class Sighting:
    """Calls of one rule from one place with arguments of one type."""

    def __init__(self, rule: Any, args: tuple, where: str):
        self.rule, self.where = rule, where
        nondiff = sorted(i % len(args) for i in rule.nondiff_argnums)
        self.static = {i: args[i] for i in nondiff}
        dynamic = [a for i, a in enumerate(args) if i not in nondiff]
        self.leaves, self.tree = jax.tree.flatten(dynamic)
        self.whole: tuple[Any, list[int]] | None = None
        if getattr(rule.fun, "__module__", "").startswith("jax."):
            self._merge()
        self.avals = [_aval(leaf) for leaf in self.leaves]
        self.impls = [_impl(x, a) for x, a in zip(self.leaves, self.avals, strict=True)]
        self.values: list[list[Any]] = []
        self.count = 0

    def _merge(self) -> None:
        """JAX's own rules (custom_root) are given one value as several arguments.

        Such a rule may hand the whole cotangent to one of them: it is right for their sum. So they
        are one argument here.
        """
        first: dict[int, int] = {}
        unique: list[Any] = []
        places = []
        for leaf in self.leaves:
            if id(leaf) not in first:
                first[id(leaf)] = len(unique)
                unique.append(leaf)
            places.append(first[id(leaf)])
        if len(unique) < len(places):
            self.whole = self.tree, places
            self.leaves, self.tree = jax.tree.flatten(unique)

    def key(self) -> tuple:
        static = tuple((i, id(v)) for i, v in self.static.items())
        return (self.rule, self.where, self.tree, static, tuple(map(str, self.avals)))

    def see(self, *leaves: Any) -> None:
        """Keeps one set of values; the callback's end."""
        with _lock:
            self.count += 1
            if len(self.values) < KEPT:
                rest = iter(leaves)
                self.values.append(
                    [
                        next(rest) if a is not None else x
                        for a, x in zip(self.avals, self.leaves, strict=True)
                    ]
                )

    def arguments(self) -> list[tuple]:
        """The dynamic arguments that were seen."""
        return [tuple(jax.tree.unflatten(self.tree, self._typed(v))) for v in self.values]

    def _typed(self, leaves: list[Any]) -> list[Any]:
        return [
            x if a is None else _restored(x, a, impl)
            for x, a, impl in zip(leaves, self.avals, self.impls, strict=True)
        ]

    def drawn(self) -> tuple:
        """Arguments of the right types, when no values were seen."""
        rng = np.random.default_rng(3)

        def draw(aval, leaf):
            if aval is None:
                return leaf
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            if jnp.issubdtype(aval.dtype, jnp.inexact):
                return jnp.asarray(rng.standard_normal(aval.shape), aval.dtype)
            return jnp.zeros(aval.shape, aval.dtype)

        leaves = [draw(a, x) for a, x in zip(self.avals, self.leaves, strict=True)]
        return tuple(jax.tree.unflatten(self.tree, leaves))

    def bound(self, f: Callable, static: dict[int, Any] | None = None) -> Callable:
        """f of the dynamic arguments alone; with the call's settings, or with others."""
        static = self.static if static is None else static
        if not static and self.whole is None:
            return f

        def call(*dynamic):
            if self.whole is not None:
                tree, places = self.whole
                leaves = jax.tree.leaves(dynamic)
                dynamic = jax.tree.unflatten(tree, [leaves[i] for i in places])
            rest = iter(dynamic)
            n = len(dynamic) + len(static)
            return f(*[static[i] if i in static else next(rest) for i in range(n)])

        return call


def _aval(leaf: Any) -> Any:
    """The type of an array leaf; None for a leaf that is no array."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex | bool):
        return jax.typeof(leaf)
    return None


def _restored(value: Any, aval: Any, impl: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
    return jnp.asarray(value, aval.dtype)


def _impl(leaf: Any, aval: Any) -> Any:
    """The generator of a PRNG key; None for anything else."""
    is_key = aval is not None and jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(leaf) if is_key else None


@contextlib.contextmanager
def watching() -> Iterator[list[Sighting]]:
    """Notes the rules called while it is open; the values are there once it is closed."""
    seen: list[Sighting] = []
    index: dict[tuple, Sighting] = {}
    originals: dict[Any, Any] = {cls: cls.__call__ for cls in RULES}

    def watched(original):
        def __call__(self, *args, **kwargs):
            if _watch.get() is seen:
                # A note that fails must not break the call.
                with contextlib.suppress(Exception):
                    _note(self, args, kwargs, seen, index)
            return original(self, *args, **kwargs)

        return __call__

    for cls, original in originals.items():
        cls.__call__ = watched(original)
    token = _watch.set(seen)
    try:
        with _token(next(_tokens)):
            yield seen
        jax.effects_barrier()
    finally:
        _watch.reset(token)
        for cls, original in originals.items():
            cls.__call__ = original


@contextlib.contextmanager
def telling(told: Callable[[Any, Any], None]) -> Iterator[None]:
    """Calls `told(rule, arguments)` as JAX tells a rule which leaves are differentiated.

    Only rules with `symbolic_zeros` are told; the leaves are `jax.custom_derivatives`' pairs of a
    value and whether it is perturbed.
    """
    original = jax.custom_vjp.__call__

    def __call__(self, *args, **kwargs):
        if not self.symbolic_zeros:
            return original(self, *args, **kwargs)
        fwd = self.fwd

        def noted(*arguments):
            told(self, arguments)
            return fwd(*arguments)

        listening = object.__new__(type(self))
        vars(listening).update(vars(self), fwd=noted)
        return original(listening, *args, **kwargs)

    jax.custom_vjp.__call__ = __call__
    try:
        with _token(next(_tokens)):
            yield
    finally:
        jax.custom_vjp.__call__ = original


def _note(rule: Any, args: tuple, kwargs: dict, seen: list[Sighting], index: dict) -> None:
    if getattr(rule, "unaudited", False):
        return
    rule = as_rule(rule)
    if isinstance(rule, Primitive) and rule.own:
        return
    sighting = Sighting(rule, completed(rule, args, kwargs), _where())
    known = index.setdefault(sighting.key(), sighting)
    if known is sighting:
        seen.append(sighting)
    arrays = [x for x, a in zip(sighting.leaves, sighting.avals, strict=True) if a is not None]
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):  # type: ignore
        known.see(*arrays)
        return
    data = [
        jax.random.key_data(x) if jnp.issubdtype(_dtype(x), jax.dtypes.prng_key) else x
        for x in arrays
    ]
    jax.debug.callback(known.see, *data)


def completed(rule: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> tuple:
    """The arguments of a call in the order of the signature, with its defaults: what JAX binds."""
    try:
        signature = inspect.signature(rule.fun)
    except (TypeError, ValueError):  # a function without a signature takes them as they come
        return tuple(args)
    bound = signature.bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    return bound.args


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _where() -> str:
    """`model.py:31 in loss, inside jit, scan; scope block_0`: the caller's own innermost line."""
    frame = sys._getframe(2)
    place, inside = None, []
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_JAX):
            inside.append(TRANSFORMATIONS.get(name))
        elif file.startswith(_HERE) and name == "audit":
            break
        elif place is None and not _internal(file):
            name = frame.f_code.co_qualname.replace("<locals>.", "")
            place = f"{_short(file)}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    kinds = list(dict.fromkeys(k for k in reversed(inside) if k))
    scope = _scope()
    return (
        (place or "unknown")
        + (f", inside {', '.join(kinds)}" if kinds else "")
        + (f", scope {scope}" if scope else "")
    )


def _internal(file: str) -> bool:
    own = (os.path.join(_HERE, "check"), os.path.join(_HERE, "core.py"))
    return file.startswith(own) or file.startswith("<")


def _scope() -> str:
    try:
        from jax._src.source_info_util import current_name_stack

        return str(current_name_stack())
    except Exception:  # a private name: without it only the scope is missing
        return ""


def _short(file: str) -> str:
    parts = file.split(os.sep)
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return os.path.relpath(file) if not os.path.relpath(file).startswith("..") else parts[-1]


def location(f: Callable) -> str:
    """`file.py:12`, where a function is written."""
    f = inspect.unwrap(getattr(f, "fun", f))
    while hasattr(f, "func"):
        f = f.func
    code = getattr(f, "__code__", None)
    if code is None:
        return "unknown"
    return f"{_short(code.co_filename)}:{code.co_firstlineno}"


def plain_name(f: Callable) -> str:
    """The name of a rule's function."""
    f = getattr(f, "fun", f)
    while hasattr(f, "func"):
        f = f.func
    return getattr(f, "__qualname__", getattr(f, "__name__", type(f).__name__)).replace(
        "<locals>.", ""
    )


def parameters(f: Callable) -> list[str]:
    """The names of a function's parameters, as far as they can be known."""
    try:
        return list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return []
