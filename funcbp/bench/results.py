"""A run of the bench: its rows, their geometric means, and the forms in which it is shown."""

import datetime
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich import box
from rich.table import Table

from funcbp import page
from funcbp.bench.measure import Row
from funcbp.core import InputError

__all__ = ["Machine", "Results"]

RATIOS = ("time", "saved", "temporary", "error")
# A ratio below this counts as this in a mean: a rule that keeps nothing would make it 0.
LEAST = 0.01
MEAN = "geometric mean"
COLUMNS = ("op", "dtype", "against", "ms", "time", "spread", "saved", "temp", "error", "roof")


class Machine(NamedTuple):
    """Where and when a run was made.

    Attributes:
        device: the accelerator's name, or the processor's.
        cores: how many this process may use.
        jax: its version.
        python: its version.
        date: of the run, ISO 8601.
        flops: the measured matmul rate by dtype, in operations a second.
        bandwidth: the measured copy bandwidth, in bytes a second.
    """

    device: str
    cores: int
    jax: str
    python: str
    date: str
    flops: dict[str, float]
    bandwidth: float

    @classmethod
    def here(cls, flops: dict[str, float], bandwidth: float) -> "Machine":
        """This machine, today."""
        device = jax.devices()[0]
        name = _processor() if device.platform == "cpu" else device.device_kind
        return cls(
            name,
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            jax.__version__,
            platform.python_version(),
            datetime.date.today().isoformat(),
            flops,
            bandwidth,
        )

    def __str__(self) -> str:
        rates = ", ".join(f"{n} {rate / 1e9:.0f} GFLOP/s" for n, rate in self.flops.items())
        return (
            f"{self.device}, {self.cores} cores, JAX {self.jax}, Python {self.python}, "
            f"{self.date}; matmul {rates}, copy {self.bandwidth / 1e9:.0f} GB/s"
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


class Results(NamedTuple):
    """The rows of a run, and the machine that it was made on."""

    machine: Machine
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    def means(self) -> list[tuple[str, str, str, dict[str, float | None]]]:
        """(kind of op, dtype, contender, geometric mean of each ratio)."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.kind, reverse=True):
            groups.setdefault((row.kind, row.dtype, row.against), []).append(row)
        return [
            (*key, {name: _mean(getattr(r, name) for r in rows) for name in RATIOS})
            for key, rows in groups.items()
        ]

    def worst(self) -> list[Row]:
        """The row of the largest ratio of times against each contender."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.against not in found or row.time > found[row.against].time:
                found[row.against] = row
        return list(found.values())

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            box=box.SIMPLE_HEAD,
            caption=str(self.machine),
            caption_justify="left",
            padding=(0, 1, 0, 0),
        )
        for k, column in enumerate(COLUMNS):
            # The numbers stay whole; a long name is folded.
            table.add_column(column, justify="right" if k > 2 else "left", no_wrap=k > 0)
            table.columns[k].overflow = "fold"
        table.columns[0].min_width = 12
        for row in self.rows:
            table.add_row(*_cells(row))
        table.add_section()
        for kind, dtype, against, means in self.means():
            table.add_row(f"{MEAN}, {kind}", _short(dtype), against, *_mean_cells(means))
        for row in self.worst():
            table.add_row(f"slowest: {row.title}", *_cells(row)[1:])
        return table

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What `write` wrote as JSON. Raises InputError if it is nothing of the kind."""
        try:
            data = json.loads(path.read_text())
            rows = [Row(**{n: _number_of(v, n) for n, v in row.items()}) for row in data["rows"]]
            return cls(Machine(**data["machine"]), tuple(rows), tuple(data["left_out"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} must be a result that --json of this version wrote: {error}; run the "
                "bench of all ops anew"
            ) from None

    def renewed(self, newer: "Results") -> "Results":
        """These rows, with those of a later run on the same machine in their places.

        Raises InputError if the machines differ.
        """
        ours, theirs = ((m.device, m.cores, m.jax, m.python) for m in (self.machine, newer.machine))
        if ours != theirs:
            raise InputError(
                f"results must be of one machine to stand in one table, got {ours} and {theirs}; "
                "run the bench of all ops here"
            )
        rows = {(r.op, r.case, r.dtype, r.against): r for r in (*self.rows, *newer.rows)}
        measured = {row.op for row in newer.rows}
        left_out = tuple(name for name in self.left_out if name not in measured)
        ordered = sorted(rows.values(), key=lambda row: row.op)
        return self._replace(rows=tuple(ordered), left_out=left_out)

    def to_json(self) -> dict[str, Any]:
        """Machine, rows and means as plain data."""
        return {
            "machine": self.machine._asdict(),
            "rows": [_finite(row._asdict()) for row in self.rows],
            "means": [
                {"kind": kind, "dtype": dtype, "against": against, **means}
                for kind, dtype, against, means in self.means()
            ],
            "left_out": list(self.left_out),
        }

    def to_html(self) -> str:
        """One page."""
        means = [
            (f"{MEAN}, {kind}", _short(dtype), against, *_mean_cells(means))
            for kind, dtype, against, means in self.means()
        ]
        return page.page(
            "The rules against autodiff and other libraries",
            page.text(str(self.machine)),
            page.text(
                "Each figure is the rule's over the contender's: below 1 the rule is better. Times "
                "are of value and gradient, the median of rounds in turn, with quartiles."
            ),
            page.table(COLUMNS, means),
            page.table(COLUMNS, [_cells(row) for row in self.rows]),
        )

    def write(self, json_file: Path | None, html_file: Path | None) -> None:
        """Writes what is asked for."""
        if json_file is not None:
            json_file.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        if html_file is not None:
            html_file.write_text(self.to_html(), encoding="utf-8")


def _mean_cells(means: dict[str, float | None]) -> tuple[str, ...]:
    time, *rest = (_number(means[name]) for name in RATIOS)
    return "", time, "", *rest, ""


def _cells(row: Row) -> tuple[str, ...]:
    time, *rest = (_number(getattr(row, name)) for name in RATIOS)
    ms, spread = f"{row.seconds * 1e3:.3g}", f"{row.low:.2f}-{row.high:.2f}"
    return row.title, _short(row.dtype), row.against, ms, time, spread, *rest, f"{row.share:.0%}"


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "f")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [max(v, LEAST) for v in values if v is not None and math.isfinite(v)]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def _number_of(value: Any, name: str) -> Any:
    return math.inf if value == "inf" and name in RATIOS else value


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    infinite = {n: "inf" for n, v in row.items() if isinstance(v, float) and math.isinf(v)}
    return row | infinite
