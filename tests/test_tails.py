"""Slopes keep their digits wherever they are normal numbers of float32.

A slope of e^-L is an exponential whose argument is rounded: it may be off by 1.5 L ulp, at L below
8 by 12 ulp.
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


def mish_slope(x):
    w = mp.exp(x)
    d = w * w + 2 * w + 2
    return w * (w + 2) / d + 4 * x * w * (w + 1) / d**2


def squareplus_slope(x):
    r = mp.sqrt(x * x + 4)
    return (1 + x / r) / 2


def exponential_below(scale, alpha):
    return lambda x: mp.mpf(scale) if x > 0 else mp.mpf(scale) * mp.mpf(alpha) * mp.exp(x)


SELU = ("1.0507009873554805", "1.6732632423543772")
TRUTH = {
    "sigmoid": (ops.sigmoid, lambda x: logistic(x) * logistic(-x)),
    "tanh": (ops.tanh, lambda x: mp.sech(x) ** 2),
    "silu": (ops.silu, gated(lambda x: x, lambda x: 1)),
    "gelu": (ops.gelu, gated(gelu_argument, gelu_argument_slope)),
    "gelu, exact": (
        functools.partial(ops.gelu, approximate=False),
        lambda x: mp.ncdf(x) + x * mp.npdf(x),
    ),
    "mish": (ops.mish, mish_slope),
    "softplus": (ops.softplus, logistic),
    "log_sigmoid": (ops.log_sigmoid, lambda x: logistic(-x)),
    "squareplus": (ops.squareplus, squareplus_slope),
    "soft_sign": (ops.soft_sign, lambda x: 1 / (1 + abs(x)) ** 2),
    "elu": (ops.elu, exponential_below("1", "1")),
    "selu": (ops.selu, exponential_below(*SELU)),
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
            rng.normal(-1.192, 0.05, 200),
            [17.0, -9.01, 0.0, 1e-30],
        ]
    ).astype(np.float32)
    got = jax.jit(jax.vmap(jax.grad(f)))(x)
    truth = [slope(mp.mpf(float(v))) for v in x]
    shares = [
        float(abs(mp.mpf(float(g)) / t - 1) / max(-mp.log(abs(t)), 8))
        for g, t in zip(got, truth, strict=True)
        if abs(t) >= float(np.finfo(np.float32).tiny)
    ]
    assert len(shares) > 1000
    assert max(shares) <= 1.5 * np.finfo(np.float32).eps
