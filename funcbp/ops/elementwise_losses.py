"""Losses of one prediction and one target at a time: y_i = f(x_i, t_i).

    squared_error                  e^2                                 e = x - t
    huber_loss                     q (|e| - q / 2)                     q = min(|e|, delta)
    log_cosh                       log cosh e
    hinge_loss                     max(0, 1 - x t)
    sigmoid_binary_cross_entropy   c = -t log p - (1 - t) log q        p = s(x), q = s(-x)
    sigmoid_focal_loss             a r^gamma c                         r = (1 - t) p + t q

s is the sigmoid, r the probability of being wrong, a = alpha t + (1 - alpha) (1 - t).

Backward. dx_i = dy_i df/dx and dt_i = dy_i df/dt, with
    of the error   df/dx = 2 e,  clip(e, -delta, delta),  tanh e;      df/dt = -df/dx
    hinge          -t, or -x for t, where 1 > x t
    cross-entropy  c_x = (1 - t) p - t q,  c_t = -x
    focal          a r^gamma (gamma c (1 - 2 t) p q / r + c_x)
                   r^gamma ((2 alpha - 1) c + a (gamma c (q - p) / r - x))   for t

Saves: the arguments: nothing beyond the input.
Edge:  hinge_loss has half the slope where x t is 1, as JAX has for a maximum of equal numbers.
       log_cosh keeps its digits near 0. p - t is never formed, so a sure and right prediction
       keeps the digits of its slope. At an infinite logit the value is nan, as in optax.
Dtype: computes in float32 or wider. Returns the promoted dtype of both arguments; the two of a
       sigmoid return that of the logits, to which the labels are converted first.
Ref:   Huber, 1964; Lin et al., 2017, equation 5, with soft labels as in optax.losses.
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
      slopes: x, t -> (dy/dx, dy/dt), same settings; None for dy/dt where it is -dy/dx.
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
        dx = wide(dy) * dx
        # -dx again where that is what it is: XLA takes a negative faster than a product of three.
        dt = -dx if dt is None else wide(dy) * dt
        return summed_to(dx, x.shape), None if t is None else summed_to(dt, t.shape)

    return op(plain, fwd, bwd, like=like, check=check or pair_check(first, second), cases=cases)


def of_error(plain: Callable, value: Callable, slope: Callable, **declaration) -> Op:
    """Declares a loss of e = x - t alone (or of x, if t is None) with dx = dy * slope(e)."""

    def error(x, t):
        return x if t is None else x - t

    def value_of_both(x, t, **static):
        return value(error(x, t), **static)

    def slopes(x, t, **static):
        return slope(error(x, t), **static), None

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


# --- sigmoid_focal_loss: with e = e^-|x| and b the label's share on the likely side,
#     r = (b + (1 - b) e) / (1 + e)


def _sigmoid_focal_loss(
    logits: X, labels: T, *, alpha: float | None = None, gamma: float = 2.0
) -> X:
    """The cross-entropy times r^gamma, r the probability of the wrong class.

    Args:
      logits: any shape.
      labels: 0 or 1, or a probability; broadcastable.
      alpha: weight of label 1, with 1 - alpha that of label 0; None for no weights.
      gamma: the exponent: the higher, the less the easy examples count.

    Returns:
      The loss, in the broadcast shape and the dtype of logits.
    """
    labels = labels.astype(logits.dtype)
    loss = _sigmoid_binary_cross_entropy(logits, labels)
    loss *= jnp.exp(gamma * _log_wrong(logits, labels))
    return loss if alpha is None else loss * (alpha * labels + (1 - alpha) * (1 - labels))


def _log_wrong(x, t):
    """log r, which at a hard label is finite where r underflows."""
    a = _magnitude(x)
    b = jnp.where(x < 0, t, 1 - t)
    # b + (1 - b) e = e (1 + b (e^a - 1)): the form that has a derivative in b at b = 0.
    grown = jnp.expm1(jnp.minimum(a, _limit(x)))
    sure = jnp.log1p(jnp.where(b == 0, b, 0) * grown) - a
    unsure = jnp.log(jnp.where(b == 0, 1, b + (1 - b) * jnp.exp(-a)))
    return jnp.where(b == 0, sure, unsure) - jnp.log1p(jnp.exp(-a))


def _limit(x):
    """The exponent up to which exp is finite, and a little less."""
    return math.log(float(jnp.finfo(x.dtype).max)) - 1


def _weight(t, alpha):
    return 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)


def _focal(x, t, *, alpha, gamma):
    return _weight(t, alpha) * jnp.exp(gamma * _log_wrong(x, t)) * _cross_entropy(x, t)


def _focal_slopes(x, t, *, alpha, gamma):
    a = jnp.abs(x)
    e = jnp.exp(-a)
    b = jnp.where(x < 0, t, 1 - t)
    below, log_r = jnp.where(b == 0, 1, b + (1 - b) * e), _log_wrong(x, t)
    power, c, weight = jnp.exp(gamma * log_r), _cross_entropy(x, t), _weight(t, alpha)
    # p q / r = e / ((1 + e) (b + (1 - b) e)), where e cancels at b = 0.
    pq_by_r = jnp.where(b == 0, 1, e) / (below * (1 + e))
    dx = weight * power * (gamma * c * (1 - 2 * t) * pq_by_r + _cross_entropy_slope(x, t))
    # r^gamma / r in one exponential: at b = 0 1 / r alone overflows.
    exponent = gamma * log_r + jnp.where(b == 0, a, 0)
    power_by_r = jnp.exp(jnp.minimum(exponent, _limit(x))) / below
    to_unlikely = jnp.where(x < 0, 1 - e, e - 1)
    dt = weight * (gamma * c * to_unlikely * power_by_r - power * x)
    return dx, dt if alpha is None else dt + (2 * alpha - 1) * power * c


sigmoid_focal_loss = elementwise(
    _sigmoid_focal_loss,
    _focal,
    _focal_slopes,
    like=optax.losses.sigmoid_focal_loss,
    cases=(
        *LABELS,
        Case("weighted", (4, 1, 3), uniform(2, 1), alpha=0.25, gamma=1.5),
    ),
    as_first=True,
)
