"""Wrong rules by other hands: physics, graphs, signals, blocks, numerics, transformations."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jax import lax

from .entry import Wrong
from .holdout_values import CUBE, add_wrong, integers, normal, positive, symmetric

ENTRIES: list[Wrong] = []
wrong = partial(add_wrong, ENTRIES)


# Physics and geometry.


@jax.custom_vjp
def lennard_jones(positions, sigma):
    """Energy of all pairs, positions (particles, 3)."""
    d = positions[:, None] - positions
    off = 1.0 - jnp.eye(positions.shape[0])
    s6 = (sigma**2 / (jnp.sum(d**2, axis=-1) + jnp.eye(positions.shape[0]))) ** 3
    return 2.0 * jnp.sum(off * (s6**2 - s6))


def lennard_jones_fwd(positions, sigma):
    return lennard_jones(positions, sigma), (positions, sigma)


def lennard_jones_bwd(res, g):
    positions, sigma = res
    d = positions[:, None] - positions
    off = 1.0 - jnp.eye(positions.shape[0])
    r2 = jnp.sum(d**2, axis=-1) + jnp.eye(positions.shape[0])
    s6 = off * (sigma**2 / r2) ** 3
    forces = jnp.sum((8.0 * (6.0 * s6**2 - 3.0 * s6) / r2)[..., None] * d, axis=1)
    return g * forces, g * jnp.sum(24.0 * s6**2 - 12.0 * s6) / sigma


lennard_jones.defvjp(lennard_jones_fwd, lennard_jones_bwd)
wrong(
    "forces_for_gradient",
    lennard_jones,
    (CUBE + 0.1 * normal(149, 8, 3), jnp.float32(1.0)),
    causes="sign",
    of=["positions"],
)


@jax.custom_vjp
def to_cartesian(radius, angle):
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def to_cartesian_fwd(radius, angle):
    return to_cartesian(radius, angle), (radius, angle)


def to_cartesian_bwd(res, cts):
    radius, angle = res
    dx, dy = cts
    dradius = dx * jnp.cos(angle) + dy * jnp.sin(angle)
    dangle = radius * (dy * jnp.cos(angle) - dx * jnp.sin(angle))
    return dangle, dradius


to_cartesian.defvjp(to_cartesian_fwd, to_cartesian_bwd)
wrong(
    "polar_exchanged",
    to_cartesian,
    (positive(150, 4), normal(151, 4)),
    causes="swapped_arguments",
    of=["radius", "angle"],
)


@jax.custom_vjp
def sincos(x):
    return jnp.sin(x), jnp.cos(x)


def sincos_fwd(x):
    s, c = jnp.sin(x), jnp.cos(x)
    return (s, c), (s, c)


def sincos_bwd(res, cts):
    s, c = res
    return (cts[0] * c + cts[1] * s,)


sincos.defvjp(sincos_fwd, sincos_bwd)
wrong(
    "cosine_path_sign",
    sincos,
    (normal(152, 6),),
    causes="sign",
    of=["x"],
    innocent=(jnp.zeros(3),),
)


@jax.custom_vjp
def cross(a, b):
    return jnp.cross(a, b)


def cross_fwd(a, b):
    return jnp.cross(a, b), (a, b)


def cross_bwd(res, g):
    a, b = res
    return jnp.cross(b, g), jnp.cross(a, g)


cross.defvjp(cross_fwd, cross_bwd)
wrong(
    "cross_product_order",
    cross,
    (normal(153, 4, 3), normal(154, 4, 3)),
    causes="sign",
    of=["b"],
)


@jax.custom_jvp
def bearing(y, x):
    return jnp.arctan2(y, x)


@bearing.defjvp
def bearing_jvp(primals, tangents):
    y, x = primals
    return bearing(y, x), x * tangents[0] / (x * x + y * y)


wrong(
    "bearing_second_tangent",
    bearing,
    (normal(155, 5), normal(156, 5)),
    causes="dropped_argument",
    of=["x"],
)


def rotation_coefficients(w):
    """sin(t)/t and (1 - cos t)/t^2 for t = |w|, by series near 0."""
    t2 = w @ w
    small = t2 < 1e-4
    safe = jnp.where(small, 1.0, t2)
    t = jnp.sqrt(safe)
    a = jnp.where(small, 1.0 - t2 / 6.0, jnp.sin(t) / t)
    return a, jnp.where(small, 0.5 - t2 / 24.0, (1.0 - jnp.cos(t)) / safe)


@jax.custom_vjp
def rotate_vector(v, w):
    """Rodrigues' rotation of v by the vector w."""
    a, b = rotation_coefficients(w)
    wv = jnp.cross(w, v)
    return v + a * wv + b * jnp.cross(w, wv)


def rotate_vector_fwd(v, w):
    return rotate_vector(v, w), (v, w)


def rotate_vector_bwd(res, g):
    v, w = res
    t = jnp.sqrt(w @ w)
    a, b = jnp.sin(t) / t, (1.0 - jnp.cos(t)) / t**2
    da = (jnp.cos(t) * t - jnp.sin(t)) / t**3
    db = (jnp.sin(t) * t - 2.0 * (1.0 - jnp.cos(t))) / t**4
    wv, gw = jnp.cross(w, v), jnp.cross(g, w)
    dv = g + a * gw + b * jnp.cross(gw, w)
    dw = a * jnp.cross(v, g) + b * (jnp.cross(wv, g) + jnp.cross(v, gw))
    return dv, dw + w * (da * (g @ wv) + db * (g @ jnp.cross(w, wv)))


rotate_vector.defvjp(rotate_vector_fwd, rotate_vector_bwd)
wrong(
    "rotation_by_nothing",
    rotate_vector,
    (normal(157, 3), jnp.zeros(3)),
    causes="nonfinite edge",
    of=["v", "w"],
    innocent=(normal(158, 3), normal(159, 3)),
)


@jax.custom_vjp
def laplacian(u):
    """Five-point stencil, zero outside."""
    p = jnp.pad(u, 1)
    return p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4.0 * u


def laplacian_fwd(u):
    return laplacian(u), None


def laplacian_bwd(_, g):
    moved = [jnp.roll(g, s, axis) for s in (1, -1) for axis in (0, 1)]
    return (moved[0] + moved[1] + moved[2] + moved[3] - 4.0 * g,)


laplacian.defvjp(laplacian_fwd, laplacian_bwd)
wrong("laplacian_wraps_around", laplacian, (normal(160, 5, 7),), causes="elements", of=["u"])


@jax.custom_vjp
def upwind_step(u, c):
    """One step of advection on a ring with Courant numbers c."""
    back, ahead = u - jnp.roll(u, 1), jnp.roll(u, -1) - u
    return u - jnp.where(c > 0, c * back, c * ahead)


def upwind_step_fwd(u, c):
    return upwind_step(u, c), (u, c)


def upwind_step_bwd(res, g):
    u, c = res
    back, ahead = u - jnp.roll(u, 1), jnp.roll(u, -1) - u
    return g - c * g + jnp.roll(c * g, -1), -g * jnp.where(c > 0, back, ahead)


upwind_step.defvjp(upwind_step_fwd, upwind_step_bwd)
wrong(
    "upwind_against_the_flow",
    upwind_step,
    (normal(161, 7), 0.5 * normal(162, 7)),
    causes="elements missing_term transposed",
    of=["u"],
    innocent=(normal(163, 7), positive(164, 7, low=0.1, high=0.9)),
)


@jax.custom_vjp
def table_lookup(x, values):
    """Linear interpolation on an even grid over [0, 1], constant outside."""
    n = values.shape[0]
    pos = jnp.clip(x, 0.0, 1.0) * (n - 1)
    i = jnp.clip(jnp.floor(pos).astype(jnp.int32), 0, n - 2)
    f = pos - i
    return (1.0 - f) * values[i] + f * values[i + 1]


def table_lookup_fwd(x, values):
    return table_lookup(x, values), (x, values)


def table_lookup_bwd(res, g):
    x, values = res
    n = values.shape[0]
    pos = jnp.clip(x, 0.0, 1.0) * (n - 1)
    i = jnp.clip(jnp.floor(pos).astype(jnp.int32), 0, n - 2)
    f = pos - i
    dvalues = jnp.zeros_like(values).at[i].add(g * (1.0 - f)).at[i + 1].add(g * f)
    return g * (n - 1) * (values[i + 1] - values[i]), dvalues


table_lookup.defvjp(table_lookup_fwd, table_lookup_bwd)
wrong(
    "lookup_slope_outside",
    table_lookup,
    (jnp.array([0.13, 0.52, 1.4, -0.3, 0.91]), normal(165, 6)),
    causes="elements edge missing_activation_derivative",
    of=["x"],
    innocent=(jnp.array([0.13, 0.52, 0.77, 0.34, 0.91]), normal(166, 6)),
)


# Kernels, graphs and signals.


@jax.custom_vjp
def rbf_kernel(x, z, lengthscale):
    r2 = jnp.sum((x[:, None] - z) ** 2, axis=-1)
    return jnp.exp(-0.5 * r2 / lengthscale**2)


def rbf_kernel_fwd(x, z, lengthscale):
    k = rbf_kernel(x, z, lengthscale)
    return k, (x, z, lengthscale, k)


def rbf_kernel_bwd(res, g):
    x, z, lengthscale, k = res
    d = x[:, None] - z
    pull = (g * k / lengthscale**2)[..., None] * d
    return -pull.sum(1), pull.sum(0), jnp.sum(g * k * jnp.sum(d**2, -1)) / lengthscale**2


rbf_kernel.defvjp(rbf_kernel_fwd, rbf_kernel_bwd)
wrong(
    "lengthscale_power",
    rbf_kernel,
    (normal(167, 4, 2), normal(168, 3, 2), jnp.float32(1.6)),
    causes="scale",
    of=["lengthscale"],
    innocent=(normal(169, 4, 2), normal(170, 3, 2), jnp.float32(1.0)),
)


@jax.custom_vjp
def cosine_similarity(a, b):
    return a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def cosine_similarity_fwd(a, b):
    return cosine_similarity(a, b), (a, b)


def cosine_similarity_bwd(res, g):
    a, b = res
    na, nb = jnp.linalg.norm(a), jnp.linalg.norm(b)
    return g * (b / nb - a * (a @ b) / (na**2 * nb)) / na, g * a / (na * nb)


cosine_similarity.defvjp(cosine_similarity_fwd, cosine_similarity_bwd)
wrong(
    "cosine_second_norm_constant",
    cosine_similarity,
    (normal(171, 5), normal(172, 5)),
    causes="missing_term",
    of=["b"],
)


class Edges(NamedTuple):
    """A graph's edges."""

    senders: jax.Array
    receivers: jax.Array
    weights: jax.Array


@jax.custom_vjp
def aggregate(nodes, edges):
    sent = nodes[edges.senders] * edges.weights[:, None]
    return jnp.zeros_like(nodes).at[edges.receivers].add(sent)


def aggregate_fwd(nodes, edges):
    return aggregate(nodes, edges), (nodes, edges)


def aggregate_bwd(res, g):
    nodes, edges = res
    got = g[edges.receivers]
    dnodes = jnp.zeros_like(nodes).at[edges.senders].set(got * edges.weights[:, None])
    return dnodes, Edges(None, None, jnp.sum(got * nodes[edges.senders], axis=-1))


aggregate.defvjp(aggregate_fwd, aggregate_bwd)
RING = jnp.arange(5)
wrong(
    "aggregate_one_edge_a_node",
    aggregate,
    (
        normal(173, 5, 2),
        Edges(jnp.array([0, 0, 1, 3, 3, 3]), jnp.array([1, 2, 2, 0, 4, 1]), normal(174, 6)),
    ),
    causes="accumulation elements missing_sum",
    of=["nodes"],
    innocent=(normal(175, 5, 2), Edges(RING, (RING + 1) % 5, normal(176, 5))),
)


def segment_mean_plain(x, segments, count):
    total = jax.ops.segment_sum(x, segments, count)
    size = jax.ops.segment_sum(jnp.ones_like(x), segments, count)
    return total / jnp.maximum(size, 1.0)


segment_mean = jax.custom_vjp(segment_mean_plain, nondiff_argnums=(2,))


def segment_mean_fwd(x, segments, count):
    return segment_mean_plain(x, segments, count), (segments, x.shape[0])


def segment_mean_bwd(count, res, g):
    segments, n = res
    return jnp.take(g, segments, mode="fill", fill_value=0.0) * count / n, None


segment_mean.defvjp(segment_mean_fwd, segment_mean_bwd)
wrong(
    "segments_taken_as_equal",
    segment_mean,
    (normal(177, 6), jnp.array([0, 0, 0, 1, 2, 2]), 3),
    causes="scale wrong_reduction elements",
    of=["x"],
    innocent=(normal(178, 6), jnp.array([0, 0, 1, 1, 2, 2]), 3),
)


@jax.custom_vjp
def fir(x, taps):
    """Causal filter: y_t = sum_k taps_k x_{t-k}."""
    return jnp.convolve(x, taps)[: x.shape[0]]


def fir_fwd(x, taps):
    return fir(x, taps), (x, taps)


def fir_bwd(res, g):
    x, taps = res
    width = taps.shape[0]
    dx = sum(taps[k] * jnp.roll(g, -k) for k in range(width))
    padded = jnp.pad(x, (width - 1, 0))
    starts = width - 1 - jnp.arange(width)
    return dx, padded[starts[:, None] + jnp.arange(x.shape[0])] @ g


fir.defvjp(fir_fwd, fir_bwd)
wrong(
    "fir_wraps_around",
    fir,
    (normal(179, 9), normal(180, 3)),
    causes="elements",
    of=["x"],
    innocent=(normal(181, 9), normal(182, 1)),
)


@jax.custom_vjp
def circular_convolve(x, kernel):
    n = x.shape[-1]
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(kernel), n)


def circular_convolve_fwd(x, kernel):
    return circular_convolve(x, kernel), (x, kernel)


def circular_convolve_bwd(res, g):
    x, kernel = res
    spectrum = jnp.fft.rfft(g)
    n = x.shape[-1]
    dx = jnp.fft.irfft(spectrum * jnp.fft.rfft(kernel), n)
    return dx, jnp.fft.irfft(spectrum * jnp.conj(jnp.fft.rfft(x)), n)


circular_convolve.defvjp(circular_convolve_fwd, circular_convolve_bwd)
wrong(
    "convolution_for_correlation",
    circular_convolve,
    (normal(183, 8), normal(184, 8)),
    causes="conjugate transposed",
    of=["x"],
    innocent=(normal(185, 5), jnp.array([1.0, 0.5, 0.2, 0.2, 0.5])),
)


def shifted_plain(x, by):
    return jnp.roll(jnp.sin(x), by, axis=-1)


shifted_sine = jax.custom_vjp(shifted_plain, nondiff_argnums=(1,))


def shifted_sine_fwd(x, by):
    return shifted_plain(x, by), jnp.cos(x)


def shifted_sine_bwd(by, c, g):
    return (jnp.roll(g, by, axis=-1) * c,)


shifted_sine.defvjp(shifted_sine_fwd, shifted_sine_bwd)
wrong(
    "roll_same_direction",
    shifted_sine,
    (normal(186, 2, 6), 1),
    causes="transposed elements",
    of=["x"],
    innocent=(normal(187, 2, 6), 3),
)


@jax.custom_vjp
def phasor_product(a, z):
    return a * z


def phasor_product_fwd(a, z):
    return a * z, (a, z)


def phasor_product_bwd(res, g):
    a, z = res
    return g * jnp.conj(z), g * jnp.conj(a)


phasor_product.defvjp(phasor_product_fwd, phasor_product_bwd)
wrong(
    "phasor_other_convention",
    phasor_product,
    (normal(188, 4) + 1j * normal(189, 4), normal(190, 4) + 1j * normal(191, 4)),
    causes="conjugate",
    of=["a", "z"],
    innocent=(normal(192, 4) + 0j, normal(193, 4) + 0j),
)


@jax.custom_vjp
def power_spectrum(z):
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2


def power_spectrum_fwd(z):
    return power_spectrum(z), z


def power_spectrum_bwd(z, g):
    return (2.0 * g * z,)


power_spectrum.defvjp(power_spectrum_fwd, power_spectrum_bwd)
wrong(
    "power_spectrum_conjugate",
    power_spectrum,
    (normal(194, 5) + 1j * normal(195, 5),),
    causes="conjugate",
    of=["z"],
    innocent=(normal(196, 5) + 0j,),
)


# Indices, masks and blocks.


@jax.custom_vjp
def pick(x, i):
    """x[i], with negative indices from the end."""
    return x[i]


def pick_fwd(x, i):
    return x[i], (i, x.shape[0])


def pick_bwd(res, g):
    i, n = res
    return jax.nn.one_hot(i, n, dtype=g.dtype).T @ g, None


pick.defvjp(pick_fwd, pick_bwd)
wrong(
    "pick_from_the_end",
    pick,
    (normal(197, 5), jnp.array([0, -1, 2, -2])),
    causes="elements edge",
    of=["x"],
    innocent=(normal(198, 5), jnp.array([0, 1, 2, 4])),
)


@jax.custom_vjp
def masked_softplus(x, mask):
    return jnp.sum(jnp.where(mask, jax.nn.softplus(x), 0.0), axis=-1)


def masked_softplus_fwd(x, mask):
    return masked_softplus(x, mask), x


def masked_softplus_bwd(x, g):
    return g[:, None] * jax.nn.sigmoid(x), None


masked_softplus.defvjp(masked_softplus_fwd, masked_softplus_bwd)
wrong(
    "masked_softplus_unmasked",
    masked_softplus,
    (normal(199, 3, 4), normal(200, 3, 4) > 0.3),
    causes="elements",
    of=["x"],
    innocent=(normal(201, 3, 4), jnp.ones((3, 4), bool)),
)


@jax.custom_vjp
def masked_mean(x, mask):
    """Row means over the unmasked; 0 for a row without any."""
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(jnp.where(mask, x, 0.0), axis=-1) / count


def masked_mean_fwd(x, mask):
    return masked_mean(x, mask), mask


def masked_mean_bwd(mask, g):
    return jnp.where(mask, g[:, None], 0.0) / jnp.sum(mask, axis=-1, keepdims=True), None


masked_mean.defvjp(masked_mean_fwd, masked_mean_bwd)
wrong(
    "masked_mean_of_nothing",
    masked_mean,
    (normal(202, 3, 4), jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)),
    causes="nonfinite",
    of=["x"],
    innocent=(normal(272, 3, 4), jnp.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]], bool)),
)


BLOCK = 4


def row_entropy_plain(x):
    logp = jax.nn.log_softmax(x, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


row_entropy = jax.custom_vjp(row_entropy_plain)


def row_entropy_fwd(x):
    return row_entropy_plain(x), x


def row_entropy_bwd(x, g):
    def body(i, dx):
        rows = lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK)
        gs = lax.dynamic_slice_in_dim(g, i * BLOCK, BLOCK)
        logp = jax.nn.log_softmax(rows, axis=-1)
        p = jnp.exp(logp)
        h = -jnp.sum(p * logp, axis=-1, keepdims=True)
        return lax.dynamic_update_slice_in_dim(dx, -gs[:, None] * p * (logp + h), i * BLOCK, 0)

    return (lax.fori_loop(0, x.shape[0] // BLOCK, body, jnp.zeros_like(x)),)


row_entropy.defvjp(row_entropy_fwd, row_entropy_bwd)
wrong(
    "entropy_last_block",
    row_entropy,
    (normal(203, 10, 3),),
    causes="elements",
    of=["x"],
    innocent=(normal(204, 8, 3),),
)


@jax.custom_vjp
def blocked_norms(x):
    return jnp.sqrt(1.0 + jnp.sum(x * x, axis=-1))


def blocked_norms_fwd(x):
    """Whole blocks go through the kernel; the last rows stay at their initial value."""
    n = x.shape[0] // BLOCK * BLOCK
    y = jnp.ones(x.shape[0], x.dtype)
    y = y.at[:n].set(jnp.sqrt(1.0 + jnp.sum(x[:n] ** 2, axis=-1)))
    return y, (x, jnp.sqrt(1.0 + jnp.sum(x * x, axis=-1)))


def blocked_norms_bwd(res, g):
    x, y = res
    return ((g / y)[:, None] * x,)


blocked_norms.defvjp(blocked_norms_fwd, blocked_norms_bwd)
wrong(
    "norms_block_tail_value",
    blocked_norms,
    (normal(205, 7, 3),),
    causes="value",
    innocent=(normal(206, 8, 3),),
)


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


gelu = jax.custom_vjp(exact_gelu)


def gelu_fwd(x):
    return jax.nn.gelu(x, approximate=True), x


def gelu_bwd(x, g):
    cdf = 0.5 * (1.0 + lax.erf(x / jnp.sqrt(2.0).astype(x.dtype)))
    return (g * (cdf + x * jnp.exp(-0.5 * x * x) * (2.0 * jnp.pi) ** -0.5),)


gelu.defvjp(gelu_fwd, gelu_bwd)
wrong("gelu_two_formulas", gelu, (normal(207, 4, 5),), causes="value")


# Numerics.


@jax.custom_vjp
def sinc_unnormalised(x):
    return jnp.where(x == 0, 1.0, jnp.sin(x) / jnp.where(x == 0, 1.0, x))


def sinc_unnormalised_fwd(x):
    return sinc_unnormalised(x), x


def sinc_unnormalised_bwd(x, g):
    safe = jnp.where(x == 0, 1.0, x)
    return (g * jnp.where(x == 0, 1.0, (jnp.cos(x) - jnp.sin(x) / safe) / safe),)


sinc_unnormalised.defvjp(sinc_unnormalised_fwd, sinc_unnormalised_bwd)
wrong(
    "sinc_slope_at_zero",
    sinc_unnormalised,
    (jnp.array([0.0, 1.0, -2.0]),),
    causes="edge",
    of=["x"],
    innocent=(positive(208, 5),),
)


@jax.custom_vjp
def row_max(x):
    return jnp.max(x, axis=-1)


def row_max_fwd(x):
    y = jnp.max(x, axis=-1)
    return y, x == y[:, None]


def row_max_bwd(hit, g):
    return (jnp.where(hit, g[:, None], 0.0),)


row_max.defvjp(row_max_fwd, row_max_bwd)
wrong(
    "row_max_counts_ties_twice",
    row_max,
    (jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]),),
    causes="edge elements scale",
    of=["x"],
    innocent=(normal(209, 2, 4),),
)


@jax.custom_vjp
def power(x, p):
    return x**p


def power_fwd(x, p):
    y = x**p
    return y, (x, p, y)


def power_bwd(res, g):
    x, p, y = res
    return g * p * x ** (p - 1.0), g * y * jnp.log(x)


power.defvjp(power_fwd, power_bwd)
wrong(
    "power_of_zero",
    power,
    (jnp.array([0.0, 1.5, 2.0]), jnp.array([2.0, 2.5, 3.0])),
    causes="nonfinite",
    of=["p"],
    innocent=(positive(210, 4), positive(211, 4)),
)


@jax.custom_vjp
def unit_rows(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def unit_rows_fwd(x):
    return unit_rows(x), x


def unit_rows_bwd(x, g):
    n = jnp.linalg.norm(x, axis=-1, keepdims=True)
    u = x / n
    return ((g - u * jnp.sum(g * u, axis=-1, keepdims=True)) / n,)


unit_rows.defvjp(unit_rows_fwd, unit_rows_bwd)
wrong(
    "unit_rows_zero_row",
    unit_rows,
    (normal(212, 3, 4).at[1].set(0.0),),
    causes="nonfinite",
    of=["x"],
    innocent=(10.0 * normal(213, 3, 4),),
)


@jax.custom_vjp
def log_add(a, b):
    return jnp.logaddexp(a, b)


def log_add_fwd(a, b):
    return jnp.logaddexp(a, b), (a, b)


def log_add_bwd(res, g):
    ea, eb = jnp.exp(res[0]), jnp.exp(res[1])
    return g * ea / (ea + eb), g * eb / (ea + eb)


log_add.defvjp(log_add_fwd, log_add_bwd)
wrong(
    "log_add_large",
    log_add,
    (jnp.array([100.0, 1.0, 95.0]), jnp.array([99.0, 2.0, 93.0])),
    causes="overflow nonfinite",
    of=["a", "b"],
    innocent=(normal(214, 4), normal(215, 4)),
)


def sharp_softplus_plain(x, beta):
    return jnp.logaddexp(beta * x, 0.0) / beta


sharp_softplus = jax.custom_vjp(sharp_softplus_plain, nondiff_argnums=(1,))


def sharp_softplus_fwd(x, beta):
    return sharp_softplus_plain(x, beta), x


def sharp_softplus_bwd(beta, x, g):
    e = jnp.exp(beta * x)
    return (g * e / (1.0 + e),)


sharp_softplus.defvjp(sharp_softplus_fwd, sharp_softplus_bwd)
wrong(
    "softplus_large",
    sharp_softplus,
    (jnp.array([-3.0, 0.5, 12.0, 30.0]), 8.0),
    causes="overflow nonfinite",
    of=["x"],
    innocent=(normal(216, 5), 1.0),
)


@jax.custom_vjp
def scaled_norm(x):
    """Euclidean norm that does not overflow."""
    s = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x)), 1e-30))
    return s * jnp.sqrt(jnp.sum((x / s) ** 2))


def scaled_norm_fwd(x):
    return scaled_norm(x), x


def scaled_norm_bwd(x, g):
    return (g * x * lax.rsqrt(jnp.sum(x * x)),)


scaled_norm.defvjp(scaled_norm_fwd, scaled_norm_bwd)
wrong(
    "norm_of_huge",
    scaled_norm,
    (1e25 * normal(217, 5),),
    causes="overflow",
    of=["x"],
    innocent=(normal(218, 5),),
)


@jax.custom_jvp
def exprel(x):
    """(exp(x) - 1) / x."""
    return jnp.where(x == 0, 1.0, jnp.expm1(x) / jnp.where(x == 0, 1.0, x))


@exprel.defjvp
def exprel_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    safe = jnp.where(x == 0, 1.0, x)
    slope = jnp.where(x == 0, 0.5, (jnp.exp(x) * (x - 1.0) + 1.0) / (safe * safe))
    return exprel(x), slope * t


wrong(
    "exprel_near_zero",
    exprel,
    (jnp.array([1e-3, -3e-4, 2e-3]),),
    causes="cancellation overflow",
    of=["x"],
    innocent=(1.0 + positive(219, 4),),
)


@jax.custom_vjp
def standardise(x):
    """Zero mean and unit variance over a channel."""
    d = x - jnp.mean(x)
    return d * lax.rsqrt(jnp.mean(d * d) + 1e-5)


def standardise_fwd(x):
    return standardise(x), x


def standardise_bwd(x, g):
    mean = jnp.mean(x)
    inv = lax.rsqrt(jnp.maximum(jnp.mean(x * x) - mean * mean, 0.0) + 1e-5)
    xhat = (x - mean) * inv
    return (inv * (g - jnp.mean(g) - xhat * jnp.mean(g * xhat)),)


standardise.defvjp(standardise_fwd, standardise_bwd)
wrong(
    "variance_from_squares",
    standardise,
    (1000.0 + normal(220, 64),),
    causes="cancellation low_precision",
    of=["x"],
    innocent=(normal(221, 64),),
)


@jax.custom_jvp
def log_normal_cdf(x):
    return jsp.special.log_ndtr(x)


@log_normal_cdf.defjvp
def log_normal_cdf_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    pdf = jnp.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)
    return log_normal_cdf(x), t * pdf / jsp.special.ndtr(x)


wrong(
    "log_cdf_far_tail",
    log_normal_cdf,
    (jnp.array([-20.0, -1.0, 0.5]),),
    causes="underflow nonfinite",
    of=["x"],
    innocent=(normal(222, 5),),
)


@jax.custom_vjp
def geometric_mean(p):
    return jnp.exp(jnp.mean(jnp.log(p)))


def geometric_mean_fwd(p):
    return geometric_mean(p), p


def geometric_mean_bwd(p, g):
    return (g * jnp.prod(p) ** (1.0 / p.size) / (p.size * p),)


geometric_mean.defvjp(geometric_mean_fwd, geometric_mean_bwd)
wrong(
    "geometric_mean_of_many",
    geometric_mean,
    (positive(223, 60, low=0.05, high=0.2),),
    causes="underflow",
    of=["p"],
    innocent=(positive(224, 6, low=0.05, high=0.2),),
)


@jax.custom_jvp
def bessel_i0e(x):
    return jsp.special.i0e(x)


@bessel_i0e.defjvp
def bessel_i0e_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return bessel_i0e(x), (jsp.special.i1e(x) - bessel_i0e(x)) * t


wrong(
    "bessel_left_half",
    bessel_i0e,
    (jnp.array([-1.5, 0.7, -0.3, 2.0]),),
    causes="elements sign missing_term",
    of=["x"],
    innocent=(positive(225, 4),),
)


def lambert_newton(x):
    def step(_, w):
        e = jnp.exp(w)
        return w - (w * e - x) / (e * (w + 1.0))

    return lax.fori_loop(0, 20, step, jnp.log1p(x))


lambert_w = jax.custom_jvp(lambert_newton)


@lambert_w.defjvp
def lambert_w_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    w = lambert_w(x)
    return w, t * w / (x * (1.0 + w))


wrong(
    "lambert_at_zero",
    lambert_w,
    (jnp.array([0.0, 0.5, 2.0]),),
    causes="nonfinite",
    of=["x"],
    innocent=(positive(226, 4),),
)


@jax.custom_vjp
def bias_add(x, b):
    return x + b


def bias_add_fwd(x, b):
    return x + b, None


def bias_add_bwd(_, g):
    def add(total, row):
        return total + row, None

    return g, lax.scan(add, jnp.zeros(g.shape[1:], g.dtype), g)[0]


bias_add.defvjp(bias_add_fwd, bias_add_bwd)
wrong(
    "bias_summed_in_half",
    bias_add,
    (normal(227, 400, 4, dtype="bfloat16"), normal(228, 4, dtype="bfloat16")),
    causes="low_precision accumulation",
    of=["b"],
    innocent=(normal(229, 400, 4), normal(230, 4)),
)


@jax.custom_vjp
def lean_linear(x, w):
    return x @ w


def lean_linear_fwd(x, w):
    return x @ w, (x.astype(jnp.bfloat16), w)


def lean_linear_bwd(res, g):
    x, w = res
    return g @ w.T, x.astype(g.dtype).T @ g


lean_linear.defvjp(lean_linear_fwd, lean_linear_bwd)
wrong(
    "activations_kept_in_half",
    lean_linear,
    (normal(231, 8, 4), normal(232, 4, 3)),
    causes="low_precision",
    of=["w"],
    innocent=(normal(233, 8, 4, dtype="bfloat16"), normal(234, 4, 3, dtype="bfloat16")),
)


@jax.custom_vjp
def half_unit_vector(x):
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(wide * wide))).astype(x.dtype)


def half_unit_vector_fwd(x):
    return half_unit_vector(x), x


def half_unit_vector_bwd(x, g):
    n2 = jnp.sum(x * x)
    return ((g - x * (jnp.sum(x * g) / n2)) * lax.rsqrt(n2),)


half_unit_vector.defvjp(half_unit_vector_fwd, half_unit_vector_bwd)
wrong(
    "squares_in_half",
    half_unit_vector,
    (300.0 * normal(235, 8, dtype="float16"),),
    causes="overflow low_precision nonfinite",
    of=["x"],
    innocent=(300.0 * normal(236, 8),),
)


@jax.custom_vjp
def sinusoidal_readout(x):
    """Sum of x_i sin(i / 2)."""
    wave = jnp.sin(0.5 * jnp.arange(x.shape[0], dtype=jnp.float32))
    return jnp.sum(x.astype(jnp.float32) * wave).astype(x.dtype)


def sinusoidal_readout_fwd(x):
    return sinusoidal_readout(x), x.shape[0]


def sinusoidal_readout_bwd(n, g):
    return (g * jnp.sin(0.5 * jnp.arange(n, dtype=g.dtype)),)


sinusoidal_readout.defvjp(sinusoidal_readout_fwd, sinusoidal_readout_bwd)
wrong(
    "positions_in_half",
    sinusoidal_readout,
    (normal(237, 600, dtype="bfloat16"),),
    causes="low_precision elements",
    of=["x"],
    innocent=(normal(238, 600),),
)


@jax.custom_vjp
def modulate(x, gain):
    return x * gain


def modulate_fwd(x, gain):
    return x * gain, (x, gain)


def modulate_bwd(res, g):
    x, gain = res
    return g * gain, (g * x).astype(gain.dtype)


modulate.defvjp(modulate_fwd, modulate_bwd)
wrong(
    "modulate_returns_wide",
    modulate,
    (normal(239, 6, dtype="bfloat16"), normal(240, 6)),
    causes="dtype",
    of=["x"],
    innocent=(normal(241, 6), normal(242, 6)),
)


# Quantisation and optimisation layers.


@jax.custom_vjp
def dequantise(codes, scale):
    """codes int8 (rows, columns), one scale a row."""
    return codes.astype(scale.dtype) * scale[:, None]


def dequantise_fwd(codes, scale):
    return dequantise(codes, scale), codes


def dequantise_bwd(codes, g):
    return None, jnp.sum(g * codes, axis=0)


dequantise.defvjp(dequantise_fwd, dequantise_bwd)
wrong(
    "scale_summed_down_columns",
    dequantise,
    ((integers(243, 200, 5, 5) - 100).astype(jnp.int8), positive(244, 5)),
    causes="wrong_reduction transposed",
    of=["scale"],
)


@jax.custom_vjp
def affine_dequantise(codes, scale, zero):
    return (codes - zero[:, None]) * scale[:, None]


def affine_dequantise_fwd(codes, scale, zero):
    return affine_dequantise(codes, scale, zero), (codes, scale, zero)


def affine_dequantise_bwd(res, g):
    codes, scale, zero = res
    return None, jnp.sum(g * (codes - zero[:, None]), axis=1), -jnp.sum(g, axis=1)


affine_dequantise.defvjp(affine_dequantise_fwd, affine_dequantise_bwd)
wrong(
    "zero_point_unscaled",
    affine_dequantise,
    (integers(245, 16, 3, 8), positive(246, 3), 8.0 * positive(247, 3)),
    causes="scale",
    of=["zero"],
    innocent=(integers(248, 16, 3, 8), jnp.ones(3), 8.0 * positive(249, 3)),
)


def simplex_parts(x):
    """Threshold and support size of the projection of one vector."""
    u = jnp.sort(x)[::-1]
    k = jnp.arange(1, x.shape[0] + 1)
    mean = (jnp.cumsum(u) - 1.0) / k
    size = jnp.sum(u > mean)
    return mean[size - 1], size


@jax.custom_vjp
def project_simplex(x):
    return jnp.maximum(x - simplex_parts(x)[0], 0.0)


def project_simplex_fwd(x):
    y = project_simplex(x)
    return y, y > 0


def project_simplex_bwd(support, g):
    inside = jnp.where(support, g, 0.0)
    return (jnp.where(support, g - jnp.mean(inside), 0.0),)


project_simplex.defvjp(project_simplex_fwd, project_simplex_bwd)
wrong(
    "simplex_mean_over_all",
    project_simplex,
    (jnp.array([0.9, 0.5, -1.0, 0.3, -0.6]),),
    causes="wrong_reduction scale missing_term",
    of=["x"],
    innocent=(jnp.array([0.3, 0.2, 0.1, 0.25]),),
)


@jax.custom_vjp
def project_ball(x):
    """Rows onto the unit ball."""
    n = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(n, 1.0)


def project_ball_fwd(x):
    return project_ball(x), x


def project_ball_bwd(x, g):
    n = jnp.linalg.norm(x, axis=-1, keepdims=True)
    u = x / n
    return ((g - u * jnp.sum(u * g, axis=-1, keepdims=True)) / n,)


project_ball.defvjp(project_ball_fwd, project_ball_bwd)
wrong(
    "ball_inside_projected",
    project_ball,
    (jnp.stack([2.0 * normal(250, 4), jnp.array([0.1, 0.2, -0.3, 0.1]), 3.0 * normal(251, 4)]),),
    causes="elements edge missing_term",
    of=["x"],
    innocent=(4.0 + normal(252, 3, 4),),
)


def equilibrium_step(z, params, x):
    return jnp.tanh(params["w"] @ z + params["u"] @ x + params["b"])


def equilibrium_solve(params, x):
    def body(_, z):
        return equilibrium_step(z, params, x)

    return lax.fori_loop(0, 60, body, jnp.zeros_like(params["b"]))


equilibrium = jax.custom_vjp(equilibrium_solve)


def equilibrium_fwd(params, x):
    z = equilibrium_solve(params, x)
    return z, (z, params, x)


def equilibrium_bwd(res, g):
    z, params, x = res
    jacobian = jax.jacobian(equilibrium_step)(z, params, x)
    lam = jnp.linalg.solve(jnp.eye(z.shape[0]) - jacobian, g)
    return jax.vjp(lambda p, v: equilibrium_step(z, p, v), params, x)[1](lam)


equilibrium.defvjp(equilibrium_fwd, equilibrium_bwd)
wrong(
    "equilibrium_adjoint_system",
    equilibrium,
    (
        {"w": 0.25 * normal(253, 4, 4), "u": normal(254, 4, 3), "b": normal(255, 4)},
        normal(256, 3),
    ),
    causes="transposed",
    of=["params['w']", "params['u']", "params['b']", "x"],
    innocent=(
        {"w": 0.25 * symmetric(normal(257, 4, 4)), "u": normal(258, 4, 3), "b": jnp.zeros(4)},
        jnp.zeros(3),
    ),
)


# Transformations and cotangents.


@jax.custom_batching.custom_vmap
def inner_product(g, x):
    return jnp.sum(g * x)


@inner_product.def_vmap
def inner_product_batched(axis_size, in_batched, g, x):
    return jnp.broadcast_to(jnp.sum(g * x), (axis_size,)), True


@jax.custom_vjp
def gain(x, s):
    return s * x


def gain_fwd(x, s):
    return s * x, (x, s)


def gain_bwd(res, g):
    x, s = res
    return g * s, inner_product(g, x)


gain.defvjp(gain_fwd, gain_bwd)
wrong(
    "gain_batched_kernel_sums_all",
    gain,
    (normal(259, 5), jnp.float32(1.3)),
    causes="vmap",
    of=["s"],
)


@jax.custom_batching.custom_vmap
def pull_back(w, g):
    return w.T @ g


@pull_back.def_vmap
def pull_back_batched(axis_size, in_batched, w, g):
    if in_batched[0]:
        w = w[0]
    out = g @ w if in_batched[1] else jnp.broadcast_to(g @ w, (axis_size, w.shape[1]))
    return out, True


@jax.custom_vjp
def project(w, x):
    return w @ x


def project_fwd(w, x):
    return w @ x, (w, x)


def project_bwd(res, g):
    w, x = res
    return jnp.outer(g, x), pull_back(w, g)


project.defvjp(project_fwd, project_bwd)
wrong(
    "project_weights_taken_as_shared",
    project,
    (normal(260, 3, 4), normal(261, 4)),
    causes="vmap",
    of=["x"],
)


def reversed_total(g):
    return np.flip(np.cumsum(np.flip(g, 0), 0), 0).astype(g.dtype)


@jax.custom_vjp
def host_cumsum(x):
    return jnp.cumsum(x)


def host_cumsum_fwd(x):
    return jnp.cumsum(x), None


def host_cumsum_bwd(_, g):
    shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
    return (jax.pure_callback(reversed_total, shape, g, vmap_method="broadcast_all"),)


host_cumsum.defvjp(host_cumsum_fwd, host_cumsum_bwd)
wrong("host_callback_first_axis", host_cumsum, (normal(262, 5),), causes="vmap", of=["x"])


@jax.custom_jvp
def soft_rectifier(x):
    return jnp.logaddexp(x, 0.0)


@soft_rectifier.defjvp
def soft_rectifier_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return soft_rectifier(x), lax.stop_gradient(jax.nn.sigmoid(x)) * t


wrong("rectifier_slope_frozen", soft_rectifier, (normal(263, 5),), causes="second_order", of=["x"])


@jax.custom_jvp
def logistic(x):
    return 1.0 / (1.0 + jnp.exp(-x))


@logistic.defjvp
def logistic_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    y = logistic(x)
    return y, y * y * t


@jax.custom_vjp
def log_logistic(x):
    return -jnp.logaddexp(-x, 0.0)


def log_logistic_fwd(x):
    return log_logistic(x), x


def log_logistic_bwd(x, g):
    return (g * logistic(-x),)


log_logistic.defvjp(log_logistic_fwd, log_logistic_bwd)
wrong("curvature_from_wrong_helper", log_logistic, (normal(264, 5),), causes="second_order", of="x")


@jax.custom_vjp
def l1_penalty(x):
    return jnp.sum(jnp.abs(x), axis=-1)


def l1_penalty_fwd(x):
    return l1_penalty(x), x


def l1_penalty_bwd(x, g):
    return (jnp.copysign(g[:, None], x),)


l1_penalty.defvjp(l1_penalty_fwd, l1_penalty_bwd)
wrong(
    "l1_negative_cotangent",
    l1_penalty,
    (normal(265, 3, 4),),
    causes="nonlinear_in_cotangent sign",
    of=["x"],
)


@jax.custom_vjp
def guarded_matmul(x, w):
    return x @ w


def guarded_matmul_fwd(x, w):
    return x @ w, (x, w)


def guarded_matmul_bwd(res, g):
    x, w = res
    size = jnp.max(jnp.abs(g))
    unit = g / size
    return size * (unit @ w.T), size * (x.T @ unit)


guarded_matmul.defvjp(guarded_matmul_fwd, guarded_matmul_bwd)
wrong(
    "guarded_matmul_zero_cotangent",
    guarded_matmul,
    (normal(266, 4, 3), normal(267, 3, 2)),
    causes="nonfinite nonlinear_in_cotangent",
    of=["x", "w"],
)


LAST: dict[str, jax.Array] = {}


@jax.custom_vjp
def remembered_tanh(x):
    return jnp.tanh(x)


def remembered_tanh_fwd(x):
    LAST["y"] = jnp.tanh(x)
    return LAST["y"], None


def remembered_tanh_bwd(_, g):
    return (g * (1.0 - LAST["y"] ** 2),)


remembered_tanh.defvjp(remembered_tanh_fwd, remembered_tanh_bwd)
wrong("tanh_on_the_object", remembered_tanh, (normal(268, 5),), causes="stale_residual", of=["x"])


MASKS: dict[tuple[int, ...], jax.Array] = {}


@jax.custom_vjp
def cached_relu(x):
    return jnp.maximum(x, 0.0)


def cached_relu_fwd(x):
    """Keeps one mask a shape, as a cache of constants would."""
    mask = MASKS.get(x.shape)
    if mask is None:
        mask = x > 0
        if not isinstance(x, jax.core.Tracer):
            MASKS[x.shape] = mask
    return jnp.maximum(x, 0.0), mask


def cached_relu_bwd(mask, g):
    return (jnp.where(mask, g, 0.0),)


cached_relu.defvjp(cached_relu_fwd, cached_relu_bwd)
# An earlier step of the user's training filled the cache for this shape.
MASKS[(8,)] = normal(269, 8) > 0
wrong(
    "relu_mask_of_the_first_call",
    cached_relu,
    (normal(270, 8),),
    causes="stale_residual elements",
    of=["x"],
    innocent=(normal(271, 7),),
)
