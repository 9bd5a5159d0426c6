"""Recurrences against JAX's and torch's own, and against float64, at lengths that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import funcbp
from funcbp.ops import (
    cummax,
    cumprod,
    cumsum,
    gated_linear_attention,
    linear_recurrence,
    selective_scan,
)

few = settings(derandomize=True, deadline=None, max_examples=5)
# Relative to the largest number; what float64 loses in sums of other order.
CLOSE = 1e-12


def pulled(f, args, seed=0):
    """Value and cotangents, with the same random cotangent of the value."""
    y = jax.eval_shape(f, *args)
    dy = jnp.asarray(np.random.default_rng(seed).standard_normal(y.shape), y.dtype)

    @jax.jit
    def run(args, dy):
        y, pullback = jax.vjp(f, *args)
        return y, *pullback(dy)

    return run(args, dy)


def assert_equal(f, reference, args):
    for got, expected in zip(pulled(f, args), pulled(reference, args), strict=True):
        scale = np.max(np.abs(expected), initial=0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE * scale)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def by_tree(a, b, h0, reverse):
    """The recurrence by an associative scan along the first axis."""

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    factor, h = jax.lax.associative_scan(then, (a, b), reverse=reverse)
    return h + factor * h0


@few
@given(st.integers(1, 9), st.sampled_from([1, 40]), st.booleans(), st.integers(0, 99))
def test_linear_recurrence_is_the_associative_scan(t, d, reverse, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        args = normal(rng, t, d), normal(rng, t, d), normal(rng, d)
        assert_equal(
            lambda a, b, h0: linear_recurrence(a, b, h0, reverse=reverse),
            lambda a, b, h0: by_tree(a, b, h0, reverse),
            args,
        )


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (40,), (1, 40), (2, 5, 1), (2, 1, 40)])
@pytest.mark.parametrize("axis", [-2, 2])
def test_a_broadcast_factor_is_the_same_as_one_written_out(shape, axis):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        args = normal(rng, *shape), normal(rng, 2, 5, 40)
        assert_equal(
            lambda a, b: linear_recurrence(a, b, axis=axis),
            lambda a, b: linear_recurrence(jnp.broadcast_to(a, b.shape), b, axis=axis),
            args,
        )


def test_loop_and_tree_are_the_same(monkeypatch):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        args = normal(rng, 7, 40), normal(rng, 7, 40), normal(rng, 40)
        x = args[0]
        both = []
        for row in (1, 1000):  # numbers in a row from which it is a loop
            monkeypatch.setattr(funcbp.ops._recurrence, "ROW", row)
            jax.clear_caches()
            both.append([
                *pulled(lambda a, b, h0: linear_recurrence(a, b, h0), args),
                *(r for f in (cumsum, cumprod, cummax) for r in pulled(lambda x, f=f: f(x), (x,))),
            ])  # fmt: skip
        for one, other in zip(*both, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=CLOSE * np.max(np.abs(other)))


def test_ten_thousand_steps_stay_near_float64():
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.uniform(0.9, 1, (10_000, 33)), jnp.float32)
    b = jnp.asarray(rng.standard_normal((10_000, 33)), jnp.float32)
    funcbp.check.compare(linear_recurrence, a, b).raise_if_wrong()


@few
@given(
    st.sampled_from(["cumsum", "cumprod", "cummax"]),
    st.sampled_from([(1, 40), (6, 40), (6, 2), (0, 3), (3,)]),
    st.integers(0, 1),
    st.booleans(),
)
def test_running_ops_are_those_of_jax(name, shape, axis, reverse):
    axis = min(axis, len(shape) - 1)
    ours, theirs = getattr(funcbp.ops, name), getattr(jax.lax, name)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        x = normal(rng, *shape)
        assert_equal(lambda x: ours(x, axis, reverse), lambda x: theirs(x, axis, reverse), (x,))


@pytest.mark.parametrize("zeros", [[2], [0], [1, 3], [0, 4]])
def test_the_gradient_of_cumprod_at_zeros_is_that_of_the_product_written_out(zeros):
    with jax.enable_x64(True):
        x = jnp.asarray([1.5, -2.0, 0.5, 3.0, -1.0]).at[jnp.asarray(zeros)].set(0)
        dy = jnp.asarray([1.0, -0.5, 2.0, 0.25, -3.0])
        (got,) = jax.vjp(cumprod, x)[1](dy)
        for j in range(5):
            expected = sum(
                dy[i] * np.prod(np.delete(np.asarray(x[: i + 1]), j)) for i in range(j, 5)
            )
            np.testing.assert_allclose(got[j], expected, rtol=1e-15)


def test_equal_maxima_send_the_cotangent_to_the_first():
    x = jnp.asarray([1.0, 1.0, 0.0, 3.0, 3.0])
    dy = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0])
    assert list(jax.vjp(cummax, x)[1](dy)[0]) == [7, 0, 0, 24, 0]
    assert list(jax.vjp(lambda x: cummax(x, 0, True), x)[1](dy)[0]) == [0, 0, 0, 0, 31]


@few
@given(st.integers(1, 9), st.sampled_from([1, 3, 4, 16]), st.booleans(), st.integers(0, 99))
def test_selective_scan_at_any_chunk(t, chunk, skip, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        args = [
            normal(rng, 2, t, 3),
            jnp.abs(normal(rng, 2, t, 3)),
            -jnp.abs(normal(rng, 3, 2)),
            normal(rng, 2, t, 2),
            normal(rng, 2, t, 2),
        ]
        args += [normal(rng, 3)] if skip else []
        assert_equal(lambda *args: selective_scan(*args, chunk=chunk), selective_scan.plain, args)


def attention_matrix(q, k, v, g):
    """The op as attention: all pairs of steps, in full."""
    between = jnp.cumsum(g, axis=1)
    between = between[:, :, None] - between[:, None]
    steps = jnp.arange(q.shape[1])
    earlier = (steps[:, None] >= steps)[:, :, None, None]
    fade = jnp.exp(jnp.where(earlier, between, -jnp.inf))
    return jnp.einsum("bthd,bshd,btshd,bshe->bthe", q, k, fade, v)


@few
@given(st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_gated_linear_attention_is_attention_that_fades(t, chunk, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        q, k, v = normal(rng, 2, t, 2, 3), normal(rng, 2, t, 2, 3), normal(rng, 2, t, 2, 1)
        g = -jnp.abs(normal(rng, 2, t, 2, 3))
        args = q, k, v, g
        assert_equal(
            lambda *args: gated_linear_attention(*args, chunk=chunk), attention_matrix, args
        )


def test_closed_and_nearly_closed_gates_stay_finite():
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 1, 2)), jnp.float32) for _ in range(3))
    for g in (jnp.full(q.shape, -1e4), jnp.full(q.shape, -jnp.inf)):
        o, dq, dk, dv, dg = pulled(lambda *args: gated_linear_attention(*args), (q, k, v, g))
        alone = jnp.sum(q * k, axis=-1, keepdims=True)
        np.testing.assert_allclose(o, alone * v, rtol=4e-7, atol=4e-7)
        assert all(jnp.all(jnp.isfinite(d)) for d in (dq, dk, dv))
        assert not jnp.any(dg)


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax"])
def test_running_ops_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(6).standard_normal((40, 5))
    ours = np.asarray([*map(np.asarray, _in_float64(getattr(funcbp.ops, name), x))])
    given = torch.from_numpy(x).requires_grad_()
    y = getattr(torch, name)(given, 0)
    y = y if name != "cummax" else y.values
    (dx,) = torch.autograd.grad(y, given, torch.cos(y.detach()))
    for got, expected in zip(ours, (y.detach().numpy(), dx.numpy()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE * np.max(np.abs(expected)))


def _in_float64(f, x):
    with jax.enable_x64(True):
        y, pullback = jax.vjp(f, jnp.asarray(x))
        return y, *pullback(jnp.cos(y))


ONES = jnp.ones


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_recurrence(ONES(3), ONES(3)), "axis=0"),
        (lambda: linear_recurrence(ONES((4, 2)), ONES((3, 2))), "a must broadcast"),
        (lambda: linear_recurrence(ONES((3, 2)), ONES((3, 2)), ONES(3)), "h0 must have"),
        (lambda: cumsum(ONES(3), -1), "count a last axis"),
        (lambda: selective_scan(*[ONES((2, 2))] * 5), "x and delta"),
        (lambda: selective_scan(*_mamba(A=ONES((2, 2)))), "A must be"),
        (lambda: selective_scan(*_mamba(C=ONES((1, 4, 3)))), "C must be"),
        (lambda: selective_scan(*_mamba(D=ONES(2))), "D must be"),
        (lambda: selective_scan(*_mamba(), chunk=0), "at least 1"),
        (lambda: gated_linear_attention(*[ONES((2, 3, 4))] * 4), "q, k and g"),
        (
            lambda: gated_linear_attention(
                *[ONES((1, 2, 3, 4))] * 2, ONES((1, 2, 2, 4)), ONES((1, 2, 3, 4))
            ),
            "v must be",
        ),
        (lambda: gated_linear_attention(*[ONES((1, 2, 3, 4))] * 4, chunk=3), "power of two"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(funcbp.InputError, match=message):
        call()


def _mamba(**changed):
    arrays = {
        "x": ONES((1, 4, 3)),
        "delta": ONES((1, 4, 3)),
        "A": ONES((3, 2)),
        "B": ONES((1, 4, 2)),
        "C": ONES((1, 4, 2)),
        "D": None,
    }
    return (arrays | changed).values()
