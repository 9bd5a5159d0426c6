"""Every rule is broken on purpose, in each of these ways; the generic test must catch each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import OPS, Cast, label

from funcbp.check import compare
from funcbp.check.compare import split
from funcbp.check.evaluate import compiled
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


@jax.custom_vjp
def passed(x, which):
    """x, whose cotangent is broken in the way of that number; 0 for none."""
    return x


def _bwd(which, d):
    return jax.lax.switch(which, [lambda d: d, *MUTATIONS], d), None


passed.defvjp(lambda x, which: (x, which), _bwd)


def breakable(f):
    """f with one more argument: for each floating array, in which way its cotangent is broken."""

    def run(*args, mutation, **kwargs):
        layout, floating, fixed = split(args, kwargs)
        broken = {n: passed(v, mutation[i]) for i, (n, v) in enumerate(floating.items())}
        return layout.call(f, broken, fixed)

    return run


class Broken(Cast):
    """A case that breaks the cotangent of one argument in one way."""

    mutation = np.zeros(0, int)

    def build(self, seed=0, dtype=None):
        args, kwargs = super().build(seed, dtype)
        return args, {**kwargs, "mutation": self.mutation}


def all_zero(op):
    """Which arguments the rule gives no gradient: then there is no sign of it to turn."""
    layout, floating, fixed = split(*op.cases[0].build())

    @compiled
    def cotangents(floating, fixed):
        y, pullback = jax.vjp(lambda floating: layout.call(op, floating, fixed), floating)
        return list(pullback(jax.tree.map(jnp.ones_like, y))[0].values())

    return [not jnp.any(d) for d in cotangents(floating, fixed)]


@pytest.mark.parametrize("op", list(OPS.values()), ids=label)
def test_every_mutation_is_caught(op):
    case = Broken(op, op.cases[0], "float32")
    zero = all_zero(op)
    rule = breakable(op)

    def plain(*args, mutation, **kwargs):
        return op.plain(*args, **kwargs)

    def right(mutation, which):
        case.mutation = np.where(np.arange(len(zero)) == which, mutation, 0)
        return compare(rule, case, reference=plain).ok

    assert right(0, 0)
    missed = [
        f"{mutation.__name__} of argument {which}"
        for which in range(len(zero))
        for k, mutation in enumerate(MUTATIONS, 1)
        if (mutation is constant_added or not zero[which]) and right(k, which)
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
        functions=op.functions,
        resolve=op.resolve,
        check=op.check,
        name=op.name,
    )
    assert not compare(wrong, Cast(op, op.cases[0], "float32")).ok
