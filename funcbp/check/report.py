"""What the auditor says: on a terminal, as text, as JSON, as a page, as tests that reproduce it."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from funcbp import page
from funcbp.check.compare import WrongRule
from funcbp.check.finding import Finding
from funcbp.check.inputs import inputs_of, places
from funcbp.check.written import Origin, write

__all__ = ["Origin", "Report"]

# What the errors of a finding are called, and how a reader knows them.
KINDS = {"rule": "rule", "autodiff": "autodiff", "finite_differences": "finite differences"}
STYLES = {"wrong": "bold red", "unchecked": "yellow", "surrogate": "cyan", "right": "green"}
MEANING = {
    "wrong": "The rule's value or cotangents are not those of its function.",
    "unchecked": "What could not be judged, or not decided, and why.",
    "surrogate": "The gradient is meant to differ from the derivative.",
    "right": "As near to float64 as autodiff is, wherever it was tried.",
}
ERRORS = "largest error against float64, in units of the largest true element"
# Call sites that are named; the others are counted. The JSON and the page have all.
PLACES = 3


class Report:
    """The findings of one audit.

    Attributes:
      name: of the function audited.
      findings: one for each rule, the wrong ones first.
      seconds: that it took.
      origin: the call that it answers.
    """

    def __init__(
        self,
        name: str,
        findings: Sequence[Finding],
        seconds: float,
        origin: Origin | None = None,
    ):
        self.name, self.findings, self.seconds = name, tuple(findings), seconds
        self.origin = origin

    @property
    def ok(self) -> bool:
        """Whether no rule is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that say so."""
        return self.of("wrong")

    def of(self, verdict: str) -> tuple[Finding, ...]:
        """The findings with this verdict."""
        return tuple(f for f in self.findings if f.verdict == verdict)

    def counts(self) -> dict[str, int]:
        """How many rules have each verdict, of those that any has."""
        counts = {verdict: len(self.of(verdict)) for verdict in STYLES}
        return {verdict: n for verdict, n in counts.items() if n}

    def summary(self) -> str:
        """One line."""
        rules = "1 rule" if len(self.findings) == 1 else f"{len(self.findings)} rules"
        said = ", ".join(f"{n} {verdict}" for verdict, n in self.counts().items())
        return f"{self.name}: {rules}{f': {said}' if said else ''} ({self.seconds:.1f} s)"

    def __repr__(self) -> str:
        return f"<Report {self.summary()}>"

    def __str__(self) -> str:
        return _as_text(self)

    def __rich__(self) -> RenderableType:
        """The summary, then the wrong rules, what is not known, the surrogates and the right."""
        parts: list[RenderableType] = [self._headline()]
        parts += [_card(f) for f in self.wrong]
        for verdict in ("unchecked", "surrogate"):
            if self.of(verdict):
                parts += [_heading(verdict, len(self.of(verdict)))]
                parts += [_short(f) for f in self.of(verdict)]
        if self.of("right"):
            parts += [_heading("right", len(self.of("right"))), _compact(self.of("right"))]
        return Group(*parts)

    def _headline(self) -> Text:
        line = Text(self.summary())
        line.stylize("bold", 0, len(self.name))
        for verdict, n in self.counts().items():
            line.highlight_words([f"{n} {verdict}"], STYLES[verdict])
        return line

    def raise_if_wrong(self) -> None:
        """Raises WrongRule with the wrong findings, if there are any."""
        if self.wrong:
            raise WrongRule(self.summary() + "\n" + _as_text(Group(*map(_card, self.wrong))))

    def require_right(self, rule: str | None = None) -> None:
        """Raises WrongRule unless each rule was judged, and is right or a surrogate.

        A written test calls this: it fails too where the rule is no longer called, or can no
        longer be judged.

        Args:
          rule: the name of the one that counts; by default all do.
        """
        found = [f for f in self.findings if rule in (None, _named(f)[0])]
        if not found:
            seen = ", ".join(f.rule for f in self.findings) or "none"
            raise WrongRule(f"{self.name} must call the rule {rule or 'to judge'}, calls {seen}")
        bad = [f for f in found if f.verdict not in ("right", "surrogate")]
        if bad:
            raise WrongRule(self.summary() + "\n" + _as_text(Group(*map(_card, bad))))

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """The report as plain values: name, ok, seconds, seed, jax, counts and the findings.

        Args:
          path: a file to write it to as well. A number that is not finite is a string there, as
            in `"nan"`, which JSON has no number for.
        """
        plain = {
            "name": self.name,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "seed": self.origin.seed if self.origin is not None else None,
            "jax": jax.__version__,
            "counts": self.counts(),
            "findings": [_plain(f) for f in self.findings],
        }
        if path is not None:
            Path(path).write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
        return plain

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page; also written to `path`."""
        whole = page.page(f"Gradients of {self.name}", *self._sections())
        if path is not None:
            Path(path).write_text(whole, encoding="utf-8")
        return whole

    def _repr_html_(self) -> str:
        return page.fragment(page.text(f"Gradients of {self.name}", "h2"), *self._sections())

    def _sections(self) -> list[str]:
        counts = self.counts()
        number = len(self.findings)
        parts = [
            page.text(
                f"{number} {'rule' if number == 1 else 'rules'} in {self.seconds:.1f} s with JAX "
                f"{jax.__version__}"
            ),
            "".join(page.badge(f"{n} {verdict}", verdict) for verdict, n in counts.items()),
        ]
        for verdict in counts:
            found = self.of(verdict)
            parts += [page.text(f"{verdict.capitalize()}: {len(found)}", "h2")]
            parts += [page.text(MEANING[verdict], "p")]
            parts += map(_section, found) if verdict != "right" else [_right(found)]
        return parts

    def write_test(self, path: str | Path) -> tuple[str, ...]:
        """Writes a pytest file with one test for each wrong finding, on the input that shows it.

        Each is tried first, so it fails today; it passes once the rule is repaired. A rule that has
        a name in a module is imported, a local one is taken from a run of the audited function; one
        that can be had in neither way is left as a line to fill in, and its test fails until then.
        Arrays of more than 100 elements go to a `.npz` file beside it.

        Returns:
          The names of the tests. Nothing is written where nothing is wrong.
        """
        return write(Path(path), self.name, self.wrong, self.origin) if self.wrong else ()


def _as_text(what: RenderableType | Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False)
    console.print(what)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _title(f: Finding) -> Text:
    name, place = _named(f)
    line = Text(overflow="fold").append(name, "bold")
    return line.append(f"  {place}", "dim") if place else line


def _named(f: Finding) -> tuple[str, str]:
    """A rule's name, and where it is written."""
    name, _, place = f.rule.partition(" (")
    return name, place.removesuffix(")")


def _heading(verdict: str, count: int) -> Text:
    return Text(f"\n{verdict}: {count}", STYLES[verdict])


def _card(f: Finding) -> Group:
    """Everything needed to act."""
    head = Text("\n", overflow="fold").append(f"{f.verdict.upper()}  ", STYLES[f.verdict])
    head.append(_title(f))
    facts = _grid()
    facts.add_column(overflow="fold")
    for name, value in _facts(f):
        facts.add_row(Text(name, "dim"), value)
    return Group(head, facts)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.pad_edge = True
    table.add_column(width=8)
    return table


def _facts(f: Finding) -> list[tuple[str, RenderableType]]:
    facts: list[tuple[str, RenderableType]] = []
    if f.cause:
        cause = Text(f.cause, "bold")
        facts.append(("cause", cause.append(f" of {f.argument}" if f.argument else "")))
    facts.append(("found", Text(f.message)))
    facts += [("called" if i == 0 else "", Text(w)) for i, w in enumerate(_places(f.where))]
    inputs = inputs_of(f)
    if f.input or inputs:
        facts.append(("input", Text(f.input or "as follows")))
        rows = Table.grid(padding=(0, 2))
        rows.add_column(overflow="fold")
        rows.add_column(overflow="fold")
        for name, kind, value in inputs:
            shown = f"{value} ({kind})" if kind == "setting" else f"{kind} = {value}"
            rows.add_row(Text(name), Text(shown if value else kind))
        facts += [("", rows)] if inputs else []
    if f.errors:
        facts += [("errors", Text(ERRORS, "dim")), ("", _errors(f))]
    facts += [("note" if i == 0 else "", Text(n, "dim")) for i, n in enumerate(f.notes)]
    return facts


def _places(where: Sequence[str], most: int = PLACES) -> list[str]:
    lines = places(where)
    more = len(lines) - most
    rest = [f"and at {more} other {'line' if more == 1 else 'lines'}"] if more > 0 else []
    return [*lines[:most], *rest]


def _errors(f: Finding) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("argument", overflow="fold")
    for title in KINDS.values():
        table.add_column(title, justify="right", overflow="fold")
    for name, errors in f.errors.items():
        row = [page.number(errors[k]) if k in errors else "" for k in KINDS]
        bad = f.verdict == "wrong" and name == f.argument
        table.add_row(Text(name), Text(row[0], "red" if bad else ""), *map(Text, row[1:]))
    return table


def _short(f: Finding) -> RenderableType:
    """A rule and why it is neither right nor wrong."""
    lines = [_title(f), Text(f.message), *(Text(w, "dim") for w in _places(f.where, 1))]
    return Padding(Group(*lines), (0, 0, 0, 2))


def _compact(findings: Sequence[Finding]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("error", overflow="fold", justify="right")
    table.add_column("of autodiff", overflow="fold", justify="right")
    table.add_column("tried at", overflow="fold")
    for f in findings:
        worst = [_largest(f, kind) for kind in ("rule", "autodiff")]
        worst = [Text("" if v == "" else page.number(v)) for v in worst]
        table.add_row(_title(f), *worst, Text(_tried(f), "dim"))
    return Padding(table, (0, 0, 0, 2))


def _tried(f: Finding) -> str:
    """At how many points, and how many things were not tried; the page has all the notes."""
    notes = f"; {len(f.notes)} note{'s' if len(f.notes) > 1 else ''}" if f.notes else ""
    return f.message.removeprefix("right at ") + notes


def _largest(f: Finding, kind: str) -> Any:
    """The largest error of one kind, or "" if there is none."""
    return max((float(e[kind]) for e in f.errors.values() if kind in e), default="")


def _section(f: Finding) -> str:
    """A finding on the page."""
    name, place = _named(f)
    rows: list[tuple[str, str]] = []
    if f.cause:
        of = page.escaped(f"of {f.argument}" if f.argument else "")
        rows.append(("cause", page.badge(f.cause, f.verdict) + of))
    rows.append(("found", page.escaped(f.message)))
    called = [page.escaped(w) for w in _places(f.where)]
    if called:
        sites = page.details("each call site", *(page.text(w, "div") for w in f.where))
        rows.append(("called at", "<br>".join(called) + (sites if len(f.where) > 1 else "")))
    shown = inputs_of(f, long=True)
    if f.input or shown:
        table = page.table(("argument", "type", "values"), shown) if shown else ""
        rows.append(("input", page.escaped(f.input) + table))
    if f.errors:
        table = page.table(("argument", *KINDS.values()), _rows(f))
        rows.append(("errors", page.escaped(ERRORS) + table))
    rows += [("note", page.escaped(n)) for n in f.notes]
    title = f"{page.text(name, 'strong')} {page.text(place, 'code')}"
    return page.card(title, rows, f.verdict)


def _rows(f: Finding) -> list[list[Any]]:
    return [[n, *(e.get(k, "") for k in KINDS)] for n, e in f.errors.items()]


def _right(findings: Sequence[Finding]) -> str:
    columns = ("rule", "written at", "error", "of autodiff", "tried at", "called at")
    rows = []
    for f in findings:
        worst = [_largest(f, kind) for kind in ("rule", "autodiff")]
        tried = "; ".join([f.message.removeprefix("right at "), *f.notes])
        rows.append((*_named(f), *worst, tried, "; ".join(_places(f.where))))
    return page.details("show them", page.table(columns, rows))


def _plain(f: Finding) -> dict[str, Any]:
    rule, place = _named(f)
    return {
        "rule": rule,
        "written_at": place,
        "where": list(f.where),
        "verdict": f.verdict,
        "cause": f.cause,
        "argument": f.argument,
        "message": f.message,
        "errors": {n: {k: _finite(v) for k, v in e.items()} for n, e in f.errors.items()},
        "input": f.input,
        "args": [" ".join(row[:2]) for row in inputs_of(f)],
        "notes": list(f.notes),
    }


def _finite(v: float) -> float | str:
    return float(v) if math.isfinite(v) else str(float(v))
