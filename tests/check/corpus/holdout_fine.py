"""Right rules by other hands that look suspicious, and surrogates."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jax import lax

from funcbp.check.audit import surrogate

from .entry import Fine
from .holdout_values import CUBE, dominant, normal, positive, symmetric

ENTRIES: list[Fine] = []


def right(name, f, *calls, why):
    """Adds a rule that is right."""
    ENTRIES.append(Fine(name, f, calls, why))


def deliberate(name, f, *calls, why):
    """Adds a surrogate."""
    ENTRIES.append(Fine(name, f, calls, why, "surrogate"))


# Kinks, ties and edges.


@jax.custom_vjp
def relu_right_slope(x):
    return jnp.maximum(x, 0.0)


def relu_right_slope_fwd(x):
    return jnp.maximum(x, 0.0), x >= 0


def relu_right_slope_bwd(on, g):
    return (jnp.where(on, g, 0.0),)


relu_right_slope.defvjp(relu_right_slope_fwd, relu_right_slope_bwd)
right(
    "relu_slope_one_at_zero",
    relu_right_slope,
    (jnp.array([-1.0, 0.0, 2.0, -0.0]),),
    (jnp.zeros((2, 3)),),
    why="any slope in [0, 1] is a subgradient at 0",
)


@jax.custom_vjp
def max_first(x):
    return jnp.max(x, axis=-1)


def max_first_fwd(x):
    i = jnp.argmax(x, axis=-1)
    return jnp.max(x, axis=-1), jax.nn.one_hot(i, x.shape[-1], dtype=bool)


def max_first_bwd(hit, g):
    return (jnp.where(hit, g[..., None], 0.0),)


max_first.defvjp(max_first_fwd, max_first_bwd)
right(
    "max_all_to_the_first",
    max_first,
    (jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]),),
    (normal(1, 2, 5),),
    why="one winner of a tie is a subgradient",
)


def pinball_plain(residual, quantile):
    return jnp.maximum(quantile * residual, (quantile - 1.0) * residual)


pinball = jax.custom_vjp(pinball_plain, nondiff_argnums=(1,))


def pinball_fwd(residual, quantile):
    return pinball_plain(residual, quantile), residual


def pinball_bwd(quantile, residual, g):
    return (g * jnp.where(residual > 0, quantile, jnp.where(residual < 0, quantile - 1.0, 0.0)),)


pinball.defvjp(pinball_fwd, pinball_bwd)
right(
    "pinball_flat_at_zero",
    pinball,
    (jnp.array([0.0, 1.0, -2.0, 0.3]), 0.9),
    why="0 lies between the slopes q - 1 and q",
)


@jax.custom_vjp
def row_norms(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def row_norms_fwd(x):
    n = row_norms(x)
    return n, (x, n)


def row_norms_bwd(res, g):
    x, n = res
    return (x * (g / jnp.where(n == 0, 1.0, n))[..., None],)


row_norms.defvjp(row_norms_fwd, row_norms_bwd)
right(
    "norms_with_a_zero_row",
    row_norms,
    (normal(2, 3, 4).at[1].set(0.0),),
    (jnp.zeros((2, 3)),),
    why="0 is a subgradient of the norm at 0, where autodiff is NaN",
)


@jax.custom_vjp
def sinc(x):
    return jnp.where(x == 0, 1.0, jnp.sin(x) / jnp.where(x == 0, 1.0, x))


def sinc_fwd(x):
    return sinc(x), x


def sinc_bwd(x, g):
    small = jnp.abs(x) < 0.3
    safe = jnp.where(small, 1.0, x)
    x2 = x * x
    series = -x / 3 * (1 - x2 / 10 * (1 - x2 / 28 * (1 - x2 / 54)))
    return (g * jnp.where(small, series, (jnp.cos(x) - jnp.sin(x) / safe) / safe),)


sinc.defvjp(sinc_fwd, sinc_bwd)
right(
    "sinc_by_series",
    sinc,
    (jnp.array([0.0, 1e-3, -0.2, 0.4, 3.0, -20.0]),),
    why="better than autodiff, which cancels near 0",
)


@jax.custom_vjp
def entropy_term(p, q):
    """p log q, and 0 where p is 0."""
    return jnp.where(p == 0, 0.0, p * jnp.log(jnp.where(p == 0, 1.0, q)))


def entropy_term_fwd(p, q):
    return entropy_term(p, q), (p, q)


def entropy_term_bwd(res, g):
    p, q = res
    return g * jnp.log(q), g * p / jnp.where((p == 0) & (q == 0), 1.0, q)


entropy_term.defvjp(entropy_term_fwd, entropy_term_bwd)
right(
    "log_slope_at_no_weight",
    entropy_term,
    (jnp.array([0.0, 0.3, 0.7, 0.0]), positive(3, 4)),
    why="log q is the slope at p = 0; autodiff of the guarded formula gives 0",
)


def clip_plain(x, low, high):
    return jnp.minimum(jnp.maximum(x, low), high)


clip = jax.custom_vjp(clip_plain, nondiff_argnums=(1, 2))


def clip_fwd(x, low, high):
    return clip_plain(x, low, high), (x >= low) & (x <= high)


def clip_bwd(low, high, inside, g):
    return (jnp.where(inside, g, 0.0),)


clip.defvjp(clip_fwd, clip_bwd)
right(
    "clip_open_at_its_bounds",
    clip,
    (jnp.array([-2.0, -1.0, 0.3, 1.0, 5.0]), -1.0, 1.0),
    why="the true gradient of a clip, and 1 at the bounds is a subgradient",
)


@jax.custom_vjp
def sawtooth(x):
    return x - jnp.floor(x)


def sawtooth_fwd(x):
    return sawtooth(x), None


def sawtooth_bwd(_, g):
    return (g,)


sawtooth.defvjp(sawtooth_fwd, sawtooth_bwd)
right(
    "sawtooth_identity_gradient",
    sawtooth,
    (normal(4, 6) * 3,),
    why="the slope is 1 everywhere but at the jumps",
)


@jax.custom_vjp
def sort_descending(x):
    return -jnp.sort(-x, axis=-1)


def sort_descending_fwd(x):
    order = jnp.argsort(-x, axis=-1)
    return jnp.take_along_axis(x, order, axis=-1), order


def sort_descending_bwd(order, g):
    return (jnp.take_along_axis(g, jnp.argsort(order, axis=-1), axis=-1),)


sort_descending.defvjp(sort_descending_fwd, sort_descending_bwd)
right(
    "sort_with_ties",
    sort_descending,
    (jnp.array([[2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]]),),
    (normal(5, 3, 1),),
    why="any order of equal values is a subgradient",
)


@jax.custom_vjp
def log_total(x):
    """log sum exp of the last axis, with -inf for what is masked."""
    return jsp.special.logsumexp(x, axis=-1)


def log_total_fwd(x):
    y = jsp.special.logsumexp(x, axis=-1)
    return y, (x, y)


def log_total_bwd(res, g):
    x, y = res
    p = jnp.exp(x - jnp.where(y == -jnp.inf, 0.0, y)[..., None])
    return (g[..., None] * p,)


log_total.defvjp(log_total_fwd, log_total_bwd)
right(
    "log_total_of_masked",
    log_total,
    (jnp.array([[1.0, -jnp.inf, 2.0], [-jnp.inf, 0.0, -jnp.inf]]),),
    (jnp.array([[500.0, 499.0, -800.0]]),),
    why="-inf entries have slope 0, large ones do not overflow",
)


@jax.custom_vjp
def running_product(x):
    return jnp.cumprod(x)


def running_product_fwd(x):
    return jnp.cumprod(x), x


def running_product_bwd(x, g):
    n = x.shape[0]
    i, j, k = jnp.ogrid[:n, :n, :n]
    # d y_j / d x_i is the product of x_k over k <= j, k != i.
    factors = jnp.where((k <= j) & (k != i), x, 1.0)
    return (jnp.where(i[..., 0] <= j[..., 0], jnp.prod(factors, axis=-1), 0.0) @ g,)


running_product.defvjp(running_product_fwd, running_product_bwd)
right(
    "product_through_zeros",
    running_product,
    (jnp.array([1.5, 0.0, 2.0, 0.0, 0.7]),),
    (normal(6, 1),),
    why="no division by the input",
)


# Magnitudes and precision.


@jax.custom_vjp
def square(x):
    return x * x


def square_fwd(x):
    return x * x, x


def square_bwd(x, g):
    return (2.0 * g * x,)


square.defvjp(square_fwd, square_bwd)
right(
    "square_of_large",
    square,
    (1e4 + normal(7, 5),),
    (1e-20 * normal(8, 5),),
    (jnp.asarray(normal(9, 5), "float16") * 100,),
    why="differences in float32 would be lost in the value",
)


@jax.custom_vjp
def wide_layer_norm(x, gain, bias):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-5) * gain + bias


def wide_layer_norm_fwd(x, gain, bias):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inv = lax.rsqrt(jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + 1e-5)
    xhat = (x - mean) * inv
    return xhat * gain + bias, (xhat, inv, gain)


def wide_layer_norm_bwd(res, g):
    xhat, inv, gain = res
    d = g * gain
    along = jnp.mean(d * xhat, axis=-1, keepdims=True)
    dx = inv * (d - jnp.mean(d, axis=-1, keepdims=True) - xhat * along)
    axes = tuple(range(g.ndim - 1))
    return dx, jnp.sum(g * xhat, axis=axes), jnp.sum(g, axis=axes)


wide_layer_norm.defvjp(wide_layer_norm_fwd, wide_layer_norm_bwd)
right(
    "layer_norm_of_width_512",
    wide_layer_norm,
    (normal(10, 3, 512), positive(11, 512), normal(12, 512)),
    (normal(13, 2, 1), positive(14, 1), normal(15, 1)),
    why="long sums; with one feature the gradient of x is 0",
)


@jax.custom_vjp
def half_matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def half_matmul_fwd(a, b):
    return half_matmul(a, b), (a, b)


def half_matmul_bwd(res, g):
    a, b = res
    da = jnp.matmul(g, b.T, preferred_element_type=jnp.float32).astype(a.dtype)
    return da, jnp.matmul(a.T, g, preferred_element_type=jnp.float32).astype(b.dtype)


half_matmul.defvjp(half_matmul_fwd, half_matmul_bwd)
right(
    "matmul_in_half",
    half_matmul,
    (normal(16, 6, 64, dtype="bfloat16"), normal(17, 64, 5, dtype="bfloat16")),
    (normal(18, 3, 4, dtype="float16"), normal(19, 4, 1, dtype="float16")),
    why="float32 accumulation, rounded once",
)


@jax.custom_vjp
def log_sum_softplus(x):
    return jnp.sum(jnp.logaddexp(x, 0.0))


def log_sum_softplus_fwd(x):
    return log_sum_softplus(x), x


def log_sum_softplus_bwd(x, g):
    return (g * jax.nn.sigmoid(x),)


log_sum_softplus.defvjp(log_sum_softplus_fwd, log_sum_softplus_bwd)
right(
    "softplus_at_both_ends",
    log_sum_softplus,
    (jnp.array([-1e4, -90.0, 0.0, 90.0, 1e4]),),
    why="sigmoid saturates without overflow",
)


@jax.custom_jvp
def log1mexp(x):
    """log(1 - exp(-x)) for x > 0."""
    return jnp.where(
        x < 0.6931472, jnp.log(-jnp.expm1(-x)), jnp.log1p(-jnp.exp(-jnp.maximum(x, 0.5)))
    )


@log1mexp.defjvp
def log1mexp_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return log1mexp(x), t / jnp.expm1(x)


right(
    "log1mexp_of_tiny",
    log1mexp,
    (jnp.array([1e-6, 1e-3, 0.69, 0.7, 5.0, 60.0]),),
    why="slopes from 1e6 to 1e-26 in one array",
)


def largest(x):
    return lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(x.dtype).tiny))


@jax.custom_vjp
def big_norm(x):
    s = largest(x)
    return s * jnp.sqrt(jnp.sum((x / s) ** 2))


def big_norm_fwd(x):
    return big_norm(x), x


def big_norm_bwd(x, g):
    z = x / largest(x)
    r = jnp.sqrt(jnp.sum(z * z))
    return (g * z / jnp.where(r == 0, 1.0, r),)


big_norm.defvjp(big_norm_fwd, big_norm_bwd)
right(
    "norm_of_huge_and_tiny",
    big_norm,
    (1e30 * normal(20, 5),),
    (1e-30 * normal(21, 5),),
    (normal(22, 1),),
    why="no square of the input is formed",
)


HILBERT = jnp.asarray(1.0 / (1.0 + np.add.outer(np.arange(5), np.arange(5))), "float32")


@jax.custom_vjp
def dense_solve(a, b):
    return jnp.linalg.solve(a, b)


def dense_solve_fwd(a, b):
    x = jnp.linalg.solve(a, b)
    return x, (a, x)


def dense_solve_bwd(res, g):
    a, x = res
    lam = jnp.linalg.solve(a.T, g)
    return -jnp.outer(lam, x), lam


dense_solve.defvjp(dense_solve_fwd, dense_solve_bwd)
right(
    "solve_of_a_hilbert_matrix",
    dense_solve,
    (HILBERT, normal(23, 5)),
    (dominant(24, 4), normal(25, 4)),
    (jnp.array([[2.0]]), normal(26, 1)),
    why="ill-conditioned: rule and autodiff are both far from float64",
)


@jax.custom_vjp
def symmetric_sqrt(a):
    """Square root of a positive definite matrix; reads the symmetric part."""
    w, v = jnp.linalg.eigh(a)
    return (v * jnp.sqrt(w)) @ v.T


def symmetric_sqrt_fwd(a):
    w, v = jnp.linalg.eigh(a)
    r = jnp.sqrt(w)
    return (v * r) @ v.T, (r, v)


def symmetric_sqrt_bwd(res, g):
    r, v = res
    return (symmetric(v @ ((v.T @ g @ v) / (r[:, None] + r)) @ v.T),)


symmetric_sqrt.defvjp(symmetric_sqrt_fwd, symmetric_sqrt_bwd)
right(
    "matrix_root_repeated_eigenvalues",
    symmetric_sqrt,
    (jnp.diag(jnp.array([1.0, 1.0, 4.0])),),
    (dominant(27, 3) @ dominant(27, 3).T,),
    why="smooth there, though autodiff through eigh is NaN",
)


@jax.custom_vjp
def log_det(a):
    return jnp.linalg.slogdet(a)[1]


def log_det_fwd(a):
    return log_det(a), a


def log_det_bwd(a, g):
    return (g * jnp.linalg.inv(a).T,)


log_det.defvjp(log_det_fwd, log_det_bwd)
right(
    "log_det_any_sign",
    log_det,
    (normal(28, 4, 4),),
    (jnp.diag(jnp.array([1e-4, 1.0, -1e4])),),
    why="determinants of either sign, entries over eight decades",
)


# Randomness, structure, nondifferentiable arguments.


def noisy_plain(x, key, rate):
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


inverted_dropout = jax.custom_vjp(noisy_plain, nondiff_argnums=(2,))


def inverted_dropout_fwd(x, key, rate):
    return noisy_plain(x, key, rate), key


def inverted_dropout_bwd(rate, key, g):
    return noisy_plain(g, key, rate), None


inverted_dropout.defvjp(inverted_dropout_fwd, inverted_dropout_bwd)
right(
    "dropout_redrawn_from_its_key",
    inverted_dropout,
    (normal(29, 5, 4), jax.random.key(3), 0.3),
    (normal(30, 1), jax.random.PRNGKey(4), 0.5),
    why="the same key gives the same mask",
)


@jax.custom_vjp
def gumbel_softmax(logits, key):
    return jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / 0.5)


def gumbel_softmax_fwd(logits, key):
    y = gumbel_softmax(logits, key)
    return y, y


def gumbel_softmax_bwd(y, g):
    return 2.0 * y * (g - jnp.sum(g * y, axis=-1, keepdims=True)), None


gumbel_softmax.defvjp(gumbel_softmax_fwd, gumbel_softmax_bwd)
right(
    "gumbel_softmax_sample",
    gumbel_softmax,
    (normal(31, 3, 4), jax.random.key(5)),
    why="random, but a function of its key",
)


class Normal(NamedTuple):
    """Parameters of a normal distribution."""

    loc: jax.Array
    scale: jax.Array


@jax.custom_vjp
def log_prob(dists, x, counts):
    """Sum over named components; `shift` may be absent."""
    total = 0.0
    for name, d in dists["parts"].items():
        z = (x[name] - d.loc) / d.scale
        total = total + jnp.sum(counts * (-0.5 * z**2 - jnp.log(d.scale)))
    return total if dists["shift"] is None else total + dists["shift"]


def log_prob_fwd(dists, x, counts):
    return log_prob(dists, x, counts), (dists, x, counts)


def log_prob_bwd(res, g):
    dists, x, counts = res
    parts, dx = {}, {}
    for name, d in dists["parts"].items():
        z = (x[name] - d.loc) / d.scale
        dx[name] = -g * counts * z / d.scale
        parts[name] = Normal(-dx[name], g * counts * (z**2 - 1.0) / d.scale)
    return {"parts": parts, "shift": None if dists["shift"] is None else g}, dx, None


log_prob.defvjp(log_prob_fwd, log_prob_bwd)
COUNTS = jnp.array([1, 0, 3])
DISTS = {"a": Normal(normal(32, 3), positive(33, 3)), "b": Normal(normal(34, 3), positive(35, 3))}
right(
    "nested_parameters",
    log_prob,
    ({"parts": DISTS, "shift": None}, {"a": normal(36, 3), "b": normal(37, 3)}, COUNTS),
    (
        {"parts": {"a": DISTS["a"]}, "shift": jnp.float32(0.3)},
        {"a": normal(38, 3)},
        COUNTS,
    ),
    why="named tuples in dictionaries, None inside, integers beside",
)


def contract(p, z):
    """A contraction towards its fixed point."""
    return 0.5 * jnp.cos(z + p["a"]) + p["b"]


def iterate_plain(step, p, z0):
    def body(state):
        old, new, i = state
        return new, step(p, new), i + 1

    def unfinished(state):
        old, new, i = state
        return (jnp.max(jnp.abs(old - new)) > 0) & (i < 200)

    return lax.while_loop(unfinished, body, (z0, step(p, z0), 0))[1]


iterate = jax.custom_vjp(iterate_plain, nondiff_argnums=(0,))


def iterate_fwd(step, p, z0):
    z = iterate_plain(step, p, z0)
    return z, (p, z)


def iterate_bwd(step, res, g):
    p, z = res
    _, pull_z = jax.vjp(lambda v: step(p, v), z)

    def body(_, lam):
        return g + pull_z(lam)[0]

    lam = lax.fori_loop(0, 100, body, g)
    return jax.vjp(lambda v: step(v, z), p)[1](lam)[0], jnp.zeros_like(z)


iterate.defvjp(iterate_fwd, iterate_bwd)
right(
    "fixed_point_of_a_function",
    iterate,
    (contract, {"a": positive(39, 3, low=0.5, high=1.2), "b": 0.3 * normal(40, 3)}, jnp.zeros(3)),
    why="exact at the fixed point, where the start does not matter; a loop that cannot be reversed",
)


def newton_root(a):
    def body(state):
        x, _, i = state
        return 0.5 * (x + a / x), x, i + 1

    def moving(state):
        x, old, i = state
        return jnp.any(jnp.abs(x - old) > 1e-7 * x) & (i < 100)

    return lax.while_loop(moving, body, (1.0 + 0.5 * a, a, 0))[0]


babylonian = jax.custom_vjp(newton_root)


def babylonian_fwd(a):
    x = newton_root(a)
    return x, x


def babylonian_bwd(x, g):
    return (0.5 * g / x,)


babylonian.defvjp(babylonian_fwd, babylonian_bwd)
right(
    "root_by_iteration",
    babylonian,
    (positive(41, 5),),
    why="a loop that autodiff cannot reverse; the rule knows the answer",
)


def host_erf(x):
    return np.vectorize(math.erf)(x).astype(x.dtype)


@jax.custom_jvp
def erf_on_host(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(host_erf, shape, x, vmap_method="expand_dims")


@erf_on_host.defjvp
def erf_on_host_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return erf_on_host(x), t * (2.0 / np.sqrt(np.pi)) * jnp.exp(-x * x)


right(
    "callback_with_a_rule",
    erf_on_host,
    (normal(42, 4),),
    why="the primal cannot be differentiated at all",
)


@jax.custom_vjp
def max_and_place(x):
    return jnp.max(x, axis=-1), jnp.argmax(x, axis=-1)


def max_and_place_fwd(x):
    y, i = max_and_place(x)
    return (y, i), (i, x)


def max_and_place_bwd(res, cts):
    i, x = res
    return (cts[0][..., None] * jax.nn.one_hot(i, x.shape[-1], dtype=x.dtype),)


max_and_place.defvjp(max_and_place_fwd, max_and_place_bwd)
right(
    "integer_output",
    max_and_place,
    (normal(43, 3, 4),),
    why="the place has no cotangent",
)


@jax.custom_vjp
def loss_and_log(pred, target):
    """A loss, and its logarithm as a metric that no gradient passes."""
    loss = jnp.mean((pred - target) ** 2)
    return loss, lax.stop_gradient(jnp.log(loss))


def loss_and_log_fwd(pred, target):
    return loss_and_log(pred, target), pred - target


def loss_and_log_bwd(d, cts):
    dpred = cts[0] * 2.0 * d / d.size
    return dpred, -dpred


loss_and_log.defvjp(loss_and_log_fwd, loss_and_log_bwd)
right(
    "metric_stops_gradients",
    loss_and_log,
    (normal(44, 4), normal(45, 4)),
    why="the function itself stops the gradient of its second output",
)


@jax.custom_vjp
def tracked_dense(x, w):
    return jnp.tanh(x @ w)


def tracked_dense_fwd(x, w):
    """Arguments carry whether they are perturbed."""
    y = jnp.tanh(x.value @ w.value)
    return y, (y, x.value, w.value if x.perturbed else None)


def tracked_dense_bwd(res, g):
    y, x, w = res
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None
    dz = g * (1.0 - y * y)
    return None if w is None else dz @ w.T, x.T @ dz


tracked_dense.defvjp(tracked_dense_fwd, tracked_dense_bwd, symbolic_zeros=True)
right(
    "symbolic_zeros",
    tracked_dense,
    (normal(46, 4, 3), normal(47, 3, 2)),
    (normal(48, 1, 3), normal(49, 3, 1)),
    why="skips what is not asked for",
)


@jax.custom_vjp
def recomputed_block(x, w):
    return jnp.sum(jnp.sin(x @ w) ** 2, axis=-1)


def recomputed_block_fwd(x, w):
    return recomputed_block(x, w), (x, w)


def recomputed_block_bwd(res, g):
    x, w = lax.optimization_barrier(res)
    return jax.vjp(recomputed_block.fun, x, w)[1](g)


recomputed_block.defvjp(recomputed_block_fwd, recomputed_block_bwd)
right(
    "recomputed_in_reverse",
    recomputed_block,
    (normal(50, 4, 3), normal(51, 3, 5)),
    (normal(52, 3), normal(53, 3, 3)),
    why="runs the function again inside the reverse rule",
)


@jax.custom_vjp
def empty_safe_mean(x):
    """Mean over the first axis; 0 where it is empty."""
    return jnp.sum(x, axis=0) / max(x.shape[0], 1)


def empty_safe_mean_fwd(x):
    return empty_safe_mean(x), x.shape[0]


def empty_safe_mean_bwd(n, g):
    return (jnp.broadcast_to(g / max(n, 1), (n, *g.shape)),)


empty_safe_mean.defvjp(empty_safe_mean_fwd, empty_safe_mean_bwd)
right(
    "mean_of_nothing",
    empty_safe_mean,
    (jnp.zeros((0, 4)),),
    (normal(54, 3, 0),),
    (normal(55, 5),),
    why="zero-size arrays",
)


@jax.custom_jvp
def scaled_sine(x, frequency):
    return jnp.sin(frequency * x)


@scaled_sine.defjvp
def scaled_sine_jvp(primals, tangents):
    x, frequency = primals
    dx, df = tangents
    return jnp.sin(frequency * x), jnp.cos(frequency * x) * (frequency * dx + x * df)


right(
    "python_scalars",
    scaled_sine,
    (0.7, 2.0),
    (normal(56, 4), 3.0),
    why="weakly typed arguments",
)


# Complex numbers, spectra and sequences.


@jax.custom_vjp
def spectrum(x):
    return jnp.fft.rfft(x)


def spectrum_fwd(x):
    return jnp.fft.rfft(x), x.shape[-1]


def spectrum_bwd(n, g):
    full = jnp.zeros((*g.shape[:-1], n), g.dtype).at[..., : g.shape[-1]].set(g)
    return (jnp.real(jnp.fft.fft(full)),)


spectrum.defvjp(spectrum_fwd, spectrum_bwd)
right(
    "spectrum_without_conjugate",
    spectrum,
    (normal(57, 7),),
    (normal(58, 2, 8),),
    (normal(59, 1),),
    why="JAX's cotangents of complex numbers are not conjugated",
)


@jax.custom_vjp
def modulus(z):
    return jnp.abs(z)


def modulus_fwd(z):
    return jnp.abs(z), z


def modulus_bwd(z, g):
    r = jnp.abs(z)
    return (g * jnp.conj(z) / jnp.where(r == 0, 1.0, r),)


modulus.defvjp(modulus_fwd, modulus_bwd)
right(
    "modulus_with_a_zero",
    modulus,
    (jnp.array([0.0 + 0j, 1 + 2j, -3j, 0.5 - 0.1j]),),
    why="the conjugate is right here, and 0 is a subgradient at 0",
)


@jax.custom_vjp
def unit_rotation(theta):
    return jnp.exp(1j * theta)


def unit_rotation_fwd(theta):
    z = jnp.exp(1j * theta)
    return z, z


def unit_rotation_bwd(z, g):
    return (-jnp.imag(g * z),)


unit_rotation.defvjp(unit_rotation_fwd, unit_rotation_bwd)
right(
    "rotation_from_real_to_complex",
    unit_rotation,
    (normal(60, 5),),
    why="Re(g i z) is -Im(g z)",
)


def tanh_rnn_plain(w, x, h0):
    def step(h, xt):
        h = jnp.tanh(w["in"] @ xt + w["rec"] @ h)
        return h, h

    return lax.scan(step, h0, x)[1]


tanh_rnn = jax.custom_vjp(tanh_rnn_plain)


def tanh_rnn_fwd(w, x, h0):
    hs = tanh_rnn_plain(w, x, h0)
    return hs, (w, x, jnp.concatenate([h0[None], hs]))


def tanh_rnn_bwd(res, g):
    w, x, hs = res

    def step(dh, inputs):
        gt, h = inputs
        dz = (gt + dh) * (1.0 - h * h)
        return w["rec"].T @ dz, dz

    dh0, dz = lax.scan(step, jnp.zeros_like(hs[0]), (g, hs[1:]), reverse=True)
    return {"in": dz.T @ x, "rec": dz.T @ hs[:-1]}, dz @ w["in"], dh0


tanh_rnn.defvjp(tanh_rnn_fwd, tanh_rnn_bwd)
right(
    "recurrent_by_hand",
    tanh_rnn,
    ({"in": normal(61, 3, 2), "rec": 0.5 * normal(62, 3, 3)}, normal(63, 6, 2), normal(64, 3)),
    ({"in": normal(65, 1, 2), "rec": normal(66, 1, 1)}, normal(67, 1, 2), normal(68, 1)),
    why="back-propagation through time with a reversed scan",
)


@jax.custom_vjp
def causal_attention(q, k, v):
    keep = jnp.tril(jnp.ones((q.shape[0], k.shape[0]), bool))
    s = jnp.where(keep, q @ k.T * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(s) @ v


def causal_attention_fwd(q, k, v):
    out = causal_attention(q, k, v)
    return out, (q, k, v, out)


def causal_attention_bwd(res, do):
    q, k, v, out = res
    scale = q.shape[-1] ** -0.5
    keep = jnp.tril(jnp.ones((q.shape[0], k.shape[0]), bool))
    p = jax.nn.softmax(jnp.where(keep, q @ k.T * scale, -jnp.inf))
    ds = p * (do @ v.T - jnp.sum(do * out, axis=-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ do


causal_attention.defvjp(causal_attention_fwd, causal_attention_bwd)
right(
    "causal_attention_from_its_output",
    causal_attention,
    (normal(69, 5, 4), normal(70, 5, 4), normal(71, 5, 3)),
    (8.0 * normal(72, 3, 4), 8.0 * normal(73, 7, 4), normal(74, 7, 2)),
    (normal(75, 6, 2), normal(76, 3, 2), normal(77, 3, 1)),
    why="probabilities recomputed, the output reused; keys that no query sees have gradient 0",
)


def strided_conv_plain(x, kernel, stride):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


strided_conv = jax.custom_vjp(strided_conv_plain, nondiff_argnums=(2,))


def strided_conv_fwd(x, kernel, stride):
    return strided_conv_plain(x, kernel, stride), (x, kernel)


def strided_conv_bwd(stride, res, g):
    x, kernel = res
    dx = jax.linear_transpose(lambda v: strided_conv_plain(v, kernel, stride), x)(g)[0]
    return dx, jax.linear_transpose(lambda v: strided_conv_plain(x, v, stride), kernel)(g)[0]


strided_conv.defvjp(strided_conv_fwd, strided_conv_bwd)
right(
    "strided_convolution",
    strided_conv,
    (normal(78, 2, 5, 4, 2), normal(79, 3, 2, 2, 3), 2),
    why="transposes with strides that leave a remainder",
)


@jax.custom_vjp
def segment_peak(x, segments):
    """Maximum of each of 4 segments; -inf where one is empty."""
    return jax.ops.segment_max(x, segments, 4)


def segment_peak_fwd(x, segments):
    y = jax.ops.segment_max(x, segments, 4)
    return y, (x, segments, y)


def segment_peak_bwd(res, g):
    x, segments, y = res
    hit = x == y[segments]
    share = jax.ops.segment_sum(hit.astype(g.dtype), segments, 4)
    return jnp.where(hit, g[segments] / share[segments], 0.0), None


segment_peak.defvjp(segment_peak_fwd, segment_peak_bwd)
right(
    "segment_peak_with_an_empty_one",
    segment_peak,
    (jnp.array([1.0, 2.0, 2.0, -1.0, 0.5]), jnp.array([0, 1, 1, 3, 3])),
    why="ties shared evenly; an empty segment gives -inf and no gradient",
)


@jax.custom_vjp
def harmonic_chain(positions, stiffness):
    """Energy of springs between all particles at unit rest length."""
    d = positions[:, None] - positions
    eye = jnp.eye(positions.shape[0])
    r = jnp.sqrt(jnp.sum(d**2, axis=-1) + eye) * (1.0 - eye)
    return 0.25 * stiffness * jnp.sum((1.0 - eye) * (r - 1.0) ** 2)


def harmonic_chain_fwd(positions, stiffness):
    return harmonic_chain(positions, stiffness), (positions, stiffness)


def harmonic_chain_bwd(res, g):
    positions, stiffness = res
    d = positions[:, None] - positions
    eye = jnp.eye(positions.shape[0])
    r = jnp.sqrt(jnp.sum(d**2, axis=-1) + eye)
    stretch = (1.0 - eye) * (r - 1.0)
    force = jnp.sum((stretch / r)[..., None] * d, axis=1)
    return g * stiffness * force, 0.25 * g * jnp.sum(stretch**2)


harmonic_chain.defvjp(harmonic_chain_fwd, harmonic_chain_bwd)
right(
    "springs_by_hand",
    harmonic_chain,
    (CUBE + 0.1 * normal(80, 8, 3), jnp.float32(2.0)),
    (normal(81, 2, 3), jnp.float32(0.0)),
    why="many cancelling contributions; a stiffness of 0",
)


@jax.custom_jvp
def log_gamma(x):
    return jsp.special.gammaln(x)


@log_gamma.defjvp
def log_gamma_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return log_gamma(x), jsp.special.digamma(x) * t


right(
    "log_gamma_near_its_minimum",
    log_gamma,
    (jnp.array([0.01, 1.4616321, 3.0, 250.0]),),
    why="the slope crosses 0 at 1.4616",
)


@jax.custom_vjp
def attend_or_zero(x, mask):
    """Softmax over unmasked places; a row without any is 0."""
    big = jnp.where(mask, x, -jnp.inf)
    top = jnp.max(big, axis=-1, keepdims=True)
    e = jnp.where(mask, jnp.exp(x - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1.0, total)


def attend_or_zero_fwd(x, mask):
    y = attend_or_zero(x, mask)
    return y, y


def attend_or_zero_bwd(y, g):
    return y * (g - jnp.sum(g * y, axis=-1, keepdims=True)), None


attend_or_zero.defvjp(attend_or_zero_fwd, attend_or_zero_bwd)
right(
    "softmax_of_a_masked_row",
    attend_or_zero,
    (normal(82, 3, 4), jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)),
    why="a fully masked row is 0 and has no gradient",
)


@jax.custom_vjp
def overflow_guarded(x, scale):
    """float16 in, float16 out, float32 between."""
    return (jnp.tanh(x.astype(jnp.float32) / 1e3) * scale).astype(x.dtype)


def overflow_guarded_fwd(x, scale):
    return overflow_guarded(x, scale), (x, scale)


def overflow_guarded_bwd(res, g):
    x, scale = res
    t = jnp.tanh(x.astype(jnp.float32) / 1e3)
    g = g.astype(jnp.float32)
    return (g * scale * (1.0 - t * t) / 1e3).astype(x.dtype), jnp.sum(g * t)


overflow_guarded.defvjp(overflow_guarded_fwd, overflow_guarded_bwd)
right(
    "mixed_precision_near_the_end",
    overflow_guarded,
    (jnp.array([3e4, -6e4, 10.0, 800.0], "float16"), jnp.float32(500.0)),
    why="float16 values near the largest, a float32 scale",
)


@jax.custom_vjp
def unused_argument(x, hint):
    return jnp.exp(x)


def unused_argument_fwd(x, hint):
    y = jnp.exp(x)
    return y, y


def unused_argument_bwd(y, g):
    return g * y, None


unused_argument.defvjp(unused_argument_fwd, unused_argument_bwd)
right(
    "argument_without_effect",
    unused_argument,
    (normal(83, 4), normal(84, 2)),
    why="None is 0 for an argument that the value does not depend on",
)


# Surrogates that the evidence shows.


@jax.custom_vjp
def snap(x):
    return jnp.round(x * 8.0) / 8.0


def snap_fwd(x):
    return snap(x), None


def snap_bwd(_, g):
    return (g,)


snap.defvjp(snap_fwd, snap_bwd)
deliberate(
    "snap_to_eighths", snap, (normal(85, 6),), (normal(86, 2, 3),), why="the true slope is 0"
)


@jax.custom_jvp
def fire(v):
    return (v > 1.0).astype(v.dtype)


@fire.defjvp
def fire_jvp(primals, tangents):
    (v,), (t,) = primals, tangents
    return fire(v), t / (1.0 + 10.0 * jnp.abs(v - 1.0)) ** 2


deliberate(
    "threshold_fast_sigmoid",
    fire,
    (1.0 + normal(87, 6),),
    why="a step forward, a smooth slope backward",
)


@jax.custom_vjp
def to_grid(x, low, high):
    """Sixteen levels between low and high."""
    step = (high - low) / 15.0
    return jnp.round((jnp.clip(x, low, high) - low) / step) * step + low


def to_grid_fwd(x, low, high):
    return to_grid(x, low, high), (x, low, high)


def to_grid_bwd(res, g):
    x, low, high = res
    below, above = x < low, x > high
    inside = ~(below | above)
    return g * inside, jnp.sum(g * below), jnp.sum(g * above)


to_grid.defvjp(to_grid_fwd, to_grid_bwd)
deliberate(
    "learned_range",
    to_grid,
    (normal(88, 8), jnp.float32(-1.0), jnp.float32(1.0)),
    why="rounding with learned ends",
)


@jax.custom_vjp
def winner(x):
    return jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=x.dtype)


def winner_fwd(x):
    return winner(x), jax.nn.softmax(x)


def winner_bwd(p, g):
    return (p * (g - jnp.sum(p * g, axis=-1, keepdims=True)),)


winner.defvjp(winner_fwd, winner_bwd)
deliberate(
    "winner_with_softmax_slopes", winner, (normal(89, 3, 4),), why="one-hot is constant by pieces"
)


@jax.custom_vjp
def tap(x):
    return x


def tap_fwd(x):
    return x, None


def tap_bwd(_, g):
    return (-0.3 * g,)


tap.defvjp(tap_fwd, tap_bwd)
deliberate("tap_turns_back", tap, (normal(90, 4, 3),), why="identity forward, -0.3 backward")


@jax.custom_vjp
def guard(tree):
    return tree


def guard_fwd(tree):
    return tree, None


def guard_bwd(_, g):
    norm = jnp.sqrt(sum(jnp.sum(v * v) for v in jax.tree.leaves(g)))
    factor = jnp.minimum(1.0, 1.0 / jnp.maximum(norm, 1e-9))
    return (jax.tree.map(lambda v: v * factor, g),)


guard.defvjp(guard_fwd, guard_bwd)
deliberate(
    "guard_bounds_the_norm",
    guard,
    ({"w": normal(91, 3, 2), "b": normal(92, 2)},),
    why="identity forward, a bounded norm backward",
)


@jax.custom_vjp
def nearest_code(x, book):
    d = jnp.sum((x[:, None] - book) ** 2, axis=-1)
    return book[jnp.argmin(d, axis=-1)]


def nearest_code_fwd(x, book):
    i = jnp.argmin(jnp.sum((x[:, None] - book) ** 2, axis=-1), axis=-1)
    return book[i], (i, book)


def nearest_code_bwd(res, g):
    i, book = res
    return g, jnp.zeros_like(book).at[i].add(g)


nearest_code.defvjp(nearest_code_fwd, nearest_code_bwd)
deliberate(
    "vector_quantised",
    nearest_code,
    (normal(93, 5, 2), normal(94, 4, 2)),
    why="the codes' gradient is true, the input's passes through",
)


@jax.custom_vjp
def count_to(x):
    return jnp.floor(x), jnp.sign(x)


def count_to_fwd(x):
    return count_to(x), x


def count_to_bwd(x, cts):
    return (cts[0] + cts[1] * (jnp.abs(x) < 1.0),)


count_to.defvjp(count_to_fwd, count_to_bwd)
deliberate(
    "two_steps_at_once", count_to, (normal(95, 5) * 2,), why="both outputs are constant by pieces"
)


# Surrogates by word.


@jax.custom_vjp
def binary_concrete(logits, noise):
    """Sample of a relaxed bit, squashed hard; the gradient is straight-through."""
    return jax.nn.sigmoid(8.0 * (logits + noise))


def binary_concrete_fwd(logits, noise):
    return binary_concrete(logits, noise), None


def binary_concrete_bwd(_, g):
    return g, jnp.zeros_like(g)


binary_concrete.defvjp(binary_concrete_fwd, binary_concrete_bwd)
deliberate(
    "relaxed_bit", binary_concrete, (normal(96, 5), normal(97, 5)), why="its docstring says so"
)


@jax.custom_vjp
def expected_reward(logits, rewards, key):
    """Mean reward of sampled actions, with the score-function (REINFORCE) gradient."""
    actions = jax.random.categorical(key, logits, shape=(64,))
    return jnp.mean(rewards[actions])


def expected_reward_fwd(logits, rewards, key):
    actions = jax.random.categorical(key, logits, shape=(64,))
    return jnp.mean(rewards[actions]), (actions, logits, rewards)


def expected_reward_bwd(res, g):
    actions, logits, rewards = res
    score = jax.nn.one_hot(actions, logits.shape[0]) - jax.nn.softmax(logits)
    drewards = jnp.zeros_like(rewards).at[actions].add(g / 64)
    return g * jnp.mean(rewards[actions][:, None] * score, axis=0), drewards, None


expected_reward.defvjp(expected_reward_fwd, expected_reward_bwd)
deliberate(
    "score_function_of_samples",
    expected_reward,
    (normal(98, 4), normal(99, 4), jax.random.key(6)),
    why="an estimator of the expectation's gradient",
)


@surrogate
@jax.custom_vjp
def hard_margin(x):
    return jnp.maximum(x, 0.0) ** 2


def hard_margin_fwd(x):
    return hard_margin(x), x


def hard_margin_bwd(x, g):
    return (2.0 * g * jnp.logaddexp(x, 0.0),)


hard_margin.defvjp(hard_margin_fwd, hard_margin_bwd)
deliberate("declared_by_its_owner", hard_margin, (normal(100, 5),), why="the decorator says so")


@jax.custom_vjp
def truncated_solve(a, b):
    """A few Jacobi sweeps; differentiated implicitly, as if they had converged."""

    def sweep(_, x):
        d = jnp.diagonal(a)
        return (b - a @ x + d * x) / d

    return lax.fori_loop(0, 4, sweep, jnp.zeros_like(b))


def truncated_solve_fwd(a, b):
    x = truncated_solve(a, b)
    return x, (a, x)


def truncated_solve_bwd(res, g):
    a, x = res
    lam = jnp.linalg.solve(a.T, g)
    return -jnp.outer(lam, x), lam


truncated_solve.defvjp(truncated_solve_fwd, truncated_solve_bwd)
deliberate(
    "implicit_before_convergence",
    truncated_solve,
    (dominant(101, 4), normal(102, 4)),
    why="implicit differentiation of an unfinished solver",
)


@jax.custom_vjp
def target_distance(online, target):
    """Squared distance with a stop-gradient on the target network's side."""
    return jnp.mean((online - target) ** 2)


def target_distance_fwd(online, target):
    return target_distance(online, target), online - target


def target_distance_bwd(d, g):
    return 2.0 * g * d / d.size, jnp.zeros_like(d)


target_distance.defvjp(target_distance_fwd, target_distance_bwd)
deliberate(
    "target_side_stopped",
    target_distance,
    (normal(103, 4), normal(104, 4)),
    why="its docstring says that the target gets no gradient",
)


@jax.custom_vjp
def clipped_gradient_exp(x):
    return jnp.exp(x)


def clipped_gradient_exp_fwd(x):
    y = jnp.exp(x)
    return y, y


def clipped_gradient_exp_bwd(y, g):
    return (jnp.clip(g * y, -1.0, 1.0),)


clipped_gradient_exp.defvjp(clipped_gradient_exp_fwd, clipped_gradient_exp_bwd)
deliberate(
    "exp_with_clipped_gradient",
    clipped_gradient_exp,
    (2.0 * normal(105, 5),),
    why="its name says gradient clipping",
)


@jax.custom_vjp
def spike_rate(v, w):
    """Leaky integrate-and-fire layer with a surrogate gradient for the spikes."""

    def step(u, vt):
        u = 0.9 * u + vt @ w
        s = (u > 1.0).astype(u.dtype)
        return u - s, s

    return lax.scan(step, jnp.zeros(w.shape[1], w.dtype), v)[1]


def soft_rate(v, w):
    def step(u, vt):
        u = 0.9 * u + vt @ w
        return u - lax.stop_gradient((u > 1.0).astype(u.dtype)), jax.nn.sigmoid(4.0 * (u - 1.0))

    return lax.scan(step, jnp.zeros(w.shape[1], w.dtype), v)[1]


def spike_rate_fwd(v, w):
    return spike_rate(v, w), (v, w)


def spike_rate_bwd(res, g):
    return jax.vjp(soft_rate, *res)[1](g)


spike_rate.defvjp(spike_rate_fwd, spike_rate_bwd)
deliberate(
    "spiking_layer",
    spike_rate,
    (normal(106, 8, 3), normal(107, 3, 4)),
    why="spikes in a scan, smooth slopes backward",
)


@jax.custom_vjp
def gradient_reversal_head(x, w, strength):
    """A domain classifier's logits; the gradient to the features is reversed."""
    return x @ w


def gradient_reversal_head_fwd(x, w, strength):
    return x @ w, (x, w, strength)


def gradient_reversal_head_bwd(res, g):
    x, w, strength = res
    return -strength * (g @ w.T), x.T @ g, None


gradient_reversal_head.defvjp(gradient_reversal_head_fwd, gradient_reversal_head_bwd)
deliberate(
    "reversal_fused_with_its_head",
    gradient_reversal_head,
    (normal(108, 4, 3), normal(109, 3, 2), jnp.float32(0.5)),
    why="the name and docstring say reversal",
)
