"""CTC against optax and torch; conditional random fields against all sequences of tags, counted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp import InputError, ops

drawn = settings(max_examples=8, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(autouse=True)
def double():
    """Counterparts in float64 are the truth, up to their own rounding."""
    with jax.enable_x64(True):
        yield


def close(got, expected, terms):
    """Equal but for the rounding of so many float64 terms."""
    expected = np.asarray(expected)
    scale = np.max(np.abs(expected), initial=1.0)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=4 * terms * EPS * scale)


def pulled(f, x, *args):
    """Value and cotangent of x, for a cotangent of many values."""
    y, pullback = jax.vjp(lambda x: f(x, *args), x)
    return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]


compiled = jax.jit(pulled, static_argnums=0)


def padding(lengths, n):
    return (np.arange(n) >= np.asarray(lengths)[:, None]).astype(float)


@functools.cache
def both_ctc(blank_id, log_epsilon):
    """The op and its counterpart with settings: the same functions for each draw, compiled once."""
    settings = {"blank_id": blank_id, "log_epsilon": log_epsilon}
    return tuple(functools.partial(f, **settings) for f in (ops.ctc_loss, optax.ctc_loss))


# At -1e5 the digits of an infeasible loss would hide those of what it is made of.
@drawn
@given(seeds, st.sampled_from([(1, 0, 2, 0, -1e5), (4, 3, 3, 2, -30.0), (7, 4, 4, 0, -1e5)]))
def test_ctc_is_optax(seed, shape):
    """Repeated labels, labels that do not fit, rows of padding: all that is drawn."""
    t, n, k, *settings = shape
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((3, t, k)), rng.integers(0, k, (3, n))
    frames, targets = rng.integers(0, t + 1, 3), rng.integers(0, n + 1, 3)
    given = padding(frames, t), labels, padding(targets, n)
    (y, d), (expected, dexpected) = (compiled(f, logits, *given) for f in both_ctc(*settings))
    close(y, expected, t)
    close(d, dexpected, t * max(1.0, float(np.max(np.abs(expected)))))


@drawn
@given(seeds, st.sampled_from([(4, 1, 3), (8, 4, 4)]))
def test_ctc_is_torch(seed, shape):
    torch = pytest.importorskip("torch")
    t, n, k = shape
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((3, t, k)), rng.integers(1, k, (3, n))
    target = rng.integers(0, n + 1, 3)
    # A blank between equal labels takes a frame too.
    repeats = np.array(
        [
            np.sum(row[1:m] == row[: m - 1]) if m else 0
            for row, m in zip(labels, target, strict=True)
        ]
    )
    frames = np.minimum(np.maximum(target + repeats, rng.integers(1, t + 1, 3)), t)
    fits = target + repeats <= frames
    y, d = compiled(ops.ctc_loss, logits, padding(frames, t), labels, padding(target, n))
    x = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        torch.log_softmax(x, -1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(frames),
        torch.tensor(target),
        reduction="none",
    )
    loss[torch.tensor(fits)].backward(torch.cos(torch.arange(3, dtype=x.dtype))[fits])
    close(y[fits], loss.detach().numpy()[fits], 10 * t)
    close(d[fits], x.grad.numpy()[fits], 10 * t)


def test_ctc_edges():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 3, 4)), jnp.float32)
    never = logits.at[3, :, 3].set(-jnp.inf)
    labels = np.array([[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 1, 0]])
    frames, targets = padding([3, 0, 0, 3], 3), padding([3, 0, 3, 1], 3)
    y, d = compiled(ops.ctc_loss, never, frames, labels, targets)
    # Three equal labels want five frames: two of the steps weigh epsilon.
    assert 1e5 < y[0] < 3e5
    assert np.all(np.isfinite(d[0])) and np.any(d[0])
    # No frame, without and with labels.
    assert y[1] == 0 and y[2] == np.float32(1e5 - np.log(2))
    assert not np.any(d[1:3])
    # A class that never comes is as if there were none.
    y_without, d_without = compiled(ops.ctc_loss, logits[..., :3], frames, labels, targets)
    close(y[3], y_without[3], 4 * 2**29)
    close(d[3, :, :3], d_without[3], 4 * 2**29)
    assert not np.any(d[3, :, 3])
    # The paddings are floats but no variables.
    loss = jax.jit(jax.grad(lambda x, pads: jnp.sum(ops.ctc_loss(x, pads, labels, targets)), 1))
    assert not np.any(loss(logits, frames))


def test_ctc_of_ten_thousand_frames_keeps_its_digits():
    """In float32, where optax's loss has lost the digits after the point."""
    t, n, k = 10_000, 4, 3
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((1, t, k)).astype(np.float32), rng.integers(1, k, (1, n))
    pads = np.zeros((1, t)), labels, np.zeros((1, n))
    truth, dtruth = compiled(optax.ctc_loss, logits.astype(float), *pads)
    y, d = compiled(ops.ctc_loss, logits, *pads)
    narrow = [np.asarray(v, np.float32) if v.dtype == float else v for v in pads]
    with jax.enable_x64(False):
        theirs, dtheirs = compiled(optax.ctc_loss, logits, *narrow)
    assert abs(y - truth)[0] <= 2 * np.spacing(np.float32(truth[0]))
    assert np.max(np.abs(d - dtruth)) <= 0.1 * np.max(np.abs(dtheirs - dtruth))


def field(rng, b, t, k, whole):
    """Arrays of a field of random size; `whole`: with lengths, start and end."""
    e, a = rng.standard_normal((b, t, k)), 2 * rng.standard_normal((k, k))
    if not whole:
        return e, a, None, None, None
    lengths = rng.integers(0, t + 1, b)
    return e, a, lengths, rng.standard_normal(k), rng.standard_normal(k)


def counted(e, a, lengths, start, end):
    """For each sequence: all sequences of tags, and the score of each, in numpy."""
    b, t, k = e.shape
    start, end = (np.zeros(k) if v is None else v for v in (start, end))
    for i, n in enumerate([t] * b if lengths is None else lengths):
        tags = np.array(list(itertools.product(range(k), repeat=int(n))), int).reshape(k**n, n)
        scores = np.sum(e[i, np.arange(n), tags], axis=1)
        if n:
            scores = scores + start[tags[:, 0]] + end[tags[:, -1]]
            scores = scores + np.sum(a[tags[:, :-1], tags[:, 1:]], axis=1)
        yield tags, scores


@jax.jit
def every_crf(tags, e, a, *rest):
    y, d = pulled(lambda e: jnp.sum(ops.crf_log_likelihood(e, a, tags, *rest)), e)
    y = ops.crf_log_likelihood(e, a, tags, *rest)
    return y, d, ops.crf_marginals(e, a, *rest), *ops.viterbi(e, a, *rest)


@drawn
@given(seeds, st.sampled_from([(1, 1, False), (4, 3, True), (3, 4, False)]))
def test_crf_is_what_counting_gives(seed, shape):
    t, k, whole = shape
    rng = np.random.default_rng(seed)
    arrays = field(rng, 2, t, k, whole)
    tags = rng.integers(0, k, (2, t))
    y, d, g, best, score = every_crf(tags, *arrays)
    for i, (every, scores) in enumerate(counted(*arrays)):
        n, p = every.shape[1], np.exp(scores - np.logaddexp.reduce(scores))
        at = np.flatnonzero(np.all(every == tags[i, :n], axis=1))[0]
        close(y[i], np.log(p[at]), 8 * t)
        hits = every[..., None] == np.arange(k)
        marginals = np.sum(p[:, None, None] * hits, axis=0)
        close(g[i, :n], marginals, 8 * t)
        close(d[i, :n], (tags[i, :n, None] == np.arange(k)) - marginals, 8 * t)
        assert not np.any(g[i, n:]) and not np.any(d[i, n:])
        np.testing.assert_array_equal(best[i, :n], every[np.argmax(scores)])
        assert not np.any(best[i, n:])
        close(score[i], np.max(scores), 2 * t)


def test_sure_tags_keep_their_digits():
    """1 - g of a tag that is nearly sure, where the difference would be 0 in float32."""
    e = jnp.zeros((1, 3, 2), jnp.float32).at[..., 0].set(30)
    a, tags = jnp.zeros((2, 2), jnp.float32), jnp.zeros((1, 3), int)
    _, d = compiled(ops.crf_log_likelihood, e, a, tags)
    close(d[0, :, 0] * np.exp(30), np.ones(3), 16 * 2**29)


def test_a_tag_that_only_an_improbable_one_leads_to():
    """Beyond the range of float32: in a product of exponentials this path is nothing."""
    e = np.array([[[300, 0, 0], [-1000, 0, 0], [-1000, 0, 0]]], np.float32)
    a = np.array([[0, -np.inf, -1e4], [0, -np.inf, 0], [0, 0, 0]], np.float32)
    g, d = compiled(ops.crf_marginals, e, a)
    expected, dexpected = compiled(ops.crf_marginals.plain, e.astype(float), a.astype(float))
    close(g, expected, 300 * 2**29)
    close(d, dexpected, 300 * 2**29)
    assert g[0, 0, 0] < 0.9  # the path is not the one that begins best


def test_arrays_of_several_dtypes():
    """Each cotangent has the dtype of its array, and the value that of the emissions."""
    e, a, start = (
        jnp.zeros(v, d) for v, d in (((2, 3, 4), "bfloat16"), ((4, 4), float), (4, "f4"))
    )

    def every(e, a, start):
        f = functools.partial(ops.crf_log_likelihood, tags=jnp.zeros((2, 3), int))
        y, pullback = jax.vjp(lambda e, a, start: f(e, a, start=start), e, a, start)
        return y, *pullback(y)

    y, *cotangents = jax.eval_shape(every, e, a, start)
    assert y.dtype == e.dtype
    assert [d.dtype for d in cotangents] == [e.dtype, a.dtype, start.dtype]


def test_viterbi_has_no_gradient():
    rng = np.random.default_rng(2)
    e, a = rng.standard_normal((2, 4, 3)), rng.standard_normal((3, 3))
    assert not np.any(jax.grad(lambda e: jnp.sum(ops.viterbi(e, a)[1]))(e))
    tags, score = jax.jit(jax.vmap(lambda e: ops.viterbi(e[None], a)))(e)
    np.testing.assert_array_equal(tags[:, 0], ops.viterbi(e, a)[0])


def test_errors():
    x, pads, labels = np.zeros((2, 3, 4)), np.zeros((2, 3)), np.zeros((2, 2), int)
    for arguments, message in (
        ((x[0], pads, labels, labels), "batch, frames, classes"),
        ((x, pads[:1], labels, labels), "logit_paddings must have shape"),
        ((x, pads, labels, pads), "label_paddings must have shape"),
        ((x, pads, labels * 1.0, labels), "labels must be integers"),
    ):
        with pytest.raises(InputError, match=message):
            ops.ctc_loss(*arguments)
    with pytest.raises(InputError, match="blank_id must be one of the 4 classes"):
        ops.ctc_loss(x, pads, labels, labels, blank_id=4)
    a = np.zeros((4, 4))
    for f, arguments, message in (
        (ops.crf_marginals, (x[:, :0], a), "time at least 1"),
        (ops.crf_marginals, (x, a[1:]), "transitions must have shape"),
        (ops.viterbi, (x, a, pads[0]), "lengths must have shape"),
        (ops.crf_log_likelihood, (x, a, labels), "tags must be integers of shape"),
        (ops.crf_log_likelihood, (x, a, pads.astype(int), None, pads), "start must have shape"),
    ):
        with pytest.raises(InputError, match=message):
            f(*arguments)
