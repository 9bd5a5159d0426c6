"""The probability of each tag at each place under a linear-chain conditional random field.

    g_t(i) = d log_partition / d e_t(i)
    log_partition = log sum over all sequences y of tags of exp score(y)
    score(y) = start_(y_0) + sum_t e_t(y_t) + sum_(t>0) A(y_(t-1), y_t) + end_(y_last)

`_chain` derives them, and the marginals of neighbours, which are d log_partition / dA.

Backward. g is a gradient, so its VJP is the Hessian of the log partition times dg; that is
symmetric, so this is the JVP, in the direction dg of e, of the gradients:
    (de, dA, dstart, dend) = d/dh of the gradients of log_partition at e + h dg, at h = 0
which costs two passes along the sequences again and keeps no step of them.

Saves: the arguments.
Edge:  after the length of a sequence g and its gradient are 0. -inf stands for -1e30 and has
       gradient 0.
Dtype: computes in float32 or wider, returns the emissions' dtype.
Ref:   Lafferty et al., 2001; Pearlmutter, 1994 (products with a Hessian).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, normal, values
from funcbp.core import op
from funcbp.ops._chain import NOTHING, along, back, chain, check, cotangents, log_partition


def plain(
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
        return jnp.sum(log_partition(chain(emissions, transitions, lengths, start, end)))

    return jax.grad(total)(emissions)


def _gradients(c, e):
    """The gradients of the sum of the log partitions, at these e."""
    c = c._replace(e=e)
    g, pairs = back(c, along(c)[1], jnp.ones_like(e[0, :, 0]))
    return g, cotangents(c, g, pairs)


def fwd(emissions, transitions, lengths, start, end):
    c = chain(emissions, transitions, lengths, start, end)
    g = jnp.moveaxis(_gradients(c, c.e)[0], 0, 1).astype(emissions.dtype)
    return g, (emissions, transitions, lengths, start, end)


def bwd(saved, dg):
    c = chain(*saved)
    dg = jnp.where(c.e > NOTHING, jnp.moveaxis(dg.astype(c.e.dtype), 1, 0), 0)
    _, d = jax.jvp(functools.partial(_gradients, c), (c.e,), (dg,))
    de, dtransitions, dstart, dend = d[1]
    return de, dtransitions, None, dstart, dend


# The transformations turn signs: -inf would be inf.
NEVER = [[0.5, -1e4, 1.0], [-1e4, 0.2, -float("inf")], [0.3, -1.0, 0.1]]
crf_marginals = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("lengths", (3, 5, 3), (3, 3), values([5, 0, 3]), (3,), (3,)),
        Case("one place", (2, 1, 3), (3, 3), transformed=False),
        Case("forbidden steps", normal(2, 4, 3, std=60.0), values(NEVER), transformed=False),
        Case("sentences", (32, 128, 32), (32, 32), bench=True),
    ),
)
