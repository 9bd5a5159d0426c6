"""One training step: a pure, jitted function of a state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from funcbp.core import InputError


class TrainState(NamedTuple):
    """All that a step changes: one pytree, to be saved and restored whole."""

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    step: Int[Array, ""]


def init_state(
    model: Any, optimizer: optax.GradientTransformation, key: Array, *specs: Any
) -> TrainState:
    """The state at step 0.

    Args:
      model: a layer.
      optimizer: any optax transformation.
      key: a PRNG key; one part makes the parameters, the other goes into the state.
      *specs: the model's inputs, arrays or `jax.ShapeDtypeStruct`s.
    """
    init_key, key = jax.random.split(key)
    params, model_state = model.init(init_key, *specs)
    return TrainState(params, model_state, optimizer.init(params), key, jnp.zeros((), jnp.int32))


def supervised(model: Any, criterion: Callable) -> Callable:
    """The loss of a model on batches `(inputs, labels)`, for `make_step`.

    Args:
      model: a layer from inputs [n, ...] to outputs [n, ...].
      criterion: `criterion(outputs, labels)` -> losses [n], as those of `funcbp.ops`.

    Returns:
      A loss whose metrics have `accuracy` when the labels are integers.
    """

    def loss(params, model_state, batch, *, key):
        inputs, labels = batch
        outputs, model_state = model.apply(params, model_state, inputs, key=key, train=True)
        metrics = {}
        if jnp.issubdtype(labels.dtype, jnp.integer):
            metrics["accuracy"] = jnp.mean(jnp.argmax(outputs, axis=-1) == labels)
        return jnp.mean(criterion(outputs, labels)), (model_state, metrics)

    return loss


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    donate: bool = True,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Makes the jitted step `(state, batch) -> (state, metrics)`.

    A batch whose loss or gradient is not finite changes no parameter, optimiser or model state:
    `metrics["finite"]` is False, and only the key and the step number go on.

    Args:
      loss: `loss(params, model_state, batch, *, key) -> (scalar, (model_state, metrics))`, as
        `supervised` makes; metrics is a dict of scalars.
      optimizer: any optax transformation.
      accumulate: the number of equal parts into which a batch is split along its first axis; their
        gradients are averaged in one `scan`, so that memory is that of one part.
      donate: reuse the old state's memory; the state passed in is gone after the call.

    Returns:
      The step. Its metrics are those of the loss and `loss`, `grad_norm`, `finite`.

    Raises:
      InputError: at the call, if the loss is not a floating scalar or the batch cannot be split.
    """
    gradient = jax.value_and_grad(_checked(loss), has_aux=True)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key, used = jax.random.split(state.key)
        (value, (model_state, metrics)), grads = _accumulated(
            gradient, accumulate, state, batch, used
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = (params, model_state, opt_state)
        old = (state.params, state.model_state, state.opt_state)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {**metrics, "loss": value, "grad_norm": norm, "finite": finite}
        return TrainState(kept[0], kept[1], kept[2], key, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0 if donate else ())


def _checked(loss: Callable) -> Callable:
    def checked(params, model_state, batch, *, key):
        result = loss(params, model_state, batch, key=key)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)):
            raise InputError(
                "loss must return (scalar, (model_state, metrics)), got "
                f"{jax.tree.structure(result)}; metrics may be {{}}"
            )
        value = result[0]
        if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise InputError(
                f"loss must be a floating scalar, got {jnp.result_type(value)}"
                f"{list(jnp.shape(value))}; take the mean over the batch"
            )
        return result

    return checked


def _accumulated(gradient: Callable, parts: int, state: TrainState, batch: Any, key: Array):
    """`gradient` of the whole batch, as the mean over its parts."""
    if parts == 1:
        return gradient(state.params, state.model_state, batch, key=key)
    pieces = jax.tree.map(lambda x: _split(x, parts), batch)

    def one(model_state, piece_and_key):
        piece, key = piece_and_key
        (value, (model_state, metrics)), grads = gradient(state.params, model_state, piece, key=key)
        return model_state, (value, metrics, grads)

    def add(carry, piece_and_key):
        model_state, total = carry
        model_state, new = one(model_state, piece_and_key)
        return (model_state, jax.tree.map(jnp.add, total, new)), None

    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], (pieces, keys))
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)),
        jax.eval_shape(one, state.model_state, first)[1],
    )
    (model_state, total), _ = jax.lax.scan(add, (state.model_state, zeros), (pieces, keys))
    value, metrics, grads = jax.tree.map(lambda t: t / parts, total)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    return (value, (model_state, metrics)), grads


def _split(x: Array, parts: int) -> Array:
    if x.ndim < 1 or x.shape[0] % parts:
        raise InputError(
            f"the batch's first axis must be a multiple of accumulate={parts}, got shape "
            f"{x.shape}; choose a batch size that it divides"
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
