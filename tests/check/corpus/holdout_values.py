"""Values and small helpers of the holdout's entries."""

import jax.numpy as jnp
import numpy as np

from .entry import Wrong


def add_wrong(entries, name, f, *calls, causes, of=(), innocent=None):
    """Adds a wrong rule to a list; causes are words between spaces."""
    entries.append(Wrong(name, f, calls, tuple(causes.split()), tuple(of), innocent))


def normal(seed, *shape, dtype="float32"):
    """Standard normal values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype=dtype)


def positive(seed, *shape, low=0.5, high=2.0, dtype="float32"):
    """Values between two positive bounds."""
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, size=shape), dtype=dtype)


def integers(seed, high, *shape):
    """Integers below a bound."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, size=shape), dtype="int32")


def dominant(seed, n):
    """A well-conditioned matrix without symmetry."""
    return normal(seed, n, n) + 4.0 * jnp.eye(n)


def symmetric(a):
    """The symmetric part."""
    return 0.5 * (a + a.T)


# Eight particles, a little apart.
CUBE = jnp.asarray(np.array(list(np.ndindex(2, 2, 2)), dtype="float32")) * 1.3
