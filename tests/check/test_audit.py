"""The audit of whole functions: what it finds, where, and that nothing stops it."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import hijax
from jax.sharding import PartitionSpec as P

import funcbp
from funcbp import InputError, layers, ops, train
from funcbp.check import CAUSES, WrongRule
from funcbp.check.branches import branches
from funcbp.check.program import Program
from funcbp.check.subject import subject_of


@jax.custom_vjp
def halved(x):
    """x^2 whose rule forgets the 2."""
    return x * x


def halved_fwd(x):
    return x * x, x


def halved_bwd(x, dy):
    return (x * dy,)


halved.defvjp(halved_fwd, halved_bwd)


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (x**3, x), lambda x, dy: (3 * x * x * dy,))


@jax.custom_jvp
def softened(x):
    return jnp.sqrt(x * x + 1)


@softened.defjvp
def softened_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = softened(x)
    return y, dx * y / x  # upside down


X = jnp.array([0.5, -1.25, 2.0])


def in_jit(x):
    return jax.jit(halved)(x).sum()


def in_scan(x):
    return jax.lax.scan(lambda c, v: (c + halved(v), None), 0.0, x)[0]


def in_while(x):
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, halved(c[1])), (0, x))[1]


def in_cond(x):
    return jax.lax.cond(x.sum() > 0, halved, lambda v: v, x)


def in_vmap(x):
    return jax.vmap(halved)(x)


def in_checkpoint(x):
    return jax.grad(lambda v: jax.checkpoint(halved)(v).sum())(x)


def in_shard_map(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(halved, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)


def in_another_rule(x):
    @jax.custom_vjp
    def outer(v):
        return halved(v) + 1

    outer.defvjp(lambda v: (outer(v), v), lambda v, dy: (2 * v * dy,))
    return outer(x)


def in_a_gradient(x):
    return jax.jit(jax.value_and_grad(lambda v: jnp.sum(halved(v))))(x)


@pytest.mark.parametrize(
    ("f", "inside"),
    [
        (in_jit, "jit"),
        (in_scan, "scan"),
        (in_while, "while"),
        (in_cond, "cond"),
        (in_vmap, "vmap"),
        (in_checkpoint, "checkpoint"),
        (in_shard_map, "shard_map"),
        (in_another_rule, ""),
        (in_a_gradient, "grad"),
    ],
)
def test_a_rule_is_found_wherever_it_is_called(f, inside):
    report = funcbp.audit(f, X, thorough=False)
    (finding,) = report.wrong
    assert not report.ok and finding.rule.startswith("halved (") and "test_audit.py" in finding.rule
    assert finding.cause == "scale" and finding.argument == "x" and "0.5" in finding.message
    assert any(f"in {f.__name__}" in w and inside in w for w in finding.where), finding.where
    with pytest.raises(WrongRule, match="halved"):
        report.raise_if_wrong()


class Power(getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive):
    """x^power, with a rule for cotangents and one for tangents, each times a factor."""

    def __init__(self, aval, power, cotangent=1.0, tangent=1.0):
        self.in_avals, self.out_aval = (aval,), aval
        self.params = {"power": power, "cotangent": cotangent, "tangent": tangent}
        super().__init__()

    def expand(self, x):
        return x**self.power

    def vjp_fwd(self, _, x):
        return self(x), x

    def vjp_bwd_retval(self, x, dy):
        return (self.cotangent * self.power * x ** (self.power - 1) * dy,)

    def jvp(self, primals, tangents):
        (x,), (dx,) = primals, tangents
        return self(x), self.tangent * self.power * x ** (self.power - 1) * dx


@pytest.mark.parametrize(
    ("factors", "cause", "argument"),
    [((1.0, 1.0), None, None), ((2.0, 1.0), "scale", "x"), ((1.0, -1.0), "sign", None)],
)
def test_a_primitive_of_hijax_is_judged_by_its_own_rules(factors, cause, argument):
    def f(x):
        cubes = jax.lax.scan(lambda c, v: (c + Power(jax.typeof(v), 3, *factors)(v), None), 0.0, x)
        return cubes[0] + jnp.sum(Power(jax.typeof(x), 2)(x))

    (finding,) = funcbp.audit(f, X).findings
    assert (finding.cause, finding.argument) == (cause, argument), finding
    assert finding.rule.startswith("Power (") and any("inside scan" in w for w in finding.where)
    alone = funcbp.check_rule(Power(jax.typeof(X), 3, *factors), X)
    assert alone.ok == (cause is None) and alone.findings[0].cause == cause


def test_a_rule_made_under_custom_vjp3_is_found():
    before = jax.config.values["jax_custom_vjp3"]
    jax.config.update("jax_custom_vjp3", True)
    try:
        third = jax.custom_vjp(lambda x: x * x)
        third.defvjp(halved_fwd, halved_bwd)
        (finding,) = funcbp.audit(lambda x: jax.jit(third)(x).sum(), X, thorough=False).findings
    finally:
        jax.config.update("jax_custom_vjp3", before)
    assert (finding.verdict, finding.cause) == ("wrong", "scale")


def test_calls_of_one_rule_are_one_finding():
    def f(x):
        for _ in range(3):
            x = cubed(x)
        return softened(x) + halved(x)

    report = funcbp.audit(f, X / 2)
    assert {g.rule.split()[0]: g.verdict for g in report.findings} == {
        "halved": "wrong",
        "softened": "wrong",
        "cubed": "right",
    }
    assert report.wrong == report.findings[:2]
    right = report.findings[-1]
    assert right.errors["x"]["rule"] < 1e-5
    assert all(g.cause is None or g.cause in CAUSES for g in report.findings)
    assert report.to_json()["findings"][0]["verdict"] == "wrong"


def test_a_whole_training_step_with_donated_buffers():
    model = layers.serial(
        layers.dense(6, activation="gelu"),
        layers.lift(halved, name="halved"),
        layers.dropout(0.2),
        layers.dense(3),
    )
    x, labels = jnp.ones((4, 5)) * jnp.arange(4.0)[:, None], jnp.arange(4) % 3
    optimizer = optax.adam(1e-3)
    loss = train.supervised(model, ops.softmax_cross_entropy_with_integer_labels)
    state = train.init_state(model, optimizer, jax.random.key(0), x)
    step = train.make_step(loss, optimizer)
    report = funcbp.audit(step, state, (x, labels), thorough=False)
    assert [g.rule.split()[0] for g in report.wrong] == ["halved"]
    names = {g.rule.split()[0] for g in report.findings if g.verdict == "right"}
    loss_name = "softmax_cross_entropy_with_integer_labels"
    assert {"dense", "linear", "dropout", loss_name} <= names
    # The caller's own state was copied before it was donated.
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_what_is_meant_is_said():
    @funcbp.surrogate
    @jax.custom_vjp
    def marked(x):
        return x * x

    marked.defvjp(halved_fwd, halved_bwd)
    assert funcbp.audit(marked, X).findings[0].verdict == "surrogate"
    expected = funcbp.audit(halved, X, expect={"halved": "surrogate"})
    assert expected.ok and "caller" in expected.findings[0].message
    with pytest.raises(InputError, match="must be one of right, wrong, surrogate"):
        funcbp.audit(halved, X, expect={"halved": "fine"})


def test_nothing_stops_it():
    @jax.custom_vjp
    def unsettled(x):
        return x * 2

    def refuse(x, dy):
        raise RuntimeError("not today")

    unsettled.defvjp(lambda x: (x * 2, x), refuse)
    report = funcbp.audit(lambda x: unsettled(x) + cubed(x), X)
    verdicts = {g.rule.split()[0].rpartition(".")[2]: g for g in report.findings}
    assert verdicts["cubed"].verdict == "right"
    assert verdicts["unsettled"].verdict == "unchecked"
    assert "not today" in verdicts["unsettled"].message
    assert funcbp.audit(jnp.sin, X).findings == ()


def test_bad_input_says_what_must_hold():
    def fails(x):
        raise KeyError("w")

    with pytest.raises(InputError, match="audit needs a function that runs, .*fails raised Key"):
        funcbp.audit(fails, X)
    with pytest.raises(InputError, match="one argument at least must be a floating point array"):
        funcbp.check_rule(cubed, 3)


def test_a_function_against_its_reference():
    def steep(x):
        return jnp.exp(2 * x)

    assert funcbp.check_rule(steep, X, reference=lambda x: jnp.square(jnp.exp(x))).ok
    wrong = funcbp.check_rule(lambda x: jnp.sin(x), X, reference=jnp.cos)
    assert wrong.findings[0].verdict == "wrong" and wrong.findings[0].cause == "value"


def test_callbacks_and_scatters_without_derivative_are_judged_by_differences():
    def host(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(np.sin, shape, x, vmap_method="expand_dims")

    def made(sign):
        @jax.custom_vjp
        def sine(x):
            return host(x)

        sine.defvjp(lambda x: (host(x), x), lambda x, dy: (sign * dy * jnp.cos(x),))
        return sine

    assert funcbp.check_rule(made(1), X).findings[0].verdict == "right"
    (finding,) = funcbp.check_rule(made(-1), X).findings
    assert (finding.verdict, finding.cause, finding.argument) == ("wrong", "sign", "x")


def test_a_finding_shows_an_input_that_can_be_read():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((12, 15)), jnp.float32)
    (finding,) = funcbp.audit(halved, x).findings
    assert (finding.cause, finding.argument, finding.input) == ("scale", "x", "fewer elements")
    assert finding.args[0].shape == (2, 2)
    assert funcbp.audit(halved, x, thorough=False).findings[0].args[0].shape == x.shape


def test_large_calls_are_judged_smaller_and_say_so():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(
        lambda a, b: (a @ b, (a, b)),
        lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy * 1.01),
    )
    a, b = jnp.ones((2048, 1500)), jnp.ones((1500, 700))
    (finding,) = funcbp.audit(product, a, b).findings
    assert (finding.verdict, finding.cause, finding.argument) == ("wrong", "scale", "b")
    assert "4,122,000 elements" in " ".join(finding.notes)
    assert max(np.size(v) for v in finding.args) < 1000


def test_the_watch_leaves_nothing_behind():
    before = jax.custom_vjp.__call__, jax.custom_jvp.__call__
    f = jax.jit(lambda x: cubed(x) + softened(x))
    text = str(jax.make_jaxpr(f)(X))
    funcbp.audit(f, X, thorough=False)
    gc.collect()
    assert (jax.custom_vjp.__call__, jax.custom_jvp.__call__) == before
    assert str(jax.make_jaxpr(f)(X)) == text and "callback" not in text


def test_a_loop_that_never_ends_on_other_values_stops_nothing():
    @jax.custom_vjp
    def root(a):
        def unfinished(state):
            return jnp.any(jnp.abs(state[0] - state[1]) > 1e-6 * state[1])

        def newton(state):
            return state[1], 0.5 * (state[1] + a / state[1])

        return jax.lax.while_loop(unfinished, newton, (jnp.zeros_like(a), jnp.maximum(a, 1)))[1]

    root.defvjp(lambda a: (y := root(a), y), lambda y, dy: (0.5 * dy / y,))
    # The auditor turns signs, and Newton's method finds no root of a negative number.
    assert funcbp.check_rule(root, jnp.exp(X)).ok


def branching(x, rate, labels):
    """Two branches of a float, one integer that is told apart, and an order."""
    kept = jnp.where(rate > 0, rate * x, -x)
    return jnp.sort(jnp.where(labels == -100, 0.0, kept))


def test_variants_take_the_branches_that_were_not_seen():
    rate, labels = jnp.exp(X), jnp.array([0, 2, 1])
    args = (jnp.sort(X), rate, labels)
    program = Program(subject_of(branching, [args])[0], args)
    found = list(branches(program, args))
    assert any(np.any(v.args[1] < 0) for v in found)
    assert any(np.any(v.args[2] == -100) for v in found)
    assert any(np.any(np.diff(v.args[0]) < 0) for v in found)
    # A function that compares nothing has no other branch.
    args = (X, rate)
    plain = Program(subject_of(jnp.multiply, [args])[0], args)
    assert list(branches(plain, args)) == []


@pytest.mark.parametrize("inside", (False, True))
def test_a_rule_that_is_told_what_is_differentiated_owes_nothing_to_the_rest(inside):
    @jax.custom_vjp
    def scaled(x, table):
        return x * jnp.sum(table[0])

    def fwd(x, table):
        return scaled(x.value, table.value), (x.value, table.value)

    def bwd(saved, dy):
        x, table = saved
        return dy * jnp.sum(table[0]), jnp.full_like(table, jnp.vdot(dy, x))

    scaled.defvjp(fwd, bwd, symbolic_zeros=True)

    def loss(x, table):
        return jnp.sum(jnp.sin(scaled(x, table)))

    x, table = jnp.arange(3.0), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    of_x, of_table = (jax.jit(jax.grad(loss, i)) if inside else loss for i in (0, 1))
    assert funcbp.audit(lambda x: of_x(x, table), x).ok
    (finding,) = funcbp.audit(lambda table: of_table(x, table), table).findings
    assert (finding.verdict, finding.argument) == ("wrong", "table")
