"""Values as Python source: arrays exactly, pytrees, settings, functions by name.

Arrays that are too long for a page go to a dictionary that is saved beside the source.
"""

import dataclasses
import enum
import functools
import os
import pickle
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.named import Name, name_of

__all__ = ["Source", "Unwritable", "quoted"]

# Elements up to which an array is written as numbers.
LITERAL = 100
# Of a line, less what the body of a test is indented by.
WIDTH = 90
# Names that the sources use themselves.
RESERVED: tuple[str, ...] = (
    "rule",
    "static",
    "args",
    "given",
    "keywords",
    "report",
    "reference",
    "jax",
    "jnp",
    "np",
    "funcbp",
    "named",
)


class Unwritable(Exception):
    """A value that no source can make again; says which."""


class Source:
    """Writes values, and keeps what they need.

    Attributes:
      arrays: the long ones, by the key under which the source looks them up in `ARRAYS`.
      folders: that must be importable.
    """

    def __init__(self, path: Path):
        self.path = path
        self.arrays: dict[str, np.ndarray] = {}
        self.folders: set[Path] = set()
        self.imports: dict[str, str] = {}

    def begin(self, prefix: str) -> None:
        """A new function: imports start afresh, and `prefix` names its arrays."""
        self.prefix = prefix
        self.imports = dict.fromkeys(RESERVED, "")

    def lines(self) -> list[str]:
        """The imports that the values of this function need, and names from files."""
        modules: dict[str, list[str]] = {}
        others = []
        for text in self.imports.values():
            for line in text.splitlines():
                if line.startswith("from "):
                    module, _, what = line.partition(" import ")
                    modules.setdefault(module, []).append(what)
                else:
                    others.append(line)
        return [f"{m} import {', '.join(sorted(w))}" for m, w in sorted(modules.items())] + others

    def have(self, name: Name, alias: str | None = None) -> str:
        """The expression for an object with a name; its import is noted."""
        first, *rest = name.attribute.split(".")
        if isinstance(name.module, Path):
            file = os.path.relpath(name.module, self.path.parent)
            bound = alias or first
            line = f'{bound} = named(HERE / "{file}", "{name.attribute if alias else first}")'
            rest = [] if alias else rest
        elif alias and not rest:
            bound, line = alias, f"from {name.module} import {first} as {alias}"
        elif alias:
            bound, line = alias, f"from {name.module} import {first}\n{alias} = {name.attribute}"
            rest = []
        else:
            bound, line = first, f"from {name.module} import {first}"
        if name.folder is not None:
            self.folders.add(name.folder)
        taken = self.imports.get(bound)
        if taken is not None and taken != line:
            return self.have(name, alias=f"{bound}_{len(self.imports)}")
        self.imports[bound] = line
        return ".".join([bound, *rest])

    def write(self, value: Any, indent: int = 0) -> str:
        """The source of a value.

        Raises:
          Unwritable: a local function or class, or an object that cannot be pickled.
        """
        if value is None or value is ... or isinstance(value, bytes | range | slice):
            return repr(value)
        if isinstance(value, str):
            return quoted(value)
        if isinstance(value, enum.Enum):
            return f"{self._named(type(value))}[{quoted(value.name)}]"
        if isinstance(value, bool | int):
            return repr(value)
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return self._array(value, indent)
        if isinstance(value, float):
            return _number(value)
        if isinstance(value, complex):
            return f"complex({_number(value.real)}, {_number(value.imag)})"
        if isinstance(value, np.dtype):
            return f"np.dtype({quoted(value.name)})"
        if isinstance(value, type) or callable(value) and not _has_leaves(value):
            return self._function(value, indent)
        return self._tree(value, indent)

    def _named(self, value: Any) -> str:
        name = name_of(value)
        if name is None:
            shown = getattr(value, "__qualname__", None) or repr(value)[:60]
            raise Unwritable(f"{shown} has no name in a module")
        return self.have(name)

    def _function(self, value: Any, indent: int) -> str:
        if type(value) is functools.partial:
            inner = [value.func, *value.args]
            parts = [self.write(v, indent) for v in inner]
            parts += [f"{k}={self.write(v, indent)}" for k, v in value.keywords.items()]
            return f"{self._named(functools.partial)}({', '.join(parts)})"
        return self._named(value)

    def _tree(self, value: Any, indent: int) -> str:
        kind = type(value)
        if kind is dict:
            pairs = [f"{self.write(k)}: {self.write(v, indent + 4)}" for k, v in value.items()]
            return _bracketed("{", pairs, "}", indent)
        if kind is list:
            return _bracketed("[", [self.write(v, indent + 4) for v in value], "]", indent)
        if kind in (set, frozenset):
            inside = sorted(self.write(v) for v in value)
            return f"{kind.__name__}([{', '.join(inside)}])"
        if kind is tuple:
            parts = [self.write(v, indent + 4) for v in value]
            return f"({parts[0]},)" if len(parts) == 1 else _bracketed("(", parts, ")", indent)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            fields = dict(zip(kind._fields, value, strict=True))  # type: ignore[attr-defined]
            return self._made(kind, fields, indent)
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            if _makes(kind, fields, value):
                return self._made(kind, fields, indent)
        return self._pickled(value)

    def _made(self, kind: type, fields: dict[str, Any], indent: int) -> str:
        parts = [f"{n}={self.write(v, indent + 4)}" for n, v in fields.items()]
        return _bracketed(f"{self._named(kind)}(", parts, ")", indent)

    def _pickled(self, value: Any) -> str:
        name = name_of(type(value))
        if name is None or isinstance(name.module, Path):
            raise Unwritable(f"a {type(value).__qualname__} is of a class without a module")
        self.have(name)
        try:
            data = pickle.dumps(value)
            pickle.loads(data)
        except Exception as error:
            raise Unwritable(f"a {type(value).__qualname__} cannot be pickled: {error}") from None
        if b"__main__" in data:
            raise Unwritable(f"a {type(value).__qualname__} holds what a script defines")
        loads = self._named(pickle.loads)
        return f"{loads}({self._kept(np.frombuffer(data, np.uint8))}.tobytes())"

    def _kept(self, array: np.ndarray) -> str:
        key = f"{self.prefix}_{len([k for k in self.arrays if k.startswith(self.prefix + '_')])}"
        self.arrays[key] = array
        return f"ARRAYS[{quoted(key)}]"

    def _array(self, value: Any, indent: int) -> str:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = self._array(jax.random.key_data(value), indent)
            impl = quoted(str(jax.random.key_impl(value)))
            return f"jax.random.wrap_key_data({data}, impl={impl})"
        v = np.asarray(value)
        if v.dtype == jax.dtypes.float0:
            return f"np.zeros({v.shape}, jax.dtypes.float0)"
        scalar = "[()]" if isinstance(value, np.generic) else ""
        return self._plain(v, "jnp" if isinstance(value, jax.Array) else "np", indent) + scalar

    def _plain(self, v: np.ndarray, module: str, indent: int) -> str:
        dtype = quoted(v.dtype.name)
        if not v.size:
            return f"{module}.zeros({v.shape}, {dtype})"
        complex_of_numpy = np.iscomplexobj(v) and module == "np"
        if complex_of_numpy or v.size > LITERAL and not _constant(v):
            return f"{module}.asarray({self._kept(_saved(v))}, {dtype})"
        if np.iscomplexobj(v):
            parts = [self._plain(p, module, indent + 4) for p in (np.real(v), np.imag(v))]
            return f"jax.lax.complex({', '.join(parts)})"
        if v.size > 3 and _constant(v):
            return f"{module}.full({v.shape}, {_text(v.flat[0])}, {dtype})"
        return f"{module}.asarray({_nested(v, indent)}, {dtype})"


def quoted(text: str) -> str:
    """A string's source, in double quotes where that takes no escapes."""
    shown = repr(text)
    return f'"{text}"' if shown == f"'{text}'" and '"' not in text else shown


def _bracketed(opening: str, parts: list[str], closing: str, indent: int) -> str:
    """Elements on one line if they fit, else each on a line of its own."""
    line = f"{opening}{', '.join(parts)}{closing}"
    if len(line) + indent <= WIDTH and "\n" not in line:
        return line
    pad = " " * (indent + 4)
    inside = "".join(f"{pad}{p},\n" for p in parts)
    return f"{opening}\n{inside}{' ' * indent}{closing}"


def _nested(v: np.ndarray, indent: int) -> str:
    if v.ndim == 0:
        return _text(v[()])
    if v.ndim > 1:
        return _bracketed("[", [_nested(row, indent + 4) for row in v], "]", indent)
    line = f"[{', '.join(map(_text, v))}]"
    if len(line) + indent <= WIDTH:
        return line
    pad = " " * (indent + 4)
    inside = textwrap.fill(
        ", ".join(map(_text, v)) + ",", WIDTH, initial_indent=pad, subsequent_indent=pad
    )
    return f"[\n{inside}\n{' ' * indent}]"


def _text(v: Any) -> str:
    """A number as short as it can be and still be the same in its dtype."""
    if v.dtype == bool:
        return repr(bool(v))
    if jnp.issubdtype(v.dtype, jnp.integer):
        return repr(int(v))
    if not np.isfinite(v):
        return _number(float(v))
    short = str(v)
    with np.errstate(all="ignore"):
        same = np.asarray(float(short)).astype(v.dtype)
    return repr(float(short)) if same == v else repr(float(v))


def _number(v: float) -> str:
    if np.isnan(v):
        return "np.nan"
    if np.isinf(v):
        return "np.inf" if v > 0 else "-np.inf"
    return repr(v)


def _constant(v: np.ndarray) -> bool:
    if v.dtype.kind == "c" or jnp.issubdtype(v.dtype, jnp.complexfloating):
        return False
    first = v.reshape(-1)[:1].tobytes()
    return v.tobytes() == first * v.size


def _saved(v: np.ndarray) -> np.ndarray:
    """In a dtype that a file of numpy's holds."""
    if v.dtype.isbuiltin == 1:
        return v
    return v.astype(np.float32 if jnp.issubdtype(v.dtype, jnp.floating) else np.int8)


def _has_leaves(value: Any) -> bool:
    """Whether it is a pytree node, like a module that can be called."""
    leaves = jax.tree.leaves(value)
    return not (len(leaves) == 1 and leaves[0] is value)


def _makes(kind: type, fields: dict[str, Any], value: Any) -> bool:
    """Whether the class called with its fields gives an equal object."""
    try:
        again = kind(**fields)
        old, new = jax.tree.flatten(value), jax.tree.flatten(again)
        return old[1] == new[1] and all(a is b for a, b in zip(old[0], new[0], strict=True))
    except Exception:
        return False
