"""Imports flow one way: core <- ops <- layers <- models <- train <- parallel."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "funcbp"
# What each part may import; `check`, `trace` and `bench` look from the side.
BASE = {"core", "case"}
ALLOWED = {
    "case": set(),
    "mesh": set(),
    "closed": {"mesh"},
    "jaxprs": set(),
    "core": {"case", "closed", "mesh"},
    "ops": BASE | {"closed", "jaxprs", "mesh"},
    "layers": BASE | {"ops"},
    "models": BASE | {"ops", "layers"},
    "data": BASE,
    "train": BASE | {"ops", "layers", "models", "data"},
    "parallel": BASE | {"ops", "layers", "models", "train"},
    "page": BASE,
    "check": BASE | {"ops", "page", "jaxprs"},
    "trace": BASE | {"ops", "layers", "page", "jaxprs"},
    "bench": BASE | {"ops", "page", "check", "jaxprs"},
}
# The commands stand on top of everything.
TOP = {"__init__", "catalogue", "cli", "demo"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "funcbp":
                names = [f"funcbp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("funcbp."))


def test_imports_flow_one_way():
    wrong, seen = [], set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        seen.add(part)
        if part in TOP:
            continue
        wrong += [
            f"{path.name} imports {n}" for n in imported(path) if n not in ALLOWED[part] | {part}
        ]
    assert not wrong
    assert {"core", "ops", "layers", "train", "check"} <= seen
