"""The declaration: signatures, settings, pytrees, integers, several outputs, errors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import funcbp
from funcbp import Case, InputError, op, ops
from funcbp.case import closing
from funcbp.check import compare
from funcbp.closed import Closed
from funcbp.core import recorded


def make(bwd=None, **options):
    """An op with a pytree, an integer and an optional argument, and two outputs."""

    def plain(params, index: Int[Array, ""], x: Float[Array, " n"], b=None, *, power=2):
        y = params["w"] * x**power
        return y if b is None else y + b, params["v"][0] * x[index]

    def fwd(params, index, x, b=None, *, power):
        return plain(params, index, x, b, power=power), (params, index, x, b)

    def rule(saved, dys, *, power):
        params, index, x, b = saved
        dy, dz = dys
        dx = dy * params["w"] * power * x ** (power - 1)
        dx = dx.at[index].add(params["v"][0] * dz)
        dparams = {"w": dy * x**power, "v": [dz * x[index], None]}
        return dparams, None, dx, None if b is None else dy

    return op(plain, fwd, bwd or rule, name="mixed", **options)


PARAMS = {"w": jnp.arange(3.0), "v": [jnp.float32(2), jnp.arange(2)]}
X = jnp.array([1.0, -2.0, 3.0])


def test_pytrees_integers_none_and_several_outputs():
    mixed = make()
    for b in (None, jnp.ones(3)):
        result = compare(mixed, PARAMS, jnp.int32(1), X, b, power=3)
        assert result.ok, result
        names = {row.what for row in result.rows}
        assert {"cotangent of argument 0['w']", "cotangent of argument 0['v'][0]"} <= names
        assert ("cotangent of argument 3" in names) == (b is not None)


def test_settings_are_static_and_part_of_the_rule():
    mixed = make()
    assert mixed.arrays == ("params", "index", "x", "b") and mixed.static == ("power",)
    f = jax.jit(lambda x: (mixed(PARAMS, 0, x)[0], mixed(PARAMS, 0, x, power=2.0)[0]))
    assert all(np.array_equal(y, PARAMS["w"] * X**2) for y in f(X))
    with pytest.raises(InputError, match=r"power must be hashable, got list \[2\]"):
        mixed(PARAMS, 0, X, power=[2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s, dy, power: (None, None), "must return a tuple of 4 cotangents.*a tuple of 2"),
        (lambda s, dy, power: dy[0], "must return a tuple of 4 cotangents"),
        (lambda s, dy, power: (None, None, dy[1], None), r"shape \(3,\), got \(\)"),
        (lambda s, dy, power: ({"w": dy[0]}, None, dy[0], None), "must have its primal's tree"),
    ],
)
def test_a_rule_of_the_wrong_structure_says_so(wrong, message):
    mixed = make(wrong)
    with pytest.raises(TypeError, match=f"(?s)bwd of mixed.*{message}"):
        jax.grad(lambda x: mixed(PARAMS, 0, x)[0].sum())(X)


def test_cotangents_take_their_primals_dtype():
    def bwd(saved, dy):
        return (dy.astype(jnp.float32) * 2,)

    double = op(lambda x: 2 * x, lambda x: (2 * x, None), bwd, name="double")
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert jax.grad(lambda x: double(x).sum())(jnp.ones(3, dtype)).dtype == dtype


def test_arrays_are_declared_and_never_guessed():
    scaled = op(
        lambda x, factor: x * factor,
        lambda x, factor: (x * factor, None),
        lambda saved, dy, factor: (dy * factor,),
        arrays=("x",),
        name="scaled",
    )
    assert scaled.static == ("factor",)
    assert jax.grad(lambda x: scaled(x, 3.0).sum())(X).tolist() == [3, 3, 3]
    with pytest.raises(TypeError, match=r"names \['z'\], not parameters"):
        op(lambda x: x, lambda x: (x, None), lambda s, d: (d,), arrays=("z",), name="bad")


def test_autodiff_is_part_of_jits_cache():
    f = jax.jit(lambda x: ops.softmax(x))
    assert "custom_vjp" in str(jax.make_jaxpr(f)(X))
    f(X)
    with funcbp.autodiff():
        assert "custom_vjp" not in str(jax.make_jaxpr(f)(X))
        assert jax.jacfwd(f)(X).shape == (3, 3)
    with pytest.raises(TypeError):
        jax.jacfwd(f)(X)


def test_recorded_lists_calls_with_their_arrays():
    with recorded() as calls:
        ops.dense(X, jnp.ones((3, 2)), activation="tanh")
        ops.softmax(X)
    assert [c.op.name for c in calls] == ["dense", "softmax"]
    assert calls[0].static == {"activation": "tanh"}
    assert np.array_equal(calls[0].arrays["x"], X)
    ops.softmax(X)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.relu(jnp.arange(3)),
            r"relu: x must be a floating point array, got int32\[3\]",
        ),
        (lambda: ops.linear(X, jnp.ones((4, 2))), "x must have 4 features on its last axis"),
        (lambda: ops.linear(X, X), "w must have two axes"),
        (lambda: ops.linear(X, jnp.ones((3, 2)), X), r"b must have shape \(2,\).*got \(3,\)"),
        (lambda: ops.dense(X, jnp.ones((3, 2)), activation="rel"), "activation must be None or"),
        (lambda: ops.layer_norm(X, jnp.ones(2)), r"scale must have shape \(3,\)"),
        (lambda: ops.dropout(jax.random.key(0), X, rate=1.5), "rate must be a probability"),
        (
            lambda: ops.softmax_cross_entropy_with_integer_labels(X, jnp.ones(3, int)),
            r"labels must have the shape of logits \(3,\) without axis -1, \(\), got \(3,\)",
        ),
    ],
)
def test_bad_input_says_what_must_hold(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_labels_out_of_range():
    """As documented: loss nan, and the softmax as gradient."""
    loss = ops.softmax_cross_entropy_with_integer_labels
    logits = jnp.zeros((3, 4))
    labels = jnp.array([4, -5, -1])
    assert np.isnan(loss(logits, labels)).tolist() == [True, True, False]
    grads = jax.grad(lambda x: loss(x, labels).sum())(logits)
    np.testing.assert_allclose(grads[:2], 0.25)
    np.testing.assert_allclose(grads[2], [0.25, 0.25, 0.25, -0.75])


def test_second_derivatives_of_a_rule_with_a_loop():
    """Reverse mode cannot transpose the loop of bwd: plain gives the second derivative."""

    def plain(x: Float[Array, " n"]):
        return x**3

    def bwd(x, dy):
        def times(carry):
            return carry[0] + 1, carry[1] * x

        return (jax.lax.while_loop(lambda c: c[0] < 2, times, (0, 3 * dy))[1],)

    cube = op(plain, lambda x: (plain(x), x), bwd, name="cube")
    slope = jax.grad(lambda x: cube(x).sum())
    assert compare(cube, X).ok
    np.testing.assert_allclose(jax.grad(lambda x: slope(x).sum())(X), 6 * X, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(slope, (X,), (X,))[1], 6 * X**2, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.hessian(lambda x: cube(x).sum()))(X), np.diag(6 * X))


def test_second_derivatives_beside_an_integer_output():
    """As above, where the op has a result without a derivative."""

    def plain(x: Float[Array, " n"]):
        return x**3, jnp.argmax(x)

    def bwd(x, dys):
        return (jax.lax.while_loop(lambda d: d[0] < 0, lambda d: d, 3 * dys[0] * x**2),)

    cube = op(plain, lambda x: (plain(x), x), bwd, name="cube")
    assert compare(cube, X).ok
    np.testing.assert_allclose(jax.jit(jax.hessian(lambda x: cube(x)[0].sum()))(X), np.diag(6 * X))


def thrice():
    """An op of a function, which is called three times."""

    def plain(f: Callable, x: Float[Array, "..."]):
        return f(f(f(x)))

    def bwd(saved, dy):
        f, x = saved
        return jax.vjp(plain, f, x)[1](dy)

    return op(
        plain,
        lambda f, x: (plain(f, x), (f, x)),
        bwd,
        functions={"f": lambda f, x: (x,)},
        name="thrice",
        cases=[Case("odd", closing(wave, (3, 3), ()), (5, 3))],
    )


def wave(w, k, x):
    return k * jnp.sin(x @ w)


def test_a_function_is_an_argument_and_what_it_closes_over_is_differentiated():
    repeated = thrice()
    assert repeated.arrays == ("f", "x") and not repeated.static
    result = compare(repeated, repeated.cases[0])
    assert result.ok and len(result.rows) == 4, result
    key, scale = jax.random.key(0), jnp.arange(2)

    def loss(w, x, way):
        def f(h):  # a key and an integer are closed over as well
            return wave(w, jax.random.uniform(key) * scale[1], h)

        return jnp.sum(way(f, x) ** 2)

    w, x = jnp.full((2, 3, 3), 0.4) * jnp.arange(1, 3)[:, None, None], jnp.ones((5, 3))
    for way in (
        jax.grad(loss, (0, 1)),
        jax.jit(jax.grad(loss, (0, 1)), static_argnums=2),
        jax.hessian(loss),
    ):
        ours, plain = (
            jax.vmap(lambda w, f=f, way=way: way(w, x, f))(w) for f in (repeated, repeated.plain)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), ours, plain)


def test_functions_on_meshes():
    repeated, w, x = thrice(), jnp.full((3, 3), 0.4), jnp.ones((4, 3))

    def loss(f, w, x):
        return jnp.sum(f(lambda h: wave(w, 2.0, h), x) ** 2)

    expected = jax.grad(loss, (1, 2))(repeated.plain, w, x)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    specs = (P(), P("i"))
    local = jax.shard_map(
        lambda w, x: jax.lax.psum(loss(repeated, w, x), "i"),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
    )
    manual = jax.grad(local, (0, 1))(w, x)
    with jax.set_mesh(jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))):
        x = jax.sharding.reshard(x, P("i"))
        explicit = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(repeated, w, x)
        assert jax.typeof(explicit[1]).sharding.spec == P("i", None)
    for got in (manual, explicit):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, expected)


def test_what_is_not_a_function_says_so():
    with pytest.raises(InputError, match="thrice: f must be a function, got ArrayImpl"):
        thrice()(X, X)
    closed = Closed.of(jnp.sin, X)
    with pytest.raises(TypeError, match="traced on arguments"):
        closed(X, X)
