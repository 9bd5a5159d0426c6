"""Attention, one head and in it one block of queries at a time: both passes."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcbp.ops._attention_blocks import (
    Call,
    Extras,
    Rules,
    Span,
    block_of,
    cut,
    joined,
    over_blocks,
    spans,
)
from funcbp.ops._numeric import loop_zeros, wide


class Cotangents(NamedTuple):
    """Of queries [b, t, n, h], keys, values [b, s, k, h] and the bias, in float32 or wider."""

    q: Array
    k: Array
    v: Array
    bias: Array | None


class Softmax(NamedTuple):
    """The denominators total exp(top), [b, n, t]: 0 where a query sees no key."""

    top: Array  # the largest score, 0 where there is none
    total: Array

    def lse(self) -> Array:
        """The logarithm, [b, t, n]."""
        return jnp.swapaxes(self.top + jnp.log(self.total), 1, 2)


def forward(q: Array, k: Array, v: Array, extras: Extras, rules: Rules) -> tuple[Array, Softmax]:
    """The output [b, t, n, h], wide, and the denominators."""
    call = _call(q, k, v, extras, rules)
    b, n, t, h = call.q.shape
    if not call.q.size or not call.k.size:
        zeros = loop_zeros((b, n, t), (q, k, v))
        return jnp.swapaxes(jnp.zeros_like(call.q), 1, 2), Softmax(zeros, zeros)
    parts = lax.platform_dependent(
        jnp.arange(b * n),
        cpu=functools.partial(lax.map, functools.partial(_forward, call)),
        default=jax.vmap(functools.partial(_forward, call)),
    )
    o, top, total = (a.reshape(b, n, *a.shape[1:]) for a in parts)
    return jnp.swapaxes(o, 1, 2), Softmax(top, total)


def backward(
    q: Array, k: Array, v: Array, extras: Extras, softmax: Softmax, do: Array, rules: Rules
) -> Cotangents:
    """The cotangents, from the denominators and the cotangent of the output."""
    call, bias = _call(q, k, v, extras, rules), extras.bias
    if not call.q.size or not call.k.size:
        dbias = None if bias is None else jnp.zeros_like(wide(bias))
        dq, dk, dv = (jnp.zeros_like(wide(a)) for a in (q, k, v))
        return Cotangents(dq, dk, dv, dbias)
    head = functools.partial(_backward, call, softmax, jnp.swapaxes(wide(do), 1, 2))
    # One head after the other needs the least memory, and its blocks stay in the cache.
    d = lax.platform_dependent(
        cpu=functools.partial(_one_by_one, call, head, (softmax, do)),
        default=functools.partial(_at_once, call, head),
    )
    dq, dk, dv = (jnp.swapaxes(a, 1, 2) for a in d[:3])
    return Cotangents(dq, dk, dv, d.bias)


def _call(q, k, v, extras, rules) -> Call:
    q, k, v = (jnp.swapaxes(wide(a), 1, 2) for a in (q, k, v))
    return Call(q, k, v, extras, rules)


def _one_by_one(call: Call, head: Any, arrived: Any) -> Cotangents:
    """The sum of `head(i)` over all heads, each at its place; `arrived` is what it takes beside."""
    bias = call.extras.bias

    def step(sums, i):
        b, n, k = call.places(i)
        part = head(i)
        dk, dv = (
            _added(s, d[None, None], (b, k, 0, 0)) for s, d in zip(sums[:2], part[1:3], strict=True)
        )
        dbias = None if bias is None else _added(sums[2], part.bias[None, None], (b, n, 0, 0))
        return (dk, dv, dbias), part.q

    like = (call.q, call.k, call.v, bias, arrived)
    zeros = loop_zeros(call.k.shape, like)
    sums = (zeros, zeros, None if bias is None else loop_zeros(bias.shape, like))
    (dk, dv, dbias), dq = lax.scan(step, sums, jnp.arange(math.prod(call.q.shape[:2])))
    return Cotangents(dq.reshape(call.q.shape), dk, dv, dbias)


def _at_once(call: Call, head: Any) -> Cotangents:
    """The same, with all heads side by side."""
    bias, (b, n) = call.extras.bias, call.q.shape[:2]
    parts = jax.vmap(head)(jnp.arange(b * n))
    k = call.k.shape[1]
    dk, dv = (jnp.sum(d.reshape(b, k, n // k, *d.shape[1:]), axis=2) for d in parts[1:3])
    dbias = None
    if bias is not None:
        axes = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        dbias = parts.bias.reshape(b, n, *parts.bias.shape[1:])
        dbias = jnp.sum(dbias, axis=axes, keepdims=True)
    return Cotangents(parts.q.reshape(call.q.shape), dk, dv, dbias)


def _added(total: Array, part: Array, start: tuple) -> Array:
    """total with the part added from `start` on, in place; axes of one entry start at 0."""
    start = tuple(0 if n == 1 else i for n, i in zip(total.shape, start, strict=True))
    part += lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, part, start)


def _forward(call: Call, i: Array) -> tuple[Array, Array, Array]:
    """The output of head i, [t, h], and its denominators: `(o, top, total)`."""
    b, n, m = call.places(i)
    q, k, v = _scaled(call, b, n), call.k[b, m], call.v[b, m].T

    def step(span, carry, j):
        block = block_of(call, span, i, j, q, k)
        top = jnp.max(block.x, axis=0)
        top = jnp.where(jnp.isfinite(top), top, 0)
        e = jnp.exp(block.x - top)
        total = jnp.sum(e, axis=0)
        e = e if block.kept is None else e * block.kept
        o = cut(v, block.start, span.keys, 1) @ e / jnp.where(total == 0, 1, total)
        return carry, (o.T, top, total)

    t, s = q.shape[1], len(k)
    parts = [
        over_blocks(span, functools.partial(step, span), None)[1]
        for span in spans(t, s, call.block, call.rules)
    ]
    o, top, total = (joined(list(blocks), t) for blocks in zip(*parts, strict=True))
    return o, top, total


def _scaled(call: Call, b: Array, n: Array) -> Array:
    """The queries of a head times the scale, [h, t].

    Not the scores: a score that is rounded before the largest is taken from it may be rounded
    another way where it is made again, and the gradient of a query with one key is exactly 0.
    """
    return call.q[b, n].T * call.rules.scale


class _Head(NamedTuple):
    """One head in the backward pass, the arrays that a product takes on its left transposed too."""

    q: Array  # [t, h]
    qt: Array  # scaled
    k: Array  # [s, h]
    kt: Array
    v: Array
    do: Array  # [t, h]
    dot: Array
    top: Array  # [t]
    total: Array  # 1 where it is 0


def _backward(call: Call, softmax: Softmax, do: Array, i: Array) -> Cotangents:
    """The cotangents of head i: [t, h], [s, h], [s, h] and [t or 1, s or 1]."""
    b, n, m = call.places(i)
    q, k, do, total = call.q[b, n], call.k[b, m], do[b, n], softmax.total[b, n]
    total = jnp.where(total == 0, 1, total)
    head = _Head(q, _scaled(call, b, n), k, k.T, call.v[b, m], do, do.T, softmax.top[b, n], total)
    bias, like, parts = call.extras.bias, (head, call.extras.bias), []
    dbias = None if bias is None else loop_zeros(bias.shape[2:], like)
    zeros = loop_zeros(k.shape, like)
    sums = (zeros, zeros, dbias)
    for span in reversed(spans(len(q), len(k), call.block, call.rules)):
        sums, dq = over_blocks(span, functools.partial(_step, call, head, i, span), sums)
        parts.insert(0, dq)
    return Cotangents(joined(parts, len(q)), sums[0], sums[1], sums[2])


def _step(call: Call, head: _Head, i: Array, span: Span, sums: tuple, j: Any) -> tuple:
    """`((dk, dv, dbias), dq)`: the sums with the share of block j added, and dq of the block."""
    block, (dk, dv, dbias) = block_of(call, span, i, j, head.qt, head.k), sums
    first, start, size = block.first, block.start, call.block
    q, do, top, total = (cut(a, first, size, 0) for a in (head.q, head.do, head.top, head.total))
    # Rows that the block before had as well weigh nothing in the sums.
    fresh = first + jnp.arange(size) >= j * size
    weight, factor = (jnp.where(fresh, a / total, 0)[:, None] for a in (1, call.rules.scale))
    e = jnp.exp(block.x - top)
    dp = cut(head.v, start, span.keys, 0) @ cut(head.dot, first, size, 1)
    dp = dp if block.kept is None else dp * block.kept
    # Without the denominators, which a product's short side takes at less cost.
    dx = e * (dp - jnp.sum(e * dp, axis=0) / total)
    if dbias is not None:
        axes = tuple(axis for axis in (0, 1) if dbias.shape[axis] == 1)
        share = jnp.sum(dx.T * weight, axis=axes, keepdims=True)
        dbias = _added(dbias, share, (first, start))
    if call.rules.softcap is not None:
        dx *= 1 - jnp.square(block.capped / call.rules.softcap)
    dq = cut(head.kt, start, span.keys, 1) @ dx * (call.rules.scale / total)
    dk = _added(dk, dx @ (q * factor), (start, 0))
    e = e if block.kept is None else e * block.kept
    return (dk, _added(dv, e @ (do * weight), (start, 0)), dbias), dq.T
