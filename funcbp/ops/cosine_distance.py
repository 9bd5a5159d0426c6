"""One minus the cosine of the angle between predictions and targets.

    s = sum_i u_i v_i        y = 1 - s        u = a / |a|,  v = b / |b|

Backward. du_i/da_j = ([i = j] - u_i u_j) / |a|, so
    da_j = -dy (v_j - s u_j) / |a|        db_j = -dy (u_j - s v_j) / |b|

Where |a|^2 is below epsilon the norm is the constant sqrt(epsilon), and s u_j is left out.

Saves: the arguments, and three numbers a row: both norms and s.
Edge:  a zero vector gives nan, as in optax, unless epsilon is above 0: then y = 1 and da is
       -dy v / sqrt(epsilon). Masked entries (`where` false) count for nothing and get 0.
Dtype: computes in float32 or wider, returns the promoted dtype of both arguments.
Ref:   Salton, Wong and Yang, 1975; optax.losses.cosine_distance.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from funcbp.case import Case, booleans, values
from funcbp.core import op
from funcbp.ops._losses import check_broadcast, masked, summed_to
from funcbp.ops._numeric import wide

Axis = int | tuple[int, ...] | None


def plain(
    predictions: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    epsilon: float = 0.0,
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """1 - sum(predictions * targets) / (|predictions| |targets|) along `axis`.

    Args:
      predictions: any shape.
      targets: broadcastable to predictions.
      epsilon: the least squared norm to divide by.
      axis: the axis or axes of a vector; None for all.
      where: entries to include; broadcastable.

    Returns:
      From 0 to 2, in the shape without `axis`.
    """
    a, b = masked(where, predictions), masked(where, targets)
    u, v = (
        x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=axis, keepdims=True), epsilon)) for x in (a, b)
    )
    return 1 - jnp.sum(u * v, axis=axis)


def check(predictions, targets, epsilon, axis, where):
    """Raises if the shapes do not fit."""
    check_broadcast("predictions", predictions, "targets", targets)


def fwd(predictions, targets, *, epsilon, axis, where):
    a, b = masked(where, wide(predictions)), masked(where, wide(targets))
    na, nb = (
        jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), epsilon)) for x in (a, b)
    )
    # Units first: their products sum to 1 exactly where a and b have one entry.
    s = jnp.sum((a / na) * (b / nb), axis=axis, keepdims=True)
    y = jnp.squeeze(1 - s, axis).astype(jnp.result_type(predictions, targets))
    return y, (predictions, targets, where, na, nb, s)


def bwd(saved, dy, *, epsilon, axis):
    predictions, targets, where, na, nb, s = saved
    a, b, dy = wide(predictions), wide(targets), -wide(dy).reshape(s.shape)
    da = _cotangent(a / na, na, b / nb, s, dy, epsilon)
    db = _cotangent(b / nb, nb, a / na, s, dy, epsilon)
    return summed_to(masked(where, da), a.shape), summed_to(masked(where, db), b.shape), None


def _cotangent(u, norm, v, s, ds, epsilon):
    """ds (v - s u) / norm, the second term only where the norm depends on its vector."""
    depends = jnp.square(norm) > epsilon * (1 + 4 * jnp.finfo(norm.dtype).eps)
    if norm.shape == s.shape:
        return ds * (v - jnp.where(depends, s, 0) * u) / norm
    # A vector that was broadcast has one norm for several rows.
    along = summed_to(jnp.broadcast_to(ds * s, s.shape), norm.shape)
    du = summed_to(jnp.broadcast_to(ds * v, jnp.broadcast_shapes(u.shape, v.shape)), u.shape)
    return (du - jnp.where(depends, along, 0) * u) / norm


cosine_distance = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.losses.cosine_distance,
    cases=(
        Case("odd", (3, 5), (3, 5)),
        Case("zero vector", values([[0.0, 0.0], [3.0, 4.0]]), (2, 2), epsilon=0.01),
        Case("masked", (4, 5), (4, 5), where=booleans(4, 5, p=0.8), epsilon=1e-6),
        Case("broadcast", (3, 2, 4), (2, 4)),
        Case("empty batch", (0, 3), (0, 3)),
        Case("embeddings", (8192, 1024), (8192, 1024), bench=True),
    ),
)
