"""The pytest plugin, on small suites of its own."""

import json
import re

import pytest

pytest_plugins = ["pytester"]

RULES = """
import functools

import jax
import jax.numpy as jnp


def rule(fun, fwd, bwd):
    f = jax.custom_vjp(fun)
    f.defvjp(fwd, bwd)
    return f


def product(x, w):
    return jnp.sin(x) * w
def product_fwd(x, w):
    return product(x, w), (x, w)
def product_bwd(saved, dy):
    x, w = saved
    return 2 * dy * jnp.cos(x) * w, dy * jnp.sin(x)
wrong = rule(product, product_fwd, product_bwd)


def straight_through(x):
    return jnp.round(x)
def straight_through_fwd(x):
    return jnp.round(x), None
def straight_through_bwd(_, dy):
    return (dy,)
surrogate = rule(straight_through, straight_through_fwd, straight_through_bwd)


def hyperbolic(x):
    return jnp.tanh(x)
def hyperbolic_fwd(x):
    y = jnp.tanh(x)
    return y, y
def hyperbolic_bwd(y, dy):
    return (dy * (1 - y * y),)
right = rule(hyperbolic, hyperbolic_fwd, hyperbolic_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(x, n=2):
    return x**n
@power.defjvp
def power_jvp(n, primals, tangents):
    (x,), (dx,) = primals, tangents
    # Wrong for one setting, which is not the first that is seen.
    return x**n, (n - (n == 3)) * x ** (n - 1) * dx
"""

# Each of these passes, and would be changed by a callback beside the rule, by a kept tracer or by
# a kept view of a buffer.
SUITE = """
import threading
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rules

jax.config.update("jax_enable_x64", True)
TRACED = []
AT_IMPORT = jax.jit(jax.grad(lambda x: rules.right(x).sum()))(jnp.ones(2, jnp.float32))


@pytest.fixture(scope="module")
def weights():
    made = {"w": jnp.arange(1.0, 4.0)}
    yield made
    made.clear()


@jax.jit
def loss(x, w):
    TRACED.append(1)
    return rules.wrong(x, w).sum()


def test_grad_inside_jit(weights):
    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(jnp.arange(3.0), weights["w"])
    assert dw.dtype == jnp.float64


def test_compiles_once(weights):
    before = len(TRACED)
    loss(jnp.arange(3.0), weights["w"])
    loss(jnp.arange(3.0), weights["w"])
    assert len(TRACED) - before <= 1


def test_scan():
    def step(c, x):
        return rules.right(c) + x, c

    assert jnp.all(jax.lax.scan(step, jnp.zeros(2), jnp.ones((5, 2)))[0] > 1)


def test_jaxpr():
    assert "callback" not in str(jax.make_jaxpr(rules.right)(jnp.ones(5)))
    assert "callback" not in jax.jit(rules.right).lower(jnp.ones(6)).as_text()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_power(n):
    assert rules.power(2.0, n) == 2.0**n


def test_power_default():
    assert rules.power(jnp.ones(())) == 1


def test_leaks():
    with jax.checking_leaks():
        jax.jit(lambda x: rules.right(x * 2))(jnp.ones(7))


def test_donated():
    x = jnp.ones(8)
    rules.surrogate(x)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()


def test_not_jitted_and_threads():
    with jax.disable_jit(), jax.transfer_guard("disallow"):
        loss(jax.device_put(np.ones(2)), jax.device_put(np.ones(2)))
    thread = threading.Thread(target=lambda: rules.surrogate(jnp.ones(3)))
    thread.start()
    thread.join()


def test_once(counter=[]):
    counter.append(1)
    jax.jit(rules.surrogate)(jnp.ones((2, 2)))
    assert len(counter) == 1


class TestCase(unittest.TestCase):
    def test_subtests(self):
        for n in range(2):
            with self.subTest(n=n):
                jax.jit(rules.surrogate)(jnp.ones((1, 1, n + 1)))


@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert rules.right(0.5) == 0.5
"""


LOCAL = """
import jax
import rules

AT_IMPORT = rules.right(1.0)


def local(scale):
    @jax.custom_vjp
    def inner(x):
        return x * scale
    def inner_fwd(x):
        return inner(x), None
    def inner_bwd(_, dy):
        return (dy * scale,)
    inner.defvjp(inner_fwd, inner_bwd)
    return inner


def test_closes_over_a_traced_value():
    assert jax.jit(lambda x, s: local(s)(x))(2.0, 3.0) == 6


def test_noted_from_the_start():
    assert jax.custom_vjp.__call__.__module__ == "_funcbp_pytest.record"
    assert AT_IMPORT.dtype == "float64"
"""


@pytest.fixture(autouse=True)
def own_settings(pytester, monkeypatch):
    """Suites of other people: with their own settings, and warnings that are errors."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    pytester.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\n")
    pytester.makepyfile(rules=RULES)


def run(pytester, *options):
    return pytester.runpytest_subprocess("-rA", "-p", "no:cacheprovider", *options, timeout=300)


def outcomes(result):
    """The short lines of pytest's summary, each test with its outcome."""
    lines = (re.sub(r" - .*", "", line) for line in result.outlines)
    return sorted(line for line in lines if re.match(r"[A-Z]+ .*test_suite\.py", line))


def test_a_suite_as_it_is(pytester):
    pytester.makepyfile(test_suite=SUITE)
    plain = run(pytester)
    audited = run(pytester, "--audit-gradients", "--audit-json", "out.json")
    assert plain.ret == 0 and "custom gradients" not in plain.stdout.str()
    assert outcomes(audited) == outcomes(plain) and len(outcomes(plain)) == 14
    assert audited.parseoutcomes() == plain.parseoutcomes()
    assert audited.ret == 1

    result = json.loads((pytester.path / "out.json").read_text())
    found = {f["rule"]: f for f in result["findings"]}
    verdicts = {name: f["verdict"] for name, f in found.items()}
    assert verdicts == {
        "product": "wrong",
        "power": "wrong",
        "straight_through": "surrogate",
        "hyperbolic": "right",
    }
    assert not result["ok"] and result["problems"] == []
    wrong = found["product"]
    assert (wrong["cause"], wrong["argument"]) == ("scale", "x")
    assert wrong["first"] == "test_suite.py::test_grad_inside_jit"
    # The values inside jit are those of the test, in the precision of the test.
    assert "float64[3] = [0, 1, 2]" in wrong["shown"]
    assert "inside jit" in wrong["where"][0] and "test_suite.py" in wrong["where"][0]
    assert found["power"]["tests"] == 4 and found["power"]["calls"] == 4
    assert found["hyperbolic"]["first"] == ""
    assert result["unwatched"] == ["test_suite.py::test_jaxpr", "test_suite.py::test_once"]
    assert result["leak_checked"] == ["test_suite.py::test_leaks"]
    line = RULES.strip().split("\n").index("def product(x, w):") + 1
    audited.stdout.fnmatch_lines(
        [
            "*= custom gradients =*",
            f"WRONG  product  rules.py:{line}",
            "*scale of x",
            "*first called by test_suite.py::test_grad_inside_jit; *",
            "*not watched: test_suite.py::test_once *",
            "*not noted: calls on traced values in test_suite.py::test_leaks*",
            "4 rules: 2 wrong, 0 unchecked, 1 surrogate, 1 right *",
        ]
    )


def test_workers_packages_and_exit_codes(pytester):
    pytester.makepyfile(
        test_first="import rules\ndef test_a():\n    rules.wrong(0.5, 2.0)\n",
        test_second="import rules, jax\ndef test_b():\n    jax.nn.relu(rules.right(1.0))\n",
        test_third="import rules\ndef test_c():\n    rules.wrong(0.25, 2.0)\n    assert False\n",
        test_fourth="import rules\nrules.wrong(0.5, 2.0)\nraise ValueError\n",
    )
    workers = ("-n2", "--dist=loadfile", "--audit-json=out.json", "test_first.py", "test_second.py")
    both = run(pytester, "--audit-gradients", "--audit-package=rules", *workers)
    result = json.loads((pytester.path / "out.json").read_text())
    verdicts = {f["rule"]: f["verdict"] for f in result["findings"]}
    assert verdicts == {"product": "wrong", "hyperbolic": "right"}
    assert both.ret == 1 and both.parseoutcomes() == {"passed": 2}

    failing = run(pytester, "--audit-gradients", "--audit-package=jax", "test_third.py")
    assert failing.ret == 1 and failing.parseoutcomes() == {"failed": 1}
    failing.stdout.fnmatch_lines(["these tests called no custom_vjp or custom_jvp rule *"])
    stopped = run(pytester, "--audit-gradients", "test_third.py", "test_fourth.py")
    assert stopped.ret == pytest.ExitCode.INTERRUPTED
    stopped.stdout.fnmatch_lines(["the run was stopped before its end: nothing was audited"])


def test_rules_that_cannot_be_judged_and_the_environment(pytester):
    """The suite sets JAX's environment in a folder's conftest, before JAX is imported."""
    folder = pytester.mkpydir("inside")
    (folder / "conftest.py").write_text("import os\nos.environ['JAX_ENABLE_X64'] = '1'\n")
    (folder / "test_suite.py").write_text(LOCAL)
    pytester.makeconftest(
        """
        import sys

        def pytest_unconfigure(config):
            print("restored:", "funcbp" not in sys.modules["jax"].custom_vjp.__call__.__module__)
        """
    )
    result = run(pytester, "--audit-gradients", "--audit-once", "-v", "-p", "no:jaxtyping")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "unchecked  local.inner  inside/test_suite.py:*",
            "right  hyperbolic  rules.py:*",
            "2 rules: 0 wrong, 1 unchecked, 0 surrogate, 1 right *",
            "restored: True",
        ]
    )


def test_without_the_option_nothing_is_imported(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            assert "_funcbp_pytest" in sys.modules
            assert not {"jax", "funcbp", "_funcbp_pytest.run"} & set(sys.modules)
        """
    )
    assert run(pytester, "-p", "no:jaxtyping").ret == 0
