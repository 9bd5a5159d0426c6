"""One test for all rules: every op, case, dtype and transformation against float64."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rules import FIRST_ORDER, OPS, SECOND_ORDER, Call, Cast, WithCotangent, cases, every_way, label

from funcbp.check import compare
from funcbp.check.compare import split


@pytest.mark.parametrize(("op", "case"), cases(), ids=label)
def test_value_and_cotangents(op, case):
    for dtype in case.dtypes:
        compare(op, Cast(op, case, dtype)).raise_if_wrong()


@pytest.mark.parametrize(("op", "case"), cases(), ids=label)
def test_transformations(op, case):
    drawn = WithCotangent(op, case, "float32")
    rule, plain = (every_way((*FIRST_ORDER, *SECOND_ORDER), f, drawn.layout())
                   for f in (op, op.plain))  # fmt: skip
    compare(rule, drawn, reference=plain, cotangents=False).raise_if_wrong()
