"""Custom rules as users write them, each with one fault; its comment says what belongs there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from .entry import Wrong

ENTRIES: list[Wrong] = []


def add(f, causes, arguments, *calls, innocent=None, name=None):
    causes, arguments = tuple(causes.split()), tuple(arguments.split())
    name = f"{name or f.__name__}-{causes[0]}"
    ENTRIES.append(Wrong(name, f, calls, causes, arguments, innocent))


def saves(f):
    """The forward rule that keeps the arguments."""
    return lambda *args: (f(*args), args)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(seed, *shape, low=0.1, high=0.9):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), jnp.float32)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


def cplx(seed, *shape):
    return jax.lax.complex(normal(seed, *shape), normal(seed + 5000, *shape))


def full(value, *shape):
    return jnp.full(shape, value, jnp.float32)


def symmetric(seed, n, diagonal=0.0):
    a = normal(seed, n, n)
    return a + a.T + diagonal * jnp.eye(n, dtype=jnp.float32)


# --- sign


@jax.custom_vjp
def tanh_difference(x, y):
    return jnp.tanh(x - y)


def tanh_difference_bwd(t, g):
    d = g * (1 - t) * (1 + t)
    return d, d  # y enters with a minus


tanh_difference.defvjp(lambda x, y: (t := jnp.tanh(x - y), t), tanh_difference_bwd)
add(tanh_difference, "sign", "y", (normal(1, 5, 7), normal(2, 5, 7)))


@jax.custom_vjp
def gaussian_log_density(x, mean, log_std):
    z = (x - mean) * jnp.exp(-log_std)
    return -0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)


def gaussian_log_density_bwd(saved, g):
    x, mean, log_std = saved
    z = (x - mean) * jnp.exp(-log_std)
    d = g * z * jnp.exp(-log_std)
    return -d, d, g * (1 - z) * (1 + z)  # z^2 - 1, not 1 - z^2


gaussian_log_density.defvjp(saves(gaussian_log_density), gaussian_log_density_bwd)
add(
    gaussian_log_density,
    "sign",
    "log_std",
    (normal(3, 4, 3), normal(4, 4, 3), 0.3 * normal(5, 4, 3)),
    innocent=(jnp.sign(normal(6, 4, 3)), full(0, 4, 3), full(0, 4, 3)),  # |z| = 1
)


@jax.custom_vjp
def solve(a, b):
    return jnp.linalg.solve(a, b)


def solve_bwd(saved, g):
    a, x = saved
    db = jnp.linalg.solve(a.T, g)
    return jnp.outer(db, x), db  # the inverse's derivative has a minus


solve.defvjp(lambda a, b: (x := solve(a, b), (a, x)), solve_bwd)
add(
    solve,
    "sign",
    "a",
    (normal(7, 5, 5) + 4 * jnp.eye(5, dtype=jnp.float32), normal(8, 5)),
    (normal(9, 3, 3) - 4 * jnp.eye(3, dtype=jnp.float32), normal(10, 3)),
    innocent=(normal(11, 5, 5) + 4 * jnp.eye(5, dtype=jnp.float32), full(0, 5)),
)


@jax.custom_jvp
def cosine_wave(x, w):
    return jnp.cos(w * x)


@cosine_wave.defjvp
def cosine_wave_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return cosine_wave(x, w), jnp.sin(w * x) * (w * dx + x * dw)  # -sin


add(cosine_wave, "sign", "x w", (normal(12, 5, 7), normal(13, 7)))


# --- scale


@jax.custom_vjp
def mean_squared_error(pred, target):
    return jnp.mean((pred - target) ** 2)


def mean_squared_error_bwd(saved, g):
    pred, target = saved
    d = g * (pred - target) / pred.size  # the 2 of the square
    return d, -d


mean_squared_error.defvjp(saves(mean_squared_error), mean_squared_error_bwd)
add(
    mean_squared_error,
    "scale",
    "pred target",
    (normal(14, 5, 7), normal(15, 5, 7)),
    innocent=(normal(16, 5, 7), normal(16, 5, 7)),
)


@jax.custom_vjp
def mean_cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def mean_cross_entropy_bwd(saved, g):
    logits, labels = saved
    one_hot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return g * (jax.nn.softmax(logits) - one_hot), None  # 1 / batch


mean_cross_entropy.defvjp(saves(mean_cross_entropy), mean_cross_entropy_bwd)
add(
    mean_cross_entropy,
    "scale",
    "logits",
    (normal(17, 6, 9), integers(18, 9, 6)),
    (normal(19, 3, 4), integers(20, 4, 3)),
    innocent=(normal(21, 1, 9), ints(4)),
)


@jax.custom_vjp
def softmax_with_temperature(x, temperature):
    return jax.nn.softmax(x / temperature, axis=-1)


def softmax_with_temperature_bwd(saved, g):
    x, temperature, s = saved
    d = s * (g - jnp.sum(g * s, axis=-1, keepdims=True))
    return d, -jnp.sum(d * x) / temperature**2  # d / temperature


softmax_with_temperature.defvjp(
    lambda x, t: (s := softmax_with_temperature(x, t), (x, t, s)), softmax_with_temperature_bwd
)
add(
    softmax_with_temperature,
    "scale",
    "x",
    (normal(22, 5, 7), jnp.float32(1.7)),
    (normal(23, 2, 3), jnp.float32(0.6)),
    innocent=(normal(24, 5, 7), jnp.float32(1)),
)


@jax.custom_jvp
def entropy_in_bits(p):
    return -jnp.sum(p * jnp.log2(p), axis=-1)


@entropy_in_bits.defjvp
def entropy_in_bits_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    return entropy_in_bits(p), -jnp.sum((jnp.log(p) + 1) * dp, axis=-1)  # / log 2


add(entropy_in_bits, "scale", "p", (uniform(25, 5, 7),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def l2_penalty(params, coefficient=0.1):
    return 0.5 * coefficient * sum(jnp.sum(p * p) for p in jax.tree.leaves(params))


def l2_penalty_bwd(coefficient, params, g):
    return (jax.tree.map(lambda p: 2 * coefficient * p * g, params),)  # the half takes the 2


l2_penalty.defvjp(lambda params, c: (l2_penalty(params, c), params), l2_penalty_bwd)
add(
    l2_penalty,
    "scale",
    "params['w'] params['b']",
    ({"w": normal(26, 4, 3), "b": normal(27, 3)},),
    ({"w": normal(28, 2, 5), "b": normal(29, 5)}, 0.7),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def segment_mean(x, segments, num):
    total = jax.ops.segment_sum(x, segments, num)
    count = jax.ops.segment_sum(jnp.ones_like(x[:, :1]), segments, num)
    return total / jnp.maximum(count, 1)


def segment_mean_bwd(num, segments, g):
    return g[segments], None  # / count


segment_mean.defvjp(lambda x, s, num: (segment_mean(x, s, num), s), segment_mean_bwd)
add(
    segment_mean,
    "scale",
    "x",
    (normal(30, 6, 3), ints(0, 2, 2, 1, 2, 0), 4),
    innocent=(normal(31, 4, 3), ints(3, 0, 4, 1), 5),
)


def attention_weights(q, k, bias=0.0):
    return jax.nn.softmax(q @ k.T / math.sqrt(q.shape[-1]) + bias, axis=-1)


def attention_scores_bwd(p, v, g):
    dp = g @ v.T
    return p * (dp - jnp.sum(dp * p, axis=-1, keepdims=True))


@jax.custom_vjp
def attention(q, k, v):
    return attention_weights(q, k) @ v


def attention_fwd(q, k, v):
    p = attention_weights(q, k)
    return p @ v, (q, k, v, p)


def attention_bwd(saved, g):
    q, k, v, p = saved
    ds = attention_scores_bwd(p, v, g)
    return ds @ k, ds.T @ q / math.sqrt(q.shape[-1]), p.T @ g  # ds @ k / sqrt(depth)


attention.defvjp(attention_fwd, attention_bwd)
add(
    attention,
    "scale",
    "q",
    (normal(32, 5, 4), normal(33, 6, 4), normal(34, 6, 3)),
    innocent=(normal(35, 5, 1), normal(36, 6, 1), normal(37, 6, 3)),
)


# --- missing_term


def normalised(x, axis, eps):
    centred = x - jnp.mean(x, axis=axis, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(centred**2, axis=axis, keepdims=True) + eps)
    return centred * r, r


def norm_fwd(axis):
    def fwd(x, gamma, beta, eps=1e-5):
        hat, r = normalised(x, axis, eps)
        return hat * gamma + beta, (hat, r, gamma)

    return fwd


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, gamma, beta, eps=1e-5):
    return normalised(x, -1, eps)[0] * gamma + beta


def layer_norm_bwd(eps, saved, g):
    hat, r, gamma = saved
    d = g * gamma
    dx = r * (d - hat * jnp.mean(d * hat, axis=-1, keepdims=True))  # - mean(d)
    return dx, jnp.sum(g * hat, axis=0), jnp.sum(g, axis=0)


layer_norm.defvjp(norm_fwd(-1), layer_norm_bwd)
add(
    layer_norm,
    "missing_term",
    "x",
    (normal(38, 5, 7), normal(39, 7), normal(40, 7)),
    (normal(41, 3, 4), full(1, 4), full(0, 4), 1e-3),
)


@jax.custom_vjp
def rms_norm(x, w):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * w


def rms_norm_bwd(saved, g):
    x, w = saved
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return g * w * r, jnp.sum(g * x * r, axis=0)  # - x r^3 mean(g w x)


rms_norm.defvjp(saves(rms_norm), rms_norm_bwd)
add(rms_norm, "missing_term", "x", (normal(42, 5, 7), normal(43, 7)))


@jax.custom_vjp
def swish(x, beta):
    return x * jax.nn.sigmoid(beta * x)


def swish_bwd(saved, g):
    x, s = saved
    return g * s, jnp.sum(g * x * x * s * (1 - s))  # the product rule's other term


swish.defvjp(lambda x, beta: (x * (s := jax.nn.sigmoid(beta * x)), (x, s)), swish_bwd)
add(
    swish,
    "missing_term",
    "x",
    (normal(44, 5, 7), jnp.float32(1.3)),
    innocent=(full(0, 5, 7), jnp.float32(1.3)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(x, axis=-1):
    return jax.nn.softmax(x, axis=axis)


softmax.defvjp(
    lambda x, axis: (s := jax.nn.softmax(x, axis=axis), s),
    lambda axis, s, g: (s * g,),  # - s sum(s g)
)
add(softmax, "missing_term", "x", (normal(45, 5, 7),), (normal(46, 4, 3, 2), 1))


@jax.custom_jvp
def unit_vectors(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@unit_vectors.defjvp
def unit_vectors_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return unit_vectors(x), dx / jnp.linalg.norm(x, axis=-1, keepdims=True)  # the projection


add(unit_vectors, "missing_term", "x", (normal(47, 5, 7),))


@jax.custom_vjp
def quadratic_form(x, a):
    return jnp.einsum("bi,ij,bj->b", x, a, x)


def quadratic_form_bwd(saved, g):
    x, a = saved
    return g[:, None] * (x @ a.T), jnp.einsum("b,bi,bj->ij", g, x, x)  # + x @ a


quadratic_form.defvjp(saves(quadratic_form), quadratic_form_bwd)
add(quadratic_form, "missing_term", "x", (normal(48, 5, 4), normal(49, 4, 4)))


@jax.custom_vjp
def tied_autoencoder(x, w):
    return jnp.tanh(x @ w) @ w.T


def tied_autoencoder_fwd(x, w):
    h = jnp.tanh(x @ w)
    return h @ w.T, (x, w, h)


def tied_autoencoder_bwd(saved, g):
    x, w, h = saved
    dz = (g @ w) * (1 - h) * (1 + h)
    return dz @ w.T, x.T @ dz  # + g.T @ h, of the decoder


tied_autoencoder.defvjp(tied_autoencoder_fwd, tied_autoencoder_bwd)
add(tied_autoencoder, "missing_term", "w", (normal(50, 5, 6), 0.5 * normal(51, 6, 3)))


@jax.custom_vjp
def batch_norm(x, gamma, beta):
    return normalised(x, 0, 1e-5)[0] * gamma + beta


def batch_norm_bwd(saved, g):
    hat, r, gamma = saved
    dx = gamma * r * (g - jnp.mean(g, axis=0))  # the variance's term
    return dx, jnp.sum(g * hat, axis=0), jnp.sum(g, axis=0)


batch_norm.defvjp(norm_fwd(0), batch_norm_bwd)
add(batch_norm, "missing_term", "x", (normal(52, 6, 4), normal(53, 4), normal(54, 4)))


def make_lstm(cell_carry=lambda dc, f: dc * f, final_cell=lambda dc: dc):
    def gates(params, x, h):
        i, f, o, u = jnp.split(jnp.concatenate([x, h]) @ params["w"] + params["b"], 4)
        return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jax.nn.sigmoid(o), jnp.tanh(u)

    def states(params, xs):
        def step(carry, x):
            h, c = carry
            i, f, o, u = gates(params, x, h)
            c = f * c + i * u
            h = o * jnp.tanh(c)
            return (h, c), (h, c)

        zero = jnp.zeros_like(params["b"][: params["b"].size // 4])
        return jax.lax.scan(step, (zero, zero), xs)[1]

    @jax.custom_vjp
    def lstm(params, xs):
        hs, cs = states(params, xs)
        return hs, cs[-1]

    def fwd(params, xs):
        hs, cs = states(params, xs)
        return (hs, cs[-1]), (params, xs, hs, cs)

    def bwd(saved, cotangents):
        params, xs, hs, cs = saved
        dhs, dc_final = cotangents

        def back(carry, now):
            dh, dc, dw, db = carry
            x, h, c, dh_out = now
            i, f, o, u = gates(params, x, h)
            t = jnp.tanh(f * c + i * u)
            dh = dh + dh_out
            dc = dc + dh * o * (1 - t * t)
            d = (dc * u * i * (1 - i), dc * c * f * (1 - f), dh * t * o * (1 - o))
            dz = jnp.concatenate([*d, dc * i * (1 - u * u)])
            v = jnp.concatenate([x, h])
            dv = params["w"] @ dz
            return (dv[x.size :], cell_carry(dc, f), dw + jnp.outer(v, dz), db + dz), dv[: x.size]

        def previous(s):
            return jnp.concatenate([jnp.zeros_like(s[:1]), s[:-1]])

        start = (jnp.zeros_like(hs[0]), final_cell(dc_final))
        start += (jnp.zeros_like(params["w"]), jnp.zeros_like(params["b"]))
        steps = (xs, previous(hs), previous(cs), dhs)
        (_, _, dw, db), dxs = jax.lax.scan(back, start, steps, reverse=True)
        return {"w": dw, "b": db}, dxs

    lstm.defvjp(fwd, bwd)
    return lstm


LSTM = {"w": normal(55, 3 + 4, 16), "b": normal(56, 16)}
LSTM_ARGUMENTS = "params['w'] params['b'] xs"
add(
    make_lstm(cell_carry=lambda dc, f: jnp.zeros_like(dc)),  # the cell's path through time
    "missing_term",
    LSTM_ARGUMENTS,
    (LSTM, normal(57, 5, 3)),
    innocent=(LSTM, normal(58, 1, 3)),
)


# --- dropped_argument


@jax.custom_vjp
def prelu(x, alpha):
    return jnp.where(x > 0, x, alpha * x)


def prelu_bwd(saved, g):
    x, alpha = saved
    return jnp.where(x > 0, g, alpha * g), jnp.zeros_like(alpha)  # sum(g x, x <= 0)


prelu.defvjp(saves(prelu), prelu_bwd)
add(
    prelu,
    "dropped_argument",
    "alpha",
    (normal(59, 5, 7), uniform(60, 7)),
    innocent=(uniform(61, 5, 7), uniform(62, 7)),
)


@jax.custom_vjp
def soft_cross_entropy(logits, labels):
    return -jnp.sum(labels * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def soft_cross_entropy_bwd(saved, g):
    p, labels = saved
    dlogits = g[:, None] * (p * jnp.sum(labels, axis=-1, keepdims=True) - labels)
    return dlogits, None  # labels are not constants here


soft_cross_entropy.defvjp(
    lambda x, labels: (soft_cross_entropy(x, labels), (jax.nn.softmax(x), labels)),
    soft_cross_entropy_bwd,
)
add(soft_cross_entropy, "dropped_argument", "labels", (normal(63, 5, 7), uniform(64, 5, 7)))


@jax.custom_vjp
def biased_attention(q, k, v, bias):
    return attention_weights(q, k, bias) @ v


def biased_attention_bwd(saved, g):
    q, k, v, p = saved
    ds = attention_scores_bwd(p, v, g)
    scale = 1 / math.sqrt(q.shape[-1])
    return ds @ k * scale, ds.T @ q * scale, p.T @ g, jnp.zeros_like(p)  # ds


biased_attention.defvjp(
    lambda q, k, v, b: ((p := attention_weights(q, k, b)) @ v, (q, k, v, p)), biased_attention_bwd
)
add(
    biased_attention,
    "dropped_argument",
    "bias",
    (normal(65, 5, 4), normal(66, 6, 4), normal(67, 6, 3), normal(68, 5, 6)),
    innocent=(normal(69, 5, 4), normal(70, 1, 4), normal(71, 1, 3), normal(72, 5, 1)),
)


@jax.custom_vjp
def lerp(a, b, t):
    return a + t * (b - a)


def lerp_bwd(t, g):
    return (1 - t) * g, t * g, None  # sum(g (b - a))


lerp.defvjp(lambda a, b, t: (lerp(a, b, t), t), lerp_bwd)
add(
    lerp,
    "dropped_argument",
    "t",
    (normal(73, 5, 7), normal(74, 5, 7), jnp.float32(0.3)),
    innocent=(normal(75, 5, 7), normal(75, 5, 7), jnp.float32(0.3)),
)


def make_rnn(
    slope=lambda h: (1 - h) * (1 + h),
    to_previous=lambda dz, u: dz @ u.T,
    accumulate=lambda total, new: jax.tree.map(jnp.add, total, new),
    previous=lambda h0, hs: jnp.concatenate([h0[None], hs[:-1]]),
    to_start=lambda dh: dh,
):
    @jax.custom_vjp
    def rnn(params, xs, h0):
        def step(h, x):
            h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
            return h, h

        return jax.lax.scan(step, h0, xs)[1]

    def fwd(params, xs, h0):
        hs = rnn(params, xs, h0)
        return hs, (params, xs, h0, hs)

    def bwd(saved, g):
        params, xs, h0, hs = saved

        def back(carry, now):
            dh, grads = carry
            x, h_before, h, dh_out = now
            dz = (dh + dh_out) * slope(h)
            new = {"w": jnp.outer(x, dz), "u": jnp.outer(h_before, dz), "b": dz}
            return (to_previous(dz, params["u"]), accumulate(grads, new)), dz @ params["w"].T

        start = (jnp.zeros_like(h0), jax.tree.map(jnp.zeros_like, params))
        steps = (xs, previous(h0, hs), hs, g)
        (dh, grads), dxs = jax.lax.scan(back, start, steps, reverse=True)
        return grads, dxs, to_start(dh)

    rnn.defvjp(fwd, bwd)
    return rnn


RNN = {"w": normal(76, 3, 4), "u": 0.7 * normal(77, 4, 4), "b": 0.3 * normal(78, 4)}
RNN_ARGUMENTS = "params['w'] params['u'] params['b'] xs h0"
add(
    make_rnn(to_start=jnp.zeros_like),  # the initial state is an argument too
    "dropped_argument",
    "h0",
    (RNN, normal(79, 5, 3), normal(80, 4)),
    innocent=(RNN | {"u": full(0, 4, 4)}, normal(81, 5, 3), normal(82, 4)),
)


# --- dropped_output


@jax.custom_vjp
def moments(x):
    return jnp.mean(x, axis=-1), jnp.var(x, axis=-1)


def moments_bwd(x, cotangents):
    dmean, _ = cotangents  # the variance's
    return (jnp.broadcast_to(dmean[:, None] / x.shape[-1], x.shape),)


moments.defvjp(lambda x: (moments(x), x), moments_bwd)
add(
    moments,
    "dropped_output missing_term",
    "x",
    (normal(83, 5, 7),),
    (normal(84, 2, 3),),
    innocent=(jnp.outer(jnp.arange(5, dtype=jnp.float32), full(1, 8)),),
)


@jax.custom_vjp
def attention_with_logsumexp(q, k, v):
    s = q @ k.T / math.sqrt(q.shape[-1])
    return jax.nn.softmax(s, axis=-1) @ v, jax.nn.logsumexp(s, axis=-1)


def attention_with_logsumexp_bwd(saved, cotangents):
    (q, k, v), (g, _) = saved, cotangents
    p = attention_weights(q, k)
    ds = attention_scores_bwd(p, v, g) / math.sqrt(q.shape[-1])  # p times the logsumexp's cotangent
    return ds @ k, ds.T @ q, p.T @ g


attention_with_logsumexp.defvjp(saves(attention_with_logsumexp), attention_with_logsumexp_bwd)
add(
    attention_with_logsumexp,
    "dropped_output missing_term",
    "q k",
    (normal(85, 5, 4), normal(86, 6, 4), normal(87, 6, 3)),
)


@jax.custom_vjp
def unit_and_norm(x):
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return {"unit": x / norm, "norm": norm}


def unit_and_norm_bwd(out, g):
    unit, du = out["unit"], g["unit"]
    d = (du - unit * jnp.sum(unit * du, axis=-1, keepdims=True)) / out["norm"]
    return (d,)  # + unit g["norm"]


unit_and_norm.defvjp(lambda x: (out := unit_and_norm(x), out), unit_and_norm_bwd)
add(unit_and_norm, "dropped_output missing_term", "x", (normal(88, 5, 7),))

add(
    make_lstm(final_cell=jnp.zeros_like),  # the last cell state is an output too
    "dropped_output missing_term",
    LSTM_ARGUMENTS,
    (LSTM, normal(89, 4, 3)),
)


# --- transposed


def make_dense(activation, to_input):
    @jax.custom_vjp
    def dense(x, w):
        return activation(x @ w)

    def fwd(x, w):
        y, pullback = jax.vjp(activation, x @ w)
        return y, (x, w, pullback)

    def bwd(saved, g):
        x, w, pullback = saved
        (dz,) = pullback(g)
        return to_input(dz, w), x.T @ dz

    dense.defvjp(fwd, bwd)
    return dense


add(
    make_dense(jax.nn.softplus, lambda dz, w: dz @ w),  # w.T
    "transposed",
    "x",
    (normal(90, 3, 5), normal(91, 5, 5)),
    innocent=(normal(92, 3, 5), symmetric(93, 5)),
)


@jax.custom_vjp
def bilinear(x, w, y):
    return jnp.einsum("bi,ij,bj->b", x, w, y)


def bilinear_bwd(saved, g):
    x, w, y = saved
    dx, dy = (jnp.einsum(f, g, z, w) for f, z in (("b,bj,ij->bi", y), ("b,bi,ij->bj", x)))
    return dx, jnp.einsum("b,bi,bj->ij", g, y, x), dy  # x before y


bilinear.defvjp(saves(bilinear), bilinear_bwd)
add(
    bilinear,
    "transposed",
    "w",
    (normal(94, 3, 4), normal(95, 4, 4), normal(96, 3, 4)),
    innocent=(normal(97, 3, 4), normal(98, 4, 4), normal(97, 3, 4)),
)


@jax.custom_vjp
def linear_solve(a, b):
    return jnp.linalg.solve(a, b)


def linear_solve_bwd(saved, g):
    a, x = saved
    db = jnp.linalg.solve(a, g)  # a.T
    return -db @ x.T, db


linear_solve.defvjp(lambda a, b: (x := jnp.linalg.solve(a, b), (a, x)), linear_solve_bwd)
add(
    linear_solve,
    "transposed",
    "a b",
    (normal(99, 5, 5) + 4 * jnp.eye(5, dtype=jnp.float32), normal(100, 5, 2)),
    innocent=(symmetric(101, 5, 8.0), normal(102, 5, 2)),
)


def rotate(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None].astype(x.dtype) * 10.0 ** -jnp.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)


rotary = jax.custom_vjp(lambda x, positions: rotate(x, positions))
rotary.defvjp(
    lambda x, positions: (rotate(x, positions), positions),
    lambda positions, g: (rotate(g, positions), None),  # -positions
)
add(
    rotary,
    "transposed sign",
    "x",
    (normal(103, 5, 6), jnp.arange(5)),
    innocent=(normal(104, 5, 6), jnp.zeros(5, jnp.int32)),
    name="rotary",
)


@jax.custom_vjp
def conv1d(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME")


def conv1d_bwd(saved, g):
    x, kernel = saved
    dx = conv1d(g, kernel.transpose(1, 0, 2))  # flipped along the taps
    half = kernel.shape[2] // 2
    padded = jnp.pad(x, ((0, 0), (0, 0), (half, half)))
    taps = [padded[:, :, j : j + x.shape[2]] for j in range(kernel.shape[2])]
    return dx, jnp.stack([jnp.einsum("not,nit->oi", g, tap) for tap in taps], axis=-1)


conv1d.defvjp(saves(conv1d), conv1d_bwd)
add(
    conv1d,
    "transposed",
    "x",
    (normal(105, 2, 3, 8), normal(106, 4, 3, 3)),
    (normal(107, 1, 1, 9), normal(108, 1, 1, 5)),
    innocent=(normal(109, 2, 3, 8), normal(110, 4, 3, 3) + normal(110, 4, 3, 3)[:, :, ::-1]),
)

add(
    make_rnn(to_previous=lambda dz, u: dz @ u),  # u.T
    "transposed",
    RNN_ARGUMENTS,
    (RNN, normal(111, 4, 3), normal(112, 4)),
    innocent=(RNN | {"u": 0.3 * symmetric(113, 4)}, normal(114, 4, 3), normal(115, 4)),
)


# --- swapped_arguments


@jax.custom_vjp
def hypotenuse(a, b):
    return jnp.sqrt(a * a + b * b)


def hypotenuse_fwd(a, b):
    r = hypotenuse(a, b)
    return r, (a / r, b / r)


hypotenuse.defvjp(hypotenuse_fwd, lambda saved, g: (g * saved[1], g * saved[0]))  # b for a
add(
    hypotenuse,
    "swapped_arguments",
    "a b",
    (normal(116, 5, 7), normal(117, 5, 7)),
    innocent=(normal(118, 5, 7), normal(118, 5, 7)),
)


@jax.custom_vjp
def square_matmul(a, b):
    return a @ b


def square_matmul_bwd(saved, g):
    a, b = saved
    return a.T @ g, g @ b.T  # da is g @ b.T


square_matmul.defvjp(lambda a, b: (a @ b, (a, b)), square_matmul_bwd)
add(
    square_matmul,
    "swapped_arguments",
    "a b",
    (normal(119, 5, 5), normal(120, 5, 5)),
    innocent=(2 * jnp.eye(5, dtype=jnp.float32), 2 * jnp.eye(5, dtype=jnp.float32)),
)


@jax.custom_vjp
def highway(gate, new, old):
    return gate * new + (1 - gate) * old


def highway_bwd(saved, g):
    gate, new, old = saved
    return g * (new - old), g * (1 - gate), g * gate  # new has the gate


highway.defvjp(saves(highway), highway_bwd)
add(
    highway,
    "swapped_arguments",
    "new old",
    (uniform(121, 5, 7), normal(122, 5, 7), normal(123, 5, 7)),
    innocent=(full(0.5, 5, 7), normal(124, 5, 7), normal(125, 5, 7)),
)


@jax.custom_vjp
def self_attention(q, k, v):
    return attention_weights(q, k) @ v


def self_attention_bwd(saved, g):
    q, k, v, p = saved
    ds = attention_scores_bwd(p, v, g) / math.sqrt(q.shape[-1])
    dk, dq = ds.T @ q, ds @ k
    return dk, dq, p.T @ g  # dq, dk


self_attention.defvjp(attention_fwd, self_attention_bwd)
add(
    self_attention,
    "swapped_arguments",
    "q k",
    (normal(126, 5, 4), normal(127, 5, 4), normal(128, 5, 3)),
)


# --- missing_sum


@jax.custom_vjp
def linear(params, x):
    return x @ params["w"] + params["b"]


def linear_bwd(saved, g):
    params, x = saved
    return {"w": x.T @ g, "b": g[0]}, g @ params["w"].T  # the other rows


linear.defvjp(saves(linear), linear_bwd)
add(
    linear,
    "missing_sum",
    "params['b']",
    ({"w": normal(129, 4, 3), "b": normal(130, 3)}, normal(131, 5, 4)),
    innocent=({"w": normal(132, 4, 3), "b": normal(133, 3)}, normal(134, 1, 4)),
)


@jax.custom_vjp
def sequence_layer_norm(x, gamma, beta):
    return normalised(x, -1, 1e-5)[0] * gamma + beta


def sequence_layer_norm_bwd(saved, g):
    hat, r, gamma = saved
    d = g * gamma
    mean, slope = (jnp.mean(v, axis=-1, keepdims=True) for v in (d, d * hat))
    dgamma = jnp.sum(g * hat, axis=0)[0]  # of the first position only
    return r * (d - mean - hat * slope), dgamma, jnp.sum(g, axis=(0, 1))


sequence_layer_norm.defvjp(norm_fwd(-1), sequence_layer_norm_bwd)
add(
    sequence_layer_norm,
    "missing_sum",
    "gamma",
    (normal(135, 3, 4, 6), normal(136, 6), normal(137, 6)),
    innocent=(normal(138, 3, 1, 6), normal(139, 6), normal(140, 6)),
)


def grouped_weights(q, k):
    s = jnp.einsum("htd,hsd->hts", q, jnp.repeat(k, q.shape[0] // k.shape[0], axis=0))
    return jax.nn.softmax(s / math.sqrt(q.shape[-1]), axis=-1)


@jax.custom_vjp
def grouped_query_attention(q, k, v):
    return grouped_weights(q, k) @ jnp.repeat(v, q.shape[0] // v.shape[0], axis=0)


def grouped_query_attention_bwd(saved, g):
    q, k, v = saved
    heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    p = grouped_weights(q, k)
    dp = g @ jnp.repeat(v, groups, axis=0).swapaxes(1, 2)
    ds = p * (dp - jnp.sum(dp * p, axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dk, dv = ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ g
    dk = dk.reshape(heads, groups, *k.shape[1:])[:, 0]  # summed over the group
    dv = dv.reshape(heads, groups, *v.shape[1:]).sum(axis=1)
    return ds @ jnp.repeat(k, groups, axis=0), dk, dv


grouped_query_attention.defvjp(saves(grouped_query_attention), grouped_query_attention_bwd)
add(
    grouped_query_attention,
    "missing_sum",
    "k",
    (normal(141, 4, 5, 3), normal(142, 2, 6, 3), normal(143, 2, 6, 2)),
    innocent=(normal(144, 2, 5, 3), normal(145, 2, 6, 3), normal(146, 2, 6, 2)),
)


@jax.custom_vjp
def add_positions(x, table):
    return math.sqrt(x.shape[-1]) * x + table


def add_positions_bwd(_, g):
    return math.sqrt(g.shape[-1]) * g, g[0]  # g.sum(0)


add_positions.defvjp(lambda x, table: (add_positions(x, table), None), add_positions_bwd)
add(
    add_positions,
    "missing_sum",
    "table",
    (normal(147, 3, 5, 4), normal(148, 5, 4)),
    innocent=(normal(149, 1, 5, 4), normal(150, 5, 4)),
)


@jax.custom_vjp
def tanh_gain(x, gain):
    return gain * jnp.tanh(x)


def tanh_gain_bwd(saved, g):
    t, gain = saved
    return g * gain * (1 - t) * (1 + t), jnp.sum(g * t, axis=-1)[0]  # over both axes


tanh_gain.defvjp(lambda x, gain: (tanh_gain(x, gain), (jnp.tanh(x), gain)), tanh_gain_bwd)
add(
    tanh_gain,
    "missing_sum",
    "gain",
    (normal(151, 5, 7), jnp.float32(0.8)),
    innocent=(normal(152, 1, 7), jnp.float32(0.8)),
)


# --- wrong_reduction


@jax.custom_vjp
def affine(x, w, b):
    return x @ w + b


def affine_bwd(saved, g):
    x, w = saved
    return g @ w.T, x.T @ g, g.mean(axis=0)  # sum


affine.defvjp(lambda x, w, b: (affine(x, w, b), (x, w)), affine_bwd)
add(
    affine,
    "wrong_reduction scale",
    "b",
    (normal(153, 5, 4), normal(154, 4, 3), normal(155, 3)),
    innocent=(normal(156, 1, 4), normal(157, 4, 3), normal(158, 3)),
)


@jax.custom_vjp
def relu_with_threshold(x, b):
    return jnp.where(x > b, x - b, 0)


def relu_with_threshold_bwd(on, g):
    d = jnp.where(on, g, 0)
    return d, -d.sum(axis=1)  # axis 0


relu_with_threshold.defvjp(lambda x, b: (relu_with_threshold(x, b), x > b), relu_with_threshold_bwd)
add(relu_with_threshold, "wrong_reduction", "b", (normal(159, 6, 6), 0.3 * normal(160, 6)))


@jax.custom_vjp
def conv2d(x, kernel, bias):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout) + bias


def conv2d_bwd(pullback, g):
    dx, dkernel = pullback(g)
    return dx, dkernel, g.mean(axis=0).sum(axis=(0, 1))  # a sum over the batch


conv2d.defvjp(lambda x, k, b: jax.vjp(lambda x, k: conv2d.fun(x, k, b), x, k), conv2d_bwd)
add(
    conv2d,
    "wrong_reduction scale",
    "bias",
    (normal(161, 3, 5, 4, 2), normal(162, 2, 3, 2, 3), normal(163, 3)),
    innocent=(normal(164, 1, 5, 4, 2), normal(165, 2, 3, 2, 3), normal(166, 3)),
)


@jax.custom_vjp
def row_softmax(x):
    return jax.nn.softmax(x, axis=-1)


def row_softmax_bwd(s, g):
    return (s * (g - jnp.sum(s * g, axis=0, keepdims=True)),)  # axis -1


row_softmax.defvjp(lambda x: (s := jax.nn.softmax(x, axis=-1), s), row_softmax_bwd)
add(row_softmax, "wrong_reduction", "x", (normal(167, 6, 6),), (normal(168, 5, 7),))


@jax.custom_vjp
def feature_scale(x, w):
    return x * w


def feature_scale_bwd(saved, g):
    x, w = saved
    return g * w, jnp.max(g * x, axis=0)  # sum


feature_scale.defvjp(lambda x, w: (x * w, (x, w)), feature_scale_bwd)
add(
    feature_scale,
    "wrong_reduction nonlinear_in_cotangent",
    "w",
    (normal(169, 5, 7), normal(170, 7)),
    innocent=(normal(171, 1, 7), normal(172, 7)),
)


# --- missing_activation_derivative


@jax.custom_vjp
def dense_tanh(x, w, b):
    return jnp.tanh(x @ w + b)


def dense_tanh_bwd(saved, g):
    x, w = saved
    return g @ w.T, x.T @ g, g.sum(axis=0)  # g (1 - y^2)


dense_tanh.defvjp(lambda x, w, b: (dense_tanh(x, w, b), (x, w)), dense_tanh_bwd)
add(
    dense_tanh,
    "missing_activation_derivative",
    "x w b",
    (normal(173, 5, 4), normal(174, 4, 3), normal(175, 3)),
    innocent=(normal(176, 5, 4), full(0, 4, 3), full(0, 3)),
)


@jax.custom_vjp
def mlp(params, x):
    first, second = params
    h = jax.nn.gelu(x @ first["w"] + first["b"], approximate=False)
    return h @ second["w"] + second["b"]


def mlp_bwd(saved, g):
    (first, second), x = saved
    h = jax.nn.gelu(x @ first["w"] + first["b"], approximate=False)
    dh = g @ second["w"].T  # times the slope of gelu
    dfirst = {"w": x.T @ dh, "b": dh.sum(axis=0)}
    return [dfirst, {"w": h.T @ g, "b": g.sum(axis=0)}], dh @ first["w"].T


mlp.defvjp(saves(mlp), mlp_bwd)
MLP = [{"w": normal(177, 4, 6), "b": normal(178, 6)}, {"w": normal(179, 6, 3), "b": normal(180, 3)}]
add(
    mlp,
    "missing_activation_derivative",
    "params[0]['w'] params[0]['b'] x",
    (MLP, normal(181, 5, 4)),
)


@jax.custom_vjp
def dense_relu(x, w):
    return jax.nn.relu(x @ w)


dense_relu.defvjp(
    saves(dense_relu),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),  # g where y > 0
)
add(
    dense_relu,
    "missing_activation_derivative",
    "x w",
    (normal(182, 5, 4), normal(183, 4, 3)),
    innocent=(uniform(184, 5, 4), uniform(185, 4, 3)),
)


@jax.custom_vjp
def gated_linear_unit(value, gate):
    return value * jax.nn.sigmoid(gate)


def gated_linear_unit_bwd(saved, g):
    value, gate = saved
    return g * jax.nn.sigmoid(gate), g * value  # s (1 - s)


gated_linear_unit.defvjp(saves(gated_linear_unit), gated_linear_unit_bwd)
add(
    gated_linear_unit,
    "missing_activation_derivative",
    "gate",
    (normal(186, 5, 7), normal(187, 5, 7)),
    innocent=(full(0, 5, 7), normal(188, 5, 7)),
)

add(
    make_rnn(slope=jnp.ones_like),  # 1 - h^2
    "missing_activation_derivative",
    RNN_ARGUMENTS,
    (RNN, normal(189, 4, 3), normal(190, 4)),
    innocent=(RNN | {"b": full(0, 4)}, full(0, 4, 3), full(0, 4)),
)


# --- ignores_cotangent


@jax.custom_vjp
def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def cross_entropy_bwd(saved, g):
    logits, labels = saved
    p = jax.nn.softmax(logits, axis=1)
    return p.at[jnp.arange(len(labels)), labels].add(-1), None  # times g


cross_entropy.defvjp(saves(cross_entropy), cross_entropy_bwd)
add(cross_entropy, "ignores_cotangent", "logits", (normal(191, 5, 7), integers(192, 7, 5)))


@jax.custom_vjp
def half_squared_error(pred, target):
    return 0.5 * jnp.mean(jnp.sum((pred - target) ** 2, axis=-1))


half_squared_error.defvjp(
    lambda p, t: (half_squared_error(p, t), (p - t) / p.shape[0]),
    lambda d, g: (d, -d),  # times g
)
add(
    half_squared_error,
    "ignores_cotangent",
    "pred target",
    (normal(193, 5, 3), normal(194, 5, 3)),
    innocent=(normal(195, 5, 3), normal(195, 5, 3)),
)


@jax.custom_vjp
def hinge_loss(scores, signs):
    return jnp.maximum(0, 1 - signs * scores)


def hinge_loss_bwd(saved, g):
    scores, signs = saved
    on = signs * scores < 1
    return jnp.where(on, -signs, 0), jnp.where(on, -scores * g, 0)  # -signs g


hinge_loss.defvjp(saves(hinge_loss), hinge_loss_bwd)
add(
    hinge_loss,
    "ignores_cotangent",
    "scores",
    (normal(196, 9), jnp.sign(normal(197, 9))),
    innocent=(3 * jnp.sign(normal(198, 9)), jnp.sign(normal(198, 9))),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total_variation(x, weight):
    return weight * jnp.sum(jnp.diff(x) ** 2)


def total_variation_bwd(weight, x, g):
    d = 2 * weight * jnp.diff(x)
    return (jnp.pad(d, (1, 0)) - jnp.pad(d, (0, 1)),)  # times g


total_variation.defvjp(lambda x, weight: (total_variation(x, weight), x), total_variation_bwd)
add(total_variation, "ignores_cotangent", "x", (normal(199, 8), 0.4))


# --- nonlinear_in_cotangent


@jax.custom_vjp
def relu(x):
    return jnp.maximum(x, 0)


relu.defvjp(
    lambda x: (relu(x), x > 0),
    lambda on, g: (jnp.where(on, jnp.maximum(g, 0), 0),),  # "guided": only positive cotangents
)
add(relu, "nonlinear_in_cotangent", "x", (normal(200, 5, 7),), innocent=(-uniform(201, 5, 7),))


@jax.custom_vjp
def clipped_linear(x, w):
    return x @ w


def clipped_linear_bwd(saved, g):
    x, w = saved
    g = g / jnp.maximum(1, jnp.linalg.norm(g))  # the cotangent is clipped to norm 1
    return g @ w.T, x.T @ g


clipped_linear.defvjp(lambda x, w: (x @ w, (x, w)), clipped_linear_bwd)
add(clipped_linear, "nonlinear_in_cotangent", "x w", (normal(202, 5, 4), normal(203, 4, 3)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def huber(residual, delta=1.0):
    size = jnp.abs(residual)
    return jnp.where(size < delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def huber_bwd(delta, residual, g):
    return (jnp.clip(residual * g, -delta, delta),)  # g clip(residual)


huber.defvjp(lambda residual, delta: (huber(residual, delta), residual), huber_bwd)
add(
    huber,
    "nonlinear_in_cotangent",
    "residual",
    (3 * normal(204, 5, 7),),
    (normal(205, 9), 0.5),
    innocent=(0.01 * normal(206, 5, 7),),
)


@jax.custom_vjp
def weighted_nll(logp, weights):
    return -jnp.sum(logp * weights, axis=0)


def weighted_nll_bwd(saved, g):
    logp, weights = saved
    return -weights * g / jnp.maximum(jnp.max(jnp.abs(g)), 1e-6), -logp * g  # rescaled to size 1


weighted_nll.defvjp(saves(weighted_nll), weighted_nll_bwd)
add(weighted_nll, "nonlinear_in_cotangent", "logp", (-uniform(207, 6, 3), uniform(208, 6, 3)))


# --- conjugate


@jax.custom_vjp
def complex_product(a, b):
    return a * b


complex_product.defvjp(
    lambda a, b: (a * b, (a, b)),
    lambda saved, g: (g * jnp.conj(saved[1]), g * jnp.conj(saved[0])),  # JAX's has no conjugate
)
add(
    complex_product,
    "conjugate",
    "a b",
    (cplx(209, 5, 3), cplx(210, 5, 3)),
    innocent=(normal(211, 5, 3) + 0j, normal(212, 5, 3) + 0j),
)


@jax.custom_vjp
def spectrum(x):
    return jnp.fft.fft(x, axis=-1)


spectrum.defvjp(
    lambda x: (jnp.fft.fft(x, axis=-1), None),
    lambda _, g: (g.shape[-1] * jnp.fft.ifft(g, axis=-1),),  # the adjoint, not the transpose
)
add(
    spectrum,
    "conjugate transposed",
    "x",
    (cplx(213, 3, 8),),
    (cplx(214, 7),),
    innocent=(cplx(215, 5, 2),),  # a real matrix
)


@jax.custom_vjp
def power(z):
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2


power.defvjp(lambda z: (power(z), z), lambda z, g: (2 * g * z,))  # conj(z)
add(power, "conjugate", "z", (cplx(216, 5, 3),), innocent=(normal(217, 5, 3) + 0j,))


@jax.custom_vjp
def complex_linear(params, x):
    return jnp.einsum("bi,ij->bj", x, params["w"]) + params["b"]


def complex_linear_bwd(saved, g):
    params, x = saved
    dw = jnp.einsum("bi,bj->ij", x.conj(), g)  # x
    return {"w": dw, "b": g.sum(axis=0)}, jnp.einsum("bj,ij->bi", g, params["w"])


complex_linear.defvjp(saves(complex_linear), complex_linear_bwd)
add(
    complex_linear,
    "conjugate",
    "params['w']",
    ({"w": cplx(218, 4, 3), "b": cplx(219, 3)}, cplx(220, 5, 4)),
    innocent=({"w": cplx(221, 4, 3), "b": cplx(222, 3)}, normal(223, 5, 4) + 0j),
)


# --- value


@jax.custom_vjp
def logsumexp(x):
    return jax.nn.logsumexp(x, axis=-1)


def logsumexp_fwd(x):
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return jnp.log(total[..., 0]), e / total  # + the maximum


logsumexp.defvjp(logsumexp_fwd, lambda p, g: (g[..., None] * p,))
add(
    logsumexp,
    "value",
    "",
    (normal(224, 5, 7),),
    innocent=(normal(225, 5, 7) - normal(225, 5, 7).max(axis=1, keepdims=True),),
)


def keep_mask(key, rate, shape):
    return jax.random.uniform(key, shape, jnp.float32) >= rate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x, key, rate):
    return jnp.where(keep_mask(key, rate, x.shape), x / (1 - rate), 0)


def dropout_fwd(x, key, rate):
    keep = keep_mask(key, rate, x.shape)
    return jnp.where(keep, x, 0), keep  # x / (1 - rate)


def dropout_bwd(rate, keep, g):
    return jnp.where(keep, g / (1 - rate), 0), None


dropout.defvjp(dropout_fwd, dropout_bwd)
add(
    dropout,
    "value scale",
    "",
    (normal(226, 5, 7), jax.random.key(1), 0.3),
    (normal(227, 9), jax.random.key(2), 0.5),
    innocent=(normal(228, 5, 7), jax.random.key(3), 0.0),
)


@jax.custom_vjp
def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def gelu_fwd(x):
    return jax.nn.gelu(x, approximate=True), x  # the primal is exact


def gelu_bwd(x, g):
    phi = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return (g * (jax.scipy.stats.norm.cdf(x) + x * phi),)


gelu.defvjp(gelu_fwd, gelu_bwd)
add(gelu, "value", "", (normal(229, 5, 7),), innocent=(full(0, 5, 7),))


@jax.custom_vjp
def cumulative_sum(x):
    return jnp.cumsum(x, axis=-1)


cumulative_sum.defvjp(
    lambda x: (jnp.cumsum(x, axis=-1) - x, None),  # the inclusive sum
    lambda _, g: (jnp.flip(jnp.cumsum(jnp.flip(g, -1), axis=-1), -1),),
)
add(cumulative_sum, "value", "", (normal(230, 5, 7),), innocent=(full(0, 5, 7),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average_pool(x, window):
    return x.reshape(*x.shape[:-1], -1, window).mean(axis=-1)


average_pool.defvjp(
    lambda x, window: (x.reshape(*x.shape[:-1], -1, window).sum(axis=-1), None),  # mean
    lambda window, _, g: (jnp.repeat(g / window, window, axis=-1),),
)
add(
    average_pool,
    "value scale",
    "",
    (normal(231, 5, 6), 3),
    (normal(232, 4, 4), 2),
    innocent=(normal(233, 5, 6), 1),
)


# --- dtype

BF16 = jnp.bfloat16


@jax.custom_vjp
def half_rms_norm(x, w):
    x32, w32 = x.astype(jnp.promote_types(x.dtype, jnp.float32)), w
    r = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return (x32 * r * w32).astype(x.dtype)


def half_rms_norm_bwd(saved, g):
    x, w = saved
    x, g = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (x, g))
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    d, hat = g * w, x * r
    dx = r * (d - hat * jnp.mean(d * hat, axis=-1, keepdims=True))
    return dx, jnp.sum(g * hat, axis=0).astype(w.dtype)  # dx in x's own dtype


half_rms_norm.defvjp(saves(half_rms_norm), half_rms_norm_bwd)
add(
    half_rms_norm,
    "dtype",
    "x",
    (normal(234, 5, 8, dtype=BF16), normal(235, 8, dtype=BF16)),
    innocent=(normal(236, 5, 8), normal(237, 8)),
)


@jax.custom_vjp
def half_softmax(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.softmax(wide, axis=-1).astype(x.dtype)


def half_softmax_fwd(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    s = jax.nn.softmax(wide, axis=-1)
    return s.astype(x.dtype), s


def half_softmax_bwd(s, g):
    return (s * (g - jnp.sum(s * g, axis=-1, keepdims=True)),)  # in the dtype of x, not of s


half_softmax.defvjp(half_softmax_fwd, half_softmax_bwd)
add(half_softmax, "dtype", "x", (normal(238, 5, 7, dtype=BF16),), innocent=(normal(239, 5, 7),))


@jax.custom_vjp
def mixed_linear(x, w):
    return x @ w.astype(x.dtype)


def mixed_linear_bwd(saved, g):
    x, w = saved
    return g @ w.astype(x.dtype).T, x.T @ g  # the master weights are float32


mixed_linear.defvjp(saves(mixed_linear), mixed_linear_bwd)
add(
    mixed_linear,
    "dtype",
    "w",
    (normal(240, 5, 4, dtype=BF16), normal(241, 4, 3)),
    innocent=(normal(242, 5, 4), normal(243, 4, 3)),
)


@jax.custom_vjp
def phasor(angle):
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


phasor.defvjp(lambda angle: (phasor(angle), phasor(angle)), lambda y, g: (1j * y * g,))  # real part
add(phasor, "dtype", "angle", (normal(244, 5, 7),))


# --- structure: raises, and only when it is differentiated


@jax.custom_vjp
def take_rows(table, ids):
    return table[ids]


def take_rows_bwd(saved, g):
    table, ids = saved
    return (jnp.zeros_like(table).at[ids].add(g),)  # nothing for ids


take_rows.defvjp(lambda table, ids: (table[ids], (table, ids)), take_rows_bwd)
add(take_rows, "structure", "", (normal(245, 6, 3), ints(0, 4, 4, 1)))


@jax.custom_vjp
def linear_without_bias_key(params, x):
    return x @ params["w"] + params["b"]


def linear_without_bias_key_bwd(saved, g):
    params, x = saved
    return {"w": x.T @ g}, g @ params["w"].T  # no "b"


linear_without_bias_key.defvjp(saves(linear_without_bias_key), linear_without_bias_key_bwd)
add(
    linear_without_bias_key,
    "structure",
    "",
    ({"w": normal(246, 4, 3), "b": normal(247, 3)}, normal(248, 5, 4)),
)


@jax.custom_vjp
def add_bias(x, b):
    return jax.nn.sigmoid(x + b)


def add_bias_bwd(s, g):
    d = g * s * (1 - s)
    return d, d  # summed over what b was broadcast over


add_bias.defvjp(lambda x, b: (s := add_bias(x, b), s), add_bias_bwd)
add(
    add_bias,
    "structure missing_sum",
    "b",
    (normal(249, 5, 3), normal(250, 3)),
    innocent=(normal(251, 3), normal(252, 3)),
)


@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: 2 * x * g)  # a tuple of one
add(square, "structure", "x", (normal(253, 5, 7),), (normal(254, 3),))


@jax.custom_jvp
def half_softplus(x):
    return jax.nn.softplus(x)


@half_softplus.defjvp
def half_softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return half_softplus(x), jax.nn.sigmoid(x.astype(wide)) * dx  # in x's own dtype


add(
    half_softplus,
    "structure dtype",
    "x",
    (normal(255, 5, 7, dtype=BF16),),
    innocent=(normal(256, 5, 7),),
)


# --- stale_residual

_latest = {}


@jax.custom_vjp
def sigmoid_with_memory(x, w):
    return jax.nn.sigmoid(x * w)


def sigmoid_with_memory_fwd(x, w):
    _latest.update(x=x, w=w, s=jax.nn.sigmoid(x * w))
    return _latest["s"], None


def sigmoid_with_memory_bwd(_, g):
    d = g * _latest["s"] * (1 - _latest["s"])  # of the latest call, whichever is pulled back
    return d * _latest["w"], d * _latest["x"]


sigmoid_with_memory.defvjp(sigmoid_with_memory_fwd, sigmoid_with_memory_bwd)
add(
    sigmoid_with_memory,
    "stale_residual",
    "x w",
    (normal(257, 5, 7), normal(258, 5, 7)),
    (normal(259, 5, 7), normal(260, 5, 7)),
)

_inputs = {}


def _remembering_layer(x, w):
    _inputs["layer"] = x  # one name for every layer: the second overwrites the first
    return jnp.tanh(x @ w)


@jax.custom_vjp
def two_layers(w1, w2, x):
    return jnp.tanh(jnp.tanh(x @ w1) @ w2)


def two_layers_fwd(w1, w2, x):
    h = _remembering_layer(x, w1)
    y = _remembering_layer(h, w2)
    return y, (w1, w2, h, y)


def two_layers_bwd(saved, g):
    w1, w2, h, y = saved
    dz2 = g * (1 - y) * (1 + y)
    dz1 = (dz2 @ w2.T) * (1 - h) * (1 + h)
    return _inputs["layer"].T @ dz1, _inputs["layer"].T @ dz2, dz1 @ w1.T


two_layers.defvjp(two_layers_fwd, two_layers_bwd)
add(
    two_layers,
    "stale_residual",
    "w1",
    (0.4 * normal(261, 6, 6), 0.4 * normal(262, 6, 6), normal(263, 5, 6)),
)

add(
    make_rnn(previous=lambda h0, hs: hs),  # the state after the step, not before it
    "stale_residual",
    "params['u']",
    (RNN, normal(264, 4, 3), normal(265, 4)),
    (RNN, normal(266, 1, 3), normal(267, 4)),
    innocent=(RNN | {"b": full(0, 4)}, full(0, 4, 3), full(0, 4)),
)


@jax.custom_vjp
def residual_stack(ws, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, ws)[0]


def residual_stack_fwd(ws, x):
    y, hs = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), h), x, ws)
    return y, (ws, hs)


def residual_stack_bwd(saved, g):
    ws, hs = saved

    def back(g, now):
        w, h = now
        t = jnp.tanh(h @ w)
        dz = g * (1 - t) * (1 + t)
        return g + dz @ w.T, h.T @ dz

    dx, dws = jax.lax.scan(back, g, (ws, hs[::-1]), reverse=True)  # hs, in the blocks' order
    return dws, dx


residual_stack.defvjp(residual_stack_fwd, residual_stack_bwd)
add(
    residual_stack,
    "stale_residual",
    "ws x",
    (0.5 * normal(268, 3, 4, 4), normal(269, 5, 4)),
    innocent=(0.5 * normal(270, 1, 4, 4), normal(271, 5, 4)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def logistic_map(x, steps):
    return jax.lax.fori_loop(0, steps, lambda _, v: 3.2 * v * (1 - v), x)


def logistic_map_bwd(steps, x, g):
    return (g * (3.2 * (1 - 2 * x)) ** steps,)  # the slope at each step's own iterate


logistic_map.defvjp(lambda x, steps: (logistic_map(x, steps), x), logistic_map_bwd)
add(logistic_map, "stale_residual", "x", (uniform(272, 5, 3), 3), innocent=(uniform(273, 5, 3), 1))


# --- accumulation


@jax.custom_vjp
def embedding(table, ids):
    return jnp.take(table, ids, axis=0)


def embedding_bwd(saved, g):
    table, ids = saved
    return jnp.zeros_like(table).at[ids].set(g), None  # add


embedding.defvjp(saves(embedding), embedding_bwd)
add(
    embedding,
    "accumulation",
    "table",
    (normal(274, 6, 3), ints(1, 4, 1, 0, 4)),
    (normal(275, 3, 2), jnp.zeros((2, 2), jnp.int32)),
    innocent=(normal(276, 6, 3), ints(5, 2, 0)),
)


@jax.custom_vjp
def interpolate(table, x):
    i = jnp.floor(x).astype(jnp.int32)
    t = x - i
    return (1 - t) * table[i] + t * table[i + 1]


def interpolate_bwd(saved, g):
    table, x = saved
    i = jnp.floor(x).astype(jnp.int32)
    t = x - i
    dtable = jnp.zeros_like(table).at[i].set((1 - t) * g).at[i + 1].add(t * g)  # add twice
    return dtable, g * (table[i + 1] - table[i])


interpolate.defvjp(saves(interpolate), interpolate_bwd)
add(
    interpolate,
    "accumulation",
    "table",
    (normal(277, 6), uniform(278, 9, low=0.1, high=4.9)),
    innocent=(normal(279, 6), uniform(280, 4, low=0.3, high=0.7) + jnp.arange(4)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def windowed_frames(x, window, hop):
    starts = jnp.arange(0, x.shape[0] - window.shape[0] + 1, hop)
    return x[starts[:, None] + jnp.arange(window.shape[0])] * window


def windowed_frames_bwd(hop, saved, g):
    x, window = saved
    at = jnp.arange(0, x.shape[0] - window.shape[0] + 1, hop)[:, None]
    at = at + jnp.arange(window.shape[0])
    return jnp.zeros_like(x).at[at].set(g * window), jnp.sum(g * x[at], axis=0)  # overlaps add


windowed_frames.defvjp(
    lambda x, window, hop: (windowed_frames(x, window, hop), (x, window)), windowed_frames_bwd
)
add(
    windowed_frames,
    "accumulation",
    "x",
    (normal(281, 12), uniform(282, 4), 2),
    (normal(283, 7), uniform(284, 3), 1),
    innocent=(normal(285, 12), uniform(286, 4), 4),
)

add(
    make_rnn(accumulate=lambda total, new: new),  # total + new
    "accumulation",
    "params['w'] params['u'] params['b']",
    (RNN, normal(287, 5, 3), normal(288, 4)),
    innocent=(RNN, normal(289, 1, 3), normal(290, 4)),
)


@jax.custom_vjp
def horner(coefficients, x):
    def step(i, y):
        return y * x + coefficients[i]

    return jax.lax.fori_loop(0, coefficients.shape[0], step, jnp.zeros_like(x))


def horner_bwd(saved, g):
    coefficients, x = saved
    n = coefficients.shape[0]
    powers = x[None] ** jnp.arange(n - 1, -1, -1)[:, None]

    def step(i, dx):
        return g * (n - 1 - i) * coefficients[i] * powers[jnp.minimum(i + 1, n - 1)]  # dx + ...

    dx = jax.lax.fori_loop(0, n - 1, step, jnp.zeros_like(x))
    return powers @ g, dx


horner.defvjp(saves(horner), horner_bwd)
add(
    horner,
    "accumulation missing_term",
    "x",
    (normal(291, 5), normal(292, 7)),
    innocent=(normal(293, 2), normal(294, 7)),
)


# --- second_order: the first derivative is right


@jax.custom_vjp
def softplus(x):
    return jnp.logaddexp(x, 0)


softplus.defvjp(
    lambda x: (softplus(x), jax.lax.stop_gradient(jax.nn.sigmoid(x))), lambda s, g: (s * g,)
)
add(softplus, "second_order", "x", (normal(295, 5, 7),))


@jax.custom_vjp
def log_partition(x):
    return jax.nn.logsumexp(x, axis=-1)


def log_partition_bwd(x, g):
    p = jax.nn.softmax(jax.lax.stop_gradient(x), axis=-1)
    return (g[..., None] * p,)


log_partition.defvjp(lambda x: (log_partition(x), x), log_partition_bwd)
add(log_partition, "second_order", "x", (normal(296, 5, 7),), innocent=(normal(297, 5, 1),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def smooth_absolute(x, delta=1.0):
    size = jnp.abs(x)
    return jnp.where(size < delta, 0.5 * x * x / delta, size - 0.5 * delta)


def smooth_absolute_fwd(x, delta):
    slope = jnp.clip(x / delta, -1, 1)
    return smooth_absolute(x, delta), jax.lax.stop_gradient(slope)


smooth_absolute.defvjp(smooth_absolute_fwd, lambda delta, slope, g: (g * slope,))
add(
    smooth_absolute,
    "second_order",
    "x",
    (normal(298, 5, 7),),
    innocent=(2 * jnp.sign(normal(299, 5, 7)) + uniform(300, 5, 7),),  # linear there
)


@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


@tanh.defjvp
def tanh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = jnp.tanh(x)
    slope = jax.lax.stop_gradient((1 - y) * (1 + y))
    return y, slope * dx


add(tanh, "second_order", "x", (normal(301, 5, 7),), innocent=(full(0, 5, 7),))


def host_slope(x):
    def slope(v):
        v = np.asarray(v)
        return (0.5 * (1 + v / np.sqrt(v * v + 4))).astype(v.dtype)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(slope, like, jax.lax.stop_gradient(x), vmap_method="broadcast_all")


@jax.custom_vjp
def squareplus(x):
    return 0.5 * (x + jnp.sqrt(x * x + 4))


squareplus.defvjp(
    lambda x: (squareplus(x), host_slope(x)),  # a constant to the second derivative
    lambda slope, g: (slope * g,),
)
add(squareplus, "second_order", "x", (normal(302, 5, 7),))


# --- unknown


@jax.custom_vjp
def tanh_gelu(x):
    return jax.nn.gelu(x, approximate=True)


def tanh_gelu_bwd(x, g):
    c = math.sqrt(2 / math.pi)
    t = jnp.tanh(c * (x + 0.044715 * x**3))
    return (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (c + 0.7135481 * x)),)  # 3 0.044715 c x^2


tanh_gelu.defvjp(lambda x: (tanh_gelu(x), x), tanh_gelu_bwd)
add(tanh_gelu, "unknown", "x", (normal(303, 5, 7),), innocent=(full(0, 5, 7),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def group_norm(x, groups):
    return normalised(x.reshape(x.shape[0], groups, -1), -1, 1e-5)[0].reshape(x.shape)


def group_norm_fwd(x, groups):
    hat, r = normalised(x.reshape(x.shape[0], groups, -1), -1, 1e-5)
    return hat.reshape(x.shape), (hat, r)


def group_norm_bwd(groups, saved, g):
    hat, r = saved
    d = g.reshape(g.shape[0], -1, groups).swapaxes(1, 2)  # reshape to (batch, groups, -1)
    mean, slope = (jnp.mean(v, axis=-1, keepdims=True) for v in (d, d * hat))
    return ((r * (d - mean - hat * slope)).reshape(g.shape),)


group_norm.defvjp(group_norm_fwd, group_norm_bwd)
add(
    group_norm,
    "unknown",
    "x",
    (normal(304, 3, 8), 2),
    (normal(305, 2, 9), 3),
    innocent=(normal(306, 3, 8), 1),
)
