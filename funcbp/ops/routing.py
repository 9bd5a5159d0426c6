"""Which experts each token goes to, and with what weights.

    chosen   w_j = exp(l_(i_j)) / sum_m exp(l_(i_m))        over the k chosen experts i
    all      w_j = exp(l_(i_j)) / sum_e exp(l_e)            over all of them

Backward. With g = sum_j dw_j w_j, by the chosen entries alone:
    chosen   dl_e = sum_j [e = i_j] w_j (dw_j - g)
    all      dl_e = sum_j [e = i_j] w_j dw_j - p_e g        p = softmax(l)

Saves: the logits and the ids, both arguments, and w, the output.
Edge:  tied logits go to the lower expert. The choice itself has no derivative.
Dtype: computes in float32 or wider, returns the logits' dtype.
Ref:   Shazeer et al., 2017, equations 3 to 5 (chosen); Fedus et al., 2021, equation 1 (all).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from funcbp.case import Case, integers, values
from funcbp.core import InputError, op
from funcbp.ops._numeric import rows, wide


def top_k_routing(
    logits: Float[Array, "*batch e"], k: int, *, over: str = "chosen"
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The k experts of the largest logits for each token, and their weights.

    Args:
      logits: the router's scores, [..., experts].
      k: how many experts each token gets.
      over: "chosen": the weights are a softmax over the chosen logits and sum to 1; "all": over
        all logits, so that they sum to less.

    Returns:
      `(weights, expert_ids)`, both [..., k]: in the logits' dtype, and int32; largest first, ties
      to the lower id.

    Raises:
      InputError: there are fewer than k experts, or `over` is neither of the two.
    """
    experts = jnp.shape(logits)[-1:]
    if not experts or not 1 <= k <= experts[0]:
        raise InputError(
            f"k must be from 1 to the number of experts, the last axis of logits "
            f"{jnp.shape(logits)}; got {k}"
        )
    expert_ids = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
    return routing_weights(logits, expert_ids, over=over), expert_ids


def plain(
    logits: Float[Array, "*batch e"], expert_ids: Int[Array, "*batch k"], *, over: str = "chosen"
) -> Float[Array, "*batch k"]:
    """The weights of the chosen experts of each token.

    Args:
      logits: the router's scores, [..., experts].
      expert_ids: the chosen experts, [..., k], from 0; see `top_k_routing`.
      over: "chosen": a softmax over the chosen logits; "all": over all.

    Returns:
      [..., k], in the logits' dtype.

    Raises:
      InputError: the shapes do not fit, or `over` is neither of the two.
    """
    if over == "chosen":
        return jax.nn.softmax(jnp.take_along_axis(logits, expert_ids, axis=-1))
    return jnp.take_along_axis(jax.nn.softmax(logits), expert_ids, axis=-1)


def check(logits, expert_ids, *, over):
    """Raises if the shapes do not fit, or `over` is neither of the two."""
    if logits.ndim < 1 or expert_ids.shape[:-1] != logits.shape[:-1] or expert_ids.ndim < 1:
        raise InputError(
            f"logits and expert_ids must have shapes [..., experts] and [..., k], got "
            f"{logits.shape} and {expert_ids.shape}"
        )
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise InputError(f"expert_ids must be integers, got {expert_ids.dtype}; see top_k_routing")
    if over not in ("chosen", "all"):
        raise InputError(f'over must be "chosen" or "all", got {over!r}')


def fwd(logits, expert_ids, *, over):
    w = plain(wide(logits), expert_ids, over=over)
    return w.astype(logits.dtype), (logits, expert_ids, w)


def bwd(saved, dw, *, over):
    logits, expert_ids, w = saved
    dw = wide(dw)
    g = jnp.sum(dw * w, axis=-1, keepdims=True)
    chosen = w * (dw - g if over == "chosen" else dw)
    start = jnp.zeros_like(w, shape=logits.shape)
    if over == "all":
        start = -jax.nn.softmax(wide(logits)) * g
    token = jnp.arange(rows(w).shape[0])[:, None]
    dlogits = rows(start).at[token, rows(expert_ids)].add(rows(chosen), mode="drop")
    return dlogits.reshape(logits.shape), None


routing_weights = op(
    plain,
    fwd,
    bwd,
    check=check,
    name="routing_weights",
    cases=(
        Case("chosen", (3, 5), values([[4, 0], [1, 2], [3, 1]])),
        Case("all", (3, 5), values([[4, 0], [1, 2], [3, 1]]), over="all"),
        Case("two batch axes, one chosen", (1, 2, 3), values([[[2], [0]]]), over="all"),
        Case("no tokens", (0, 3), integers(0, 1, high=3), transformed=False),
        Case("router", (8192, 64), integers(8192, 2, high=64), bench=True),
    ),
)
