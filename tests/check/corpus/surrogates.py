"""Custom rules whose gradient is meant to be another than the derivative.

Of about three in four the values tell: the true derivative is 0 almost everywhere, or the function
hands its argument on unchanged. For the others it takes the author's word: the decorator, the
docstring or the name.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.audit import surrogate

from .entry import Fine

ENTRIES: list[Fine] = []


def add(f, why, *calls, name=None):
    ENTRIES.append(Fine(name or f.__name__, f, calls, why, "surrogate"))


def saves(f):
    """The forward rule that keeps the arguments."""
    return lambda *args: (f(*args), args)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(seed, *shape, low=0.1, high=0.9):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), jnp.float32)


def softmax_pullback(y, g):
    return y * (g - jnp.sum(y * g, axis=-1, keepdims=True))


# --- by evidence: a function of steps


@jax.custom_vjp
def nearest_integer(x):
    return jnp.round(x)


def nearest_integer_bwd(_, g):
    return (g,)


nearest_integer.defvjp(lambda x: (jnp.round(x), None), nearest_integer_bwd)
add(nearest_integer, "round, identity backward", (3 * normal(1, 5, 7),), (normal(2, 4),))


@jax.custom_jvp
def whole_part(x):
    return jnp.floor(x)


@whole_part.defjvp
def whole_part_jvp(primals, tangents):
    return whole_part(*primals), tangents[0]


add(whole_part, "floor, with the tangent of the identity", (3 * normal(3, 5, 7),))


@jax.custom_vjp
def plus_or_minus(x):
    return jnp.sign(x)


def plus_or_minus_bwd(x, g):
    return (jnp.where(jnp.abs(x) <= 1, g, 0),)


plus_or_minus.defvjp(lambda x: (jnp.sign(x), x), plus_or_minus_bwd)
add(plus_or_minus, "sign, backward as hard tanh", (normal(4, 5, 7),))


@jax.custom_vjp
def spike(voltage):
    return (voltage > 0).astype(voltage.dtype)


def spike_bwd(voltage, g):
    s = jax.nn.sigmoid(4 * voltage)
    return (4 * g * s * (1 - s),)


spike.defvjp(lambda v: (spike(v), v), spike_bwd)
add(spike, "a step, backward as a sigmoid", (normal(5, 5, 7),))


@jax.custom_vjp
def fire(voltage, threshold):
    return jnp.where(voltage >= threshold, 1.0, 0.0).astype(voltage.dtype)


def fire_bwd(saved, g):
    voltage, threshold = saved
    d = g * jnp.maximum(1 - jnp.abs(voltage - threshold), 0)
    return d, -jnp.sum(d, axis=0)


fire.defvjp(saves(fire), fire_bwd)
add(fire, "a step, backward as a triangle; the threshold learns", (normal(6, 5, 7), uniform(7, 7)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def step_function(x, sharpness=2.0):
    return jnp.heaviside(x, 0.5)


@step_function.defjvp
def step_function_jvp(sharpness, primals, tangents):
    (x,), (dx,) = primals, tangents
    z = 0.5 * math.pi * sharpness * x
    return step_function(x, sharpness), dx * 0.5 * sharpness / (1 + z * z)


add(step_function, "a step, with the tangent of an arctan", (normal(8, 5, 7), 2.0))


@jax.custom_vjp
def binary_weights(w):
    return jnp.where(w >= 0, 1, -1).astype(w.dtype)


def binary_weights_bwd(w, g):
    return (jnp.where(jnp.abs(w) > 1, 0, g),)


binary_weights.defvjp(lambda w: (binary_weights(w), w), binary_weights_bwd)
add(binary_weights, "binary connect", (0.5 * normal(9, 4, 6),))


@jax.custom_vjp
def hard_gate(x):
    return jnp.round(jnp.clip(0.2 * x + 0.5, 0, 1))


def hard_gate_bwd(x, g):
    return (jnp.where(jnp.abs(x) < 2.5, 0.2 * g, 0),)


hard_gate.defvjp(lambda x: (hard_gate(x), x), hard_gate_bwd)
add(hard_gate, "a bit, backward as a hard sigmoid", (2 * normal(10, 5, 7),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def on_grid(x, step=0.25):
    return step * jnp.round(x / step)


def on_grid_fwd(x, step):
    return on_grid(x, step), None


def on_grid_bwd(step, _, g):
    return (g,)


on_grid.defvjp(on_grid_fwd, on_grid_bwd)
add(on_grid, "values of a grid, identity backward", (normal(11, 5, 7), 0.25))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def eight_bit(x, scale):
    return scale * jnp.clip(jnp.round(x / scale), -128, 127)


def eight_bit_fwd(x, scale):
    return eight_bit(x, scale), jnp.abs(x) <= 127 * scale


def eight_bit_bwd(scale, inside, g):
    return (jnp.where(inside, g, 0),)


eight_bit.defvjp(eight_bit_fwd, eight_bit_bwd)
add(eight_bit, "fake quantisation to int8 with a fixed scale", (normal(12, 5, 7), 0.02))


@jax.custom_vjp
def fake_quantised(x, scale):
    return scale * jnp.clip(jnp.round(x / scale), -8, 7)


def fake_quantised_bwd(saved, g):
    x, scale = saved
    level = jnp.clip(jnp.round(x / scale), -8, 7)
    inside = (x / scale > -8) & (x / scale < 7)
    return jnp.where(inside, g, 0), jnp.sum(g * level)


fake_quantised.defvjp(saves(fake_quantised), fake_quantised_bwd)
add(
    fake_quantised,
    "identity backward for x; the true derivative for the scale",
    (normal(13, 5, 7), jnp.float32(0.2)),
)


def squared_distances(z, codes):
    return jnp.sum((z[:, None, :] - codes[None, :, :]) ** 2, axis=-1)


@jax.custom_vjp
def nearest_code(z, codes):
    return codes[jnp.argmin(squared_distances(z, codes), axis=-1)]


def nearest_code_fwd(z, codes):
    chosen = jnp.argmin(squared_distances(z, codes), axis=-1)
    return codes[chosen], (chosen, codes)


def nearest_code_bwd(saved, g):
    chosen, codes = saved
    return g, jnp.zeros_like(codes).at[chosen].add(g)


nearest_code.defvjp(nearest_code_fwd, nearest_code_bwd)
add(
    nearest_code,
    "vector quantisation: the identity for z, the derivative for the codes",
    (normal(14, 6, 3), normal(15, 5, 3)),
)


@jax.custom_vjp
def chosen_class(logits):
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)


def chosen_class_bwd(logits, g):
    return (softmax_pullback(jax.nn.softmax(logits, axis=-1), g),)


chosen_class.defvjp(lambda logits: (chosen_class(logits), logits), chosen_class_bwd)
add(chosen_class, "argmax as one-hot, backward as softmax", (normal(16, 5, 7),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def hard_gumbel(logits, key, temperature=0.5):
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.one_hot(jnp.argmax(noisy, axis=-1), logits.shape[-1], dtype=logits.dtype)


def hard_gumbel_fwd(logits, key, temperature):
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return hard_gumbel(logits, key, temperature), jax.nn.softmax(noisy / temperature, axis=-1)


def hard_gumbel_bwd(temperature, y, g):
    return softmax_pullback(y, g) / temperature, None


hard_gumbel.defvjp(hard_gumbel_fwd, hard_gumbel_bwd)
add(hard_gumbel, "a hard sample, a soft gradient", (normal(17, 5, 7), jax.random.key(1), 0.5))


@jax.custom_vjp
def drawn_category(logits, key):
    drawn = jax.random.categorical(key, logits, axis=-1)
    return jax.nn.one_hot(drawn, logits.shape[-1], dtype=logits.dtype)


def drawn_category_bwd(logits, g):
    return softmax_pullback(jax.nn.softmax(logits, axis=-1), g), None


drawn_category.defvjp(lambda logits, key: (drawn_category(logits, key), logits), drawn_category_bwd)
add(drawn_category, "a sample, backward as its mean", (normal(18, 6, 4), jax.random.key(2)))


@jax.custom_vjp
def coin(p, key):
    return (jax.random.uniform(key, p.shape, p.dtype) < p).astype(p.dtype)


def coin_bwd(_, g):
    return g, None


coin.defvjp(lambda p, key: (coin(p, key), None), coin_bwd)
add(coin, "a Bernoulli sample, backward as its mean", (uniform(19, 9), jax.random.key(3)))


@jax.custom_vjp
def rounded_at_random(x, key):
    return jnp.floor(x + jax.random.uniform(key, x.shape, x.dtype))


def rounded_at_random_bwd(_, g):
    return g, None


rounded_at_random.defvjp(lambda x, key: (rounded_at_random(x, key), None), rounded_at_random_bwd)
add(rounded_at_random, "stochastic rounding", (3 * normal(20, 5, 7), jax.random.key(4)))


@jax.custom_vjp
def ranks(x):
    return jnp.argsort(jnp.argsort(x, axis=-1), axis=-1).astype(x.dtype)


def soft_ranks(x):
    return jnp.sum(jax.nn.sigmoid(4 * (x[..., :, None] - x[..., None, :])), axis=-1)


def ranks_bwd(x, g):
    return jax.vjp(soft_ranks, x)[1](g)


ranks.defvjp(lambda x: (ranks(x), x), ranks_bwd)
add(ranks, "hard ranks, soft gradient", (normal(21, 3, 6),))


def best_subset(values):
    """The solver: 1 for the three largest values."""
    third = jnp.sort(values, axis=-1)[..., -3, None]
    return (values >= third).astype(values.dtype)


@jax.custom_vjp
def solved(values):
    return best_subset(values)


def solved_fwd(values):
    y = best_subset(values)
    return y, (values, y)


def solved_bwd(saved, g):
    values, y = saved
    return ((best_subset(values + 20 * g) - y) / 20,)


solved.defvjp(solved_fwd, solved_bwd)
add(
    solved,
    "the solver is called again at values moved along the cotangent, which is not linear",
    (normal(22, 4, 8),),
)


def perturbed(scores, key):
    noise = jax.random.normal(key, (50, *scores.shape), scores.dtype)
    best = jnp.argmax(scores + 0.5 * noise, axis=-1)
    return jax.nn.one_hot(best, scores.shape[-1], dtype=scores.dtype), noise


@jax.custom_vjp
def smoothed_argmax(scores, key):
    return jnp.mean(perturbed(scores, key)[0], axis=0)


def smoothed_argmax_bwd(saved, g):
    chosen, noise = saved
    return jnp.mean(noise * jnp.sum(chosen * g, axis=-1, keepdims=True), axis=0) / 0.5, None


def smoothed_argmax_fwd(scores, key):
    chosen, noise = perturbed(scores, key)
    return jnp.mean(chosen, axis=0), (chosen, noise)


smoothed_argmax.defvjp(smoothed_argmax_fwd, smoothed_argmax_bwd)
add(smoothed_argmax, "a perturbed optimiser", (normal(23, 5), jax.random.key(5)))


def bits_and_reward(logits, key):
    p = jax.nn.sigmoid(logits)
    bits = (jax.random.uniform(key, (20, *logits.shape), logits.dtype) < p).astype(logits.dtype)
    return bits, jnp.sum(bits * jnp.arange(1, logits.shape[-1] + 1, dtype=logits.dtype), axis=-1)


@jax.custom_vjp
def mean_reward(logits, key):
    return jnp.mean(bits_and_reward(logits, key)[1])


def mean_reward_bwd(saved, g):
    logits, key = saved
    bits, reward = bits_and_reward(logits, key)
    steps = (reward - jnp.mean(reward))[:, None] * (bits - jax.nn.sigmoid(logits))
    return g * jnp.mean(steps, axis=0), None


mean_reward.defvjp(saves(mean_reward), mean_reward_bwd)
add(
    mean_reward,
    "samples weighted by their reward; the reward of given samples is constant",
    (normal(24, 4), jax.random.key(6)),
)


@jax.custom_vjp
def order_matrix(x):
    return jax.nn.one_hot(jnp.argsort(-x), x.shape[0], dtype=x.dtype)


def soft_order(x):
    apart = jnp.sum(jnp.abs(x[:, None] - x[None, :]), axis=1)
    n = x.shape[0]
    weight = (n - 1 - 2 * jnp.arange(n)).astype(x.dtype)
    return jax.nn.softmax(weight[:, None] * x[None, :] - apart[None, :], axis=-1)


def order_matrix_bwd(x, g):
    return jax.vjp(soft_order, x)[1](g)


order_matrix.defvjp(lambda x: (order_matrix(x), x), order_matrix_bwd)
add(order_matrix, "a permutation matrix, backward as its relaxation", (normal(25, 6),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def kept_weights(scores, share):
    level = jnp.quantile(scores, 1 - share)
    return (scores >= level).astype(scores.dtype)


def kept_weights_fwd(scores, share):
    return kept_weights(scores, share), None


def kept_weights_bwd(share, _, g):
    return (g,)


kept_weights.defvjp(kept_weights_fwd, kept_weights_bwd)
add(kept_weights, "a pruning mask whose scores learn", (normal(26, 5, 7), 0.4))


# --- by evidence: the argument handed on, the cotangent shaped


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded(x, limit=0.5):
    return x


def bounded_fwd(x, limit):
    return x, None


def bounded_bwd(limit, _, g):
    return (jnp.clip(g, -limit, limit),)


bounded.defvjp(bounded_fwd, bounded_bwd)
add(bounded, "the cotangent clipped by value", (normal(27, 5, 7), 0.5))


@jax.custom_vjp
def bounded_together(params):
    return params


def bounded_together_bwd(_, g):
    size = jnp.sqrt(sum(jnp.sum(d * d) for d in jax.tree.leaves(g)))
    factor = 1 / jnp.maximum(size, 1)
    return (jax.tree.map(lambda d: d * factor, g),)


bounded_together.defvjp(lambda params: (params, None), bounded_together_bwd)
add(
    bounded_together,
    "the cotangents of a pytree clipped by their common norm",
    ({"w": normal(28, 4, 3), "b": normal(29, 3)},),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def weighted(x, factor):
    return x


def weighted_fwd(x, factor):
    return x, None


def weighted_bwd(factor, _, g):
    return (factor * g,)


weighted.defvjp(weighted_fwd, weighted_bwd)
add(weighted, "the cotangent scaled", (normal(30, 5, 7), 0.1))


@jax.custom_vjp
def adversary(x, strength):
    return x


def adversary_bwd(strength, g):
    return -strength * g, None


adversary.defvjp(lambda x, strength: (x, strength), adversary_bwd)
add(
    adversary,
    "the cotangent turned; the strength is an array",
    (normal(31, 5, 7), jnp.float32(0.3)),
)


@jax.custom_jvp
def held(x):
    return x


@held.defjvp
def held_jvp(primals, tangents):
    return primals[0], jnp.zeros_like(tangents[0])


add(held, "the identity with gradient 0", (normal(32, 5, 7),))


@jax.custom_vjp
def second_held(x, y):
    return x, y


def second_held_bwd(_, g):
    return g[0], jnp.zeros_like(g[1])


second_held.defvjp(lambda x, y: ((x, y), None), second_held_bwd)
add(second_held, "one of two arguments is held", (normal(33, 5), normal(34, 4)))


@jax.custom_vjp
def shaken(x, key):
    return x


def shaken_bwd(key, g):
    return g + 0.1 * jax.random.normal(key, g.shape, g.dtype), None


shaken.defvjp(lambda x, key: (x, key), shaken_bwd)
add(shaken, "noise is added to the cotangent", (normal(35, 5, 7), jax.random.key(7)))


@jax.custom_vjp
def thinned(x, key):
    return x


def thinned_bwd(key, g):
    return jnp.where(jax.random.bernoulli(key, 0.5, g.shape), 2 * g, 0), None


thinned.defvjp(lambda x, key: (x, key), thinned_bwd)
add(thinned, "dropout on the cotangent", (normal(36, 5, 7), jax.random.key(8)))


@jax.custom_vjp
def finite_only(x):
    return x


def finite_only_bwd(_, g):
    d = jnp.nan_to_num(g)
    return (d / jnp.maximum(jnp.max(jnp.abs(d), initial=0), 1e-12),)


finite_only.defvjp(lambda x: (x, None), finite_only_bwd)
add(finite_only, "the cotangent normalised to 1", (normal(37, 5, 7),))


# --- by the author's word


@jax.custom_vjp
def clip_straight_through(x):
    return jnp.clip(x, -1, 1)


def clip_straight_through_bwd(_, g):
    return (g,)


clip_straight_through.defvjp(lambda x: (clip_straight_through(x), None), clip_straight_through_bwd)
add(clip_straight_through, "says so in its name", (2 * normal(38, 5, 7),))


@jax.custom_vjp
def vector_quantised(z, codes):
    """The nearest code, with a straight-through gradient for z and none for the codes."""
    return codes[jnp.argmin(squared_distances(z, codes), axis=-1)]


def vector_quantised_bwd(codes, g):
    return g, jnp.zeros_like(codes)


vector_quantised.defvjp(lambda z, codes: (vector_quantised(z, codes), codes), vector_quantised_bwd)
add(vector_quantised, "says so in its docstring", (normal(39, 6, 3), normal(40, 5, 3)))


@surrogate
@jax.custom_vjp
def guided_relu(x):
    return jnp.maximum(x, 0)


def guided_relu_bwd(x, g):
    return (jnp.where((x > 0) & (g > 0), g, 0),)


guided_relu.defvjp(lambda x: (guided_relu(x), x), guided_relu_bwd)
add(guided_relu, "guided backpropagation, marked", (normal(41, 5, 7),))


@surrogate
@jax.custom_vjp
def learned_step_quantised(x, scale):
    return scale * jnp.clip(jnp.round(x / scale), -8, 7)


def learned_step_quantised_bwd(saved, g):
    x, scale = saved
    z = x / scale
    inside = (z > -8) & (z < 7)
    dscale = jnp.where(inside, jnp.round(z) - z, jnp.clip(jnp.round(z), -8, 7))
    return jnp.where(inside, g, 0), jnp.sum(g * dscale) / math.sqrt(7 * x.size)


learned_step_quantised.defvjp(saves(learned_step_quantised), learned_step_quantised_bwd)
add(learned_step_quantised, "LSQ, marked", (normal(42, 5, 7), jnp.float32(0.2)))


@surrogate
@jax.custom_vjp
def scaled_sign(w):
    return jnp.sign(w) * jnp.mean(jnp.abs(w))


def scaled_sign_bwd(w, g):
    return (jnp.where(jnp.abs(w) <= 1, g, 0),)


scaled_sign.defvjp(lambda w: (scaled_sign(w), w), scaled_sign_bwd)
add(scaled_sign, "XNOR-Net's weights, marked", (normal(43, 5, 7),))


@jax.custom_vjp
def pruned(w):
    """Small weights as 0; straight-through, so that they may come back."""
    return jnp.where(jnp.abs(w) > 0.5, w, 0)


def pruned_bwd(_, g):
    return (g,)


pruned.defvjp(lambda w: (pruned(w), None), pruned_bwd)
add(pruned, "says so in its docstring", (normal(44, 5, 7),))


def contraction(z, w, x):
    return jnp.tanh(z @ (w / (1 + jnp.sqrt(jnp.sum(w * w)))) + x)


@jax.custom_vjp
def phantom_equilibrium(w, x):
    """A fixed point, with the phantom gradient of one unrolled and damped step."""
    return jax.lax.fori_loop(0, 30, lambda _, z: contraction(z, w, x), jnp.zeros_like(x))


def phantom_equilibrium_bwd(saved, g):
    z, w, x = saved
    return jax.vjp(lambda w, x: 0.5 * contraction(z, w, x), w, x)[1](g)


phantom_equilibrium.defvjp(
    lambda w, x: (z := phantom_equilibrium(w, x), (z, w, x)), phantom_equilibrium_bwd
)
add(phantom_equilibrium, "says so in name and docstring", (normal(45, 4, 4), normal(46, 5, 4)))


@jax.custom_vjp
def equilibrium(w, x):
    """A fixed point, with Jacobian-free backpropagation (Fung et al., 2022)."""
    return jax.lax.fori_loop(0, 30, lambda _, z: contraction(z, w, x), jnp.zeros_like(x))


def equilibrium_bwd(saved, g):
    z, w, x = saved
    return jax.vjp(lambda w, x: contraction(z, w, x), w, x)[1](g)


equilibrium.defvjp(lambda w, x: (z := equilibrium(w, x), (z, w, x)), equilibrium_bwd)
add(equilibrium, "says so in its docstring", (normal(47, 4, 4), normal(48, 5, 4)))


@jax.custom_vjp
def sampled_cost(mean, key):
    """The mean cost of samples, with the score-function estimator of its gradient."""
    drawn = mean + jax.random.normal(key, (30, *mean.shape), mean.dtype)
    return jnp.mean(jnp.sum(drawn**2, axis=-1))


def sampled_cost_bwd(saved, g):
    mean, key = saved
    noise = jax.random.normal(key, (30, *mean.shape), mean.dtype)
    cost = jnp.sum((mean + noise) ** 2, axis=-1)
    return g * jnp.mean((cost - jnp.mean(cost))[:, None] * noise, axis=0), None


sampled_cost.defvjp(saves(sampled_cost), sampled_cost_bwd)
add(sampled_cost, "says so in its docstring", (normal(49, 4), jax.random.key(9)))


@surrogate
@jax.custom_jvp
def relu_like_swish(x):
    return jnp.maximum(x, 0)


@relu_like_swish.defjvp
def relu_like_swish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    s = jax.nn.sigmoid(x)
    return relu_like_swish(x), dx * s * (1 + x * (1 - s))


add(relu_like_swish, "a tangent that does not die, marked", (normal(50, 5, 7),))


@surrogate
@jax.custom_gradient
def reversed_features(x):
    def pullback(g):
        return -0.5 * g

    return 2 * x, pullback


add(reversed_features, "made by custom_gradient, and marked", (normal(51, 5, 7),))


@surrogate
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sharpened(x, beta):
    return jax.nn.softmax(beta * x, axis=-1)


def sharpened_fwd(x, beta):
    return sharpened(x, beta), jax.nn.softmax(x, axis=-1)


def sharpened_bwd(beta, y, g):
    return (softmax_pullback(y, g),)


sharpened.defvjp(sharpened_fwd, sharpened_bwd)
add(sharpened, "forward sharp, backward soft, marked", (normal(52, 5, 7), 10.0))
