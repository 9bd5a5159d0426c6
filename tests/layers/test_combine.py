"""Compositions: what they compute, the names in their trees, their keys and their state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbp import layers
from funcbp.core import InputError
from funcbp.layers import concat, dense, dropout, layer_norm, lift, parallel, residual, serial

X = np.linspace(-1.0, 1.0, 12, dtype="float32").reshape(3, 4)
SPEC = jax.ShapeDtypeStruct((3, 4), "float32")


def double(x):
    return 2 * x


def plus_one(x):
    return x + 1


def add(x, y):
    return x + y


def paths(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return ["/".join(step.key for step in path) for path, _ in found]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (serial(lift(double), lift(plus_one)), 2 * X + 1),
        (serial(lift(plus_one), lift(double)), 2 * (X + 1)),
        (serial(), X),
        (residual(lift(double)), 3 * X),
        (serial(parallel(lift(double), lift(plus_one)), lift(add)), 2 * X + (X + 1)),
        (concat(lift(double), lift(plus_one)), np.concatenate([2 * X, X + 1], axis=-1)),
        (concat(lift(double), lift(plus_one), axis=0), np.concatenate([2 * X, X + 1])),
    ],
)
def test_value(model, expected, key):
    assert model.init(key, SPEC) == ({}, {})
    np.testing.assert_array_equal(model({}, X), expected)


def test_parallel_gives_a_tuple():
    one, two = parallel(lift(double), lift(plus_one))({}, X)
    np.testing.assert_array_equal(one, 2 * X)
    np.testing.assert_array_equal(two, X + 1)


def test_several_inputs():
    model = serial(lift(add), lift(double))
    np.testing.assert_array_equal(model({}, X, np.ones_like(X)), 2 * (X + 1))


def test_paths_number_the_children_by_kind(key):
    inner = serial(layer_norm(), dense(4), layers.gelu, dense(4))
    model = serial(dense(4), residual(inner), residual(dense(4, bias=False)), dense(2))
    params, state = model.init(key, SPEC)
    assert state == {}
    assert sorted(paths(params)) == [
        "dense_0/b",
        "dense_0/w",
        "dense_1/b",
        "dense_1/w",
        "residual_0/serial_0/dense_0/b",
        "residual_0/serial_0/dense_0/w",
        "residual_0/serial_0/dense_1/b",
        "residual_0/serial_0/dense_1/w",
        "residual_0/serial_0/layer_norm_0/bias",
        "residual_0/serial_0/layer_norm_0/scale",
        "residual_1/dense_0/w",
    ]


def test_init_infers_shapes_from_specs(key):
    model = serial(concat(dense(5), dense(6)), layers.flatten, residual(dense(22)), dense(3))
    spec = jax.ShapeDtypeStruct((7, 2, 4), "bfloat16")
    params, _ = model.init(key, spec)
    assert params["concat_0"]["dense_1"]["w"].shape == (4, 6)
    assert params["residual_0"]["dense_0"]["w"].shape == (22, 22)
    assert params["dense_0"]["w"].shape == (22, 3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    from_array, _ = model.init(key, jnp.ones(spec.shape, spec.dtype))
    jax.tree.map(np.testing.assert_array_equal, params, from_array)


def test_siblings_start_different(key):
    params, _ = serial(dense(4), dense(4), residual(dense(4))).init(key, SPEC)
    ws = [params["dense_0"]["w"], params["dense_1"]["w"], params["residual_0"]["dense_0"]["w"]]
    assert not any((ws[i] == ws[j]).any() for i, j in [(0, 1), (0, 2), (1, 2)])


def test_keys_decide_dropout_alone(key):
    model = serial(residual(dropout(0.5)), residual(serial(dropout(0.5))), dense(64))
    x = jnp.ones((8, 64))
    params, state = model.init(key, x)

    def run(seed):
        return model.apply(params, state, x, key=jax.random.key(seed), train=True)[0]

    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()


def test_two_dropouts_draw_different_bits(key):
    model = parallel(dropout(0.5), dropout(0.5), serial(dropout(0.5)))
    masks = model.apply({}, {}, jnp.ones((8, 64)), key=key, train=True)[0]
    assert all(0 < (mask == 0).mean() < 1 for mask in masks)
    assert all((masks[i] != masks[j]).any() for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda counter: serial(dense(4), counter), ("counter_0",)),
        (lambda counter: residual(counter), ("counter_0",)),
        (lambda counter: parallel(counter, layers.relu), ("counter_0",)),
        (lambda counter: concat(layers.relu, counter), ("counter_0",)),
        (
            lambda counter: serial(residual(serial(counter))),
            ("residual_0", "serial_0", "counter_0"),
        ),
    ],
)
def test_state_runs_through(wrap, path, counter, key):
    model = wrap(counter)
    params, state = model.init(key, SPEC)
    started = jax.tree.structure(state)
    for train in (True, False, True):
        _, state = model.apply(params, state, X, key=key, train=train)
    assert jax.tree.structure(state) == started
    for name in path:
        state = state[name]
    assert state == {"count": 2}


def test_state_enters_the_output(counter, key):
    model = serial(counter, counter)
    params, state = model.init(key, SPEC)
    first, state = model.apply(params, state, X, train=True)
    second, _ = model.apply(params, state, X, train=True)
    np.testing.assert_array_equal(first, X)
    np.testing.assert_array_equal(second, X + 1 + 1)


def test_state_is_a_scan_carry(counter, key):
    model = serial(residual(counter), layers.relu)
    params, state = model.init(key, SPEC)

    def step(state, x):
        _, state = model.apply(params, state, x, train=True)
        return state, None

    state, _ = jax.lax.scan(step, state, jnp.ones((5, 3, 4)))
    assert state["residual_0"]["counter_0"]["count"] == 5


@pytest.mark.parametrize("params_and_state", [({}, {}), ({}, None)])
def test_stateless_call_of_a_stateful_model_says_what_to_do(params_and_state, counter):
    params, state = params_and_state
    model = serial(residual(counter))
    with pytest.raises(InputError) as error:
        model(params, X) if state is None else model.apply(params, state, X)
    assert str(error.value).startswith("serial/residual_0/counter_0: state is needed")
    assert "model.apply(params, state, x)" in str(error.value)


def test_missing_params_name_the_layer(key):
    model = serial(dense(4), residual(dense(4)))
    params, _ = model.init(key, SPEC)
    del params["residual_0"]
    with pytest.raises(InputError, match=r"^serial/residual_0/dense_0: params must hold"):
        model(params, X)


def test_params_must_be_the_dict(key):
    model = serial(dense(4))
    with pytest.raises(InputError, match=r"^serial: params must be the dict .* got tuple"):
        model(model.init(key, SPEC), X)


@pytest.mark.parametrize("use", ["init", "apply"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (serial(residual(lift(jnp.sum))), r"^serial/residual_0: .* got x \(3, 4\) and f\(x\) \(\)"),
        (residual(parallel(layers.relu)), r"^residual: each layer inside must return one array"),
        (concat(layers.relu, lift(jnp.sum)), r"^concat: .* got shapes \(3, 4\), \(\)"),
        (concat(layers.relu, lift(jnp.transpose)), r"^concat: .* shapes \(3, 4\), \(4, 3\)"),
        (concat(layers.relu, axis=2), r"^concat: .* every axis but 2"),
    ],
)
def test_shapes_that_do_not_compose(model, message, use, key):
    with pytest.raises(InputError, match=message):
        model.init(key, SPEC) if use == "init" else model({}, X)


@pytest.mark.parametrize("combinator", [serial, parallel, concat])
def test_arguments_must_be_layers(combinator):
    name = combinator.__name__
    with pytest.raises(InputError, match=f"^{name}: argument 1 must be a Layer, got double; "):
        combinator(layers.relu, double)


def test_residual_takes_a_layer():
    with pytest.raises(InputError, match="^residual: argument 0 must be a Layer, got dense; "):
        residual(dense)


def test_concat_needs_a_layer():
    with pytest.raises(InputError, match="^concat: at least one layer is needed"):
        concat()


def test_jit_and_grad(key):
    block = residual(serial(layer_norm(), dense(4, activation="gelu"), dropout(0.5)))
    model = serial(dense(4), block, dense(2))
    params, state = model.init(key, SPEC)

    def loss(params, key):
        y, _ = model.apply(params, state, X, key=key, train=True)
        return (y**2).sum()

    grads = jax.jit(jax.grad(loss))(params, key)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    step = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    assert loss(step, key) < loss(params, key)


def test_jit_of_init_and_of_the_model(key):
    model = serial(dense(4), residual(dense(4)))
    params, _ = jax.jit(model.init)(key, X)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.init(key, X)[0])
    assert jax.jit(model)(params, X).shape == (3, 4)


def test_children_are_named_in_the_program(key):
    model = serial(dense(4), residual(dense(4)))
    params, _ = model.init(key, SPEC)
    text = jax.jit(model).lower(params, X).as_text(debug_info=True)
    assert "serial/residual_0/dense_0" in text
