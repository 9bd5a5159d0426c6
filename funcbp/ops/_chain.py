"""The sums of a linear-chain conditional random field, along the sequences and back.

    score(y) = start_(y_0) + sum_t e_t(y_t) + sum_(t>0) A(y_(t-1), y_t) + end_(y_last)
    log_partition = log sum over all y of exp score(y)

With p_t(i) = exp(a_t(i) - max a_t) and W = exp A
    a_t(j) = e_t(j) + log q_t(j)        q_t(j) = sum_i p_(t-1)(i) W_ij
where each max, which is subtracted, is added to the log of the partition in the end: so a stays
near 0 and the digits do not wear off with the length.

Backward. d log_partition / d a_t = g_t, the probability of each tag at t, and from the sum
    r_t(j) = g_t(j) / q_t(j)        g_(t-1)(i) = p_(t-1)(i) sum_j W_ij r_t(j)
    d log_partition / dA_ij = sum_t W_ij p_(t-1)(i) r_t(j)

The steps of the loops are products with one matrix, and the last line is one product for all steps.
Where a q comes near the least float (a tag that only an improbable one leads to), logarithms are
summed instead, tag by tag.

Ref:   Lafferty et al., 2001; Sutton and McCallum, 2012, section 4.1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from funcbp.core import InputError
from funcbp.ops._numeric import loop_zeros, settled

# The logarithm of nothing; a sum of 10^8 of them is still a float32.
NOTHING = -1e30


class Chain(NamedTuple):
    """A batch of chains, in float32 or wider and time first."""

    e: Array  # [t, b, k]
    transitions: Array  # [k, k]
    start: Array | float  # [k], or 0
    end: Array | float  # [k], or 0
    inside: Array  # [t, b, 1]: which tags there are


def chain(emissions, transitions, lengths, start, end) -> Chain:
    """The arguments in one dtype, with -inf and None replaced by numbers."""
    given = [x for x in (emissions, transitions, start, end) if x is not None]
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)

    def finite(x):
        return jnp.maximum(x.astype(dtype), NOTHING)

    # Zeros, that e may vary over the devices of a mesh as all arrays together do.
    e = jnp.moveaxis(emissions, 1, 0) + loop_zeros((), (*given, lengths)).astype(dtype)
    inside = jnp.ones((len(e), 1, 1), bool)
    if lengths is not None:
        inside = (jnp.arange(len(e))[:, None] < lengths)[..., None]
    start, end = (0.0 if x is None else finite(x) for x in (start, end))
    return Chain(finite(e), finite(transitions), start, end, inside)


def log_partition(c: Chain) -> Array:
    """[b], the formula."""

    def step(a, frame):
        e, inside = frame
        ahead = e + jax.nn.logsumexp(a[:, :, None] + c.transitions, axis=1)
        return jnp.where(inside, ahead, a), None

    a, _ = lax.scan(step, c.e[0] + c.start, (c.e[1:], c.inside[1:]))
    return jnp.where(c.inside[0, :, 0], jax.nn.logsumexp(a + c.end, axis=1), 0)


def check(emissions, transitions, lengths, start, end):
    """Raises if the shapes do not fit."""
    if emissions.ndim != 3 or not emissions.shape[1]:
        raise InputError(
            f"emissions must have shape [batch, time, tags], time at least 1, got {emissions.shape}"
        )
    b, _, k = emissions.shape
    for name, value, shape in (
        ("transitions", transitions, (k, k)),
        ("lengths", lengths, (b,)),
        ("start", start, (k,)),
        ("end", end, (k,)),
    ):
        if value is not None and value.shape != shape:
            raise InputError(
                f"{name} must have shape {shape} for emissions {emissions.shape}, got {value.shape}"
            )


def _matrix(transitions: Array) -> tuple[Array, Array]:
    """`(w, column)`: exp of the transitions less the largest of the column, and these."""
    column = jnp.max(transitions, axis=0)
    return jnp.exp(transitions - column), column


def _enough(q: Array) -> Array:
    """Whether no sum is so small that its terms may be below the least float."""
    return jnp.all(q > float(jnp.finfo(q.dtype).tiny) ** 0.75)


class Sums(NamedTuple):
    """The pass along the sequences."""

    before: Array  # a of the place before, [t-1, b, k]
    m: Array  # its largest entry, [t-1, b, 1]
    last: Array  # a of the last place, [b, k]


def along(c: Chain) -> tuple[Array, Sums]:
    """`(log_partition, sums)`."""
    w, column = _matrix(c.transitions)

    def step(a, frame):
        e, inside = frame
        m = lax.stop_gradient(settled(jnp.max(a, axis=1, keepdims=True)))
        z = a - m
        q = jnp.exp(z) @ w
        reached = lax.cond(
            _enough(q),
            lambda: column + jnp.log(q),
            lambda: jax.nn.logsumexp(z[:, :, None] + c.transitions, axis=1),
        )
        return jnp.where(inside, e + reached, a), (a, m)

    last, (before, m) = lax.scan(step, c.e[0] + c.start, (c.e[1:], c.inside[1:]))
    total = jax.nn.logsumexp(last + c.end, axis=1)
    total += jnp.sum(jnp.where(c.inside[1:], m, 0), axis=(0, 2))
    return jnp.where(c.inside[0, :, 0], total, 0), Sums(before, m, last)


def back(c: Chain, sums: Sums, weight: Array) -> tuple[Array, Array]:
    """`(g, pairs)`: the marginals [t, b, k], and the weighted sum of those of neighbours [k, k]."""
    w, _ = _matrix(c.transitions)
    z = sums.before - sums.m
    p = jnp.exp(z)
    q = p @ w
    g_last = jax.nn.softmax(sums.last + c.end, axis=1)

    def quick():
        # By q in two steps, since a JVP would divide by its square, which underflows.
        size = lax.stop_gradient(q)

        def step(g, frame):
            p, size, ratio, inside = frame
            r = jnp.where(inside, g / size / ratio, 0)
            return jnp.where(inside, p * (r @ w.T), g), (g, r)

        g_first, (g, r) = lax.scan(step, g_last, (p, size, q / size, c.inside[1:]), reverse=True)
        r = r * weight[:, None]
        return g_first, g, w * jnp.einsum("tbi,tbj->ij", p, r)

    def careful():
        def step(carry, frame):
            g, pairs = carry
            z, inside = frame
            share = jax.nn.softmax(z[:, :, None] + c.transitions, axis=1) * g[:, None]
            pairs += jnp.einsum("b,bij->ij", weight, jnp.where(inside[..., None], share, 0))
            return (jnp.where(inside, jnp.sum(share, axis=2), g), pairs), g

        init = g_last, loop_zeros(w.shape, (z, weight))
        (g_first, pairs), g = lax.scan(step, init, (z, c.inside[1:]), reverse=True)
        return g_first, g, pairs

    g_first, g, pairs = lax.cond(_enough(q), quick, careful)
    return jnp.where(c.inside, jnp.concatenate([g_first[None], g]), 0), pairs


def cotangents(c: Chain, de: Array, dtransitions: Array) -> tuple[Any, Any, Any, Any]:
    """Of emissions, transitions, start and end, from those of e [t, b, k] and the transitions."""
    first, last = jnp.sum(de[0], axis=0), jnp.sum(jnp.where(ends(c), de, 0), axis=(0, 1))

    def finite(x, dx):
        return None if isinstance(x, float) else jnp.where(x > NOTHING, dx, 0)

    de = jnp.moveaxis(jnp.where(c.e > NOTHING, de, 0), 0, 1)
    dtransitions = jnp.where(c.transitions > NOTHING, dtransitions, 0)
    return de, dtransitions, finite(c.start, first), finite(c.end, last)


def ends(c: Chain) -> Array:
    """Which tags are the last, [t, b, 1]."""
    return c.inside & ~jnp.pad(c.inside[1:], ((0, 1), (0, 0), (0, 0)))
