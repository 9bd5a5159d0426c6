"""Attention, a block of queries of one head at a time.

A block is taken transposed, keys by queries [s, t]: then of all products of both passes none has a
transposed left operand, and sums over keys run along the first axis; XLA on CPU is slow at the
other way round. A block meets all keys that it may see at once, so that the sums of its rows are
exact where one key has all the weight, and no running maximum is needed.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcbp.ops._numeric import loop_zeros, wide

# Queries of one block, at most, and into how many parts those of a causal call are cut, each with
# a fixed number of keys.
BLOCK, PARTS = 128, 4


class Rules(NamedTuple):
    """The settings: which keys a query may see, and what is done to a score."""

    scale: float
    left: int | None  # how many keys before its own place a query sees; None for all
    right: int | None  # and how many after
    softcap: float | None
    dropout: float

    @staticmethod
    def of(width, scale, is_causal, window, softcap, dropout_rate) -> "Rules":
        """From the settings of the op, for heads of this width."""
        left, right = (window, window) if isinstance(window, int) else window or (None, None)
        scale = 1 / math.sqrt(width) if scale is None else scale
        return Rules(scale, left, 0 if is_causal else right, softcap, dropout_rate)


class Extras(NamedTuple):
    """What comes beside queries, keys and values; each may be None."""

    bias: Array | None  # [b or 1, n or 1, t or 1, s or 1]
    mask: Array | None  # the same
    query_lengths: Array | None  # [b]
    key_lengths: Array | None
    query_segments: Array | None  # [b, t]
    key_segments: Array | None  # [b, s]
    dropout_key: Array | None


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


class _Span(NamedTuple):
    """Blocks of queries that see the same number of keys, of which `end` is the end."""

    blocks: range
    keys: int
    end: int


class _Call(NamedTuple):
    """The heads, in float32 or wider, and what comes beside them."""

    q: Array  # [b, n, t, h]
    k: Array  # [b, k, s, h]
    v: Array
    extras: Extras
    rules: Rules

    @property
    def block(self) -> int:
        """Queries of a block: as few as the number of blocks allows, so that little is left."""
        t = self.q.shape[2]
        return -(-t // -(-t // BLOCK))

    def places(self, i: Array) -> tuple[Array, Array, Array]:
        """`(batch, head, head of the keys)` of head number i of all."""
        n = self.q.shape[1]
        return i // n, i % n, i % n // (n // self.k.shape[1])


def visible(rules: Rules, row: Array, column: Array) -> Array | None:
    """Whether the query at place `row` may see the key at `column`; None if all may."""
    seen = [] if rules.left is None else [column >= row - rules.left]
    seen += [] if rules.right is None else [column <= row + rules.right]
    return _all(seen)


def _all(conditions: list) -> Array | None:
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def kept(key: Array, rate: float, rows: Array, count: int) -> Array:
    """[rows, count]: 0 for what is dropped, else 1 / (1 - rate); a key of its own for each row.

    So a row is drawn alike in whatever block it stands.
    """

    def draw(row):
        # float32 whatever the dtype, so that the draw depends on key, rate and place alone.
        return jax.random.bernoulli(jax.random.fold_in(key, row), jnp.float32(1 - rate), (count,))

    return jnp.where(jax.vmap(draw)(rows), 1 / (1 - rate), 0)


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
        return Cotangents(*(jnp.zeros_like(wide(a)) for a in (q, k, v)), dbias)
    head = functools.partial(_backward, call, softmax, jnp.swapaxes(wide(do), 1, 2))
    # One head after the other needs the least memory, and its blocks stay in the cache.
    d = lax.platform_dependent(
        cpu=functools.partial(_one_by_one, call, head, do),
        default=functools.partial(_at_once, call, head),
    )
    dq, dk, dv = (jnp.swapaxes(a, 1, 2) for a in d[:3])
    return Cotangents(dq, dk, dv, d.bias)


def _call(q, k, v, extras, rules) -> _Call:
    q, k, v = (jnp.swapaxes(wide(a), 1, 2) for a in (q, k, v))
    return _Call(q, k, v, extras, rules)


def _one_by_one(call: _Call, head: Any, do: Array) -> Cotangents:
    """The sum of `head(i)` over all heads, each at its place."""
    bias = call.extras.bias

    def step(sums, i):
        b, n, k = call.places(i)
        part = head(i)
        dk, dv = (
            _added(s, d[None, None], (b, k, 0, 0)) for s, d in zip(sums[:2], part[1:3], strict=True)
        )
        dbias = None if bias is None else _added(sums[2], part.bias[None, None], (b, n, 0, 0))
        return (dk, dv, dbias), part.q

    like = (call.q, call.k, call.v, do, bias)
    zeros = [loop_zeros(call.k.shape, like)] * 2
    zeros.append(None if bias is None else loop_zeros(bias.shape, like))
    sums, dq = lax.scan(step, tuple(zeros), jnp.arange(math.prod(call.q.shape[:2])))
    return Cotangents(dq.reshape(call.q.shape), *sums)


def _at_once(call: _Call, head: Any) -> Cotangents:
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


def _spans(t: int, s: int, block: int, rules: Rules) -> list[_Span]:
    """All blocks of queries, by how many keys they see."""
    count = -(-t // block)
    parts = min(PARTS, count)
    edges = [count * i // parts for i in range(parts + 1)]
    reach = None if None in (rules.left, rules.right) else block + rules.left + rules.right
    spans = []
    for first, last in itertools.pairwise(edges):
        end = s if rules.right is None else min(s, last * block + rules.right)
        spans.append(_Span(range(first, last), min(end, reach or end), end))
    merged = spans[:1]
    for span in spans[1:]:
        if span.keys == merged[-1].keys:
            span = span._replace(blocks=range(merged.pop().blocks.start, span.blocks.stop))
        merged.append(span)
    return merged


def _scan(span: _Span, step: Any, carry: Any) -> Any:
    """lax.scan over the blocks of a span; no loop for one."""
    if len(span.blocks) > 1:
        return lax.scan(step, carry, jnp.arange(span.blocks.start, span.blocks.stop))
    carry, y = step(carry, span.blocks.start)
    return carry, jax.tree.map(lambda y: y[None], y)


def _joined(parts: list[Array], t: int) -> Array:
    """The blocks [block, queries of it, ...] of all spans as [t, ...]."""
    blocks = jnp.concatenate(parts)
    # The last block starts early enough to be whole.
    whole = blocks[:-1].reshape(-1, *blocks.shape[2:])
    return jnp.concatenate([whole, blocks[-1][len(whole) - t :]])


class _Block(NamedTuple):
    """What one block of queries meets; all of it transposed, keys by queries."""

    first: Array  # query
    start: Array  # key
    x: Array  # scores, -inf where the key is not seen
    capped: Array  # scores before bias and mask
    kept: Array | None  # by dropout, scaled


def _block(call: _Call, span: _Span, i: Array, j: Any, q: Array, k: Array) -> _Block:
    """Block j of head i, whose queries are q [h, t] and whose keys are k [s, h]."""
    rules, size, t = call.rules, call.block, q.shape[1]
    first = jnp.minimum(j * size, t - size)
    start = 0 if rules.left is None else jnp.clip(first - rules.left, 0, span.end - span.keys)
    capped = cap(rules, _cut(k, start, span.keys, 0) @ _cut(q, first, size, 1))
    x, drop = capped, None
    tile = functools.partial(_tile, call, span, i, first, start)
    if call.extras.bias is not None:
        x = x + wide(tile(call.extras.bias))
    seen = _seen(call, span, i, first, start, tile)
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    if rules.dropout:
        drop = kept(
            call.extras.dropout_key, rules.dropout, i * t + first + jnp.arange(size), len(k)
        )
        drop = _cut(drop, start, span.keys, 1).T
    return _Block(first, start, x, capped, drop)


def _tile(call: _Call, span: _Span, i: Array, first: Array, start: Array, a: Array) -> Array:
    """The part of a [b or 1, n or 1, t or 1, s or 1] for a block, transposed."""
    b, n, _ = call.places(i)
    shape = (1, 1, min(call.block, a.shape[2]), min(span.keys, a.shape[3]))
    at = (0 if m == 1 else p for m, p in zip(a.shape, (b, n, first, start), strict=True))
    return lax.dynamic_slice(a, tuple(at), shape)[0, 0].T


def _seen(call: _Call, span: _Span, i: Array, first: Array, start: Array, tile: Any) -> Any:
    """Which keys each query of a block sees; None for all."""
    extras, b = call.extras, call.places(i)[0]
    row = first + jnp.arange(call.block)[None, :]
    column = start + jnp.arange(span.keys)[:, None]
    seen = [visible(call.rules, row, column)]
    for lengths, place in ((extras.query_lengths, row), (extras.key_lengths, column)):
        seen.append(None if lengths is None else place < lengths[b])
    if extras.query_segments is not None:
        mine = extras.query_segments[:, None, :, None]
        seen.append(tile(mine) == tile(extras.key_segments[:, None, None, :]))
    seen.append(None if extras.mask is None else tile(extras.mask))
    return _all([condition for condition in seen if condition is not None])


def cap(rules: Rules, x: Array) -> Array:
    """The score, softly capped."""
    return x if rules.softcap is None else rules.softcap * jnp.tanh(x / rules.softcap)


def _cut(a: Array, start: Any, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis)


def _forward(call: _Call, i: Array) -> tuple[Array, Array, Array]:
    """The output of head i, [t, h], and its denominators: `(o, top, total)`."""
    b, n, m = call.places(i)
    q, k, v = _scaled(call, b, n), call.k[b, m], call.v[b, m].T

    def step(span, carry, j):
        block = _block(call, span, i, j, q, k)
        top = jnp.max(block.x, axis=0)
        top = jnp.where(jnp.isfinite(top), top, 0)
        e = jnp.exp(block.x - top)
        total = jnp.sum(e, axis=0)
        e = e if block.kept is None else e * block.kept
        o = _cut(v, block.start, span.keys, 1) @ e / jnp.where(total == 0, 1, total)
        return carry, (o.T, top, total)

    t, s = q.shape[1], len(k)
    spans = _spans(t, s, call.block, call.rules)
    parts = [_scan(span, functools.partial(step, span), None)[1] for span in spans]
    o, top, total = (_joined(list(blocks), t) for blocks in zip(*parts, strict=True))
    return o, top, total


def _scaled(call: _Call, b: Array, n: Array) -> Array:
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


def _backward(call: _Call, softmax: Softmax, do: Array, i: Array) -> Cotangents:
    """The cotangents of head i: [t, h], [s, h], [s, h] and [t or 1, s or 1]."""
    b, n, m = call.places(i)
    q, k, do, total = call.q[b, n], call.k[b, m], do[b, n], softmax.total[b, n]
    total = jnp.where(total == 0, 1, total)
    head = _Head(q, _scaled(call, b, n), k, k.T, call.v[b, m], do, do.T, softmax.top[b, n], total)
    bias, like, parts = call.extras.bias, (head, call.extras.bias), []
    dbias = None if bias is None else loop_zeros(bias.shape[2:], like)
    sums = (loop_zeros(k.shape, like), loop_zeros(k.shape, like), dbias)
    for span in reversed(_spans(len(q), len(k), call.block, call.rules)):
        sums, dq = _scan(span, functools.partial(_step, call, head, i, span), sums)
        parts.insert(0, dq)
    return Cotangents(_joined(parts, len(q)), *sums)


def _step(call: _Call, head: _Head, i: Array, span: _Span, sums: tuple, j: Any) -> tuple:
    """`((dk, dv, dbias), dq)`: the sums with the share of block j added, and dq of the block."""
    block, (dk, dv, dbias) = _block(call, span, i, j, head.qt, head.k), sums
    first, start, size = block.first, block.start, call.block
    q, do, top, total = (_cut(a, first, size, 0) for a in (head.q, head.do, head.top, head.total))
    # Rows that the block before had as well weigh nothing in the sums.
    fresh = first + jnp.arange(size) >= j * size
    weight, factor = (jnp.where(fresh, a / total, 0)[:, None] for a in (1, call.rules.scale))
    e = jnp.exp(block.x - top)
    dp = _cut(head.v, start, span.keys, 0) @ _cut(head.dot, first, size, 1)
    dp = dp if block.kept is None else dp * block.kept
    # Without the denominators, which a product's short side takes at less cost.
    dx = e * (dp - jnp.sum(e * dp, axis=0) / total)
    if dbias is not None:
        axes = tuple(axis for axis in (0, 1) if dbias.shape[axis] == 1)
        share = jnp.sum(dx.T * weight, axis=axes, keepdims=True)
        dbias = _added(dbias, share, (first, start))
    if call.rules.softcap is not None:
        dx *= 1 - jnp.square(block.capped / call.rules.softcap)
    dq = _cut(head.kt, start, span.keys, 1) @ dx * (call.rules.scale / total)
    dk = _added(dk, dx @ (q * factor), (start, 0))
    e = e if block.kept is None else e * block.kept
    return (dk, _added(dv, e @ (do * weight), (start, 0)), dbias), dq.T
