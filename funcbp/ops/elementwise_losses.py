"""Losses of one prediction and one target at a time: y_i = f(x_i, t_i).

    squared_error                  e^2                                 e = x - t
    huber_loss                     q (|e| - q / 2)                     q = min(|e|, delta)
    log_cosh                       log cosh e
    hinge_loss                     max(0, 1 - x t)
    sigmoid_binary_cross_entropy   c = -t log p - (1 - t) log q        p = s(x), q = s(-x)

s is the sigmoid.

Backward. dx_i = dy_i df/dx and dt_i = dy_i df/dt, with
    of the error   df/dx = 2 e,  clip(e, -delta, delta),  tanh e;      df/dt = -df/dx
    hinge          -t, or -x for t, where 1 > x t
    cross-entropy  c_x = (1 - t) p - t q,  c_t = -x

Saves: the arguments: nothing beyond the input.
Edge:  hinge_loss has half the slope where x t is 1, as JAX has for a maximum of equal numbers.
       log_cosh keeps its digits near 0. p - t is never formed, so a sure and right prediction
       keeps the digits of its slope. At an infinite logit the value is nan, as in optax.
Dtype: computes in float32 or wider. Returns the promoted dtype of both arguments;
       sigmoid_binary_cross_entropy that of the logits, to which the labels are converted first.
Ref:   Huber, 1964; optax.losses.
"""

import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Num

from funcbp.case import Case, integers, uniform, values
from funcbp.core import InputError, Op, op
from funcbp.ops._losses import pair_check, summed_to
from funcbp.ops._numeric import wide

X = Float[Array, "..."]
T = Num[Array, "..."] | Bool[Array, "..."]

BENCH = Case("batch", (4096, 1024), (4096, 1024), bench=True)
TAILS = [-1e4, -30.0, -1.5, -1.0, -1e-3, -1e-12, 0.0, 1e-20, 0.3, 0.99, 1.0, 1.01, 9.0, 88.0, 1e4]
ERRORS = (
    Case("odd", (3, 5), (3, 5)),
    Case("tails, no targets", values(TAILS), None),
    Case("whole numbers", (2, 3), integers(2, 3, high=4)),
    Case("empty", (0, 3), (0, 3)),
    BENCH,
)
BROADCAST = (Case("broadcast", (4, 1, 3), (2, 1)),)
SURE = values([-1e5, -80.0, -20.0, -3.0, -0.0, 0.0, 1e-9, 2.0, 17.0, 60.0, 1e5])
LABELS = (
    Case("soft labels", (3, 5), uniform(3, 5)),
    Case("sure, label 0", SURE, values([0])),
    Case("sure, label 1", SURE, values([1.0])),
    Case("batch", (4096, 1024), uniform(4096, 1024), bench=True),
)


def elementwise(
    plain: Callable,
    value: Callable,
    slopes: Callable,
    *,
    like: Callable,
    cases: tuple[Case, ...],
    check: Callable | None = None,
    as_first: bool = False,
) -> Op:
    """Declares y = value(x, t) with (dx, dt) = dy * slopes(x, t).

    Args:
      plain: the yardstick; its first two parameters are x and t, the others are settings.
      value: x, t -> y; settings follow by name. It may assume float32 or wider.
      slopes: x, t -> (dy/dx, dy/dt), same settings.
      like: the public function whose signature and values the op has.
      cases: its cases.
      check: raises on bad shapes; by default where they do not broadcast.
      as_first: t is rounded to the dtype of x first, and y has that dtype.
    """
    first, second, *_ = inspect.signature(plain).parameters

    def widened(x, t):
        if t is None:
            return wide(x), None
        return wide(x), wide(t.astype(x.dtype) if as_first else t)

    def fwd(**arguments):
        x, t = arguments.pop(first), arguments.pop(second)
        dtype = x.dtype if as_first or t is None else jnp.result_type(x, t)
        return value(*widened(x, t), **arguments).astype(dtype), (x, t)

    def bwd(saved, dy, **static):
        x, t = saved
        dx, dt = slopes(*widened(x, t), **static)
        dx = summed_to(wide(dy) * dx, x.shape)
        return dx, None if t is None else summed_to(wide(dy) * dt, t.shape)

    return op(plain, fwd, bwd, like=like, check=check or pair_check(first, second), cases=cases)


def of_error(plain: Callable, value: Callable, slope: Callable, **declaration) -> Op:
    """Declares a loss of e = x - t alone (or of x, if t is None) with dx = dy * slope(e)."""

    def error(x, t):
        return x if t is None else x - t

    def value_of_both(x, t, **static):
        return value(error(x, t), **static)

    def slopes(x, t, **static):
        d = slope(error(x, t), **static)
        return d, -d

    return elementwise(plain, value_of_both, slopes, **declaration)


# --- squared_error: y = e^2,  y' = 2 e


def _squared_error(predictions: X, targets: T | None = None) -> X:
    """(predictions - targets)^2, elementwise; the mean squared error is its mean.

    Args:
      predictions: any shape.
      targets: the same shape; None for zeros.

    Returns:
      The shape of predictions.

    Raises:
      InputError: the shapes differ.
    """
    e = predictions if targets is None else predictions - targets
    return e**2


def _check_same_shape(predictions, targets):
    if targets is not None and predictions.shape != targets.shape:
        raise InputError(
            f"targets must have the shape of predictions {predictions.shape}, got {targets.shape}; "
            "nothing is broadcast here, as a column against a row would be a table"
        )


def _double(e):
    return 2 * e


squared_error = of_error(
    _squared_error,
    jnp.square,
    _double,
    like=optax.losses.squared_error,
    check=_check_same_shape,
    cases=ERRORS,
)


# --- huber_loss: y = q (|e| - q / 2), q = min(|e|, delta),  y' = clip(e, -delta, delta)


def _huber_loss(predictions: X, targets: T | None = None, *, delta: float = 1.0) -> X:
    """e^2 / 2 up to |e| = delta, a straight line beyond; e = predictions - targets.

    Args:
      predictions: any shape.
      targets: broadcastable to predictions; None for zeros.
      delta: where the line begins, in the unit of the predictions.

    Returns:
      The shape of predictions.
    """
    a = jnp.abs(predictions if targets is None else predictions - targets)
    quadratic = jnp.minimum(a, delta)
    return 0.5 * quadratic**2 + delta * (a - quadratic)


def _huber(e, *, delta):
    a = jnp.abs(e)
    q = jnp.minimum(a, delta)
    return q * (a - 0.5 * q)


def _huber_slope(e, *, delta):
    return jnp.clip(e, -delta, delta)


huber_loss = of_error(
    _huber_loss,
    _huber,
    _huber_slope,
    like=optax.losses.huber_loss,
    cases=(*ERRORS, Case("broadcast", (4, 1, 3), (2, 1), delta=0.3)),
)


# --- log_cosh: y' = tanh e


def _log_cosh(predictions: X, targets: T | None = None) -> X:
    """log(cosh(predictions - targets)): near e^2 / 2 for small errors, |e| - log 2 for large ones.

    Args:
      predictions: any shape.
      targets: broadcastable to predictions; None for zeros.

    Returns:
      The shape of predictions.
    """
    e = predictions if targets is None else predictions - targets
    # cosh e = 1 + 2 sinh^2(e / 2) keeps the digits that log(e^e + e^-e) - log 2 loses near 0.
    near, a = jnp.abs(e) < 1, jnp.abs(e)
    small = jnp.log1p(2 * jnp.sinh(0.5 * jnp.where(near, e, 0)) ** 2)
    return jnp.where(near, small, a + jnp.log1p(jnp.exp(-2 * a)) - math.log(2))


def _log_cosh_value(e):
    # cosh^-2 = 1 - tanh^2, near 0; e^-a cosh a = (1 + e^-2a) / 2 beyond. One logarithm for both.
    a = jnp.abs(e)
    near = a < 1
    inner = jnp.log1p(jnp.where(near, -jnp.square(jnp.tanh(e)), jnp.exp(-2 * a)))
    return jnp.where(near, -0.5 * inner, inner + (a - math.log(2)))


log_cosh = of_error(
    _log_cosh,
    _log_cosh_value,
    jnp.tanh,
    like=optax.losses.log_cosh,
    cases=(*ERRORS[:2], *BROADCAST, BENCH),
)


# --- hinge_loss: y = max(0, 1 - x t)


def _hinge_loss(predictor_outputs: X, targets: T) -> X:
    """max(0, 1 - predictor_outputs * targets).

    Args:
      predictor_outputs: the decision function's values, any shape.
      targets: -1 or 1, broadcastable.

    Returns:
      The broadcast shape.
    """
    return jnp.maximum(0, 1 - predictor_outputs * targets)


def _hinge(x, t):
    return jnp.maximum(1 - x * t, 0)


def _hinge_slopes(x, t):
    # Through the value, not z alone: a sum of losses would else have XLA on CPU write out z.
    z, y = 1 - x * t, _hinge(x, t)
    share = jnp.where(y > 0, 1.0, jnp.where(z == y, 0.5, 0.0)).astype(z.dtype)
    return -t * share, -x * share


hinge_loss = elementwise(
    _hinge_loss,
    _hinge,
    _hinge_slopes,
    like=optax.losses.hinge_loss,
    cases=(
        Case("odd", (3, 5), (3, 5)),
        Case("kink", values([-1.0, 0.0, 1.0, 1.0, 1.5]), values([1, 1, 1, -1, 1])),
        *BROADCAST,
        BENCH,
    ),
)


# --- sigmoid_binary_cross_entropy


def _sigmoid_binary_cross_entropy(logits: X, labels: T) -> X:
    """-labels log s(logits) - (1 - labels) log(1 - s(logits)), s the sigmoid, elementwise.

    Args:
      logits: any shape.
      labels: 0 or 1, or a probability; broadcastable.

    Returns:
      The loss in nats, in the broadcast shape and the dtype of logits.
    """
    labels = labels.astype(logits.dtype)
    return -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)


def _cross_entropy(x, t):
    rest = jnp.log1p(jnp.exp(-_magnitude(x)))
    return rest + t * jnp.where(x < 0, -x, 0) + (1 - t) * jnp.where(x < 0, 0, x)


def _magnitude(x):
    """|x| with derivative 1 at 0: the pieces around it then differentiate to one whole there."""
    return jnp.where(x < 0, -x, x)


def _cross_entropy_slope(x, t):
    e = jnp.exp(-jnp.abs(x))
    return ((1 - t) * jnp.where(x < 0, e, 1) - t * jnp.where(x < 0, 1, e)) / (1 + e)


def _cross_entropy_slopes(x, t):
    return _cross_entropy_slope(x, t), -x


sigmoid_binary_cross_entropy = elementwise(
    _sigmoid_binary_cross_entropy,
    _cross_entropy,
    _cross_entropy_slopes,
    like=optax.losses.sigmoid_binary_cross_entropy,
    cases=(*LABELS, *BROADCAST),
    as_first=True,
)
