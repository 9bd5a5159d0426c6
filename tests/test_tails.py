"""Slopes keep five digits wherever they are normal numbers of float32.

float64 is no truth for them near 1 - 1e-17 or at a root, so the truth is taken with 40 digits.
"""

import functools

import jax
import mpmath as mp
import numpy as np
import pytest

from funcbp import ops

mp.mp.dps = 40


def logistic(x):
    return 1 / (1 + mp.exp(-x))


def gated(v, dv):
    return lambda x: logistic(v(x)) * (1 + x * dv(x) * logistic(-v(x)))


def gelu_argument(x):
    return 2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)


def gelu_argument_slope(x):
    return 2 * mp.sqrt(2 / mp.pi) * (1 + 3 * mp.mpf("0.044715") * x**2)


TRUTH = {
    "sigmoid": (ops.sigmoid, lambda x: logistic(x) * logistic(-x)),
    "tanh": (ops.tanh, lambda x: mp.sech(x) ** 2),
    "silu": (ops.silu, gated(lambda x: x, lambda x: 1)),
    "gelu": (ops.gelu, gated(gelu_argument, gelu_argument_slope)),
    "gelu, exact": (
        functools.partial(ops.gelu, approximate=False),
        lambda x: mp.ncdf(x) + x * mp.npdf(x),
    ),
}


@pytest.mark.parametrize("name", TRUTH)
def test_relative_error(name):
    f, slope = TRUTH[name]
    rng = np.random.default_rng(5)
    x = np.concatenate(
        [
            rng.uniform(-90, 90, 500),
            rng.uniform(-15, 5, 1000),
            rng.standard_normal(300),
            rng.normal(-1.278, 0.05, 200),
            rng.normal(-0.752, 0.05, 200),
            [17.0, -9.01, 0.0, 1e-30],
        ]
    ).astype(np.float32)
    got = jax.jit(jax.vmap(jax.grad(f)))(x)
    truth = [slope(mp.mpf(float(v))) for v in x]
    errors = [
        float(abs(mp.mpf(float(g)) / t - 1))
        for g, t in zip(got, truth, strict=True)
        if abs(t) >= float(np.finfo(np.float32).tiny)
    ]
    assert len(errors) > 1000
    assert max(errors) <= 1e-5
