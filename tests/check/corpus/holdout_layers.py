"""Wrong rules by other hands: losses, layers, attention, sequences, linear algebra."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax

from .entry import Wrong
from .holdout_values import add_wrong, dominant, integers, normal, positive, symmetric

ENTRIES: list[Wrong] = []
wrong = partial(add_wrong, ENTRIES)


# Losses and log-densities.


@jax.custom_vjp
def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) over the last axis."""
    return 0.5 * jnp.sum(jnp.exp(logvar) + mu**2 - 1.0 - logvar, axis=-1)


def gaussian_kl_fwd(mu, logvar):
    return gaussian_kl(mu, logvar), (mu, logvar)


def gaussian_kl_bwd(res, g):
    mu, logvar = res
    g = g[..., None]
    return g * mu, 0.5 * g * (1.0 - jnp.exp(logvar))


gaussian_kl.defvjp(gaussian_kl_fwd, gaussian_kl_bwd)
wrong(
    "kl_logvar_sign",
    gaussian_kl,
    (normal(1, 3, 4), normal(2, 3, 4)),
    (normal(3, 5), normal(4, 5)),
    causes="sign",
    of=["logvar"],
)


@jax.custom_vjp
def mean_squared_error(pred, target):
    return jnp.mean((pred - target) ** 2)


def mean_squared_error_fwd(pred, target):
    return mean_squared_error(pred, target), pred - target


def mean_squared_error_bwd(diff, g):
    return 2.0 * g * diff, -2.0 * g * diff


mean_squared_error.defvjp(mean_squared_error_fwd, mean_squared_error_bwd)
wrong(
    "mse_sum_for_mean",
    mean_squared_error,
    (normal(5, 4, 3), normal(6, 4, 3)),
    causes="scale wrong_reduction",
    of=["pred", "target"],
    innocent=(normal(7, 1), normal(8, 1)),
)


@jax.custom_vjp
def tempered_log_softmax(logits, temperature):
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def tempered_log_softmax_fwd(logits, temperature):
    logp = tempered_log_softmax(logits, temperature)
    return logp, (logp, logits, temperature)


def tempered_log_softmax_bwd(res, g):
    logp, logits, temperature = res
    dz = g - jnp.exp(logp) * jnp.sum(g, axis=-1, keepdims=True)
    return dz, -jnp.sum(dz * logits) / temperature**2


tempered_log_softmax.defvjp(tempered_log_softmax_fwd, tempered_log_softmax_bwd)
wrong(
    "temperature_forgotten",
    tempered_log_softmax,
    (normal(9, 3, 5), jnp.float32(0.7)),
    causes="scale",
    of=["logits"],
    innocent=(normal(10, 3, 5), jnp.float32(1.0)),
)


@jax.custom_vjp
def nll(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def nll_fwd(logits, labels):
    return nll(logits, labels), (jax.nn.softmax(logits), labels)


def nll_bwd(res, g):
    p, labels = res
    return (p - jax.nn.one_hot(labels, p.shape[1])) / len(labels), None


nll.defvjp(nll_fwd, nll_bwd)
wrong(
    "nll_seed_of_one",
    nll,
    (normal(11, 6, 4), integers(12, 4, 6)),
    causes="ignores_cotangent",
    of=["logits"],
)


def smoothed(labels, classes, smoothing):
    """One-hot targets mixed with the uniform distribution."""
    return (1.0 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes


def smoothed_cross_entropy_plain(logits, labels, smoothing):
    targets = smoothed(labels, logits.shape[-1], smoothing)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


smoothed_cross_entropy = jax.custom_vjp(smoothed_cross_entropy_plain, nondiff_argnums=(2,))


def smoothed_cross_entropy_fwd(logits, labels, smoothing):
    return smoothed_cross_entropy_plain(logits, labels, smoothing), (logits, labels)


def smoothed_cross_entropy_bwd(smoothing, res, g):
    logits, labels = res
    hard = jax.nn.one_hot(labels, logits.shape[-1])
    return g[:, None] * (jax.nn.softmax(logits) - hard), None


smoothed_cross_entropy.defvjp(smoothed_cross_entropy_fwd, smoothed_cross_entropy_bwd)
wrong(
    "label_smoothing_absent",
    smoothed_cross_entropy,
    (normal(13, 4, 5), integers(14, 5, 4), 0.2),
    causes="missing_term elements",
    of=["logits"],
    innocent=(normal(15, 4, 5), integers(16, 5, 4), 0.0),
)


@jax.custom_vjp
def token_cross_entropy(logits, labels):
    """Summed over tokens; a label of -100 is padding."""
    valid = labels >= 0
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, jnp.where(valid, labels, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(valid, picked, 0.0))


def token_cross_entropy_fwd(logits, labels):
    return token_cross_entropy(logits, labels), (logits, labels)


def token_cross_entropy_bwd(res, g):
    logits, labels = res
    return g * (jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[1])), None


token_cross_entropy.defvjp(token_cross_entropy_fwd, token_cross_entropy_bwd)
wrong(
    "padding_tokens_pushed",
    token_cross_entropy,
    (normal(17, 5, 4), jnp.array([1, -100, 3, 0, -100])),
    causes="elements",
    of=["logits"],
    innocent=(normal(18, 5, 4), jnp.array([1, 2, 3, 0, 2])),
)


@jax.custom_vjp
def hinge(scores, labels):
    """max(0, 1 - label * score) for labels of -1 and 1."""
    return jnp.maximum(0.0, 1.0 - labels * scores)


def hinge_fwd(scores, labels):
    return hinge(scores, labels), (scores, labels)


def hinge_bwd(res, g):
    scores, labels = res
    active = labels * scores < 1.0
    return jnp.where(active, -g, 0.0), jnp.where(active, -g * scores, 0.0)


hinge.defvjp(hinge_fwd, hinge_bwd)
wrong(
    "hinge_label_forgotten",
    hinge,
    (normal(19, 6), jnp.array([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])),
    causes="sign elements scale",
    of=["scores"],
    innocent=(normal(20, 6), jnp.ones(6)),
)


def huber_plain(residual, delta):
    a = jnp.abs(residual)
    return jnp.where(a <= delta, 0.5 * residual**2, delta * (a - 0.5 * delta))


huber = jax.custom_vjp(huber_plain, nondiff_argnums=(1,))


def huber_fwd(residual, delta):
    return huber_plain(residual, delta), residual


def huber_bwd(delta, residual, g):
    return (jnp.clip(g * residual, -delta, delta),)


huber.defvjp(huber_fwd, huber_bwd)
wrong(
    "huber_bound_after_product",
    huber,
    (normal(21, 8), 0.5),
    causes="nonlinear_in_cotangent",
    of=["residual"],
)


@jax.custom_vjp
def weighted_mean_loss(losses, weights):
    return jnp.sum(weights * losses) / jnp.sum(weights)


def weighted_mean_loss_fwd(losses, weights):
    out = weighted_mean_loss(losses, weights)
    return out, (losses, weights, out)


def weighted_mean_loss_bwd(res, g):
    losses, weights, out = res
    return g * weights / losses.size, g * (losses - out) / jnp.sum(weights)


weighted_mean_loss.defvjp(weighted_mean_loss_fwd, weighted_mean_loss_bwd)
wrong(
    "weighted_mean_by_count",
    weighted_mean_loss,
    (positive(22, 7), positive(23, 7)),
    causes="scale wrong_reduction",
    of=["losses"],
    innocent=(positive(24, 7), jnp.ones(7)),
)


@jax.custom_vjp
def normal_logpdf(x, loc, scale):
    z = (x - loc) / scale
    return -0.5 * z**2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


def normal_logpdf_fwd(x, loc, scale):
    return normal_logpdf(x, loc, scale), (x - loc, scale)


def normal_logpdf_bwd(res, g):
    d, scale = res
    dx = -g * d / scale**2
    return dx, -dx, g * d**2 / scale**3


normal_logpdf.defvjp(normal_logpdf_fwd, normal_logpdf_bwd)
wrong(
    "logpdf_normaliser_absent",
    normal_logpdf,
    (normal(25, 5), normal(26, 5), positive(27, 5)),
    causes="missing_term",
    of=["scale"],
)


@jax.custom_vjp
def mvn_logpdf(x, mean, chol):
    """Log-density of N(mean, chol chol^T) without the constant."""
    z = jsp.linalg.solve_triangular(chol, x - mean, lower=True)
    return -0.5 * z @ z - jnp.sum(jnp.log(jnp.diagonal(chol)))


def mvn_logpdf_fwd(x, mean, chol):
    z = jsp.linalg.solve_triangular(chol, x - mean, lower=True)
    return mvn_logpdf(x, mean, chol), (z, chol)


def mvn_logpdf_bwd(res, g):
    z, chol = res
    u = jsp.linalg.solve_triangular(chol, z, lower=True, trans=1)
    return -g * u, g * u, g * jnp.tril(jnp.outer(u, z))


mvn_logpdf.defvjp(mvn_logpdf_fwd, mvn_logpdf_bwd)
wrong(
    "mvn_logdet_absent",
    mvn_logpdf,
    (normal(28, 4), normal(29, 4), jnp.tril(normal(30, 4, 4)) * 0.3 + jnp.diag(positive(31, 4))),
    causes="missing_term elements",
    of=["chol"],
)


@jax.custom_vjp
def reparameterise(mu, logvar, noise):
    return mu + jnp.exp(0.5 * logvar) * noise


def reparameterise_fwd(mu, logvar, noise):
    return reparameterise(mu, logvar, noise), (jnp.exp(0.5 * logvar), noise)


def reparameterise_bwd(res, g):
    std, noise = res
    return g, g * std * noise, g * std


reparameterise.defvjp(reparameterise_fwd, reparameterise_bwd)
wrong(
    "reparameterise_half",
    reparameterise,
    (normal(32, 3, 4), normal(33, 3, 4), normal(34, 3, 4)),
    causes="scale",
    of=["logvar"],
)


@jax.custom_jvp
def log_beta(a, b):
    gammaln = jsp.special.gammaln
    return gammaln(a) + gammaln(b) - gammaln(a + b)


@log_beta.defjvp
def log_beta_jvp(primals, tangents):
    a, b = primals
    da, db = tangents
    psi = jsp.special.digamma
    total = psi(a + b)
    return log_beta(a, b), (psi(b) - total) * da + (psi(a) - total) * db


wrong(
    "log_beta_exchanged",
    log_beta,
    (positive(35, 5), positive(36, 5)),
    causes="swapped_arguments",
    of=["a", "b"],
    innocent=(positive(37, 5), positive(37, 5)),
)


@jax.custom_vjp
def hmm_evidence(log_obs, log_trans):
    """Log-evidence of a hidden Markov chain, log_obs of shape (steps, states)."""

    def step(alpha, obs):
        return jsp.special.logsumexp(alpha[:, None] + log_trans, axis=0) + obs, None

    alpha, _ = lax.scan(step, log_obs[0], log_obs[1:])
    return jsp.special.logsumexp(alpha)


def hmm_evidence_fwd(log_obs, log_trans):
    def step(alpha, obs):
        new = jsp.special.logsumexp(alpha[:, None] + log_trans, axis=0) + obs
        return new, new

    last, rest = lax.scan(step, log_obs[0], log_obs[1:])
    alphas = jnp.concatenate([log_obs[:1], rest])
    return jsp.special.logsumexp(last), (alphas, log_obs, log_trans)


def hmm_evidence_bwd(res, g):
    alphas, log_obs, log_trans = res
    _, pull = jax.vjp(lambda t: hmm_evidence_fwd(log_obs, t)[0], log_trans)
    return g * jax.nn.softmax(alphas, axis=-1), pull(g)[0]


hmm_evidence.defvjp(hmm_evidence_fwd, hmm_evidence_bwd)
wrong(
    "hmm_filtered_for_smoothed",
    hmm_evidence,
    (normal(38, 6, 3), jax.nn.log_softmax(normal(39, 3, 3))),
    causes="missing_term elements",
    of=["log_obs"],
    innocent=(normal(40, 1, 3), jax.nn.log_softmax(normal(41, 3, 3))),
)


# Layers.


@jax.custom_vjp
def rms_norm(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def rms_norm_fwd(x, gain):
    inv = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * inv * gain, (x, inv, gain)


def rms_norm_bwd(res, g):
    x, inv, gain = res
    return g * gain * inv, jnp.sum(g * x * inv, axis=0)


rms_norm.defvjp(rms_norm_fwd, rms_norm_bwd)
wrong(
    "rms_norm_projection_absent",
    rms_norm,
    (normal(42, 4, 6), positive(43, 6)),
    causes="missing_term",
    of=["x"],
)


@jax.custom_vjp
def layer_norm(x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-5)


def layer_norm_fwd(x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inv = lax.rsqrt(jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + 1e-5)
    return (x - mean) * inv, ((x - mean) * inv, inv)


def layer_norm_bwd(res, g):
    xhat, inv = res
    return (inv * (g - g.mean() - xhat * jnp.mean(g * xhat, axis=-1, keepdims=True)),)


layer_norm.defvjp(layer_norm_fwd, layer_norm_bwd)
wrong(
    "layer_norm_mean_over_all",
    layer_norm,
    (normal(44, 4, 6),),
    causes="wrong_reduction missing_term",
    of=["x"],
    innocent=(normal(45, 1, 6),),
)


@jax.custom_vjp
def softmax_rows(x):
    return jax.nn.softmax(x, axis=-1)


def softmax_rows_fwd(x):
    y = jax.nn.softmax(x, axis=-1)
    return y, y


def softmax_rows_bwd(y, g):
    return (y * (g - jnp.sum(g * y)),)


softmax_rows.defvjp(softmax_rows_fwd, softmax_rows_bwd)
wrong(
    "softmax_sum_over_batch",
    softmax_rows,
    (normal(46, 3, 5),),
    causes="wrong_reduction",
    of=["x"],
    innocent=(normal(47, 1, 5),),
)


@jax.custom_jvp
def swish(x):
    return x * jax.nn.sigmoid(x)


@swish.defjvp
def swish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    s = jax.nn.sigmoid(x)
    return x * s, s * dx


wrong(
    "swish_product_rule",
    swish,
    (normal(48, 9),),
    causes="missing_term missing_activation_derivative",
    of=["x"],
)


@jax.custom_vjp
def highway(x, h, z):
    t = jax.nn.sigmoid(z)
    return t * h + (1.0 - t) * x


def highway_fwd(x, h, z):
    return highway(x, h, z), (x, h, jax.nn.sigmoid(z))


def highway_bwd(res, g):
    x, h, t = res
    return g * (1.0 - t), g * t, g * (h - x)


highway.defvjp(highway_fwd, highway_bwd)
wrong(
    "highway_gate_slope",
    highway,
    (normal(49, 3, 4), normal(50, 3, 4), normal(51, 3, 4)),
    causes="missing_activation_derivative scale missing_term",
    of=["z"],
)


@jax.custom_vjp
def dense_tanh(x, w, b):
    return jnp.tanh(x @ w + b)


def dense_tanh_fwd(x, w, b):
    return dense_tanh(x, w, b), (x, w)


def dense_tanh_bwd(res, g):
    x, w = res
    return g @ w.T, x.T @ g, g.sum(axis=0)


dense_tanh.defvjp(dense_tanh_fwd, dense_tanh_bwd)
wrong(
    "dense_tanh_slope",
    dense_tanh,
    (normal(52, 4, 3), normal(53, 3, 5), normal(54, 5)),
    causes="missing_activation_derivative",
    of=["x", "w", "b"],
)


@jax.custom_vjp
def gated_linear(a, b):
    return a * jax.nn.sigmoid(b)


def gated_linear_fwd(a, b):
    s = jax.nn.sigmoid(b)
    return a * s, (a, s)


def gated_linear_bwd(res, g):
    a, s = res
    return g * s, g * g * s * (1.0 - s)


gated_linear.defvjp(gated_linear_fwd, gated_linear_bwd)
wrong(
    "glu_cotangent_squared",
    gated_linear,
    (normal(55, 3, 4), normal(56, 3, 4)),
    causes="nonlinear_in_cotangent",
    of=["b"],
)


@jax.custom_vjp
def feed_forward(params, x):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return h @ params["w2"]


def feed_forward_fwd(params, x):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return h @ params["w2"], (params, x, h)


def feed_forward_bwd(res, g):
    params, x, h = res
    dz = (g @ params["w2"].T) * (1.0 - h * h)
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["w1"] = x.T @ dz
    grads["w2"] = h.T @ g
    return grads, dz @ params["w1"].T


feed_forward.defvjp(feed_forward_fwd, feed_forward_bwd)
wrong(
    "feed_forward_bias_zero",
    feed_forward,
    ({"w1": normal(57, 3, 4), "b1": normal(58, 4), "w2": normal(59, 4, 2)}, normal(60, 5, 3)),
    causes="dropped_argument",
    of=["params['b1']"],
)


def valid_conv(x, kernel):
    """x (time, in), kernel (width, in, out)."""
    width = kernel.shape[0]
    frames = x[jnp.arange(x.shape[0] - width + 1)[:, None] + jnp.arange(width)]
    return jnp.einsum("twi,wio->to", frames, kernel)


@jax.custom_vjp
def temporal_conv(x, kernel, bias):
    return valid_conv(x, kernel) + bias


def temporal_conv_fwd(x, kernel, bias):
    return temporal_conv(x, kernel, bias), (x, kernel, bias)


def temporal_conv_bwd(res, g):
    x, kernel, bias = res
    dx, dkernel = jax.vjp(valid_conv, x, kernel)[1](g)
    return dx, dkernel, jnp.zeros_like(bias)


temporal_conv.defvjp(temporal_conv_fwd, temporal_conv_bwd)
wrong(
    "conv_bias_zero",
    temporal_conv,
    (normal(61, 8, 2), normal(62, 3, 2, 3), normal(63, 3)),
    causes="dropped_argument",
    of=["bias"],
)


@jax.custom_vjp
def lstm_cell(gates, c):
    i, f, o, u = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(u)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def lstm_cell_fwd(gates, c):
    h, new = lstm_cell(gates, c)
    return (h, new), (gates, c, new)


def lstm_cell_bwd(res, cts):
    gates, c, new = res
    dh, _ = cts
    i, f, o, u = jnp.split(gates, 4, axis=-1)
    i, f, o, u = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jax.nn.sigmoid(o), jnp.tanh(u)
    t = jnp.tanh(new)
    dc = dh * o * (1 - t * t)
    parts = (dc * u * i * (1 - i), dc * c * f * (1 - f), dh * t * o * (1 - o), dc * i * (1 - u * u))
    return jnp.concatenate(parts, axis=-1), dc * f


lstm_cell.defvjp(lstm_cell_fwd, lstm_cell_bwd)
wrong(
    "lstm_cell_state_path",
    lstm_cell,
    (normal(64, 2, 12), normal(65, 2, 3)),
    causes="dropped_output",
    of=["gates", "c"],
)


@jax.custom_vjp
def moments(x):
    mean = jnp.mean(x, axis=0)
    return mean, jnp.mean((x - mean) ** 2, axis=0)


def moments_fwd(x):
    return moments(x), x.shape


def moments_bwd(shape, cts):
    dmean, _ = cts
    return (jnp.broadcast_to(dmean / shape[0], shape),)


moments.defvjp(moments_fwd, moments_bwd)
wrong("moments_variance_path", moments, (normal(66, 5, 3),), causes="dropped_output", of=["x"])


@jax.custom_vjp
def scale_shift(x, gamma, beta):
    """gamma and beta of shape (1, features)."""
    return x * gamma + beta


def scale_shift_fwd(x, gamma, beta):
    return scale_shift(x, gamma, beta), (x, gamma)


def scale_shift_bwd(res, g):
    x, gamma = res
    return g * gamma, g * x, g


scale_shift.defvjp(scale_shift_fwd, scale_shift_bwd)
wrong(
    "scale_shift_batch_sum",
    scale_shift,
    (normal(67, 4, 6), normal(68, 1, 6), normal(69, 1, 6)),
    causes="missing_sum structure",
    of=["gamma", "beta"],
    innocent=(normal(70, 1, 6), normal(71, 1, 6), normal(72, 1, 6)),
)


@jax.custom_vjp
def time_distributed(x, w):
    return jnp.einsum("btd,dk->btk", x, w)


def time_distributed_fwd(x, w):
    return time_distributed(x, w), (x, w)


def time_distributed_bwd(res, g):
    x, w = res
    return jnp.einsum("btk,dk->btd", g, w), jnp.einsum("bd,bk->dk", x[:, -1], g[:, -1])


time_distributed.defvjp(time_distributed_fwd, time_distributed_bwd)
wrong(
    "time_distributed_last_step",
    time_distributed,
    (normal(73, 2, 4, 3), normal(74, 3, 5)),
    causes="missing_sum elements",
    of=["w"],
    innocent=(normal(75, 2, 1, 3), normal(76, 3, 5)),
)


@jax.custom_vjp
def global_average_pool(x):
    """x (height, width, channels)."""
    return jnp.mean(x, axis=(0, 1))


def global_average_pool_fwd(x):
    return global_average_pool(x), x.shape


def global_average_pool_bwd(shape, g):
    return (jnp.broadcast_to(g / (shape[0] * shape[0]), shape),)


global_average_pool.defvjp(global_average_pool_fwd, global_average_pool_bwd)
wrong(
    "average_pool_height_twice",
    global_average_pool,
    (normal(77, 4, 3, 2),),
    causes="scale wrong_reduction",
    of=["x"],
    innocent=(normal(78, 4, 4, 2),),
)


def average_pool_plain(x):
    """Means of neighbouring pairs; an odd sample at the end is left out."""
    n = x.shape[0] // 2
    return x[: 2 * n].reshape(n, 2).mean(axis=1)


average_pool = jax.custom_vjp(average_pool_plain)


def average_pool_fwd(x):
    return average_pool_plain(x), x.shape[0]


def average_pool_bwd(n, g):
    dx = jnp.repeat(g / 2, 2)
    return (jnp.pad(dx, (0, n - dx.shape[0]), mode="edge"),)


average_pool.defvjp(average_pool_fwd, average_pool_bwd)
wrong(
    "average_pool_odd_tail",
    average_pool,
    (normal(79, 9),),
    causes="elements",
    of=["x"],
    innocent=(normal(80, 8),),
)


def max_pool_plain(x, window, stride):
    starts = jnp.arange(0, x.shape[0] - window + 1, stride)
    return jnp.max(x[starts[:, None] + jnp.arange(window)], axis=1)


max_pool = jax.custom_vjp(max_pool_plain, nondiff_argnums=(1, 2))


def max_pool_fwd(x, window, stride):
    starts = jnp.arange(0, x.shape[0] - window + 1, stride)
    frames = x[starts[:, None] + jnp.arange(window)]
    return jnp.max(frames, axis=1), (starts + jnp.argmax(frames, axis=1), x.shape[0])


def max_pool_bwd(window, stride, res, g):
    winners, n = res
    return (jnp.zeros(n, g.dtype).at[winners].set(g),)


max_pool.defvjp(max_pool_fwd, max_pool_bwd)
wrong(
    "max_pool_shared_winner",
    max_pool,
    (jnp.array([0.1, 2.0, -1.0, 0.5, 3.0, 0.2, -0.3]), 3, 1),
    causes="accumulation elements missing_sum",
    of=["x"],
    innocent=(normal(81, 9), 3, 3),
)


def dropout_plain(x, key, rate):
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


dropout = jax.custom_vjp(dropout_plain, nondiff_argnums=(2,))


def dropout_fwd(x, key, rate):
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0), keep


def dropout_bwd(rate, keep, g):
    return jnp.where(keep, g, 0.0), None


dropout.defvjp(dropout_fwd, dropout_bwd)
wrong(
    "dropout_scale",
    dropout,
    (normal(82, 6, 4), jax.random.key(1), 0.25),
    causes="scale",
    of=["x"],
    innocent=(normal(83, 6, 4), jax.random.key(2), 0.0),
)


@jax.custom_vjp
def embed(table, ids):
    return table[ids]


def embed_fwd(table, ids):
    return table[ids], (ids, table)


def embed_bwd(res, g):
    ids, table = res
    return jnp.zeros_like(table).at[ids].set(g), None


embed.defvjp(embed_fwd, embed_bwd)
wrong(
    "embed_overwrites",
    embed,
    (normal(84, 6, 3), jnp.array([0, 2, 2, 5, 0])),
    causes="accumulation elements missing_sum",
    of=["table"],
    innocent=(normal(85, 6, 3), jnp.array([0, 2, 3, 5, 1])),
)


@jax.custom_vjp
def micro_batched_dense(x, w):
    return x @ w


def micro_batched_dense_fwd(x, w):
    return x @ w, (x, w)


def micro_batched_dense_bwd(res, g):
    x, w = res
    size = 4
    dw = jnp.zeros_like(w)
    for i in range(0, x.shape[0], size):
        dw = x[i : i + size].T @ g[i : i + size]
    return g @ w.T, dw


micro_batched_dense.defvjp(micro_batched_dense_fwd, micro_batched_dense_bwd)
wrong(
    "micro_batch_overwrites",
    micro_batched_dense,
    (normal(86, 10, 3), normal(87, 3, 2)),
    causes="accumulation missing_sum elements",
    of=["w"],
    innocent=(normal(88, 4, 3), normal(89, 3, 2)),
)


# Attention and sequences.


def attention_plain(q, k, v):
    return jax.nn.softmax(q @ k.T * q.shape[-1] ** -0.5) @ v


flash_attention = jax.custom_vjp(attention_plain)


def flash_attention_fwd(q, k, v):
    s = q @ k.T * q.shape[-1] ** -0.5
    lse = jsp.special.logsumexp(s, axis=-1)
    return jnp.exp(s - lse[:, None]) @ v, (q, k, v, lse)


def flash_attention_bwd(res, do):
    q, k, v, lse = res
    scale = q.shape[-1] ** -0.5
    p = jnp.exp(q @ k.T * scale - lse[:, None])
    ds = p * (do @ v.T)
    return ds @ k * scale, ds.T @ q * scale, p.T @ do


flash_attention.defvjp(flash_attention_fwd, flash_attention_bwd)
wrong(
    "flash_delta_absent",
    flash_attention,
    (normal(90, 5, 4), normal(91, 6, 4), normal(92, 6, 3)),
    causes="missing_term",
    of=["q", "k"],
)


def grouped_scores(q, k):
    """q (groups, per, t, d), k (groups, s, d)."""
    return jnp.einsum("gptd,gsd->gpts", q, k) * q.shape[-1] ** -0.5


@jax.custom_vjp
def grouped_attention(q, k, v):
    """Several query heads share one key and value head."""
    return jnp.einsum("gpts,gsd->gptd", jax.nn.softmax(grouped_scores(q, k)), v)


def grouped_attention_fwd(q, k, v):
    p = jax.nn.softmax(grouped_scores(q, k))
    return jnp.einsum("gpts,gsd->gptd", p, v), (q, k, v, p)


def grouped_attention_bwd(res, g):
    q, k, v, p = res
    dp = jnp.einsum("gptd,gsd->gpts", g, v)
    ds = p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    dk = jnp.einsum("gpts,gptd->gpsd", ds, q)
    dv = jnp.einsum("gpts,gptd->gpsd", p, g)
    return jnp.einsum("gpts,gsd->gptd", ds, k), dk[:, 0], dv[:, 0]


grouped_attention.defvjp(grouped_attention_fwd, grouped_attention_bwd)
wrong(
    "grouped_heads_sum",
    grouped_attention,
    (normal(93, 2, 3, 4, 2), normal(94, 2, 5, 2), normal(95, 2, 5, 2)),
    causes="missing_sum elements",
    of=["k", "v"],
    innocent=(normal(96, 2, 1, 4, 2), normal(97, 2, 5, 2), normal(98, 2, 5, 2)),
)


@jax.custom_vjp
def padded_attention(q, k, v, length):
    s = q @ k.T * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(jnp.arange(k.shape[0]) < length, s, -1e30)) @ v


def padded_attention_fwd(q, k, v, length):
    return padded_attention(q, k, v, length), (q, k, v)


def padded_attention_bwd(res, g):
    q, k, v = res
    return *jax.vjp(attention_plain, q, k, v)[1](g), None


padded_attention.defvjp(padded_attention_fwd, padded_attention_bwd)
wrong(
    "padded_keys_attended",
    padded_attention,
    (normal(99, 3, 4), normal(100, 6, 4), normal(101, 6, 2), jnp.int32(4)),
    causes="elements",
    of=["q", "k", "v"],
    innocent=(normal(102, 3, 4), normal(103, 6, 4), normal(104, 6, 2), jnp.int32(6)),
)


def rotate_pairs(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    c, s = jnp.cos(angle), jnp.sin(angle)
    a, b = x[:, :half], x[:, half:]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)


rotary = jax.custom_vjp(rotate_pairs)


def rotary_fwd(x, positions):
    return rotate_pairs(x, positions), positions


def rotary_bwd(positions, g):
    return rotate_pairs(g, positions), None


rotary.defvjp(rotary_fwd, rotary_bwd)
wrong(
    "rotary_not_inverted",
    rotary,
    (normal(105, 5, 4), jnp.arange(5)),
    causes="transposed sign",
    of=["x"],
    innocent=(normal(106, 5, 4), jnp.zeros(5, jnp.int32)),
)


def decay_scan(x, a):
    def step(s, xt):
        s = a * s + xt
        return s, s

    return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


leaky_integrator = jax.custom_vjp(decay_scan)


def leaky_integrator_fwd(x, a):
    y = decay_scan(x, a)
    return y, (y, a)


def leaky_integrator_bwd(res, g):
    y, a = res
    lam = decay_scan(g[::-1], a)[::-1]
    before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
    return decay_scan(g, a), jnp.sum(lam * before)


leaky_integrator.defvjp(leaky_integrator_fwd, leaky_integrator_bwd)
wrong(
    "integrator_forward_in_time",
    leaky_integrator,
    (normal(107, 7, 2), jnp.float32(0.8)),
    causes="transposed",
    of=["x"],
    innocent=(normal(108, 1, 2), jnp.float32(0.8)),
)


@jax.custom_vjp
def running_total(x):
    return jnp.cumsum(x, axis=1)


def running_total_fwd(x):
    return jnp.cumsum(x, axis=1), None


def running_total_bwd(_, g):
    return (jnp.cumsum(g, axis=1),)


running_total.defvjp(running_total_fwd, running_total_bwd)
wrong(
    "running_total_not_reversed",
    running_total,
    (normal(109, 2, 6),),
    causes="transposed",
    of=["x"],
    innocent=(normal(110, 5, 1),),
)


def chunked_prefix_plain(x):
    return jnp.cumsum(jnp.tanh(x), axis=0)


chunked_prefix = jax.custom_vjp(chunked_prefix_plain)


def chunked_prefix_fwd(x):
    return chunked_prefix_plain(x), x


def chunked_prefix_bwd(x, g):
    size = 4
    parts = [jnp.cumsum(g[i : i + size][::-1], axis=0)[::-1] for i in range(0, x.shape[0], size)]
    return (jnp.concatenate(parts) * (1.0 - jnp.tanh(x) ** 2),)


chunked_prefix.defvjp(chunked_prefix_fwd, chunked_prefix_bwd)
wrong(
    "prefix_chunks_not_joined",
    chunked_prefix,
    (normal(111, 10, 2),),
    causes="missing_term elements missing_sum",
    of=["x"],
    innocent=(normal(112, 4, 2),),
)


@jax.custom_vjp
def cumulative_product(x):
    return jnp.cumprod(x)


def cumulative_product_fwd(x):
    y = jnp.cumprod(x)
    return y, (x, y)


def cumulative_product_bwd(res, g):
    x, y = res
    return (jnp.cumsum((g * y)[::-1])[::-1] / x,)


cumulative_product.defvjp(cumulative_product_fwd, cumulative_product_bwd)
wrong(
    "cumprod_divides_by_zero",
    cumulative_product,
    (jnp.array([1.5, -0.5, 0.0, 2.0, 0.7]),),
    causes="nonfinite",
    of=["x"],
    innocent=(positive(113, 5),),
)


@jax.custom_vjp
def sort_values(x):
    return jnp.sort(x)


def sort_values_fwd(x):
    order = jnp.argsort(x)
    return x[order], order


def sort_values_bwd(order, g):
    return (g[order],)


sort_values.defvjp(sort_values_fwd, sort_values_bwd)
wrong(
    "sort_order_not_inverted",
    sort_values,
    (normal(114, 7),),
    causes="transposed elements",
    of=["x"],
    innocent=(jnp.sort(normal(115, 7)),),
)


def top_values_plain(x, k):
    return lax.top_k(x, k)[0]


top_values = jax.custom_vjp(top_values_plain, nondiff_argnums=(1,))


def top_values_fwd(x, k):
    values, places = lax.top_k(x, k)
    return values, (places, x.shape[0])


def top_values_bwd(k, res, g):
    places, n = res
    return (jnp.zeros(n, g.dtype).at[places[0]].add(g[0]),)


top_values.defvjp(top_values_fwd, top_values_bwd)
wrong(
    "top_values_only_first",
    top_values,
    (normal(116, 8), 3),
    causes="elements missing_sum",
    of=["x"],
    innocent=(normal(117, 8), 1),
)


# Linear algebra.


@jax.custom_vjp
def bilinear(x, a, y):
    return x @ a @ y


def bilinear_fwd(x, a, y):
    return x @ a @ y, (x, a, y)


def bilinear_bwd(res, g):
    x, a, y = res
    return g * (a @ y), g * jnp.outer(y, x), g * (x @ a)


bilinear.defvjp(bilinear_fwd, bilinear_bwd)
wrong(
    "bilinear_outer_order",
    bilinear,
    (normal(118, 4), normal(119, 4, 4), normal(120, 4)),
    causes="transposed",
    of=["a"],
    innocent=(normal(121, 4), normal(122, 4, 4), normal(121, 4)),
)


@jax.custom_vjp
def quadratic_form(x, a):
    return x @ a @ x


def quadratic_form_fwd(x, a):
    return x @ a @ x, (x, a)


def quadratic_form_bwd(res, g):
    x, a = res
    return 2.0 * g * (a @ x), g * jnp.outer(x, x)


quadratic_form.defvjp(quadratic_form_fwd, quadratic_form_bwd)
wrong(
    "quadratic_form_assumes_symmetry",
    quadratic_form,
    (normal(123, 4), normal(124, 4, 4)),
    causes="missing_term transposed",
    of=["x"],
    innocent=(normal(125, 4), symmetric(normal(126, 4, 4))),
)


@jax.custom_vjp
def linear_solve(a, b):
    return jnp.linalg.solve(a, b)


def linear_solve_fwd(a, b):
    x = jnp.linalg.solve(a, b)
    return x, (a, x)


def linear_solve_bwd(res, g):
    a, x = res
    lam = jnp.linalg.solve(a, g)
    return -jnp.outer(lam, x), lam


linear_solve.defvjp(linear_solve_fwd, linear_solve_bwd)
wrong(
    "solve_adjoint_not_transposed",
    linear_solve,
    (dominant(127, 4), normal(128, 4)),
    causes="transposed",
    of=["a", "b"],
    innocent=(symmetric(dominant(129, 4)), normal(130, 4)),
)


def banded(lower, diag, upper):
    return jnp.diag(diag) + jnp.diag(upper, 1) + jnp.diag(lower, -1)


@jax.custom_vjp
def tridiagonal_solve(lower, diag, upper, rhs):
    return jnp.linalg.solve(banded(lower, diag, upper), rhs)


def tridiagonal_solve_fwd(lower, diag, upper, rhs):
    x = tridiagonal_solve(lower, diag, upper, rhs)
    return x, (lower, diag, upper, x)


def tridiagonal_solve_bwd(res, g):
    lower, diag, upper, x = res
    lam = jnp.linalg.solve(banded(lower, diag, upper), g)
    return -lam[1:] * x[:-1], -lam * x, -lam[:-1] * x[1:], lam


tridiagonal_solve.defvjp(tridiagonal_solve_fwd, tridiagonal_solve_bwd)
wrong(
    "tridiagonal_bands_not_exchanged",
    tridiagonal_solve,
    (normal(131, 5), positive(132, 6) + 3.0, normal(133, 5), normal(134, 6)),
    causes="transposed",
    of=["lower", "diag", "upper", "rhs"],
    innocent=(normal(135, 5), positive(136, 6) + 3.0, normal(135, 5), normal(137, 6)),
)


@jax.custom_vjp
def forward_substitution(l, b):  # noqa: E741
    return jsp.linalg.solve_triangular(l, b, lower=True)


def forward_substitution_fwd(l, b):  # noqa: E741
    x = jsp.linalg.solve_triangular(l, b, lower=True)
    return x, (l, x)


def forward_substitution_bwd(res, g):
    factor, x = res
    lam = jsp.linalg.solve_triangular(factor, g, lower=True, trans=1)
    return -jnp.outer(lam, x), lam


forward_substitution.defvjp(forward_substitution_fwd, forward_substitution_bwd)
wrong(
    "substitution_upper_triangle",
    forward_substitution,
    (jnp.tril(dominant(138, 4)), normal(139, 4)),
    causes="elements",
    of=["l"],
)


@jax.custom_vjp
def symmetric_expm(a):
    w, v = jnp.linalg.eigh(a)
    return (v * jnp.exp(w)) @ v.T


def symmetric_expm_fwd(a):
    w, v = jnp.linalg.eigh(a)
    return (v * jnp.exp(w)) @ v.T, (w, v)


def symmetric_expm_bwd(res, g):
    w, v = res
    e = jnp.exp(w)
    gap = w[:, None] - w
    ratio = (e[:, None] - e) / jnp.where(gap == 0, 1.0, gap) + jnp.diag(e)
    return (symmetric(v @ (ratio * (v.T @ g @ v)) @ v.T),)


symmetric_expm.defvjp(symmetric_expm_fwd, symmetric_expm_bwd)
wrong(
    "expm_repeated_eigenvalues",
    symmetric_expm,
    (jnp.diag(jnp.array([0.5, 0.5, 1.0])),),
    causes="edge elements missing_term",
    of=["a"],
    innocent=(symmetric(normal(140, 3, 3)),),
)


@jax.custom_vjp
def square_matmul(a, b):
    return a @ b


def square_matmul_fwd(a, b):
    return a @ b, (a, b)


def square_matmul_bwd(res, g):
    a, b = res
    return a.T @ g, g @ b.T


square_matmul.defvjp(square_matmul_fwd, square_matmul_bwd)
wrong(
    "matmul_cotangents_exchanged",
    square_matmul,
    (normal(141, 4, 4), normal(142, 4, 4)),
    causes="swapped_arguments",
    of=["a", "b"],
)


@jax.custom_vjp
def linear_map(x, weight):
    """weight (out, in), as PyTorch keeps it."""
    return x @ weight.T


def linear_map_fwd(x, weight):
    return x @ weight.T, (x, weight)


def linear_map_bwd(res, g):
    x, weight = res
    return g @ weight, x.T @ g


linear_map.defvjp(linear_map_fwd, linear_map_bwd)
wrong(
    "linear_weight_layout",
    linear_map,
    (normal(143, 5, 3), normal(144, 4, 3)),
    (normal(145, 5, 3), normal(146, 3, 3)),
    causes="structure transposed",
    of=["weight"],
)


@jax.custom_vjp
def fused_add(x, y, scale):
    return x + scale * y


def fused_add_fwd(x, y, scale):
    return fused_add(x, y, scale), (y, scale)


def fused_add_bwd(res, g):
    y, scale = res
    return g, scale * g


fused_add.defvjp(fused_add_fwd, fused_add_bwd)
wrong(
    "fused_add_two_of_three",
    fused_add,
    (normal(147, 4), normal(148, 4), jnp.float32(0.5)),
    causes="structure",
)
