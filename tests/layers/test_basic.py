"""The single layers: values, parameters and what they say of bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbp import layers, ops
from funcbp.core import InputError
from funcbp.layers import dense, dropout, flatten, layer_norm, residual, serial

X = np.linspace(-1.0, 1.0, 12, dtype="float32").reshape(3, 4)
SPEC = jax.ShapeDtypeStruct((3, 4), "float32")


def test_dense_is_the_affine_op(key):
    model = dense(5, b_init=jax.nn.initializers.ones)
    params, state = model.init(key, SPEC)
    assert (params["w"].shape, params["b"].shape, state) == ((4, 5), (5,), {})
    expected = ops.linear(X, params["w"], jnp.ones(5))
    np.testing.assert_array_equal(model(params, X), expected)


def test_dense_without_bias_has_no_b(key):
    params, _ = dense(5, bias=False).init(key, SPEC)
    assert set(params) == {"w"}
    np.testing.assert_array_equal(dense(5, bias=False)(params, X), ops.linear(X, params["w"]))


@pytest.mark.parametrize("name", ["gelu", "relu", "sigmoid", "silu", "tanh"])
def test_dense_with_activation_is_the_fused_op(name, key):
    model = dense(5, activation=name)
    params, _ = model.init(key, SPEC)
    expected = ops.dense(X, params["w"], params["b"], activation=name)
    np.testing.assert_array_equal(model(params, X), expected)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dense_dtype(dtype, key):
    params, _ = dense(5, dtype=dtype).init(key, SPEC)
    assert {leaf.dtype.name for leaf in params.values()} == {dtype or "float32"}


@pytest.mark.filterwarnings("error")  # JAX warns when it is asked for float64 and cannot
def test_float64_numpy_gives_the_parameters_jax_can_hold(key):
    params, _ = dense(5).init(key, np.ones((3, 4)))
    assert params["w"].dtype == jnp.zeros(()).dtype


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"scale", "bias"}),
        ({"scale": False}, {"bias"}),
        ({"bias": False}, {"scale"}),
        ({"scale": False, "bias": False}, set()),
    ],
)
def test_layer_norm(options, names, key):
    model = layer_norm(epsilon=1e-3, **options)
    params, _ = model.init(key, SPEC)
    assert set(params) == names
    params = {name: 3.0 * p + 1.0 for name, p in params.items()}
    expected = ops.layer_norm(X, params.get("scale"), params.get("bias"), epsilon=1e-3)
    np.testing.assert_array_equal(model(params, X), expected)


def test_dropout_is_the_identity_at_inference():
    np.testing.assert_array_equal(dropout(0.9)({}, X), X)


def test_dropout_rate_is_the_share_dropped(key):
    y, _ = dropout(0.25).apply({}, {}, jnp.ones((100, 100)), key=key, train=True)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    # 10,000 draws: the share's deviation is 0.0043, and 6 of them hold for any key.
    assert abs((y == 0).mean() - 0.25) < 6 * 0.0043


def test_dropout_of_nothing_needs_no_key():
    np.testing.assert_array_equal(dropout(0.0).apply({}, {}, X, train=True)[0], X)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1, float("nan"), "half", None])
def test_dropout_checks_its_rate(rate):
    with pytest.raises(InputError, match=r"^dropout: rate must be at least 0 and below 1, got"):
        dropout(rate)


def test_missing_key_is_named_by_path(key):
    model = serial(dense(4), residual(serial(dropout(0.5))))
    params, state = model.init(key, SPEC)
    with pytest.raises(InputError, match=r"^serial/residual_0/serial_0/dropout_0: key is needed"):
        model.apply(params, state, X, train=True)
    with pytest.raises(InputError, match=r"^dropout: key is needed"):
        dropout(0.5).apply({}, {}, X, train=True)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 2, 5), (3,), (0, 2, 5)])
def test_flatten(shape):
    x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    y = flatten({}, x)
    assert y.shape == (shape[0], int(np.prod(shape[1:])))
    np.testing.assert_array_equal(y.ravel(), x.ravel())


def test_flatten_of_a_scalar():
    with pytest.raises(InputError, match="^flatten: x must have at least 1 axis"):
        flatten({}, jnp.ones(()))


@pytest.mark.parametrize(
    "name", ["gelu", "relu", "sigmoid", "silu", "tanh", "softmax", "log_softmax"]
)
def test_activations_are_the_ops(name, key):
    layer = getattr(layers, name)
    assert layer.name == name
    assert layer.init(key, SPEC) == ({}, {})
    np.testing.assert_array_equal(layer({}, X), getattr(ops, name)(X))


def test_wrong_feature_size_is_named_by_path(key):
    model = serial(layers.relu, residual(serial(dense(8), dense(4))))
    params, _ = model.init(key, SPEC)
    path = "serial/residual_0/serial_0/dense_0"
    with pytest.raises(InputError) as error:
        model(params, np.ones((3, 5), "float32"))
    assert str(error.value).startswith(
        f"{path}: x must have 4 features on its last axis, got shape (3, 5); "
    )


@pytest.mark.parametrize("layer", [dense(2), layer_norm()], ids=["dense", "layer_norm"])
@pytest.mark.parametrize("use", ["init", "apply"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.ones((3, 4), "int32"),), r"x must be floating, got int32 of shape \(3, 4\)"),
        ((np.float32(1.0),), r"x must have at least 1 axis, got shape \(\)"),
        ((X, X), r"x must be one array, got 2 inputs"),
        ((), r"x must be one array, got 0 inputs"),
        (([[1.0], [2.0]],), r"x must be an array, got a list"),
    ],
)
def test_bad_input(layer, use, inputs, message, key):
    params, _ = layer.init(key, SPEC)
    with pytest.raises(InputError, match=f"^{layer.name}: {message}"):
        layer.init(key, *inputs) if use == "init" else layer(params, *inputs)


def test_layer_norm_of_another_size(key):
    params, _ = layer_norm().init(key, SPEC)
    with pytest.raises(InputError, match=r"^layer_norm: x must fit scale of shape \(4,\)"):
        layer_norm()(params, X[:, :3])


def test_stacked_parameters_need_vmap(key):
    stacked, _ = jax.vmap(dense(2).init, (0, None))(jax.random.split(key, 5), X)
    with pytest.raises(InputError, match=r"^dense: w must have 2 axes .* got shape \(5, 4, 2\)"):
        dense(2)(stacked, X)
    assert jax.vmap(dense(2), (0, None))(stacked, X).shape == (5, 3, 2)


@pytest.mark.parametrize("features", [0, -1, 2.0, "8", None])
def test_dense_checks_features(features):
    with pytest.raises(InputError, match="^dense: features must be a whole number from 1 up"):
        dense(features)


@pytest.mark.parametrize("activation", ["softmax", "identity", jax.nn.relu, layers.relu])
def test_dense_checks_activation(activation):
    with pytest.raises(InputError, match="^dense: activation must be None or one of gelu, relu"):
        dense(3, activation=activation)
