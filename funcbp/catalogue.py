"""The README's tables: of the ops, from their declarations; of the bench, from its results.

python -m funcbp.catalogue [README.md]
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import optax

from funcbp import bench, ops
from funcbp.core import Op

# Where public counterparts are found, by the name under which users know them.
PUBLIC = (jax.nn, jax.lax, jax.numpy.linalg, jax.numpy, jax.scipy.special, jax.ops, optax.losses)


def declared() -> dict[str, Op]:
    """The ops that the library exports, by name."""
    return {name: op for name, op in sorted(vars(ops).items()) if isinstance(op, Op)}


def table() -> str:
    """A Markdown table: each op with its arguments, its counterpart and what its rule saves."""
    lines = ["| op | as | the rule saves |", "|---|---|---|"]
    for name, op in declared().items():
        arguments = ", ".join(map(_argument, op.__signature__.parameters.values()))
        lines.append(f"| `{name}({arguments})` | {_counterpart(op)} | {_saves(op)} |")
    return "\n".join(lines)


def _argument(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={value.__name__ if callable(value) else repr(value)}"


def _counterpart(op: Op) -> str:
    if op.like is None:
        return ""
    name = op.like.__name__
    public = next((m for m in PUBLIC if getattr(m, name, None) is op.like), None)
    return f"`{public.__name__ if public else op.like.__module__}.{name}`"


def _saves(op: Op) -> str:
    """The `Saves:` paragraph of the docstring of the op's file."""
    text = sys.modules[op.__module__].__doc__ or ""
    found = re.search(r"^Saves:(.*?)(?=^\w+:|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()).rstrip(".") if found else ""


def measured(results: dict[str, Any]) -> str:
    """A Markdown table of a run of the bench, as `funcbp bench --json` writes it."""
    names = ("time", "saved", "temporary", "error")
    found = {(r["title"], r["dtype"], r["against"]): r for r in results["rows"]}
    found |= {(f"*mean, {m['kind']}*", m["dtype"], m["against"]): m for m in results["means"]}

    def cell(op, against, name):
        pair = (found.get((op, dtype, against)) for dtype in ("float32", "bfloat16"))
        return " / ".join("" if r is None else _ratio(r[name]) for r in pair).strip(" /")

    lines = [
        "| op | time | time, public counterpart | saved | scratch | error |",
        "|---|---|---|---|---|---|",
    ]
    for op in dict.fromkeys(op for op, *_ in found):
        time, *rest = (cell(op, "autodiff", name) for name in names)
        lines.append("| " + " | ".join((op, time, cell(op, "jax", "time"), *rest)) + " |")
    m = results["machine"]
    head = (
        f"{m['date']}, {m['device']}, {m['cores']} cores, JAX {m['jax']}; float32 / bfloat16; "
        "against autodiff of the plain formula, and of the function named in the list of ops."
    )
    return f"{head}\n\n" + "\n".join(lines)


def _ratio(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float | int) else str(value or "")


def renewed(readme: str) -> str:
    """The README with its tables made anew."""
    newest = Path(bench.__file__).parent / "results" / "cpu.json"
    for name, made in (("ops", table()), ("bench", measured(json.loads(newest.read_text())))):
        before, rest = readme.split(f"<!-- {name} -->")
        _, after = rest.split(f"<!-- end of {name} -->")
        readme = f"{before}<!-- {name} -->\n{made}\n<!-- end of {name} -->{after}"
    return readme


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(renewed(path.read_text()))
