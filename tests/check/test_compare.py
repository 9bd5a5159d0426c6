"""The yardstick: what it accepts, what it finds, and that it can find small faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbp import Case, InputError
from funcbp.case import values
from funcbp.check import WrongRule, compare, saved_bytes


def with_rule(f, bwd):
    """A jax.custom_vjp of f whose rule saves the arguments."""
    rule = jax.custom_vjp(f)
    rule.defvjp(lambda *args: (f(*args), args), bwd)
    return rule


def product(x, w):
    return jnp.tanh(x @ w)


def product_bwd(saved, dy):
    x, w = saved
    dz = dy * (1 - jnp.tanh(x @ w) ** 2)
    return dz @ w.T, x.T @ dz


X, W = (
    jnp.asarray(np.random.default_rng(1).standard_normal(s), jnp.float32) for s in ((5, 4), (4, 3))
)


def test_a_bare_custom_vjp_brings_its_reference():
    result = compare(with_rule(product, product_bwd), X, W)
    assert result.ok
    assert [row.what for row in result.rows] == [
        "cotangent of argument 0",
        "cotangent of argument 1",
        "value",
    ]


def test_a_wrong_argument_is_named_with_what_it_should_be():
    def bwd(saved, dy):
        dx, dw = product_bwd(saved, dy)
        return dx, dw.at[2, 1].multiply(1.001)

    result = compare(with_rule(product, bwd), X, W)
    assert [row.what for row in result.rows if not row.ok] == ["cotangent of argument 1"]
    (row,) = (row for row in result.rows if not row.ok)
    assert row.index == (2, 1)
    assert row.got == pytest.approx(1.001 * row.truth, rel=1e-5)
    with pytest.raises(WrongRule, match=r"WRONG at \[2, 1\]"):
        result.raise_if_wrong()


def test_a_small_element_does_not_hide_behind_a_large_one():
    """Off by one part in a thousand where the true element is 1e-8 of the largest."""
    scale = jnp.array([1.0, 1e-8])
    rule = with_rule(lambda x: x * scale, lambda saved, dy: (dy * scale * jnp.array([1, 1.001]),))
    result = compare(rule, Case("two", (4, 2)))
    assert not result.ok


def test_a_wrong_value_is_found():
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (jnp.sin(x) * 1.00001, x), lambda x, dy: (jnp.cos(x) * dy,))
    result = compare(rule, Case("odd", (3, 5)))
    assert [row.what for row in result.rows if not row.ok] == ["value"]


def test_nan_in_the_rule_alone_is_wrong_and_in_both_is_not():
    rule = with_rule(lambda x: x**2, lambda saved, dy: (dy * 2 * saved[0] ** 2 / saved[0],))
    assert not compare(rule, Case("zero", values([0.0, 1.0]))).ok
    assert compare(jnp.sqrt, Case("zero", values([-1.0, 1.0])), reference=jnp.sqrt).ok


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_is_not_called_wrong(dtype):
    """A right rule that rounds in other places than autodiff does."""
    rule = with_rule(product, product_bwd)
    assert compare(rule, X.astype(dtype), W.astype(dtype)).ok


def test_float64_arguments_are_compared_in_float64():
    with jax.enable_x64(True):
        x, w = jnp.asarray(np.asarray(X, np.float64)), jnp.asarray(np.asarray(W, np.float64))
        rows = compare(with_rule(product, product_bwd), x, w).rows
    assert {row.dtype for row in rows} == {"float64"}
    assert all(row.ok for row in rows)


def test_complex_arguments():
    rule = with_rule(lambda z: z**2, lambda saved, dy: (2 * saved[0] * dy,))
    wrong = with_rule(lambda z: z**2, lambda saved, dy: (2 * jnp.conj(saved[0]) * dy,))
    z = X + 1j * X[::-1]
    assert compare(rule, z).ok
    assert not compare(wrong, z).ok


def test_a_reference_is_needed():
    with pytest.raises(InputError, match="reference must be given"):
        compare(lambda x: x, X)


def test_saved_bytes_counts_what_is_not_an_argument():
    assert saved_bytes(with_rule(product, product_bwd), X, W) == 0
    assert saved_bytes(jnp.exp, X) == X.nbytes
