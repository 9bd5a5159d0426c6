"""The table of ops, made from their declarations: `python -m funcbp.catalogue`."""

import inspect
import re
import sys
from pathlib import Path

from funcbp import ops
from funcbp.core import Op

START, END = "<!-- ops -->", "<!-- end of ops -->"


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
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def _counterpart(op: Op) -> str:
    if op.like is None:
        return ""
    module = inspect.unwrap(op.like).__module__
    package = {"jax._src.nn": "jax.nn", "jax._src.numpy": "jax.numpy"}
    public = next((v for k, v in package.items() if module.startswith(k)), module.split(".")[0])
    return f"`{public}.{op.like.__name__}`"


def _saves(op: Op) -> str:
    """The `Saves:` paragraph of the docstring of the op's file."""
    text = sys.modules[op.__module__].__doc__ or ""
    found = re.search(r"^Saves:(.*?)(?=^\w+:|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()).rstrip(".") if found else ""


def renewed(readme: str) -> str:
    """The README with its table of ops made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(renewed(path.read_text()))
