"""One test for all rules: every op, case, dtype and transformation against float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rules import (
    FIRST_ORDER,
    OPS,
    SECOND_ORDER,
    Call,
    Cast,
    WithCotangent,
    cases,
    every_way,
    label,
    transformed,
)

import funcbp
from funcbp.check import compare
from funcbp.check.compare import allowed, split
from funcbp.check.evaluate import compiled


@pytest.mark.parametrize(("op", "case"), cases(), ids=label)
def test_value_and_cotangents(op, case):
    for dtype in case.dtypes:
        compare(op, Cast(op, case, dtype)).raise_if_wrong()


@pytest.mark.parametrize(("op", "case"), transformed(), ids=label)
def test_transformations(op, case):
    drawn = WithCotangent(op, case, "float32")
    rule, plain = (
        every_way((*FIRST_ORDER, *SECOND_ORDER), f, drawn.layout()) for f in (op, op.plain)
    )
    compare(rule, drawn, reference=plain, cotangents=False).raise_if_wrong()


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_float64_and_float16_keep_their_dtype(op):
    def pulled(floating, fixed):
        y, pullback = jax.vjp(lambda floating: layout.call(op, floating, fixed), floating)
        return y, pullback(jax.tree.map(jnp.ones_like, y))

    with jax.enable_x64(True):
        for dtype in ("float64", "float16"):
            layout, floating, fixed = split(*op.cases[0].build(0, dtype))
            results = jax.tree.leaves(jax.eval_shape(pulled, floating, fixed))
            assert {str(r.dtype) for r in results} == {dtype}


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_forward_mode_under_autodiff(op):
    """The switch leaves plain alone, to the equation."""
    layout, floating, fixed = split(*op.cases[0].build(0, "float32"))
    tangents = jax.tree.map(jnp.ones_like, floating)

    def pushed(f):
        value = Call(f, layout, fixed, None).value
        return jax.make_jaxpr(lambda x, dx: jax.jvp(value, (x,), (dx,)))

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(Call(op, layout, fixed, None).value, (floating,), (tangents,))
    with funcbp.autodiff():
        got, plain = (str(pushed(f)(floating, tangents)) for f in (op, op.plain))
    assert got == plain


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.like], ids=label)
def test_signature_and_values_are_the_counterparts(op):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (op, op.like))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    known = {p.name for p in theirs}
    for case in op.cases:
        if not case.bench and known.issuperset(case.kwargs):
            same_values(op, case)


def same_values(op, case):
    """plain is the counterpart: it differs, in float64, by no more than float32 is allowed to."""
    layout, floating, fixed = split(*case.build())
    plain, like = (compiled(lambda x, f=f: layout.call(f, x, fixed)) for f in (op.plain, op.like))
    narrow = like(floating)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: v.astype(np.float64), floating)
        exact, theirs = plain(wide), like(wide)
    for e, t, n in zip(*map(jax.tree.leaves, (exact, theirs, narrow)), strict=True):
        assert e.shape == t.shape
        e, t, n = (np.asarray(v, np.float64).ravel() for v in (e, t, n))
        finite = np.isfinite(e)
        np.testing.assert_array_equal(t[~finite], e[~finite])
        e, t, n = e[finite], t[finite], n[finite]
        # Some counterparts compute in float32 whatever comes: element by element, luck decides.
        assert not e.size or np.all(
            np.abs(t - e) <= allowed(np.abs(n - e)[None], e[None], np.float32)
        )


def layouts(floating):
    """Each even axis of each argument, sharded in two; then the first axes of all that have one."""
    alone = [
        {n: P(*[None] * k, "i")}
        for n, v in floating.items()
        for k, size in enumerate(v.shape)
        if size and size % 2 == 0
    ]
    return alone[:4]


def on_mesh(f, layout, specs):
    """Value and cotangents of f with some arguments resharded; checks where the cotangents lie."""

    def run(floating, fixed, dy):
        placed = {
            n: jax.sharding.reshard(v, specs[n]) if n in specs else v for n, v in floating.items()
        }
        call = Call(f, layout, fixed, dy)
        y, pullback = jax.vjp(call.value, placed)
        dy = jax.tree.map(lambda d, y: jax.sharding.reshard(d, jax.typeof(y).sharding.spec), dy, y)
        (cotangents,) = pullback(dy)
        for n, v in placed.items():
            assert jax.typeof(cotangents[n]).sharding == jax.typeof(v).sharding
        return jax.tree.map(lambda v: jax.sharding.reshard(v, P()), {"value": y, **cotangents})

    return run


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_explicit_mesh(op):
    """Wherever plain is legal on Explicit axes the rule is, with the same shardings out."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
    tried, refused = 0, []
    with jax.set_mesh(mesh):
        for case in op.cases:
            drawn = WithCotangent(op, case, "float32")
            if case.bench:
                continue
            arguments = drawn.build()[0]
            for specs in layouts(arguments[0]):
                plain = on_mesh(op.plain, drawn.layout(), specs)
                try:
                    jax.eval_shape(plain, *arguments)
                except Exception as error:
                    said = "sharded the same" in str(error)  # what vmap says
                    assert said or type(error).__name__ == "ShardingTypeError", error
                    refused.append((drawn, specs))
                    continue
                rule = on_mesh(op, drawn.layout(), specs)
                compare(rule, drawn, reference=plain, cotangents=False).raise_if_wrong()
                tried += 1
            if tried >= 3:
                break
        if not tried:  # plain has a value on the first axes, but JAX no derivative
            drawn, specs = refused[0]
            rule, plain = (on_mesh(f, drawn.layout(), s) for f, s in ((op, specs), (op.plain, {})))
            compare(rule, drawn, reference=plain, cotangents=False).raise_if_wrong()
