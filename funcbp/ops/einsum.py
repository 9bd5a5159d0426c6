"""Sum of products of two arrays, by the names of their axes.

    y_out = sum a_p b_q        over all names of p and q that are not in out

Backward. y is linear in a and in b, and each derivative is again such a sum:
    da_p = sum dy_out b_q      over the names that are not in p, and the same for db

A name that only a has and that is summed over gets the same cotangent all along its axis.

Saves: a and b, arguments: as autodiff does, and in the same number of products: no gain but that
       products accumulate in float32 where the arguments are narrower.
Edge:  sums over an axis of length 0 are 0.
Dtype: accumulates in float32 or wider, returns the promoted dtype of a and b.
Ref:   Einstein, 1916, section 5.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.case import Case
from funcbp.core import InputError, op
from funcbp.ops._numeric import contracted

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plain(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """jnp.einsum(subscripts, a, b).

    Args:
      subscripts: such as "bik,bkj->bij"; without an arrow, the names that occur once, sorted.
        "..." stands for the same axes, of the same lengths, in every part that has it.
      a: first operand.
      b: second operand.

    Returns:
      An array with the axes after the arrow, in the promoted dtype of a and b.

    Raises:
      InputError: subscripts are not of two operands, repeat a name within one, or do not fit.
    """
    return jnp.einsum(subscripts, a, b)


def check(subscripts, a, b):
    """Raises if the subscripts cannot be read or do not fit the shapes."""
    p, q, out = _parsed(subscripts, a.ndim, b.ndim)
    sizes: dict[str, int] = {}
    for names, x in ((p, a), (q, b)):
        for name, n in zip(names, x.shape, strict=True):
            if sizes.setdefault(name, n) != n:
                raise InputError(
                    f"axes of one name must have one length, and in {subscripts!r} {name!r} has "
                    f"{sizes[name]} and {n}; broadcast the operands first"
                )
    if set(out) - set(p + q) or len(set(out)) < len(out):
        raise InputError(
            f"the result's names must each occur once and in an operand, got {subscripts!r}"
        )


def _parsed(subscripts: str, *ndims: int) -> tuple[str, str, str]:
    """The names of the axes of a, of b and of the result."""
    left, arrow, out = subscripts.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != 2:
        raise InputError(
            f"subscripts must name two operands, as in 'ij,jk->ik', got {subscripts!r}; call "
            "einsum twice for three"
        )
    free = [c for c in LETTERS if c not in subscripts]
    hidden = max(
        [n - len(p.replace("...", "")) for p, n in zip(operands, ndims, strict=True) if "..." in p],
        default=0,
    )
    dots = "".join(free[: max(hidden, 0)])
    if not arrow:
        named = left.replace("...", "").replace(",", "")
        out = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(named) if named.count(c) == 1)
        )
    p, q, out = (part.replace("...", dots) for part in (*operands, out))
    for names, n in zip((p, q), ndims, strict=True):
        if len(names) != n or len(set(names)) < n or not set(names) <= set(LETTERS):
            raise InputError(
                f"subscripts must give each axis of an operand a letter of its own, and "
                f"{subscripts!r} does not for operands of {ndims[0]} and {ndims[1]} axes; take a "
                "diagonal with jnp.diagonal first"
            )
    return p, q, out


def fwd(subscripts, a, b):
    p, q, out = _parsed(subscripts, a.ndim, b.ndim)
    y = contracted(f"{p},{q}->{out}", a, b)
    return y.astype(jnp.result_type(a, b)), (a, b)


def bwd(saved, dy, *, subscripts):
    a, b = saved
    p, q, out = _parsed(subscripts, a.ndim, b.ndim)
    return _cotangent(a, p, b, q, dy, out), _cotangent(b, q, a, p, dy, out)


def _cotangent(x, names, other, others, dy, out):
    there = "".join(c for c in names if c in out + others)
    d = contracted(f"{out},{others}->{there}", dy, other)
    alone = [i for i, c in enumerate(names) if c not in there]
    return jnp.broadcast_to(jnp.expand_dims(d, alone), x.shape)


einsum = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("matrices", "ij,jk->ik", (3, 5), (5, 2)),
        Case("heads", "bthd,bshd->bhts", (2, 3, 2, 4), (2, 5, 2, 4)),
        Case("dots, implicit", "...ij,...j", (2, 3, 4, 5), (2, 3, 5)),
        Case("summed alone", "ij,k->ki", (3, 4), (2,)),
        Case("outer", "i,j->ji", (3,), (4,)),
        # XLA cannot compile it inside shard_map (JAX 0.10.2).
        Case("empty", "ij,jk->ik", (3, 0), (0, 2), transformed=False),
        Case("scores", "bthd,bshd->bhts", (8, 512, 8, 64), (8, 512, 8, 64), bench=True),
    ),
)
