"""Takes notes of the custom rules that are called, without changing what is called."""

import contextlib
import functools
import importlib.util
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

__all__ = ["Recorder"]

# Signatures (shapes, dtypes, settings) kept for one rule, sets of values for one signature, places
# it was called from, tests that could be run again for it, and bytes of values for one rule.
SIGNATURES, VALUES, PLACES, TESTS, BYTES = 12, 2, 20, 8, 32 << 20

_HERE = os.path.dirname(os.path.abspath(__file__))
_FUNCBP = os.path.join(os.path.dirname(_HERE), "funcbp")
_CHECK = os.path.join(_FUNCBP, "check") + os.sep
# No caller's own code.
_OWN = (_HERE, os.path.join(_FUNCBP, "core.py"), "<")
_LIBRARY = (contextlib.__file__, functools.__file__, threading.__file__)


class Signature:
    """Calls of one rule with arguments of one type and with the same settings."""

    def __init__(self, rule: Any, static: dict, leaves: list, tree: Any, avals: list, x64: bool):
        self.rule, self.static, self.tree, self.avals, self.x64 = rule, static, tree, avals, x64
        # Only what is no array: a kept tracer would be a leak.
        self.leaves = [x if a is None else None for x, a in zip(leaves, avals, strict=True)]
        # For each leaf the first that is the same object.
        self.same = _same(leaves)
        self.values: list[list[Any]] = []
        self.places: dict[tuple, int] = {}
        self.tests: list[str] = []
        self.too_large = False


class Rule:
    """All calls of one rule."""

    def __init__(self, test: str):
        self.test, self.tests, self.calls = test, 0, 0
        self.last: str | None = None
        self.signatures: dict[Any, Signature] = {}
        self.others: set[Any] = set()
        self.bytes = 0


class Recorder:
    """Notes the calls of custom rules while it is open."""

    def __init__(self, packages: list[str]):
        self.packages = packages
        self.rules: dict[Any, Rule] = {}
        self.test = ""
        self.leak_checked: set[str] = set()
        # Signatures that get a callback, in a second run.
        self.asked: frozenset[int] = frozenset()
        self.originals: dict[Any, tuple[Callable, Callable]] = {}
        self.finder: OnImport | None = None
        self.lock = threading.Lock()

    def open(self) -> None:
        if "jax" in sys.modules:
            self.patch()
        else:
            self.finder = OnImport("jax", self.patch)
            sys.meta_path.insert(0, self.finder)

    def close(self) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        for cls, (original, noted) in self.originals.items():
            if cls.__call__ is noted:
                cls.__call__ = original
        self.originals = {}

    def patch(self) -> None:
        jax = sys.modules["jax"]
        for cls in (jax.custom_vjp, jax.custom_jvp):
            original = cls.__call__
            noted = self._noted(original)
            self.originals[cls] = (original, noted)
            cls.__call__ = noted
        # The wrapper is no line of the user's: not in JAX's tracebacks, nor in its source lines.
        with contextlib.suppress(Exception):  # private names
            from jax._src import source_info_util, traceback_util

            traceback_util.register_exclusion(__file__)
            source_info_util.register_exclusion(__file__)

    def _noted(self, original: Callable) -> Callable:
        def __call__(rule, *args, **kwargs):
            if self.originals:
                # A note that fails must not break the call.
                with contextlib.suppress(Exception):
                    self.note(rule, args, kwargs)
            return original(rule, *args, **kwargs)

        return __call__

    def note(self, rule: Any, args: tuple, kwargs: dict) -> None:
        if getattr(rule, "unaudited", False) or not self._wanted(rule):
            return
        place = _place()
        if place is None:
            return
        jax = sys.modules["jax"]
        bound = inspect.signature(rule.fun).bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
        nondiff = {i % len(args) for i in rule.nondiff_argnums}
        static = {i: args[i] for i in sorted(nondiff)}
        leaves, tree = jax.tree.flatten([a for i, a in enumerate(args) if i not in nondiff])
        avals = [_aval(x) for x in leaves]
        arrays = [x for x, a in zip(leaves, avals, strict=True) if a is not None]
        traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
        if traced and jax.config.jax_check_tracer_leaks:
            # The rule itself may hold tracers.
            self.leak_checked.add(self.test)
            return
        x64 = jax.dtypes.canonicalize_dtype("float64") == "float64"
        settings = tuple((i, _plain(v)) for i, v in static.items())
        key = (tree, tuple(map(str, avals)), _same(leaves), settings, x64)
        with self.lock:
            known = self.rules.get(_identity(rule))
            signature = None if known is None else known.signatures.get(key)
            if self.asked and signature is None:
                return
            if known is None:
                known = self.rules[_identity(rule)] = Rule(self.test)
            if signature is None and len(known.signatures) >= SIGNATURES:
                known.others.add(hash(key))
            elif signature is None:
                signature = Signature(rule, static, leaves, tree, avals, x64)
                known.signatures[key] = signature
            # A rule inside shard_map cannot be called alone, and a callback there may block.
            alone = not any("shard_map" in name for name in place[1])
            if not self.asked:
                self._count(known, signature, place, alone)
        if signature is not None and len(signature.values) < VALUES and not signature.too_large:
            self._value(known, signature, arrays, traced and alone)

    def _count(self, known: Rule, signature: Signature | None, place: tuple, alone: bool) -> None:
        known.calls += 1
        known.tests += known.last != self.test
        known.last = self.test
        if signature is None:
            return
        if place in signature.places or len(signature.places) < PLACES:
            signature.places[place] = signature.places.get(place, 0) + 1
        if alone and self.test not in signature.tests and len(signature.tests) < TESTS:
            signature.tests.append(self.test)

    def _value(self, known: Rule, signature: Signature, arrays: list, traced: bool) -> None:
        """Keeps these values, or asks for them in a second run."""
        values = [_concrete(x) for x in arrays]
        if all(v is not None for v in values):
            self.keep(known, signature, values)
        elif traced and id(signature) in self.asked:
            jax = sys.modules["jax"]

            def arrived(*values):
                with contextlib.suppress(Exception):
                    self.keep(known, signature, values)

            data = [jax.random.key_data(x) if _is_key(x) else x for x in arrays]
            jax.debug.callback(arrived, *data)

    def keep(self, known: Rule, signature: Signature, values: Any) -> None:
        """Keeps a copy of one set of values: the test may donate or overwrite its own."""
        size = sum(getattr(v, "nbytes", 8) for v in values)
        if known.bytes + size > BYTES:
            signature.too_large = True
            return
        copies = [_copied(v) for v in values]
        with self.lock:
            if len(signature.values) < VALUES:
                known.bytes += size
                signature.values.append(copies)

    def _wanted(self, rule: Any) -> bool:
        if not self.packages:
            return True
        functions = [getattr(rule, n, None) for n in ("fun", "fwd", "bwd", "jvp")]
        op = getattr(functions[2], "op", None)
        modules = {_module(f) for f in (*functions, op) if f is not None}
        return any(m == p or m.startswith(p + ".") for m in modules for p in self.packages)

    def valueless(self) -> list[Signature]:
        """Signatures of which only the types are known."""
        signatures = (s for rule in self.rules.values() for s in rule.signatures.values())
        return [s for s in signatures if not s.values and not s.too_large]


class OnImport:
    """A finder that calls a function once a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                self.then()

            spec.loader.exec_module = exec_module
        return spec


def _same(leaves: list) -> tuple[int, ...]:
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(x), i) for i, x in enumerate(leaves))


def _identity(rule: Any) -> Any:
    """Rules made anew at each call, by a factory, are one when their code is."""
    op = getattr(getattr(rule, "bwd", None), "op", None)
    if op is not None:
        return id(op)
    return tuple(_code(getattr(rule, n, None)) for n in ("fun", "fwd", "bwd", "jvp"))


def _code(f: Any) -> Any:
    while hasattr(f, "func"):
        f = f.func
    return getattr(f, "__code__", None) or id(f)


def _module(f: Any) -> str:
    f = inspect.unwrap(f)
    while hasattr(f, "func"):
        f = f.func
    return getattr(f, "__module__", None) or type(f).__module__


def _plain(value: Any) -> Any:
    """What tells one setting from another, and stays the same when it is made anew."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return type(value).__qualname__, _code(value) if callable(value) else repr(value)[:200]


def _aval(leaf: Any) -> Any:
    """The type of an array leaf; None for a leaf that is no array."""
    jax, np = sys.modules["jax"], sys.modules["numpy"]
    array = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex | bool)
    return jax.typeof(leaf) if array else None


def _is_key(x: Any) -> bool:
    jax = sys.modules["jax"]
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _concrete(x: Any) -> Any:
    """The value of an argument, also under grad and vmap (its first example); None inside jit."""
    jax, np = sys.modules["jax"], sys.modules["numpy"]
    axes = []
    while isinstance(x, jax.core.Tracer):
        if hasattr(x, "primal"):
            x = x.primal
        elif hasattr(x, "batch_dim"):
            axes.append(x.batch_dim)
            x = x.val
        else:
            return None
    for axis in reversed(axes):
        if axis is not None:
            x = x[0] if _is_key(x) else np.array(x).take(0, axis)
    return x


def _copied(x: Any) -> Any:
    np = sys.modules["numpy"]
    return x if _is_key(x) or isinstance(x, bool | int | float | complex) else np.array(x)


def _place() -> tuple | None:
    """The caller's own innermost line, and JAX's functions around it; None in the auditor."""
    jax = os.path.dirname(sys.modules["jax"].__file__ or "")
    frame: types.FrameType | None = sys._getframe(1)
    own, inside = None, {}
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if file.startswith(jax):
            inside.pop(code.co_name, None)  # where it is outermost
            inside[code.co_name] = None
        elif file.startswith(_CHECK):
            return None
        elif own is None and not file.startswith(_OWN) and file not in _LIBRARY:
            own = (file, frame.f_lineno, code.co_name)
        elif own is not None and f"{os.sep}_pytest{os.sep}" in file:
            break
        frame = frame.f_back
    return own, tuple(reversed(inside))
