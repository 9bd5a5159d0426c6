"""Self-contained HTML pages: one file, no network, light and dark."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from funcbp.core import InputError

STYLE = """
.funcbp { --line: #8884; --soft: #8881; --bad: #c5221f; --good: #188038; --ink: #1a73e8;
  --warn: #b06000; font: 15px/1.5 system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  .funcbp { --bad: #f28b82; --good: #81c995; --ink: #8ab4f8; --warn: #fdd663 } }
.funcbp table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
.funcbp th, .funcbp td { padding: .3rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
.funcbp th { font-weight: 600 } .funcbp td { min-width: 4rem }
.funcbp .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.funcbp .bad { color: var(--bad); font-weight: 600 } .funcbp .good { color: var(--good) }
.funcbp pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }
.funcbp svg { max-width: 100% }
.funcbp code { font-size: .9em; font-weight: 400; opacity: .75 }
.funcbp summary { cursor: pointer; color: var(--ink) }
.funcbp .badge { display: inline-block; padding: 0 .6rem; margin: 0 .5rem .3rem 0;
  border: 1px solid; border-radius: 1rem; font-size: .9em }
.funcbp .wrong { color: var(--bad); border-color: var(--bad) }
.funcbp .unchecked { color: var(--warn); border-color: var(--warn) }
.funcbp .surrogate { color: var(--ink); border-color: var(--ink) }
.funcbp .right { color: var(--good); border-color: var(--good) }
.funcbp .card { border-left: 4px solid; background: var(--soft); padding: .6rem 1rem;
  margin: 1rem 0 }
.funcbp .card > * { color: CanvasText }
.funcbp .card h3 { margin: 0 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere }
.funcbp .card dl { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: .3rem .8rem;
  margin: 0 }
.funcbp .card dt { opacity: .7 } .funcbp .card dd { margin: 0; overflow-wrap: anywhere }
.funcbp .card table { margin: .3rem 0 }
.funcbp .card th { overflow-wrap: normal } .funcbp .card td { overflow-wrap: break-word }
.funcbp .card td:last-child { min-width: 8rem }
.funcbp .card td:not(:last-child) { white-space: nowrap }
"""
WHOLE = """
:root { color-scheme: light dark }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
"""


def page(title: str, *parts: str) -> str:
    """A whole page; the parts are HTML."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<style>{WHOLE}{STYLE}</style><title>{html.escape(title)}</title>"
    body = text(title, "h1") + "".join(parts)
    return (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f'<body class="funcbp">{body}</body></html>\n'
    )


def fragment(*parts: str) -> str:
    """The parts as a piece of another page, which keeps its own style: for notebooks."""
    return f'<div class="funcbp"><style>{STYLE}</style>{"".join(parts)}</div>'


def text(words: Any, tag: str = "p") -> str:
    """An element with escaped text."""
    return f"<{tag}>{html.escape(str(words))}</{tag}>"


def escaped(words: Any) -> str:
    """Text as HTML."""
    return html.escape(str(words))


def badge(words: str, kind: str) -> str:
    """A few words in a frame; kind is wrong, unchecked, surrogate or right."""
    return f'<span class="badge {kind}">{html.escape(words)}</span>'


def details(title: str, *parts: str) -> str:
    """Parts that stay folded until they are asked for."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def card(title: str, rows: Iterable[tuple[str, str]], kind: str) -> str:
    """A titled list of terms and what they are, both HTML but for the terms."""
    inside = "".join(f"{text(term, 'dt')}<dd>{value}</dd>" for term, value in rows)
    return f'<section class="card {kind}"><h3>{title}</h3><dl>{inside}</dl></section>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are set right, the verdicts "right" and "WRONG" in colour."""
    rows = [list(row) for row in rows]
    numeric = [_numeric(column) for column in zip(*rows, strict=True)] or [False] * len(columns)
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{kind}>{escaped(c)}</th>" for c, kind in zip(columns, kinds, strict=True))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _numeric(column: Sequence[Any]) -> bool:
    return any(v != "" for v in column) and all(
        isinstance(v, float | int) or v == "" for v in column
    )


def _cell(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    kind = {"right": "good", "wrong": "bad"}.get(str(value).lower(), "")
    return f'<td class="{kind}">{html.escape(str(value))}</td>'


def number(value: float | int) -> str:
    """Integers with separators, other numbers to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def line_plot(
    values: Sequence[float], label: str, of: str = "steps", width: int = 640, height: int = 180
) -> str:
    """A curve of values over their number, on a logarithmic scale, as inline SVG.

    Values that are not positive or not finite are left out.
    """
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
    if len(logs) < 2:
        return ""
    low, high = min(logs), max(logs)
    spread = (high - low) or 1.0
    points = " ".join(
        f"{40 + i * (width - 50) / (len(logs) - 1):.1f},"
        f"{10 + (high - v) * (height - 30) / spread:.1f}"
        for i, v in enumerate(logs)
    )
    marks = "".join(
        f'<text x="0" y="{y}" font-size="11" fill="currentColor">{10**v:.2g}</text>'
        for v, y in ((high, 14), (low, height - 20))
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(label)}">{marks}<polyline points="{points}" fill="none" '
        f'stroke="var(--ink)" stroke-width="1.5"/><text x="40" y="{height - 4}" font-size="11" '
        f'fill="currentColor">{html.escape(label)}, {len(logs)} {of}</text></svg>'
    )


def require_writable(path: Path | None) -> None:
    """Raises InputError at once, before any work, if a file cannot be written there."""
    if path is None:
        return
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; name a file in a folder that exists and may "
            "be written to"
        ) from None
