"""`funcbp explain`, as a person runs it."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from check.browser import pixels, screenshot

from funcbp import chain_rule, cli
from funcbp.core import InputError
from funcbp.layers import dense, serial, tanh
from funcbp.trace.explain import explain

SUBJECT = """
import jax
import jax.numpy as jnp
from funcbp import layers, tap

net = layers.serial(layers.dense(3), layers.tanh, layers.dense(2))
x = jnp.ones((4, 3))
number = 3

def arguments():
    return (*net.init(jax.random.key(0), x), x)

def square(y):
    return jnp.mean(y**2)

def plain(w, x):
    return jnp.sum(jnp.sin(w * x))

def tapped(w, x):
    return jnp.sum(tap(jnp.sin(w * x), "wave"))

def steps(w, n):
    for _ in range(n):
        w = tap(jnp.sin(w), "wave")
    return w

def raises(w, x):
    raise RuntimeError("no luck")

two = (jnp.ones(3), jnp.ones(3))
named = {"w": jnp.ones(3), "x": jnp.ones(3)}
wrong = {"w": jnp.full(3, jnp.nan), "x": jnp.ones(3)}
static = (1.0, 3)
shapes = (jax.ShapeDtypeStruct((3,), "float32"), jnp.ones(3))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with a subject.py; (exit code, output, standard error)."""
    (tmp_path / "subject.py").write_text(SUBJECT)
    monkeypatch.chdir(tmp_path)

    def explained(*arguments):
        monkeypatch.setattr(sys, "argv", ["funcbp", "explain", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return explained


def test_a_model(run, tmp_path):
    code, said, errors = run(
        "subject.py:net", "--args", "subject.py:arguments", "--loss", "subject.py:square",
        "--json", "all.json", "--html", "all.html",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    assert "serial keeps" in said and "no fault is seen" in said
    found = json.loads((tmp_path / "all.json").read_text())
    layers = ["serial", "serial/dense_0", "serial/tanh_0", "serial/dense_1"]
    assert [row["layer"] for row in found["pass"]["rows"]] == layers
    assert found["ledger"]["bytes"] == found["pass"]["saved"] > 0
    assert found["chain_rule"] is None
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "What serial keeps" in page and "One pass" in page and "http" not in page


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("tapped", "two", "wave"),
        ("tapped", "named", "wave"),
        ("tapped", "wrong", "nonfinite: 3 of 3 numbers at wave"),
        ("plain", "two", "no pass to show: nothing to see"),
        ("steps", "static", "wave"),
        ("tapped", "shapes", "no pass to show: trace runs the function and needs arrays"),
        ("net", "arguments", "no pass to show: a floating scalar is needed"),
    ],
)
def test_functions(run, tmp_path, function, arguments, words):
    """A fault is said, and is no failure; without a pass there is the ledger."""
    code, said, errors = run(
        f"subject.py:{function}", "--args", f"subject.py:{arguments}", "--json", "all.json"
    )
    assert (code, errors) == (0, "")
    assert words in said and f"{function if function != 'net' else 'serial'} keeps" in said
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["ledger"]["rows"] and (found["pass"] is None) == ("no pass" in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either MODULE:FUNCTION and --args"),
        (("subject:net",), "either MODULE:FUNCTION and --args"),
        (("--demo", "subject:net", "--args", "subject:two"), "or --demo"),
        (("subject.py:nett", "--args", "subject.py:two"), "nett"),
        (("subject.py:number", "--args", "subject.py:two"), "must be a function, got int"),
        (("subject.py:net", "--args", "subject.py:two"), "got a tuple of 2"),
        (("subject.py:net", "--args", "subject.py:named"), "got a dict of ['w', 'x']"),
        (("subject.py:raises", "--args", "subject.py:two"), "raises raised RuntimeError: no luck"),
        (("subject.py:plain", "--args", "subject.py:two", "--loss", "subject.py:number"),
         "--loss must name a function, got int"),
        (("subject.py:plain", "--args", "subject.py:two", "--html", "no/x.html"), "cannot write"),
        (("subject.py:plain", "--args", "subject.py:two", "--json", "."), "cannot write"),
        (("--demo", "--depth", "3"), "--depth"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(run, tmp_path, arguments, words):
    code, said, errors = run(*arguments)
    assert (code, said) == (2, "")
    assert errors.startswith("funcbp: ") and len(errors.strip().splitlines()) == 1
    assert words in errors
    assert {p.name for p in tmp_path.iterdir()} <= {"subject.py", "__pycache__"}


def test_demo(run, tmp_path):
    code, said, errors = run("--demo", "--html", "demo.html", "--json", "demo.json")
    assert (code, errors) == (0, "")
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["pass"]["faults"] == []
    assert found["ledger"]["comparison"]["hand_rules"] < found["ledger"]["comparison"]["autodiff"]
    assert [s["name"] for s in found["chain_rule"]["steps"]][-2:] == ["dense_1", "loss"]
    assert found["chain_rule"]["error"] < 1e-5
    for words in ("serial keeps", "loss 2.", "evaluations of L: 1"):
        assert words in said
    # The parts stand one below the other, each with something drawn.
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    titles = [page.index(t) for t in ("What serial keeps", "One pass", "The chain rule")]
    assert titles == sorted(titles) and page.count("<polyline") == 2
    screenshot(tmp_path / "demo.html", tmp_path / "demo.png", width=1300, height=3000)
    ink = np.any(pixels(tmp_path / "demo.png")[:, :, :3] < 128, axis=(1, 2))
    assert all(part.any() for part in np.split(ink, 10))


def test_tables_fit_a_terminal():
    """100 columns: no line of the pass or of the chain rule is folded."""
    from rich.console import Console

    net, x = serial(dense(100), tanh, dense(10)), jnp.ones((100, 100))
    params, state = net.init(jax.random.key(0), x)
    found = explain(net, (params, state, x), loss=jnp.sum)
    found = found._replace(chain=chain_rule(net, x, params=params, loss=jnp.sum))
    assert found.seen is not None
    console = Console(width=100)
    for part, names in ((found.seen, ("dense_0", "tanh_0")), (found.chain, ("dense_0", "tanh_0"))):
        with console.capture() as captured:
            console.print(part)
        lines = captured.get().splitlines()
        at = [next(i for i, line in enumerate(lines) if name in line) for name in names]
        assert abs(at[1] - at[0]) == 1 and max(map(len, lines)) <= 100


def test_chain_rule_views(tmp_path):
    result = chain_rule([jnp.sin, jnp.square], 0.5)
    plain = result.to_json(tmp_path / "chain.json")
    assert json.loads((tmp_path / "chain.json").read_text()) == plain
    assert [s["name"] for s in plain["steps"]] == ["sin", "square"]
    assert plain["evaluations"] == {"chain_rule": 1, "finite_differences": 2}
    page = result.to_html(tmp_path / "chain.html")
    assert (tmp_path / "chain.html").read_text(encoding="utf-8") == page
    assert "<pre>∂L/∂h_0 = ∂L/∂h_1" in page and page.count("<tr>") == 3
    assert result._repr_html_().startswith("<div")
    many = chain_rule([jnp.sin] * 400, jax.ShapeDtypeStruct((), "float32")).to_html()
    assert many.count("<tr>") == 301 and "100 steps in the middle are left out" in many


def test_a_model_by_name_is_refused():
    with pytest.raises(InputError, match=r"tuple \(params, state, \*inputs\), got a dict of"):
        explain(dense(2), (), {"x": jnp.ones(2)})
