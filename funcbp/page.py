"""Self-contained HTML pages: one file, no network, light and dark."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from funcbp.core import InputError

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c5221f; --good: #188038; --ink: #1a73e8 }
@media (prefers-color-scheme: dark) { :root { --bad: #f28b82; --good: #81c995; --ink: #8ab4f8 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.bad { color: var(--bad); font-weight: 600 } .good { color: var(--good) }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) } svg { max-width: 100% }
"""


def page(title: str, *parts: str) -> str:
    """A whole page; the parts are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{_style()}'
    body = f"<h1>{html.escape(title)}</h1>" + "".join(parts)
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title></head>'
        f"<body>{body}</body></html>\n"
    )


def _style() -> str:
    return f"<style>{STYLE}</style>"


def text(words: Any, tag: str = "p") -> str:
    """An element with escaped text."""
    return f"<{tag}>{html.escape(str(words))}</{tag}>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are set right, the verdicts "right" and "WRONG" in colour."""
    head = "".join(text(c, "th") for c in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    kind = {"right": "good", "wrong": "bad"}.get(str(value).lower(), "")
    return f'<td class="{kind}">{html.escape(str(value))}</td>'


def number(value: float | int) -> str:
    """Integers with separators, other numbers to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def line_plot(values: Sequence[float], label: str, width: int = 640, height: int = 180) -> str:
    """A curve of positive values over their number, on a logarithmic scale, as inline SVG."""
    logs = [math.log10(max(v, 1e-12)) for v in values if math.isfinite(v)]
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
        f'fill="currentColor">{html.escape(label)}, {len(logs)} steps</text></svg>'
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
