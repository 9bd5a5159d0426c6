"""Connectionist temporal classification: minus the log of the probability of all alignments.

    loss = -log sum over paths of prod_t p_t(c_(s_t))        p = softmax of the logits

A path has one state for each frame; state s of 0 ... 2n is a blank if s is even, and label
(s - 1) / 2 if odd. From s a path stays, or goes to s + 1, or past a blank to s + 2 if the labels
there differ. With weights w_s for that last step and v_s for the one before, in logarithms,
    a_t(s) = log p_t(c_s) + log(exp a_(t-1)(s) + exp(a_(t-1)(s-1) + v_s)
                                               + exp(a_(t-1)(s-2) + w_s))
    loss = -log(exp a_T(2n) + exp a_T(2n-1))

Backward. Let g_t(s) be the probability that frame t is in state s, given the labels. With L_t(s)
the logarithm in a_t(s), which is a_t(s) - log p_t(c_s), from its end
    g_(t-1)(s) = sum over the next states s' of g_t(s') exp(a_(t-1)(s) + weight of s' - L_t(s'))
    dlogits_tk = dloss (p_tk - sum over the states s of class k of g_t(s))

a is kept near 0 by a number m_t a frame, the largest a_(t-1), which is added to the loss at the
end; and g, which sums to 1 in each frame but for rounding, is divided by its sum. So the digits do
not wear off with the number of frames.

Saves: the arguments, a (2n + 1 numbers a frame) and two numbers a frame: m and the log of the sum
       of the logits' exponentials.
Edge:  exp(log_epsilon) stands for 0, as in optax: all states but the first begin with it, and so
       does the step between equal labels. So labels that do not fit into the frames give a loss of
       about -log_epsilon for each state by which the path jumps, and a finite gradient: that of the
       jumping path. A row of padding alone gives 0 without labels, else -log_epsilon - log 2, and
       gradient 0. A class of logit -inf has gradient 0 (optax gives nan); a label that is no class
       counts as one of probability 1, as in optax. The paddings get no gradient.
Dtype: computes in float32 or wider, returns the logits' dtype.
Ref:   Graves et al., 2006, section 4; optax.losses.ctc_loss.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from funcbp.case import Case, integers, normal, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import loop_zeros, settled, wide

# The logarithm of nothing; a sum of 10^8 of them is still a float32.
NOTHING = -1e30


def plain(
    logits: Float[Array, "b t k"],
    logit_paddings: Real[Array, "b t"] | Bool[Array, "b t"],
    labels: Int[Array, "b n"],
    label_paddings: Real[Array, "b n"] | Bool[Array, "b n"],
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
) -> Float[Array, " b"]:
    """-log of the probability that frames with these logits are read as these labels.

    Args:
      logits: unnormalised log probabilities of k classes, the blank among them, for each frame.
      logit_paddings: 0 for a frame, any other number for one that is left out.
      labels: classes, from 0 to k - 1.
      label_paddings: 0 for a label, any other number for padding, which follows the labels.
      blank_id: the class that is no label.
      log_epsilon: the logarithm that stands for that of 0.

    Returns:
      The loss of each sequence, [b], in nats, in the dtype of logits.

    Raises:
      InputError: the shapes do not fit, or there is no class blank_id.
    """
    states = _states(labels, label_paddings, blank_id, log_epsilon)
    logp = jnp.maximum(jax.nn.log_softmax(wide(logits)), NOTHING)
    frames = _at(logp, states.classes) + states.unused, _padded(logit_paddings)

    def step(a, frame):
        y, padded = frame
        one, two = _before(a)
        ahead = jnp.logaddexp(jnp.logaddexp(a, one + states.step), two + states.skip)
        return jnp.where(padded, a, y + ahead), None

    a, _ = lax.scan(step, _start(frames, log_epsilon), frames)
    return -jax.nn.logsumexp(a + states.end, axis=0).astype(logits.dtype)


def check(logits, logit_paddings, labels, label_paddings, *, blank_id, log_epsilon):
    """Raises if the shapes do not fit, or there is no class blank_id."""
    if logits.ndim != 3 or labels.ndim != 2 or len(labels) != len(logits):
        raise InputError(
            "logits and labels must have shapes [batch, frames, classes] and [batch, labels], got "
            f"{logits.shape} and {labels.shape}; add a batch axis to a single sequence"
        )
    for name, got, of, shape in (
        ("logit_paddings", logit_paddings, "logits", logits.shape[:2]),
        ("label_paddings", label_paddings, "labels", labels.shape),
    ):
        if got.shape != shape:
            raise InputError(
                f"{name} must have shape {shape}, a number for each of the {of}, got {got.shape}; "
                "zeros mean no padding"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"labels must be integers, got {labels.dtype}; convert them with astype")
    if not 0 <= blank_id < logits.shape[2]:
        raise InputError(
            f"blank_id must be one of the {logits.shape[2]} classes, from 0, got {blank_id}; "
            "the last one is logits.shape[-1] - 1"
        )


class _States(NamedTuple):
    """The states of a path, each [2n+1, b]; all but `classes` are logarithms of weights."""

    classes: Array
    skip: Array  # w_s
    step: Array  # v_s
    end: Array
    unused: Array  # of the states of padding


def _states(labels, label_paddings, blank_id, log_epsilon) -> _States:
    labels, n = labels.T, jnp.sum(label_paddings == 0, axis=1)
    s = jnp.arange(2 * len(labels) + 1)[:, None]

    def either(blank, label):
        """What the blanks have, and between them the labels."""
        label = jnp.pad(jnp.repeat(label, 2, axis=0), ((0, 1), (0, 0)))
        return jnp.where(s % 2 == 0, blank, label)

    same = jnp.pad(labels[1:] == labels[:-1], ((len(labels) > 0, 0), (0, 0)))
    return _States(
        classes=either(blank_id, labels),
        skip=either(NOTHING, log_epsilon * same),
        # In optax a path leaves a label for the blank in two ways, of which one weighs epsilon.
        step=jnp.where(s % 2 == 0, math.log1p(math.exp(log_epsilon)), 0.0),
        end=jnp.where((s == 2 * n) | (s == 2 * n - 1), 0.0, NOTHING),
        unused=jnp.where(s > 2 * n, NOTHING, 0.0),
    )


def _at(logp: Array, classes: Array) -> Array:
    """logp [b, t, k] at the class of each state, [t, 2n+1, b]; 0 for what is no class."""
    known = (classes >= 0) & (classes < logp.shape[2])
    index = jnp.where(known, classes, 0).T[:, None]
    found = jnp.take_along_axis(logp, index, axis=2, mode="clip")
    return jnp.where(known, jnp.transpose(found, (1, 2, 0)), 0)


def _padded(logit_paddings: Array) -> Array:
    return (logit_paddings != 0).T[:, None]


def _start(frames: tuple[Array, Array], log_epsilon: float) -> Array:
    """a_0, for a loop over these frames: each path begins before the first blank."""
    shape = frames[0].shape[1:]
    first = jnp.arange(shape[0])[:, None] == 0
    return loop_zeros(shape, frames) + jnp.where(first, 0.0, log_epsilon)


def _before(a: Array) -> tuple[Array, Array]:
    """a(s-1) and a(s-2)."""
    a = jnp.concatenate([jnp.full_like(a, NOTHING, shape=(2, a.shape[1])), a])
    return a[1:-1], a[:-2]


def _after(a: Array, fill: float) -> tuple[Array, Array]:
    """a(s+1) and a(s+2)."""
    a = jnp.concatenate([a, jnp.full_like(a, fill, shape=(2, a.shape[1]))])
    return a[1:-1], a[2:]


def _log_sum(a: Array, b: Array, c: Array) -> Array:
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    m = jnp.maximum(high, c)
    return m + jnp.log(1 + jnp.exp(low - m) + jnp.exp(jnp.minimum(high, c) - m))


def _emissions(logits, lse, states):
    """log p of the class of each state, [t, 2n+1, b]."""
    return jnp.maximum(_at(wide(logits) - lse, states.classes), NOTHING) + states.unused


def fwd(logits, logit_paddings, labels, label_paddings, *, blank_id, log_epsilon):
    states = _states(labels, label_paddings, blank_id, log_epsilon)
    lse = jax.nn.logsumexp(wide(logits), axis=-1, keepdims=True)
    frames = _emissions(logits, lse, states), _padded(logit_paddings)

    def step(a, frame):
        y, padded = frame
        one, two = _before(a)
        m = settled(jnp.where(padded, 0, jnp.max(a, axis=0, keepdims=True)))
        ahead = _log_sum(a, one + states.step, two + states.skip) + (y - m)
        return jnp.where(padded, a, jnp.maximum(ahead, NOTHING)), (a, m)

    last, (a, m) = lax.scan(step, _start(frames, log_epsilon), frames)
    total = jax.nn.logsumexp(last + states.end, axis=0)
    given = logits, logit_paddings, labels, label_paddings
    return -(total + jnp.sum(m, axis=(0, 1))).astype(logits.dtype), (*given, lse, a, m, last)


def bwd(saved, dloss, *, blank_id, log_epsilon):
    logits, logit_paddings, labels, label_paddings, lse, a, m, last = saved
    states = _states(labels, label_paddings, blank_id, log_epsilon)
    y, padded = _emissions(logits, lse, states), _padded(logit_paddings)
    to_one, to_two = _after(states.step, 0)[0], _after(states.skip, 0)[1]

    def step(state, frame):
        g, a = state
        y, padded, before, m = frame
        sums = settled(a - (y - m))
        (one, two), (g_one, g_two) = _after(sums, -NOTHING), _after(g, 0)
        g_before = g * jnp.exp(before - sums)
        g_before += g_one * jnp.exp(before + to_one - one)
        g_before += g_two * jnp.exp(before + to_two - two)
        return (jnp.where(padded, g, g_before), before), (g[1::2], jnp.sum(g[::2], axis=0))

    end = jax.nn.softmax(last + states.end, axis=0), last
    _, (of_labels, of_blanks) = lax.scan(step, end, (y, padded, a, m), reverse=True)
    total = jnp.sum(of_labels, axis=1) + of_blanks  # 1 but for rounding
    scale = jnp.where(padded[:, 0], 0, 1 / total)
    k = jnp.arange(logits.shape[2])
    hit = (labels[..., None] == k).astype(scale.dtype)
    g = jnp.einsum("tnb,bnk->btk", of_labels * scale[:, None], hit)
    g += jnp.where(k == blank_id, (of_blanks * scale).T[..., None], 0)
    # The sum is 1 again, but 0 in padding, and less where a label is no class.
    dlogits = jnp.exp(wide(logits) - lse) * jnp.sum(g, axis=-1, keepdims=True) - g
    return wide(dloss)[:, None, None] * dlogits, None, None, None


ctc_loss = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.ctc_loss,
    cases=(
        Case(
            "repeated labels, paddings",
            (3, 5, 4),
            values([[0] * 5, [0] * 4 + [1], [0, 1, 0, 0, 1]]),
            values([[1, 1, 2], [3, 2, 1], [2, 0, 0]]),
            values([[0, 0, 0], [0, 0, 1], [0, 1, 1]]),
        ),
        Case(
            "no label, no frame, no alignment",
            (3, 3, 5),
            values([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]),
            values([[-1, 7], [1, 2], [4, 4]]),
            values([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
            blank_id=3,
            transformed=False,
        ),
        Case(
            "no labels",
            (2, 3, 4),
            integers(2, 3, high=2),
            integers(2, 0, high=4),
            (2, 0),
            transformed=False,
        ),
        Case(
            "speech",
            normal(16, 200, 64, std=2.0),
            values([[t >= 200 - 3 * b for t in range(200)] for b in range(16)]),
            integers(16, 50, low=1, high=64),
            values([[n >= 50 - b for n in range(50)] for b in range(16)]),
            bench=True,
        ),
    ),
)
