"""A pytest file with one test for each wrong rule, on the smallest input that shows it.

A rule with a name in a module is imported. One that has none, a local or a factory's, is taken from
a run of the function that was audited. Each test is tried before it is written: it fails today.
"""

import os
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.finding import Finding
from funcbp.check.inputs import rule_of
from funcbp.check.named import name_of, seen_in
from funcbp.check.source import Source, Unwritable, quoted
from funcbp.check.watch import plain_name
from funcbp.core import Op

__all__ = ["Origin", "write"]


class Origin(NamedTuple):
    """The call that a report answers: enough to make it again.

    Attributes:
      verb: "audit" or "check_rule".
      f: what was audited.
      args: its arguments.
      kwargs: its keyword arguments.
      reference: what the rule was compared with, if that was given.
      seed: of everything random.
      arguments: a function that makes the arguments, as the command has; None otherwise.
    """

    verb: str
    f: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    reference: Callable | None = None
    seed: int = 0
    arguments: Any = None


def write(
    path: Path, title: str, findings: Sequence[Finding], origin: Origin | None
) -> tuple[str, ...]:
    """Writes the file, and the long arrays beside it as `.npz`; returns the names of the tests."""
    source = Source(path)
    tests: dict[str, list[str]] = {}
    for f in findings:
        safe = "".join(c if c.isalnum() else "_" for c in f.rule.split(" (")[0]).strip("_")
        name, k = f"test_{safe}", 1
        while name in tests:
            name, k = f"test_{safe}_{k}", k + 1
        source.begin(name.removeprefix("test_"))
        tests[name] = _Test(f, origin, source).lines()
    body = "".join(
        f"\n\ndef {name}():\n{textwrap.indent(chr(10).join(lines), '    ')}\n"
        for name, lines in tests.items()
    )
    path.write_text(_head(title, path, source, body) + body, encoding="utf-8")
    if source.arrays:
        np.savez(path.with_suffix(".npz"), **source.arrays)  # type: ignore[arg-type]
    return tuple(tests)


def _head(title: str, path: Path, source: Source, body: str) -> str:
    summary = f"Wrong gradients that an audit of {title} found, each on the input that shows it."
    lines = [*textwrap.wrap(f'"""{summary}"""', 100), ""]
    here = "HERE" in body or source.arrays or source.folders
    standard = [f"import {n}" for n in ("pathlib", "sys")[: 2 if source.folders else 1] if here]
    lines += [*standard, ""] if standard else []
    code = "\n".join(line for line in body.split("\n") if not re.match(r" *(from|import) ", line))
    for module, name in (("jax", "jax"), ("jax.numpy as jnp", "jnp"), ("numpy as np", "np")):
        if re.search(rf"\b{name}\.", code) or (name == "np" and source.arrays):
            lines.append(f"import {module}")
    lines += ["", "import funcbp"]
    used = [n for n in ("named", "rule_in") if f"{n}(" in body]
    lines += [f"from funcbp.check.named import {', '.join(used)}"] if used else []
    lines += ["", "HERE = pathlib.Path(__file__).parent"] if here else []
    for folder in sorted(source.folders):
        inside = os.path.relpath(folder, path.parent)
        lines.append(f"sys.path.insert(0, str(HERE / {quoted(inside)}))")
    if source.arrays:
        lines.append(f'ARRAYS = np.load(HERE / "{path.with_suffix(".npz").name}")')
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)) + "\n"


class _Test:
    """One test function."""

    def __init__(self, finding: Finding, origin: Origin | None, source: Source):
        self.finding, self.origin, self.source = finding, origin, source
        self.name = finding.rule.split(" (")[0]
        self.rule, self.static = rule_of(finding)
        if isinstance(self.rule, Op) and self.static:
            self.rule_made, self.settings = self.rule.rule(**self.static), {}
        else:
            self.rule_made, self.settings = self.rule, self.static

    def lines(self) -> list[str]:
        """The body."""
        leaves = jax.tree.leaves((self.finding.args, list(self.static.values())))
        types = [leaf.dtype for leaf in [*leaves, jnp.zeros(())] if hasattr(leaf, "dtype")]
        wide = any(dtype in _WIDE for dtype in types)
        body = self._body()
        if wide:
            inside = textwrap.indent("\n".join(body), "    ")
            body = ["with jax.enable_x64(True):", inside]
        return [*self._docstring(), *body]

    def _docstring(self) -> list[str]:
        f = self.finding
        what = f"{f.cause} of {f.argument}" if f.argument else str(f.cause)
        title = f"{what}, with {f.input}." if f.input else f"{what}."
        message = f.message.replace("\\", "\\\\").replace('"""', "'''")
        return [f'"""{title}', "", *textwrap.wrap(message, 92), '"""']

    def _body(self) -> list[str]:
        for attempt in (self._alone, self._from_a_run, self._whole):
            before = dict(self.source.imports), dict(self.source.arrays), set(self.source.folders)
            try:
                return attempt()
            except (Unwritable, NotShown) as reason:
                self.reason = str(reason)
                self.source.imports, self.source.arrays, self.source.folders = before
        return self._to_fill_in()

    def _alone(self) -> list[str]:
        """The rule by name."""
        rule = self._named(self.rule)
        if isinstance(self.rule, Op) and self.static:
            settings = [f"{n}={self.source.write(v)}" for n, v in self.static.items()]
            rule = f"{rule}.rule({', '.join(settings)})"
        args = self._arguments()
        reference = self._reference()
        shown = shows(self.rule_made, self._full(), self._compared())
        return [
            *self.source.lines(),
            "",
            *args,
            f"report = funcbp.check_rule({rule}, *args{reference}, thorough={shown})",
            "report.require_right()",
        ]

    def _from_a_run(self) -> list[str]:
        """The rule as the audited function calls it."""
        if self.origin is None or self.origin.verb != "audit":
            raise Unwritable("the rule has no name in a module")
        call = self._call()
        args = self._arguments(run=True)
        number, thorough = self._shown_in_a_run()
        counted = f", number={number}" if number else ""
        static = "static" if any("static[" in line for line in args) else "_"
        return [
            *self.source.lines(),
            "",
            *call,
            f"rule, {static} = rule_in({self._called}, name={quoted(self.name)}{counted})",
            *args,
            f"report = funcbp.check_rule(rule, *args, thorough={thorough})",
            "report.require_right()",
        ]

    def _whole(self) -> list[str]:
        """The audit itself, once more."""
        if self.origin is None:
            raise Unwritable("the rule has no name in a module")
        call = self._call()
        if self.origin.verb == "audit":
            again = f"funcbp.audit({self._called}, seed={self.origin.seed})"
        else:
            reference = self._reference()
            again = f"funcbp.check_rule({self._called}{reference}, seed={self.origin.seed})"
        return [
            *self.source.lines(),
            "",
            *call,
            f"report = {again}",
            f"report.require_right({quoted(self.name)})",
        ]

    def _to_fill_in(self) -> list[str]:
        """What cannot be made is asked for; until then the test fails and says so."""
        self.source.begin(self.source.prefix)
        try:
            args = self._arguments()
        except Unwritable as reason:
            args = [f"args = ()  # {reason}: build them here"]
        why = f"{self.finding.rule} must be built here: {self.reason}."
        return [
            *self.source.lines(),
            *textwrap.wrap(why, 92, initial_indent="# ", subsequent_indent="# "),
            "rule = None",
            'assert rule is not None, "build the rule that this test is about"',
            *args,
            "report = funcbp.check_rule(rule, *args)",
            "report.require_right()",
        ]

    def _named(self, found: Any) -> str:
        name = name_of(found) if found is not None else None
        if name is None:
            raise Unwritable(f"{self.name} has no name in a module")
        return self.source.have(name)

    def _full(self) -> tuple:
        """The arguments with the static ones in their places."""
        rest = iter(self.finding.args)
        count = len(self.finding.args) + len(self.settings)
        return tuple(self.settings[i] if i in self.settings else next(rest) for i in range(count))

    def _arguments(self, run: bool = False) -> list[str]:
        parts = []
        for i, value in enumerate(self._full()):
            try:
                parts.append(self.source.write(value, 4))
            except Unwritable:
                if not run or i not in self.settings:
                    raise
                parts.append(f"static[{i}]")
        return ["args = (", *(f"    {p}," for p in parts), ")"]

    def _call(self) -> list[str]:
        """The lines that make the audited call's arguments; `_called` has the call itself."""
        origin = self.origin
        assert origin is not None
        self._called = self._named(origin.f)
        if origin.arguments is not None:
            made = self._named(origin.arguments) + ("()" if callable(origin.arguments) else "")
            self._called += f", {'**' if origin.kwargs else '*'}{made}"
            return []
        lines = [f"given = {self.source.write(tuple(origin.args))}"]
        self._called += ", *given"
        if origin.kwargs:
            lines.append(f"keywords = {self.source.write(dict(origin.kwargs))}")
            self._called += ", **keywords"
        return lines

    def _compared(self) -> Callable | None:
        return self.origin.reference if self.origin is not None else None

    def _reference(self) -> str:
        reference = self._compared()
        return f", reference={self._named(reference)}" if reference is not None else ""

    def _shown_in_a_run(self) -> tuple[int, bool]:
        """Which of the rules of this name in a run is wrong, and whether thoroughness shows it."""
        assert self.origin is not None
        seen = seen_in(self.origin.f, self.origin.args, self.origin.kwargs)
        for number, s in enumerate(s for s in seen if plain_name(s.rule) == self.name):
            rest = iter(self.finding.args)
            count = len(self.finding.args) + len(s.static)
            args = [s.static[i] if i in s.static else next(rest) for i in range(count)]
            try:
                return number, shows(s.rule, tuple(args), None)
            except NotShown:
                continue
        raise NotShown("no rule of this name fails on these arguments alone")


class NotShown(Exception):
    """The fault does not show in this way."""


_WIDE = (np.dtype("float64"), np.dtype("complex128"), np.dtype("int64"), np.dtype("uint64"))


def shows(rule: Any, args: tuple, reference: Callable | None) -> bool:
    """Whether it takes a thorough check to find the rule wrong from these arguments."""
    from funcbp.check.audit import check_rule

    for thorough in (False, True):
        try:
            report = check_rule(rule, *args, reference=reference, thorough=thorough)
        except Exception as error:
            raise NotShown(f"checking it alone raises {type(error).__name__}") from error
        if report.wrong:
            return thorough
    raise NotShown("the fault does not show on these arguments alone")
