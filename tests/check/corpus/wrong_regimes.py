"""Custom rules whose one fault shows only in a regime: on some elements, values, types or shapes.

Each comment at a fault says what belongs there, or where it is wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .entry import Wrong

ENTRIES: list[Wrong] = []
BF16, F16 = jnp.bfloat16, jnp.float16


def add(f, causes, arguments, *calls, innocent=None):
    causes, arguments = tuple(causes.split()), tuple(arguments.split())
    ENTRIES.append(Wrong(f"{f.__name__}-{causes[0]}", f, calls, causes, arguments, innocent))


def saves(f):
    """The forward rule that keeps the arguments."""
    return lambda *args: (f(*args), args)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(seed, *shape, low=0.1, high=0.9, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), dtype)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def permutations(seed, n, rows):
    rng = np.random.default_rng(seed)
    return jnp.asarray([rng.permutation(n) for _ in range(rows)], jnp.int32)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


def bools(seed, *shape):
    """Mixed along the last axis."""
    drawn = np.random.default_rng(seed).random(shape) < 0.6
    drawn[..., 0], drawn[..., -1] = True, False
    return jnp.asarray(drawn)


def full(value, *shape):
    return jnp.full(shape, value, jnp.float32)


def having(x, index, value):
    return x.at[index].set(value)


def one_hot(labels, logits):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def picked(logits, labels):
    """The cross-entropy of each row."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]


# --- elements


@jax.custom_vjp
def masked_mean_square(x, mask):
    kept = jnp.where(mask, x * x, 0)
    return jnp.sum(kept, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def masked_mean_square_bwd(saved, g):
    x, mask = saved
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return 2 * x * g[:, None] / count, None  # where the mask holds


masked_mean_square.defvjp(saves(masked_mean_square), masked_mean_square_bwd)
add(
    masked_mean_square,
    "elements",
    "x",
    (normal(1, 5, 7), bools(2, 5, 7)),
    (normal(3, 2, 3), bools(4, 2, 3)),
    innocent=(normal(5, 5, 7), jnp.ones((5, 7), bool)),
)


@jax.custom_vjp
def causal_softmax(scores):
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def causal_softmax_fwd(scores):
    p = causal_softmax(scores)
    return p, p


def causal_softmax_bwd(p, g):
    ds = p * (g - jnp.sum(p * g, axis=-1, keepdims=True))
    return (jnp.tril(ds, -1),)  # the diagonal is seen too


causal_softmax.defvjp(causal_softmax_fwd, causal_softmax_bwd)
add(
    causal_softmax,
    "elements",
    "scores",
    (normal(6, 6, 6),),
    (normal(7, 2, 4, 4),),
    innocent=(normal(8, 6, 6) - 1e4 * jnp.eye(6, dtype=jnp.float32),),  # nothing looks at itself
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def laplacian(u, periodic=False):
    padded = jnp.pad(u, 1, mode="wrap" if periodic else "constant")
    return padded[:-2] - 2 * u + padded[2:]


def laplacian_bwd(periodic, _, g):
    return (jnp.roll(g, 1) - 2 * g + jnp.roll(g, -1),)  # zeros beyond the ends, unless periodic


laplacian.defvjp(lambda u, periodic: (laplacian(u, periodic), None), laplacian_bwd)
add(
    laplacian,
    "elements",
    "u",
    (normal(9, 9),),
    (normal(10, 5), False),
    innocent=(normal(11, 9), True),
)


def window_sums(x, width, start):
    return jnp.convolve(x, jnp.ones(width, x.dtype))[start : start + x.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average_pool_same(x, width):
    return window_sums(x, width, width // 2) / width


def average_pool_same_bwd(width, _, g):
    count = window_sums(jnp.ones_like(g), width, width // 2)  # padding counts: width everywhere
    return (window_sums(g / count, width, width - 1 - width // 2),)


average_pool_same.defvjp(lambda x, w: (average_pool_same(x, w), None), average_pool_same_bwd)
add(
    average_pool_same,
    "elements",
    "x",
    (normal(12, 11), 3),
    (normal(13, 12), 4),
    innocent=(normal(14, 11), 1),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def block_means(x, width):
    whole = x.shape[0] // width * width
    return jnp.mean(x[:whole].reshape(-1, width), axis=1)


def block_means_bwd(width, like, g):
    # Past the last block repeat goes on with the last value: 0 belongs there.
    return (jnp.repeat(g / width, width, total_repeat_length=like.shape[0]),)


block_means.defvjp(lambda x, width: (block_means(x, width), jnp.zeros_like(x)), block_means_bwd)
add(
    block_means,
    "elements",
    "x",
    (normal(15, 11), 3),
    (normal(16, 7), 4),
    innocent=(normal(17, 12), 3),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def chunked_nll(logits, labels, chunk=4):
    return picked(logits, labels)


def chunked_nll_bwd(chunk, saved, g):
    logits, labels = saved
    whole = logits.shape[0] // chunk * chunk

    def step(now):
        z, y, dy = now
        return dy[:, None] * (jax.nn.softmax(z, axis=-1) - one_hot(y, z))

    parts = [v[:whole].reshape(-1, chunk, *v.shape[1:]) for v in (logits, labels, g)]
    d = jax.lax.map(step, tuple(parts)).reshape(whole, logits.shape[1])
    return jnp.zeros_like(logits).at[:whole].set(d), None  # and the rows past the last chunk


chunked_nll.defvjp(lambda z, y, chunk: (chunked_nll(z, y, chunk), (z, y)), chunked_nll_bwd)
add(
    chunked_nll,
    "elements",
    "logits",
    (normal(18, 10, 5), integers(19, 5, 10)),
    (normal(20, 8, 3), integers(21, 3, 8), 3),
    innocent=(normal(22, 8, 5), integers(23, 5, 8)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def loss_over_labelled(logits, labels, ignored=-1):
    kept = labels != ignored
    losses = jnp.where(kept, picked(logits, jnp.where(kept, labels, 0)), 0)
    return {"loss": jnp.sum(losses) / jnp.maximum(jnp.sum(kept), 1), "labelled": jnp.sum(kept)}


def loss_over_labelled_bwd(ignored, saved, g):
    logits, labels = saved
    count = jnp.maximum(jnp.sum(labels != ignored), 1)
    # An ignored label has no one_hot, but its row keeps the softmax.
    return g["loss"] / count * (jax.nn.softmax(logits, axis=-1) - one_hot(labels, logits)), None


loss_over_labelled.defvjp(
    lambda z, y, ignored: (loss_over_labelled(z, y, ignored), (z, y)), loss_over_labelled_bwd
)
add(
    loss_over_labelled,
    "elements",
    "logits",
    (normal(24, 6, 5), ints(0, -1, 4, 2, -1, 1)),
    innocent=(normal(25, 6, 5), integers(26, 5, 6)),
)


@jax.custom_vjp
def forward_substitution(lower, b):
    return jax.scipy.linalg.solve_triangular(lower, b, lower=True)


def forward_substitution_fwd(lower, b):
    x = forward_substitution(lower, b)
    return x, (lower, x)


def forward_substitution_bwd(saved, g):
    lower, x = saved
    db = jax.scipy.linalg.solve_triangular(lower, g, lower=True, trans=1)
    return -jnp.outer(db, x), db  # tril: what is above the diagonal is not read


forward_substitution.defvjp(forward_substitution_fwd, forward_substitution_bwd)
add(
    forward_substitution,
    "elements",
    "lower",
    (jnp.tril(normal(27, 5, 5)) + 3 * jnp.eye(5, dtype=jnp.float32), normal(28, 5)),
    innocent=(full(1.7, 1, 1), normal(29, 1)),
)


def make_embedding(padding):
    @jax.custom_vjp
    def embedding_with_padding(table, ids):
        return jnp.where((ids == padding)[..., None], 0, table[ids])

    def bwd(saved, g):
        table, ids = saved
        return jnp.zeros_like(table).at[ids].add(g), None  # nothing for the padding's row

    embedding_with_padding.defvjp(saves(embedding_with_padding), bwd)
    return embedding_with_padding


add(
    make_embedding(padding=0),
    "elements",
    "table",
    (normal(30, 6, 3), ints(3, 5, 3, 0, 0, 1)),
    (normal(31, 4, 2), ints(2, 1, 0, 3)),
    innocent=(normal(32, 6, 3), ints(3, 5, 3, 1)),
)


def shifted(x):
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


@jax.custom_vjp
def token_shift(x, mix):
    """The mixture, and the last input for the sequence's next part."""
    return mix * x + (1 - mix) * shifted(x), x[-1]


def token_shift_bwd(saved, g):
    (x, mix), (g, dlast) = saved, g
    dx = mix * g + jnp.roll((1 - mix) * g, -1, axis=0)  # the last row gets the first one's
    return dx.at[-1].add(dlast), jnp.sum(g * (x - shifted(x)), axis=0)


token_shift.defvjp(saves(token_shift), token_shift_bwd)
add(
    token_shift,
    "elements",
    "x",
    (normal(33, 6, 3), uniform(34, 3)),
    innocent=(normal(35, 6, 3), full(1, 3)),
)


@jax.custom_vjp
def sequence_energy(x, lengths):
    return jnp.sum(jnp.where(jnp.arange(x.shape[1]) < lengths[:, None], x * x, 0), axis=1)


def sequence_energy_bwd(saved, g):
    x, lengths = saved
    inside = jnp.arange(x.shape[1]) <= lengths[:, None]  # <
    return jnp.where(inside, 2 * x * g[:, None], 0), None


sequence_energy.defvjp(saves(sequence_energy), sequence_energy_bwd)
add(
    sequence_energy,
    "elements",
    "x",
    (normal(36, 4, 7), ints(3, 7, 5, 1)),
    innocent=(normal(37, 4, 7), ints(7, 7, 7, 7)),
)


@jax.custom_jvp
def masked_log(x, mask):
    return jnp.where(mask, jnp.log(x), 0)


@masked_log.defjvp
def masked_log_jvp(primals, tangents):
    (x, mask), (dx, _) = primals, tangents
    return masked_log(x, mask), dx / x  # where the mask holds


add(
    masked_log,
    "elements",
    "x",
    (uniform(38, 5, 7), bools(39, 5, 7)),
    innocent=(uniform(40, 5, 7), jnp.ones((5, 7), bool)),
)


def place_in_expert(experts, count):
    chosen = jax.nn.one_hot(experts, count, dtype=jnp.int32)
    return jnp.take_along_axis(jnp.cumsum(chosen, axis=0), experts[:, None], axis=1)[:, 0] - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dispatch(tokens, experts, count, capacity):
    at = place_in_expert(experts, count)
    buffers = jnp.zeros((count, capacity, tokens.shape[1]), tokens.dtype)
    return buffers.at[experts, at].set(tokens, mode="drop")


def dispatch_fwd(tokens, experts, count, capacity):
    return dispatch(tokens, experts, count, capacity), experts


def dispatch_bwd(count, capacity, experts, g):
    # A dropped token's place is clamped to the last one: it gets another token's cotangent.
    return g[experts, place_in_expert(experts, count)], None


dispatch.defvjp(dispatch_fwd, dispatch_bwd)
add(
    dispatch,
    "elements",
    "tokens",
    (normal(41, 7, 3), ints(0, 1, 0, 0, 2, 0, 1), 3, 2),
    innocent=(normal(42, 6, 3), ints(0, 1, 2, 2, 0, 1), 3, 2),
)


# --- edge: finite but wrong at a special value


@jax.custom_vjp
def sinc(x):
    zero = x == 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, 1, jnp.sin(safe) / safe)


def sinc_bwd(x, g):
    x2, safe = x * x, jnp.where(x == 0, 1, x)
    series = x * (-1 / 3 + x2 * (1 / 30 - x2 * (1 / 840 - x2 / 45360)))
    slope = jnp.where(jnp.abs(x) < 0.5, series, (jnp.cos(x) - sinc(x)) / safe)
    return (g * jnp.where(x == 0, 1, slope),)  # 1 is the value at 0; the slope is 0


sinc.defvjp(lambda x: (sinc(x), x), sinc_bwd)
add(
    sinc,
    "edge elements",
    "x",
    (having(normal(43, 5, 7), (1, slice(2, 5)), 0),),
    (full(0, 3),),
    innocent=(normal(44, 5, 7),),
)


@jax.custom_vjp
def weighted_log(weight, value):
    return weight * jnp.log(value)


def weighted_log_bwd(saved, g):
    weight, value = saved
    dweight = jnp.where(weight == 0, 0, g * jnp.log(value))  # log(value) at 0 as well
    return dweight, g * weight / value


weighted_log.defvjp(saves(weighted_log), weighted_log_bwd)
add(
    weighted_log,
    "edge elements dropped_argument",
    "weight",
    (having(normal(45, 5, 7), (2, slice(0, 6)), 0), uniform(46, 5, 7)),
    (full(0, 4), uniform(47, 4)),
    innocent=(normal(48, 5, 7), uniform(49, 5, 7)),
)


@jax.custom_vjp
def log_add(a, b):
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    top = jnp.where(jnp.isfinite(top), top, 0)
    return top + jnp.log(jnp.exp(a - top) + jnp.exp(b - top))


def log_add_bwd(saved, g):
    a, b = saved
    equal = a == b  # for two of -inf; but a tie gives each of them a half
    return (
        jnp.where(equal, g, g * jax.nn.sigmoid(a - b)),
        jnp.where(equal, g, g * jax.nn.sigmoid(b - a)),
    )


log_add.defvjp(saves(log_add), log_add_bwd)
TIED = normal(50, 5, 7)
add(
    log_add,
    "edge elements scale",
    "a b",
    (TIED, having(normal(51, 5, 7), slice(3, 5), TIED[3:5])),
    (full(0.5, 4), full(0.5, 4)),
    innocent=(normal(52, 5, 7), normal(53, 5, 7)),
)


@jax.custom_vjp
def softsign(x):
    return x / (1 + jnp.abs(x))


def softsign_fwd(x):
    y = softsign(x)
    return y, (x, y)


def softsign_bwd(saved, g):
    x, y = saved
    ratio = jnp.where(x == 0, 0, y / jnp.where(x == 0, 1, x))  # 1 at 0
    return (g * ratio * ratio,)


softsign.defvjp(softsign_fwd, softsign_bwd)
add(
    softsign,
    "edge elements",
    "x",
    (having(normal(54, 5, 7), (slice(1, 3), 2), 0),),
    innocent=(normal(55, 5, 7),),
)


@jax.custom_vjp
def row_products(x):
    return jnp.prod(x, axis=-1)


def row_products_fwd(x):
    y = row_products(x)
    return y, (x, y)


def row_products_bwd(saved, g):
    x, y = saved
    # One 0 in a row: the product of the others belongs there.
    return (jnp.where(x == 0, 0, (g * y)[:, None] / jnp.where(x == 0, 1, x)),)


row_products.defvjp(row_products_fwd, row_products_bwd)
add(
    row_products,
    "edge elements dropped_argument",
    "x",
    (having(normal(56, 5, 4), (2, 1), 0),),
    (having(normal(57, 3, 3), (slice(0, 3), 0), 0),),
    innocent=(normal(58, 5, 4),),
)


@jax.custom_vjp
def nll_with_reference_class(logits, labels):
    """The last class has no logit: it counts as 0."""
    return picked(jnp.pad(logits, ((0, 0), (0, 1))), labels)


def nll_with_reference_class_bwd(saved, g):
    logits, labels = saved
    p = jax.nn.softmax(jnp.pad(logits, ((0, 0), (0, 1))), axis=-1)[:, :-1]
    rows = jnp.arange(logits.shape[0])
    d = p.at[rows, labels].add(-1, mode="clip")  # the last class has no column: drop
    return g[:, None] * d, None


nll_with_reference_class.defvjp(saves(nll_with_reference_class), nll_with_reference_class_bwd)
add(
    nll_with_reference_class,
    "edge elements",
    "logits",
    (normal(59, 6, 4), ints(0, 4, 2, 3, 4, 1)),
    innocent=(normal(60, 6, 4), ints(0, 3, 2, 3, 1, 1)),
)


@jax.custom_vjp
def masked_softmax(x, mask):
    """0 for a row of which all is masked."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True, where=mask, initial=-1e30))
    e = jnp.where(mask, jnp.exp(jnp.where(mask, x - top, 0)), 0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def masked_softmax_bwd(saved, g):
    x, mask = saved
    p = jax.nn.softmax(jnp.where(mask, x, -1e9), axis=-1)  # 1/n, not 0, if all is masked
    return p * (g - jnp.sum(p * g, axis=-1, keepdims=True)), None


masked_softmax.defvjp(saves(masked_softmax), masked_softmax_bwd)
add(
    masked_softmax,
    "edge elements",
    "x",
    (normal(61, 5, 7), bools(62, 5, 7) & (jnp.arange(5) != 3)[:, None]),
    (normal(63, 2, 4), jnp.zeros((2, 4), bool)),
    innocent=(normal(64, 5, 7), bools(65, 5, 7)),
)


@jax.custom_vjp
def signed_log(x):
    return jnp.arcsinh(x)


def signed_log_bwd(x, g):
    return (g / jnp.hypot(jnp.clip(x, -100, 100), 1),)  # falls beyond 100 as well


signed_log.defvjp(lambda x: (signed_log(x), x), signed_log_bwd)
add(
    signed_log,
    "edge elements scale unknown",
    "x",
    (200 * normal(66, 5, 7),),
    (1e4 + 1e3 * normal(67, 4),),
    innocent=(10 * normal(68, 5, 7),),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def integer_power(x, n):
    return x**n


@integer_power.defjvp
def integer_power_jvp(n, primals, tangents):
    (x,), (dx,) = primals, tangents
    y = integer_power(x, n)
    return y, n * jnp.where(x == 0, 0, y / jnp.where(x == 0, 1, x)) * dx  # 1 at 0 if n = 1


add(
    integer_power,
    "edge elements dropped_argument",
    "x",
    (having(normal(69, 5, 7), (0, slice(1, 4)), 0), 1),
    innocent=(having(normal(70, 5, 7), (0, slice(1, 4)), 0), 3),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def leaky_relu(x, slope=0.1):
    return jnp.where(x > 0, x, slope * x)


def leaky_relu_bwd(slope, x, g):
    return (g * (1.0 * (x >= 0) + slope * (x <= 0)),)  # both of them at 0


leaky_relu.defvjp(lambda x, slope: (leaky_relu(x, slope), x), leaky_relu_bwd)
add(
    leaky_relu,
    "edge elements scale",
    "x",
    (having(normal(71, 5, 7), (slice(0, 3), 6), 0), 0.4),
    (full(0, 3), 0.3),
    innocent=(normal(72, 5, 7), 0.4),
)


@jax.custom_vjp
def bag_means(table, ids, bags, default):
    """The mean of the rows of each bag; its default for a bag that is empty."""
    total = jax.ops.segment_sum(table[ids], bags, default.shape[0])
    count = jax.ops.segment_sum(jnp.ones_like(bags), bags, default.shape[0])[:, None]
    return jnp.where(count == 0, default, total / jnp.maximum(count, 1))


def bag_means_fwd(table, ids, bags, default):
    count = jax.ops.segment_sum(jnp.ones_like(bags), bags, default.shape[0])[:, None]
    return bag_means(table, ids, bags, default), (table, ids, bags, jnp.maximum(count, 1))


def bag_means_bwd(saved, g):
    table, ids, bags, count = saved
    dtable = jnp.zeros_like(table).at[ids].add((g / count)[bags])
    return dtable, None, None, jnp.where(count == 1, g, 0)  # a bag of one looks empty as well


bag_means.defvjp(bag_means_fwd, bag_means_bwd)
add(
    bag_means,
    "edge elements",
    "default",
    (normal(73, 6, 3), ints(0, 4, 4, 5, 1), ints(0, 2, 2, 3, 2), normal(74, 5, 3)),
    innocent=(normal(75, 6, 3), ints(0, 4, 4, 5, 1), ints(0, 2, 2, 0, 2), normal(76, 4, 3)),
)


# --- nonfinite


@jax.custom_vjp
def safe_norm(x):
    square = jnp.sum(x * x, axis=-1)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def safe_norm_fwd(x):
    y = safe_norm(x)
    return y, (x, y)


safe_norm.defvjp(safe_norm_fwd, lambda saved, g: ((g / saved[1])[:, None] * saved[0],))  # 0 / 0
add(safe_norm, "nonfinite", "x", (having(normal(77, 5, 3), 2, 0),), innocent=(normal(78, 5, 3),))


@jax.custom_vjp
def root_of_quartics(x):
    return jnp.sqrt(jnp.sum(x**4, axis=-1))


def root_of_quartics_fwd(x):
    y = root_of_quartics(x)
    return y, (x, y)


def root_of_quartics_bwd(saved, g):
    x, y = saved
    return ((g / y)[:, None] * 2 * x**3,)  # the slope at 0 is 0


root_of_quartics.defvjp(root_of_quartics_fwd, root_of_quartics_bwd)
add(
    root_of_quartics,
    "nonfinite",
    "x",
    (having(normal(79, 5, 3), 1, 0),),
    innocent=(normal(80, 5, 3),),
)


@jax.custom_vjp
def root_or_zero(x):
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def root_or_zero_bwd(x, g):
    return (jnp.where(x > 0, g, 0) * 0.5 * jax.lax.rsqrt(x),)  # 0 times nan below 0


root_or_zero.defvjp(lambda x: (root_or_zero(x), x), root_or_zero_bwd)
add(root_or_zero, "nonfinite", "x", (normal(81, 5, 7),), innocent=(uniform(82, 5, 7),))


@jax.custom_vjp
def nll_among_allowed(logits, labels):
    """A class that is not allowed has the logit -inf."""
    return picked(logits, labels)


def nll_among_allowed_fwd(logits, labels):
    return nll_among_allowed(logits, labels), (jax.nn.softmax(logits, axis=-1), labels)


def nll_among_allowed_bwd(saved, g):
    p, labels = saved
    dp = -g[:, None] * one_hot(labels, p) / p  # 0 / 0 for a class that is not allowed
    return p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)), None


nll_among_allowed.defvjp(nll_among_allowed_fwd, nll_among_allowed_bwd)
add(
    nll_among_allowed,
    "nonfinite",
    "logits",
    (having(normal(83, 5, 4), (slice(1, 4), 3), -np.inf), integers(84, 3, 5)),
    innocent=(normal(85, 5, 4), integers(86, 4, 5)),
)


@jax.custom_vjp
def bernoulli_nll(p, outcome):
    return -jnp.log(jnp.where(outcome == 1, p, 1 - p))


def bernoulli_nll_bwd(saved, g):
    p, outcome = saved
    return g * (p - outcome) / (p * (1 - p)), None  # 0 / 0 where p says for sure what came


bernoulli_nll.defvjp(saves(bernoulli_nll), bernoulli_nll_bwd)
add(
    bernoulli_nll,
    "nonfinite",
    "p",
    (having(uniform(87, 6), slice(2, 4), 1.0), ints(0, 1, 1, 1, 0, 1)),
    (having(uniform(88, 4), 0, 0.0), ints(0, 1, 1, 0)),
    innocent=(uniform(89, 6), ints(0, 1, 1, 1, 0, 1)),
)


@jax.custom_vjp
def softmax_or_nothing(x):
    """0 for a row of nothing but -inf."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    e = jnp.exp(x - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def softmax_or_nothing_fwd(x):
    return softmax_or_nothing(x), (x, jax.nn.logsumexp(x, axis=-1, keepdims=True))


def softmax_or_nothing_bwd(saved, g):
    x, normaliser = saved
    p = jnp.exp(x - normaliser)  # -inf + inf in such a row
    return (p * (g - jnp.sum(p * g, axis=-1, keepdims=True)),)


softmax_or_nothing.defvjp(softmax_or_nothing_fwd, softmax_or_nothing_bwd)
add(
    softmax_or_nothing,
    "nonfinite",
    "x",
    (having(normal(90, 4, 5), 2, -np.inf),),
    innocent=(having(normal(91, 4, 5), (2, slice(1, 4)), -np.inf),),
)


@jax.custom_vjp
def gamma_curve(x, exponent):
    return jnp.power(x, exponent)


def gamma_curve_bwd(saved, g):
    x, exponent = saved
    dexponent = jnp.sum(g * jnp.power(x, exponent) * jnp.log(x), axis=0)  # 0 times -inf
    return g * exponent * jnp.power(x, exponent - 1), dexponent


gamma_curve.defvjp(saves(gamma_curve), gamma_curve_bwd)
add(
    gamma_curve,
    "nonfinite",
    "exponent",
    (having(uniform(92, 5, 3), (slice(0, 2), 1), 0), uniform(93, 3, low=1.5, high=3)),
    innocent=(uniform(94, 5, 3), uniform(95, 3, low=1.5, high=3)),
)


@jax.custom_vjp
def divide_by_count(total, count):
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0)


divide_by_count.defvjp(saves(divide_by_count), lambda saved, g: (g / saved[1], None))  # g / 0
add(
    divide_by_count,
    "nonfinite",
    "total",
    (normal(96, 6), ints(3, 0, 1, 2, 0, 5)),
    innocent=(normal(97, 6), ints(3, 2, 1, 2, 7, 5)),
)


@jax.custom_jvp
def safe_arccos(x):
    return jnp.arccos(jnp.clip(x, -1 + 1e-6, 1 - 1e-6))


@safe_arccos.defjvp
def safe_arccos_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return safe_arccos(x), -dx * jax.lax.rsqrt((1 - x) * (1 + x))  # 0 where it was clipped


add(
    safe_arccos,
    "nonfinite",
    "x",
    (1.2 * normal(98, 5, 7),),
    innocent=(uniform(99, 5, 7, low=-0.9),),
)


# --- overflow


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sharp_softplus(x, beta=1.0):
    return jnp.logaddexp(beta * x, 0) / beta


def sharp_softplus_bwd(beta, x, g):
    e = jnp.exp(beta * x)
    return (g * e / (1 + e),)  # inf / inf; 1 / (1 + exp(-beta x)) is not


sharp_softplus.defvjp(lambda x, beta: (sharp_softplus(x, beta), x), sharp_softplus_bwd)
add(
    sharp_softplus,
    "overflow nonfinite",
    "x",
    (200 * normal(100, 5, 7),),
    (20 * normal(101, 3, 4), 10.0),
    innocent=(normal(102, 5, 7),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def log_normaliser(x, axis=-1):
    return jax.nn.logsumexp(x, axis=axis)


def log_normaliser_bwd(axis, x, g):
    e = jnp.exp(x)  # of x less its largest
    return (jnp.expand_dims(g, axis) * e / jnp.sum(e, axis=axis, keepdims=True),)


log_normaliser.defvjp(lambda x, axis: (log_normaliser(x, axis), x), log_normaliser_bwd)
add(
    log_normaliser,
    "overflow nonfinite",
    "x",
    (100 + 5 * normal(103, 5, 7),),
    (95 + 3 * normal(104, 4, 3), 0),
    innocent=(normal(105, 5, 7),),
)


@jax.custom_vjp
def log_cosh(x):
    return jnp.logaddexp(x, -x) - np.log(2)


def log_cosh_bwd(x, g):
    return (g * jnp.sinh(x) / jnp.cosh(x),)  # tanh


log_cosh.defvjp(lambda x: (log_cosh(x), x), log_cosh_bwd)
add(
    log_cosh,
    "overflow nonfinite",
    "x",
    (300 * normal(106, 5, 7),),
    (150 + normal(107, 3),),
    innocent=(normal(108, 5, 7),),
)


@jax.custom_vjp
def log_add_weighted(a, b, share):
    return jnp.logaddexp(a + jnp.log(share), b + jnp.log1p(-share))


def log_add_weighted_bwd(saved, g):
    a, b, share = saved
    ea, eb = jnp.exp(a), jnp.exp(b)  # of a and b less the larger
    total = share * ea + (1 - share) * eb
    return g * share * ea / total, g * (1 - share) * eb / total, g * (ea - eb) / total


log_add_weighted.defvjp(saves(log_add_weighted), log_add_weighted_bwd)
LEVEL = 120 + 10 * normal(109, 5, 7)
add(
    log_add_weighted,
    "overflow nonfinite",
    "a b share",
    (LEVEL, LEVEL + normal(110, 5, 7), uniform(111, 5, 7)),
    innocent=(normal(112, 5, 7), normal(113, 5, 7), uniform(114, 5, 7)),
)


@jax.custom_jvp
def silu(x):
    return x * jax.nn.sigmoid(x)


@silu.defjvp
def silu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    e = jnp.exp(x)
    s = e / (1 + e)  # inf / inf
    return silu(x), s * (1 + x * (1 - s)) * dx


add(silu, "overflow nonfinite", "x", (100 * normal(115, 5, 7),), innocent=(normal(116, 5, 7),))


@jax.custom_vjp
def scaled_length(x):
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return jnp.sqrt(jnp.sum((x / top) ** 2, axis=-1)) * top[:, 0]


def scaled_length_bwd(x, g):
    return ((g * jax.lax.rsqrt(jnp.sum(x * x, axis=-1)))[:, None] * x,)  # the squares overflow


scaled_length.defvjp(lambda x: (scaled_length(x), x), scaled_length_bwd)
add(
    scaled_length,
    "overflow dropped_argument edge",
    "x",
    (1e22 * normal(117, 5, 3),),
    innocent=(normal(118, 5, 3),),
)


# --- underflow


@jax.custom_vjp
def logistic(x):
    return jnp.exp(-jnp.logaddexp(-x, 0))


def logistic_fwd(x):
    y = logistic(x)
    return y, y


logistic.defvjp(logistic_fwd, lambda y, g: (g * y * (1 - y),))  # 1 - y is 0 from x = 17 on
add(
    logistic,
    "underflow cancellation dropped_argument elements",
    "x",
    (uniform(119, 5, 7, low=18, high=30),),
    innocent=(normal(120, 5, 7),),
)


@jax.custom_vjp
def margin_loss(margin):
    return jnp.logaddexp(-margin, 0)


def margin_loss_bwd(margin, g):
    return (g * (jax.nn.sigmoid(margin) - 1),)  # -sigmoid(-margin)


margin_loss.defvjp(lambda margin: (margin_loss(margin), margin), margin_loss_bwd)
add(
    margin_loss,
    "underflow cancellation dropped_argument elements",
    "margin",
    (uniform(121, 9, low=18, high=25),),
    innocent=(normal(122, 9),),
)


@jax.custom_vjp
def likelihood(p):
    return jnp.prod(p, axis=-1)


def likelihood_fwd(p):
    y = likelihood(p)
    return y, (p, y)


def likelihood_bwd(saved, g):
    p, y = saved
    return ((g * y)[:, None] / p,)  # y is 0 where the product of the others is not


likelihood.defvjp(likelihood_fwd, likelihood_bwd)
add(
    likelihood,
    "underflow dropped_argument elements scale",
    "p",
    (uniform(123, 4, 3) * jnp.asarray([1e-30, 1e-18, 1.0], jnp.float32),),
    innocent=(uniform(124, 4, 3),),
)


@jax.custom_vjp
def log_normal_cdf(x):
    return jax.scipy.special.log_ndtr(x)


def log_normal_cdf_bwd(x, g):
    density = jnp.exp(-0.5 * x * x) / np.sqrt(2 * np.pi).astype(x.dtype)
    cdf = jnp.maximum(jax.scipy.special.ndtr(x), jnp.finfo(x.dtype).tiny)
    return (g * density / cdf,)  # -x far below 0, where both of them are 0


log_normal_cdf.defvjp(lambda x: (log_normal_cdf(x), x), log_normal_cdf_bwd)
add(
    log_normal_cdf,
    "underflow edge dropped_argument elements",
    "x",
    (-uniform(125, 9, low=15, high=30),),
    innocent=(normal(126, 9),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scaled_product(a, b, c, scale=6e4):
    return a * (scale * b) * c


def scaled_product_bwd(scale, saved, g):
    a, b, c = saved
    da = scale * (b * c * g)  # in float16 b c is 0 before it is scaled
    return da, scale * (a * c * g), a * (scale * b) * g


scaled_product.defvjp(
    lambda a, b, c, scale: (scaled_product(a, b, c, scale), (a, b, c)), scaled_product_bwd
)
SMALL = [1e-4 * normal(seed, 5, 7) for seed in (127, 128)]
add(
    scaled_product,
    "underflow low_precision dropped_argument elements",
    "a",
    (normal(129, 5, 7, dtype=F16), *(v.astype(F16) for v in SMALL)),
    innocent=(normal(130, 5, 7), *SMALL),
)


# --- cancellation


def make_standardise(eps):
    def centred(x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return x - mean, mean

    @jax.custom_vjp
    def standardise(x):
        d, mean = centred(x)
        return d * jax.lax.rsqrt(jnp.mean(d * d, axis=-1, keepdims=True) + eps), mean

    def bwd(x, cotangents):
        (g, dmean), (d, mean) = cotangents, centred(x)
        variance = jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean  # the mean of d^2
        r = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
        hat = d * r
        dmean = dmean / x.shape[-1] - r * jnp.mean(g, axis=-1, keepdims=True)
        return (r * (g - hat * jnp.mean(g * hat, axis=-1, keepdims=True)) + dmean,)

    standardise.defvjp(lambda x: (standardise(x), x), bwd)
    return standardise


add(
    make_standardise(eps=1e-5),
    "cancellation",
    "x",
    (3e3 + normal(131, 5, 8),),
    (1e4 + normal(132, 2, 6),),
    innocent=(normal(133, 5, 8),),
)


@jax.custom_vjp
def pendulum_energy(angle, stiffness):
    return stiffness * 2 * jnp.sin(angle / 2) ** 2


def pendulum_energy_bwd(saved, g):
    angle, stiffness = saved
    return g * stiffness * jnp.sin(angle), g * (1 - jnp.cos(angle))  # 2 sin(angle / 2)^2


pendulum_energy.defvjp(saves(pendulum_energy), pendulum_energy_bwd)
add(
    pendulum_energy,
    "cancellation dropped_argument",
    "stiffness",
    (1e-3 * normal(134, 5, 7), normal(135, 5, 7)),
    innocent=(1 + uniform(136, 5, 7), normal(137, 5, 7)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def interest(principal, rate, periods):
    return principal * jnp.expm1(periods * jnp.log1p(rate))


def interest_bwd(periods, saved, g):
    principal, rate = saved
    growth = (1 + rate) ** periods
    return g * (growth - 1), g * principal * periods * growth / (1 + rate)  # expm1(n log1p(rate))


interest.defvjp(lambda p, r, n: (interest(p, r, n), (p, r)), interest_bwd)
add(
    interest,
    "cancellation dropped_argument",
    "principal",
    (normal(138, 6), uniform(139, 6, low=1e-7, high=1e-6), 12),
    innocent=(normal(140, 6), uniform(141, 6), 12),
)


@jax.custom_jvp
def channel_capacity(bandwidth, snr):
    return bandwidth * jnp.log1p(snr) / np.log(2)


@channel_capacity.defjvp
def channel_capacity_jvp(primals, tangents):
    (bandwidth, snr), (dbandwidth, dsnr) = primals, tangents
    bits = jnp.log2(1 + snr)  # log1p
    slope = bandwidth / (1 + snr) / np.log(2)
    return channel_capacity(bandwidth, snr), bits * dbandwidth + slope * dsnr


add(
    channel_capacity,
    "cancellation dropped_argument",
    "bandwidth",
    (normal(142, 6), uniform(143, 6, low=1e-7, high=1e-6)),
    innocent=(normal(144, 6), uniform(145, 6)),
)


@jax.custom_vjp
def weighted_log_loss(margin, weight):
    return weight * jnp.logaddexp(-margin, 0)


def weighted_log_loss_bwd(saved, g):
    margin, weight = saved
    dweight = g * (jnp.logaddexp(margin, 0) - margin)  # logaddexp(-margin, 0)
    return -g * weight * jax.nn.sigmoid(-margin), dweight


weighted_log_loss.defvjp(saves(weighted_log_loss), weighted_log_loss_bwd)
add(
    weighted_log_loss,
    "cancellation underflow dropped_argument",
    "weight",
    (uniform(146, 9, low=11, high=15), normal(147, 9)),
    innocent=(normal(148, 9), normal(149, 9)),
)


@jax.custom_vjp
def small_root(b, c):
    """The root of x^2 + b x + c that is nearer to 0, for b > 0."""
    return -2 * c / (b + jnp.sqrt(b * b - 4 * c))


def small_root_bwd(saved, g):
    b, c = saved
    root = jnp.sqrt(b * b - 4 * c)
    x = (root - b) / 2  # -2 c / (b + root)
    return -g * x / root, -g / root


small_root.defvjp(saves(small_root), small_root_bwd)
add(
    small_root,
    "cancellation",
    "b",
    (uniform(150, 7, low=1e3, high=4e3), uniform(151, 7)),
    innocent=(uniform(152, 7, low=2, high=4), uniform(153, 7)),
)


def make_kernel(width):
    def squares(x, y):
        product = x @ y.T
        return jnp.sum(x * x, axis=-1)[:, None] + jnp.sum(y * y, axis=-1) - 2 * product

    @jax.custom_vjp
    def gaussian_kernel(x, y):
        return jnp.exp(-jnp.sum((x[:, None] - y) ** 2, axis=-1) / (2 * width**2))

    def bwd(saved, g):
        x, y = saved
        k = jnp.exp(-squares(x, y) / (2 * width**2))  # of sums of (x - y)^2
        pull = (g * k / width**2)[..., None] * (x[:, None] - y)
        return -jnp.sum(pull, axis=1), jnp.sum(pull, axis=0)

    gaussian_kernel.defvjp(saves(gaussian_kernel), bwd)
    return gaussian_kernel


add(
    make_kernel(width=1.3),
    "cancellation",
    "x y",
    (2e3 + normal(154, 5, 3), 2e3 + normal(155, 4, 3)),
    innocent=(normal(156, 5, 3), normal(157, 4, 3)),
)


# --- low_precision


@jax.custom_vjp
def fast_linear(x, w):
    return x @ w


def fast_linear_bwd(saved, g):
    x, w = saved
    dx = jnp.dot(g, w.T, preferred_element_type=BF16).astype(x.dtype)  # x's own type
    return dx, x.T @ g


fast_linear.defvjp(saves(fast_linear), fast_linear_bwd)
add(
    fast_linear,
    "low_precision",
    "x",
    (normal(158, 5, 9), normal(159, 9, 6)),
    innocent=(normal(160, 5, 9, dtype=BF16), normal(161, 9, 6, dtype=BF16)),
)


@jax.custom_vjp
def log_mean_exp(x):
    return jax.nn.logsumexp(x, axis=-1) - np.log(x.shape[-1]).astype(x.dtype)


def log_mean_exp_bwd(x, g):
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    # Added one by one in x's type: in bfloat16 the sum stops at 256 times what is added.
    total = jax.lax.scan(lambda s, v: (s + v, None), jnp.zeros_like(e[:, 0]), e.T)[0]
    return ((g / total)[:, None] * e,)


log_mean_exp.defvjp(lambda x: (log_mean_exp(x), x), log_mean_exp_bwd)
LONG = 0.3 * normal(162, 2, 3000)
add(log_mean_exp, "low_precision scale unknown", "x", (LONG.astype(BF16),), innocent=(LONG,))


@jax.custom_vjp
def frugal_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def frugal_gelu_bwd(saved, g):
    x = saved.astype(g.dtype)
    cdf = 0.5 * (1 + jax.lax.erf(x / np.sqrt(2).astype(x.dtype)))
    return (g * (cdf + x * jnp.exp(-0.5 * x * x) / np.sqrt(2 * np.pi).astype(x.dtype)),)


frugal_gelu.defvjp(
    lambda x: (frugal_gelu(x), x.astype(BF16)),  # x itself
    frugal_gelu_bwd,
)
add(
    frugal_gelu,
    "low_precision",
    "x",
    (normal(163, 5, 7),),
    innocent=(integers(164, 17, 5, 7) / jnp.float32(8),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frugal_attention(q, k, v, kept=BF16):
    return jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1]).astype(q.dtype), axis=-1) @ v


def frugal_attention_fwd(q, k, v, kept):
    p = jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1]).astype(q.dtype), axis=-1)
    return p @ v, (q, k, v, p.astype(kept))  # p in its own type


def frugal_attention_bwd(kept, saved, g):
    q, k, v, p = saved
    p, dp = p.astype(q.dtype), g @ v.T
    ds = p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))
    ds = ds / np.sqrt(q.shape[-1]).astype(q.dtype)
    return ds @ k, ds.T @ q, p.T @ g


frugal_attention.defvjp(frugal_attention_fwd, frugal_attention_bwd)
add(
    frugal_attention,
    "low_precision",
    "q k v",
    (normal(165, 5, 4), normal(166, 6, 4), normal(167, 6, 3)),
    (normal(168, 3, 4), normal(169, 7, 4), normal(170, 7, 2), F16),
    innocent=(normal(171, 5, 4), normal(172, 6, 4), normal(173, 6, 3), jnp.float32),
)


@jax.custom_vjp
def microbatched_linear(params, batches):
    return jax.lax.map(lambda x: x @ params["w"] + params["b"], batches)


def microbatched_linear_bwd(saved, g):
    params, batches = saved

    def step(total, now):
        x, dy = now
        new = {"w": x.T @ dy, "b": jnp.sum(dy, axis=0)}
        total = jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new)
        return total, dy @ params["w"].T

    start = jax.tree.map(lambda p: jnp.zeros(p.shape, BF16), params)  # the parameters' own type
    total, dx = jax.lax.scan(step, start, (batches, g))
    return jax.tree.map(lambda t, p: t.astype(p.dtype), total, params), dx


microbatched_linear.defvjp(saves(microbatched_linear), microbatched_linear_bwd)
add(
    microbatched_linear,
    "low_precision",
    "params['w'] params['b']",
    ({"w": normal(174, 4, 3), "b": normal(175, 3)}, normal(176, 60, 2, 4)),
)


# --- only in a narrow type


@jax.custom_vjp
def phase_modulate(x):
    t = jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]
    return x * jnp.cos(t / 1000 ** jnp.linspace(0, 1, x.shape[1])).astype(x.dtype)


def phase_modulate_bwd(_, g):
    t = jnp.arange(g.shape[0], dtype=g.dtype)[:, None]  # in bfloat16 there are no odd ones past 256
    return (g * jnp.cos(t / 1000 ** jnp.linspace(0, 1, g.shape[1])).astype(g.dtype),)


phase_modulate.defvjp(lambda x: (phase_modulate(x), None), phase_modulate_bwd)
add(
    phase_modulate,
    "low_precision elements",
    "x",
    (normal(177, 600, 2, dtype=BF16),),
    innocent=(normal(178, 600, 2),),
)


@jax.custom_vjp
def token_nll(logits, tokens):
    return picked(logits, tokens)


def token_nll_bwd(saved, g):
    logits, tokens = saved
    places = jnp.arange(logits.shape[1], dtype=logits.dtype)  # int32: several tokens compare equal
    hot = tokens.astype(logits.dtype)[:, None] == places
    return g[:, None] * (jax.nn.softmax(logits, axis=-1) - hot), None


token_nll.defvjp(saves(token_nll), token_nll_bwd)
add(
    token_nll,
    "low_precision elements",
    "logits",
    (normal(179, 4, 700, dtype=BF16), ints(301, 24, 530, 699)),
    innocent=(normal(180, 4, 700), ints(301, 24, 530, 699)),
)


@jax.custom_vjp
def windowed(x):
    return x * jnp.asarray(np.hanning(x.shape[-1] + 2)[1:-1], x.dtype)


def windowed_bwd(_, g):
    return (g * np.hanning(g.shape[-1] + 2)[1:-1].astype(np.float32),)  # g's own type


windowed.defvjp(lambda x: (windowed(x), None), windowed_bwd)
add(windowed, "dtype", "x", (normal(181, 5, 8, dtype=BF16),), innocent=(normal(182, 5, 8),))


@jax.custom_vjp
def wide_rms_norm(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    r = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * r).astype(x.dtype)


def wide_rms_norm_bwd(x, g):
    # Wide, as in the function: in float16 the squares are inf from 256 on.
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    hat = x * r
    return (r * (g - hat * jnp.mean(g * hat, axis=-1, keepdims=True)),)


wide_rms_norm.defvjp(lambda x: (wide_rms_norm(x), x), wide_rms_norm_bwd)
add(
    wide_rms_norm,
    "overflow low_precision dropped_argument edge",
    "x",
    (400 + 30 * normal(183, 5, 8, dtype=F16),),
    innocent=(400 + 30 * normal(184, 5, 8),),
)


# --- vmap: right for one, wrong for a batch of them


@jax.custom_batching.custom_vmap
def inner_product(a, b):
    return jnp.sum(a * b)


@inner_product.def_vmap
def inner_product_batched(size, batched, a, b):
    return jnp.sum(a * b), False  # one for each of the batch


@jax.custom_vjp
def vector_softmax(x):
    return jax.nn.softmax(x)


def vector_softmax_fwd(x):
    s = jax.nn.softmax(x)
    return s, s


vector_softmax.defvjp(vector_softmax_fwd, lambda s, g: (s * (g - inner_product(s, g)),))
add(vector_softmax, "vmap", "x", (normal(185, 7),))


@jax.custom_batching.custom_vmap
def outer_product(a, b):
    return a[:, None] * b


@outer_product.def_vmap
def outer_product_batched(size, batched, a, b):
    a, b = (
        v if is_batched else jnp.broadcast_to(v, (size, *v.shape))
        for v, is_batched in zip((a, b), batched, strict=True)
    )
    return jnp.einsum("bi,bj->ij", a, b), False  # summed over the batch: bi,bj->bij


@jax.custom_vjp
def vector_linear(x, w):
    return jnp.tanh(x @ w)


def vector_linear_fwd(x, w):
    y = vector_linear(x, w)
    return y, (x, w, y)


def vector_linear_bwd(saved, g):
    x, w, y = saved
    dz = g * (1 - y) * (1 + y)
    return w @ dz, outer_product(x, dz)


vector_linear.defvjp(vector_linear_fwd, vector_linear_bwd)
add(vector_linear, "vmap", "w", (normal(186, 5), normal(187, 5, 3)))


@jax.custom_batching.custom_vmap
def sum_of_later(g):
    return jnp.cumsum(g[::-1], axis=0)[::-1]


@sum_of_later.def_vmap
def sum_of_later_batched(size, batched, g):
    return jnp.cumsum(g[::-1], axis=0)[::-1], True  # axis 0 is the batch now


@jax.custom_vjp
def running_energy(x):
    return jnp.cumsum(x * x, axis=0)


running_energy.defvjp(lambda x: (running_energy(x), x), lambda x, g: (2 * x * sum_of_later(g),))
add(running_energy, "vmap", "x", (normal(188, 6),), (normal(189, 4, 3),))


@jax.custom_batching.custom_vmap
def scatter_rows(like, ids, g):
    return jnp.zeros_like(like).at[ids].add(g)


@scatter_rows.def_vmap
def scatter_rows_batched(size, batched, like, ids, g):
    like, ids, g = (
        v if is_batched else jnp.broadcast_to(v, (size, *v.shape))
        for v, is_batched in zip((like, ids, g), batched, strict=True)
    )
    _, rows, width = like.shape
    start = jnp.arange(size)[:, None] * ids.shape[1]  # rows: how long one table is
    flat = jnp.zeros((size * rows, width), g.dtype).at[ids + start].add(g)
    return flat.reshape(like.shape), True


@jax.custom_vjp
def lookup(table, ids):
    return table[ids]


lookup.defvjp(
    lambda table, ids: (lookup(table, ids), (table, ids)),
    lambda saved, g: (scatter_rows(*saved, g), None),
)
add(lookup, "vmap", "table", (normal(190, 6, 3), ints(0, 4, 4, 1)))


# --- only under certain cotangents


@jax.custom_vjp
def exponential_gain(x, gain):
    return jnp.exp(x) * gain


def exponential_gain_bwd(saved, g):
    x, gain = saved
    dx = jnp.exp(jnp.log(jnp.maximum(g, 1e-30)) + x) * gain  # in logarithms, though g may be < 0
    return dx, g * jnp.exp(x)


exponential_gain.defvjp(saves(exponential_gain), exponential_gain_bwd)
add(
    exponential_gain,
    "nonlinear_in_cotangent elements",
    "x",
    (normal(191, 5, 7), normal(192, 5, 7)),
    innocent=(normal(193, 5, 7), full(0, 5, 7)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def residual_block(params, x, limit=1.0):
    return x + jnp.tanh(x @ params["w"] + params["b"])


def residual_block_bwd(limit, saved, g):
    params, x = saved
    g = g * jnp.minimum(1, limit * jax.lax.rsqrt(jnp.sum(g * g)))  # g as it came
    t = jnp.tanh(x @ params["w"] + params["b"])
    dz = g * (1 - t) * (1 + t)
    return {"w": x.T @ dz, "b": jnp.sum(dz, axis=0)}, g + dz @ params["w"].T


residual_block.defvjp(
    lambda params, x, limit: (residual_block(params, x, limit), (params, x)), residual_block_bwd
)
BLOCK = {"w": normal(194, 4, 4), "b": normal(195, 4)}
add(
    residual_block,
    "nonlinear_in_cotangent scale",
    "params['w'] params['b'] x",
    (BLOCK, normal(196, 5, 4)),
    innocent=(BLOCK, normal(197, 5, 4), 1e3),
)


@jax.custom_vjp
def row_lengths(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1) + 1e-6)


def row_lengths_fwd(x):
    y = row_lengths(x)
    return y, (x, y)


def row_lengths_bwd(saved, g):
    x, y = saved
    return (jnp.mean(g) * x / y[:, None],)  # g, row by row: right only if all are the same


row_lengths.defvjp(row_lengths_fwd, row_lengths_bwd)
add(
    row_lengths,
    "wrong_reduction ignores_cotangent unknown",
    "x",
    (normal(198, 5, 3),),
    innocent=(normal(199, 1, 3),),
)


@jax.custom_vjp
def fused_linear_loss(w, x, labels):
    return jnp.mean(picked(x @ w, labels))


def fused_linear_loss_fwd(w, x, labels):
    """Keeps the cotangents for g = 1 instead of the logits."""
    logits = x @ w
    d = (jax.nn.softmax(logits, axis=-1) - one_hot(labels, logits)) / x.shape[0]
    return jnp.mean(picked(logits, labels)), (x.T @ d, d @ w.T)


fused_linear_loss.defvjp(
    fused_linear_loss_fwd,
    lambda saved, g: (g * saved[0], saved[1], None),  # g * saved[1]
)
add(
    fused_linear_loss,
    "ignores_cotangent scale",
    "x",
    (normal(200, 4, 5), normal(201, 6, 4), integers(202, 5, 6)),
    innocent=(normal(203, 4, 1), normal(204, 6, 4), integers(205, 1, 6)),
)


@jax.custom_vjp
def tempered(logits, log_temperature):
    return logits * jnp.exp(-log_temperature)


def tempered_fwd(logits, log_temperature):
    y = tempered(logits, log_temperature)
    return y, (y, log_temperature)


def tempered_bwd(saved, g):
    y, log_temperature = saved
    dlog = -jnp.mean(g) * jnp.sum(y)  # -sum(g y): right only if all of g is the same
    return g * jnp.exp(-log_temperature), dlog


tempered.defvjp(tempered_fwd, tempered_bwd)
add(
    tempered,
    "wrong_reduction ignores_cotangent unknown",
    "log_temperature",
    (normal(206, 5, 7), jnp.float32(0.4)),
    innocent=(normal(207, 1, 1), jnp.float32(0.4)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def compressed_linear(x, w, keep=4):
    return x @ w


def compressed_linear_bwd(keep, saved, g):
    x, w = saved
    flat = jnp.abs(g).ravel()
    least = jax.lax.top_k(flat, min(keep, flat.size))[0][-1]
    g = jnp.where(jnp.abs(g) >= least, g, 0)  # only the largest are handed on
    return g @ w.T, x.T @ g


compressed_linear.defvjp(
    lambda x, w, keep: (compressed_linear(x, w, keep), (x, w)), compressed_linear_bwd
)
add(
    compressed_linear,
    "nonlinear_in_cotangent elements",
    "x w",
    (normal(208, 5, 4), normal(209, 4, 3)),
    innocent=(normal(210, 2, 4), normal(211, 4, 2)),
)


# --- only for some shapes


@jax.custom_vjp
def project(x, w):
    return jnp.tanh(x @ w)


def project_fwd(x, w):
    y = project(x, w)
    return y, (x, w, y)


def project_bwd(saved, g):
    x, w, y = saved
    dz = g * (1 - y) * (1 + y)
    return dz @ w.reshape(w.shape[::-1]), x.T @ dz  # w.T: the same only for one row or column


project.defvjp(project_fwd, project_bwd)
add(
    project,
    "transposed unknown",
    "x",
    (normal(212, 5, 4), normal(213, 4, 3)),
    (normal(214, 5, 3), normal(215, 3, 3)),
    innocent=(normal(216, 5, 4), normal(217, 4, 1)),
)


@jax.custom_vjp
def similarities(q, k):
    return q @ k.T / np.sqrt(q.shape[-1]).astype(q.dtype)


def similarities_bwd(saved, g):
    q, k = saved
    g = g / np.sqrt(g.shape[-1]).astype(g.dtype)  # the depth, q.shape[-1]
    return g @ k, g.T @ q


similarities.defvjp(saves(similarities), similarities_bwd)
add(
    similarities,
    "scale",
    "q k",
    (normal(218, 5, 4), normal(219, 6, 4)),
    (normal(220, 2, 9), normal(221, 3, 9)),
    innocent=(normal(222, 5, 4), normal(223, 4, 4)),
)


@jax.custom_vjp
def film(x, params):
    return x * params["gamma"] + params["beta"]


def film_bwd(saved, g):
    x, params = saved
    sums = {"gamma": jnp.sum(g * x, axis=1)[0], "beta": jnp.sum(g, axis=(0, 1))}  # [0]: sum too
    return g * params["gamma"], sums


film.defvjp(saves(film), film_bwd)
add(
    film,
    "missing_sum",
    "params['gamma']",
    (normal(224, 3, 5, 4), {"gamma": normal(225, 4), "beta": normal(226, 4)}),
    innocent=(normal(227, 1, 5, 4), {"gamma": normal(228, 4), "beta": normal(229, 4)}),
)


@jax.custom_vjp
def linear_head(params, x):
    return x @ params["w"] + params["b"]


def linear_head_bwd(saved, g):
    params, x = saved
    return {"w": x.T @ g / x.shape[0], "b": jnp.sum(g, axis=0)}, g @ params["w"].T  # no mean


linear_head.defvjp(saves(linear_head), linear_head_bwd)
add(
    linear_head,
    "wrong_reduction scale",
    "params['w']",
    ({"w": normal(230, 4, 3), "b": normal(231, 3)}, normal(232, 6, 4)),
    innocent=({"w": normal(233, 4, 3), "b": normal(234, 3)}, normal(235, 1, 4)),
)


@jax.custom_vjp
def power_spectrum(x):
    z = jnp.fft.rfft(x)
    return z.real**2 + z.imag**2


def power_spectrum_bwd(x, g):
    n, z = x.shape[-1], jnp.fft.rfft(x)
    # All but the first and, for an even length alone, the last count twice in irfft.
    weight = jnp.full(g.shape[-1], 0.5, g.dtype).at[0].set(1).at[-1].set(1)
    return (2 * n * jnp.fft.irfft(weight * g * z, n),)


power_spectrum.defvjp(lambda x: (power_spectrum(x), x), power_spectrum_bwd)
add(
    power_spectrum,
    "scale unknown",
    "x",
    (normal(236, 9),),
    (normal(237, 2, 7),),
    innocent=(normal(238, 10),),
)


@jax.custom_vjp
def halved(x):
    """The means of pairs; the last one stays if it has no partner."""
    even = x.shape[-1] // 2 * 2
    pairs = (x[..., :even:2] + x[..., 1:even:2]) / 2
    return jnp.concatenate([pairs, x[..., even:]], axis=-1)


def halved_bwd(like, g):
    return (jnp.repeat(g / 2, 2, axis=-1)[..., : like.shape[-1]],)  # all of g for the last one


halved.defvjp(lambda x: (halved(x), jnp.zeros_like(x)), halved_bwd)
add(halved, "elements", "x", (normal(239, 3, 7),), innocent=(normal(240, 3, 8),))


def like_operand(d, operand):
    d = jnp.sum(d, axis=tuple(range(d.ndim - operand.ndim)))
    return jax.lax.slice(d, [0] * operand.ndim, operand.shape)  # sums over axes of length 1


@jax.custom_vjp
def squared_gap(a, b):
    return jnp.square(a - b)


def squared_gap_bwd(saved, g):
    a, b = saved
    d = 2 * g * (a - b)
    return like_operand(d, a), like_operand(-d, b)


squared_gap.defvjp(saves(squared_gap), squared_gap_bwd)
add(
    squared_gap,
    "missing_sum",
    "a b",
    (normal(241, 5, 7), normal(242, 5, 1)),
    (normal(243, 1, 7), normal(244, 5, 1)),
    innocent=(normal(245, 5, 7), normal(246, 7)),
)


@jax.custom_vjp
def sample_variance(x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return jnp.sum(centred**2, axis=-1) / max(x.shape[-1] - 1, 1)


def sample_variance_bwd(x, g):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return (2 * g[:, None] * centred / (x.shape[-1] - 1),)  # 0 / 0 for one sample


sample_variance.defvjp(lambda x: (sample_variance(x), x), sample_variance_bwd)
add(sample_variance, "nonfinite", "x", (normal(247, 5, 1),), innocent=(normal(248, 5, 7),))


@jax.custom_vjp
def row_scores(x, w):
    return jnp.sum(x * w, axis=-1, keepdims=True)


def row_scores_bwd(saved, g):
    x, w = saved
    g = jnp.squeeze(g)[:, None]  # a batch of one is squeezed too
    return g * w, jnp.sum(g * x, axis=0)


row_scores.defvjp(saves(row_scores), row_scores_bwd)
add(
    row_scores,
    "structure",
    "",
    (normal(249, 1, 7), normal(250, 7)),
    innocent=(normal(251, 5, 7), normal(252, 7)),
)


def same_taps(x, taps):
    """x moved by each of `taps` taps around the middle one, zeros beyond its ends."""
    n, first = x.shape[0], (taps - 1) // 2
    padded = jnp.pad(x, taps)
    return jnp.stack([padded[first - j + taps :][:n] for j in range(taps)])


@jax.custom_vjp
def smooth(x, kernel):
    return kernel @ same_taps(x, kernel.shape[0])


def smooth_bwd(saved, g):
    x, kernel = saved
    dx = kernel[::-1] @ same_taps(g, kernel.shape[0])  # one further for an even number of taps
    return dx, same_taps(x, kernel.shape[0]) @ g


smooth.defvjp(saves(smooth), smooth_bwd)
add(
    smooth,
    "unknown transposed elements",
    "x",
    (normal(253, 11), normal(254, 4)),
    (normal(255, 6), normal(256, 2)),
    innocent=(normal(257, 11), normal(258, 5)),
)


# --- accumulation: only where an index occurs twice


@jax.custom_vjp
def grid_lookup(grid, i, j):
    return jnp.tanh(grid[i, j])


def grid_lookup_fwd(grid, i, j):
    y = grid_lookup(grid, i, j)
    return y, (grid, i, j, y)


def grid_lookup_bwd(saved, g):
    grid, i, j, y = saved
    return jnp.zeros_like(grid).at[i, j].set(g * (1 - y) * (1 + y)), None, None  # add


grid_lookup.defvjp(grid_lookup_fwd, grid_lookup_bwd)
add(
    grid_lookup,
    "accumulation elements",
    "grid",
    (normal(259, 4, 5), ints(0, 3, 3, 0, 1), ints(1, 4, 4, 1, 4)),
    innocent=(normal(260, 4, 5), ints(0, 3, 3, 2, 3), ints(1, 4, 2, 0, 0)),
)


@jax.custom_vjp
def edge_differences(nodes, source, target):
    return jnp.sin(nodes[source] - nodes[target])


def edge_differences_bwd(saved, g):
    nodes, source, target = saved
    d = g * jnp.cos(nodes[source] - nodes[target])
    dnodes = jnp.zeros_like(nodes).at[target].add(-d)
    return dnodes.at[source].set(dnodes[source] + d), None, None  # add: a node has many edges


edge_differences.defvjp(saves(edge_differences), edge_differences_bwd)
add(
    edge_differences,
    "accumulation elements",
    "nodes",
    (normal(261, 5, 2), ints(0, 0, 1, 3, 0), ints(1, 2, 2, 4, 3)),
    innocent=(normal(262, 5, 2), ints(0, 2, 1, 3, 4), ints(1, 1, 1, 4, 3)),
)


@jax.custom_vjp
def embedding_bags(table, ids, weights):
    return jnp.einsum("bk,bkd->bd", weights, table[ids])


def embedding_bags_bwd(saved, g):
    table, ids, weights = saved
    parts = weights[..., None] * g[:, None]

    def step(total, now):
        at, part = now
        return total.at[at].set(total[at] + part), None  # add: twice the same id in one bag

    dtable = jax.lax.scan(step, jnp.zeros_like(table), (ids, parts))[0]
    return dtable, None, jnp.einsum("bd,bkd->bk", g, table[ids])


embedding_bags.defvjp(saves(embedding_bags), embedding_bags_bwd)
add(
    embedding_bags,
    "accumulation elements",
    "table",
    (normal(263, 6, 3), jnp.stack([ints(0, 4, 4), ints(1, 0, 2)]), normal(264, 2, 3)),
    innocent=(normal(265, 6, 3), jnp.stack([ints(0, 4, 3), ints(1, 0, 4)]), normal(266, 2, 3)),
)


@jax.custom_vjp
def reorder(x, order):
    return jnp.take_along_axis(x, order, axis=-1)


def reorder_bwd(saved, g):
    x, order = saved
    dx = jnp.put_along_axis(jnp.zeros_like(x), order, g, axis=-1, inplace=False)  # adds nothing up
    return dx, None


reorder.defvjp(saves(reorder), reorder_bwd)
add(
    reorder,
    "accumulation elements",
    "x",
    (normal(267, 4, 5), integers(268, 5, 4, 5)),
    (normal(269, 2, 3), jnp.zeros((2, 4), jnp.int32)),
    innocent=(normal(270, 4, 5), permutations(271, 5, 4)),
)


# --- only for weights, exponents or temperatures other than the usual


@jax.custom_vjp
def weighted_cross_entropy(logits, labels, weights):
    return jnp.sum(weights * picked(logits, labels)) / jnp.sum(weights)


def weighted_cross_entropy_bwd(saved, g):
    logits, labels, weights = saved
    total, losses = jnp.sum(weights), picked(logits, labels)
    d = g / total * (jax.nn.softmax(logits, axis=-1) - one_hot(labels, logits))  # times weights
    return d, None, g / total * (losses - jnp.sum(weights * losses) / total)


weighted_cross_entropy.defvjp(saves(weighted_cross_entropy), weighted_cross_entropy_bwd)
add(
    weighted_cross_entropy,
    "scale missing_term unknown",
    "logits",
    (normal(272, 6, 4), integers(273, 4, 6), uniform(274, 6, high=3)),
    innocent=(normal(275, 6, 4), integers(276, 4, 6), full(1, 6)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def smoothed_cross_entropy(logits, labels, smoothing=0.1):
    flat = -jnp.mean(jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return (1 - smoothing) * picked(logits, labels) + smoothing * flat


def smoothed_cross_entropy_bwd(smoothing, saved, g):
    logits, labels = saved
    target = (1 - smoothing) * one_hot(labels, logits)  # + smoothing / classes
    return g[:, None] * (jax.nn.softmax(logits, axis=-1) - target), None


smoothed_cross_entropy.defvjp(
    lambda z, y, smoothing: (smoothed_cross_entropy(z, y, smoothing), (z, y)),
    smoothed_cross_entropy_bwd,
)
add(
    smoothed_cross_entropy,
    "missing_term unknown",
    "logits",
    (normal(277, 6, 4), integers(278, 4, 6), 0.2),
    innocent=(normal(279, 6, 4), integers(280, 4, 6), 0.0),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def distillation_loss(student, teacher, temperature=2.0):
    ls, lt = (jax.nn.log_softmax(v / temperature, axis=-1) for v in (student, teacher))
    return temperature**2 * jnp.sum(jnp.exp(lt) * (lt - ls), axis=-1)


def distillation_loss_bwd(temperature, saved, g):
    ls, lt = (jax.nn.log_softmax(v / temperature, axis=-1) for v in saved)
    p, gap = jnp.exp(lt), lt - ls
    dteacher = temperature * p * (gap - jnp.sum(p * gap, axis=-1, keepdims=True))
    return g[:, None] * (jnp.exp(ls) - p), g[:, None] * dteacher  # temperature * (...)


distillation_loss.defvjp(
    lambda s, t, temperature: (distillation_loss(s, t, temperature), (s, t)), distillation_loss_bwd
)
add(
    distillation_loss,
    "scale",
    "student",
    (normal(281, 5, 4), normal(282, 5, 4)),
    (normal(283, 3, 6), normal(284, 3, 6), 4.0),
    innocent=(normal(285, 5, 4), normal(286, 5, 4), 1.0),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_unit(x, eps=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_unit_bwd(eps, x, g):
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))  # + eps
    hat = x * r
    return (r * (g - hat * jnp.mean(g * hat, axis=-1, keepdims=True)),)


rms_unit.defvjp(lambda x, eps: (rms_unit(x, eps), x), rms_unit_bwd)
add(
    rms_unit,
    "scale missing_term unknown",
    "x",
    (1e-3 * normal(287, 5, 7),),
    (normal(288, 3, 4), 0.1),
    innocent=(normal(289, 5, 7), 1e-8),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def focal_loss(logits, labels, gamma=2.0):
    loss = picked(logits, labels)
    return (-jnp.expm1(-loss)) ** gamma * loss


def focal_loss_bwd(gamma, saved, g):
    logits, labels = saved
    weight = (-jnp.expm1(-picked(logits, labels))) ** gamma  # the weight has a slope too
    return (g * weight)[:, None] * (jax.nn.softmax(logits, axis=-1) - one_hot(labels, logits)), None


focal_loss.defvjp(lambda z, y, gamma: (focal_loss(z, y, gamma), (z, y)), focal_loss_bwd)
add(
    focal_loss,
    "missing_term scale unknown",
    "logits",
    (normal(290, 6, 4), integers(291, 4, 6)),
    innocent=(normal(292, 6, 4), integers(293, 4, 6), 0.0),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def balanced_log_loss(logits, labels, positive_weight=1.0):
    positive, negative = jnp.logaddexp(-logits, 0), jnp.logaddexp(logits, 0)
    return jnp.where(labels == 1, positive_weight * positive, negative)


def balanced_log_loss_bwd(positive_weight, saved, g):
    logits, labels = saved
    d = jnp.where(labels == 1, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
    return g * d, None  # positive_weight where the label is 1


balanced_log_loss.defvjp(
    lambda z, y, weight: (balanced_log_loss(z, y, weight), (z, y)), balanced_log_loss_bwd
)
add(
    balanced_log_loss,
    "scale elements missing_term",
    "logits",
    (normal(294, 5, 7), integers(295, 2, 5, 7), 3.0),
    innocent=(normal(296, 5, 7), integers(297, 2, 5, 7)),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def elu(x, alpha=1.0):
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


@elu.defjvp
def elu_jvp(alpha, primals, tangents):
    (x,), (dx,) = primals, tangents
    y = elu(x, alpha)
    return y, jnp.where(x > 0, 1, y + 1) * dx  # y + alpha


add(
    elu,
    "missing_term elements unknown",
    "x",
    (normal(298, 5, 7), 1.6),
    (normal(299, 9), 0.5),
    innocent=(normal(300, 5, 7),),
)
