"""The best sequence of tags under a linear-chain conditional random field.

    score(y) = start_(y_0) + sum_t e_t(y_t) + sum_(t>0) A(y_(t-1), y_t) + end_(y_last)
    a_t(j) = e_t(j) + max_i (a_(t-1)(i) + A_ij)
    y_(t-1) = argmax_i (a_(t-1)(i) + A_ij)        j = y_t, from the last tag backwards

A plain function, not an op: nothing is differentiated.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from funcbp.ops._chain import chain, check


def viterbi(
    emissions: Float[Array, "b t k"],
    transitions: Float[Array, "k k"],
    lengths: Int[Array, " b"] | None = None,
    start: Float[Array, " k"] | None = None,
    end: Float[Array, " k"] | None = None,
) -> tuple[Int[Array, "b t"], Float[Array, " b"]]:
    """The tags of the highest score, and that score. No gradient flows through either.

    The score's gradient is 0 here, by `stop_gradient` on all arguments. A loss on the best score
    takes the tags and scores them anew.

    Args:
      emissions: the score of each tag at each place, [b, t, k].
      transitions: the score of tag j after tag i, [k, k].
      lengths: how many tags each sequence has, [b]; None for t.
      start: the score of each tag in the first place, [k]; None for 0.
      end: the score of each tag in the last place, [k]; None for 0.

    Returns:
      `(tags, score)`: [b, t], int32, 0 after the length; and [b], in the dtype of emissions. Of
      equal scores the tags that are lowest at the end win.

    Raises:
      InputError: the shapes do not fit.
    """
    check(emissions, transitions, lengths, start, end)
    c = lax.stop_gradient(chain(emissions, transitions, lengths, start, end))

    def along(a, frame):
        e, inside = frame
        ahead = e + jnp.max(a[:, :, None] + c.transitions, axis=1)
        return jnp.where(inside, ahead, a), a

    def back(tag, frame):
        a, inside = frame
        before = jnp.argmax(a + c.transitions.T[tag], axis=1).astype(jnp.int32)
        return jnp.where(inside[:, 0], before, tag), tag

    last, before = lax.scan(along, c.e[0] + c.start, (c.e[1:], c.inside[1:]))
    last = last + c.end
    tag = jnp.argmax(last, axis=1).astype(jnp.int32)
    first, rest = lax.scan(back, tag, (before, c.inside[1:]), reverse=True)
    tags = jnp.where(c.inside[..., 0], jnp.concatenate([first[None], rest]), 0)
    score = jnp.where(c.inside[0, :, 0], jnp.max(last, axis=1), 0)
    return tags.T, score.astype(emissions.dtype)
