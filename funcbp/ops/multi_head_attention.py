"""Multi-head self-attention with its four projections, as one rule.

    q_inh = sum_m x_im wq_mnh + bq_nh        k and v alike, with as many heads or fewer
    o = attention(q, k, v)                   as `dot_product_attention`
    y_im = sum_nh o_inh wo_nhm + bo_m

Backward. With dq, dk and dv those of attention at do_inh = sum_m dy_im wo_nhm
    dwo_nhm = sum_i o_inh dy_im        dbo_m = sum_i dy_im
    dwq_mnh = sum_i x_im dq_inh        dbq_nh = sum_i dq_inh        wk, wv, bk, bv alike
    dx_im = sum_nh dq_inh wq_mnh + sum_nh dk_inh wk_mnh + sum_nh dv_inh wv_mnh

Saves: the arguments, o, and two numbers for each query and head. With `recompute` q, k and v are
       made again, three products more; else they are saved as well.
Edge:  that of `dot_product_attention`: a query that sees nothing has o = 0, so y = bo.
Dtype: products accumulate, and scores are, in float32 or wider; q, k, v and o are rounded to the
       promoted dtype of all arguments, which is the result's.
Ref:   Vaswani et al., 2017, section 3.2.2; Shazeer, 2019, and Ainslie et al., 2023, for fewer
       heads of keys and values.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.case import Case, normal, values
from funcbp.core import InputError, op
from funcbp.ops._attention import backward, forward
from funcbp.ops._attention_blocks import Extras, Rules
from funcbp.ops._attention_checks import check_settings
from funcbp.ops._numeric import contracted, wide
from funcbp.ops.dot_product_attention import plain as attention


def plain(
    x: Float[Array, "b t m"],
    wq: Float[Array, "m n h"],
    wk: Float[Array, "m k h"],
    wv: Float[Array, "m k h"],
    wo: Float[Array, "n h m"],
    bq: Float[Array, "n h"] | None = None,
    bk: Float[Array, "k h"] | None = None,
    bv: Float[Array, "k h"] | None = None,
    bo: Float[Array, " m"] | None = None,
    *,
    lengths: Int[Array, " b"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    recompute: bool = True,
) -> Float[Array, "b t m"]:
    """Self-attention of x with projections.

    Args:
      x: [batch, t, model].
      wq: [model, heads, width].
      wk: [model, key heads, width]; the number of heads is a multiple of that of key heads.
      wv: the shape of wk.
      wo: [heads, width, model].
      bq: added to the queries, [heads, width], or None.
      bk: added to the keys, [key heads, width], or None.
      bv: added to the values, [key heads, width], or None.
      bo: added to the result, [model], or None.
      lengths: [batch], how many places of each entry are seen; None for all.
      scale: of the scores; None for 1 / sqrt(width).
      is_causal: place i sees the places 0 to i only.
      local_window_size: (l, r), or one number for both: place i sees i - l to i + r only.
      softcap: scores become softcap * tanh(score / softcap); None for none.
      recompute: whether the backward pass makes queries, keys and values again; they are saved
        otherwise.

    Returns:
      [batch, t, model], in the promoted dtype of the arguments.

    Raises:
      InputError: the shapes do not fit, or a setting is out of range.
    """

    def projected(w, b):
        a = jnp.einsum("btm,mnh->btnh", x, w)
        return a if b is None else a + b

    o = attention(
        projected(wq, bq),
        projected(wk, bk),
        projected(wv, bv),
        key_value_seq_lengths=lengths,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        softcap=softcap,
    )
    y = jnp.einsum("btnh,nhm->btm", o, wo)
    return y if bo is None else y + bo


def check(x, wq, wk, wv, wo, bq, bk, bv, bo, *, lengths, **settings):
    """Raises if the shapes do not fit or a setting is out of range."""
    shapes = {"wq": wq.shape, "wk": wk.shape, "wv": wv.shape, "wo": wo.shape}
    if x.ndim != 3 or any(len(shape) != 3 for shape in shapes.values()):
        raise InputError(
            "x must have shape [batch, t, model], wq, wk and wv [model, heads, width] and wo "
            f"[heads, width, model]; got x {x.shape} and {shapes}; give x a batch axis, and "
            "reshape weights of two axes"
        )
    (m, n, h), (key_m, k, key_h) = wq.shape, wk.shape
    if {m, key_m} != {x.shape[2]} or h != key_h or k == 0 or n % k or wv.shape != wk.shape:
        raise InputError(
            f"wq, wk and wv must have {x.shape[2]} rows, as x {x.shape} has features, one width, "
            f"and a number of heads in wq that is a multiple of that in wk and wv; got {shapes}"
        )
    if wo.shape[:2] != (n, h):
        raise InputError(f"wo must have shape [{n}, {h}, model], as wq has heads, got {wo.shape}")
    for name, b, shape in (
        ("bq", bq, (n, h)),
        ("bk", bk, (k, h)),
        ("bv", bv, (k, h)),
        ("bo", bo, wo.shape[2:]),
    ):
        if b is not None and b.shape != shape:
            raise InputError(
                f"{name} must have shape {shape}, that of the projection, got {b.shape}; "
                "None for no bias"
            )
    if lengths is not None and (
        lengths.shape != x.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        raise InputError(
            f"lengths must be {len(x)} integers, one for each batch entry, got {lengths.dtype} "
            f"{lengths.shape}"
        )
    check_settings(settings)


def _projected(x: Array, w: Array, b: Array | None, dtype: Any) -> Array:
    a = contracted("btm,mnh->btnh", x, w)
    return (a if b is None else a + wide(b)).astype(dtype)


def _pulled(x: Array, w: Array, b: Array | None, d: Array) -> tuple[Array, Array, Array | None]:
    """The cotangents of (x, w, b) from that of the projection."""
    db = None if b is None else jnp.sum(wide(d), axis=(0, 1))
    return contracted("btnh,mnh->btm", d, w), contracted("btm,btnh->mnh", x, d), db


def _surroundings(lengths, scale, is_causal, local_window_size, softcap):
    def rules(width):
        return Rules.of(width, scale, is_causal, local_window_size, softcap, 0.0)

    return Extras(None, None, None, lengths, None, None, None), rules


def fwd(x, wq, wk, wv, wo, bq, bk, bv, bo, *, lengths, recompute, **settings):
    arguments = (x, wq, wk, wv, wo, bq, bk, bv, bo)
    dtype = jnp.result_type(*(a for a in arguments if a is not None))
    extras, rules = _surroundings(lengths, **settings)
    q, k, v = heads = [_projected(x, w, b, dtype) for w, b in ((wq, bq), (wk, bk), (wv, bv))]
    o, softmax = forward(q, k, v, extras, rules(wq.shape[2]))
    o = o.astype(dtype)
    y = contracted("btnh,nhm->btm", o, wo)
    y = y if bo is None else y + wide(bo)
    return y.astype(dtype), (arguments, lengths, o, softmax, None if recompute else heads)


def bwd(saved, dy, *, recompute, **settings):
    arguments, lengths, o, softmax, heads = saved
    x, wq, wk, wv, wo, bq, bk, bv, bo = arguments
    extras, rules = _surroundings(lengths, **settings)
    layers = ((wq, bq), (wk, bk), (wv, bv))
    q, k, v = heads or [_projected(x, w, b, dy.dtype) for w, b in layers]
    do = contracted("btm,nhm->btnh", dy, wo)
    d = backward(q, k, v, extras, softmax, do, rules(wq.shape[2]))
    parts = [_pulled(x, w, b, dp) for (w, b), dp in zip(layers, d[:3], strict=True)]
    dx, dw, db = zip(*parts, strict=True)
    dwo = contracted("btnh,btm->nhm", o, dy)
    dbo = None if bo is None else jnp.sum(wide(dy), axis=(0, 1))
    return sum(dx[1:], dx[0]), *dw, dwo, *db, dbo, None


multi_head_attention = op(
    plain,
    fwd,
    bwd,
    arrays=("x", "wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "lengths"),
    check=check,
    cases=(
        Case(
            "odd, causal, grouped",
            (2, 5, 3),
            (3, 2, 2),
            (3, 1, 2),
            (3, 1, 2),
            (2, 2, 3),
            is_causal=True,
        ),
        Case(
            "biases, lengths, nothing made again",
            (2, 3, 4),
            normal(4, 2, 3, std=0.5),
            normal(4, 2, 3, std=0.5),
            (4, 2, 3),
            (2, 3, 5),
            (2, 3),
            (2, 3),
            (2, 3),
            (5,),
            lengths=values([3, 0]),
            softcap=2.0,
            recompute=False,
            transformed=False,
        ),
        Case(
            "empty batch",
            (0, 2, 3),
            (3, 1, 2),
            (3, 1, 2),
            (3, 1, 2),
            (1, 2, 3),
            dtypes=("float32",),
            transformed=False,
        ),
        Case(
            "language model",
            (2, 1024, 512),
            normal(512, 8, 64, std=0.05),
            normal(512, 8, 64, std=0.05),
            normal(512, 8, 64, std=0.05),
            normal(8, 64, 512, std=0.05),
            is_causal=True,
            bench=True,
        ),
    ),
)
