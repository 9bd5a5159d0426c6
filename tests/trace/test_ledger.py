"""The ledger: its totals to the byte, who keeps each array, and what a reader is shown."""

import inspect
import json
import sys
import types
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from check import browser
from flax import nnx

from funcbp import ops
from funcbp.check.compare import saved_bytes
from funcbp.core import InputError, autodiff
from funcbp.layers import dense, gelu, layer_norm, residual, serial
from funcbp.trace.ledger import saved
from funcbp.trace.origin import human

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp():
    net = serial(dense(8, activation="relu"), layer_norm(), dense(3))
    x, labels = normal(5, 4), jnp.array([0, 1, 2, 1, 0])
    params, _ = net.init(KEY, x)

    def loss(params, x, labels):
        return ops.softmax_cross_entropy_with_integer_labels(net(params, x), labels).mean()

    return loss, (params, x, labels)


def convnet():
    def loss(params, x):
        h = ops.relu(ops.conv(x, params["conv"], padding="SAME"))
        h = ops.max_pool(h, (2, 2), strides=(2, 2))
        return jnp.sum(ops.linear(h.reshape(h.shape[0], -1), params["w"], params["b"]) ** 2)

    params = {"conv": normal(3, 3, 1, 4), "w": normal(64, 5), "b": normal(5)}
    return loss, (params, normal(2, 8, 8, 1))


def transformer_block():
    width, heads = 8, 2

    def block(p, x):
        h = ops.layer_norm(x, p["scale"], p["shift"])
        q, k, v = jnp.split(ops.linear(h, p["qkv"], None), 3, axis=-1)
        split = (*x.shape[:-1], heads, width // heads)
        h = jax.nn.dot_product_attention(*(a.reshape(split) for a in (q, k, v)), is_causal=True)
        x = x + ops.linear(h.reshape(x.shape), p["out"], None)
        h = ops.dense(ops.rms_norm(x, p["scale"]), p["up"], None, activation="gelu")
        return x + ops.linear(h, p["down"], None)

    params = {
        "scale": jnp.ones(width),
        "shift": jnp.zeros(width),
        "qkv": normal(width, 3 * width),
        "out": normal(width, width),
        "up": normal(width, 4 * width),
        "down": normal(4 * width, width),
    }
    return block, (params, normal(2, 6, width))


def lstm():
    def cell(p, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(jnp.concatenate([x, h]) @ p["w"] + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def loss(p, xs):
        start = (jnp.zeros(4), jnp.zeros(4))
        _, hs = jax.lax.scan(lambda carry, x: cell(p, carry, x), start, xs)
        return jnp.sum(hs**2)

    return loss, ({"w": normal(7, 16), "b": normal(16)}, normal(6, 3))


def flax_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    x = normal(2, 5, 8)
    return module.apply, (module.init(KEY, x), x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.LayerNorm()(nn.avg_pool(x, (2, 2)).reshape(x.shape[0], -1))
        return nn.log_softmax(nn.Dense(3)(x))


def flax_convnet():
    x = normal(2, 6, 6, 1)
    return Net().apply, (Net().init(KEY, x), x)


def flax_nnx():
    graph, state = nnx.split(nnx.LayerNorm(6, rngs=nnx.Rngs(0)))
    return lambda state, x: jnp.tanh(nnx.merge(graph, state)(x)), (state, normal(3, 6))


def equinox_mlp():
    arrays, rest = eqx.partition(eqx.nn.MLP(3, 2, 8, 2, key=KEY), eqx.is_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), (arrays, normal(4, 3))


def equinox_gru():
    arrays, rest = eqx.partition(eqx.nn.GRUCell(3, 4, key=KEY), eqx.is_array)

    def run(arrays, xs):
        cell = eqx.combine(arrays, rest)
        return jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(4), xs)[0]

    return run, (arrays, normal(5, 3))


MODELS = (mlp, convnet, transformer_block, lstm, equinox_mlp, equinox_gru)
FLAX = (flax_attention, flax_convnet, flax_nnx)


def traced_bytes(fn, *args):
    """What is kept, arguments not counted, when JAX traces the pass."""

    def kept(*args):
        free = {id(leaf) for leaf in jax.tree.leaves(args)}
        return [k for k in jax.tree.leaves(jax.vjp(fn, *args)[1]) if id(k) not in free]

    return sum(k.size * k.dtype.itemsize for k in jax.eval_shape(kept, *args))


# Without jit, JAX copies what flax converts to the dtype that it has.
@pytest.mark.parametrize(
    ("model", "jit"), [(m, j) for m in MODELS + FLAX for j in (False, True) if j or m not in FLAX]
)
def test_totals_to_the_byte(model, jit):
    fn, args = model()
    fn = jax.jit(fn) if jit else fn
    leaves = jax.tree.leaves(jax.vjp(fn, *args)[1])
    ledger = saved(fn, *args)
    # Row by row, and so in sum.
    kept = sorted((leaf.shape, str(leaf.dtype), leaf.nbytes) for leaf in leaves)
    assert sorted((r.shape, r.dtype, r.bytes) for r in ledger.rows) == kept
    assert ledger.bytes + ledger.argument_bytes == sum(leaf.nbytes for leaf in leaves)
    assert ledger.bytes == saved_bytes(fn, *args)
    for sums in (ledger.by_layer(), ledger.by_rule(), ledger.by_source()):
        assert sum(sums.values()) == ledger.bytes
        assert list(sums.values()) == sorted(sums.values(), reverse=True)
    assert [r.bytes for r in ledger.rows] == sorted((r.bytes for r in ledger.rows), reverse=True)
    assert all(row.source and row.operation for row in ledger.rows)
    # The same from shapes alone, and under the other rules.
    shapes = jax.eval_shape(lambda args: args, args)
    assert saved(fn, *shapes).rows == ledger.rows
    with autodiff():
        assert ledger.comparison.autodiff == traced_bytes(fn, *args)
    assert ledger.comparison.checkpoint == traced_bytes(jax.checkpoint(fn), *args)


@pytest.mark.parametrize("model", FLAX[1:])
def test_the_total_of_flax_without_jit(model):
    fn, args = model()
    ledger = saved(fn, *args)
    leaves = jax.tree.leaves(jax.vjp(fn, *args)[1])
    assert ledger.bytes + ledger.argument_bytes == sum(leaf.nbytes for leaf in leaves)


def line_of(function, text):
    """`file.py:12` of the line of a function's source that holds a text."""
    lines, start = inspect.getsourcelines(function)
    (at,) = (i for i, line in enumerate(lines) if text in line)
    path = Path(inspect.getsourcefile(function)).relative_to(Path.cwd())
    return f"{path}:{start + at}"


def test_who_keeps_and_who_made():
    net = serial(dense(4), layer_norm(), residual(serial(dense(4), gelu)))
    x = normal(5, 4)
    params, _ = net.init(KEY, x)

    def loss(params, x):
        return jnp.sum(net(params, x))

    ledger = saved(loss, params, x)
    rows = [row for row in ledger.rows if not row.is_argument]
    of_norm = [row for row in rows if row.rule == "layer_norm"]
    # Its input, and two numbers a row.
    assert sorted(row.shape for row in of_norm) == [(5, 1), (5, 1), (5, 4)]
    assert {row.layer for row in of_norm} == {"serial/layer_norm_0"}
    inside = "serial/residual_0/serial_0/"
    assert {(row.layer, row.rule) for row in rows} == {
        ("serial/layer_norm_0", "layer_norm"),
        (inside + "dense_0", "linear"),
        (inside + "gelu_0", "gelu"),
    }
    assert ledger.by_rule() == {"layer_norm": 80 + 40, "linear": 80, "gelu": 80}
    assert ledger.by_source() == {line_of(loss, "net(params"): ledger.bytes}
    first = next(row for row in ledger.rows if row.source == "argument 1")
    assert first.is_argument and first.layer == "serial/dense_0" and first.rule == "linear"
    weight = "argument 0['dense_0']['w']"
    assert any(row.source == weight and row.operation == "argument" for row in ledger.rows)


def test_layer_norm_keeps_less_than_autodiff():
    def loss(x):
        return jnp.sum(ops.layer_norm(ops.layer_norm(x * 2)))

    x = normal(16, 128)
    comparison = saved(loss, x).comparison
    # Twice the input and two numbers a row, and the 2.
    assert comparison.hand_rules == 2 * 4 * (16 * 128 + 2 * 16) + 4 < comparison.autodiff
    assert comparison.checkpoint == 0 and comparison.compiled is None
    compiled = saved(loss, x).compiled()
    assert compiled.comparison[:3] == comparison[:3]
    gradient = jax.jit(jax.value_and_grad(loss)).lower(x).compile()
    assert compiled.comparison.compiled == gradient.memory_analysis().temp_size_in_bytes > 0


@jax.custom_vjp
def cube(x):
    return x**3


def cube_forward(x):
    return x**3, (x, jnp.square(x))


def cube_backward(kept, dy):
    return (3 * kept[1] * dy,)


cube.defvjp(cube_forward, cube_backward)


def test_a_foreign_rule_is_named():
    rows = saved(lambda x: cube(jnp.sin(x)), normal(3)).rows
    made = {row.operation: row.source for row in rows if row.rule == "test_ledger.cube_backward"}
    assert made.keys() == {"sin", "square"}
    assert made["square"] == line_of(cube_forward, "return")


def containers():
    """Each a function of x, which keeps a sine at the marked line, and where it does."""

    def scan(x):
        def step(carry, _):
            with jax.named_scope("step"):
                return cube(jnp.sin(carry)), carry  # here

        return jax.lax.scan(step, x, None, length=3)

    def jit(x):
        @jax.jit
        def inside(x):
            with jax.named_scope("inner"):
                return cube(jnp.sin(x))  # here

        with jax.named_scope("outer"):
            return inside(x) + 1

    def cond(x):
        def yes(x):
            with jax.named_scope("yes"):
                return cube(jnp.sin(x))  # here

        return jax.lax.cond(x[0] > 0, yes, lambda x: x, x)

    def shard_map(x):
        def shard(x):
            with jax.named_scope("shard"):
                return cube(jnp.sin(x))  # here

        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("d")
        return jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    def vmap(x):
        def one(x):
            with jax.named_scope("one"):
                return cube(jnp.sin(x))  # here

        return jax.vmap(one)(x)

    return (
        (scan, "step", (3, 4)),
        (jit, "outer/inner", (4,)),
        (cond, "yes", (4,)),
        (shard_map, "shard", (4,)),
        (vmap, "one", (4,)),
    )


@pytest.mark.parametrize("case", containers(), ids=lambda case: case[0].__name__)
def test_containers_are_seen_through(case):
    fn, layer, shape = case
    x = normal(4)
    ledger = saved(fn, x)
    (row,) = (r for r in ledger.rows if r.operation == "sin")
    assert row[1:6] == (shape, "float32", layer, "test_ledger.cube_backward", line_of(fn, "# here"))
    assert ledger.bytes == saved_bytes(fn, x)


def test_a_checkpoint_is_seen_through():
    def block(x):
        with jax.named_scope("block"):
            return jnp.sin(jnp.exp(x))

    def loss(x):
        with jax.named_scope("model"):
            return jax.checkpoint(block)(jnp.cos(x))  # here

    (of_cos, kept) = sorted(saved(loss, normal(4)).rows, key=lambda row: row.operation)
    assert kept.operation == "sin" and kept.layer == "model"
    assert (of_cos.operation, of_cos.layer, of_cos.rule) == ("cos", "model/block", None)
    assert of_cos.source == line_of(loss, "# here")


def test_a_jitted_function_traced_for_another_line():
    def loss(x):
        x = jnp.where(x > 0, x * 2, x)  # first
        return jnp.where(x > 1, x * 3, x)  # second

    made = [row.source for row in saved(loss, normal(4)).rows if row.dtype == "bool"]
    assert made == [line_of(loss, "# first"), line_of(loss, "# second")]


def test_a_loop_without_derivative_makes_a_residual():
    def loss(x):
        bound = jax.lax.while_loop(lambda v: v < 9, lambda v: v * 2, jax.lax.stop_gradient(x))
        return x * bound  # here

    (row,) = (row for row in saved(loss, 1.5).rows if not row.is_argument)
    assert row.operation == "mul" and row.source == line_of(loss, "lambda v: v * 2")


def test_shared_arrays_are_one_row():
    def loss(x, w):
        h = jnp.exp(x)
        with jax.named_scope("a"):
            y = ops.linear(h, w)
        with jax.named_scope("b"):
            return y + jnp.sin(ops.gelu(h))

    rows = [row for row in saved(loss, normal(3, 3), normal(3, 3)).rows if row.operation == "exp"]
    (row,) = rows
    assert row.rule in ("linear", "gelu")
    assert set(row.shared) | {f"{row.rule} in {row.layer}"} == {
        "linear in a",
        "gelu in b",
        "autodiff",
    }


def test_what_a_scan_returns_twice_are_two_rows():
    @jax.custom_vjp
    def twice(x):
        return x * 2

    def forward(x):
        return x * 2, (x, x)

    twice.defvjp(forward, lambda kept, dy: (2 * dy + 0 * kept[0] * kept[1],))

    def loss(x):
        return jax.lax.scan(lambda carry, _: (twice(jnp.sin(carry)), None), x, None, length=3)

    leaves = jax.tree.leaves(jax.vjp(loss, normal(4))[1])
    ledger = saved(loss, normal(4))
    assert ledger.bytes == sum(leaf.nbytes for leaf in leaves)
    assert len(leaves) == len(ledger.rows)
    assert [row.operation for row in ledger.rows].count("sin") == len(ledger.rows) - 1


def test_what_checkpoint_cannot_repeat():
    def loss(x):
        jax.experimental.io_callback(lambda: None, None, ordered=True)
        return jnp.sin(x)

    comparison = saved(loss, normal(3)).comparison
    assert comparison == (12, 12, None, None)


def test_arguments_pass_through_and_the_rest_pass_along():
    @jax.jit
    def through(x):
        return x, jnp.sin(x)

    def loss(p, key, n, name, scale=1.0):
        assert name == "twice" and n == 2
        x, _ = through(p["x"])
        return x * x * jax.random.normal(key, x.shape) * scale, p["i"]

    p = {"x": normal(4), "i": jnp.arange(3), "none": None}
    ledger = saved(loss, p, jax.random.key(1), 2, "twice", scale=normal(4))
    free = [row.source for row in ledger.rows if row.is_argument]
    assert free == ["argument 0['x']", "scale"]
    assert [(r.shape, r.operation) for r in ledger.rows if not r.is_argument] == [((4,), "mul")] * 2


def test_a_closure_is_a_constant():
    w = normal(3, 3)

    def loss(x):
        return jnp.tanh(x) @ w  # here

    row = next(r for r in saved(loss, normal(3, 3)).rows if r.operation == "constant")
    assert row.source == line_of(loss, "# here") and not row.is_argument and row.bytes == 36


def test_a_gigabyte_is_never_allocated():
    net = serial(*[serial(layer_norm(), dense(4096, activation="gelu")) for _ in range(6)])
    x = jax.ShapeDtypeStruct((16384, 4096), "float32")
    params, _ = jax.eval_shape(net.init, KEY, x)
    before = sum(a.nbytes for a in jax.live_arrays())
    ledger = saved(net, params, x)
    assert ledger.bytes > 2e9
    assert ledger.comparison.autodiff > ledger.bytes
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 1e6
    assert "GB" in str(ledger)
    assert ledger.rows[0].bytes == 16384 * 4096 * 4


# --- what a reader is shown


def large(layers=1000):
    """A model of so many layers, each with a scope and two sines."""
    widths = [1 + i % 7 for i in range(layers)]

    def loss(x):
        for i, width in enumerate(widths):
            with jax.named_scope(f"block_{i // 10}/dense_{i % 10}"):
                x = jnp.sum(jnp.sin(jnp.sin(jnp.outer(x, jnp.ones(width)))), axis=1)
        return jnp.sum(x)

    return loss, jax.ShapeDtypeStruct((1000,), "float32")


@pytest.fixture(scope="module")
def ledger_of_many():
    fn, x = large()
    return saved(fn, x)


def test_text_and_table(ledger_of_many):
    text = str(ledger_of_many)
    head, *lines = text.splitlines()
    kept = [row for row in ledger_of_many.rows if not row.is_argument]
    assert head == f"loss keeps {len(kept):,} arrays, {human(ledger_of_many.bytes)}"
    assert lines[1].split()[:5] == ["bytes", "shape", "layer", "kept", "by"]
    assert lines[3].split()[:3] == ["28", "kB", "float32[1000,7]"]
    rest = human(sum(row.bytes for row in kept[20:]))
    assert any(f"{len(kept) - 20:,} more rows, {rest}" in line for line in lines)
    assert f"by rule: autodiff {human(ledger_of_many.bytes)}" in text
    assert f"hand rules {human(ledger_of_many.bytes)}, under autodiff()" in text
    assert ledger_of_many.table(5).row_count == 6
    assert ledger_of_many.table(10**6).row_count == len(kept)
    with pytest.raises(InputError, match="limit must be a whole number from 0 up, got -1"):
        ledger_of_many.table(-1)


def test_brackets_are_not_markup():
    def loss(x):
        with jax.named_scope("[red]"):
            return jnp.sin(x)

    assert "[red]" in str(saved(loss, normal(3)))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (1_340_000_000, "1.34 GB")],
)
def test_bytes_in_words(size, text):
    assert human(size) == text


def test_json(tmp_path):
    ledger = saved(*mlp()[:1], *mlp()[1])
    plain = ledger.to_json(tmp_path / "l.json")
    assert json.loads((tmp_path / "l.json").read_text()) == plain
    assert plain["bytes"] == ledger.bytes and plain["by_rule"] == ledger.by_rule()
    assert plain["comparison"] == ledger.comparison._asdict()
    assert len(plain["rows"]) == len(ledger.rows)
    assert [row["bytes"] for row in plain["rows"]] == [row.bytes for row in ledger.rows]


def test_pandas(monkeypatch):
    ledger = saved(jnp.sin, normal(3))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        ledger.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    assert ledger.to_pandas() == [row._asdict() for row in ledger.rows]


def test_plot(monkeypatch, ledger_of_many):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    axes = ledger_of_many.plot()
    names = [label.get_text() for label in axes.get_yticklabels()]
    largest = list(ledger_of_many.by_layer().items())[:40]
    assert names == [name for name, _ in largest]
    assert "more layers keep" in axes.get_xlabel()
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == sum(size for _, size in largest)
    matplotlib.pyplot.close(axes.figure)
    fn, args = mlp()
    figure, axes = matplotlib.pyplot.subplots()
    ledger = saved(fn, *args)
    assert ledger.plot(axes) is axes
    hand, auto = ([bar.get_width() for bar in bars] for bars in axes.containers)
    by_rule = ledger.by_rule()
    assert sum(auto) == by_rule.pop("autodiff", 0)
    assert sum(hand) == sum(by_rule.values())
    matplotlib.pyplot.close(figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"funcbp\[plot\]"):
        ledger.plot()


def test_the_page_of_a_thousand_layers_in_a_browser(tmp_path, ledger_of_many):
    whole = ledger_of_many.to_html(tmp_path / "l.html")
    assert (tmp_path / "l.html").read_text() == whole
    assert whole.count("<tr>") < 600 and len(whole) < 200_000
    assert "http" not in whole and "<script" not in whole
    assert "block_*/dense_*" in whole and human(ledger_of_many.bytes) in whole
    assert '<div class="funcbp">' in ledger_of_many._repr_html_()
    browser.screenshot(tmp_path / "l.html", tmp_path / "l.png")
    image = browser.pixels(tmp_path / "l.png").astype(int)
    assert image.shape[:2] == (1000, 1000)
    # The bars, of hand rules and of autodiff.
    blue = image[..., 2] - image[..., 0] > 100
    amber = image[..., 0] - image[..., 2] > 100
    assert blue.sum(1).max() > 100 and amber.sum(1).max() > 100


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 1.0), "fn must be a function, got int 3"),
        ((jnp.sin,), "at least one argument must be floating.* got no array"),
        ((jnp.negative, jnp.arange(3)), r"must be floating.* got int32\[3\]; convert it"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        saved(*arguments)
