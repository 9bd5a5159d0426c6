"""A function whose intermediates are computed again in the backward pass, by named policies.

Not a rule: `jax.checkpoint`, which says what it keeps by functions of `jax.checkpoint_policies`.

Saves: the function's arguments, and what the policy names.
Ref:   Griewank and Walther, 2000 (revolve); jax.checkpoint.
"""

from collections.abc import Callable

import jax

from funcbp.core import InputError

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_without_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def checkpointed(fn: Callable, policy: str | tuple[str, ...] | Callable | None = None) -> Callable:
    """fn, which keeps for its backward pass only what the policy names and computes the rest again.

    Args:
      fn: a function of arrays.
      policy: what is kept beside the arguments:
        None or "nothing": nothing; the whole function runs again.
        "dots": the results of matrix products; elementwise functions run again.
        "dots_without_batch": of matrix products without a batch axis, as those of dense layers,
          and not the scores of attention.
        "everything": every intermediate that the backward pass uses, as without this function.
        A tuple of names: what `jax.ad_checkpoint.checkpoint_name` gave these names.
        A function: any of `jax.checkpoint_policies`, or one like them.

    Returns:
      A function with the arguments, values and gradients of fn.

    Raises:
      InputError: there is no such policy.
    """
    return jax.checkpoint(fn, policy=_saveable(policy))


def _saveable(policy) -> Callable:
    if policy is None:
        return POLICIES["nothing"]
    if isinstance(policy, tuple):
        return jax.checkpoint_policies.save_only_these_names(*policy)
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    if callable(policy):
        return policy
    names = ", ".join(map(repr, POLICIES))
    raise InputError(
        f"policy must be one of {names}, a tuple of checkpoint names, a function of "
        f"jax.checkpoint_policies, or None, got {policy!r}"
    )
