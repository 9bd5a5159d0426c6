"""A finding's input and call sites as a reader knows them."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.finding import Finding
from funcbp.core import Op

__all__ = ["inputs_of", "places", "rule_of"]

# A call site that differs from another in its scope and its count alone.
SITE = re.compile(
    r"(?P<place>.*?)(?:[,;] scope (?P<scope>\S+))?(?: \((?P<count>\d+) times?\))?", re.DOTALL
)
# Scopes of one line of code that are named.
SCOPES = 3
# Elements of an array up to which its values are shown: on a terminal, on a page.
SHORT, LONG = 6, 48


def inputs_of(f: Finding, long: bool = False) -> list[tuple[str, str, str]]:
    """(argument, type, values or "") for each array and setting of the input that shows a fault."""
    rows = []
    for name, value in zip(_names(f), f.args, strict=False):
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            where = name + jax.tree_util.keystr(path)
            rows.append((where, _kind(leaf), _values(leaf, LONG if long else SHORT)))
    rule, static = rule_of(f)
    names = _parameters(rule)
    for key, value in static.items():
        if isinstance(key, int):
            key = names[key] if key < len(names) else f"argument {key}"
        rows.append((str(key), "setting", _setting(value)))
    return rows


def rule_of(f: Finding) -> tuple[Any, dict[Any, Any]]:
    """The rule itself and its settings; for the rule that an op made, the op."""
    return f.source, dict(f.static)


def _names(f: Finding) -> list[str]:
    rule, static = rule_of(f)
    if isinstance(rule, Op) and static:
        names = list(rule.arrays)
    else:
        names = [n for i, n in enumerate(_parameters(rule)) if i not in static]
    return names[: len(f.args)] + [f"argument {i}" for i in range(len(names), len(f.args))]


def _parameters(rule: Any) -> list[str]:
    """Of one argument each."""
    try:
        signature = inspect.signature(getattr(rule, "fun", rule))
    except (TypeError, ValueError):
        return []
    ordinary = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in signature.parameters.items() if p.kind in ordinary]


def _kind(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{', '.join(map(str, np.shape(leaf)))}]"


def _values(leaf: Any, most: int) -> str:
    if not hasattr(leaf, "dtype"):
        return _setting(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ""
    v = np.asarray(leaf)
    if v.dtype.isbuiltin != 1:
        v = v.astype(np.float32)
    if v.size > 3 and np.all(v == v.flat[0]):
        return f"all {_nested(v.ravel()[0])}"
    return _nested(v) if 0 < v.size <= most else ""


def _nested(v: np.ndarray) -> str:
    if v.ndim:
        return f"[{', '.join(map(_nested, v))}]"
    return f"{v:.6g}" if v.dtype.kind in "fc" else str(v)


def _setting(value: Any) -> str:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return repr(value)


def places(where: Sequence[str], scopes: int = SCOPES) -> list[str]:
    """The call sites, those on one line of code together: that line, how often, in which scopes."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for site in where:
        match = SITE.fullmatch(site)
        assert match is not None
        count = int(match["count"] or 0)
        groups.setdefault(match["place"], []).append((match["scope"] or "", count))
    lines = []
    for place, found in groups.items():
        total = sum(n for _, n in found)
        named = list(dict.fromkeys(scope for scope, _ in found if scope))
        more = len(named) - scopes
        line = place + (f", {total} times" if total > 1 else "")
        if named:
            rest = f" and {more} more" if more > 0 else ""
            line += f", in {', '.join(named[:scopes])}{rest}"
        lines.append(line)
    return lines
