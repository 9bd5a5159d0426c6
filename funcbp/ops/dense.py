"""The fully connected layer, with its activation.

    z_bj = sum_i x_bi w_ij + b_j        h_bj = a(z_bj)

Backward. The activation is pointwise, so dz = dh * a'(z); the rest is `linear`'s with dz for dy:
    dx_bi = sum_j dz_bj w_ij        dw_ij = sum_b x_bi dz_bj        db_j = sum_b dz_bj

Saves: x and w, which are arguments, and z once, in the output's dtype; for relu h instead of z,
       which the next layer keeps anyway; for identity neither.
Edge:  as `linear` and the activation.
Dtype: z is accumulated, and the activation taken, in float32 or wider.
Ref:   Rumelhart, Hinton and Williams, 1986, equations 1 to 6.
"""

from jaxtyping import Array, Float

from funcbp.case import Case, normal
from funcbp.core import InputError, op
from funcbp.ops._numeric import wide
from funcbp.ops.linear import affine, pullback
from funcbp.ops.linear import check as check_linear
from funcbp.ops.linear import plain as plain_linear
from funcbp.ops.pointwise import FORMULAS


def plain(
    x: Float[Array, "*batch n"],
    w: Float[Array, "n m"],
    b: Float[Array, " m"] | None = None,
    *,
    activation: str | None = "relu",
) -> Float[Array, "*batch m"]:
    """activation(x @ w + b).

    Args:
      x: input, [..., n].
      w: weights, [n, m].
      b: bias, [m], or None for none.
      activation: the name of a pointwise op (with its default settings), or None for identity.

    Returns:
      [..., m], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or there is no such activation.
    """
    z = plain_linear(x, w, b)
    return z if activation is None else FORMULAS[activation].plain(z)


def check(x, w, b=None, *, activation):
    """Raises if the shapes do not fit or the activation is unknown."""
    check_linear(x, w, b)
    if activation is not None and activation not in FORMULAS:
        raise InputError(
            f"activation must be None or one of {', '.join(sorted(FORMULAS))}; "
            f"got {activation!r}; put another function in a layer of its own"
        )


def fwd(x, w, b=None, *, activation):
    z, dtype = affine(x, w, b)
    if activation is None:
        return z.astype(dtype), (x, w, b, None)
    h = FORMULAS[activation].value(z).astype(dtype)
    # relu'(z) depends on the sign alone, which h has as well.
    return h, (x, w, b, h if activation == "relu" else z.astype(dtype))


def bwd(saved, dh, *, activation):
    x, w, b, z = saved
    dz = dh if z is None else (wide(dh) * FORMULAS[activation].slope(wide(z))).astype(dh.dtype)
    return pullback(x, w, b, dz)


dense = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("relu", (5, 3), (3, 7), (7,)),
        Case("sigmoid, saturated", normal(5, 3, std=8.0), (3, 7), (7,), activation="sigmoid"),
        Case("tanh, two batch axes", (2, 3, 5), (5, 1), None, activation="tanh"),
        Case("gelu, vector", (4,), (4, 4), (4,), activation="gelu"),
        Case("identity, empty batch", (0, 3), (3, 2), (2,), activation=None),
        Case("mlp", (1024, 1024), (1024, 1024), (1024,), activation="gelu", bench=True),
    ),
)
