"""Rules as users write them, each with one fault, which `WRONG = False` repairs."""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcbp
from funcbp import ops

WRONG = True


def off():
    """A factor that a right rule does not have."""
    return 1.5 if WRONG else 1.0


def normal(seed, *shape, dtype="float32"):
    """A fixed draw."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class Mode(enum.Enum):
    """A setting."""

    PLAIN = 1
    SQUARE = 2


class Params(NamedTuple):
    """A pytree of a class of its own."""

    w: Any
    b: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def settled(x, activation, mode, shape):
    """Settings of several kinds: a function, an enum, a tuple."""
    return activation(x * (x if mode is Mode.SQUARE else 1.0)).reshape(shape)


def settled_bwd(activation, mode, shape, x, dy):
    _, pull = jax.vjp(lambda x: settled.fun(x, activation, mode, shape), x)
    return (off() * pull(dy)[0],)


settled.defvjp(lambda x, *static: (settled(x, *static), x), settled_bwd)


@jax.custom_vjp
def affine(params, x, mask):
    """A pytree of arguments, one of them None."""
    y = x @ params.w + params.b
    return y if mask is None else y * mask


def affine_bwd(saved, dy):
    params, x = saved
    return Params(x.T @ dy * off(), dy.sum(0)), dy @ params.w.T, None


affine.defvjp(lambda p, x, m: (affine(p, x, m), (p, x)), affine_bwd)


@jax.custom_vjp
def picked(table, index):
    """Integers, a narrow type, and more elements than a page holds."""
    return table[index]


def picked_bwd(saved, dy):
    table, index = saved
    return (off() * jnp.zeros_like(table).at[index].add(dy)).astype(table.dtype), None


picked.defvjp(lambda t, i: (picked(t, i), (t, i)), picked_bwd)


@jax.custom_vjp
def dropped(x, key):
    """A key."""
    return x * jax.random.bernoulli(key, 0.5, x.shape)


dropped.defvjp(
    lambda x, k: (dropped(x, k), (x, k)),
    lambda saved, dy: (off() * dropped(dy, saved[1]), None),
)


@jax.jit
@jax.custom_vjp
def turned(z, w):
    """Complex numbers, under another decorator."""
    return z * w


turned.__wrapped__.defvjp(
    lambda z, w: (z * w, (z, w)), lambda s, dy: (dy * s[1], off() * dy * s[0])
)


class Layer:
    """Holds a rule."""

    @jax.custom_vjp
    def scaled(x, w):  # noqa: N805
        return x * w

    scaled.defvjp(lambda x, w: (x * w, (x, w)), lambda s, dy: (dy * s[1], off() * dy * s[0]))


def make_power(n):
    """A rule for each setting, with no name in the module."""

    @jax.custom_vjp
    def power(x):
        return x**n

    power.defvjp(lambda x: (x**n, x), lambda x, dy: (off() * dy * n * x ** (n - 1),))
    return power


def make_mapped():
    """A rule without a name, with a setting without a name."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def mapped(x, f):
        return f(x)

    mapped.defvjp(lambda x, f: (f(x), x), lambda f, x, dy: (off() * jax.vjp(f, x)[1](dy)[0],))
    return mapped


def centred_plain(x: jax.Array, *, axis: int = -1):
    """x less its mean."""
    return x - x.mean(axis, keepdims=True)


def centred_bwd(saved, dy, *, axis):
    return (off() * (dy - dy.mean(axis, keepdims=True)),)


centred = funcbp.op(
    centred_plain,
    lambda x, *, axis: (centred_plain(x, axis=axis), None),
    centred_bwd,
    name="centred",
)


def hand(x):
    """A function whose reference another one is."""
    return off() * jnp.tanh(x)


def reference(x):
    """What `hand` should be."""
    return jnp.tanh(x)


def loss(params, x, *, index):
    """Calls all of them."""
    y = affine(params, x, None)
    y = settled(y, jnp.tanh, Mode.SQUARE, (2, 6)).reshape(3, 4)
    t = picked(normal(5, 40, 3, dtype="bfloat16"), index).astype(jnp.float32)
    y = dropped(y, jax.random.key(3))
    z = turned(y[0, 0] + 1j, y[1, 1] - 2j)
    y = Layer.scaled(y, normal(6, 3, 4))
    y = centred(make_power(3)(y), axis=0)
    y = ops.softmax(make_mapped()(y, lambda y: jnp.sin(3 * y)))
    return jnp.sum(y**2) + t.sum() + jnp.real(z)


def small(x):
    """Calls one."""
    return make_power(2)(x)


def arguments():
    """Of the loss, by name."""
    params = Params(normal(0, 5, 4), normal(1, 4))
    return {"params": params, "x": normal(2, 3, 5), "index": jnp.asarray([3, 39, 3])}


POSITIONAL = (normal(3, 4),)


@jax.custom_vjp
def doubled(x):
    """Its fault shows at 0 alone, where no call was."""
    return 2 * x


doubled.defvjp(lambda x: (2 * x, x), lambda x, dy: (2 * dy * x / x if WRONG else 2 * dy,))
