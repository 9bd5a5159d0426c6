"""`scan` beside jax.lax.scan: bodies, lengths, what is stored, memory, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import funcbp
from funcbp import InputError
from funcbp.check import compare
from funcbp.check.compare import saved_bytes
from funcbp.jaxprs import equations
from funcbp.ops import scan, scan_plan

few = settings(derandomize=True, deadline=None, max_examples=4)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def cell(p, h, x):
    h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
    return h, h


def weights(d, n, gates=1):
    return {"w": normal(d, gates * n), "u": normal(n, gates * n) / n, "b": normal(gates * n)}


def lstm(p, carry, x):
    h, c = carry
    z = jnp.concatenate([x, h], -1) @ jnp.concatenate([p["w"], p["u"]]) + p["b"]
    i, f, g, o = jnp.split(z, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), {"h": h, "none": None}


def convolution(p, h, x):
    def conv(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME")

    h = jax.nn.relu(conv(h, p["k"]) + conv(x, p["j"]) + p["b"][:, None, None])
    return h, jnp.sum(h)


def dropped(p, carry, x):
    h, key, count = carry
    key, now = jax.random.split(key)
    h = jnp.where(jax.random.bernoulli(now, 0.5, h.shape), 2 * cell(p, h, x)[0], 0)
    return (h, key, count + 1), (h, count)


def branched(p, h, x):
    h = jax.lax.cond(jnp.sum(x) > 0, lambda h: jnp.tanh(h @ p["u"]), lambda h: h * p["b"], h)
    return cell(p, h, x)[0], x


def nested(p, h, x):
    inner = jnp.stack([x @ p["w"], p["b"] + jnp.zeros((len(x), 1))])
    return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["u"] + x), jnp.sum(h)), h @ p["u"], inner)


def of_ops(p, h, x):
    z = funcbp.ops.linear(h, p["u"], p["b"]) - jax.jit(jnp.matmul)(x, p["w"])
    return funcbp.ops.softmax(z), h


def decayed(p, h, x):
    return jnp.tanh(h * p["b"]) - jnp.sum(x), h * h


def kernels(d, n):
    return {"k": normal(n, n, 3, 3) / 3, "j": normal(n, d, 3, 3), "b": normal(n)}


BODIES = {
    "rnn": lambda t, b, d, n: (cell, weights(d, n), normal(b, n), normal(t, b, d)),
    "lstm": lambda t, b, d, n: (lstm, weights(d, n, 4), (normal(b, n),) * 2, normal(t, b, d)),
    "conv": lambda t, b, d, n: (
        convolution, kernels(d, n), normal(b, n, 3, 4), normal(t, b, d, 3, 4)),
    "dropout": lambda t, b, d, n: (
        dropped, weights(d, n), (normal(b, n), jax.random.key(7), jnp.int32(0)), normal(t, b, d)),
    "cond": lambda t, b, d, n: (branched, weights(d, n), normal(b, n), normal(t, b, d)),
    "nested": lambda t, b, d, n: (nested, weights(d, n), normal(b, n), normal(t, b, d)),
    "ops": lambda t, b, d, n: (of_ops, weights(d, n), normal(b, n), normal(t, b, d)),
    "decay": lambda t, b, d, n: (decayed, weights(d, n), normal(b, n), normal(t, b, d)),
}  # fmt: skip


def pulled(f, body, p, init, xs, **kwargs):
    """Value and cotangents, jitted; integers and keys as they are."""

    def run(p, init, xs):
        def value(p, init, xs):
            return f(lambda c, x: body(p, c, x), init, xs, **kwargs)

        y, pullback = jax.vjp(value, p, init, xs)
        return y, pullback(jax.tree.map(cotangent, y))

    return jax.jit(run)(p, init, xs)


def cotangent(y):
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return np.zeros(y.shape, jax.dtypes.float0)
    return jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def assert_same(ours, theirs, scale):
    """Bit for bit, but floats to some roundings of float64."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.floating):
            # Sums of up to `scale` terms, in another order.
            bound = scale * np.finfo(a.dtype).eps * np.max(np.abs(b), initial=1)
            assert np.max(np.abs(a - b), initial=0) <= bound
        elif a.dtype != jax.dtypes.float0:
            assert jnp.all(a == b)


@pytest.mark.parametrize("name", BODIES)
@few
@given(st.data())
def test_values_and_gradients_are_those_of_lax_scan(name, data):
    t, b, d, n = (data.draw(st.integers(low, 5)) for low in (0, 1, 1, 1))
    store = data.draw(st.sampled_from(["all", "sqrt", 1, 2, 3, 9]))
    reverse = data.draw(st.booleans())
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype(np.float64) if a.dtype == np.float32 else a,
            BODIES[name](t, b, d, n)[1:],
        )
        body = BODIES[name](t, b, d, n)[0]
        ours = pulled(scan, body, *wide, reverse=reverse, store=store)
        assert_same(ours, pulled(jax.lax.scan, body, *wide, reverse=reverse), 2000)


@pytest.mark.parametrize("store", ["all", 3])
def test_digits(store):
    p, init, xs = weights(3, 4), (normal(2, 4),) * 2, normal(7, 2, 3)
    p = weights(3, 4, 4)

    def of(f, **kwargs):
        return lambda p, init, xs: f(lambda c, x: lstm(p, c, x), init, xs, **kwargs)

    rule, reference = of(scan, store=store), of(jax.lax.scan)
    compare(rule, p, init, xs, reference=reference).raise_if_wrong()


def test_a_carry_takes_the_type_that_the_body_gives():
    w, xs = normal(3), normal(4, 3)

    def value(f, init, **kwargs):
        return jax.value_and_grad(lambda w: f(lambda c, x: (c + x @ w, c), init, xs, **kwargs)[0])(
            w
        )

    for init in (0, 0.0):
        theirs = value(jax.lax.scan, init)
        for store in ("all", 3):
            assert_same(value(scan, init, store=store), theirs, 50)


def test_without_xs_and_with_weights_in_the_carry():
    u, h = normal(3, 3), normal(2, 3)

    def loss(f, u, h):
        def step(carry, _):
            return (carry[0], jnp.tanh(carry[1] @ carry[0]), carry[2] + 1), None

        return jnp.sum(f(step, (u, h, 0), length=5)[0][1] ** 2)

    ours, theirs = (jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(f, u, h)
                    for f in (scan, jax.lax.scan))  # fmt: skip
    assert_same(ours, theirs, 100)
    assert "out of the loop: dot_general [2, 3] with [3, 3]" in str(
        scan_plan(lambda c, _: ((c[0], c[1] @ c[0]), None), (u, h), length=5)
    )


def test_bfloat16_sums_in_float32():
    """Each step adds a gradient of 1: bfloat16 would stop at 256."""
    w, xs = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)

    def loss(step, w, store):
        return scan(lambda c, x: (c, step(x, w)), 0.0, xs, store=store)[1].sum()

    grad = jax.jit(jax.grad(loss, 1), static_argnums=(0, 2))
    assert grad(jnp.matmul, w, "all") == grad(jnp.matmul, w, 300) == 1000
    assert grad(lambda x, w: x * w[0], w, 300) == 1000


def test_what_the_body_prints_appears(capfd):
    def step(h, x):
        jax.debug.print("step {}", x)
        return jnp.tanh(h @ u), h

    u = normal(2, 2)
    jax.block_until_ready(jax.grad(lambda u: scan(step, u, jnp.arange(3))[1].sum())(u))
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n")[:3] == ["step 0", "step 1", "step 2"]


def test_plan():
    p, h, xs = weights(3, 4), normal(2, 4), normal(9, 2, 3)
    plan = scan_plan(lambda c, x: cell(p, c, x), h, xs, store="sqrt")
    assert str(plan) == (
        "scan of 9 steps\n"
        "  out of the loop: dot_general [2, 3] with [3, 4], dot_general [2, 4] with [4, 4], "
        "add [2, 4] with [1, 4]\n"
        "  summed in the loop: nothing\n"
        "  kept: the carry each 3 steps, and while these are computed again of each step "
        "y float32[2, 4]"
    )
    plan = scan_plan(lambda c, x: decayed(p, c, x), h, xs)
    assert plan.why and str(plan).startswith("scan of 9 steps: jax.lax.scan's own transposition")
    plan = scan_plan(lambda c, x: branched(p, c, x), h, xs)
    assert "float32[4, 4]" in plan.summed and len(plan.outside) == 3


def test_nothing_is_kept_twice():
    """An RNN whose states are its output keeps nothing else; autodiff keeps them and more."""
    p, h, xs = weights(64, 64), normal(8, 64), normal(64, 8, 64)

    def value(f, **kwargs):
        return lambda p, h, xs: f(lambda c, x: cell(p, c, x), h, xs, **kwargs)[1]

    states = 4 * 64 * 8 * 64
    assert saved_bytes(value(scan), p, h, xs) == states
    # The carry before each of 8 chunks, and after the last.
    assert saved_bytes(value(scan, store=8), p, h, xs) == states * 9 // 64
    assert saved_bytes(value(jax.lax.scan), p, h, xs) >= 2 * states

    def temporary(f):
        def run(p, h, xs, dy):
            return jax.vjp(f, p, h, xs)[1](dy)

        compiled = jax.jit(run).lower(p, h, xs, xs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    theirs = temporary(value(jax.lax.scan))
    assert temporary(value(scan)) < 1.5 * theirs
    assert temporary(value(scan, store=8)) < 0.5 * theirs


def test_the_products_are_not_in_the_loop():
    """The backward pass's loop has one product, of the cotangent with u^T."""
    p, h, xs = weights(3, 4), normal(2, 4), normal(9, 2, 3)

    def loss(f):
        return lambda p, h, xs: jnp.sum(f(lambda c, x: cell(p, c, x), h, xs)[1])

    def products_in_loops(f):
        program = jax.make_jaxpr(jax.grad(loss(f), (0, 1, 2)))(p, h, xs).jaxpr
        loops = [e.params["jaxpr"] for e in equations(program) if e.primitive.name == "scan"]
        return [sum(e.primitive.name == "dot_general" for e in equations(loop)) for loop in loops]

    assert sorted(products_in_loops(scan)) == [1, 2]
    assert sorted(products_in_loops(jax.lax.scan)) == [2, 4]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((jnp.zeros(2), {"a": jnp.zeros((3, 1)), "b": jnp.zeros((4, 1))}), {}, r"got \[3, 4\]"),
        ((jnp.zeros(2), jnp.zeros((3, 1))), {"length": 4}, "length=4"),
        ((jnp.zeros(2),), {}, "of one length"),
        ((jnp.zeros(2), jnp.zeros(())), {}, "leading axis"),
        ((jnp.zeros(2), jnp.zeros(3)), {"store": 0}, "number of steps from 1, got 0"),
        ((jnp.zeros(2), jnp.zeros(3)), {"store": "none"}, "got 'none'"),
    ],
)
def test_errors(args, kwargs, message):
    with pytest.raises(InputError, match=message):
        scan(lambda c, x: (c, x), *args, **kwargs)


def test_a_body_that_changes_its_carry_gets_the_message_of_lax_scan():
    with pytest.raises(TypeError, match="carry"):
        scan(lambda c, x: (c[:1], x), jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(TypeError, match="carry"):
        scan(lambda c, x: ((c, c), x), jnp.zeros(2), jnp.zeros(3))
