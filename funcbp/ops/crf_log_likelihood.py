"""The log likelihood of tags under a linear-chain conditional random field.

    y_b = score of the tags - log_partition
    score = start_(y_0) + sum_t e_t(y_t) + sum_(t>0) A(y_(t-1), y_t) + end_(y_last)
    log_partition = log sum over all sequences of tags of exp score

Backward. With g_t(i) the marginals and g_t(i, j) those of neighbours, which `_chain` derives
    de_t(i) = dy ([y_t = i] - g_t(i))        dstart = de_0        dend = de_last
    dA_ij = sum over t and the batch of dy ([y_(t-1) = i][y_t = j] - g_t(i, j))
1 - g of the tag that is given is taken as the sum of the others, so that it keeps its digits where
the model is sure.

Saves: the arguments, the sums a along the sequences, as large as e, and the largest of each place.
Edge:  tags after the length of a sequence count for nothing and have gradient 0; a sequence of
       length 0 has log likelihood 0. -inf stands for -1e30 and has gradient 0.
Dtype: computes in float32 or wider, returns the emissions' dtype.
Ref:   Lafferty et al., 2001; Sutton and McCallum, 2012, section 4.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, integers, normal, values
from funcbp.core import InputError, op
from funcbp.ops._chain import Chain, along, back, chain, cotangents, ends, log_partition
from funcbp.ops._chain import check as check_chain


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
    return (_score(c, tags) - log_partition(c)).astype(emissions.dtype)


def _score(c: Chain, tags: Array) -> Array:
    """The score of the tags, [b]."""
    hit = (tags.T[..., None] == jnp.arange(c.e.shape[2])) & c.inside
    terms = jnp.where(hit, c.e, 0) + jnp.where(hit & ends(c), c.end, 0)
    first = jnp.where(hit[0], c.start, 0)
    pairs = jnp.where(c.inside[1:, :, 0], c.transitions[tags.T[:-1], tags.T[1:]], 0)
    return jnp.sum(terms, axis=(0, 2)) + jnp.sum(first, axis=1) + jnp.sum(pairs, axis=0)


def check(emissions, transitions, tags, lengths, start, end):
    check_chain(emissions, transitions, lengths, start, end)
    if tags.shape != emissions.shape[:2] or not jnp.issubdtype(tags.dtype, jnp.integer):
        raise InputError(
            f"tags must be integers of shape {emissions.shape[:2]}, one for each place of "
            f"emissions {emissions.shape}, got {tags.dtype} {tags.shape}"
        )


def fwd(emissions, transitions, tags, lengths, start, end):
    c = chain(emissions, transitions, lengths, start, end)
    total, sums = along(c)
    y = (_score(c, tags) - total).astype(emissions.dtype)
    return y, (emissions, transitions, tags, lengths, start, end, sums)


def bwd(saved, dy):
    emissions, transitions, tags, lengths, start, end, sums = saved
    c = chain(emissions, transitions, lengths, start, end)
    dy = dy.astype(c.e.dtype)
    g, pairs = back(c, sums, dy)
    hit = tags.T[..., None] == jnp.arange(g.shape[2])
    others = jnp.sum(jnp.where(hit, 0, g), axis=2, keepdims=True)
    de = dy[:, None] * jnp.where(hit, others, -g)
    given = jnp.where(c.inside[1:, :, 0], dy, 0)
    dtransitions = (-pairs).at[tags.T[:-1], tags.T[1:]].add(given)
    de, dtransitions, dstart, dend = cotangents(c, de, dtransitions)
    return de, dtransitions, None, None, dstart, dend


# The transformations turn signs: -inf would be inf.
NEVER = [[0.5, -1e4, 1.0], [-1e4, 0.2, -float("inf")], [0.3, -1.0, 0.1]]
crf_log_likelihood = op(
    plain,
    fwd,
    bwd,
    check=check,
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
