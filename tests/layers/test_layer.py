"""The pair itself, `lift`, and how errors are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbp.core import InputError
from funcbp.layers import Layer, dense, lift, residual, serial

X = np.linspace(-1.0, 1.0, 12, dtype="float32").reshape(3, 4)
SPEC = jax.ShapeDtypeStruct((3, 4), "float32")


def scale_init(key, x):
    return {"scale": jnp.full(x.shape[-1:], 2.0, x.dtype)}


def scale(params, x):
    return params["scale"] * x


def fails(x):
    raise RuntimeError("no such thing")


def layer_notes(error):
    # JAX adds notes of its own about its traceback.
    return [note for note in error.__notes__ if "layer" in note]


def test_lift_with_parameters(key):
    model = serial(lift(scale, scale_init), lift(scale, scale_init))
    params, _ = model.init(key, SPEC)
    assert set(params) == {"scale_0", "scale_1"}
    np.testing.assert_array_equal(model(params, X), 4 * X)


def test_lift_takes_the_functions_name():
    assert lift(scale).name == "scale"
    assert lift(scale, name="gain").name == "gain"


@pytest.mark.parametrize("name", [None, "", "a/b", "a b"])
def test_a_name_must_be_an_identifier(name):
    with pytest.raises(InputError, match="^name must be an identifier, got"):
        lift(lambda x: x, name=name)


def test_other_errors_get_the_innermost_path_once(key):
    model = serial(residual(serial(lift(fails))))
    with pytest.raises(RuntimeError) as error:
        model({}, X)
    assert layer_notes(error.value) == ["in layer serial/residual_0/serial_0/fails_0"]
    with pytest.raises(RuntimeError) as error:
        model.init(key, SPEC)
    assert layer_notes(error.value) == ["in layer serial/residual_0/serial_0/fails_0"]


def test_a_failed_call_leaves_no_path_behind(key):
    with pytest.raises(RuntimeError):
        serial(lift(fails))({}, X)
    with pytest.raises(InputError) as error:
        dense(2).init(key, np.ones(3, "int32"))
    assert str(error.value).startswith("dense: ")


def test_a_model_inside_ones_own_layer_continues_the_path(key):
    inner = serial(dense(4))

    def twice(params, x):
        return inner(params, inner(params, x))

    def twice_init(key, x):
        return inner.init(key, x)[0]

    model = serial(lift(twice, twice_init))
    params, _ = model.init(key, SPEC)
    np.testing.assert_array_equal(
        model(params, X), inner(params["twice_0"], inner(params["twice_0"], X))
    )
    with pytest.raises(InputError, match="^serial/twice_0/dense_0: x must have 4 features"):
        model(params, X[:, :2])


def test_calling_a_stateful_layer_says_what_to_do(counter, key):
    with pytest.raises(InputError, match=r"^counter: state is needed.*model\.apply\(params, state"):
        counter({}, X)


def test_a_layer_that_makes_state_up_cannot_be_called():
    def apply(params, state, x, *, key=None, train=False):
        return x, {"count": state.get("count", 0) + 1}

    def init(key, x):
        return {}, {"count": 0}

    with pytest.raises(InputError, match="^sloppy: state is needed"):
        Layer(init, apply, "sloppy")({}, X)


def test_apply_of_a_stateless_layer_returns_a_plain_empty_state():
    y, state = lift(jnp.square).apply({}, {}, X)
    assert type(state) is dict and state == {}
    np.testing.assert_array_equal(y, X**2)


def test_init_makes_no_use_of_the_values(key):
    params, _ = dense(2).init(key, SPEC)
    again, _ = dense(2).init(key, np.full((3, 4), np.nan, "float32"))
    jax.tree.map(np.testing.assert_array_equal, params, again)
