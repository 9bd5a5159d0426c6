"""Linear-chain conditional random fields: sequences of tags, scored by tag and by neighbours.

    score(y) = start_(y_0) + sum_t e_t(y_t) + sum_(t>0) A(y_(t-1), y_t) + end_(y_last)
    log_partition = log sum over all y of exp score(y)

    crf_log_likelihood     score(tags) - log_partition
    crf_marginals          g_t(j), the probability that tag t is j

The sum over all y runs along the sequence. With p_t(i) = exp(a_t(i) - max a_t) and W = exp A
    a_t(j) = e_t(j) + log q_t(j)        q_t(j) = sum_i p_(t-1)(i) W_ij
where each max, which is subtracted, is added to the log of the partition in the end: so a stays
near 0 and the digits do not wear off with the length.

Backward. d log_partition / d a_t = g_t, and from the sum
    r_t(j) = g_t(j) / q_t(j)        g_(t-1)(i) = p_(t-1)(i) sum_j W_ij r_t(j)
    de_t = [y_t = .] - g_t        dA_ij = sum_t [y_(t-1) = i][y_t = j] - W_ij p_(t-1)(i) r_t(j)
with dstart = de_0 and dend = de_last. The steps of the loop are products with one matrix, and dA is
one product for all steps. Where a q comes near the least float (a tag that only an improbable one
leads to), logarithms are summed instead, tag by tag.

The marginals are the gradient of the log partition by e, so their VJP is its Hessian times dg, and
the Hessian is symmetric: it is the JVP, in the direction dg of e, of all these gradients.

Saves: the arguments; crf_log_likelihood also a and its maxima, as large as e.
Edge:  tags after the length of a sequence count for nothing, and have marginals and gradient 0. A
       sequence of length 0 has log likelihood 0. -inf stands for -1e30 and has gradient 0.
Dtype: computes in float32 or wider, returns the emissions' dtype.
Ref:   Lafferty et al., 2001; Sutton and McCallum, 2012, section 4.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, normal, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import loop_zeros, settled

# The logarithm of nothing; a sum of 10^8 of them is still a float32.
NOTHING = -1e30


class Chain(NamedTuple):
    """A batch of chains, in float32 or wider and time first."""

    e: Array  # [t, b, k]
    transitions: Array  # [k, k]
    start: Array | float  # [k]
    end: Array | float  # [k]
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


def _log_partition(c: Chain) -> Array:
    """[b], the formula."""

    def step(a, frame):
        e, inside = frame
        ahead = e + jax.nn.logsumexp(a[:, :, None] + c.transitions, axis=1)
        return jnp.where(inside, ahead, a), None

    a, _ = lax.scan(step, c.e[0] + c.start, (c.e[1:], c.inside[1:]))
    return jnp.where(c.inside[0, :, 0], jax.nn.logsumexp(a + c.end, axis=1), 0)


def _score(c: Chain, tags: Array) -> Array:
    """The score of the tags, [b]."""
    hit = (tags.T[..., None] == jnp.arange(c.e.shape[2])) & c.inside
    last = hit & ~jnp.pad(c.inside[1:], ((0, 1), (0, 0), (0, 0)))
    terms = jnp.where(hit, c.e, 0) + jnp.where(last, c.end, 0)
    first = jnp.where(hit[0], c.start, 0)
    pairs = jnp.where(c.inside[1:, :, 0], c.transitions[tags.T[:-1], tags.T[1:]], 0)
    return jnp.sum(terms, axis=(0, 2)) + jnp.sum(first, axis=1) + jnp.sum(pairs, axis=0)


def plain(
    emissions: Float[Array, "b t k"],
    transitions: Float[Array, "k k"],
    tags: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None = None,
    start: Float[Array, " k"] | None = None,
    end: Float[Array, " k"] | None = None,
) -> Float[Array, " b"]:
    """The log likelihood of sequences of tags under a linear-chain conditional random field.

    Args:
      emissions: the score of each tag at each place, [b, t, k].
      transitions: the score of tag j after tag i, [k, k].
      tags: from 0 to k - 1, [b, t].
      lengths: how many tags each sequence has, [b]; None for t.
      start: the score of each tag in the first place, [k]; None for 0.
      end: the score of each tag in the last place, [k]; None for 0.

    Returns:
      [b], in nats, at most 0, in the dtype of emissions.

    Raises:
      InputError: the shapes do not fit.
    """
    c = chain(emissions, transitions, lengths, start, end)
    return (_score(c, tags) - _log_partition(c)).astype(emissions.dtype)


def plain_marginals(
    emissions: Float[Array, "b t k"],
    transitions: Float[Array, "k k"],
    lengths: Int[Array, " b"] | None = None,
    start: Float[Array, " k"] | None = None,
    end: Float[Array, " k"] | None = None,
) -> Float[Array, "b t k"]:
    """The probability of each tag at each place, under a linear-chain conditional random field.

    Args:
      emissions: the score of each tag at each place, [b, t, k].
      transitions: the score of tag j after tag i, [k, k].
      lengths: how many tags each sequence has, [b]; None for t.
      start: the score of each tag in the first place, [k]; None for 0.
      end: the score of each tag in the last place, [k]; None for 0.

    Returns:
      [b, t, k], in the dtype of emissions; 0 after the length.

    Raises:
      InputError: the shapes do not fit.
    """

    def total(emissions):
        return jnp.sum(_log_partition(chain(emissions, transitions, lengths, start, end)))

    return jax.grad(total)(emissions)


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


def _check_tags(emissions, transitions, tags, lengths, start, end):
    check(emissions, transitions, lengths, start, end)
    if tags.shape != emissions.shape[:2] or not jnp.issubdtype(tags.dtype, jnp.integer):
        raise InputError(
            f"tags must be integers of shape {emissions.shape[:2]}, one for each place of "
            f"emissions {emissions.shape}, got {tags.dtype} {tags.shape}"
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


def _along(c: Chain) -> tuple[Array, Sums]:
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


def _back(c: Chain, sums: Sums, weight: Array) -> tuple[Array, Array]:
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


def fwd(emissions, transitions, tags, lengths, start, end):
    c = chain(emissions, transitions, lengths, start, end)
    total, sums = _along(c)
    y = (_score(c, tags) - total).astype(emissions.dtype)
    return y, (emissions, transitions, tags, lengths, start, end, sums)


def bwd(saved, dy):
    emissions, transitions, tags, lengths, start, end, sums = saved
    c = chain(emissions, transitions, lengths, start, end)
    dy = dy.astype(c.e.dtype)
    g, pairs = _back(c, sums, dy)
    hit = tags.T[..., None] == jnp.arange(g.shape[2])
    # 1 - g of a tag as the sum of the others keeps its digits.
    others = jnp.sum(jnp.where(hit, 0, g), axis=2, keepdims=True)
    de = jnp.where(hit, others, -g) * dy[:, None]
    known = jnp.where(c.inside[1:, :, 0], dy, 0)
    dtransitions = (-pairs).at[tags.T[:-1], tags.T[1:]].add(known)
    de, *rest = _cotangents(c, de, start, end)
    return (
        _finite(emissions, jnp.moveaxis(de, 0, 1)),
        _finite(transitions, dtransitions),
        None,
        None,
        *rest,
    )


def _cotangents(c: Chain, de: Array, start, end):
    first = jnp.sum(de[0], axis=0)
    last = c.inside & ~jnp.pad(c.inside[1:], ((0, 1), (0, 0), (0, 0)))
    final = jnp.sum(jnp.where(last, de, 0), axis=(0, 1))
    return (
        de,
        None if start is None else _finite(start, first),
        None if end is None else _finite(end, final),
    )


def _finite(x, dx):
    return jnp.where(x > NOTHING, dx, 0)


def fwd_marginals(emissions, transitions, lengths, start, end):
    c = chain(emissions, transitions, lengths, start, end)
    g, _ = _back(c, _along(c)[1], jnp.ones(emissions.shape[0], c.e.dtype))
    return jnp.moveaxis(g, 0, 1).astype(emissions.dtype), (
        emissions,
        transitions,
        lengths,
        start,
        end,
    )


def bwd_marginals(saved, dg):
    emissions, transitions, lengths, start, end = saved
    c = chain(emissions, transitions, lengths, start, end)

    def gradients(e):
        g, pairs = _back(c._replace(e=e), _along(c._replace(e=e))[1], jnp.ones_like(e[0, :, 0]))
        return pairs, *_cotangents(c, g, start, end)

    dg = jnp.where(c.e > NOTHING, jnp.moveaxis(dg.astype(c.e.dtype), 1, 0), 0)
    dtransitions, de, dstart, dend = jax.jvp(gradients, (c.e,), (dg,))[1]
    return (
        _finite(emissions, jnp.moveaxis(de, 0, 1)),
        _finite(transitions, dtransitions),
        None,
        dstart,
        dend,
    )


# The transformations turn signs: -inf would be inf.
NEVER = [[0.5, -1e4, 1.0], [-1e4, 0.2, -float("inf")], [0.3, -1.0, 0.1]]
crf_log_likelihood = op(
    plain,
    fwd,
    bwd,
    check=_check_tags,
    name="crf_log_likelihood",
    cases=(
        Case("lengths", (3, 5, 3), (3, 3), integers(3, 5, high=3), values([5, 0, 3]), (3,), (3,)),
        Case("one place", (2, 1, 3), (3, 3), integers(2, 1, high=3), transformed=False),
        Case(
            "forbidden steps",
            normal(2, 4, 3, std=60.0),
            values(NEVER),
            values([[0, 2, 2, 1], [1, 1, 0, 0]]),
            transformed=False,
        ),
        Case("sentences", (32, 128, 32), (32, 32), integers(32, 128, high=32), bench=True),
    ),
)
crf_marginals = op(
    plain_marginals,
    fwd_marginals,
    bwd_marginals,
    check=check,
    name="crf_marginals",
    cases=(
        Case("lengths", (3, 5, 3), (3, 3), values([5, 0, 3]), (3,), (3,)),
        Case("one place", (2, 1, 3), (3, 3), transformed=False),
        Case("forbidden steps", normal(2, 4, 3, std=60.0), values(NEVER), transformed=False),
        Case("sentences", (32, 128, 32), (32, 32), bench=True),
    ),
)
