"""Functions by name, and names for functions.

`named("train.py:loss")` is the function; `name_of(loss)` says how another program can have it;
`rule_in(loss, *args, name=...)` is a rule that has no name of its own there.
"""

import difflib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbp.check.watch import Sighting, plain_name, watching
from funcbp.core import InputError

__all__ = ["Name", "Seen", "name_of", "named", "rule_in", "seen_in"]


class Name(NamedTuple):
    """How to have an object elsewhere: its module, or its file where that is no module; the path
    of attributes inside; and the folder that must be importable, or None."""

    module: str | Path
    attribute: str
    folder: Path | None = None


def named(spec: str | os.PathLike, attribute: str | None = None) -> Any:
    """The object that `MODULE:ATTRIBUTE` names.

    Args:
      spec: a dotted module or a path to a `.py` file, a colon, and a name in it, which may have
        dots. The current folder is importable, and so is the one that a file lies in.
      attribute: the name, where `spec` is the module alone.

    Raises:
      InputError: no such module or name, or the module raises when it is imported.
    """
    spec = str(spec)
    if attribute is None:
        module_name, _, attribute = spec.rpartition(":")
        if not module_name or not attribute:
            raise InputError(
                f"a function is named MODULE:FUNCTION, as in train:loss or train.py:loss, got "
                f"{spec!r}; write the module, a colon and the function"
            )
    else:
        module_name = spec
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = _module(module_name)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a script that is not meant to be imported may also exit
        raise InputError(
            f"importing {module_name} raises {type(error).__name__}: {error}; it must be importable"
        ) from error
    for step in attribute.split("."):
        if not hasattr(found, step):
            close = difflib.get_close_matches(step, [n for n in dir(found) if n[0] != "_"], 3)
            raise InputError(
                f"{module_name} has no {attribute}"
                + (f"; is it {' or '.join(close)}?" if close else "; give a name that it defines")
            )
        found = getattr(found, step)
    return found


def _module(name: str) -> Any:
    if not (name.endswith(".py") or os.sep in name):
        top = name.split(".")[0]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(f"{missing}."):
                raise  # a module that this one imports
            raise InputError(
                f"no module {name}"
                + (f" (there is no {missing})" if missing not in (name, "") else "")
                + f"; give a dotted module that can be imported from {os.getcwd()}, or a path to a "
                + f".py file, as in {top}.py:function"
            ) from None
    path = Path(name).resolve()
    if not path.is_file():
        raise InputError(f"no file {name}; give a dotted module or a path to a .py file")
    for known, module in list(sys.modules.items()):
        if known != "__main__" and _same_file(getattr(module, "__file__", None), path):
            return module
    folder, dotted = _package(path)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if dotted not in sys.modules and _origin(dotted) == path:
        return importlib.import_module(dotted)
    # Another module has this name: the file gets one of its own.
    alias = f"{path.stem} of {path.parent}"
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    return module


def _package(path: Path) -> tuple[Path, str]:
    """The folder that must be importable for a file, and the file's dotted name from there."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _origin(dotted: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(dotted)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def _same_file(file: Any, path: Path) -> bool:
    return isinstance(file, str) and file.endswith(path.name) and Path(file).resolve() == path


def name_of(found: Any) -> Name | None:
    """How another program can have this very object, or None if it has no name in a module."""
    public = getattr(found, "__module__", None)
    if isinstance(public, str) and public != "__main__" and public in sys.modules:
        qualname = getattr(found, "__qualname__", "")
        if qualname and _resolved(vars(sys.modules[public]), qualname) is found:
            module = _place(vars(sys.modules[public]))
            if module is not None:
                return Name(module[0], qualname, module[1])
    home = _home(found) or {}
    attribute = _attribute(home, found, plain_name(found))
    module = _place(home) if attribute is not None else None
    if attribute is not None and module is not None:
        return Name(module[0], attribute, module[1])
    for other in list(sys.modules.values()):
        scope = getattr(other, "__dict__", None)
        if not isinstance(scope, dict) or scope is home:
            continue
        names = [n for n, v in list(scope.items()) if v is found and n.isidentifier()]
        module = _place(scope) if names else None
        if module is not None:
            return Name(module[0], names[0], module[1])
    return None


def _home(found: Any) -> dict[str, Any] | None:
    """The globals of the module that a function, a rule or a class was written in."""
    function = getattr(found, "plain", None) or getattr(found, "fun", found)
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif hasattr(function, "fun"):
            function = function.fun
        else:
            break
    if hasattr(function, "__globals__"):
        return function.__globals__
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return vars(module) if module is not None else None


def _attribute(scope: Mapping[str, Any], found: Any, qualname: str) -> str | None:
    """The path to an object from a module's globals: a name, in a class, or under decorators."""
    if _resolved(scope, qualname) is found:
        return qualname
    own = scope.get("__name__")
    for name, value in list(scope.items()):
        if not name.isidentifier():
            continue
        path = name
        while value is not None:
            if value is found:
                return path
            value, path = _wrapped(value), f"{path}.__wrapped__"
        inside = scope[name]
        if isinstance(inside, type) and inside.__module__ == own:
            for n in list(vars(inside)):
                if n.isidentifier() and getattr(inside, n, None) is found:
                    return f"{name}.{n}"
    return None


def _wrapped(value: Any) -> Any:
    """What a decorated function wraps, or None."""
    try:
        inner = getattr(value, "__wrapped__", None) if callable(value) else None
    except Exception:  # an object that answers for attributes in its own way
        return None
    return None if inner is value else inner


def _resolved(scope: Mapping[str, Any], qualname: str) -> Any:
    first, *rest = qualname.split(".")
    value = scope.get(first)
    for step in rest:
        value = getattr(value, step, None)
    return value


def _place(scope: Mapping[str, Any]) -> tuple[str | Path, Path | None] | None:
    """(module or file, folder that must be importable) of a module's globals."""
    name, file = scope.get("__name__") or "", scope.get("__file__")
    path = Path(file).resolve() if file else None
    known = name in sys.modules and vars(sys.modules[name]) is scope
    if not known or name == "__main__" or not all(map(str.isidentifier, name.split("."))):
        return (path, None) if path is not None and path.is_file() else None
    if path is None:
        return name, None
    steps = len(name.split(".")) - (path.name != "__init__.py")
    folder = path.parents[steps]
    installed = any(p in ("site-packages", "dist-packages") for p in path.parts)
    builtin = name.split(".")[0] in sys.stdlib_module_names
    return name, None if installed or builtin else folder


class Seen(NamedTuple):
    """A rule as a function calls it, and its settings: values by position."""

    rule: Any
    static: dict[int, Any]


def rule_in(f: Callable, *args: Any, name: str, number: int = 0, **kwargs: Any) -> Seen:
    """Runs f(*args) and returns the rule called `name` that it calls.

    Args:
      f: a function.
      *args: its arguments.
      name: of the rule, as a report has it: `make_norm.norm`.
      number: which of those so named, by settings and types of arguments, in the order of calls.
      **kwargs: keyword arguments.

    Raises:
      InputError: it calls no such rule.
    """
    found = seen_in(f, args, kwargs)
    matching = [s for s in found if plain_name(s.rule) == name]
    if number >= len(matching):
        others = sorted({plain_name(s.rule) for s in found})
        raise InputError(
            f"{plain_name(f)} must call a rule {name}"
            + (f" at least {number + 1} times" if number else "")
            + f", it calls {', '.join(others) or 'none'}; give the name that the rule has now"
        )
    return Seen(matching[number].rule, matching[number].static)


def seen_in(f: Callable, args: tuple, kwargs: Mapping[str, Any]) -> list[Sighting]:
    """The rules that f(*args) calls, one for each place, setting and type of arguments."""
    # Copies, because a function may give its arguments' memory away.
    args, kwargs = jax.tree.map(
        lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a, (args, dict(kwargs))
    )
    with watching() as seen:
        jax.block_until_ready(f(*args, **kwargs))
    return seen
