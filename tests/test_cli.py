"""The command as a person runs it: output, files, exit codes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from funcbp import cli, demo, layers, ops
from funcbp.core import Op


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "funcbp.cli", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_demo(tmp_path):
    done = run("demo", "--json", "result.json", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] >= 0.97
    names = {row["rule"].split("(")[0] for row in result["rules"]}
    assert {"dense", "linear", "layer_norm", "dropout"} <= names
    assert "softmax_cross_entropy_with_integer_labels" in names
    assert {row["verdict"] for row in result["rules"]} == {"right"}
    html = (tmp_path / "page.html").read_text()
    assert f"{result['accuracy']:.2%}" in html
    assert "<polyline" in html
    assert "http" not in html  # self-contained
    assert str(tmp_path / "page.html") in done.stdout


def test_demo_is_the_same_for_the_same_seed(tmp_path):
    for name in ("a", "b"):
        done = run("demo", "--steps", "30", "--seed", "3", "--json", name, cwd=tmp_path)
        assert done.returncode == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    assert a["accuracy"] == b["accuracy"]
    assert a["rules"] == b["rules"]


def test_a_wrong_rule_is_found(tmp_path, monkeypatch, capsys):
    good = ops.linear

    def bwd(saved, dy):
        dx, dw, db = good.bwd(saved, dy)
        return dx, dw * 1.01, db

    wrong = Op(
        good.plain,
        good.fwd,
        bwd,
        like=None,
        cases=(),
        arrays=good.arrays,
        check=good.check,
        name="linear",
    )
    monkeypatch.setattr(ops, "linear", wrong)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["funcbp", "demo", "--steps", "2", "--json", "r.json"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 1
    rules = json.loads((tmp_path / "r.json").read_text())["rules"]
    assert {r["verdict"] for r in rules if r["rule"] == "linear"} == {"WRONG"}
    assert {r["verdict"] for r in rules if r["rule"] != "linear"} == {"right"}
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("--html", "no/such/folder/x.html"), ("--json", "."), ("--foo",), ("--seed", "a")]
)
def test_bad_options_give_one_line(arguments, tmp_path):
    done = run("demo", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("funcbp: ")
    assert not list(tmp_path.iterdir())


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_rules_are_grouped_by_shape():
    net = layers.serial(layers.dense(4), layers.dense(4), layers.dense(2))
    params, _ = net.init(jax.random.key(0), jnp.ones((3, 4)))
    rows = demo.used_rules(lambda: net(params, jnp.ones((3, 4))))
    assert [(r.rule, r.calls) for r in rows] == [("linear", 2), ("linear", 1)]


def test_bench_writes_and_renews(tmp_path):
    quick = ("bench", "reverse_gradient", "--quick", "--against", "autodiff")
    for option in ("--json", "--renew"):
        done = run(*quick, option, "bench.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
        assert row["title"] == "reverse_gradient" and row["time"] > 0
    (tmp_path / "bench.json").write_text("[]")
    done = run(*quick, "--renew", "bench.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "must be a result that --json of this version wrote" in done.stderr
