"""The README's tables of the ops and of the last bench: `python -m funcbp.catalogue`."""

import inspect
import json
import re
import sys
from pathlib import Path

from funcbp import ops
from funcbp.core import Op

RESULTS = Path(__file__).parent / "bench" / "results"
RATIOS, AGAINST = ("time", "saved", "temporary", "error"), ("autodiff", "jax")


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


def bench(file: Path) -> str:
    """A Markdown table of a run of the bench: each op in float32, then the means."""
    run = json.loads(file.read_text())
    machine = run["machine"]
    head = " | ".join(("time", "saved", "scratch", "error"))
    lines = [
        f"{machine['device']}, {machine['cores']} cores, JAX {machine['jax']}, {machine['date']}; "
        "float32, against autodiff of the plain formula (left) and JAX's own (right).",
        "",
        f"| op | {head} | {head} |",
        "|---|" + "---|" * 8,
    ]
    rows = {(r["op"], r["dtype"], r["against"]): r for r in run["rows"]}
    for name in dict.fromkeys(r["op"] for r in run["rows"]):
        lines.append(_line(f"`{name}`", [rows.get((name, "float32", a), {}) for a in AGAINST]))
    means = {(m["dtype"], m["against"]): m for m in run["means"]}
    for dtype in dict.fromkeys(m["dtype"] for m in run["means"]):
        found = [means.get((dtype, a), {}) for a in AGAINST]
        lines.append(_line(f"geometric mean, {dtype}", found))
    return "\n".join(lines)


def _line(name: str, found: list[dict]) -> str:
    return f"| {name} | {' | '.join(_ratio(row.get(what)) for row in found for what in RATIOS)} |"


def _ratio(value: float | str | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.2f}"


def renewed(readme: str) -> str:
    """The README with its tables made anew."""
    made = {"ops": table()}
    runs = list(RESULTS.glob("cpu-*.json"))
    if runs:
        made["bench"] = bench(max(runs))  # by the date in its name
    for name, text in made.items():
        before, _, rest = readme.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- end of {name} -->")[2]
        readme = f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{after}"
    return readme


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(renewed(path.read_text()))
