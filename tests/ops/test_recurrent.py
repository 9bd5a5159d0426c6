"""rnn, gru and lstm, and `recurrent` over them, against PyTorch's modules and Flax's cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp.check.compare import saved_bytes
from funcbp.core import InputError
from funcbp.ops import gru, lstm, recurrent, rnn

GATES = {rnn: 1, gru: 3, lstm: 4}
each_cell = pytest.mark.parametrize("cell", [rnn, gru, lstm], ids=["rnn", "gru", "lstm"])


def near(got, expected):
    """Equal in float64, but for the rounding of sums over a few steps."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.dtype, got.shape) == (np.float64, expected.shape)
    scale = max(np.max(np.abs(expected), initial=0), 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2**8 * np.finfo(np.float64).eps * scale)


def all_near(got, expected):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for g, e in zip(got, expected, strict=True):
        near(g, e)


def value_and_cotangents(f, args, seed=7):
    """(value, cotangents) of f jitted, for normal cotangents of the value, and those."""
    y = jax.eval_shape(f, *args)
    rng = np.random.default_rng(seed)
    dy = jax.tree.map(lambda a: rng.standard_normal(a.shape), y)

    def run(args, dy):
        y, pullback = jax.vjp(f, *args)
        return y, pullback(jax.tree.map(lambda d, y: d.astype(y.dtype), dy, y))

    return *jax.jit(run)(args, dy), dy


class Torch:
    """A PyTorch module, in our layouts: lists by layer, pairs by direction."""

    def __init__(self, cell, sizes, layers, bidirectional, activation):
        self.torch = pytest.importorskip("torch")
        self.torch.manual_seed(0)
        kind = {rnn: "RNN", gru: "GRU", lstm: "LSTM"}[cell]
        options = {"nonlinearity": activation} if cell is rnn else {}
        self.cell, self.layers, self.both = cell, layers, bidirectional
        self.module = getattr(self.torch.nn, kind)(
            *sizes, layers, batch_first=True, bidirectional=bidirectional, **options
        ).double()

    def by_layer(self, one):
        """one(layer, direction) for all, in the structure that `recurrent` takes."""
        pick = range(self.layers)
        return [(one(k, 0), one(k, 1)) if self.both else one(k, 0) for k in pick]

    def params(self, of=lambda p: p, biases=jnp.add):
        def one(layer, direction):
            end = f"l{layer}" + "_reverse" * direction
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w, u, b, bu = (of(getattr(self.module, f"{k}_{end}")).detach().numpy() for k in kinds)
            w, u, b, bu = (jnp.asarray(v.T) for v in (w, u, b, bu))
            return (w, u, b, bu) if self.cell is gru else (w, u, biases(b, bu))

        return self.by_layer(one)

    def states(self, last):
        """PyTorch's state, or its gradient, as `recurrent` gives it."""
        last = [jnp.asarray(v.detach().numpy()) for v in last]

        def one(layer, direction):
            parts = tuple(v[layer * (1 + self.both) + direction] for v in last)
            return parts if self.cell is lstm else parts[0]

        return self.by_layer(one)

    def parts(self, states):
        """`recurrent`'s states as PyTorch's."""
        leaves = [self.torch.tensor(np.asarray(v)) for v in jax.tree.leaves(states)]
        count = 1 + (self.cell is lstm)
        return [self.torch.stack(leaves[k::count]) for k in range(count)]

    def run(self, x, states, lengths, dy, dlast):
        """(y, last, dx, dparams, dstates); rows of length 0 are none of PyTorch's."""
        torch, rnn_utils = self.torch, self.torch.nn.utils.rnn
        x = torch.tensor(np.asarray(x), requires_grad=True)
        starts = [v.requires_grad_() for v in self.parts(states)]
        sequence = x
        if lengths is not None:
            sequence = rnn_utils.pack_padded_sequence(
                x, torch.tensor(np.asarray(lengths)), batch_first=True, enforce_sorted=False
            )
        y, last = self.module(sequence, tuple(starts) if self.cell is lstm else starts[0])
        if lengths is not None:
            y, _ = rnn_utils.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        last = last if self.cell is lstm else (last,)
        loss = torch.sum(y * torch.tensor(np.asarray(dy)))
        loss = loss + sum(torch.sum(v * d) for v, d in zip(last, self.parts(dlast), strict=True))
        loss.backward()
        return (
            jnp.asarray(y.detach().numpy()),
            self.states(last),
            jnp.asarray(x.grad.numpy()),
            self.params(lambda p: p.grad, lambda b, bu: b),
            self.states([v.grad for v in starts]),
        )


@st.composite
def calls(draw):
    """Sizes and settings of a call."""
    sizes = {name: draw(st.integers(1, 3)) for name in ("batch", "n", "m", "layers")}
    time = draw(st.integers(1, 5))
    lengths = st.lists(st.integers(0, time), min_size=sizes["batch"], max_size=sizes["batch"])
    return sizes | {
        "time": time,
        "lengths": draw(st.none() | lengths),
        "bidirectional": draw(st.booleans()),
        "activation": draw(st.sampled_from(["tanh", "relu"])),
        "settings": {
            "time_major": draw(st.booleans()),
            "remat_every": draw(st.sampled_from([None, 1, 2])),
        },
    }


@each_cell
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_values_and_gradients_are_pytorchs(cell, call):
    options = dict(call["settings"])
    if cell is rnn:
        options["activation"] = call["activation"]
        del options["remat_every"]
    layers, both = min(call["layers"], 2), call["bidirectional"]
    peer = Torch(cell, (call["n"], call["m"]), layers, both, call["activation"])
    rng = np.random.default_rng(3)

    def start(*_):
        shape = (call["batch"], call["m"])
        pair = rng.standard_normal(shape), rng.standard_normal(shape)
        return pair if cell is lstm else pair[0]

    x = rng.standard_normal((call["batch"], call["time"], call["n"]))
    lengths = None if call["lengths"] is None else jnp.asarray(call["lengths"])

    def ours(x, params, states):
        x = jnp.swapaxes(x, 0, 1) if options["time_major"] else x
        y, last = recurrent(cell, x, params, states, lengths, bidirectional=both, **options)
        return jnp.swapaxes(y, 0, 1) if options["time_major"] else y, last

    with jax.enable_x64(True):
        states = peer.by_layer(start)
        (y, last), (dx, dparams, dstates), (dy, dlast) = value_and_cotangents(
            ours, (jnp.asarray(x), peer.params(), jax.tree.map(jnp.asarray, states))
        )
        # PyTorch takes no rows of length 0.
        some = np.ones(len(x), bool) if lengths is None else np.asarray(lengths) > 0
        of_some = [jax.tree.map(lambda v: np.asarray(v)[some], v) for v in (x, states, dy, dlast)]
        if some.any():
            x, states, dy, dlast = of_some
            expected = peer.run(x, states, lengths if lengths is None else lengths[some], dy, dlast)
            got = [jax.tree.map(lambda v: v[some], v) for v in (y, last, dx)]
            all_near((*got, dparams, jax.tree.map(lambda v: v[some], dstates)), expected)
        else:
            assert not any(jnp.any(v) for v in jax.tree.leaves((y, dx, dparams)))


@each_cell
def test_a_row_without_steps_keeps_its_state_and_has_no_other_gradient(cell):
    rng = np.random.default_rng(0)
    k = GATES[cell]
    x, h, c = (jnp.asarray(rng.standard_normal(s), "float32") for s in ((2, 4, 3), (2, 2), (2, 2)))
    w, u = (jnp.asarray(rng.standard_normal((s, k * 2)), "float32") for s in (3, 2))
    state = (h, c) if cell is lstm else h

    def f(x, w, u, state):
        return cell(x, w, u, state=state, lengths=jnp.array([0, 0]), reverse=True)

    (y, last), (dx, dw, du, dstate), (_, dlast) = value_and_cotangents(f, (x, w, u, state))
    assert not any(jnp.any(v) for v in (y, dx, dw, du))
    for got, expected in ((last, state), (dstate, dlast)):
        same = jax.tree.map(lambda g, e: np.array_equal(g, np.float32(e)), got, expected)
        assert jax.tree.all(same)


@pytest.mark.filterwarnings("default:::flax")
@pytest.mark.parametrize("cell", [gru, lstm], ids=["gru", "lstm"])
def test_values_are_flaxs(cell):
    nn = pytest.importorskip("flax.linen")
    lengths = jnp.array([4, 1, 3])
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 2)))
        kind = nn.GRUCell if cell is gru else nn.OptimizedLSTMCell
        # Biases start at 0, and would not show.
        options = {"param_dtype": x.dtype, "bias_init": nn.initializers.normal()}
        model = nn.RNN(kind(5, **options), return_carry=True)
        variables = model.init(jax.random.key(0), x)
        carry, y = model.apply(variables, x, seq_lengths=lengths)
        (p,) = variables["params"].values()

        def joined(part, names):
            zeros = jnp.zeros(5, x.dtype)
            return jnp.concatenate([p[n].get(part, zeros) for n in names.split()], axis=-1)

        if cell is gru:
            w, u, b, bu = (
                joined(part, names)
                for part in ("kernel", "bias")
                for names in ("ir iz in", "hr hz hn")
            )
            got, last = gru(x, w, u, b, bu, lengths=lengths)
        else:
            w, u = joined("kernel", "ii if ig io"), joined("kernel", "hi hf hg ho")
            got, (h, c) = lstm(x, w, u, joined("bias", "hi hf hg ho"), lengths=lengths)
            last = (c, h)
        all_near(last, carry)
        counts = (np.arange(4) < lengths[:, None])[..., None]
        near(got, np.where(counts, y, 0))


@each_cell
def test_ten_thousand_steps_stay_as_near_to_float64_as_autodiff(cell):
    k = GATES[cell]
    rng = np.random.default_rng(2)
    shapes = ((1, 10_000, 2), (2, 3 * k), (3, 3 * k), (3 * k,))
    args = tuple(jnp.asarray(0.5 * rng.standard_normal(s), "float32") for s in shapes)
    rule, autodiff = (
        jax.tree.leaves(value_and_cotangents(f, args)[:2]) for f in (cell, cell.plain)
    )
    with jax.enable_x64(True):
        wide = tuple(v.astype("float64") for v in args)
        truth = jax.tree.leaves(value_and_cotangents(cell.plain, wide)[:2])
        for ours, theirs, true in zip(rule, autodiff, truth, strict=True):
            error, allowed = (np.max(np.abs(np.float64(v) - true)) for v in (ours, theirs))
            ulp = np.finfo(np.float32).eps * np.max(np.abs(true))
            assert error <= 2 * allowed + 2 * ulp


@pytest.mark.parametrize(("cell", "stored"), [(gru, 4 + 1), (lstm, 5 + 1)], ids=["gru", "lstm"])
def test_remat_every_saves_the_output_and_a_state_of_each_chunk(cell, stored):
    k, y = GATES[cell], 2 * 64 * 3 * 4
    args = tuple(map(jnp.ones, ((2, 64, 5), (5, 3 * k), (3, 3 * k))))
    chunk = 2 * 3 * 4 * (1 + (cell is lstm))
    assert saved_bytes(cell, *args, remat_every=8) == y + 8 * chunk
    assert saved_bytes(cell, *args) == stored * y + chunk


X, W, U = jnp.ones((2, 4, 3)), jnp.ones((3, 8)), jnp.ones((2, 8))


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((X[0], W, U), {}, r"x must have three axes.*got shape \(4, 3\)"),
        ((X, W, W), {}, r"u must have shape \[hidden, 4 hidden\], got \(3, 8\)"),
        ((X, U, U), {}, r"w must have shape \(3, 8\).*got \(2, 8\)"),
        ((X, W, U, jnp.ones(2)), {}, r"a bias must have shape \(8,\).*got \(2,\)"),
        ((X, W, U), {"state": (jnp.ones((2, 2)),)}, r"must have 2 of shape \(2, 2\).*got"),
        ((X, W, U), {"lengths": jnp.ones(4, int)}, r"lengths must have shape \(2,\).*got \(4,\)"),
        ((X, W, U), {"remat_every": 0}, "remat_every must be at least 1"),
    ],
)
def test_what_lstm_says_of_bad_arguments(args, options, says):
    with pytest.raises(InputError, match=says):
        lstm(*args, **options)


def test_what_rnn_says_of_an_unknown_activation():
    with pytest.raises(InputError, match="activation must be one of tanh, relu, got 'gelu'"):
        rnn(X, W[:, :2], U[:, :2], activation="gelu")


def test_recurrent_says_which_layer_does_not_fit():
    with pytest.raises(InputError, match=r"layer 1: w must have shape \(2, 8\).*got \(3, 8\)"):
        recurrent(lstm, X, [(W, U), (W, U)])
    with pytest.raises(InputError, match="layer 0: weights must be a pair"):
        recurrent(lstm, X, [(W, U, None)], bidirectional=True)
    with pytest.raises(InputError, match="states must have one entry for each of the 1 layers"):
        recurrent(lstm, X, [(W, U)], [None, None])
