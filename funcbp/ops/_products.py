"""The gradients of what is taken out of a loop, from stacks over its steps."""

import string
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from funcbp.jaxprs import bind
from funcbp.ops._body import Cut

__all__ = ["of_constant", "of_operand", "reduced"]


def of_constant(cut: Cut, operand: Array | None, d: Array, constant: Array) -> Array:
    """The cotangent of the constant, in float32 or wider.

    Args:
      cut: a product, or a sum.
      operand: the other operand of a product, stacked.
      d: the cotangents of the results, stacked.
      constant: for its type.
    """
    dtype = jnp.promote_types(constant.dtype, jnp.float32)
    if operand is None:
        return cut.sign * reduced(jnp.sum(d, axis=0, dtype=dtype), constant)
    if cut.eqn.primitive.name == "dot_general":
        w, x, y = _letters(cut)
        return _einsum(cut, f"Z{x},Z{y}->{w}", operand, d, dtype)

    def product(constant):
        return jax.vmap(lambda x: _bound(cut, constant, x))(operand)

    return jax.linear_transpose(product, constant)(d)[0].astype(dtype)


def of_operand(cut: Cut, constant: Array, d: Array, operand: Array) -> Array:
    """The cotangents of the other operand, stacked as it is."""
    if cut.eqn.primitive.name == "dot_general":
        w, x, y = _letters(cut)
        return _einsum(cut, f"Z{y},{w}->Z{x}", d, constant, operand.dtype)

    def product(operand):
        return jax.vmap(lambda x: _bound(cut, constant, x))(operand)

    return jax.linear_transpose(product, operand)(d)[0]


def _bound(cut: Cut, constant: Array, x: Array) -> Any:
    return bind(cut.eqn, [x, constant] if cut.side else [constant, x])[0]


def _einsum(cut: Cut, spec: str, a: Array, b: Array, dtype: Any) -> Array:
    precision = cut.eqn.params["precision"]
    return jnp.einsum(spec, a, b, preferred_element_type=dtype, precision=precision)


def _letters(cut: Cut) -> tuple[str, str, str]:
    """Names of the axes of the constant, of the other operand and of the result of dot_general."""
    (contracted, batch) = cut.eqn.params["dimension_numbers"]
    letters = iter(string.ascii_letters.replace("Z", ""))
    left, right = ([next(letters) for _ in a.aval.shape] for a in cut.eqn.invars)
    for axes in (contracted, batch):
        for i, j in zip(*axes, strict=True):
            right[j] = left[i]
    shared = [left[i] for i in batch[0]]
    free = [c for side in (left, right) for c in side if (c in left) != (c in right)]
    names = ("".join(left), "".join(right))
    return names[cut.side], names[1 - cut.side], "".join(shared + free)


def reduced(d: Array, constant: Array) -> Array:
    """The cotangent of a constant that was added, from that of the sum."""
    stretched = [i for i, (n, m) in enumerate(zip(constant.shape, d.shape, strict=True)) if n != m]
    return jnp.sum(d, axis=tuple(stretched), keepdims=True)
