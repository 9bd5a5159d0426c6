"""Reversible blocks: what went in is computed back from what comes out, so nothing is kept.

    y1 = x1 + f_l(x2)        y2 = x2 + g_l(y1)        l = 1 .. L, each layer on the last one's y

Backward. From the last layer to the first, with y1, y2 known:
    x2 = y2 - g(y1)          x1 = y1 - f(x2)
    dx1 = dy1 + (dg/dy1)^T dy2        dx2 = dy2 + (df/dx2)^T dx1
    dp_l = (df/dp_l)^T dx1 + (dg/dp_l)^T dy2
The cotangents of arrays that f and g close over are the same sums, over all layers.

Each function runs once forward, once more backward and is transposed: 4 units of time for the 3
of a pass that stores everything.

Saves: y1 and y2, outputs, in float32 or wider; x1, x2 and the parameters, arguments. Nothing that
       grows with the depth. x1 and x2 are for second derivatives, which differentiate `plain`.
Edge:  each layer rounds what it rebuilds, to an ulp of y: the gradient differs from that of
       storing by as much as it would for such a change of x. Where a layer's sum cancels so far
       that x is lost in y (|f| beyond |x| / eps), so is x. No layers: y = x.
Dtype: sums in float32 or wider, so that in bfloat16 less is lost than autodiff loses; f and g
       take and return the dtypes of x1 and x2, which the results have.
Ref:   Gomez et al., 2017 (RevNet), equations 6 to 8 and algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, tree
from jaxtyping import Array, Float, PyTree

from funcbp.case import Case, closing, normal
from funcbp.core import InputError, op
from funcbp.ops._buffers import scan
from funcbp.ops._loops import depth, first, steady
from funcbp.ops._numeric import loop_zeros, wide


def plain(
    f: Callable, g: Callable, params: PyTree, x1: Float[Array, "..."], x2: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A stack of reversible blocks, y1 = x1 + f(p, x2) and y2 = x2 + g(p, y1).

    Args:
      f: `f(p, x2)` with the shape and dtype of x1, where p is one layer's part of params. It may
        close over arrays, which get gradients.
      g: `g(p, y1)` with the shape and dtype of x2.
      params: a pytree of arrays whose leading axis is the layers; both f and g get all of it.
        None for one block, whose f and g close over what they need.
      x1: any shape.
      x2: any shape, often that of x1.

    Returns:
      `(y1, y2)` after the last layer, in the shapes and dtypes of x1 and x2.

    Raises:
      InputError: the leading axes of params differ, or f or g returns another shape or dtype.
    """

    def layer(x, p):
        x1, x2 = x
        y1 = x1 + f(p, x2)
        return (y1, x2 + g(p, y1)), None

    return _over_layers(layer, params, (x1, x2))


def _over_layers(layer, params, x):
    x = steady(lambda x, p: layer(x, p)[0], x, first(params))
    return lax.scan(layer, x, params, length=depth(params))[0]


def check(f, g, params, x1, x2):
    """Raises if the layers or the functions do not fit."""
    p = jax.eval_shape(first, params) if depth(params) else first(params)
    _same("f", f, p, x2, x1)
    _same("g", g, p, x1, x2)


def _same(name, function, p, x, like):
    got = jax.eval_shape(function, p, x)
    if [(a.shape, a.dtype) for a in tree.leaves(got)] != [(like.shape, like.dtype)]:
        other = "x1" if name == "f" else "x2"
        raise InputError(
            f"{name} must return one array of {other}'s shape and dtype, {like.dtype}"
            f"{list(like.shape)}, got {got}; project or cast inside {name}"
        )


class Saved(NamedTuple):
    """The arguments, and y1 and y2, wide."""

    f: Callable
    g: Callable
    params: PyTree
    x1: Array
    x2: Array
    y: tuple[Array, Array]


def fwd(f, g, params, x1, x2):
    def layer(x, p):
        y1 = x[0] + wide(f(p, x[1].astype(x2.dtype)))
        return (y1, x[1] + wide(g(p, y1.astype(x1.dtype)))), None

    y = _over_layers(layer, params, (wide(x1), wide(x2)))
    return (y[0].astype(x1.dtype), y[1].astype(x2.dtype)), Saved(f, g, params, x1, x2, y)


def bwd(saved, dy):
    f, g, params, x1, x2, y = saved

    def layer(carry, p):
        (y1, y2), (dy1, dy2), df, dg = carry
        out, pull = jax.vjp(_call, g, p, y1.astype(x1.dtype))
        dg_here, dp_g, d = pull(dy2.astype(out.dtype))
        y2, dy1 = y2 - wide(out), dy1 + wide(d)
        out, pull = jax.vjp(_call, f, p, y2.astype(x2.dtype))
        df_here, dp_f, d = pull(dy1.astype(out.dtype))
        y1, dy2 = y1 - wide(out), dy2 + wide(d)
        df, dg = _plus(df, df_here), _plus(dg, dg_here)
        return ((y1, y2), (dy1, dy2), df, dg), _plus(_floats(dp_f), dp_g)

    dy = (wide(dy[0]), wide(dy[1]))
    carry = (y, dy, _zeros(f), _zeros(g))
    (_, (dx1, dx2), df, dg), dp = scan(layer, carry, params, length=depth(params), reverse=True)
    return df, dg, dp, dx1, dx2


def _call(function, p, x):
    return function(p, x)


def _floats(cotangents):
    """None for an array that has no cotangent."""
    return tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, cotangents)


def _plus(total, cotangents):
    """The sum, in the structure of cotangents with None for what has none."""

    def add(d, t):
        return None if t is None else t + d.astype(t.dtype)

    return tree.map(add, cotangents, total)


def _zeros(function):
    """A wide sum for each floating array that a function closes over."""

    def zeros(a):
        return loop_zeros(a.shape, a) if jnp.issubdtype(a.dtype, jnp.floating) else None

    return tree.map(zeros, function)


def _examples_f(f, g, params, x1, x2):
    return first(params), _carried(f, g, params, x1, x2)[1]


def _examples_g(f, g, params, x1, x2):
    return first(params), _carried(f, g, params, x1, x2)[0]


def _carried(f, g, params, x1, x2):
    return steady(lambda x, p: (x[0] + f(p, x[1]), x[1] + g(p, x[0])), (x1, x2), first(params))


def _half(k, p, x):
    return jnp.tanh(x @ p) * k


def _other_half(p, x):
    return jnp.sin(x @ p.T)


def _alone(w, p, x):
    return jnp.tanh(x @ w)


def _block(name):
    """A block of a residual network: normalise, widen, gate, narrow."""

    def block(p, x):
        x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return jax.nn.gelu(x @ p[name][0]) @ p[name][1]

    return block


def _weights(layers, n, wider):
    return [normal(layers, n, wider, std=n**-0.5), normal(layers, wider, n, std=wider**-0.5 / 4)]


reversible = op(
    plain,
    fwd,
    bwd,
    check=check,
    functions={"f": _examples_f, "g": _examples_g},
    cases=(
        Case("odd", closing(_half, (3,)), _other_half, (3, 3, 3), (2, 3), (2, 3)),
        Case(
            "one block that closes over",
            closing(_alone, (3, 2)),
            closing(_alone, (2, 3)),
            None,
            (4, 2),
            (4, 3),
            transformed=False,
        ),
        Case("no layers", _other_half, _other_half, (0, 3, 3), (2, 3), (2, 3), transformed=False),
        Case(
            "32 blocks",
            _block("f"),
            _block("g"),
            {"f": _weights(32, 256, 512), "g": _weights(32, 256, 512)},
            (1024, 256),
            (1024, 256),
            bench=True,
        ),
    ),
)
