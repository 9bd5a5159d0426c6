"""The chain rule's factors, their product, and what its order costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbp.core import InputError
from funcbp.layers import Layer, dense, flatten, layer_norm, lift, parallel, residual, serial, tanh
from funcbp.trace.chain import chain_rule
from funcbp.trace.costs import MEASURED, flops_of, from_left, from_right

KEY = jax.random.key(0)


def close(got, truth):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, truth)


def square_sum(y):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


def model(x):
    net = serial(dense(3, activation="sigmoid"), serial(dense(2), tanh), dense(2, bias=False))
    return net, net.init(KEY, x)[0]


def test_two_functions_by_hand():
    result = chain_rule([jnp.square, jnp.sin], 0.8)
    close(result.factors, (jnp.array([[1.6]]), jnp.array([[jnp.cos(0.64)]])))
    close(result.input_gradient, 1.6 * np.cos(0.64))
    close(result.value, np.sin(0.64))
    assert result.input_gradient.shape == () and result.gradients is None
    assert (result.flops_left, result.flops_right) == (2, 2)
    assert result.evaluations == (1, 2)


def test_products_are_from_the_left():
    a, b, c = (np.random.default_rng(0).normal(size=s) for s in ((3, 2), (4, 3), (1, 4)))
    result = chain_rule([lambda h, m=m: jnp.asarray(m) @ h for m in (a, b, c)], jnp.ones(2))
    close(result.products, (c @ b @ a, c @ b, c))
    assert [s.name for s in result.steps] == ["f1", "f2", "f3"]
    assert result.flops_left == 2 * 1 * 4 * 3 + 2 * 1 * 3 * 2
    assert result.flops_right == 2 * 4 * 3 * 2 + 2 * 1 * 4 * 2


@pytest.mark.parametrize("limit", [2**22, 0])
def test_a_model_equals_grad(limit):
    x = jnp.linspace(-1, 1, 4)
    net, params = model(x)
    result = chain_rule(net, x, params=params, loss=square_sum, limit=limit)

    def loss(params, x):
        return square_sum(net(params, x))

    truth = jax.grad(loss, argnums=(0, 1))(params, x)
    assert jax.tree.structure(result.gradients) == jax.tree.structure(params)
    close((result.gradients, result.input_gradient), truth)
    close(result.value, loss(params, x))
    assert result.error < 1e-6
    assert [s.name for s in result.steps] == [
        "dense_0",
        "serial_0/dense_0",
        "serial_0/tanh_0",
        "dense_1",
        "loss",
    ]
    assert result.parameters == 15 + 8 + 4
    assert result.evaluations.finite_differences == 28
    assert len(result.factors) == len(result.parameter_factors) == (5 if limit else 0)
    assert len(result.products) == 5


def test_theta_is_weights_then_biases():
    h = jnp.array([0.5, -2.0])
    net = serial(dense(3))
    params, _ = net.init(KEY, h)
    result = chain_rule(net, h, params=params)
    (step,) = result.steps
    assert step.parts == ("w", "b")
    expected = np.concatenate([np.kron(h, np.eye(3)), np.eye(3)], axis=1)
    close(step.parameter_factor, expected)
    close(step.factor, params["dense_0"]["w"].T)
    # More than one output: Jacobians in the shapes that jax.jacobian gives.
    close(result.gradients, jax.jacobian(lambda p: net(p, h))(params))
    close(result.input_gradient, params["dense_0"]["w"].T)


def test_functions_with_parameters():
    def affine(theta, h):
        w, b = theta
        return w @ h + b

    thetas = [(jnp.ones((3, 2)), jnp.arange(3.0)), None, 2.0]
    functions = [affine, jnp.tanh, jnp.multiply]
    x = jnp.array([0.1, 0.2])
    result = chain_rule(functions, x, params=thetas, loss=jnp.sum)
    truth = jax.grad(lambda t: jnp.sum(t[2] * jnp.tanh(affine(t[0], x))))(thetas)
    close(result.gradients, truth)
    assert [s.parameters for s in result.steps] == [9, 0, 1, 0]


def test_a_layer_among_functions():
    x = jnp.arange(3.0)
    layer = dense(2)
    params, _ = layer.init(KEY, x)
    result = chain_rule([layer, tanh, jnp.sum], x, params=[params, None, None])
    close(result.gradients[0], jax.grad(lambda p: jnp.sum(jnp.tanh(layer(p, x))))(params))


def test_any_layer_is_a_step(key=KEY):
    """A graph inside is one factor; several arrays between two layers are one vector."""
    x = jnp.linspace(-1, 1, 12).reshape(2, 6)
    add = lift(jnp.add, name="add")
    net = serial(residual(serial(layer_norm(), dense(6))), parallel(dense(3), dense(3)), add)
    params, _ = net.init(key, x)
    result = chain_rule(net, x, params=params, loss=square_sum)
    close(result.gradients, jax.grad(lambda p: square_sum(net(p, x)))(params))
    assert [s.rows for s in result.steps] == [12, 12, 6, 1]
    assert result.steps[0].parts[:2] == ("serial_0/dense_0/w", "serial_0/dense_0/b")


def test_a_model_with_state():
    def init(key, x):
        return {"w": jnp.ones(())}, {"scale": jnp.full((), 3.0)}

    def apply(params, state, x, *, key=None, train=False):
        return x * params["w"] * state["scale"], state

    net = serial(Layer(init, apply, "scaled"), tanh)
    params, state = net.init(KEY, jnp.ones(2))
    result = chain_rule(net, jnp.ones(2), params=params, state=state, loss=jnp.sum)
    close(result.gradients["scaled_0"]["w"], 2 * 3 * (1 - np.tanh(3.0) ** 2))


def test_whole_numbers_in():
    def embed(table, tokens):
        return table[tokens]

    table = jnp.arange(8.0).reshape(4, 2)
    tokens = jnp.array([1, 1, 3])
    for limit in (2**22, 0):
        result = chain_rule(
            [embed], tokens, params=[table], loss=lambda h: jnp.sum(h**2), limit=limit
        )
        assert result.input_gradient is None and result.steps[0].columns == 0
        close(result.gradients[0], jax.grad(lambda t: jnp.sum(t[tokens] ** 2))(table))


def test_bfloat16():
    x = jnp.linspace(-1, 1, 4).astype(jnp.bfloat16)
    net, params = model(x)
    result = chain_rule(net, x, params=params, loss=square_sum)
    assert result.gradients["dense_0"]["w"].dtype == jnp.bfloat16
    assert result.factors[0].dtype == jnp.float32
    assert result.error < 0.05


def test_both_orders_are_the_same_product():
    x = jnp.linspace(-1, 1, 4)
    net, params = model(x)
    result = chain_rule(net, x, params=params, loss=square_sum)
    matrices = result.factors, result.parameter_factors
    product, gradients = from_left(*matrices)
    columns = from_right(*matrices)
    close(jnp.concatenate([product, *gradients[::-1]], axis=1), columns)
    # What is counted is what the products take: XLA says the same.
    assert result.flops_left == flops_of(from_left, *matrices)
    assert result.flops_right == flops_of(from_right, *matrices)


def test_both_orders_are_measured():
    functions = [jnp.sin] * 4 + [jnp.sum]
    result = chain_rule(functions, jnp.ones(128))
    assert MEASURED[0] < result.flops_right == 3 * 2 * 128**3 + 2 * 128**2
    assert 0 < result.seconds_left < result.seconds_right
    assert "measured" in str(result)
    assert chain_rule(functions, jnp.ones(128), measure=False).seconds_left is None
    assert chain_rule(functions, jnp.ones(2)).seconds_left is None


def test_large_models_build_no_jacobian(monkeypatch):
    x = jnp.ones((32, 28, 28))
    net = serial(flatten, dense(512, activation="relu"), dense(10))
    params, _ = net.init(KEY, x)
    seen = []
    eye = jnp.eye
    monkeypatch.setattr(jnp, "eye", lambda n, **kw: seen.append(n) or eye(n, **kw))
    result = chain_rule(net, x, params=params, loss=square_sum)
    assert set(seen) <= {1}
    assert result.factors == () and result.error < 1e-5
    close(result.gradients, jax.grad(lambda p: square_sum(net(p, x)))(params))
    rows = [32 * 28 * 28, 32 * 512, 32 * 10, 1]
    assert [s.rows for s in result.steps] == rows
    of_dense_1 = 2 * (32 * 10) * (32 * 512 + 5130)
    of_dense_0 = 2 * (32 * 512) * (32 * 784 + 401920)
    of_flatten = 2 * (32 * 784) * (32 * 784)
    assert result.flops_left == of_dense_1 + of_dense_0 + of_flatten < result.flops_right / 1000
    # Backpropagation costs a small multiple of the forward pass.
    assert result.flops_forward < result.flops_backpropagation < 4 * result.flops_forward
    assert chain_rule(net, x, params=params).gradients is None  # 320 outputs, 320 rows


def test_shapes_alone():
    x = jax.ShapeDtypeStruct((10**6, 4096), "float32")
    net = serial(dense(4096), tanh, dense(1))
    params, _ = jax.eval_shape(net.init, KEY, x)
    result = chain_rule(net, x, params=params, loss=jnp.sum)
    assert result.gradients is None and result.value is None and result.products == ()
    assert result.steps[1].columns == 4096 * 10**6
    assert result.evaluations.finite_differences == 4096**2 + 4096 + 4097 + 1
    assert "[4,096,000,000 x 4,096,000,000]" in str(result)


def test_text():
    net = serial(dense(2, activation="tanh"))
    x = jnp.array([1.0, -1.0])
    params = {"dense_0": {"w": jnp.eye(2), "b": jnp.zeros(2)}}
    text = str(chain_rule(net, x, params=params, loss=jnp.sum))
    header, _, last, first = text.splitlines()[:4]
    assert header.split()[:3] == ["n", "f_n", "h_n"]
    assert last.split()[:3] == ["2", "loss", "float32[]"]
    assert first.split()[1:6] == ["dense_0", "float32[2]", "[2", "x", "2]"]
    assert "∂L/∂h_1 = [1  1]" in text
    assert "        = [1  1] · [0.42     0] = [0.42  0.42]" in text
    assert "evaluations of L: 1; by finite differences 7" in text
    assert max(map(len, text.splitlines())) <= 110


def test_long_chains_are_abridged():
    result = chain_rule([jnp.sin] * 100, 0.5)
    assert result.table().row_count == 41
    assert "60 more" in str(result) and "·" not in str(result)
    assert result.equations().count("·") == 2 * 99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1.0, {}), r"at least one function, the first to be called first, got \[\]"),
        ((3, 1.0, {}), "must be a model, or a list .* got 3"),
        (([jnp.sin, 3], 1.0, {}), r"functions\[1\] must be a function, got int 3"),
        (([jnp.sin], "x", {}), "x must be an array .* got str 'x'"),
        (([jnp.sin], 1, {}), r"x must be floating .* got int32\[\]; convert it"),
        (([jnp.sin, jnp.argmax], jnp.ones(3), {}), r"step 2, argmax: .* got int32\[\]"),
        (([jnp.sin], jnp.ones(3), {"loss": jnp.cos}), r"step 2, loss: .*scalar, got float32\[3\]"),
        (([jnp.sin], 1.0, {"loss": 2}), "loss must be a function of the output, got 2"),
        (([jnp.sin], 1.0, {"params": [1.0, 2.0]}), "each of the 1 functions, got 2; put None"),
        (([jnp.multiply], 1.0, {"params": [2]}), r"params\[0\] must be floating, got int32"),
        (([jnp.sin], 1.0, {"state": {}}), "state must be None for functions"),
        (([jnp.sin], 1.0, {"limit": -1}), "limit must be a whole number from 0 up, got -1"),
        ((serial(dense(2)), jnp.ones(3), {}), "serial/dense_0: params must hold an entry"),
    ],
)
def test_bad_input(arguments, message):
    functions, x, settings = arguments
    with pytest.raises(InputError, match=message):
        chain_rule(functions, x, **settings)


def test_parameters_of_another_model():
    net, params = model(jnp.ones(4))
    with pytest.raises(InputError, match="got 6 arrays where the layers take 5"):
        chain_rule(net, jnp.ones(4), params=params | {"dense_9": jnp.ones(2)})


def test_an_error_of_a_function_names_its_step():
    with pytest.raises(TypeError) as raised:
        chain_rule([jnp.sin, lambda h: h @ jnp.ones((2, 2))], jnp.ones(3))
    assert "in step 2 of the chain, f2" in raised.value.__notes__
