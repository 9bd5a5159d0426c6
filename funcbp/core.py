"""The one mechanism: an op is a function with a hand-written reverse rule.

`op(plain, fwd, bwd)` declares it once. What the declaration gives beyond `jax.custom_vjp`:

- array arguments anywhere in the signature, pytrees, None, integers, booleans and PRNG keys;
  settings are static;
- arguments that are functions, differentiated with respect to the arrays that they close over;
- every cotangent leaves in its primal's dtype, and with its primal's sharding;
- the rule is legal inside `shard_map(check_vma=True)` and on meshes with Explicit axes;
- `with autodiff():` runs `plain` instead, under JAX's own differentiation;
- `with recorded() as calls:` lists the calls made.
"""

import contextlib
import contextvars
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from funcbp.case import Case
from funcbp.closed import Closed
from funcbp.mesh import vary, varying

__all__ = ["Call", "Case", "InputError", "Op", "autodiff", "op", "recorded"]

_autodiff = jax.make_user_context(default_value=False)
_calls: contextvars.ContextVar[list["Call"] | None] = contextvars.ContextVar("calls", default=None)


class InputError(ValueError):
    """Bad input: says what must hold, what came and what to do, with the layer's path in front."""

    def __init__(self, reason: str, path: tuple[str, ...] = ()):
        super().__init__(f"{'/'.join(path)}: {reason}" if path else reason)
        self.reason, self.path = reason, path

    def within(self, name: str) -> "InputError":
        """The same error, seen from one level further out."""
        return InputError(self.reason, (name, *self.path))


class Call(NamedTuple):
    """One call of an op: its array arguments by name and its static settings by name."""

    op: "Op"
    arrays: dict[str, Any]
    static: dict[str, Any]


def autodiff() -> contextlib.AbstractContextManager:
    """Makes every op run `plain` under JAX's own autodiff while the context is open.

    Gives forward mode (`jax.jvp`, `jax.jacfwd`) through any model, and answers "is it my rule?"
    in one line. The switch is part of `jax.jit`'s cache key.

    >>> with funcbp.autodiff():
    ...     y, dy = jax.jvp(model, (x,), (dx,))
    """
    return _autodiff(True)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collects the calls of ops made while the context is open, in order.

    Run the function eagerly inside it, and the calls hold concrete arrays; under `jax.eval_shape`
    or `jit` they hold tracers, of which only shape and dtype may be used.
    """
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def op(
    plain: Callable,
    fwd: Callable,
    bwd: Callable,
    *,
    like: Callable | None = None,
    cases: Sequence[Case] = (),
    arrays: Sequence[str] | None = None,
    functions: Mapping[str, Callable] | None = None,
    check: Callable | None = None,
    resolve: Callable | None = None,
    surrogate_of: Callable | None = None,
    name: str | None = None,
) -> "Op":
    """Declares an op: a function with a hand-written reverse rule.

    Args:
      plain: the shortest correct formula, in differentiable JAX: the yardstick. Its signature is
        the op's.
      fwd: same arguments; returns `(y, saved)`. It runs in training and in inference.
      bwd: `bwd(saved, dy, **static)` returns a tuple of cotangents, one per array argument in
        the order of the signature; None for an argument that is not differentiable.
      like: the public function whose signature and values the op has.
      cases: inputs for test, audit and bench.
      arrays: names of the array arguments. By default: the parameters annotated with an array
        type, and those without annotation that are not keyword-only.
      functions: arguments that are functions of arrays, by name, each with a function of the op's
        arguments that gives a tuple of examples of what it will be called with. fwd gets them as
        `Closed`, a pytree of the arrays that the function closes over; bwd returns a cotangent of
        that structure for them, in the order of the signature. On Explicit axes plain runs instead.
      check: same arguments; raises `InputError` on bad shapes before anything runs.
      resolve: same arguments; returns the settings that follow from the values of arrays, by name,
        while these values are still at hand: inside the rule every array is traced.
      surrogate_of: the function whose value the op has and whose derivative its gradient is not,
        on purpose; `plain` is then differentiable JAX that has the gradient which is meant.
      name: the op's name; by default that of `like`, else of `plain`'s module.

    Returns:
      An `Op`, called like `plain`.

    Raises:
      TypeError: `arrays` names a parameter that `plain` does not have.
    """
    return Op(
        plain,
        fwd,
        bwd,
        like=like,
        cases=cases,
        arrays=arrays,
        functions=functions,
        check=check,
        resolve=resolve,
        surrogate_of=surrogate_of,
        name=name,
    )


class Op:
    """A function with a hand-written reverse rule; see `op`."""

    def __init__(
        self,
        plain: Callable,
        fwd: Callable,
        bwd: Callable,
        *,
        like: Callable | None,
        cases: Sequence[Case],
        arrays: Sequence[str] | None,
        check: Callable | None,
        name: str | None,
        functions: Mapping[str, Callable] | None = None,
        resolve: Callable | None = None,
        surrogate_of: Callable | None = None,
    ):
        self.declared_surrogate = surrogate_of is not None
        self.function = surrogate_of or plain
        self.plain, self.fwd, self.bwd, self.like = plain, fwd, bwd, like
        self.check, self.resolve = check, resolve
        self.cases = tuple(cases)
        self.name = name or (like.__name__ if like else plain.__module__.rpartition(".")[2])
        self.__name__ = self.__qualname__ = self.name
        self.__doc__ = plain.__doc__
        self.__module__ = plain.__module__
        self.__signature__ = signature = inspect.signature(plain)
        hints = typing.get_type_hints(plain)
        self.functions = dict(functions or {})
        declared = _array_names(signature, hints) if arrays is None else arrays
        self.arrays = tuple(n for n in signature.parameters if n in {*declared, *self.functions})
        unknown = {*declared, *self.functions} - set(signature.parameters)
        if unknown:
            raise TypeError(
                f"op {self.name}: arrays= names {sorted(unknown)}, not parameters of plain"
            )
        self.static = tuple(n for n in signature.parameters if n not in self.arrays)
        self._positional = tuple(
            n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_ONLY
        )
        self._floating = tuple(n for n in self.arrays if _is_floating(hints.get(n)))
        self._rule = functools.lru_cache(maxsize=4096)(self._build)

    def __repr__(self) -> str:
        return f"<op {self.name}{self.__signature__}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        arrays = {n: self._as_arrays(n, values[n]) for n in self.arrays}
        for n in self._floating:
            _require_floating(self.name, n, values[n])
        static = {n: values[n] for n in self.static}
        if self.check is not None:
            self.apply(self.check, arrays, static)
        if self.resolve is not None:
            static |= self.apply(self.resolve, arrays, static)
        calls = _calls.get()
        if calls is not None:
            calls.append(Call(self, arrays, static))
        if _autodiff.value or (self.functions and _on_explicit_mesh(arrays)):
            return self.apply(self.plain, arrays, static)
        for n, examples in self.functions.items():
            given = self.apply(examples, arrays, static)
            arrays[n] = Closed.of(arrays[n], *given)
        # The type is part of the key: 1, 1.0 and True are equal but are different settings.
        key = tuple((n, type(v), v) for n, v in static.items())
        try:
            rule = self._rule(key)
        except TypeError as error:
            raise self._unhashable(static) or error from None
        return rule(*arrays.values())

    def rule(self, **static: Any) -> Callable:
        """The `jax.custom_vjp` of the array arguments alone, for the given settings."""
        defaults = {n: self.__signature__.parameters[n].default for n in self.static}
        merged = defaults | static
        return self._rule(tuple((n, type(merged[n]), merged[n]) for n in self.static))

    def _as_arrays(self, name: str, argument: Any) -> Any:
        if name in self.functions:
            if not callable(argument):
                raise InputError(
                    f"{self.name}: {name} must be a function, got {type(argument).__name__}"
                )
            return argument
        return _as_arrays(argument)

    def _unhashable(self, static: dict[str, Any]) -> Exception | None:
        for n, v in static.items():
            try:
                hash(v)
            except TypeError:
                return InputError(
                    f"{self.name}: the setting {n} must be hashable, got {type(v).__name__} {v!r}; "
                    f"pass a tuple for a list, and arrays only as {', '.join(self.arrays)}"
                )
        return None

    def apply(self, f: Callable, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
        """Calls `f`, which has this op's signature, with arguments by name."""
        values = arrays | static
        positional = [values.pop(n) for n in self._positional]
        return f(*positional, **values)

    def _named(self, arrays: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.arrays, arrays, strict=True))

    def _build(self, key: tuple) -> Callable:
        static = {n: v for n, _, v in key}

        def primal(*arrays):
            return self._forward(arrays, static)[0]

        def forward(*arrays):
            y, saved = self._forward(arrays, static)
            origins = _origins(arrays, saved)
            if origins is not None and any(isinstance(a, Tracer) for a in jax.tree.leaves(arrays)):
                y = self._as_plain(y, arrays, static)
            return y, _Residuals(saved, tuple(map(_Primal.of, arrays)), origins)

        def backward(residuals, dy):
            return self._backward(residuals, dy, static)

        for function in (primal, forward, backward):
            function.__name__ = f"{self.name}_{function.__name__}"
            function.__qualname__ = function.__name__
            function.__module__ = self.__module__
        primal.__name__ = primal.__qualname__ = self.name
        # Lets the auditor, the ledger and the trace name the rule they meet.
        backward.op, backward.static, forward.static = self, static, static
        rule = jax.custom_vjp(primal)
        rule.defvjp(forward, backward)
        return rule

    def _forward(self, arrays: tuple, static: dict[str, Any]) -> tuple[Any, Any]:
        if not _on_explicit_mesh(arrays):
            return self.apply(self.fwd, self._named(arrays), static)

        # On Explicit axes a rule's own contractions would need output shardings, which its author
        # cannot know. So it runs with Auto axes, and the result gets the sharding of plain's.
        def fwd(*arrays):
            return self.apply(self.fwd, self._named(arrays), static)

        y = jax.eval_shape(functools.partial(self._plain, static=static), *arrays)
        bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
        saved = jax.eval_shape(fwd, *bare)[1]
        known = [jax.typeof(a) for a in jax.tree.leaves(arrays)] + jax.tree.leaves(y)
        shardings = (
            jax.tree.map(lambda a: a.sharding, y),
            jax.tree.map(lambda a: _sharding_like(a.shape, known), saved),
        )
        automatic: Callable = jax.sharding.auto_axes(fwd, out_sharding=shardings)
        return automatic(*arrays)

    def _backward(self, residuals: "_Residuals", dy: Any, static: dict[str, Any]) -> tuple:
        primals = residuals.primals
        avals = [a for p in primals for a in p.floating()]

        def pullback(saved, dy):
            dargs = self.bwd(saved, dy, **static)
            if not isinstance(dargs, tuple) or len(dargs) != len(self.arrays):
                got = (
                    f"a tuple of {len(dargs)}" if isinstance(dargs, tuple) else type(dargs).__name__
                )
                raise TypeError(
                    f"bwd of {self.name} must return a tuple of {len(self.arrays)} cotangents, one "
                    f"for each of {', '.join(self.arrays)}; got {got}"
                )
            return [
                leaf
                for n, p, d in zip(self.arrays, primals, dargs, strict=True)
                for leaf in p.cotangents(d, f"bwd of {self.name}: cotangent of {n}")
            ]

        def fitted(saved, dy):
            return _fitted(pullback(saved, dy), avals)

        if any(a.sharding.mesh.explicit_axes for a in avals):
            shardings = [a.sharding for a in avals]
            automatic: Callable = jax.sharding.auto_axes(fitted, out_sharding=shardings)
            flat = automatic(residuals.saved, dy)
        else:
            leaves = jax.tree.leaves((residuals.saved, dy))
            traced = any(isinstance(leaf, Tracer) for leaf in leaves)
            if residuals.origins is not None and traced:
                flat = self._twice(fitted, residuals, dy, static)
            else:
                flat = fitted(residuals.saved, dy)
        rest = iter(flat)
        return tuple(p.rebuilt(rest) for p in primals)

    def _as_plain(self, y: Any, arrays: tuple, static: dict[str, Any]) -> Any:
        """y, whose own derivative, which second derivatives need, is that of plain.

        Where JAX differentiates fwd itself, a square root may have a slope of nan at 0, or a loop
        no transpose. The pullback does not need it if it has plain's derivative too: see `_twice`.
        """
        leaves, tree = jax.tree.flatten(y)
        places = [i for i, leaf in enumerate(leaves) if _inexact(leaf)]
        if _on_explicit_mesh(arrays) or not places:
            return y

        @jax.custom_jvp
        def value(y, *arrays):
            return y

        @value.defjvp
        def _(primals, tangents):
            y, *arrays = primals
            plain = functools.partial(self._plain, static=static)
            tangent = jax.tree.leaves(jax.jvp(plain, tuple(arrays), tuple(tangents[1:]))[1])
            return y, [
                vary(tangent[i], varying(jax.typeof(y))) for i, y in zip(places, y, strict=True)
            ]

        setattr(value, "unaudited", True)  # noqa: B010 (it is the identity)
        found = value([jax.lax.stop_gradient(leaves[i]) for i in places], *arrays)
        for i, leaf in zip(places, found, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(tree, leaves)

    def _plain(self, *arrays: Any, static: dict[str, Any]) -> Any:
        return self.apply(self.plain, self._named(arrays), static)

    def _twice(
        self, pullback: Callable, residuals: "_Residuals", dy: Any, static: dict[str, Any]
    ) -> list[jax.Array]:
        """What `pullback` gives, whose own derivative is that of plain's pullback.

        A rule made for the first derivative may lose digits in the second, or hold a loop that
        reverse mode cannot transpose. Where it saved its arguments, plain's derivative is at hand.
        """
        avals = [a for p in residuals.primals for a in p.floating()]
        # An output without derivative has a float0, which custom_jvp does not take.
        given, tree = jax.tree.flatten(dy)
        zeros = [d if d.dtype == jax.dtypes.float0 else None for d in given]

        def whole(dy):
            rest = iter(dy)
            return jax.tree.unflatten(tree, [next(rest) if z is None else z for z in zeros])

        def reference(arrays, dy):
            plain = functools.partial(self._plain, static=static)
            cotangents = jax.tree.leaves(jax.vjp(plain, *arrays)[1](whole(dy)))
            return _fitted([d for d in cotangents if d.dtype != jax.dtypes.float0], avals)

        @jax.custom_jvp
        def twice(saved, dy):
            return pullback(saved, whole(dy))

        @twice.defjvp
        def _(primals, tangents):
            (saved, dy), (dsaved, ddy) = primals, tangents
            return twice(*primals), jax.jvp(
                reference,
                (residuals.arguments(saved), dy),
                (residuals.arguments(dsaved), ddy),
            )[1]

        setattr(twice, "unaudited", True)  # noqa: B010 (what it compares with is the truth)
        return twice(residuals.saved, [d for d, z in zip(given, zeros, strict=True) if z is None])


@jax.tree_util.register_pytree_node_class
class _Residuals:
    """What the rule saved, the static types of its primals, and where they are among the saved.

    `origins` holds for each leaf of the arguments its place among the leaves saved, and is None
    when one of them was not saved.
    """

    def __init__(self, saved: Any, primals: tuple["_Primal", ...], origins: tuple[int, ...] | None):
        self.saved, self.primals, self.origins = saved, primals, origins

    def tree_flatten(self):
        return (self.saved,), (self.primals, self.origins)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(children[0], *static)

    def arguments(self, saved: Any) -> tuple:
        """The rule's arguments (or their tangents), taken out of what it saved."""
        leaves = jax.tree.leaves(saved)
        rest = iter([leaves[i] for i in self.origins or ()])
        return tuple(
            jax.tree.unflatten(p.tree, [next(rest) for _ in p.avals]) for p in self.primals
        )


def _origins(arrays: tuple, saved: Any) -> tuple[int, ...] | None:
    places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(saved))}
    found = [places.get(id(leaf)) for leaf in jax.tree.leaves(arrays)]
    return None if None in found else tuple(i for i in found if i is not None)


class _Primal(NamedTuple):
    """The type of one argument: its tree, and for each leaf the aval that a cotangent must fit."""

    tree: Any
    avals: tuple[Any, ...]

    @classmethod
    def of(cls, argument: Any) -> "_Primal":
        leaves, tree = jax.tree.flatten(argument)
        return cls(tree, tuple(jax.typeof(leaf) for leaf in leaves))

    def floating(self) -> list[Any]:
        return [a for a in self.avals if _inexact(a)]

    def cotangents(self, argument: Any, what: str) -> list[jax.Array]:
        """The cotangents of the floating leaves, each in its primal's type."""
        if argument is None:
            leaves = [None] * len(self.avals)
        else:
            leaves = _flatten_up_to(self.tree, argument, what)
        return [
            _typed(leaf, aval, what)
            for leaf, aval in zip(leaves, self.avals, strict=True)
            if _inexact(aval)
        ]

    def rebuilt(self, rest: Iterator[jax.Array]) -> Any:
        leaves = [next(rest) if _inexact(a) else None for a in self.avals]
        return jax.tree.unflatten(self.tree, leaves)


def _flatten_up_to(tree: Any, argument: Any, what: str) -> list[Any]:
    try:
        return tree.flatten_up_to(argument)
    except ValueError as error:
        raise TypeError(f"{what} must have its primal's tree {tree}; {error}") from None


def _typed(cotangent: Any, aval: Any, what: str) -> jax.Array:
    if cotangent is None:
        cotangent = jnp.zeros(aval.shape, aval.dtype)
    cotangent = jnp.asarray(cotangent)
    if cotangent.shape != aval.shape:
        raise TypeError(f"{what} must have its primal's shape {aval.shape}, got {cotangent.shape}")
    return cotangent.astype(aval.dtype)


def _fitted(cotangents: list, avals: list) -> list:
    return [fit(d, a) for d, a in zip(cotangents, avals, strict=True)]


def fit(cotangent: jax.Array, aval: Any) -> jax.Array:
    """The cotangent, varying over the mesh axes that its primal varies over."""
    primal = varying(aval)
    # A primal that is the same on every device of an axis was broadcast to them: its cotangent is
    # the sum over that axis, which plain JAX code gets by transposing the broadcast.
    surplus = varying(jax.typeof(cotangent)) - primal
    if surplus:
        cotangent = jax.lax.psum(cotangent, tuple(sorted(surplus)))
    return vary(cotangent, primal)


def _on_explicit_mesh(arrays: Any) -> bool:
    leaves = [a for a in jax.tree.leaves(arrays) if not callable(a)]
    return any(jax.typeof(a).sharding.mesh.explicit_axes for a in leaves)


def _sharding_like(shape: tuple[int, ...], known: Sequence[Any]) -> NamedSharding:
    """A sharding for a residual: that of the known array which shares most leading axes with it.

    Any choice is correct; this one keeps row statistics on the device that has their rows.
    """

    def shared(aval):
        same = [m == n for m, n in zip(shape, aval.shape, strict=False)]
        return (*same, False).index(False)

    best = max(known, key=shared)
    spec = tuple(best.sharding.spec)[: shared(best)]
    return NamedSharding(best.sharding.mesh, PartitionSpec(*spec))


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _as_arrays(argument: Any) -> Any:
    def one(leaf):  # asarray copies what is differentiated: a residual would be counted twice
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)

    return argument if argument is None else jax.tree.map(one, argument)


def _require_floating(name: str, parameter: str, value: Any) -> None:
    if value is None or isinstance(value, float):
        return
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"{name}: {parameter} must be a floating point array, got {dtype}"
            f"{list(jnp.shape(value))}; convert it first, as in x.astype(jnp.float32)"
        )


def _array_names(signature: inspect.Signature, hints: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        n
        for n, p in signature.parameters.items()
        if (_is_array(hints[n]) if n in hints else p.kind is not p.KEYWORD_ONLY)
    )


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _is_array(hint: Any) -> bool:
    return any(
        isinstance(m, type)
        and (issubclass(m, (jax.Array, jaxtyping.AbstractArray)) or m is jaxtyping.PyTree)
        for m in _members(hint)
    )


def _is_floating(hint: Any) -> bool:
    floating = set(getattr(jaxtyping.Float, "dtypes"))  # noqa: B009 (types do not know it)
    return any(
        isinstance(m, type) and issubclass(m, jaxtyping.AbstractArray) and set(m.dtypes) <= floating
        for m in _members(hint)
    )
