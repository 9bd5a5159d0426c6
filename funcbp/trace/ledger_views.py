"""The ledger for a reader: on a terminal, as a page, as a picture, as plain values."""

import importlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from funcbp import page
from funcbp.core import InputError
from funcbp.trace.origin import human
from funcbp.trace.pass_views import axes

if TYPE_CHECKING:
    from funcbp.trace.ledger import Ledger, Row

# Rows, and groups of the rest, that a page shows; bars of a picture.
ROWS, GROUPS, BARS = 200, 100, 40
COLUMNS = ("bytes", "shape", "layer", "kept by", "made by", "at", "shared with")


def totals(named: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sums by name, the largest first."""
    sums: dict[str, int] = {}
    for name, size in named:
        sums[name] = sums.get(name, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def table(ledger: "Ledger", limit: int) -> Table:
    """The largest rows that are not arguments, then the rest in one line."""
    if limit < 0:
        raise InputError(f"limit must be a whole number from 0 up, got {limit}")
    kept = _kept(ledger)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # A terminal is narrow: the end of a long path will do.
    rows = [_cells(row._replace(layer=_end(row.layer))) for row in kept[:limit]]
    columns = _columns(rows)
    for name in (COLUMNS[i] for i in columns):
        shown.add_column(name, justify="right" if name == "bytes" else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row[i]) for i in columns))
    if rest := kept[limit:]:
        size = human(sum(row.bytes for row in rest))
        shown.add_row("...", f"{len(rest):,} more rows, {size}")
    return shown


def terminal(ledger: "Ledger") -> RenderableType:
    """The headline, the rows, the totals."""
    return Group(*map(escape, _headline(ledger)), table(ledger, 20), *map(escape, _sums(ledger)))


def text(ledger: "Ledger") -> str:
    """The same without colours, wide enough that no cell is folded."""
    file = io.StringIO()
    console = Console(file=file, width=1000, color_system=None, force_terminal=False)
    console.print(terminal(ledger))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def plain(ledger: "Ledger", path: str | Path | None) -> dict[str, Any]:
    """Plain values; also written to `path`."""
    whole = {
        "name": ledger.name,
        "jax": jax.__version__,
        "bytes": ledger.bytes,
        "argument_bytes": ledger.argument_bytes,
        "comparison": ledger.comparison._asdict(),
        "by_layer": ledger.by_layer(),
        "by_rule": ledger.by_rule(),
        "by_source": ledger.by_source(),
        "rows": [
            row._asdict() | {"shape": list(row.shape), "shared": list(row.shared)}
            for row in ledger.rows
        ],
    }
    if path is not None:
        Path(path).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def frame(ledger: "Ledger") -> Any:
    """A pandas.DataFrame of the rows."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise InputError("to_pandas needs pandas; install it, as in pip install pandas") from None
    return pandas.DataFrame([row._asdict() for row in ledger.rows])


def html(ledger: "Ledger", path: str | Path | None) -> str:
    """A whole page; also written to `path`."""
    whole = page.page(_title(ledger), *_sections(ledger))
    if path is not None:
        Path(path).write_text(whole, encoding="utf-8")
    return whole


def fragment(ledger: "Ledger") -> str:
    """A piece of a notebook's page."""
    return page.fragment(page.text(_title(ledger), "h2"), *_sections(ledger))


def plot(ledger: "Ledger", ax: Any) -> Any:
    """A bar a layer, stacked."""
    bars, rest = _bars(ledger)
    ax = axes(ax, (8, 1.5 + 0.25 * len(bars)))
    names = [name for name, *_ in bars]
    hand = [size for _, size, _ in bars]
    ax.barh(names, hand, label="hand rules")
    ax.barh(names, [size for *_, size in bars], left=hand, label="autodiff")
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(lambda size, _: human(size))
    ax.set_xlabel("kept for the backward pass" + (f"\n{rest}, not drawn" if rest else ""))
    ax.set_title(_title(ledger))
    ax.legend()
    return ax


def _title(ledger: "Ledger") -> str:
    return f"What {ledger.name} keeps"


def _kept(ledger: "Ledger") -> list["Row"]:
    return [row for row in ledger.rows if not row.is_argument]


def _headline(ledger: "Ledger") -> list[str]:
    free = f"; and {human(ledger.argument_bytes)} of arguments, which are free"
    arrays = f"{len(_kept(ledger)):,} arrays, {human(ledger.bytes)}"
    return [f"{ledger.name} keeps {arrays}{free if ledger.argument_bytes else ''}"]


def _sums(ledger: "Ledger") -> list[str]:
    ways = ", ".join(f"{name} {human(size)}" for name, size in _ways(ledger))
    rules = list(ledger.by_rule().items())
    shown = ", ".join(f"{name} {human(size)}" for name, size in rules[:8])
    more = f", {len(rules) - 8} more" if len(rules) > 8 else ""
    return [f"by rule: {shown}{more}", f"in comparison: {ways}"]


def _ways(ledger: "Ledger") -> list[tuple[str, int]]:
    names = ("hand rules", "under autodiff()", "under jax.checkpoint", "compiled, temporary")
    return [(n, v) for n, v in zip(names, ledger.comparison, strict=True) if v is not None]


def _cells(row: "Row") -> list[str]:
    kind = f"{row.dtype}[{','.join(map(str, row.shape))}]"
    keeper = row.rule or "autodiff"
    shared = ", ".join(row.shared)
    return [human(row.bytes), kind, row.layer, keeper, row.operation, row.source, shared]


def _columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """The numbers of the columns that are shown: the last only where it says something."""
    last = len(COLUMNS) - 1
    return [i for i in range(len(COLUMNS)) if i < last or any(row[i] for row in rows)]


def _end(layer: str) -> str:
    names = layer.split("/")
    return layer if len(names) < 3 else ".../" + "/".join(names[-2:])


def _bars(ledger: "Ledger") -> tuple[list[tuple[str, int, int]], str]:
    """The largest layers with the bytes of hand rules and of autodiff, and the others in words."""
    hand = totals((row.layer, row.bytes) for row in _kept(ledger) if row.rule)
    whole = ledger.by_layer()
    bars = [(n or "(no scope)", hand.get(n, 0), size - hand.get(n, 0)) for n, size in whole.items()]
    rest = list(whole.values())[BARS:]
    words = f"{len(rest):,} more layers keep {human(sum(rest))}" if rest else ""
    return bars[:BARS], words


def _sections(ledger: "Ledger") -> list[str]:
    kept, arguments = _kept(ledger), [row for row in ledger.rows if row.is_argument]
    parts = [page.text(line) for line in _headline(ledger)]
    parts += [page.text("In comparison", "h2"), _chart((n, v, 0) for n, v in _ways(ledger))]
    bars, rest = _bars(ledger)
    parts += [page.text("By layer", "h2"), page.text("Hand rules blue, autodiff amber.")]
    parts += [_chart(bars), page.text(rest)]
    for title, sums in (("By rule", ledger.by_rule()), ("By source line", ledger.by_source())):
        parts += [page.text(title, "h2"), _summed(title.split(" ", 1)[1], sums)]
    parts += [page.text("Arrays", "h2"), _listed(kept)]
    if arguments:
        parts += [page.text("Arguments", "h2"), page.details("show them", _listed(arguments))]
    return parts


def _summed(what: str, sums: dict[str, int]) -> str:
    """Names and bytes; those beyond the largest in one."""
    rows = [(name or "(none)", human(size)) for name, size in sums.items()]
    if rest := list(sums.values())[GROUPS:]:
        rows[GROUPS:] = [(f"{len(rest):,} more", human(sum(rest)))]
    return page.table((what, "bytes"), rows)


def _listed(rows: Sequence["Row"]) -> str:
    """The largest rows, and the others by layer, in which numbers count as equal."""
    listed = [_cells(row) for row in rows[:ROWS]]
    columns = _columns(listed)
    names = [COLUMNS[i] for i in columns]
    shown = page.table(names, ([cells[i] for i in columns] for cells in listed))
    rest = rows[ROWS:]
    if not rest:
        return shown
    size = human(sum(row.bytes for row in rest))
    groups = totals((re.sub(r"\d+", "*", row.layer), row.bytes) for row in rest)
    head = page.text(f"{len(rest):,} more, {size}, by layer:")
    return shown + head + _summed("layer", groups)


def _chart(bars: Iterable[tuple[str, int, int]]) -> str:
    """Horizontal bars of two colours, each with its name and bytes."""
    bars = list(bars)
    largest = max((hand + auto for _, hand, auto in bars), default=0) or 1
    lines = []
    for name, hand, auto in bars:
        parts = "".join(
            f'<span style="display:inline-block;height:.8em;width:{30 * size / largest:.3f}rem;'
            f'background:var({colour})"></span>'
            for size, colour in ((hand, "--ink"), (auto, "--warn"))
        )
        cells = (
            f'<td class="number">{human(hand + auto)}</td><td style="white-space:nowrap">{parts}'
        )
        lines.append(f"<tr><td>{page.escaped(name)}</td>{cells}</td></tr>")
    return f"<table><tbody>{''.join(lines)}</tbody></table>"
