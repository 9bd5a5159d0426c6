"""Steps are pure, donate, accumulate, and survive a bad batch; runs resume bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from funcbp import data, layers, ops, train
from funcbp.core import InputError

CRITERION = ops.softmax_cross_entropy_with_integer_labels


def problem(n=24):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 5)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0)


def linear_model():
    return layers.serial(layers.dense(3))


def start(model, optimizer, seed=0):
    return train.init_state(model, optimizer, jax.random.key(seed), np.zeros((1, 5), np.float32))


def make(model, optimizer, **options):
    return train.make_step(train.supervised(model, CRITERION), optimizer, **options)


def equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(data_of(x), data_of(y)), a, b)
    return jax.tree.all(same)


def data_of(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_one_step_of_sgd_is_the_textbook_one():
    model, optimizer, batch = linear_model(), optax.sgd(0.5), problem()
    state = start(model, optimizer)

    def loss(params):
        return jnp.mean(CRITERION(model(params, batch[0]), batch[1]))

    grads = jax.grad(loss)(state.params)
    new, metrics = make(model, optimizer, donate=False)(state, batch)
    for got, p, g in zip(*map(jax.tree.leaves, (new.params, state.params, grads)), strict=True):
        # Relative to what is subtracted: the difference may be small.
        assert np.all(np.abs(got - (p - 0.5 * g)) <= 1e-6 * (np.abs(p) + np.abs(0.5 * g)))
    assert float(metrics["loss"]) == pytest.approx(float(loss(state.params)), rel=1e-6)
    assert int(new.step) == 1
    assert metrics["finite"]


def test_accumulation_is_the_whole_batch():
    model, optimizer, batch = linear_model(), optax.sgd(0.5), problem()
    whole, one = make(model, optimizer, donate=False)(start(model, optimizer), batch)
    parts, four = make(model, optimizer, accumulate=4, donate=False)(start(model, optimizer), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        whole.params,
        parts.params,
    )
    for name in ("loss", "accuracy", "grad_norm"):
        assert float(one[name]) == pytest.approx(float(four[name]), rel=1e-5)


def test_a_batch_that_cannot_be_split():
    model, optimizer = linear_model(), optax.sgd(0.5)
    with pytest.raises(InputError, match=r"multiple of accumulate=5, got shape \(24, 5\)"):
        make(model, optimizer, accumulate=5)(start(model, optimizer), problem())


def test_buffers_are_donated():
    model, optimizer = linear_model(), optax.adam(1e-3)
    state = start(model, optimizer)
    old = jax.tree.leaves(state.params)
    make(model, optimizer)(state, problem())
    assert all(p.is_deleted() for p in old)


def test_a_nan_batch_changes_nothing_and_is_reported():
    model, optimizer = linear_model(), optax.adam(0.1)
    step = make(model, optimizer, donate=False)
    state, _ = step(start(model, optimizer), problem())
    x, y = problem()
    x[3, 2] = np.nan
    after, metrics = step(state, (x, y))
    assert not metrics["finite"]
    assert equal(after.params, state.params)
    assert equal(after.opt_state, state.opt_state)
    assert int(after.step) == 2
    recovered, metrics = step(after, problem())
    assert metrics["finite"] and not equal(recovered.params, state.params)


def test_fit_warns_of_a_nan_batch_and_goes_on():
    model, optimizer = linear_model(), optax.adam(0.1)
    x, y = problem()
    bad = np.full_like(x, np.inf)
    with pytest.warns(RuntimeWarning, match="step 1 of this run: loss nan"):
        _, history = train.fit(
            make(model, optimizer), start(model, optimizer), [(x, y), (bad, y), (x, y)], steps=9
        )
    assert (history.steps, history.skipped) == (3, 1)
    assert history.metrics["finite"].tolist() == [True, False, True]


def test_the_step_compiles_once():
    traces = []
    model, optimizer = linear_model(), optax.adam(0.1)
    loss = train.supervised(model, CRITERION)

    def counted(*args, **kwargs):
        traces.append(1)
        return loss(*args, **kwargs)

    state, step = start(model, optimizer), train.make_step(counted, optimizer)
    for _ in range(4):
        state, _ = step(state, problem())
    assert len(traces) == 1


def dropout_model():
    return layers.serial(layers.dense(8, activation="tanh"), layers.dropout(0.3), layers.dense(3))


def test_a_resumed_run_is_the_uninterrupted_one():
    model, optimizer = dropout_model(), optax.adam(0.01)
    step = make(model, optimizer, donate=False)

    def batches(first):
        return data.batches(problem(), 7, seed=5, step=first)

    whole, _ = train.fit(step, start(model, optimizer), batches(0), steps=9)
    half, _ = train.fit(step, start(model, optimizer), batches(0), steps=4)
    resumed, _ = train.fit(step, half, batches(int(half.step)), steps=5)
    assert equal(resumed, whole)
    other, _ = train.fit(step, half, batches(0), steps=5)
    assert not equal(other.params, whole.params)


def test_state_goes_through_the_step():
    """A layer that counts its training calls, beside one without state."""

    def init(key, spec):
        return {}, {"calls": jnp.zeros((), jnp.int32)}

    def apply(params, state, x, *, key=None, train=False):
        return x, {"calls": state["calls"] + train}

    model = layers.serial(layers.dense(3), layers.Layer(init, apply, "counter"))
    optimizer = optax.sgd(0.1)
    for accumulate, calls in ((1, 2), (3, 6)):
        state, step = start(model, optimizer), make(model, optimizer, accumulate=accumulate)
        for _ in range(2):
            state, _ = step(state, problem())
        assert int(state.model_state["counter_0"]["calls"]) == calls


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda p: jnp.zeros(3), "must return"),
        (lambda p: (jnp.zeros(3), ({}, {})), r"floating scalar, got float32\[3\]"),
        (lambda p: (jnp.zeros((), int), ({}, {})), "floating scalar, got int32"),
    ],
)
def test_bad_losses(result, message):
    model, optimizer = linear_model(), optax.sgd(0.1)

    def loss(params, model_state, batch, *, key):
        return result(params)

    with pytest.raises(InputError, match=message):
        train.make_step(loss, optimizer)(start(model, optimizer), problem())


def test_fit_is_quiet_when_not_a_terminal(capsys):
    model, optimizer = linear_model(), optax.sgd(0.1)
    _, history = train.fit(
        make(model, optimizer), start(model, optimizer), [problem()] * 5, steps=5
    )
    assert capsys.readouterr().out == ""
    assert len(history.metrics["loss"]) == 5
    train.fit(
        make(model, optimizer), start(model, optimizer), [problem()] * 5, steps=5, quiet=False
    )
    assert "loss" in capsys.readouterr().out


def test_evaluate_counts_each_example_once():
    model = layers.lift(lambda x: x, name="identity")
    x, labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]], np.array([0, 1, 0, 0, 1])
    assert train.evaluate(model, {}, {}, x, labels, batch=2) == 2 / 5
    with pytest.raises(InputError, match="as many, and some, got 5 and 4"):
        train.evaluate(model, {}, {}, x, labels[:4])
