"""Kullback-Leibler divergence of predicted log-probabilities from target probabilities.

    y = sum_i t_i (log t_i - l_i)

Backward.
    dl_i = -dy t_i        dt_i = dy (log t_i + 1 - l_i)

Saves: the arguments: nothing beyond the input.
Edge:  a target of 0 adds 0 (nan where l is infinite, as in optax); the slope of t log t there,
       -inf, is left out: dt = -dy l. Masked entries (`where` false) add nothing and get 0.
Dtype: computes in float32 or wider, returns the promoted dtype of both arguments.
Ref:   Kullback and Leibler, 1951, equation 2.4.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from funcbp.case import Case, booleans, uniform, values
from funcbp.core import op
from funcbp.ops._losses import check_broadcast, masked, summed_to
from funcbp.ops._numeric import wide

Axis = int | tuple[int, ...] | None


def plain(
    log_predictions: Float[Array, "..."],
    targets: Float[Array, "..."],
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """sum(targets * (log(targets) - log_predictions)) along `axis`.

    Args:
      log_predictions: logarithms of predicted probabilities, any shape.
      targets: probabilities, 0 or more; broadcastable.
      axis: the axis or axes of the classes; None for all.
      where: entries to include; broadcastable.

    Returns:
      The divergence in nats, in the shape without `axis`.
    """
    terms = targets * (_log(targets, where) - masked(where, log_predictions))
    return jnp.sum(masked(where, terms), axis=axis)


def _log(t, where):
    """log t, and 0 where t is 0 or masked: there its derivative must not be nan."""
    return jnp.log(jnp.where(masked(where, t, 0) == 0, 1, t))


def check(log_predictions, targets, axis, where):
    """Raises if the shapes do not fit."""
    check_broadcast("log_predictions", log_predictions, "targets", targets)


def fwd(log_predictions, targets, axis, where):
    t = wide(targets)
    terms = t * (_log(t, where) - masked(where, wide(log_predictions)))
    y = jnp.sum(masked(where, terms), axis=axis)
    dtype = jnp.result_type(log_predictions, targets)
    return y.astype(dtype), (log_predictions, targets, where)


def bwd(saved, dy, *, axis):
    log_predictions, targets, where = saved
    t, log_p = wide(targets), wide(log_predictions)
    shape = jnp.broadcast_shapes(t.shape, log_p.shape)
    dy = kept(wide(dy), axis, shape)
    dlog_p = masked(where, -dy * t)
    dt = masked(where, dy * (_log(t, where) + (t != 0) - log_p))
    dlog_p, dt = jnp.broadcast_to(dlog_p, shape), jnp.broadcast_to(dt, shape)
    return summed_to(dlog_p, log_p.shape), summed_to(dt, t.shape), None


def kept(dy: Array, axis: Axis, shape: tuple[int, ...]) -> Array:
    """dy, the cotangent of a reduction of this shape, with its axes back at length 1."""
    return dy.reshape((1,) * len(shape)) if axis is None else jnp.expand_dims(dy, axis)


kl_divergence = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=optax.losses.kl_divergence,
    cases=(
        Case("odd", (3, 5), uniform(3, 5)),
        Case("zeros", (2, 3), values([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])),
        Case("masked", (4, 3), uniform(4, 3), where=booleans(4, 3)),
        Case("two axes, broadcast", (3, 2, 4), uniform(2, 4), axis=(0, -1)),
        Case("empty batch", (0, 3), (0, 3)),
        Case("vocabulary", (2048, 4096), uniform(2048, 4096), bench=True),
    ),
)
