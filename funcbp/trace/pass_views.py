"""A pass for a reader: on a terminal, as a page, as a picture, as plain values."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from funcbp import page
from funcbp.core import InputError
from funcbp.trace.faults import leaves
from funcbp.trace.origin import human

if TYPE_CHECKING:
    from funcbp.trace.passes import Pass
    from funcbp.trace.rows import Parameter, Row

FORWARD = ("layer", "mean", "rms", "low", "high", "off", "saved, bytes", "flops")
BACKWARD = ("layer", "cotangent arriving", "leaving", "gain", "gradient / parameter")
PARAMETERS = ("parameter", "numbers", "rms", "rms of the gradient", "ratio")
# What fits on 100 columns.
NARROW = ("layer", "mean", "rms", "off", "saved", "flops", "arriving", "gain",
          "gradient\n/ parameter")  # fmt: skip
# Rows at either end, on a terminal and on a page; those between are left out of the table.
TERMINAL, PAGE = 30, 150
# Faults that are said; the others are counted.
SAID = 20
# Lines of the picture of a training run.
LINES = 12


def table(seen: "Pass", limit: int = TERMINAL) -> Table:
    """A line a layer, for a terminal; a page has more columns.

    Args:
      limit: how many rows at either end are shown.
    """
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(NARROW[0], overflow="fold")
    for column in NARROW[1:]:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in _ends(seen.rows, limit):
        if row is None:
            shown.add_row("...", f"{len(seen.rows) - 2 * limit:,} more")
        else:
            shown.add_row(*map(Text, _line(row)))
    return shown


def terminal(seen: "Pass") -> RenderableType:
    """The headline, the rows, the faults."""
    return Group(_headline(seen), table(seen), *map(Text, _conclusions(seen)))


def text(seen: "Pass") -> str:
    """The same without colours, wide enough that no cell is folded."""
    file = io.StringIO()
    Console(file=file, width=1000, color_system=None, force_terminal=False).print(terminal(seen))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def to_json(seen: "Pass", path: str | Path | None = None) -> dict[str, Any]:
    """The pass as plain values: loss, rows, parameters, faults.

    Args:
      path: a file to write it to as well. A number that is not finite is a string there.
    """
    whole = {
        "jax": jax.__version__,
        "loss": _plain(seen.loss),
        "saved": seen.saved,
        "rows": [
            {n: _plain(v) for n, v in row._asdict().items() if n != "parameters"}
            | {"gain": _plain(row.gain), "parameters": [_parameter(p) for p in row.parameters]}
            for row in seen.rows
        ],
        "parameters": [_parameter(p) for p in seen.parameters],
        "faults": [fault._asdict() for fault in seen.faults],
    }
    if path is not None:
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def to_html(seen: "Pass", path: str | Path | None = None) -> str:
    """A self-contained page; also written to `path`. Rows in the middle of many are left out."""
    whole = page.page("One pass, forward and back", *sections(seen))
    if path is not None:
        Path(path).write_text(whole, encoding="utf-8")
    return whole


def fragment(seen: "Pass") -> str:
    """A piece of a notebook's page."""
    return page.fragment(page.text("One pass, forward and back", "h2"), *sections(seen))


def sections(seen: "Pass") -> list[str]:
    """The parts of the page."""
    parts = [page.text(_headline(seen)), *(_fault(f) for f in seen.faults[:SAID])]
    parts += map(page.text, _conclusions(seen)[len(seen.faults[:SAID]) :])
    rows = [row for row in _ends(seen.rows, PAGE) if row is not None]
    inner = leaves(seen.rows)
    for title, columns, cells, values, what in (
        ("Forward", FORWARD, _forward, [row.rms for row in inner], "output"),
        ("Back", BACKWARD, _backward, [row.arriving for row in inner], "cotangent arriving"),
    ):
        curve = page.line_plot(values, f"RMS of the {what}", of="layers")
        parts += [page.text(title, "h2"), curve, page.table(columns, map(cells, rows))]
    if len(rows) < len(seen.rows):
        left = len(seen.rows) - len(rows)
        parts += [page.text(f"{left:,} rows in the middle of each table are left out.")]
    steepest = sorted(seen.parameters, key=_steepness, reverse=True)[: 2 * PAGE]
    parts += [page.text("Parameters, by the ratio of their gradient", "h2")]
    return [*parts, page.table(PARAMETERS, [(*p, p.ratio if p.rms else "") for p in steepest])]


def plot(seen: "Pass", ax: Any = None) -> Any:
    """Draws the flow of the gradient: the RMS of each layer's output and of its cotangent.

    Args:
      ax: the `matplotlib.axes.Axes` to draw on; by default a new figure's.

    Returns:
      The axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    rows = leaves(seen.rows)
    ax = axes(ax)
    places = range(len(rows))
    # A logarithmic axis has no place for 0.
    for values, name in (
        ([row.rms or math.nan for row in rows], "output"),
        ([row.arriving or math.nan for row in rows], "cotangent that arrives"),
    ):
        ax.plot(places, values, marker=".", label=name)
    ax.set_yscale("log")
    if len(rows) <= 40:
        ax.set_xticks(places, [row.name for row in rows], rotation=90, fontsize=8)
    else:
        ax.set_xlabel("layer")
    ax.set_ylabel("RMS")
    ax.set_title(f"One pass, loss {seen.loss:.4g}")
    ax.legend()
    return ax


def plot_run(passes: Sequence["Pass"], steps: Sequence[int] | None = None, ax: Any = None) -> Any:
    """Draws passes of a training run over time: for each parameter gradient over parameter.

    Args:
      passes: of the same model.
      steps: of the training run at which they were made; 0, 1, ... by default.
      ax: the `matplotlib.axes.Axes` to draw on; by default a new figure's.

    Returns:
      The axes.

    Raises:
      InputError: there is no pass, or not a step for each; matplotlib is not installed.
    """
    steps = range(len(passes)) if steps is None else steps
    if not passes or len(steps) != len(passes):
        raise InputError(
            f"passes need a step each, and there must be one: got {len(passes)} passes and "
            f"{len(steps)} steps"
        )
    ax = axes(ax)
    last = {p.path: p for p in passes[-1].parameters}
    names = sorted(last, key=lambda path: -last[path].size)[:LINES]
    for name in sorted(names, key=list(last).index):
        found = [{p.path: p for p in seen.parameters}.get(name) for seen in passes]
        ax.plot(steps, [(p.ratio or math.nan) if p else math.nan for p in found], label=name)
    ax.plot(steps, [seen.loss for seen in passes], "k--", label="loss")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("RMS of the gradient / RMS of the parameter")
    ax.legend(fontsize=8)
    return ax


def axes(ax: Any, size: tuple[float, float] = (9, 5)) -> Any:
    """The axes given, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError(
            "plot needs matplotlib; install the extra, as in pip install 'funcbp[plot]'"
        ) from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _headline(seen: "Pass") -> str:
    return (
        f"loss {seen.loss:.6g}; {human(seen.saved)} kept for the backward pass; cotangents as RMS"
    )


def _conclusions(seen: "Pass") -> list[str]:
    more = len(seen.faults) - SAID
    said = [str(fault) for fault in seen.faults[:SAID]] or ["no fault is seen"]
    return said + ([f"and {more:,} more"] if more > 0 else [])


def _fault(fault: Any) -> str:
    return page.card(
        page.escaped(f"{fault.kind}: {fault.layer}"),
        [("seen", page.escaped(fault.message))],
        "wrong",
    )


def _ends(rows: Sequence["Row"], limit: int) -> Iterable["Row | None"]:
    if len(rows) <= 2 * limit:
        return rows
    return [*rows[:limit], None, *rows[-limit:]]


def _forward(row: "Row") -> tuple[Any, ...]:
    measured = (row.mean, row.rms, row.low, row.high)
    off = _off(row).replace(" ", "\xa0")  # kept on one line
    return (row.name, *measured, off, row.saved, row.flops)


def _backward(row: "Row") -> tuple[Any, ...]:
    carried = ("" if v is None else v for v in (row.arriving, row.leaving, row.gain))
    return (row.name, *carried, _ratio(row))


def _line(row: "Row") -> tuple[str, ...]:
    """The cells on a terminal; indented, and each as short as it can be."""
    flops = human(row.flops).removesuffix("B").strip()
    numbers = (row.arriving, row.gain, _ratio(row))
    return (
        "  " * row.layer.count("/") + row.name.rpartition("/")[2],
        *map(_number, (row.mean, row.rms)),
        _off(row).replace("saturated", "sat."),
        human(row.saved) if row.saved else "",
        flops if row.flops else "",
        *map(_number, numbers),
    )


def _off(row: "Row") -> str:
    if row.dead is not None:
        return f"{row.dead:.0%} dead"
    return "" if row.saturated is None else f"{row.saturated:.0%} saturated"


def _ratio(row: "Row") -> float | str:
    """The largest of the layer's parameters; of those that are 0, as biases at the start, none."""
    return max((p.ratio for p in row.parameters if p.rms), default="")


def _number(value: Any) -> str:
    return "" if value is None or value == "" else f"{value:.3g}"


def _steepness(parameter: "Parameter") -> float:
    """Gradients that are not finite first; parameters that are 0, as biases at the start, last."""
    if not math.isfinite(parameter.gradient):
        return math.inf
    return parameter.ratio if parameter.rms else -1


def _parameter(parameter: "Parameter") -> dict[str, Any]:
    named = parameter._asdict() | {"ratio": parameter.ratio}
    return {n: _plain(v) for n, v in named.items()}


def _plain(value: Any) -> Any:
    """JSON has no number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
