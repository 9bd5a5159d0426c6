"""No loop writes into a bfloat16 array, all of which XLA on CPU may copy at each step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import OPS, label

from funcbp.check.compare import split
from funcbp.jaxprs import equations, scanned
from funcbp.ops import scan_plan
from funcbp.ops._buffers import scan


def filled(program):
    """What each loop of a program fills: stacks, and arrays that it updates in place."""
    for eqn in equations(program):
        if eqn.primitive.name == "scan":
            yield from eqn.outvars[scanned(eqn.params)[1] :]
        if eqn.primitive.name in ("scan", "while"):
            for inner in equations(tuple(eqn.params.values())):
                if inner.primitive.name == "dynamic_update_slice":
                    yield inner.outvars[0]


def pulled(f, layout):
    def run(floating, fixed):
        y, pullback = jax.vjp(lambda floating: layout.call(f, floating, fixed), floating)
        return y, pullback(y)

    return run


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_no_rule_fills_bfloat16_in_a_loop(op):
    for case in op.cases:
        if op is OPS["scan"] and scan_plan(*case.build()[0]).why:
            continue  # JAX's own rule runs
        layout, floating, fixed = split(*case.build(0, "bfloat16"))
        program = jax.make_jaxpr(pulled(op, layout))(floating, fixed)
        assert not [v.aval for v in filled(program) if v.aval.dtype == jnp.bfloat16], case.name


def test_a_plain_loop_does():
    layout, floating, fixed = split(*OPS["linear_recurrence"].cases[0].build(0, "bfloat16"))
    program = jax.make_jaxpr(pulled(OPS["linear_recurrence"].plain, layout))(floating, fixed)
    assert any(v.aval.dtype == jnp.bfloat16 for v in filled(program))


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_jax_lax_scan(reverse):
    def step(carry, x):
        carry = carry * 0.5 + x["a"].astype(jnp.float32)
        return carry, {"bits": x["b"], "y": carry.astype(jnp.bfloat16), "none": None}

    xs = {"a": jnp.arange(5, dtype=jnp.bfloat16), "b": jnp.arange(5, dtype=jnp.uint16)}
    got, expected = (f(step, 1.0, xs, reverse=reverse) for f in (scan, jax.lax.scan))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(g), np.asarray(e))
