"""One pass, seen: planted faults, numbers against jax.vjp by hand, programs inside programs."""

import json
import re

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from check.browser import pixels, screenshot
from flax import linen

from funcbp import ops, tap, trace
from funcbp.core import InputError
from funcbp.layers import (
    Layer,
    concat,
    dense,
    dropout,
    layer_norm,
    lift,
    parallel,
    residual,
    serial,
    sigmoid,
    tanh,
)
from funcbp.trace import Pass, plot_run, saved
from funcbp.trace.faults import faults, leaves
from funcbp.trace.rows import Parameter, Row

KEY = jax.random.key(0)


def mean_square(y):
    return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(y))


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def seen(net, x, change=None, loss=mean_square, **options):
    """A pass of a new model, whose parameters may be changed first."""
    params, state = net.init(KEY, x)
    return trace(net, change(params) if change else params, state, x, loss=loss, **options)


def kinds(found):
    return [(fault.layer, fault.kind) for fault in found.faults]


def row(found, name):
    (one,) = [r for r in found.rows if r.name == name]
    return one


def root_mean_square(a):
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64)))))


def near(got, truth):
    np.testing.assert_allclose(got, truth, rtol=2e-5, atol=1e-9)


@jax.custom_vjp
def broken(x):
    return x


broken.defvjp(lambda x: (x, None), lambda _, dy: (dy.at[0, 0].set(jnp.nan),))


def edited(params, layer, **changed):
    return params | {layer: params[layer] | changed}


def test_vanishing():
    found = seen(serial(*[dense(8), sigmoid] * 30, dense(1)), normal(16, 8))
    (fault,) = found.faults
    inner = leaves(found.rows)
    assert [r.layer for r in inner[:2]] == ["serial/dense_0", "serial/sigmoid_0"]
    at = [r.name for r in inner].index(fault.layer)
    assert fault.kind == "vanishing"
    assert inner[at].norm < 1e-3 * inner[-1].norm <= inner[at + 1].norm
    assert inner[0].arriving < 1e-15  # far below what squares of float32 can hold
    assert "serial/dense_30" in fault.message and "serial/dense_0" in fault.message


def test_exploding():
    net = serial(*[dense(16)] * 12)
    found = seen(net, normal(8, 16), lambda p: jax.tree.map(lambda a: 3 * a, p))
    (fault,) = found.faults
    inner = leaves(found.rows)
    at = [r.name for r in inner].index(fault.layer)
    assert fault.kind == "exploding"
    assert inner[at].norm > 1e3 * inner[-1].norm >= inner[at + 1].norm


def test_a_dead_layer():
    net = serial(*[dense(16, activation="relu")] * 3, dense(2))
    params, state = net.init(KEY, x := normal(32, 16))
    params = edited(params, "dense_1", b=jnp.full(16, -10.0))
    # What only receives zeros is dead too, unless its own biases wake it.
    both = [("serial/dense_1", "dead"), ("serial/dense_2", "dead")]
    assert kinds(trace(net, params, state, x, loss=mean_square)) == both
    params = edited(params, "dense_2", b=jnp.ones(16))
    found = trace(net, params, state, x, loss=mean_square)
    assert kinds(found) == both[:1]
    assert row(found, "serial/dense_1").dead == 1 and row(found, "serial/dense_0").dead < 0.5


def test_a_saturated_layer():
    net = serial(*[dense(16, activation="tanh")] * 3, dense(2))
    found = seen(net, normal(32, 16), lambda p: edited(p, "dense_1", w=60 * p["dense_1"]["w"]))
    assert kinds(found) == [("serial/dense_1", "saturated")]


@pytest.mark.parametrize(
    ("layer", "loss", "change", "name", "words"),
    [
        (lift(broken), mean_square, None, "broken_0", "arrives .* is finite.* of its input is not"),
        (lift(lambda x: jnp.log(-(x**2)), name="log"), mean_square, None, "log_0",
         "32 of 32 numbers of the output"),
        (dense(4), lambda y: jnp.sqrt(jnp.sum(0 * y)), None, "dense_9", "between it and the loss"),
        (dense(4), mean_square, lambda p: edited(p, "dense_3", b=jnp.full(4, jnp.inf)), "dense_3",
         "parameters dense_3/b of serial/dense_3 are not finite"),
    ],
    ids=["backward", "forward", "loss", "parameter"],
)  # fmt: skip
def test_nonfinite(layer, loss, change, name, words):
    net = serial(*[dense(4)] * 6, layer, *[dense(4)] * 3)
    found = seen(net, normal(8, 4), change, loss=loss)
    assert kinds(found) == [(f"serial/{name}", "nonfinite")]
    assert re.search(words, found.faults[0].message)


def test_nonfinite_between_taps_and_in_the_input():
    def root(x):
        return jnp.sum(tap(jnp.sqrt(tap(x, "a") * 0), "b"))

    (fault,) = trace(root, normal(3)).faults
    assert fault.layer == "a" and "the next row" in fault.message
    (fault,) = seen(serial(dense(2)), jnp.full((3, 2), jnp.nan)).faults
    assert fault.layer == "serial" and "input of serial holds 6 numbers" in fault.message


def test_nonfinite_in_one_step_of_a_loop():
    """The parameters are those of every step; the step is the one whose own cotangent breaks."""
    w = jnp.eye(4)
    layer = serial(dense(4), lift(lambda x: jnp.where(x > 0.5, jnp.sqrt(x - 1), x), name="root"))
    params = {"dense_0": {"w": w, "b": jnp.full(4, 0.25)}}

    def repeat(params, h):
        def step(h, _):
            return layer(params, h), None

        return jax.lax.scan(step, h, length=3)[0]

    loop = lift(repeat, lambda key, h: params, name="loop")
    # 0.25, 0.5, 0.75: the third step takes the root of a negative number.
    found = trace(loop, params, {}, jnp.zeros(4), loss=jnp.sum)
    assert kinds(found) == [("loop/root_0[2]", "nonfinite")]


def test_healthy():
    block = residual(serial(layer_norm(), dense(8, activation="relu"), dense(8)))
    net = serial(dense(8, activation="relu"), block, block, dense(1))
    assert seen(net, normal(16, 8)).faults == ()
    # One example does not tell which units are dead.
    one = seen(serial(dense(8, activation="relu"), dense(1)), normal(1, 8))
    assert one.rows[1].dead is None and one.faults == ()
    # A mean over many places makes each cotangent small, and their norm only somewhat.
    pool = lift(lambda x: jnp.mean(x, (1, 2)), name="pool")
    pooled = seen(serial(dense(4), pool, dense(1)), normal(2, 64, 64, 4))
    assert row(pooled, "serial/dense_0").arriving < 1e-3 * row(pooled, "serial/dense_1").arriving
    assert pooled.faults == ()


def test_numbers():
    """Each against jax.vjp of the layers that follow."""
    parts = dense(5), tanh, dense(3, activation="relu"), dense(2)
    names = "dense_0", "tanh_0", "dense_1", "dense_2"
    net, x = serial(*parts), 3 * normal(7, 4)
    params, state = net.init(KEY, x)
    params = edited(params, "dense_1", b=jnp.array([-99.0, 0.0, 9.0]))
    found = trace(net, params, state, x, loss=mean_square)
    gradients = jax.grad(lambda p: mean_square(net(p, x)))(params)
    assert [r.layer for r in found.rows] == ["serial", *(f"serial/{n}" for n in names)]
    near(found.loss, mean_square(net(params, x)))

    h = x
    for n, (layer, name) in enumerate(zip(parts, names, strict=True)):

        def tail(h, first=n):
            for later, of in zip(parts[first:], names[first:], strict=True):
                h = later(params.get(of, {}), h)
            return mean_square(h)

        one, leaving = row(found, f"serial/{name}"), jax.grad(tail)(h)
        h = layer(params.get(name, {}), h)
        arriving = jax.grad(lambda h, tail=tail, n=n: tail(h, n + 1))(h)
        near((one.mean, one.low, one.high), (h.mean(), h.min(), h.max()))
        near((one.rms, one.arriving, one.leaving), [*map(root_mean_square, (h, arriving, leaving))])
        near(one.gain, root_mean_square(leaving) / root_mean_square(arriving))
        near(one.norm, np.linalg.norm(arriving))
        assert one.bad == (0, 0, 0, 0) and one.size == h.size
        for p in one.parameters:
            value, gradient = params[name][p.path[-1]], gradients[name][p.path[-1]]
            assert p.path == f"{name}/{p.path[-1]}" and p.size == value.size
            near((p.rms, p.gradient), (root_mean_square(value), root_mean_square(gradient)))
            if value.any():
                near(p.ratio, root_mean_square(gradient) / root_mean_square(value))
        assert len(one.parameters) == len(params.get(name, {}))
    y = np.tanh(np.asarray(parts[0](params["dense_0"], x)))
    near(row(found, "serial/tanh_0").saturated, np.mean(1 - y**2 < 0.01))
    assert 0 < row(found, "serial/tanh_0").saturated < 1
    near(row(found, "serial/dense_1").dead, 1 / 3)
    assert row(found, "serial/dense_0").dead is None is row(found, "serial/dense_0").saturated
    assert row(found, "serial/dense_0").flops == 2 * 7 * 4 * 5 + 7 * 5

    ledger = saved(lambda p, x: mean_square(net(p, x)), params, x)
    kept = ledger.by_layer()
    assert {r.layer: r.saved for r in found.rows[1:]} == {
        f"serial/{n}": kept.get(f"serial/{n}", 0) for n in names
    }
    assert found.saved == ledger.bytes
    assert found.rows[0].saved == sum(r.saved for r in found.rows[1:]) > 0


def test_activations_are_known():
    """However they are written: as ops, in jax.nn, in jnp, inside jit and vmap."""
    x = normal(40, 6)

    def loss(x):
        for name, y in (
            ("op", ops.tanh(x)),
            ("jnp", jnp.tanh(x)),
            ("nn", jax.nn.sigmoid(8 * x)),
            ("jit", jax.jit(lambda x: jnp.tanh(2 * x))(x)),
            ("vmap", jax.vmap(ops.sigmoid)(9 * x)),
            ("relu", jax.nn.relu(x - jnp.array([9.0, 0, 0, 0, 0, 0]))),
            ("maximum", jnp.maximum(x, 0)),
            ("straight", straight(x)),
            ("other", jnp.sin(x)),
        ):
            tap(y, name)
        return jnp.sum(x)

    @jax.custom_jvp
    def straight(x):
        return x

    straight.defjvp(lambda x, dx: (x[0], dx[0]))
    found = {r.layer: r for r in trace(loss, x).rows}
    for name, scale in (("op", 1), ("jnp", 1), ("nn", 4), ("jit", 2), ("vmap", 4.5)):
        y = np.tanh(scale * np.asarray(x, np.float64))
        near(found[name].saturated, np.mean(1 - y**2 < 0.01))
    near(found["relu"].dead, 1 / 6)
    assert found["maximum"].dead == 0
    for name in ("straight", "other"):
        assert found[name].dead is None is found[name].saturated


def test_inside_jit_and_checkpoint():
    net, x = serial(dense(5, activation="tanh"), serial(dense(2))), normal(3, 4)
    params, _ = net.init(KEY, x)
    plain = trace(lambda p: mean_square(net(p, x)), params)
    for wrapped in (jax.jit(net), jax.checkpoint(net), jax.jit(jax.checkpoint(jax.jit(net)))):
        found = trace(lambda p, wrapped=wrapped: mean_square(wrapped(p, x)), params)
        assert [r.name for r in found.rows] == [r.name for r in plain.rows]
        for one, other in zip(found.rows, plain.rows, strict=True):
            near(one[3:8], other[3:8])
            near((one.arriving, one.leaving), (other.arriving, other.leaving))
            assert one.flops == other.flops
            assert [p.path for p in one.parameters] == [p.path for p in other.parameters]
    # What is jitted by the user carries no mark afterwards.
    jitted = jax.jit(net)
    trace(lambda p: mean_square(jitted(p, x)), params)
    assert "funcbp_mark" not in str(jax.make_jaxpr(jitted)(params, x))


def test_scan():
    """A row for each step, in the order in which they ran, with each step's own numbers."""
    layer, x = dense(4, activation="tanh"), normal(3, 4)
    weights = jax.vmap(lambda k: layer.init(k, x)[0])(jax.random.split(KEY, 3))

    def loss(weights, offsets):
        def step(h, w):
            return layer(w[0], h) + w[1], None

        h = jax.lax.scan(step, x, (weights, offsets[0]))[0]
        h = jax.lax.scan(step, h, (weights, offsets[1]), reverse=True)[0]
        return mean_square(tap(h, "out"))

    offsets = jnp.zeros((2, 3, 3, 4))
    found = trace(loss, weights, offsets)
    names = [f"dense[{k}]" for k in (0, 1, 2, 2, 1, 0)]
    assert [r.name for r in found.rows] == [*names, "out"]
    # An offset that is added to a layer's output has the output's cotangent for its gradient.
    arriving = jax.grad(loss, 1)(weights, offsets)
    h = x
    for r, (at, k) in zip(
        found.rows, [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)], strict=False
    ):
        h = layer(jax.tree.map(lambda a, k=k: a[k], weights), h)
        near((r.rms, r.arriving), (root_mean_square(h), root_mean_square(arriving[at, k])))
    assert found.rows[0].flops == 2 * 3 * 4 * 4 + 2 * 3 * 4
    assert 6 * found.rows[0].saved == saved(loss, weights, offsets).by_layer()["dense"]


def test_nested_scan_and_a_loop_of_taps():
    def loss(w):
        def inner(h, _):
            return tap(2 * h, "inner"), None

        def outer(h, w):
            h = tap(h + w, "before")
            h, _ = jax.lax.scan(inner, h, length=2)
            return tap(h, "after"), None

        h, _ = jax.lax.scan(outer, 1.0, w)
        for _ in range(2):
            h = tap(3 * h, "again")
        return h

    found = trace(loss, jnp.array([1.0, -2.0]))
    got = [(r.name, r.mean, r.arriving) for r in found.rows]
    assert got == [
        ("before[0]", 2, 144), ("inner[0][0]", 4, 72), ("inner[0][1]", 8, 36), ("after[0]", 8, 36),
        ("before[1]", 6, 36), ("inner[1][0]", 12, 18), ("inner[1][1]", 24, 9), ("after[1]", 24, 9),
        ("again", 72, 3), ("again", 216, 1),
    ]  # fmt: skip


def test_branches():
    def loss(w, k):
        h = jax.lax.switch(k, [lambda h: tap(2 * h, "twice"), lambda h: tap(-h, "minus")], w)
        return jax.lax.cond(k > 5, lambda h: tap(h, "never"), lambda h: h, h)

    for k, name, value in ((0, "twice", 6.0), (1, "minus", -3.0)):
        (one,) = trace(loss, jnp.float32(3), jnp.int32(k)).rows
        assert (one.layer, one.mean, one.arriving) == (name, value, 1)


def test_vmap_is_a_batch():
    net, x = serial(dense(5, activation="relu"), dense(2)), normal(6, 4)
    params, _ = net.init(KEY, x)
    batch = trace(lambda p: mean_square(net(p, x)), params)
    mapped = trace(lambda p: mean_square(jax.vmap(lambda x: net(p, x))(x)), params)
    for one, other in zip(mapped.rows, batch.rows, strict=True):
        assert one.layer == other.layer and one.size == other.size
        near((one.rms, one.arriving, one.leaving), (other.rms, other.arriving, other.leaving))
        assert one.dead == other.dead


def test_graphs():
    add = lift(jnp.add, name="add")
    both = parallel(dense(4), serial(dense(4), tanh))
    net = serial(both, add, residual(dense(4)), concat(dense(1), dense(2)))
    found = seen(net, normal(5, 4))
    names = [r.layer.removeprefix("serial").lstrip("/") for r in found.rows]
    assert names == [
        "", "parallel_0", "parallel_0/dense_0", "parallel_0/serial_0",
        "parallel_0/serial_0/dense_0", "parallel_0/serial_0/tanh_0", "add_0", "residual_0",
        "residual_0/dense_0", "concat_0", "concat_0/dense_0", "concat_0/dense_1",
    ]  # fmt: skip
    rows = dict(zip(names, found.rows, strict=True))
    # Two outputs are measured as one; what goes to both branches is counted by way of each.
    parts = [rows["parallel_0/dense_0"], rows["parallel_0/serial_0"]]
    assert rows["parallel_0"].size == 40
    near(rows["parallel_0"].rms, np.sqrt(np.mean([p.rms**2 for p in parts])))
    near(rows["parallel_0"].mean, np.mean([p.mean for p in parts]))
    assert rows["parallel_0"].high == max(p.high for p in parts)
    # The sum passes the same cotangent to both of its inputs.
    near(rows["add_0"].leaving, rows["add_0"].arriving)
    near([p.arriving for p in parts], [rows["add_0"].arriving] * 2)


def test_tap_is_the_identity():
    tree = {"a": jnp.ones(2), "n": 3, "s": None}
    assert tap(tree, "x") is tree
    assert "funcbp" not in str(jax.make_jaxpr(lambda x: tap(x, "x"))(1.0))
    near(jax.grad(lambda x: tap(x, "x") ** 2)(3.0), 6.0)


def test_taps():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = tap(linen.Dense(3)(x), "hidden")
            return tap({"y": linen.Dense(1)(h), "n": jnp.arange(3)}, "output")["y"]

    net, x = Net(), normal(4, 2)
    params = net.init(KEY, x)
    found = trace(lambda p: mean_square(net.apply(p, x)), params)
    hidden, output = found.rows
    assert (hidden.name, hidden.kind, hidden.leaving, hidden.gain) == ("hidden", "tap", None, None)
    dense_0 = params["params"]["Dense_0"]
    near(hidden.rms, root_mean_square(x @ dense_0["kernel"] + dense_0["bias"]))
    near(output.arriving, root_mean_square(2 * net.apply(params, x) / 4))
    assert output.size == 4 and hidden.parameters == ()
    assert [p.path for p in found.parameters][-1] == "params/Dense_1/kernel"

    # Inside a layer the name stands behind its path, and the layer counts on.
    inside = lift(lambda x: jax.nn.relu(tap(x, "before")), name="mine")
    found = seen(
        serial(dense(3), inside), normal(8, 2), lambda p: edited(p, "dense_0", b=-jnp.full(3, 9.0))
    )
    assert [r.name for r in found.rows][2:] == ["serial/mine_0", "serial/mine_0/before"]
    assert kinds(found) == [("serial/mine_0", "dead")]


def test_a_module_of_equinox():
    """Its leaves are arrays and functions."""
    net, x = equinox.nn.MLP(3, 1, 4, 2, key=KEY), normal(5, 3)

    def loss(net, x, power):
        return jnp.mean(tap(jax.vmap(net)(x), "out") ** power)

    found = trace(loss, net, x, 2)
    names = [f"layers/{k}/{n}" for k in range(3) for n in ("weight", "bias")]
    assert [p.path for p in found.parameters] == names
    gradient = equinox.filter_grad(loss)(net, x, 2)
    near(found.parameters[0].gradient, root_mean_square(gradient.layers[0].weight))
    near(found.rows[0].rms, np.sqrt(found.loss))
    near(trace(loss, net, x, 4).loss, loss(net, x, 4))


def test_any_model():
    def embed(params, tokens):
        return params["table"][tokens]

    def table(key, tokens):
        return {"table": jax.random.normal(key, (5, 3))}

    tokens = jnp.array([[1, 1, 4], [0, 2, 3]])
    net = serial(lift(embed, table, name="embed"), dense(2))
    found = seen(net, tokens)
    embedding = row(found, "serial/embed_0")
    assert embedding.leaving is None is embedding.gain and embedding.arriving > 0
    assert [p.path for p in embedding.parameters] == ["embed_0/table"]

    net = serial(dense(64), dropout(0.5))
    for train, zeros in ((True, True), (False, False)):
        found = seen(net, jnp.ones((4, 2)), key=jax.random.key(3), train=train)
        dropped = row(found, "serial/dropout_0")
        assert (dropped.rms > 1.1 * row(found, "serial/dense_0").rms) == zeros

    def count(params, state, x, *, key=None, train=False):
        return x * params["w"], {"n": state["n"] + 1}

    net = serial(Layer(lambda key, x: ({"w": jnp.ones(())}, {"n": jnp.zeros(())}), count, "count"))
    params, state = net.init(KEY, jnp.ones(3))
    found = trace(net, params, state, jnp.full(3, 2.0), loss=jnp.sum)
    assert found.loss == 6 and [p.gradient for p in found.parameters] == [6]
    assert state["count_0"]["n"] == 0

    low = seen(serial(dense(4, activation="tanh"), dense(1)), normal(8, 4).astype(jnp.bfloat16))
    assert low.faults == () and low.parameters[0].gradient > 0


def test_the_second_call_compiles_nothing():
    calls = []

    def loss(y):
        calls.append(1)
        return jnp.sum(y)

    net, x = serial(dense(2)), normal(3, 2)
    params, state = net.init(KEY, x)
    first = trace(net, params, state, x, loss=loss)
    before = len(calls)
    second = trace(net, jax.tree.map(lambda a: 2 * a, params), state, x, loss=loss)
    assert len(calls) == before > 0
    near(second.loss, 2 * first.loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seen(serial(dense(2)), normal(3, 2), loss=None), r"scalar .* got float32\[3, 2\]"),
        (lambda: trace(lambda x: jnp.argmax(tap(x, "x")), normal(3)), r"scalar .* got int32\[\]"),
        (lambda: trace(lambda x: (x.sum(), x), normal(3)), "let the function return its loss"),
        (lambda: trace(lambda n: 1.0 * n, 3), "must hold floating arrays"),
        (lambda: trace(equinox.nn.MLP(1, 1, 1, 1, key=KEY), jnp.ones(1)), "must be hashable"),
        (lambda: trace(lambda n: n, jax.ShapeDtypeStruct((), "float32")), "needs arrays, got jax"),
        (lambda: trace(lambda: 1.0), "must hold floating arrays"),
        (lambda: trace(jnp.sum, normal(3)), "nothing to see"),
        (lambda: trace(jnp.sum, normal(3), loss=jnp.sum), "let the function itself return"),
        (lambda: trace(dense(2), {}, {}), r"params, state and its inputs, got 2 of them"),
        (lambda: trace(3, normal(3)), "takes a model or a function, got a int"),
        (lambda: tap(1.0, ""), "needs a name for its row, got ''"),
        (lambda: tap(1.0, 3), "needs a name for its row, got 3"),  # type: ignore[arg-type]
        (lambda: plot_run([]), "got 0 passes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_views(tmp_path):
    net = serial(*[dense(16, activation="tanh")] * 2, dense(1))
    found = seen(net, normal(32, 16), lambda p: edited(p, "dense_1", w=60 * p["dense_1"]["w"]))
    text = str(found)
    assert "dense_1" in text and "saturated: " in text and "nan" not in text
    plain = found.to_json(tmp_path / "pass.json")
    assert json.loads((tmp_path / "pass.json").read_text()) == plain
    assert [r["layer"] for r in plain["rows"]] == [r.layer for r in found.rows]
    assert plain["rows"][1]["parameters"][1]["path"] == "dense_0/w"
    assert plain["faults"] == [found.faults[0]._asdict()]
    page = found.to_html(tmp_path / "pass.html")
    assert found.faults[0].message in page and "http" not in page
    assert (tmp_path / "pass.html").read_text(encoding="utf-8") == page
    assert found._repr_html_().startswith("<div")
    broken_pass = seen(serial(dense(2)), jnp.full((3, 2), jnp.nan))
    json.dumps(broken_pass.to_json(), allow_nan=False)
    assert "nonfinite" in broken_pass.to_html()


def test_pictures():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    net, x = serial(dense(3), tanh, dense(1)), normal(4, 3)
    params, state = net.init(KEY, x)
    passes = [
        trace(net, jax.tree.map(lambda a, k=k: k * a, params), state, x, loss=mean_square)
        for k in (1, 2)
    ]
    ax = passes[0].plot()
    output, cotangent = (line.get_ydata() for line in ax.get_lines())
    near(output, [r.rms for r in passes[0].rows[1:]])
    near(cotangent, [r.arriving for r in passes[0].rows[1:]])
    assert ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == [r.name for r in passes[0].rows[1:]]
    assert passes[1].plot(ax) is ax and len(ax.get_lines()) == 4
    run = plot_run(passes, steps=[0, 50])
    lines = {line.get_label(): line.get_xydata() for line in run.get_lines()}
    near(lines["loss"], [(0, passes[0].loss), (50, passes[1].loss)])
    near(lines["dense_0/w"][:, 1], [p.parameters[1].ratio for p in passes])
    pyplot.close("all")


def test_a_thousand_layers(tmp_path):
    """Of this many rows a page has those at both ends."""
    parameter = Parameter("w", 9, 1.0, 0.1)
    rows = tuple(
        Row(f"serial/dense_{k}", "dense", (), 9, 0.0, 1.0, -1.0, 1.0, 0.9, None, 8, 9,
            0.98 ** (1000 - k), 0.98 ** (1001 - k), (0, 0, 0, 0), (parameter,))
        for k in range(1000)
    )  # fmt: skip
    found = Pass(1.0, rows, (parameter,) * 1000, 8000, faults(rows))
    assert len(found.faults) == 1001
    page = found.to_html(tmp_path / "pass.html")
    assert 10_000 < len(page) < 200_000
    assert "700 rows in the middle" in page and "981 more" in page
    assert len(str(found).splitlines()) < 100
    screenshot(tmp_path / "pass.html", tmp_path / "pass.png", height=3000)
    image = pixels(tmp_path / "pass.png")
    # Paper at the corner, and ink from top to bottom.
    ink = np.any(image[:, :, :3] < 128, axis=(1, 2))
    assert image[0, 0, :3].min() > 250 and ink[:200].any() and ink[-200:].any()
