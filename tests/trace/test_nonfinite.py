"""The first operation that makes a NaN or an infinity: its line, its trap, wherever it stands."""

import inspect
import time

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from funcbp.core import InputError, op
from funcbp.layers import Layer, dense, lift, serial
from funcbp.trace.nonfinite import find_nonfinite

ZERO = jnp.array([0.0, 1.0, 2.0])
MASK = jnp.array([[True, True], [False, False]])


def line_of(function):
    """`test_nonfinite.py:12`: the line of the function that says `here`."""
    lines, start = inspect.getsourcelines(inspect.unwrap(function))
    (number,) = (i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))
    return f"test_nonfinite.py:{start + number}"


def found(function, *args, at=None):
    result = find_nonfinite(function, *args)
    assert result is not None
    assert result.source.endswith(line_of(at or function))
    assert result.source in result.message and str(result) == result.message
    return result


def where_sqrt(x):
    y = jnp.sqrt(x)  # here
    return jnp.sum(jnp.where(x > 0, 3 * y, 0.0))


def where_log(x):
    y = jnp.log(x)  # here
    return jnp.sum(jnp.where(x > 0, y, 0.0))


def where_negative(x):
    y = jnp.sqrt(x - 1)  # here
    return jnp.sum(jnp.where(x > 1, y, 0.0))


def where_exp(x):
    y = jnp.exp(100 * x)  # here
    return jnp.sum(jnp.where(x < 1, y, 0.0))


def where_divides(x):
    y = 1 / x  # here
    return jnp.sum(jnp.where(x > 0, y, 0.0))


def root(x):
    y = x * 2
    return jnp.sum(jnp.sqrt(y))  # here


def norm(x):
    y = 0 * x
    return jnp.linalg.norm(y)  # here


def own_norm(x):
    y = jnp.sum((0 * x) ** 2)
    return jnp.sqrt(y)  # here


def rows_norm(x):
    y = jnp.stack([x, 0 * x])
    return jnp.sum(jax.vmap(jnp.linalg.norm)(y))  # here


def log(x):
    y = x + 0
    return jnp.sum(jnp.log(y))  # here


def entropy(x):
    return -jnp.sum(x * jnp.log(x))  # here


def times_infinity(x):
    y = jnp.array([jnp.inf, 1.0, 1.0])
    return jnp.sum(x * y)  # here


def divided(x):
    y = x / x  # here
    return jnp.sum(y)


def masked_softmax(x):
    y = jnp.where(MASK, x[:2], -jnp.inf)
    return jax.nn.softmax(y)[:, 0]  # here


def masked_logsumexp(x):
    y = jnp.where(MASK, x[:2], -jnp.inf)
    return jnp.sum(jax.nn.logsumexp(y, axis=1))  # here


def half_exp(x):
    y = x.astype(jnp.float16) * 10
    return jnp.sum(jnp.exp(y))  # here


def half_dot(x):
    y = x.astype(jnp.float16) * 1000
    return y @ y  # here


def half_cast(x):
    y = x * 1e5
    return jnp.sum(y.astype(jnp.float16))  # here


def float_exp(x):
    return jnp.sum(jnp.exp(100 * x))  # here


def raised(x):
    y = x**0.5  # here
    return jnp.sum(y)


def cosine(x):
    y = x * 1
    return jnp.sum(jnp.arccos(y))  # here


PLANTED = (
    (where_sqrt, "backward", "sqrt", "untaken_where"),
    (where_log, "backward", "log", "untaken_where"),
    (where_negative, "backward", "sqrt", "untaken_where"),
    (where_exp, "backward", "exp", "untaken_where"),
    (where_divides, "backward", "div", "untaken_where"),
    (root, "backward", "sqrt", "sqrt_at_zero"),
    (norm, "backward", "sqrt", "norm_at_zero"),
    (own_norm, "backward", "sqrt", "norm_at_zero"),
    (rows_norm, "backward", "sqrt", "norm_at_zero"),
    (log, "forward", "log", "log_of_zero"),
    (entropy, "forward", "log", "log_of_zero"),
    (times_infinity, "forward", "mul", "zero_times_infinity"),
    (divided, "forward", "div", "division_by_zero"),
    (masked_softmax, "forward", "sub", "all_masked_softmax"),
    (masked_logsumexp, "forward", "log", "all_masked_softmax"),
    (half_exp, "forward", "exp", "overflow"),
    (half_dot, "forward", "dot_general", "overflow"),
    (half_cast, "forward", "convert_element_type", "overflow"),
    (float_exp, "forward", "exp", "overflow"),
    (raised, "backward", "pow", "power_of_zero"),
    (cosine, "forward", "acos", "outside_domain"),
)


@pytest.mark.parametrize(("function", "direction", "operation", "trap"), PLANTED)
def test_planted(function, direction, operation, trap):
    result = found(function, ZERO)
    assert (result.direction, result.operation, result.trap) == (direction, operation, trap)
    assert result.layer == "" and f"Known trap {trap}: " in result.message
    again = find_nonfinite(jax.jit(function), ZERO)
    assert again[:4] == result[:4] and again.trap == trap
    if direction == "backward":  # the function may take the gradient itself
        again = find_nonfinite(jax.grad(function), ZERO)
        assert (again.source, again.direction, again.trap) == (result.source, direction, trap)


def test_operands():
    result = found(root, ZERO)
    numerator, denominator = result.operands
    np.testing.assert_array_equal(denominator, np.sqrt(2 * np.asarray(ZERO)))
    assert numerator == 0.5
    assert "div(0.5, 0) = inf at [0] of float32[3]" in result.message
    assert "float16 ends at 6.55e+04" in found(half_dot, ZERO).message


def test_scan():
    def forward(x):
        def body(carry, x):
            y = jnp.log(x)  # here
            return carry * 0.5, carry + y

        return jnp.sum(jax.lax.scan(body, 1.0, x, reverse=True)[1])

    def backward(x):
        def body(carry, x):
            y = jnp.sqrt(x)  # here
            return carry + jnp.where(x > 0, y, 0.0), None

        return jax.lax.scan(body, 0.0, x)[0]

    def carried(x):
        def body(carry, x):
            y = carry * (1 + 1e20 * x)  # here
            return y, None

        return jax.lax.scan(body, 1.0, x)[0]

    assert found(forward, ZERO).operands == (0.0,)
    result = found(backward, ZERO)
    assert (result.direction, result.trap) == ("backward", "untaken_where")
    result = found(carried, jnp.array([0.0, 1.0, 1.0, 0.0]))
    assert result.trap == "overflow" and result.operands == (np.float32(1e20),) * 2


def test_while_and_cond():
    def loop(x):
        def body(state):
            i, y = state
            z = y * 1e20  # here
            return i + 1, z

        return jnp.sum(jax.lax.while_loop(lambda s: s[0] < 4, body, (0, x))[1])

    def each_its_own(x):
        def body(y):
            return y * 1e20  # here

        return jnp.sum(jax.vmap(lambda x: jax.lax.while_loop(lambda y: y < 1e38, body, x))(x))

    def branch(x):
        def taken(x):
            return jnp.sqrt(x)  # here

        return jnp.sum(jax.lax.cond(x[0] == 0, taken, jnp.log, x))

    result = found(loop, ZERO)
    assert result.trap == "overflow"
    np.testing.assert_array_equal(result.operands[0], ZERO * 1e20)
    assert found(each_its_own, ZERO + 1).trap == "overflow"
    assert found(branch, ZERO).trap == "sqrt_at_zero"
    assert find_nonfinite(branch, ZERO + 1) is None


def test_vmap_and_checkpoint():
    def mapped(x):
        def one(x):
            y = jnp.log(x)  # here
            return jnp.where(x > 0, y, 0.0)

        return jnp.sum(jax.vmap(one)(x))

    def again(x):
        @jax.checkpoint
        def block(x):
            y = jnp.sin(x)
            with jax.named_scope("inner"):
                return jnp.sqrt(y)  # here

        with jax.named_scope("outer"):
            return jnp.sum(block(x))

    def sharded(x):
        mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        y = jax.shard_map(jnp.log, mesh=mesh, in_specs=spec, out_specs=spec)(x)  # here
        return jnp.sum(y)

    assert found(mapped, ZERO).trap == "untaken_where"
    result = found(sharded, jnp.zeros(4))
    assert (result.operation, result.trap) == ("shard_map", None)
    result = found(again, ZERO)
    assert (result.direction, result.trap) == ("backward", "sqrt_at_zero")
    assert result.layer == "outer/inner"


@jax.custom_vjp
def doubled(x):
    return 2 * x


def doubled_fwd(x):
    return 2 * x, x


def doubled_bwd(x, dy):
    zero = x - x
    return (dy / zero,)  # here


doubled.defvjp(doubled_fwd, doubled_bwd)


@pytest.mark.parametrize(
    "call",
    [
        doubled,
        jax.jit(doubled),
        jax.vmap(doubled),
        jax.checkpoint(doubled),
        lambda x: jax.lax.map(doubled, x),
        lambda x: jax.lax.cond(x[0] == 0, doubled, jnp.sin, x),
    ],
)
def test_hand_rule(call):
    def function(x):
        with jax.named_scope("outer"):
            return jnp.sum(call(x))

    result = found(function, ZERO, at=doubled_bwd)
    assert (result.direction, result.operation) == ("backward", "div")
    assert result.trap == "division_by_zero"
    assert result.layer == "outer" and "in the rule of doubled" in result.message


def test_fwd_and_jvp_of_a_hand_rule():
    @jax.custom_vjp
    def inverse(x):
        return x

    def inverse_fwd(x):
        saved = 1 / x  # here
        return x, saved

    def inverse_bwd(saved, dy):
        return (dy * saved,)

    inverse.defvjp(inverse_fwd, inverse_bwd)

    @jax.custom_jvp
    def same(x):
        return x

    @same.defjvp
    def same_jvp(primals, tangents):
        (x,), (dx,) = primals, tangents
        return x, dx / x  # here

    for call, rule, name in ((inverse, inverse_fwd, "inverse"), (same, same_jvp, "same")):
        for wrapped in (call, jax.jit(call)):
            result = found(lambda x, f=wrapped: jnp.sum(f(x)), ZERO, at=rule)
            assert (result.direction, result.trap) == ("backward", "division_by_zero")
            assert f"in the rule of {name}" in result.message

    def library(x):
        y = jax.scipy.special.xlogy(x, x)  # here
        return jnp.sum(y)

    assert "in the rule of xlogy" in found(library, ZERO).message


def test_layers():
    def bad(x):
        return jnp.sqrt(x - x)  # here

    net = serial(dense(3), serial(dense(2), lift(bad, name="bad")), dense(2))
    params, _ = net.init(jax.random.key(0), ZERO)
    result = found(lambda params, x: jnp.sum(net(params, x)), params, ZERO, at=bad)
    assert result.layer == "serial/serial_0/bad_0"
    assert result.trap == "sqrt_at_zero" and result.layer in result.message


def test_an_op_is_named_by_its_call():
    """The line inside an op's own rule is not the user's: the call is."""
    net = dense(2)
    params, _ = net.init(jax.random.key(0), ZERO)

    def loss(params, x):
        return jnp.sum(net(params, x))  # here

    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e38), params)
    result = found(loss, huge, 100 * ZERO)
    assert result.trap == "overflow" and result.direction == "forward"

    def scaled_layer(params, x):
        y = net(params, x)  # here
        return jnp.sum(y * 1e30)

    result = found(scaled_layer, huge | {"b": jnp.zeros(2)}, 0 * ZERO)
    assert (result.trap, result.direction) == ("overflow", "backward")
    assert "in the rule of" in result.message


def plain(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x * x


def fwd(x):
    return x * x, x


def bwd(x, dy):
    y = x - x
    return (dy / y,)  # here


def test_an_op_of_the_users_own():
    squared = op(plain, fwd, bwd, name="squared")
    net = serial(lift(squared, name="squared"))

    def loss(x):
        return jnp.sum(net({}, x))

    for f in (loss, jax.jit(loss), jax.checkpoint(loss)):
        result = found(f, ZERO, at=bwd)
        assert (result.direction, result.trap) == ("backward", "division_by_zero")
        assert result.layer == "serial/squared_0" and "in the rule of squared" in result.message


class Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = jnp.sqrt(0 * x)  # here
        return nn.Dense(1)(x)


def test_other_libraries():
    module = Module()
    params = module.init(jax.random.key(0), ZERO)
    result = found(module.apply, params, ZERO, at=Module)
    assert (result.direction, result.trap) == ("backward", "sqrt_at_zero")
    assert "Module" in result.layer

    def call(model, x):
        y = model(x)
        return jnp.sqrt(0 * y)  # here

    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    assert found(call, model, ZERO).direction == "backward"
    assert find_nonfinite(lambda model, x: model(x), model, ZERO) is None


def test_finite():
    def causal(x):
        scores = jnp.outer(x, x)
        rows = jnp.arange(3)
        masked = jnp.where(rows[:, None] >= rows, scores, -jnp.inf)
        return jnp.sum(jax.nn.softmax(masked) @ x)

    def guarded(x):
        return jnp.sum(jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), 0.0))

    assert find_nonfinite(causal, ZERO) is None
    assert find_nonfinite(jax.jit(guarded), ZERO) is None
    assert find_nonfinite(lambda x: x * 1.5, jnp.arange(3)) is None


def test_what_has_effects():
    """Prints are not repeated; a function that changes its mind is not believed either."""
    calls = []

    def moody(x):
        calls.append(x)
        return np.float32(np.nan if len(calls) == 1 else 0)

    def function(x):
        jax.debug.print("x is {}", x)
        return jax.pure_callback(moody, jax.ShapeDtypeStruct((), "float32"), x)

    result = find_nonfinite(function, 1.0)
    assert (result.operation, result.source) == ("jit", "")
    assert "run one by one, do not make" in str(result)


def test_a_harmless_mask_is_not_the_cause():
    """An infinity beside the mask's own is found, past the mask."""

    def attention(x, mask):
        scores = jnp.exp(50 * x) + mask  # here
        return jnp.sum(scores)

    result = found(attention, ZERO, jnp.array([-jnp.inf, 0.0, 0.0]))
    assert result.operation == "exp" and result.trap == "overflow"

    def both(x):
        masked = jnp.where(x > 0, x, -jnp.inf)
        return jnp.sum(jnp.exp(100 * masked))  # here

    result = found(both, ZERO)
    assert result.operation == "exp" and result.trap == "overflow"


def test_arguments_and_constants():
    def loss(params, x):
        y = params["w"] * x  # here
        return jnp.sum(y)

    result = found(loss, {"w": jnp.array([1.0, jnp.nan, 1.0])}, ZERO)
    assert (result.operation, result.direction, result.trap) == ("argument", "forward", None)
    assert "argument 0['w'] holds a NaN" in result.message
    assert find_nonfinite(lambda x: x, jnp.nan).operation == "argument"
    nan = jnp.array(jnp.nan)
    assert find_nonfinite(lambda x: x * nan, ZERO).operation == "constant"


def test_other_outputs_and_arguments():
    def several(x, key, n, name, tokens, scale):
        noise = jax.random.normal(key, (n,))
        y = jnp.sqrt(x)  # here
        return {name: y * scale + 0 * noise, "tokens": tokens}, tokens + 1

    args = (jax.random.key(0), 3, "y", jnp.arange(3), 2.0)
    result = found(several, ZERO, *args)
    assert (result.direction, result.trap) == ("backward", "sqrt_at_zero")
    assert find_nonfinite(several, ZERO + 1, *args) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "fn must be a function, got int 3"),
        ((lambda x: 3, 1.0), "at least one floating array"),
        (
            (lambda p: p["x"], {"x": jax.ShapeDtypeStruct((2,), "float32")}),
            r"argument 0\['x'\] must hold values, got ShapeDtypeStruct",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        find_nonfinite(*arguments)


def test_a_model_takes_seconds():
    def init(key, x):
        return {}, {}

    def apply(params, state, x, *, key=None, train=False):
        y = jnp.linalg.norm(0 * x)  # here
        return x / (1 + y), state

    net = serial(dense(32, activation="relu"), Layer(init, apply, "scaled"), dense(10))
    x = jnp.ones((8, 16))
    params, _ = net.init(jax.random.key(0), x)

    def loss(params, x, labels):
        logits = jax.nn.log_softmax(net(params, x))
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    start = time.perf_counter()
    result = found(loss, params, x, jnp.arange(8), at=apply)
    assert time.perf_counter() - start < 30
    assert result.trap == "norm_at_zero" and result.layer.endswith("scaled_0")
