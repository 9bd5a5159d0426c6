"""The ledger: every array that the forward pass keeps for the backward pass."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from funcbp.core import InputError, autodiff
from funcbp.trace import ledger_views as views
from funcbp.trace import origin
from funcbp.trace.residuals import Keeper, Residual, residuals

__all__ = ["Comparison", "Ledger", "Row", "saved"]


class Row(NamedTuple):
    """One array that is kept: a leaf of `jax.vjp(fn, *args)[1]`.

    Attributes:
      bytes: its size; a `scan` keeps its steps in one array.
      shape: of the array.
      dtype: its name.
      layer: the path of scopes that keeps it, else that which made it; "" where there is none.
      rule: the hand rule that keeps it; None if autodiff does.
      source: the line that made it, as `file.py:12`; the name of an argument; the line that keeps
        it, for a constant.
      operation: the primitive that made it; "argument", or "constant" for an array that was there
        before (a closure's).
      is_argument: whether it is an argument of the function, which costs nothing to keep.
      shared: who else keeps it, as `dense in serial/dense_1`.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    layer: str
    rule: str | None
    source: str
    operation: str
    is_argument: bool
    shared: tuple[str, ...]


class Comparison(NamedTuple):
    """Bytes kept by the same function, arguments not counted, in four ways.

    Attributes:
      hand_rules: as it is.
      autodiff: under `funcbp.autodiff()`, which leaves out this library's rules.
      checkpoint: under `jax.checkpoint`, which keeps arguments and computes the rest again; None
        for a function with effects, which JAX does not repeat.
      compiled: temporary bytes of the compiled value and gradient; None where `Ledger.compiled`
        was not asked, or the backend does not tell.
    """

    hand_rules: int
    autodiff: int
    checkpoint: int | None
    compiled: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
    """What `saved` found; prints as a table.

    Attributes:
      name: of the function.
      rows: one an array, the largest first.
      temporary_bytes: see `compiled`.
    """

    name: str
    rows: tuple[Row, ...]
    _program: "_Program" = dataclasses.field(repr=False)
    temporary_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """Of all rows that are not arguments: what the forward pass adds to memory."""
        return sum(row.bytes for row in self.rows if not row.is_argument)

    @property
    def argument_bytes(self) -> int:
        """Of the rows that are arguments."""
        return sum(row.bytes for row in self.rows if row.is_argument)

    def by_layer(self) -> dict[str, int]:
        """Bytes by layer, the largest first; arguments not counted."""
        return self._by("layer")

    def by_rule(self) -> dict[str, int]:
        """Bytes by hand rule, and by "autodiff", the largest first; arguments not counted."""
        return self._by("rule")

    def by_source(self) -> dict[str, int]:
        """Bytes by source line, the largest first; arguments not counted."""
        return self._by("source")

    def _by(self, field: str) -> dict[str, int]:
        kept = (row for row in self.rows if not row.is_argument)
        named = ((getattr(row, field), row.bytes) for row in kept)
        return views.totals(("autodiff" if name is None else name, size) for name, size in named)

    @functools.cached_property
    def comparison(self) -> Comparison:
        """The same function in four ways; traced when first asked for, never run."""
        without, again = self._program.autodiff(), self._program.checkpoint()
        return Comparison(self.bytes, without, again, self.temporary_bytes)

    def compiled(self) -> "Ledger":
        """The same ledger, with the temporary bytes of the compiled program in its comparison.

        These are what XLA allocates beside arguments and results for the value and the gradient
        together, after it has fused, shared and thrown away. It takes a compilation, which for a
        large model takes minutes where the ledger takes seconds; so it is asked for.
        """
        return dataclasses.replace(self, temporary_bytes=self._program.temporary())

    def table(self, limit: int = 20) -> Table:
        """The largest rows, and the number and bytes of the others.

        Args:
          limit: how many rows are shown.
        """
        return views.table(self, limit)

    def __str__(self) -> str:
        return views.text(self)

    def __rich__(self) -> Any:
        return views.terminal(self)

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """The ledger as plain values: totals, comparison and rows.

        Args:
          path: a file to write it to as well.
        """
        return views.plain(self, path)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a line a row.

        Raises:
          InputError: pandas is not installed.
        """
        return views.frame(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page; also written to `path`. Rows beyond the largest are summed."""
        return views.html(self, path)

    def _repr_html_(self) -> str:
        return views.fragment(self)

    def plot(self, ax: Any = None) -> Any:
        """Draws a bar for each of the 40 largest layers, hand rules and autodiff apart.

        Args:
          ax: the `matplotlib.axes.Axes` to draw on; by default a new figure's.

        Returns:
          The axes.

        Raises:
          InputError: matplotlib is not installed.
        """
        return views.plot(self, ax)


def saved(fn: Callable, *args: Any, **kwargs: Any) -> Ledger:
    """Lists every array that the forward pass of `fn` keeps for its backward pass.

    These are the leaves of `jax.vjp(fn, *args)[1]`, to the byte. Nothing is computed: the function
    is traced with the shapes of its arguments, as under `jax.jit`. (Outside it JAX copies an array
    that is converted to the dtype that it has, and keeps the copy.)

    >>> print(funcbp.saved(loss, params, jax.ShapeDtypeStruct((1024, 784), "float32")))

    Args:
      fn: any function of arrays that JAX can differentiate; it may return any pytree of arrays.
      *args: pytrees of arrays, of `jax.ShapeDtypeStruct`s, or of Python floats. Those that are not
        floating have no cotangent; leaves of any other kind are passed as they are.
      **kwargs: likewise.

    Returns:
      A `Ledger`: `.rows`, `.bytes`, `.by_layer()`, `.by_rule()`, `.by_source()`, `.comparison`,
      `.table()`, `.to_html(path)`, `.to_json(path)`, `.to_pandas()`, `.plot()`.

    Raises:
      InputError: `fn` is not callable, or no argument is floating.
    """
    if not callable(fn):
        raise InputError(f"fn must be a function, got {type(fn).__name__} {fn!r}; pass it uncalled")
    program = _Program.of(fn, args, kwargs)
    rows = (program.row(residual) for residual in program.residuals())
    ordered = sorted(rows, key=lambda row: -row.bytes)
    name = getattr(fn, "__name__", None) or getattr(fn, "name", type(fn).__name__)
    return Ledger(name, tuple(ordered), program)


class _Program(NamedTuple):
    """A function of the arrays among its arguments alone.

    Attributes:
      call: the function of the leaves.
      shapes: of the leaves.
      names: of the leaves.
    """

    call: Callable
    shapes: list[Any]
    names: list[str]

    @classmethod
    def of(cls, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> "_Program":
        paths, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        shapes = jax.eval_shape(lambda arrays: arrays, [leaves[i] for i in places])
        if not any(jnp.issubdtype(s.dtype, jnp.inexact) for s in shapes):
            got = ", ".join(f"{s.dtype}{list(s.shape)}" for s in shapes) or "no array"
            raise InputError(
                f"at least one argument must be floating, to be differentiated by, got {got}; "
                "convert it, as in x.astype(jnp.float32)"
            )
        fixed = [None if i in set(places) else leaf for i, leaf in enumerate(leaves)]

        def call(*arrays):
            whole = list(fixed)
            for i, array in zip(places, arrays, strict=True):
                whole[i] = array
            args, kwargs = jax.tree.unflatten(tree, whole)
            return fn(*args, **kwargs)

        return cls(call, shapes, [_named(paths[i][0]) for i in places])

    def residuals(self) -> list[Residual]:
        return residuals(self.call, self.shapes)

    def autodiff(self) -> int:
        with autodiff():
            return _bytes(residuals(self.call, self.shapes))

    def checkpoint(self) -> int | None:
        try:
            return _bytes(residuals(jax.checkpoint(self.call), self.shapes))
        except NotImplementedError:
            return None

    def temporary(self) -> int | None:
        compiled = jax.jit(self._value_and_gradient).lower(*self.shapes).compile()
        return getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)

    def _value_and_gradient(self, *leaves):
        y, pullback = jax.vjp(self.call, *leaves)
        cotangents = pullback(jax.tree.map(_ones, y))
        return y, [d for d in jax.tree.leaves(cotangents) if d.dtype != jax.dtypes.float0]

    def row(self, residual: Residual) -> Row:
        """The row of one residual."""
        aval, number = residual.aval, residual.argument
        keepers = sorted(residual.keepers, key=lambda k: k.rule is None)
        made = _layer(residual.maker)
        if number is not None:
            source, operation = self.names[number], "argument"
        elif residual.maker:
            source, operation = origin.source(*residual.maker), residual.maker[-1].primitive.name
        else:
            source = origin.source(*keepers[0].path) if keepers else ""
            operation = "constant"
        return Row(
            _size(aval),
            tuple(aval.shape),
            str(aval.dtype),
            (_layer(keepers[0].path) if keepers else "") or made,
            keepers[0].rule if keepers else None,
            source,
            operation,
            number is not None,
            tuple(dict.fromkeys(map(_shown, keepers)))[1:],
        )


def _shown(keeper: Keeper) -> str:
    layer = _layer(keeper.path)
    return f"{keeper.rule or 'autodiff'} in {layer}" if layer else keeper.rule or "autodiff"


def _layer(path: Iterable[Any]) -> str:
    return origin.layer(*map(_stack, path))


def _stack(equation: Any) -> Any:
    """The name stack; that of a differentiated checkpoint holds its scopes twice."""
    stack = equation.source_info.name_stack
    half = len(stack) // 2
    twice = equation.primitive.name == "remat2" and stack[:half] == stack[half:]
    return stack[half:] if twice else stack


def _bytes(found: Iterable[Residual]) -> int:
    return sum(_size(r.aval) for r in found if r.argument is None)


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, float | complex) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _named(path: Any) -> str:
    """`argument 0['w']`, or `where['w']` for a keyword."""
    head = path[1].key if path[0].idx else f"argument {path[1].idx}"
    return head + jax.tree_util.keystr(path[2:])


def _ones(y: Any) -> Any:
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.ones_like(y)
    return np.zeros(y.shape, jax.dtypes.float0)
