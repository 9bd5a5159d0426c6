"""Every rule is broken on purpose, in each of these ways; the generic test must catch each."""

import jax
import jax.numpy as jnp
import pytest
from rules import OPS, Cast, label

from funcbp.check import compare
from funcbp.check.compare import split
from funcbp.core import Op


def sign(d):
    return -d


def factor_two(d):
    return 2 * d


def one_percent(d):
    return 1.01 * d


def one_element_zeroed(d):
    """The largest element: a zeroed zero is no fault."""
    flat = d.ravel()
    return flat.at[jnp.argmax(jnp.abs(flat))].set(0).reshape(d.shape)


def transposed(d):
    """The elements in another order: reversed along the first axis, which every shape allows."""
    return jnp.flip(d, 0) if d.ndim else d + 1


def missing_sum(d):
    """As if the sum over the batch had taken one row only: half of the terms."""
    return d * 0.5


def derivative_dropped(d):
    """The cotangent passes as if the slope were 1 wherever it is less."""
    return jnp.where(jnp.abs(d) < 1, jnp.sign(d), d)


def constant_added(d):
    return d + 1


MUTATIONS = (
    constant_added,
    sign,
    factor_two,
    one_percent,
    one_element_zeroed,
    transposed,
    missing_sum,
    derivative_dropped,
)


def mutated(op, mutation, which):
    """op with the cotangent of its floating argument number `which` passed through `mutation`."""

    def bwd(saved, dy, **static):
        dargs = list(op.bwd(saved, dy, **static))
        places = [i for i, d in enumerate(dargs) if d is not None]
        dargs[places[which]] = mutation(dargs[places[which]])
        return tuple(dargs)

    return Op(
        op.plain,
        op.fwd,
        bwd,
        like=op.like,
        cases=op.cases,
        arrays=op.arrays,
        check=op.check,
        name=op.name,
    )


def all_zero(op, which):
    """Whether the rule gives an argument no gradient: then there is no sign of it to turn."""
    args, kwargs = op.cases[0].build()
    layout, floating, fixed = split(args, kwargs)
    y, pullback = jax.vjp(lambda floating: layout.call(op, floating, fixed), floating)
    return not jnp.any(list(pullback(jax.tree.map(jnp.ones_like, y))[0].values())[which])


def differentiable(op):
    """How many arguments of the op's first case have a cotangent."""
    args, kwargs = op.cases[0].build()
    leaves = jax.tree.leaves((args, kwargs))
    return sum(isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.inexact) for v in leaves)


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_every_mutation_is_caught(op):
    case = Cast(op, op.cases[0], "float32")
    assert compare(op, case).ok
    missed = [
        f"{mutation.__name__} of argument {which}"
        for which in range(differentiable(op))
        for mutation in ((constant_added,) if all_zero(op, which) else MUTATIONS)
        if compare(mutated(op, mutation, which), case).ok
    ]
    assert not missed


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_a_forward_rule_with_another_value_is_caught(op):
    def fwd(*args, **kwargs):
        y, saved = op.fwd(*args, **kwargs)
        return jax.tree.map(lambda y: y * 1.01 + 1e-3, y), saved

    wrong = Op(
        op.plain,
        fwd,
        op.bwd,
        like=op.like,
        cases=op.cases,
        arrays=op.arrays,
        check=op.check,
        name=op.name,
    )
    assert not compare(wrong, Cast(op, op.cases[0], "float32")).ok
