"""The table of a model against the model itself."""

import jax
import jax.numpy as jnp
import pytest

from funcbp import layers
from funcbp.core import InputError
from funcbp.layers import Layer, concat, dense, layer_norm, lift, residual, serial, summary

SPEC = jax.ShapeDtypeStruct((3, 4), "float32")


def model():
    block = residual(serial(layer_norm(), dense(4, dtype="bfloat16")))
    return serial(dense(4), block, concat(dense(2), layers.gelu), dense(1000, bias=False))


def test_counts_are_those_of_the_parameters(key):
    params, _ = model().init(key, SPEC)
    table = summary(model(), SPEC)
    for row in table.rows:
        mine = params
        for name in row.path.split("/")[1:]:
            mine = mine.get(name, {})
        leaves = jax.tree.leaves(mine)
        assert row.parameters == sum(leaf.size for leaf in leaves), row.path
        assert row.bytes == sum(leaf.nbytes for leaf in leaves), row.path
    assert table.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert table.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_rows_stand_parents_first():
    assert [(row.path, row.kind, row.depth) for row in summary(model(), SPEC).rows] == [
        ("serial", "serial", 0),
        ("serial/dense_0", "dense", 1),
        ("serial/residual_0", "residual", 1),
        ("serial/residual_0/serial_0", "serial", 2),
        ("serial/residual_0/serial_0/layer_norm_0", "layer_norm", 3),
        ("serial/residual_0/serial_0/dense_0", "dense", 3),
        ("serial/concat_0", "concat", 1),
        ("serial/concat_0/dense_0", "dense", 2),
        ("serial/concat_0/gelu_0", "gelu", 2),
        ("serial/dense_1", "dense", 1),
    ]


def test_outputs_are_those_of_the_layers():
    outputs = {row.path: row.output for row in summary(model(), SPEC).rows}
    assert outputs["serial/concat_0/dense_0"] == jax.ShapeDtypeStruct((3, 2), "float32")
    assert outputs["serial/concat_0"] == jax.ShapeDtypeStruct((3, 6), "float32")
    assert outputs["serial"] == jax.ShapeDtypeStruct((3, 1000), "float32")


def test_text():
    lines = str(summary(model(), SPEC)).splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "bytes"]
    assert lines[2].split() == ["serial", "serial", "float32[3,", "1000]", "6,058", "24,192"]
    (deep,) = [line for line in lines if "layer_norm_0" in line]
    assert deep.index("layer_norm_0") == lines[2].index("serial") + 2 * 3
    assert lines[-1].split() == ["total", "6,058", "24,192"]


def test_a_layer_of_ones_own_and_several_outputs(counter):
    def halves(x):
        return x[:, :2], x[:, 2:]

    table = summary(serial(counter, lift(halves)), SPEC)
    assert [row.path for row in table.rows] == ["serial", "serial/counter_0", "serial/halves_0"]
    assert "float32[3, 2], float32[3, 2]" in str(table)


def test_a_raw_layer_at_the_root(counter):
    (row,) = summary(counter, SPEC).rows
    assert row == ("counter", "counter", SPEC, 0, 0)


def test_no_array_is_made():
    seen = []

    def init(key, x):
        return {"w": jnp.ones((4, 4))}, {}

    def apply(params, state, x, *, key=None, train=False):
        seen.append((params["w"], x))
        return x @ params["w"], state

    # 4 TB of input: it could not be computed.
    summary(Layer(init, apply), jax.ShapeDtypeStruct((10**12 // 4, 4), "float32"))
    assert seen and all(isinstance(v, jax.core.Tracer) for pair in seen for v in pair)


def test_a_layer_met_twice_is_one_row():
    inner = dense(4)

    def loop(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, y: serial(inner)(params, y), x)

    def init(key, x):
        return serial(inner).init(key, x)[0]

    table = summary(lift(loop, init), SPEC)
    assert [(row.path, row.parameters) for row in table.rows] == [
        ("loop", 20),
        ("loop/dense_0", 20),
    ]


def test_wrong_input_names_the_layer():
    bad = serial(dense(4), residual(dense(3)))
    with pytest.raises(InputError, match="^serial/residual_0: the layer inside must keep"):
        summary(bad, SPEC)


def test_nothing_is_recorded_afterwards(key):
    table = summary(model(), SPEC)
    before = len(table.rows)
    params, _ = model().init(key, SPEC)
    model()(params, jnp.ones((3, 4)))
    assert len(table.rows) == before
