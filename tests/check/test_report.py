"""What a person sees: the text, the JSON, the page, the written test, the command."""

import dataclasses
import functools
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from check import browser, faulty
from rich.console import Console

import funcbp
from funcbp import cli
from funcbp.check import written
from funcbp.check.audit import audit, check_rule
from funcbp.check.compare import WrongRule
from funcbp.check.finding import Finding
from funcbp.check.named import name_of, named, rule_in
from funcbp.check.report import Report
from funcbp.check.source import Source, Unwritable

FAULTY = Path(faulty.__file__)
LONG = "BlockSparseAttention._masked_softmax_of_a_long_name"
LEAF = "params['attention']['query']['kernel']"


def findings(right=95):
    """One of each kind, with names and paths as long as they come, and many right ones."""
    scopes = [f"Transformer/Block_{k}/RMSNorm_{j}" for k in range(12) for j in range(2)]
    found = [
        Finding(
            "fused_rms_norm (src/model/layers/normalization.py:124)",
            tuple(
                f"src/model/model.py:107 in __call__, inside scan, scope {s} (1 times)"
                for s in scopes
            ),
            "wrong",
            "missing_sum",
            "scale",
            "the rule's cotangent of scale is 4.23 at [8] where it should be 16.92",
            {
                "x": {"rule": 1.03e-7},
                "scale": {"rule": 0.75, "autodiff": 1.2e-7, "finite_differences": 4e-16},
            },
            "the values seen",
            (jnp.ones((4, 12, 32)), jnp.arange(3.0)),
        ),
        Finding(
            f"{LONG} (../../a/long/path/to/a/package/that/does/not/end/kernels/attention.py:1024)",
            tuple(f"src/other/thing.py:{k} in g (2 times)" for k in range(5)),
            "wrong",
            "nonfinite",
            LEAF,
            f"the rule's cotangent of {LEAF} is nan at [0, 3] where it should be 0.0213871",
            {
                LEAF: {"rule": np.nan, "autodiff": 1e-7, "finite_differences": 4e-11},
                "bias": {"rule": np.inf},
            },
            "one row of the mask false",
            ({"attention": {"query": {"kernel": jnp.ones((2, 3))}}}, jnp.array([True, False])),
            ("not under vmap: ValueError: <script>", "no second derivative: TypeError: no"),
        ),
        Finding(
            "odd (src/model/act.py:47)",
            ("src/model/model.py:117 in __call__, inside jit (3 times)", "x.py:1 in f (1 times)"),
            "unchecked",
            message="could not be judged: TypeError: x.dtype=bfloat16 is not supported",
        ),
        Finding(
            "spike (src/model/snn.py:4)",
            ("src/model/model.py:129 in __call__, inside scan (64 times)",),
            "surrogate",
            message="the true derivative is 0 almost everywhere, and the rule stands in for it",
            errors={"x": {"rule": 0.7}},
        ),
    ]
    return found + [
        Finding(
            f"rule_{k} (src/model/ops/elementwise_kernels.py:{k})",
            (f"src/model/model.py:{k} in __call__ (4 times)",),
            "right",
            message=f"right at {k + 40} points",
            errors={"x": {"rule": k * 1.5e-8, "autodiff": 2e-8}, "w": {"rule": 1e-7}},
        )
        for k in range(right)
    ]


REPORT = Report("loss", findings(), 51.234)


def terminal(report, width):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor"
    )
    console.print(report)
    return console.file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def squeezed(text):
    """Without the spaces at which lines are folded."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_all_and_cuts_nothing(width):
    text = plain(terminal(REPORT, width))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for f in REPORT.findings:
        assert squeezed(f.rule.split(" (")[0]) in squeezed(text)
        assert f.verdict == "right" or squeezed(f.message) in squeezed(text)
    for shown in ("missing_sum of scale", "float32[4, 12, 32]", "float32[3] = [0, 1, 2]", "0.75",
                  "1.2e-07", "4e-16", "one row of the mask false", "nan", "inf", "<script>",
                  "24 times", "and 21 more", "and at 2 other lines"):  # fmt: skip
        assert squeezed(shown) in squeezed(text), shown


def test_the_wrong_come_first():
    text = plain(terminal(REPORT, 80))
    places = [text.index(w) for w in ("fused_rms_norm", LONG, "odd", "spike", "rule_0")]
    assert places == sorted(places)
    assert (
        text.splitlines()[0]
        == "loss: 99 rules: 2 wrong, 1 unchecked, 1 surrogate, 95 right (51.2 s)"
    )


def test_text_has_no_codes_and_no_padding():
    text = str(REPORT)
    assert "\x1b" not in text
    assert not re.search(r" $|[─│┃━]", text, re.MULTILINE)
    assert text.startswith(REPORT.summary())
    assert repr(REPORT) == f"<Report {REPORT.summary()}>"


def test_json_is_strict(tmp_path):
    plain = REPORT.to_json(tmp_path / "r.json")
    again = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert again == plain
    assert plain["counts"] == {"wrong": 2, "unchecked": 1, "surrogate": 1, "right": 95}
    wrong = plain["findings"][1]
    assert wrong["errors"][LEAF] == {"rule": "nan", "autodiff": 1e-7, "finite_differences": 4e-11}
    assert wrong["errors"]["bias"] == {"rule": "inf"}
    assert wrong["rule"] == LONG and wrong["written_at"].endswith("attention.py:1024")
    assert len(plain["findings"][0]["where"]) == 24


def test_a_report_of_nothing():
    empty = Report("loss", (), 0.1)
    assert empty.ok
    assert str(empty) == "loss: 0 rules (0.1 s)"
    assert "0 rules" in empty.to_html()
    empty.raise_if_wrong()
    with pytest.raises(WrongRule, match="must call the rule"):
        empty.require_right()


def test_require_right():
    right = Report("loss", REPORT.findings[3:], 1.0)
    right.require_right()
    right.require_right("spike")
    with pytest.raises(WrongRule, match="must call the rule odd, calls spike"):
        right.require_right("odd")
    with pytest.raises(WrongRule, match="not supported"):
        Report("loss", REPORT.findings[2:], 1.0).require_right()
    with pytest.raises(WrongRule, match="missing_sum of scale"):
        REPORT.raise_if_wrong()


def test_the_page_has_all_and_needs_nothing(tmp_path):
    page = REPORT.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == page
    assert not re.search(r"https?:|src=|url\(|<script|<link", page)
    assert "&lt;script&gt;" in page
    assert page.count('class="card wrong"') == 2
    assert page.index("fused_rms_norm") < page.index(LONG) < page.index("spike")
    folded = page[page.rindex("<details>") :]
    assert folded.count("<tr>") == 1 + 95
    fragment = REPORT._repr_html_()
    assert "<body" not in fragment and "body {" not in fragment
    assert "fused_rms_norm" in fragment


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tmp_path, dark):
    REPORT.to_html(tmp_path / "r.html")
    browser.screenshot(tmp_path / "r.html", tmp_path / "r.png", dark=dark)
    image = browser.pixels(tmp_path / "r.png")
    assert image.shape[:2] == (1000, 1000)
    # The ground is light or dark, and the wrong cards' edge is red.
    ground = image[:, -1, :3].astype(int)
    assert (ground < 60).all() if dark else (ground > 230).all()
    edge = image[:, :100, :3].astype(int)
    red = (edge[..., 0] - edge[..., 1:].max(-1)) > 60
    assert red.sum(0).max() > 200


# --- values as source


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting with fields."""

    x: float
    name: str = "a"


def shifted(x, by):
    """A function."""
    return x + by


def same(a, b):
    """Equal in structure, types and bits."""
    if isinstance(a, jax.Array | np.ndarray | np.generic):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.key_impl(a) == jax.random.key_impl(b) and same(
                jax.random.key_data(a), jax.random.key_data(b)
            )
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, functools.partial):
        return same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    return a == b


RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((3, 5))
VALUES = [
    *[jnp.asarray(NORMAL * 8, d) for d in ("float32", "bfloat16", "float16", "float8_e4m3fn")],
    *[jnp.asarray(NORMAL * 4, d) for d in ("int8", "uint32", "int4", "bool")],
    *[jnp.asarray(RNG.standard_normal((7, 30)), d) for d in ("float32", "bfloat16", "complex64")],
    jnp.asarray(RNG.integers(-4, 4, (200,)), "int4"),
    jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], "float32"),
    jax.lax.complex(jnp.asarray([np.inf, -0.0]), jnp.asarray([np.nan, -1.0])),
    jnp.asarray(0.1), jnp.zeros((0, 5)), jnp.full((4, 200), -0.0), jnp.arange(4),
    NORMAL, NORMAL[0].astype("complex128"), np.float32(0.1), np.int64(3), np.zeros(3, bool),
    np.zeros(2, jax.dtypes.float0),
    jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 2), jax.random.PRNGKey(1),
    None, True, 3, 0.1, float("nan"), -float("inf"), 2 - 1j, "a'b\"\n", b"x", ..., slice(1, None),
    (1,), (), [], {}, {"a": [1, (2.0, None)], 3: {"b": jnp.ones(2)}}, frozenset([1, 2]),
    faulty.Mode.SQUARE, faulty.Params(jnp.ones((2, 2)), None), Point(1.5, "b"), Point,
    jnp.tanh, jnp.float32, np.dtype("bfloat16"), shifted, functools.partial(shifted, by=2.0),
    {"w": jnp.asarray(RNG.standard_normal((40, 5)), "float32"), "longer": list(range(60))},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_as_source(value, tmp_path):
    source = Source(tmp_path / "test_x.py")
    source.begin("x")
    text = source.write(value)
    names = {"jax": jax, "jnp": jnp, "np": np, "ARRAYS": source.arrays}
    exec("\n".join(source.lines()), names)
    assert same(value, eval(text, names)), text
    assert max(map(len, text.splitlines())) <= 100


def test_what_no_source_can_make(tmp_path):
    source = Source(tmp_path / "test_x.py")
    source.begin("x")
    with pytest.raises(Unwritable, match="lambda.*no name"):
        source.write((1, [lambda x: x]))


# --- names


def test_names():
    for spec in ("check.faulty:loss", f"{FAULTY}:loss"):
        assert named(spec) is faulty.loss
    assert named("check.faulty:Layer.scaled") is faulty.Layer.scaled
    name = name_of(faulty.turned.__wrapped__)
    assert name == ("check.faulty", "turned.__wrapped__", FAULTY.parent.parent)
    assert name_of(jnp.tanh) == ("jax.numpy", "tanh", None)
    assert name_of(lambda x: x) is None


def test_a_file_whose_name_is_taken(tmp_path):
    (tmp_path / "json.py").write_text("def f():\n    return 1\n")
    f = named(f"{tmp_path / 'json.py'}:f")
    assert f() == 1
    assert json.loads("1") == 1
    name = name_of(f)
    assert name is not None and (name.module, name.attribute) == (tmp_path / "json.py", "f")


def test_a_file_in_a_package(tmp_path):
    package = tmp_path / "shapely" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "a.py").write_text("from .b import f\n")
    (package / "b.py").write_text("def f():\n    return 2\n")
    f = named(f"{package / 'a.py'}:f")
    assert f() == 2
    assert name_of(f) == ("shapely.inner.b", "f", tmp_path)


def test_a_rule_in_a_run():
    call = functools.partial(rule_in, faulty.loss, **faulty.arguments())
    rule, static = call(name="settled")
    assert rule is faulty.settled
    assert static == {1: jnp.tanh, 2: faulty.Mode.SQUARE, 3: (2, 6)}
    assert call(name="make_power.power").rule.fun.__name__ == "power"
    with pytest.raises(funcbp.InputError, match="must call a rule power, it calls .*softmax"):
        call(name="power")
    with pytest.raises(funcbp.InputError, match="at least 2 times"):
        call(name="settled", number=1)


# --- written tests


def pytest_in(folder, *files):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *files],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_written_tests_fail_until_the_rules_are_repaired(tmp_path):
    copied = tmp_path / "src" / "faulty.py"
    copied.parent.mkdir()
    shutil.copy(FAULTY, copied)
    (tmp_path / "tests").mkdir()
    module = sys.modules[named(f"{copied}:loss").__module__]

    by_keyword = audit(module.loss, thorough=False, **module.arguments())
    assert {f.rule.split(" (")[0] for f in by_keyword.wrong} == {
        "settled", "affine", "picked", "dropped", "turned", "Layer.scaled", "make_power.power",
        "centred", "make_mapped.mapped",
    }  # fmt: skip
    reports = {
        "keyword": by_keyword,
        "explored": check_rule(module.doubled, jnp.asarray([1.0, 2.0, 3.0])),
        "reference": check_rule(
            module.hand, *module.POSITIONAL, reference=module.reference, thorough=False
        ),
    }
    with jax.enable_x64(True):
        z = jnp.asarray([1.5 - 2j, 2.0 + 1j])
        reports["double"] = check_rule(module.turned.__wrapped__, z, z, thorough=False)
    count = 0
    for name, report in reports.items():
        tests = report.write_test(tmp_path / "tests" / f"test_{name}.py")
        assert len(tests) == len(report.wrong) > 0
        count += len(tests)
    assert count == 12

    # From another folder, in a fresh interpreter.
    broken = pytest_in("/", str(tmp_path / "tests"))
    assert f"{count} failed" in broken.stdout, broken.stdout
    assert len(re.findall(r"^E +funcbp\S+WrongRule: ", broken.stdout, re.MULTILINE)) == count
    copied.write_text(FAULTY.read_text().replace("WRONG = True", "WRONG = False"))
    repaired = pytest_in("/", str(tmp_path / "tests"))
    assert f"{count} passed" in repaired.stdout, repaired.stdout


def test_a_rule_that_cannot_be_had_is_asked_for(tmp_path):
    power = faulty.make_power(3)
    report = audit(lambda x: power(x).sum(), jnp.asarray([1.0, 2.0]), thorough=False)
    path = tmp_path / "test_local.py"
    (name,) = report.write_test(path)
    with pytest.raises(AssertionError, match="build the rule"):
        runpy.run_path(str(path))[name]()
    # Once it is there, the test is whole.
    path.write_text(path.read_text().replace("rule = None", "rule = power"))
    with pytest.raises(WrongRule, match="scale of x"):
        runpy.run_path(str(path), {"power": power})[name]()


def test_an_audit_is_repeated_where_nothing_less_shows_the_fault(tmp_path, monkeypatch):
    report = audit(faulty.small, jnp.asarray([1.0, 2.0]), thorough=False, seed=3)

    def never(*_):
        raise written.NotShown("alone")

    monkeypatch.setattr(written, "shows", never)
    (name,) = report.write_test(tmp_path / "test_whole.py")
    test = runpy.run_path(str(tmp_path / "test_whole.py"))[name]
    text = (tmp_path / "test_whole.py").read_text()
    assert "funcbp.audit(small, *given, seed=3)" in text
    with pytest.raises(WrongRule, match="scale of x"):
        test()


def test_nothing_is_written_where_nothing_is_wrong(tmp_path):
    assert Report("loss", findings()[2:], 1.0).write_test(tmp_path / "test_x.py") == ()
    assert not list(tmp_path.iterdir())


# --- the command


def command(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["funcbp", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, err = capsys.readouterr()
    return exit.value.code, out, err


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file in a folder of its own."""
    (tmp_path / "model.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "@jax.custom_vjp\n"
        "def scaled(x): return 2 * x\n"
        "scaled.defvjp(lambda x: (2 * x, None), lambda _, dy: (3 * dy,))\n"
        "def loss(x): return scaled(x).sum()\n"
        "def fine(x, y): return (x * y).sum()\n"
        "def raises(x): raise ValueError('first line\\nsecond line')\n"
        "def arguments(): return (jnp.arange(3.0) + 1,)\n"
        "def by_name(): return dict(x=jnp.ones(3), y=jnp.ones(3))\n"
        "def array(): return jnp.ones(3)\n"
        "given = (jnp.ones(3),)\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in ("model", "broken", "exits"):
        sys.modules.pop(name, None)


def test_the_command(model):
    done = subprocess.run(
        [sys.executable, "-m", "funcbp.cli", "audit", "model.py:loss", "--args", "model:arguments",
         "--json", "r.json", "--html", "r.html", "--write-test", "test_r.py"],
        cwd=model, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "WRONG  scaled  model.py:2" in done.stdout
    assert "1 test fails today: test_r.py" in done.stdout
    assert json.loads((model / "r.json").read_text())["findings"][0]["cause"] == "scale"
    assert "scaled" in (model / "r.html").read_text()


def test_the_command_finds_nothing_wrong(model, monkeypatch, capsys):
    wanted = "--write-test", "test_r.py", "--quick"
    code, out, err = command(
        monkeypatch, capsys, "model:fine", "--args", "model.py:by_name", *wanted
    )
    assert (code, err) == (0, "")
    assert "fine: 0 rules" in out and "no test is written" in out
    assert not (model / "test_r.py").exists()


def test_the_command_expects(model, monkeypatch, capsys):
    expected = "--expect", "scaled=surrogate", "--quick"
    code, out, err = command(monkeypatch, capsys, "model:loss", "--args", "model:given", *expected)
    assert (code, err) == (0, "")
    assert "1 surrogate" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model", "--args", "model:given"), "named MODULE:FUNCTION"),
        (("nowhere.at_all:f", "--args", "model:given"), "no module nowhere.at_all"),
        (("nowhere.py:f", "--args", "model:given"), "no file nowhere.py"),
        (("model:los", "--args", "model:given"), "model has no los; is it loss?"),
        (("model:loss", "--args", "model:nothing_like_it"), "model has no nothing_like_it"),
        (("broken:f", "--args", "model:given"), "No module named 'nothing_of_this_name'"),
        (("exits.py:f", "--args", "model:given"), "importing exits.py raises SystemExit: 3"),
        (("model:given", "--args", "model:given"), "model:given must be a function, got tuple"),
        (("model:loss", "--args", "model:array"), "must give a tuple of arguments"),
        (("model:loss", "--args", "model:loss"), "missing 1 required positional argument"),
        (("model:loss", "--args", "model:by_name"), "unexpected keyword argument 'y'"),
        (("model:raises", "--args", "model:given"), "ValueError: first line second line"),
        (("model:loss", "--args", "model:given", "--json", "no/folder/r.json"), "cannot write"),
        (("model:loss", "--args", "model:given", "--html", "."), "cannot write"),
        (("model:loss", "--args", "model:given", "--write-test", "no/t.py"), "cannot write"),
        (("model:loss", "--args", "model:given", "--expect", "scaled"), "RULE=VERDICT"),
        (("model:loss", "--args", "model:given", "--expect", "scaled=good"), "must be one of"),
        (("model:loss",), "--args"),
    ],
    ids=lambda v: "-".join(v)[-40:] if isinstance(v, tuple) else "",
)
def test_what_cannot_run_is_said_in_one_line(model, monkeypatch, capsys, arguments, said):
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("funcbp: ")
    assert said in err
    assert {p.name for p in model.iterdir()} - {"__pycache__"} == {
        "model.py",
        "broken.py",
        "exits.py",
    }
