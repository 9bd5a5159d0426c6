"""What one block of queries of one head meets: keys, scores, bias, mask and dropout.

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

from funcbp.ops._numeric import wide

# Queries of one block, at most, and into how many parts those of a causal call are cut, each with
# a fixed number of keys.
BLOCK, PARTS = 256, 4


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


class Call(NamedTuple):
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


class Span(NamedTuple):
    """Blocks of queries that see the same number of keys, of which `end` is the end."""

    blocks: range
    keys: int
    end: int


class Block(NamedTuple):
    """What one block of queries meets; all of it transposed, keys by queries."""

    first: Any  # query
    start: Any  # key
    x: Array  # scores, -inf where the key is not seen
    capped: Array  # scores before bias and mask
    kept: Array | None  # by dropout, scaled


def visible(rules: Rules, row: Array, column: Array) -> Array | None:
    """Whether the query at place `row` may see the key at `column`; None if all may."""
    seen = [] if rules.left is None else [column >= row - rules.left]
    seen += [] if rules.right is None else [column <= row + rules.right]
    return _all(seen)


def _all(conditions: list) -> Array | None:
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def kept(key: Any, rate: float, rows: Array, count: int) -> Array:
    """[rows, count]: 0 for what is dropped, else 1 / (1 - rate); a key of its own for each row.

    So a row is drawn alike in whatever block it stands.
    """

    def draw(row):
        # float32 whatever the dtype, so that the draw depends on key, rate and place alone.
        return jax.random.bernoulli(jax.random.fold_in(key, row), jnp.float32(1 - rate), (count,))

    return jnp.where(jax.vmap(draw)(rows), 1 / (1 - rate), 0)


def cap(rules: Rules, x: Array) -> Array:
    """The score, softly capped."""
    return x if rules.softcap is None else rules.softcap * jnp.tanh(x / rules.softcap)


def spans(t: int, s: int, block: int, rules: Rules) -> list[Span]:
    """All blocks of queries, by how many keys they see."""
    count = -(-t // block)
    parts = min(PARTS, count)
    edges = [count * i // parts for i in range(parts + 1)]
    reach = None
    if rules.left is not None and rules.right is not None:
        reach = block + rules.left + rules.right
    found = []
    for first, last in itertools.pairwise(edges):
        end = s if rules.right is None else min(s, last * block + rules.right)
        found.append(Span(range(first, last), min(end, reach or end), end))
    merged = found[:1]
    for span in found[1:]:
        if span.keys == merged[-1].keys:
            span = span._replace(blocks=range(merged.pop().blocks.start, span.blocks.stop))
        merged.append(span)
    return merged


def over_blocks(span: Span, step: Any, carry: Any) -> Any:
    """lax.scan over the blocks of a span; no loop for one."""
    if len(span.blocks) > 1:
        return lax.scan(step, carry, jnp.arange(span.blocks.start, span.blocks.stop))
    carry, y = step(carry, span.blocks.start)
    return carry, jax.tree.map(lambda y: y[None], y)


def joined(parts: list[Array], t: int) -> Array:
    """The blocks [block, queries of it, ...] of all spans as [t, ...]."""
    blocks = jnp.concatenate(parts)
    # The last block starts early enough to be whole.
    whole = blocks[:-1].reshape(-1, *blocks.shape[2:])
    return jnp.concatenate([whole, blocks[-1][len(whole) - t :]])


def block_of(call: Call, span: Span, i: Array, j: Any, q: Array, k: Array) -> Block:
    """Block j of head i, whose queries are q [h, t] and whose keys are k [s, h]."""
    rules, size, t = call.rules, call.block, q.shape[1]
    first = jnp.minimum(j * size, t - size)
    start = 0 if rules.left is None else jnp.clip(first - rules.left, 0, span.end - span.keys)
    capped = cap(rules, cut(k, start, span.keys, 0) @ cut(q, first, size, 1))
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
        drop = cut(drop, start, span.keys, 1).T
    return Block(first, start, x, capped, drop)


def _tile(call: Call, span: Span, i: Array, first: Any, start: Any, a: Array) -> Array:
    """The part of a [b or 1, n or 1, t or 1, s or 1] for a block, transposed."""
    b, n, _ = call.places(i)
    shape = (1, 1, min(call.block, a.shape[2]), min(span.keys, a.shape[3]))
    at = (0 if m == 1 else p for m, p in zip(a.shape, (b, n, first, start), strict=True))
    return lax.dynamic_slice(a, tuple(at), shape)[0, 0].T


def _seen(call: Call, span: Span, i: Array, first: Any, start: Any, tile: Any) -> Any:
    """Which keys each query of a block sees; None for all."""
    extras, b = call.extras, call.places(i)[0]
    row = first + jnp.arange(call.block)[None, :]
    column = start + jnp.arange(span.keys)[:, None]
    seen = [visible(call.rules, row, column)]
    for lengths, place in ((extras.query_lengths, row), (extras.key_lengths, column)):
        seen.append(None if lengths is None else place < lengths[b])
    if extras.query_segments is not None and extras.key_segments is not None:
        mine = extras.query_segments[:, None, :, None]
        seen.append(tile(mine) == tile(extras.key_segments[:, None, None, :]))
    seen.append(None if extras.mask is None else tile(extras.mask))
    return _all([condition for condition in seen if condition is not None])


def cut(a: Array, start: Any, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis)
