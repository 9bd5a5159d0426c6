"""The bench: what it measures of one op, what it leaves out, and how it is shown."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from funcbp import Case, InputError, bench, op, ops
from funcbp.bench.measure import measure
from funcbp.bench.peers import require
from funcbp.bench.results import Machine, Results
from funcbp.bench.roofline import Roofline
from funcbp.core import Op

LIMITS = Roofline({"float32": 1e12, "bfloat16": 1e12}, 1e12)
SMALL = Case("small", (64, 128), bench=True)


def smaller(known: Op) -> Op:
    """An op with a bench case that takes no time."""
    tests = [c for c in known.cases if not c.bench]
    return op(
        known.plain, known.fwd, known.bwd, like=known.like, cases=(*tests, SMALL), name=known.name
    )


def rows(known, against=("autodiff", "jax", "flax"), dtype="float32", **settings):
    found = measure(smaller(known), SMALL, dtype, against, LIMITS, rounds=3, **settings)
    return {row.against: row for row in found}


def test_a_row_for_each_counterpart_that_exists():
    found = rows(ops.silu)
    assert list(found) == ["autodiff", "jax"]  # flax has jax.nn's
    row = found["autodiff"]
    assert (row.op, row.kind, row.case, row.dtype) == ("silu", "pointwise", "small", "float32")
    assert row.low <= row.time <= row.high and row.noise >= 1 and row.seconds > 0
    assert row.saved == 0  # the rule saves its argument, autodiff the sigmoid too
    assert row.share > 0 and 0 < row.error < 1
    norms = rows(ops.layer_norm)
    assert list(norms) == ["autodiff", "flax"] and norms["flax"].kind == "other"


def test_a_worse_rule_has_larger_figures():
    """A rule that keeps a second copy and rounds on the way is seen to."""

    def fwd(x):
        return jnp.exp(x), (x, jnp.exp(x) + 1e-3)

    def bwd(saved, dy):
        return (dy * saved[1],)

    def plain(x):
        return jnp.exp(x)

    cases = (Case("odd", (3, 5)), SMALL)
    worse = op(plain, fwd, bwd, arrays=("x",), cases=cases, name="worse")
    (row,) = measure(worse, SMALL, "float32", ["autodiff"], LIMITS, rounds=3)
    assert row.saved == 1 and row.error > 100
    better = rows(ops.sigmoid, digits=False)
    assert better["autodiff"].error is None


def test_a_counterpart_is_measured_where_it_takes_the_settings():
    """jax.lax.scan knows no `store`: it has no row for such a case, and no share in its digits."""
    first, chunks, *_ = ops.scan.cases
    stored, recomputed = (
        Case(name, *case.args, **case.kwargs, bench=True)
        for name, case in (("stored", first), ("recomputed", chunks))
    )
    settings = {name: getattr(ops.scan, name) for name in ("like", "functions", "check")}
    cases = (first, chunks, stored, recomputed)
    scan = op(ops.scan.plain, ops.scan.fwd, ops.scan.bwd, cases=cases, name="scan", **settings)
    found = [
        row
        for case in (stored, recomputed)
        for row in measure(scan, case, "float32", ["autodiff", "jax"], LIMITS, rounds=3)
    ]
    assert [(row.title, row.against) for row in found] == [
        ("scan, stored", "autodiff"),
        ("scan, stored", "jax"),
        ("scan, recomputed", "autodiff"),
    ]
    assert all(row.error is not None for row in found)


def test_results_are_shown_in_every_form(tmp_path):
    found = (*rows(ops.silu).values(), *rows(ops.tanh, dtype="bfloat16").values())
    result = Results(Machine.here(LIMITS.flops, LIMITS.bandwidth), found, ("left",))
    (kind, _, against, means), *_ = result.means()
    assert (kind, against) == ("pointwise", "autodiff")
    assert means["time"] == pytest.approx(found[0].time)
    assert {row.against for row in result.worst()} == {"autodiff", "jax"}
    console = Console(width=100, record=True)
    console.print(result.table())
    text = console.export_text()
    assert all(part in text for part in ("silu", "geometric mean", "slowest", "copy 1000 GB/s"))
    result.write(tmp_path / "bench.json", tmp_path / "bench.html")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"]["jax"] == jax.__version__ and written["left_out"] == ["left"]
    assert len(written["rows"]) == len(found)
    assert "<table>" in (tmp_path / "bench.html").read_text()


def test_a_part_of_a_result_is_renewed(tmp_path):
    file = tmp_path / "bench.json"
    machine = Machine.here(LIMITS.flops, LIMITS.bandwidth)
    tanh, silu = (tuple(rows(known, ["autodiff"]).values()) for known in (ops.tanh, ops.silu))
    narrow = tuple(row._replace(dtype="bfloat16") for row in tanh)  # not measured again
    infinite = tuple(row._replace(temporary=float("inf")) for row in silu)
    Results(machine, (*infinite, *tanh, *narrow), ("tanh",)).write(file, None)
    older = Results.read(file)
    assert older.rows == (*infinite, *tanh, *narrow)
    newer = Results(machine, tuple(row._replace(time=0.125) for row in tanh))
    assert older.renewed(newer).rows == (*infinite, *newer.rows, *narrow)
    assert older.renewed(newer).left_out == ()
    with pytest.raises(InputError, match="must be of one machine"):
        older.renewed(newer._replace(machine=machine._replace(jax="0.0")))
    file.write_text('{"rows": 1}')
    with pytest.raises(InputError, match="must be a result that --json of this version wrote"):
        Results.read(file)


def test_what_cannot_be_measured_says_why():
    with pytest.raises(InputError, match="--against takes autodiff, jax, flax, torch, got 'tf'"):
        require(["tf"])
    with pytest.raises(InputError, match="--device tpu needs such a device, this machine has cpu"):
        bench.run({}, device="tpu")
    assert bench.run({}, ["autodiff"], quick=True).rows == ()
