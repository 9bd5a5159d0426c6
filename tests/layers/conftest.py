"""What the layer tests share."""

import jax
import jax.numpy as jnp
import pytest

from funcbp.layers import Layer


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def counter():
    """A layer of one's own with state: it adds to x how often it has been trained before."""

    def init(key, *specs):
        return {}, {"count": jnp.zeros((), "int32")}

    def apply(params, state, x, *, key=None, train=False):
        count = state["count"]
        return x + count, {"count": count + train}

    return Layer(init, apply, "counter")
