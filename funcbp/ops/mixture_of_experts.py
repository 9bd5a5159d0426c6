"""Each token through the few experts that it is routed to, and their outputs by weight.

    y_t = sum_j p_tj a_tj W_g        a_tj = f(h_tj)        h_tj = x_t V_g        g = id_tj

Backward. With u_tj = W_g dy_t, and sums over the pairs (t, j) of expert g:
    dp_tj = a_tj . u_tj            dh_tj = p_tj u_tj f'(h_tj)        dx_t = sum_j V_g dh_tj
    dV_g = sum x_t dh_tj           dW_g = sum a_tj p_tj dy_t

Pairs are sorted by expert and taken a block at a time, no block across two experts: its tokens
are gathered, go through both matrices, and are added to y. Nothing of pairs x width is written
out; the backward pass takes h again in the same loop, one product of its five.

Saves: the arguments, the order of the pairs and their number for each expert.
Edge:  a pair whose id names no expert (negative or too large) adds 0, and gets dp = 0: so a token
       over capacity is dropped. An expert without tokens gets 0.
Dtype: products accumulate in float32 or wider; a is rounded to the promoted dtype of the arguments,
       which the result has too.
Ref:   Shazeer et al., 2017, equation 1; Gale et al., 2022 (MegaBlocks), section 5.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import loop_zeros, rows, wide
from funcbp.ops.linear import product
from funcbp.ops.pointwise import FORMULAS
from funcbp.ops.ragged_dot import block, over_blocks


def plain(
    x: Float[Array, "*batch d"],
    expert_weights: Float[Array, "*batch k"],
    expert_ids: Int[Array, "*batch k"],
    w_in: Float[Array, "e d h"],
    w_out: Float[Array, "e h m"],
    *,
    activation: str = "gelu",
) -> Float[Array, "*batch m"]:
    """The sum of activation(x @ w_in) @ w_out over the experts of each token, by their weights.

    Args:
      x: tokens, [..., d].
      expert_weights: [..., k], what each chosen expert counts; see `top_k_routing`.
      expert_ids: [..., k], from 0; an id out of range is left out.
      w_in: [experts, d, h].
      w_out: [experts, h, m].
      activation: the name of a pointwise op, with its default settings.

    Returns:
      [..., m], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or there is no such activation.
    """
    chosen = jax.nn.one_hot(expert_ids, len(w_in), dtype=expert_weights.dtype)
    p = jnp.einsum("...k,...ke->...e", expert_weights, chosen)
    a = FORMULAS[activation].plain(jnp.einsum("...d,edh->...eh", x, w_in))
    return jnp.einsum("...e,...em->...m", p, jnp.einsum("...eh,ehm->...em", a, w_out))


def check(x, expert_weights, expert_ids, w_in, w_out, *, activation):
    """Raises if the shapes do not fit, or the activation is unknown."""
    if (
        expert_weights.ndim < 1
        or expert_weights.shape != expert_ids.shape
        or expert_ids.shape[:-1] != x.shape[:-1]
        or not jnp.issubdtype(expert_ids.dtype, jnp.integer)
    ):
        raise InputError(
            f"expert_weights and integer expert_ids must both have shape [..., k] for x [..., d], "
            f"got {expert_weights.shape}, {expert_ids.dtype} {expert_ids.shape} and {x.shape}"
        )
    if w_in.ndim != 3 or w_out.shape[:-1] != (len(w_in), w_in.shape[2]) or w_out.ndim != 3:
        raise InputError(
            f"w_in and w_out must have shapes [experts, d, h] and [experts, h, m], got "
            f"{w_in.shape} and {w_out.shape}"
        )
    if x.shape[-1] != w_in.shape[1]:
        raise InputError(
            f"x must have {w_in.shape[1]} features, as w_in {w_in.shape} takes; got {x.shape}"
        )
    if activation not in FORMULAS:
        raise InputError(
            f"activation must be one of {', '.join(sorted(FORMULAS))}; got {activation!r}"
        )


def _sorted(expert_ids: Array, experts: int) -> tuple[Array, Array]:
    """The pairs in the order of their experts, those without one last; and how many each has."""
    ids = expert_ids.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < experts), ids, experts)
    sizes = jnp.sum(ids[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return jnp.argsort(ids), sizes


def _rows_at(x, index):
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)


def _matrix(w, g):
    return lax.dynamic_index_in_dim(w, g, keepdims=False)


def _pairs(order, start, mine, k):
    """Of a block: the pairs and their tokens; past the end for rows of another block."""
    pair = jnp.where(mine[:, 0], block(order, start), len(order))
    return pair, pair // k


def fwd(x, expert_weights, expert_ids, w_in, w_out, *, activation):
    order, sizes = _sorted(expert_ids, len(w_in))
    tokens, p, k = rows(x), expert_weights.reshape(-1), expert_ids.shape[-1]
    dtype = jnp.result_type(x, expert_weights, w_in, w_out)

    def step(g, start, mine, y):
        pair, token = _pairs(order, start, mine, k)
        h = product(_rows_at(tokens, token), _matrix(w_in, g))
        a = FORMULAS[activation].value(h).astype(dtype)
        part = product(a, _matrix(w_out, g)) * wide(_rows_at(p, pair))[:, None]
        return y.at[token].add(part, mode="drop")

    y = loop_zeros((len(tokens), w_out.shape[2]), (x, expert_weights, expert_ids, w_in, w_out))
    y = over_blocks(len(order), sizes, step, y).astype(dtype)
    saved = (x, expert_weights, expert_ids, w_in, w_out, order, sizes)
    return y.reshape(x.shape[:-1] + y.shape[1:]), saved


def bwd(saved, dy, *, activation):
    x, expert_weights, expert_ids, w_in, w_out, order, sizes = saved
    tokens, p, dy, k = rows(x), expert_weights.reshape(-1), rows(dy), expert_ids.shape[-1]
    formula = FORMULAS[activation]

    def step(g, start, mine, state):
        dx, dp, dv, dw = state
        pair, token = _pairs(order, start, mine, k)
        v, w = _matrix(w_in, g), _matrix(w_out, g)
        x_, dy_, p_ = (_rows_at(*at) for at in ((tokens, token), (dy, token), (p[:, None], pair)))
        h, u, p_ = product(x_, v), product(dy_, w.T), wide(p_)
        a = formula.value(h)
        dh = (p_ * u * formula.slope(h)).astype(dy.dtype)
        return (
            dx.at[token].add(product(dh, v.T), mode="drop"),
            dp.at[pair].set(jnp.sum(a * u, axis=-1), mode="drop"),
            _added(dv, g, product(x_.T, dh)),
            _added(dw, g, product((a * p_).astype(dy.dtype).T, dy_)),
        )

    every = (x, expert_weights, expert_ids, w_in, w_out, dy)
    zeros = [loop_zeros(s, every) for s in (tokens.shape, p.shape, w_in.shape, w_out.shape)]
    dx, dp, dv, dw = over_blocks(len(order), sizes, step, tuple(zeros))
    return dx.reshape(x.shape), dp.reshape(expert_weights.shape), None, dv, dw


def _added(total, g, part):
    return lax.dynamic_update_index_in_dim(total, _matrix(total, g) + part, g, 0)


CHOSEN = [[0, 2], [2, 0], [1, 2], [0, 2], [2, 0]]
mixture_of_experts = op(
    plain,
    fwd,
    bwd,
    check=check,
    cases=(
        Case("odd", (5, 3), (5, 2), values(CHOSEN), (3, 3, 5), (3, 5, 1)),
        Case(
            "out of range",
            (3, 1, 3),
            (3, 1, 3),
            values([[[0, -1, 1]], [[2, 9, 2]], [[3, 0, 0]]]),
            (3, 3, 1),
            (3, 1, 3),
            activation="relu",
            transformed=False,
        ),
        Case(
            "more than a block",
            (145, 3),
            (145, 1),
            integers(145, 1, high=2),
            (2, 3, 1),
            (2, 1, 1),
            transformed=False,
            dtypes=("float32",),
        ),
        Case(
            "no tokens",
            (0, 3),
            (0, 1),
            integers(0, 1, high=3),
            (3, 3, 1),
            (3, 1, 1),
            transformed=False,
        ),
        Case(
            "experts",
            (4096, 256),
            (4096, 2),
            integers(4096, 2, high=8),
            (8, 256, 512),
            (8, 512, 256),
            bench=True,
        ),
    ),
)
