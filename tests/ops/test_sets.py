"""Segments, gather, scatter_add and experts, against jax.ops, jnp indexing and loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp import InputError, ops

few = settings(max_examples=8, deadline=None, derandomize=True)
# Rows, columns, segments, and the seed of the values.
shapes = st.tuples(st.integers(0, 7), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))


def drawn(shape):
    """data, ids (some of them out of range) and the number of segments."""
    n, columns, segments, seed = shape
    rng = np.random.default_rng(seed)
    data = rng.integers(-3, 4, (n, columns)).astype(np.float32)  # with ties
    return data, rng.integers(-1, segments + 1, n), segments, rng


def by_loop(reduce, data, ids, segments, empty):
    """reduce, over the rows of each segment."""
    groups = [data[ids == s].astype(np.float64) for s in range(segments)]
    return np.stack([reduce(g) if len(g) else np.full(data.shape[1], empty) for g in groups])


def pulled_back(f, x, dy):
    @jax.jit
    def run(x, dy):
        y, pullback = jax.vjp(f, x)
        return y, pullback(dy)[0]

    return [np.asarray(v) for v in run(x, dy)]


def close(got, exact, terms=1):
    """Within the rounding of so many additions of float32."""
    exact = np.asarray(exact, np.float64)
    size = np.max(np.abs(exact), initial=1.0, where=np.isfinite(exact))
    np.testing.assert_allclose(got, exact, rtol=0, atol=(terms + 3) * 2.0**-23 * size)


@few
@given(shapes)
def test_segment_sum_and_mean(shape):
    data, ids, segments, rng = drawn(shape)
    dy = rng.integers(-3, 4, (segments, data.shape[1])).astype(np.float32)
    inside = (ids >= 0) & (ids < segments)
    rows = np.where(inside, ids, 0)
    y, dx = pulled_back(lambda x: ops.segment_sum(x, ids, segments), data, dy)
    np.testing.assert_array_equal(y, by_loop(lambda g: g.sum(0), data, ids, segments, 0))
    np.testing.assert_array_equal(dx, np.where(inside[:, None], dy[rows], 0))
    y, dx = pulled_back(lambda x: ops.segment_mean(x, ids, segments), data, dy)
    count = np.maximum(np.bincount(ids[inside], minlength=segments), 1)
    close(y, by_loop(lambda g: g.mean(0), data, ids, segments, 0))
    close(dx, np.where(inside[:, None], (dy / count[:, None])[rows], 0))


@few
@given(shapes)
def test_segment_max_shares_between_ties(shape):
    data, ids, segments, rng = drawn(shape)
    dy = rng.integers(-3, 4, (segments, data.shape[1])).astype(np.float32)
    y, dx = pulled_back(lambda x: ops.segment_max(x, ids, segments), data, dy)
    np.testing.assert_array_equal(y, by_loop(lambda g: g.max(0), data, ids, segments, -np.inf))
    expected = np.zeros(data.shape)
    for s in range(segments):
        tied = (data == y[s]) & (ids == s)[:, None]
        expected += tied * dy[s] / np.maximum(tied.sum(0), 1)
    close(dx, expected)
    theirs = pulled_back(lambda x: jax.ops.segment_max(x, ids, segments), data, dy)[1]
    close(theirs, expected)


@few
@given(shapes)
def test_segment_softmax(shape):
    data, ids, segments, rng = drawn(shape)
    dy = rng.integers(-3, 4, data.shape).astype(np.float32)
    y, dx = pulled_back(lambda x: ops.segment_softmax(x, ids, segments), data, dy)
    exact, dexact = np.zeros(data.shape), np.zeros(data.shape)
    for s in range(segments):
        e = np.exp(data[ids == s].astype(np.float64))
        p = exact[ids == s] = e / e.sum(0)
        dexact[ids == s] = p * (dy[ids == s] - (p * dy[ids == s]).sum(0))
    close(y, exact, len(data))
    close(dx, dexact, 3 * len(data))


def test_the_number_of_segments_is_read_from_concrete_ids():
    x, ids = jnp.arange(4.0), jnp.array([0, 3, 3, -1])
    for name in ("segment_sum", "segment_mean", "segment_max"):
        assert getattr(ops, name)(x, ids).shape == (4,)
    np.testing.assert_array_equal(ops.segment_sum(x, ids), jax.ops.segment_sum(x, ids))
    dx = jax.grad(lambda x: ops.segment_sum(x, ids)[3])(x)
    np.testing.assert_array_equal(dx, [0, 1, 1, 0])
    close(
        ops.segment_softmax(x, jnp.array([0, 1, 1, 0])),
        [1 / (1 + np.e**3), 1 / (1 + np.e), 1 / (1 + 1 / np.e), 1 / (1 + np.e**-3)],
    )
    with pytest.raises(InputError, match="num_segments must be given where segment_ids is traced"):
        jax.jit(ops.segment_sum)(x, ids)
    with pytest.raises(InputError, match="segment_ids is empty"):
        ops.segment_max(x[:0], ids[:0])


def test_sums_of_bfloat16_do_not_stop_growing():
    x, ids = jnp.ones(1000, jnp.bfloat16), jnp.zeros(1000, jnp.int32)
    assert ops.segment_sum(x, ids, 1) == 1000
    assert ops.segment_mean(x, ids, 1) == 1
    dx = jax.grad(lambda x: ops.gather(x, ids).sum().astype(jnp.float32))(x)
    assert dx[0] == 1000
    assert ops.scatter_add(x[:1], ids, x) == 1000  # 1001, rounded to bfloat16's 4


@few
@given(shapes, st.integers(0, 1))
def test_gather_and_scatter_add_are_jnp_indexing(shape, axis):
    k, columns, n, seed = shape
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (n, columns)).astype(np.float32)
    ids = rng.integers(-n - 1, n + 1, k)
    inside = (ids >= -n) & (ids < n)
    u = rng.integers(-3, 4, (k, columns)).astype(np.float32)
    expected = np.where(inside[:, None], x[np.where(inside, ids, 0)], 0)
    added = np.zeros_like(x)
    np.add.at(added, ids[inside], u[inside])

    def turned(v):
        return v.T if axis else v

    y, dx = pulled_back(lambda x: ops.gather(x, ids, axis=axis), turned(x), turned(u))
    np.testing.assert_array_equal(y, turned(expected))
    np.testing.assert_array_equal(dx, turned(added))
    y, dx = pulled_back(lambda x: ops.scatter_add(x, ids, u), x, x)
    np.testing.assert_array_equal(y, x + added)
    np.testing.assert_array_equal(dx, x)
    du = pulled_back(lambda u: ops.scatter_add(jnp.zeros_like(x), ids, u), u, x)[1]
    np.testing.assert_array_equal(du, expected)


@few
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(["chosen", "all"]), st.data())
def test_top_k_routing(tokens, experts, over, data):
    k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(tokens)
    logits = rng.integers(-2, 3, (tokens, experts)).astype(np.float32)  # with ties
    weights, ids = ops.top_k_routing(logits, k, over=over)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    e = np.exp(logits.astype(np.float64))
    mask = np.zeros(e.shape)
    np.put_along_axis(mask, order, 1, axis=1)
    total = (e * (mask if over == "chosen" else 1)).sum(1, keepdims=True)
    close(weights, np.take_along_axis(e / total, order, axis=1), experts)
    dw = rng.integers(-3, 4, (tokens, k)).astype(np.float32)
    dl = pulled_back(lambda v: ops.top_k_routing(v, k, over=over)[0], logits, dw)[1]
    dp = np.zeros(e.shape)
    np.put_along_axis(dp, order, dw, axis=1)
    p = e / total * (mask if over == "chosen" else 1)
    close(dl, p * (dp - (p * dp).sum(1, keepdims=True)), 3 * experts)


def test_a_mixture_is_its_experts_one_by_one():
    rng = np.random.default_rng(3)
    x, w_in, w_out = (rng.standard_normal(s) for s in ((6, 3), (3, 3, 5), (3, 5, 2)))
    ids = np.array([[0, 2], [2, 2], [-1, 1], [3, 0], [2, 0], [-2, 7]])
    p = rng.random(ids.shape)

    def loop(x, p, w_in, w_out):
        total = [jnp.zeros(2)] * len(x)
        for t, j in np.ndindex(ids.shape):
            g = ids[t, j]
            if 0 <= g < 3:
                total[t] += p[t, j] * (jnp.tanh(x[t] @ w_in[g]) @ w_out[g])
        return jnp.stack(total)

    def ours(x, p, w_in, w_out):
        return ops.mixture_of_experts(x, p, ids, w_in, w_out, activation="tanh")

    dy = rng.standard_normal((6, 2))
    with jax.enable_x64(True):
        (y, pullback), (exact, exact_pullback) = (
            jax.vjp(f, x, p, w_in, w_out) for f in (ours, loop)
        )
        grads, dexact = (jax.jit(f)(jnp.asarray(dy)) for f in (pullback, exact_pullback))
        for got, wanted in zip((y, *grads), (exact, *dexact), strict=True):
            scale = float(jnp.max(jnp.abs(wanted)))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e2 * 2.0**-52 * scale)
        assert not np.any(grads[0][5]) and not np.any(grads[1][5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: ops.segment_sum(x, i[:2], 3), "one for each row of data"),
        (lambda x, i: ops.segment_mean(x, x[:, 0], 3), "integers, one for each"),
        (lambda x, i: ops.segment_max(x, i, -1), "num_segments must be an integer from 0"),
        (lambda x, i: ops.gather(x, i, axis=2), "axis must be from 0 to 1"),
        (lambda x, i: ops.gather(x, x), "indices must be integers"),
        (lambda x, i: ops.scatter_add(x, i, x[:, :1]), "updates must have the shape of indices"),
        (lambda x, i: ops.top_k_routing(x, 3), "k must be from 1"),
        (lambda x, i: ops.top_k_routing(x, 1, over="none"), 'over must be "chosen" or "all"'),
        (lambda x, i: ops.routing_weights(x, i), "must have shapes"),
        (lambda x, i: ops.mixture_of_experts(x, x, i, x, x), "expert_ids must both have shape"),
    ],
)
def test_errors_say_what_must_hold(call, message):
    with pytest.raises(InputError, match=message):
        call(jnp.ones((3, 2)), jnp.arange(3))
