"""The largest element over all spatial axes.

    y_c = max_i x_ic        i one of the places

Backward. All of dy goes to the largest element, at a_c:
    dx_ic = dy_c [i = a_c]

Saves: a, four bytes for each feature of each example; x is free to go.
Edge:  of equal elements the first in row-major order gets all of dy, as in `max_pool` (the
       gradient of `jnp.max` shares it). A nan gives nan, and the first nan gets dy. An empty batch
       gives an empty dx; an axis without places is refused.
Dtype: exact; returns x's dtype.
Ref:   Oquab et al., 2015, section 3.2.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from funcbp.case import Case, values
from funcbp.core import op
from funcbp.ops._windows import check_places, shape_only

TIES = values([[[[0.0, 2.0], [1.0, 2.0]], [[1.0, -1.0], [1.0, 2.0]]]])


def plain(
    x: Float[Array, "batch *spatial c"], *, keepdims: bool = False
) -> Float[Array, "batch *ones c"]:
    """The maximum of each feature over the axes between the first and the last.

    Args:
      x: [batch, *spatial, features].
      keepdims: keep each spatial axis, with size 1.

    Returns:
      [batch, features], or [batch, 1, ..., features], in the dtype of x.

    Raises:
      InputError: x has no spatial axis, or one of size 0.
    """
    places = _places(x)
    y = jnp.take_along_axis(places, jnp.argmax(places, axis=1, keepdims=True), axis=1)
    return _shaped(y, x.shape, keepdims)


def check(x, *, keepdims):
    """Raises if there is nothing to take the maximum of."""
    check_places(x)


def _places(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _shaped(y, shape, keepdims):
    ones = (1,) * (len(shape) - 2) if keepdims else ()
    return y.reshape(shape[0], *ones, shape[-1])


@jax.custom_jvp
def _largest(places):
    return jnp.max(places, axis=1, keepdims=True)


@_largest.defjvp
def _largest_jvp(primals, tangents):
    # That of jnp.max would share a tie.
    (places,), (tangent,) = primals, tangents
    return _largest(places), jnp.take_along_axis(tangent, _first(places), axis=1)


def _first(places):
    """Where the maximum is: [batch, 1, c]. Two plain reductions, which a CPU does in vectors."""
    hit = (places == jnp.max(places, axis=1, keepdims=True)) | (places != places)
    place = lax.broadcasted_iota(jnp.int32, places.shape, 1)
    return jnp.min(jnp.where(hit, place, places.shape[1]), axis=1, keepdims=True)


def fwd(x, *, keepdims):
    places = _places(x)
    return _shaped(_largest(places), x.shape, keepdims), (_first(places), shape_only(x))


def bwd(saved, dy, *, keepdims):
    a, like = saved
    batch, *spatial, c = like.shape[1:]
    place = lax.broadcasted_iota(jnp.int32, (batch, math.prod(spatial), c), 1)
    dx = jnp.where(place == a, dy.reshape(batch, 1, c), 0)
    return (dx.reshape(like.shape[1:]),)


global_max_pool = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("2-D", (2, 4, 6, 3)),
        Case("ties", TIES),
        Case("1-D, axes kept", (2, 5, 1), keepdims=True),
        Case("3-D, one place", (3, 1, 1, 1, 2)),
        Case("empty batch", (0, 3, 2, 2)),
        Case("head", (64, 8, 8, 2048), bench=True),
    ),
)
