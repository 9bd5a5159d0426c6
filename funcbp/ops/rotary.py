"""Rotary position embedding: each pair of features turned by an angle that grows with position.

    a, b = the halves of x's last axis, of n features each; at position p
    y = [a_i cos t_i - b_i sin t_i,  b_i cos t_i + a_i sin t_i]        t_i = p base^(-i/n)

Backward. A rotation's transpose is the rotation back, by -t:
    da_i = u_i cos t_i + v_i sin t_i        db_i = v_i cos t_i - u_i sin t_i        [u, v] = dy

In float32 an angle of 10,000 is rounded to 5e-4. So angles are counted in turns times 2^32, as
integers: whole turns overflow and drop out, and what is left is off by at most position 7e-10.

Saves: the positions, nothing of x's size.
Edge:  position 0 gives y = x; a negative position turns back; no features give no features.
Dtype: computes in float32 or wider, returns x's dtype.
Ref:   Su et al., 2021, equation 34, with the halves of GPT-NeoX for its neighbours.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide


def plain(
    x: Float[Array, "*batch t heads d"],
    positions: Int[Array, "*batch_or_less t"],
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch t heads d"]:
    """x turned by its positions, before queries meet keys.

    Args:
      x: queries or keys, [..., t, heads, d], d even.
      positions: [..., t] integers, in tokens; its leading axes broadcast to those of x.
      base: the last pair of features turns once in nearly 2 pi base tokens.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: d is odd, or positions do not fit.
    """
    angle = positions[..., None, None] * _frequencies(x, base).astype(wide(x).dtype)
    return _turned(x, jnp.cos(angle), jnp.sin(angle))


def _frequencies(x, base):
    """[d / 2], in float64: what one position adds to each angle."""
    n = x.shape[-1] // 2
    return np.power(float(base), -np.arange(n) / max(n, 1))


def _turned(x, cos, sin):
    a, b = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def check(x, positions, *, base):
    """Raises if the number of features is odd, or positions do not fit."""
    if x.ndim < 3 or x.shape[-1] % 2:
        raise InputError(
            f"x must have shape [..., time, heads, features] with an even number of features, got "
            f"{x.shape}; leave out an odd one, and concatenate it afterwards"
        )
    shape = positions.shape
    fits = 1 <= len(shape) <= x.ndim - 2 and all(
        n in (1, m) for n, m in zip(shape[::-1], x.shape[-3::-1], strict=False)
    )
    if not fits or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(
            f"positions must be integers that broadcast to {x.shape[:-2]}, the axes of x before "
            f"heads and features, got {positions.dtype} {shape}"
        )


def _rotation(x, positions, base):
    """(cos t, sin t), both [..., t, 1, d / 2]."""
    frequencies = _frequencies(x, base)
    p = positions[..., None, None]
    angle = p * frequencies.astype(wide(x).dtype)
    if angle.dtype == jnp.float32:
        turn = 2**32 / (2 * np.pi)
        parts = p.astype(jnp.uint32) * np.round(frequencies * turn).astype(np.uint32)
        left = lax.bitcast_convert_type(parts, jnp.int32).astype(jnp.float32)
        # A small angle is more exact as it is.
        angle = jnp.where(jnp.abs(angle) < 2**-6, angle, left * np.float32(1 / turn))
    # XLA on CPU would take them again for every head, but not past the end of a branch.
    return lax.platform_dependent(angle, cpu=_apart, default=_cos_sin)


def _cos_sin(angle):
    return jnp.cos(angle), jnp.sin(angle)


def _apart(angle):
    zero = 0 * angle
    return lax.cond(jnp.any(angle != 0), _cos_sin, lambda _: (zero + 1, zero), angle)


def fwd(x, positions, *, base):
    return _turned(x, *_rotation(x, positions, base)), positions


def bwd(positions, dy, *, base):
    cos, sin = _rotation(dy, positions, base)
    return _turned(dy, cos, -sin), None


rotary = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="rotary",
    cases=(
        Case("odd", (2, 3, 3, 6), values([4, 0, -7])),
        Case("positions of each sequence", (2, 3, 1, 4), integers(2, 3, high=50), base=100.0),
        Case("no time", (0, 2, 4), integers(0, high=2), transformed=False),
        Case("queries", (4, 1024, 8, 64), integers(4, 1024, high=4096), bench=True),
    ),
)
