"""Memory for time: values and gradients are those of storing everything, and less is stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from funcbp import InputError
from funcbp.check.compare import distance, saved_bytes
from funcbp.ops import checkpointed, repeat, reversible

few = settings(derandomize=True, deadline=None, max_examples=6)


def drawn(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def f(w, x):
    return jnp.tanh(x @ w)


def g(w, x):
    return jnp.sin(x @ w.T)


def one_by_one(params, x1, x2):
    for w in params:
        x1 = x1 + f(w, x2)
        x2 = x2 + g(w, x1)
    return x1, x2


def gradients(function, *args):
    """Value and gradients of a curved loss."""

    def loss(*args):
        y = jax.tree.leaves(function(*args))
        return sum((jnp.sum(jnp.sin(y)) for y in y), jnp.zeros((), y[0].dtype))

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)


def assert_as_near(rule, autodiff, args):
    """The rule is at most twice as far from float64 as autodiff, in the largest norm of each."""
    got, theirs = gradients(rule, *args), gradients(autodiff, *args)
    with jax.enable_x64(True):
        truth = gradients(autodiff, *(jnp.asarray(np.asarray(a), jnp.float64) for a in args))
    for r, a, t in zip(*map(jax.tree.leaves, (got, theirs, truth)), strict=True):
        r, a, t = (np.asarray(v, np.float64) for v in (r, a, t))
        scale = np.max(np.abs(t), initial=0.0)
        most = (
            2 * np.max(distance(a, t), initial=0.0)
            + 4 * float(jnp.finfo(args[0].dtype).eps) * scale
        )
        assert np.max(distance(r, t), initial=0.0) <= most


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@few
def test_reversible_is_a_loop_of_blocks(layers, rows, n, m):
    """Also with no layer, one layer and one element; x1 and x2 of different widths."""
    args = drawn(layers, (layers, m, n), (rows, n), (rows, m))
    assert_as_near(functools.partial(reversible, f, g), one_by_one, args)


@pytest.mark.parametrize("layers", [0, 1, 24])
def test_reversible_keeps_the_same_at_every_depth(layers):
    w, x1, x2 = drawn(1, (layers, 5, 5), (7, 5), (7, 5))
    kept = saved_bytes(functools.partial(reversible, f, g), w, x1, x2)
    assert kept == x1.nbytes + x2.nbytes
    if layers:
        assert saved_bytes(one_by_one, w, x1, x2) >= 4 * layers * x1.nbytes


def test_reversible_temporary_bytes_do_not_grow_with_depth():
    def temporary(layers):
        w, x1, x2 = drawn(1, (layers, 64, 64), (256, 64), (256, 64))

        def loss(w, x1, x2):
            y1, y2 = reversible(f, g, w, x1, x2)
            return jnp.sum(y1 * y2)

        compiled = jax.jit(jax.grad(loss)).lower(w, x1, x2).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) <= temporary(4) + 1024


def test_reversible_of_forty_layers_is_near_float64():
    """Rounding gathers over the depth as autodiff's own does."""
    w, x1, x2 = drawn(3, (40, 6, 6), (4, 6), (4, 6))
    assert_as_near(functools.partial(reversible, f, g), one_by_one, (w * 0.3, x1, x2))


def test_reversible_in_bfloat16_is_as_near_as_autodiff():
    w, x1, x2 = drawn(3, (12, 6, 6), (8, 6), (8, 6), dtype=jnp.bfloat16)
    assert_as_near(functools.partial(reversible, f, g), one_by_one, (w * 0.3, x1, x2))


def test_reversible_differentiates_what_its_functions_close_over():
    x1, x2, shared, k = drawn(2, (3, 4), (3, 4), (4, 4), ())

    def ours(shared, k, x1, x2):
        return reversible(
            lambda p, x: jnp.tanh(x @ shared) * k, lambda p, x: jnp.cos(x) * k, None, x1, x2
        )

    def theirs(shared, k, x1, x2):
        x1 = x1 + jnp.tanh(x2 @ shared) * k
        return x1, x2 + jnp.cos(x1) * k

    assert_as_near(ours, theirs, (shared, k, x1, x2))


def test_reversible_takes_keys_and_integers_among_its_parameters():
    w, x1, x2 = drawn(2, (3, 4, 4), (2, 4), (2, 4))
    keys, scale = jax.random.split(jax.random.key(0), 3), jnp.arange(3)

    def half(p, x):
        return jnp.tanh(x @ p["w"]) * jax.random.uniform(p["key"], (), jnp.float32) + p["scale"]

    def ours(w, x1, x2):
        return reversible(half, half, {"w": w, "key": keys, "scale": scale}, x1, x2)

    def theirs(w, x1, x2):
        for i in range(3):
            p = {"w": w[i], "key": keys[i], "scale": scale[i]}
            x1 = x1 + half(p, x2)
            x2 = x2 + half(p, x1)
        return x1, x2

    assert_as_near(ours, theirs, (w, x1, x2))


def test_reversible_says_what_does_not_fit():
    x = jnp.ones((2, 3))
    with pytest.raises(InputError, match="same leading axis"):
        reversible(f, g, [jnp.ones((2, 3, 3)), jnp.ones((4, 3))], x, x)
    with pytest.raises(InputError, match="same leading axis"):
        reversible(f, g, [jnp.ones((2, 3, 3)), jnp.ones(())], x, x)
    with pytest.raises(InputError, match="f must return one array of x1's shape"):
        reversible(f, g, jnp.ones((2, 3, 5)), x, x)
    with pytest.raises(InputError, match="g must return one array of x2's shape"):
        reversible(f, lambda p, x: x[:1], jnp.ones((2, 3, 3)), x, x)


def block(p, x):
    return x + jnp.tanh(x @ p["in"]) @ p["out"]


def every_layer(params, x):
    for p in zip(params["in"], params["out"], strict=True):
        x = block(dict(zip(("in", "out"), p, strict=True)), x)
    return x


def layers_of(count, rows=3, n=2, hidden=5):
    w_in, w_out, x = drawn(count, (count, n, hidden), (count, hidden, n), (rows, n))
    return {"in": w_in, "out": w_out}, x


STORES = ["all", "none", "sqrt", 1, 2, 3, 100]


@given(st.integers(0, 7), st.integers(1, 3), st.sampled_from(STORES))
@few
def test_repeat_is_a_loop_of_layers(layers, rows, store):
    params, x = layers_of(layers, rows)

    def ours(w_in, w_out, x):
        return repeat(block, {"in": w_in, "out": w_out}, x, store=store)

    def theirs(w_in, w_out, x):
        return every_layer({"in": w_in, "out": w_out}, x)

    assert_as_near(ours, theirs, (params["in"], params["out"], x))


@pytest.mark.parametrize(
    ("store", "inputs", "stored"),
    [
        ("all", 0, 6),
        ("none", 6, 0),
        (1, 6, 0),
        ("sqrt", 3, 0),
        (2, 3, 0),
        (4, 2, 0),
        (6, 1, 0),
        ((True,) * 6, 0, 6),
        ((False,) * 6, 6, 0),
        ((True, True, False, False, False, True), 3, 3),
    ],
)
def test_repeat_keeps_what_was_chosen(store, inputs, stored):
    params, x = layers_of(6)
    parameters = sum(a.nbytes for a in jax.tree.leaves(params))

    def kept(store):
        bytes_kept = saved_bytes(lambda p, x: repeat(block, p, x, store=store), params, x)
        # Parameters that were cut or grouped are new arrays here; compiled, they are the same.
        cut = store not in ("all", "none", 1, (True,) * 6, (False,) * 6)
        return bytes_kept - parameters * cut

    intermediates = kept("all") // 6
    assert intermediates > x.nbytes
    expected = inputs * x.nbytes + stored * intermediates
    assert kept(store) == expected
    assert jnp.array_equal(
        repeat(block, params, x, store=store), repeat(block, params, x, store="all")
    )


def test_repeat_says_what_does_not_fit():
    params, x = layers_of(3)
    for store in ("some", 0, -1, True, (True,), 1.5, None):
        with pytest.raises(InputError, match="store must be"):
            repeat(block, params, x, store=store)
    with pytest.raises(InputError, match="same leading axis"):
        repeat(block, {**params, "in": params["in"][:2]}, x)
    with pytest.raises(InputError, match="f must return x's shape"):
        repeat(lambda p, x: x @ p["in"], params, x)


def attention_like(w, x):
    h = checkpoint_name(jnp.sin(x @ w), "hidden")
    return jnp.sum(jnp.exp(jnp.einsum("bij,bkj->bik", h, h)))


def test_checkpointed_keeps_what_its_policy_names():
    w, x = drawn(0, (3, 4), (2, 5, 3))
    kept = {
        p: saved_bytes(checkpointed(attention_like, p), w, x)
        for p in ("nothing", None, "dots_without_batch", "dots", ("hidden",), "everything")
    }
    hidden, scores = 2 * 5 * 4 * 4, 2 * 5 * 5 * 4
    assert kept["nothing"] == kept[None] == 0
    assert kept["dots_without_batch"] == hidden
    assert kept["dots"] == hidden + scores
    assert kept[("hidden",)] == hidden
    assert kept["everything"] > kept["dots"]
    for policy in kept:
        assert_as_near(checkpointed(attention_like, policy), attention_like, (w, 0.3 * x))


def test_checkpointed_takes_policies_of_jax_and_names_its_own():
    w, x = drawn(0, (3, 4), (2, 5, 3))
    policy = jax.checkpoint_policies.dots_saveable
    ours = saved_bytes(checkpointed(attention_like, policy), w, x)
    assert ours == saved_bytes(checkpointed(attention_like, "dots"), w, x)
    with pytest.raises(InputError, match="'nothing', 'everything', 'dots'"):
        checkpointed(attention_like, "all")
    with pytest.raises(InputError, match="got 3"):
        checkpointed(attention_like, 3)
