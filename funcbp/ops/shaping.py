"""Gradient shaping: the value of one function with the gradient of another, on purpose.

    straight_through_round, straight_through_sign: y = round(x), sign(x)     dx = dy
    scale_gradient:    y = x     dx = scale dy
    reverse_gradient:  y = x     dx = -scale dy
    clip_gradient:     y = x     dx = min(max(dy, -limit), limit)
    stop_gradient:     y = x     dx = 0

None of these is a derivative: the auditor calls them surrogates, since they say so.

Saves: nothing.
Edge:  straight_through_sign is 0 at 0.
Dtype: x's.
Ref:   Bengio et al., 2013, section 4 (straight through); Ganin et al., 2016, section 3.1
       (reversal).
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import Op, op

X = Float[Array, "..."]
VALUES = values([-7.5, -2.5, -1.0, -0.5, -0.0, 0.0, 0.4, 1.5, 2.0, 1e5])
CASES = (
    Case("odd", (3, 5)),
    Case("halves and borders", VALUES, transformed=False),
    Case("empty", (0, 3), transformed=False),
    Case("activations", (2048, 4096), bench=True),
)


def _meant(value: Array, x: Array, factor: float = 1.0) -> Array:
    """`value` exactly, with `factor` as its derivative by x."""
    change = jnp.where(jnp.isfinite(x), x - jax.lax.stop_gradient(x), 0)  # 0, whose slope is 1
    return jax.lax.stop_gradient(value) + factor * change


def _shaped(plain, value, pulled, **settings) -> Op:
    """An op with the value of `value` and the pullback `pulled(dy, **settings)`.

    Args:
      plain: differentiable JAX with that value and that gradient. It is also what runs forward,
        for second derivatives go through the value.
      value: the function whose derivative the gradient is not.
      pulled: (dy, settings) -> dx.
      **settings: of its cases.
    """

    def fwd(x, **static):
        return plain(x, **static), None

    def bwd(_, dy, **static):
        return (pulled(dy, **static),)

    cases = [
        Case(c.name, *c.args, bench=c.bench, transformed=c.transformed, **settings) for c in CASES
    ]
    return op(plain, fwd, bwd, surrogate_of=value, cases=cases, name=plain.__name__.strip("_"))


def _passed(dy):
    return dy


def _round(x):
    return jnp.round(x)


def _straight_through_round(x: X) -> X:
    """x rounded to the nearest integer, halves to even; the gradient passes as it is."""
    return _meant(jnp.round(x), x)


straight_through_round = _shaped(_straight_through_round, _round, _passed)


def _sign(x):
    return jnp.sign(x)


def _straight_through_sign(x: X) -> X:
    """-1, 0 or 1 as x is; the gradient passes as it is."""
    return _meant(jnp.sign(x), x)


straight_through_sign = _shaped(_straight_through_sign, _sign, _passed)


def _same(x, **_):
    return x


def _scale_gradient(x: X, *, scale: float) -> X:
    """x; its gradient is multiplied by `scale`."""
    return _meant(x, x, scale)


def _scaled(dy, scale):
    return dy * scale


scale_gradient = _shaped(_scale_gradient, _same, _scaled, scale=0.3)


def _reverse_gradient(x: X, *, scale: float = 1.0) -> X:
    """x; its gradient is multiplied by -scale."""
    return _meant(x, x, -scale)


def _reversed(dy, scale):
    return -scale * dy


reverse_gradient = _shaped(_reverse_gradient, _same, _reversed, scale=0.7)


def _stop_gradient(x: X) -> X:
    """x, a constant for the backward pass."""
    return jax.lax.stop_gradient(x)


def _none(dy):
    return jnp.zeros_like(dy)


stop_gradient = _shaped(_stop_gradient, _same, _none)


# --- clip_gradient: what no derivative can give, as it is not linear in dy: so its yardstick is a
#     primitive, the identity, whose transpose clips.

_clipped = Primitive("clipped")
_clipped.def_impl(lambda x, **_: x)
_clipped.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_clipped, lambda context, x, **_: [x])
ad.deflinear2(_clipped, lambda dy, _, *, limit: [jnp.clip(dy, -limit, limit)])
batching.defvectorized(_clipped)


def _clip_gradient(x: X, *, limit: float) -> X:
    """x; each element of its gradient is clipped to [-limit, limit]."""
    return _clipped.bind(x, limit=limit)


def _clip(dy, limit):
    return jnp.clip(dy, -limit, limit)


clip_gradient = _shaped(_clip_gradient, _same, _clip, limit=0.6)
