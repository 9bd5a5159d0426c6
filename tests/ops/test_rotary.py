"""Rotary embedding and linear attention biases, against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp import InputError, ops
from funcbp.check.compare import saved_bytes

few = settings(max_examples=8, deadline=None, derandomize=True)


def pulled_back(f, x, dy):
    @jax.jit
    def run(x, dy):
        y, pullback = jax.vjp(f, x)
        return y, pullback(dy)[0]

    return [np.asarray(v) for v in run(x, dy)]


def turned(x, positions, base):
    """x as complex numbers times e^(i angle), in float64."""
    n = x.shape[-1] // 2
    angle = positions[..., None, None] * float(base) ** (-np.arange(n) / max(n, 1))
    z = (x[..., :n].astype(np.float64) + 1j * x[..., n:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


@few
@given(
    st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 2), st.integers(0, 3)),
    st.sampled_from([100.0, 10_000.0]),
    st.booleans(),
)
def test_rotary(shape, base, shared):
    batch, time, heads, n = shape
    rng = np.random.default_rng(time)
    x, dy = rng.standard_normal((2, batch, time, heads, 2 * n)).astype(np.float32)
    positions = rng.integers(-9, 10_000, (time,) if shared else (batch, time))
    y, dx = pulled_back(lambda x: ops.rotary(x, positions, base=base), x, dy)
    # The angle is off by 7e-10 of the position, at most, and by its rounding.
    bound = (7e-10 * 10_000 + 6 * 2.0**-23) * 8
    np.testing.assert_allclose(y, turned(x, positions, base), rtol=0, atol=bound)
    np.testing.assert_allclose(dx, turned(dy, -positions, base), rtol=0, atol=bound)


def test_rotary_keeps_the_digits_of_far_positions():
    x = np.random.default_rng(0).standard_normal((3, 1, 64)).astype(np.float32)
    positions = np.array([100_000, 131_071, -99_999])
    exact = turned(x, positions, 10_000.0)
    error, of_plain = (
        np.max(np.abs(np.asarray(f(jnp.asarray(x), jnp.asarray(positions))) - exact))
        for f in (ops.rotary, ops.rotary.plain)
    )
    assert error < 131_071 * 7e-10 * 4 + 2.0**-20
    assert error < of_plain / 10


def test_a_score_depends_on_the_distance_alone():
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 8)).astype(np.float32)
    scores = [
        np.sum(ops.rotary(q, np.array([p])) * ops.rotary(k, np.array([p - 3]))) for p in (3, 5000)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-4)


def test_rotary_keeps_nothing_of_the_size_of_x():
    x, positions = jnp.ones((32, 4, 16)), jnp.arange(32)
    assert saved_bytes(ops.rotary, x, positions) == 0
    assert saved_bytes(ops.rotary.plain, x, positions) > 0


@few
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 5))
def test_alibi_bias(heads, t, s):
    slopes = np.asarray(ops.alibi_slopes(heads))
    expected = np.zeros((heads, t, s))
    for h, i, j in np.ndindex(heads, t, s):
        expected[h, i, j] = -slopes[h] * abs(i + s - t - j)
    dy = np.random.default_rng(0).integers(-3, 4, expected.shape).astype(np.float32)
    bias, dm = pulled_back(lambda m: ops.alibi_bias(m, query_length=t, key_length=s), slopes, dy)
    np.testing.assert_array_equal(bias, expected.astype(np.float32))
    np.testing.assert_array_equal(dm, np.sum(dy * expected / slopes[:, None, None], axis=(1, 2)))


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_array_equal(ops.alibi_slopes(8), 2.0 ** -np.arange(1.0, 9.0))
    # Its code for 12 heads: those of 8, then the odd ones of 16.
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    np.testing.assert_array_equal(ops.alibi_slopes(12), np.float32(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rotary(jnp.ones((2, 1, 3)), jnp.arange(2)), "even number of features"),
        (lambda: ops.rotary(jnp.ones((2, 1, 4)), jnp.arange(3)), "positions must be integers"),
        (lambda: ops.rotary(jnp.ones((2, 1, 4)), jnp.ones(2)), "positions must be integers"),
        (
            lambda: ops.alibi_bias(jnp.ones((2, 1)), query_length=2, key_length=2),
            "slopes must have shape",
        ),
        (lambda: ops.alibi_bias(jnp.ones(2), query_length=-1, key_length=2), "at least 0"),
        (lambda: ops.alibi_slopes(0), "heads must be at least 1"),
    ],
)
def test_errors_say_what_must_hold(call, message):
    with pytest.raises(InputError, match=message):
        call()
