"""Attention against jax.nn's, torch's and the projections written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import funcbp
from funcbp.check.compare import saved_bytes
from funcbp.ops import _attention_blocks, dot_product_attention, multi_head_attention

few = settings(derandomize=True, deadline=None, max_examples=8)


def drawn(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def pulled(f, *arrays):
    """Value, and cotangents of a curved sum of it."""

    def loss(*arrays):
        y = f(*arrays)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    every = tuple(range(len(arrays)))
    (_, y), cotangents = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*arrays)
    return (y, *cotangents)


def assert_close(ours, truth):
    """Sums of a few dozen terms of size 1: off by a few dozen rounding errors at most."""
    for got, exact in zip(ours, truth, strict=True):
        error = 32 * np.finfo(np.float32).eps * np.max(np.abs(exact), initial=1)
        np.testing.assert_allclose(got, exact, rtol=0, atol=error)


@st.composite
def heads(draw):
    """`(q, k, v, bias, settings)` of any shapes and settings that jax.nn takes."""
    b, t, s, k, g, h = (draw(st.integers(1, n)) for n in (2, 5, 6, 2, 2, 3))
    q, key, value = (b, t, k * g, h), (b, s, k, h), (b, s, k, h)
    bias = (draw(st.sampled_from((1, b))), draw(st.sampled_from((1, k * g))), t, s)
    given = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from((None, 0.7)))}
    if draw(st.booleans()):
        given["query_seq_lengths"] = jnp.asarray([draw(st.integers(0, t)) for _ in range(b)])
    if draw(st.booleans()):
        given["key_value_seq_lengths"] = jnp.asarray([draw(st.integers(1, s)) for _ in range(b)])
    if s <= t and draw(st.booleans()):
        # Each query then has a key in its window.
        given["local_window_size"] = (t, draw(st.integers(0, 2)))
    return drawn(q, key, value, bias, seed=draw(st.integers(0, 99))), given


@few
@given(heads())
def test_values_and_gradients_are_those_of_jax_nn(case):
    arrays, given = case

    def ours(q, k, v, bias):
        return dot_product_attention(q, k, v, bias, **given)

    def theirs(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias, **given)

    assert_close(pulled(ours, *arrays), pulled(theirs, *arrays))


@few
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_are_those_of_torch(t, s, is_causal, seed):
    torch = pytest.importorskip("torch")
    shapes = (2, t, 4, 3), (2, s, 2, 3), (2, s, 2, 3)
    arrays = drawn(*shapes, seed=seed)

    q, k, v = (torch.tensor(np.asarray(a, float), requires_grad=True) for a in arrays)
    y = torch.nn.functional.scaled_dot_product_attention(
        *(a.transpose(1, 2) for a in (q, k, v)), is_causal=is_causal, enable_gqa=True
    ).transpose(1, 2)
    torch.sum(y * torch.cos(torch.arange(y.numel()).double()).reshape(y.shape)).backward()
    theirs = [a.detach().numpy() for a in (y, q.grad, k.grad, v.grad)]

    def ours(q, k, v):
        return dot_product_attention(q, k, v, is_causal=is_causal)

    assert_close(pulled(ours, *arrays), theirs)


BLOCKED = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "causal window": {"local_window_size": (3, 9), "is_causal": True},
    "all": {},
    "softcap": {"softcap": 1.5, "is_causal": True},
    "dropout": {"dropout_rate": 0.4, "dropout_key": jax.random.key(3), "is_causal": True},
    "lengths": {
        "query_seq_lengths": np.array([4, 11]),
        "key_value_seq_lengths": np.array([0, 9]),
    },
    "segments": {
        "query_segment_ids": np.repeat([[0, 1, 2], [1, 1, 3]], [5, 3, 3], axis=1),
        "key_value_segment_ids": np.repeat([[0, 1, 1], [1, 2, 0]], [4, 4, 5], axis=1),
    },
}


@pytest.mark.parametrize(
    ("name", "at_once"),
    [*((name, False) for name in BLOCKED), ("causal", True), ("dropout", True)],
)
def test_many_blocks_give_what_one_gives(name, at_once, monkeypatch):
    """11 queries in blocks of 3, the last of which starts early; 13 keys."""
    monkeypatch.setattr(_attention_blocks, "BLOCK", 3)
    monkeypatch.setattr(_attention_blocks, "PARTS", 3)
    if at_once:  # what runs on accelerators

        def default(*arguments, cpu, default):
            return default(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", default)
    given = BLOCKED[name]
    arrays = drawn((2, 11, 4, 3), (2, 13, 2, 3), (2, 13, 2, 3), (1, 4, 11, 1))

    def blocks(q, k, v, bias):
        # Not the op, which would remember what was traced under another block size.
        fresh = funcbp.op(
            dot_product_attention.plain,
            dot_product_attention.fwd,
            dot_product_attention.bwd,
            arrays=dot_product_attention.arrays,
        )
        return fresh(q, k, v, bias, **given)

    def plain(q, k, v, bias):
        return dot_product_attention.plain(q, k, v, bias, **given)

    assert_close(pulled(blocks, *arrays), pulled(plain, *arrays))


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"is_causal": True}, 4 * (4 + 8 + 12 + 16)),
        ({"local_window_size": (1, 0)}, 16 * 3),
        ({}, 16 * 16),
    ],
)
def test_hidden_blocks_are_skipped(settings, pairs):
    """16 queries in blocks of 2: how many pairs of a query and a key are computed."""
    causal, window = settings.get("is_causal", False), settings.get("local_window_size")
    rules = _attention_blocks.Rules.of(1, None, causal, window, None, 0.0)
    spans = _attention_blocks.spans(16, 16, 2, rules)
    assert [j for span in spans for j in span.blocks] == list(range(8))
    assert sum(2 * len(span.blocks) * span.keys for span in spans) <= pairs


def test_a_query_that_sees_nothing_is_zero_and_so_is_its_gradient():
    q, k, v = drawn((1, 3, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2))
    mask = jnp.asarray([True, False, True])[None, None, :, None]
    y, lse = dot_product_attention(q, k, v, None, mask, return_residual=True)
    assert not y[0, 1].any() and lse[0, 1, 0] == -jnp.inf
    dq, dk, dv = pulled(lambda *a: dot_product_attention(*a, None, mask), q, k, v)[1:]
    assert not dq[0, 1].any() and dq[0, 0].any() and dk.any() and dv.any()
    # A bias of -inf hides a key as the mask does.
    hidden = jnp.where(mask, 0.0, -jnp.inf) * jnp.ones((1, 1, 3, 4))
    y_biased, *d_biased, dbias = pulled(dot_product_attention, q, k, v, hidden)
    assert_close([y_biased, *d_biased], [y, dq, dk, dv])
    assert not dbias[0, 0, 1].any() and np.isfinite(dbias).all()


def test_the_residual_is_that_of_jax_nn():
    q, k, v = drawn((2, 5, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3))
    for f in (dot_product_attention, dot_product_attention.plain):
        ours = f(q, k, v, is_causal=True, return_residual=True)[1]
        theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)[1]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    grad = jax.grad(lambda q: jnp.sum(dot_product_attention(q, k, v, return_residual=True)[1]))(q)
    assert not grad.any()


def test_memory_grows_with_the_length_not_its_square():
    def temporary(t):
        a = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)

        def run(q, k, v, dy):
            y, pullback = jax.vjp(lambda *a: dot_product_attention(*a, is_causal=True), q, k, v)
            return y, pullback(dy)

        return jax.jit(run).lower(a, a, a, a).compile().memory_analysis().temp_size_in_bytes

    assert np.log2(temporary(8192) / temporary(1024)) / 3 <= 1.1


def test_what_is_saved():
    q, k, v = drawn((2, 64, 4, 16), (2, 64, 2, 16), (2, 64, 2, 16))
    saved = saved_bytes(dot_product_attention, q, k, v)
    assert saved == 2 * 64 * 4 * 4 * 2


def test_dropout_scales_what_it_keeps():
    q, k, v = drawn((1, 40, 1, 2), (1, 50, 1, 2), (1, 50, 1, 2))
    one = jnp.ones_like(v)
    key = jax.random.key(0)
    kept = dot_product_attention(0 * q, k, one, dropout_rate=0.5, dropout_key=key)[0, :, 0, 0]
    # Of 50 equal weights each counts 2 / 50 or nothing; all rows draw their own.
    np.testing.assert_allclose(kept * 25, jnp.round(kept * 25), atol=1e-4)
    assert abs(float(kept.mean()) - 1) < 5 / 2000**0.5 and len(np.unique(jnp.round(kept * 25))) > 5


def test_cudnn_is_handed_to_jax_nn(monkeypatch):
    q, k, v = drawn((2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 3))
    theirs, asked = jax.nn.dot_product_attention, []

    def recorded(*arrays, implementation, **settings):
        asked.append(implementation)
        return theirs(*arrays, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)

    def ours(q, k, v):
        return dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    expected = pulled(lambda *a: theirs(*a, is_causal=True), q, k, v)
    for a, b in zip(pulled(ours, q, k, v), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(asked) == {"cudnn"} and len(asked) >= 2


@pytest.mark.parametrize("recompute", [True, False])
def test_multi_head_attention_is_its_parts(recompute):
    arrays = drawn((2, 5, 6), (6, 4, 3), (6, 2, 3), (6, 2, 3), (4, 3, 6), (4, 3), (2, 3), (2, 3))
    arrays = [a / 2 for a in arrays]
    given = {"lengths": np.array([5, 2]), "local_window_size": (2, 0)}

    def ours(*arrays):
        return multi_head_attention(*arrays, **given, recompute=recompute)

    def parts(x, wq, wk, wv, wo, bq, bk, bv):
        layers = ((wq, bq), (wk, bk), (wv, bv))
        q, k, v = (jnp.tensordot(x, w, 1) + b for w, b in layers)
        seen = (jnp.arange(5) < given["lengths"][:, None])[:, None, None]
        far = jnp.arange(5)[:, None] - jnp.arange(5)
        seen = seen & (far >= 0) & (far <= 2)
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        x = jnp.einsum("btnh,bsnh->bnts", q, k) / 3**0.5
        p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -1e30)), 0)
        return jnp.tensordot(jnp.einsum("bnts,bsnh->btnh", p, v), wo, 2)

    assert_close(pulled(ours, *arrays), pulled(parts, *arrays))


def test_saved_by_multi_head_attention():
    arrays = drawn((2, 8, 6), (6, 4, 3), (6, 2, 3), (6, 2, 3), (4, 3, 6))
    saved, kept = (saved_bytes(multi_head_attention, *arrays, recompute=r) for r in (True, False))
    q, k = 4 * 2 * 8 * 4 * 3, 4 * 2 * 8 * 2 * 3
    assert saved == q + 2 * 4 * 2 * 8 * 4 and kept == saved + q + 2 * k


BAD = {
    "query must have shape": lambda q, k: dot_product_attention(q[0, 0], k, k),
    "agree in batch size and width": lambda q, k: dot_product_attention(q, k[:1], k[:1]),
    "multiple of that of key heads": lambda q, k: dot_product_attention(q[:, :, :3], k, k),
    "bias must broadcast": lambda q, k: dot_product_attention(q, k, k, jnp.ones((1, 1, 2, 5))),
    "mask must be boolean": lambda q, k: dot_product_attention(
        q, k, k, None, jnp.ones((1, 1, 3, 5), int)
    ),
    "key_value_seq_lengths must be 2 integers": lambda q, k: dot_product_attention(
        q, k, k, key_value_seq_lengths=jnp.ones(3, int)
    ),
    "must come together": lambda q, k: dot_product_attention(
        q, k, k, query_segment_ids=jnp.zeros((2, 3), int)
    ),
    "segment ids must have shapes": lambda q, k: dot_product_attention(
        q,
        k,
        k,
        query_segment_ids=jnp.zeros((2, 3), int),
        key_value_segment_ids=jnp.zeros((2, 4), int),
    ),
    "local_window_size": lambda q, k: dot_product_attention(q, k, k, local_window_size=(-1, 0)),
    "dropout_rate must be": lambda q, k: dot_product_attention(q, k, k, dropout_rate=1.0),
    "dropout_key must be": lambda q, k: dot_product_attention(q, k, k, dropout_rate=0.1),
    "softcap must be": lambda q, k: dot_product_attention(q, k, k, softcap=0.0),
    "implementation must be": lambda q, k: dot_product_attention(q, k, k, implementation="gpu"),
    "must come without": lambda q, k: dot_product_attention(
        q, k, k, softcap=1.0, implementation="cudnn"
    ),
    "x must have shape": lambda q, k: multi_head_attention(q, k, k, k, k),
    "must have 2 rows": lambda q, k: multi_head_attention(q[0, :, :, :2], k[0], k[0], k[0], k[0]),
    "wo must have shape": lambda q, k: multi_head_attention(q[0], *[k[0, :2]] * 3, k[0]),
    "bo must have shape": lambda q, k: multi_head_attention(
        jnp.ones((1, 2, 3)), q[0], q[0], q[0], jnp.ones((4, 2, 3)), bo=jnp.ones(2)
    ),
    "lengths must be 1 integers": lambda q, k: multi_head_attention(
        jnp.ones((1, 2, 3)), q[0], q[0], q[0], jnp.ones((4, 2, 3)), lengths=jnp.ones(1)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told(message):
    q, k = drawn((2, 3, 4, 2), (2, 5, 2, 2))
    with pytest.raises(funcbp.InputError, match=message):
        BAD[message](q, k)
