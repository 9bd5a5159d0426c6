"""The layers that hold no other: dense, layer_norm, dropout, flatten, the activations.

Each is an op of `funcbp.ops` with its parameters and with checks of what it is given; the
gradient is the op's.
"""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from funcbp import ops
from funcbp.core import InputError
from funcbp.layers.layer import Layer, lift, make

DENSE_ACTIVATIONS = ("gelu", "relu", "sigmoid", "silu", "tanh")


def dense(
    features: int,
    *,
    activation: str | None = None,
    bias: bool = True,
    w_init: Callable[..., Any] = jax.nn.initializers.lecun_normal(),  # noqa: B008 (it is pure)
    b_init: Callable[..., Any] = jax.nn.initializers.zeros,
    dtype: DTypeLike | None = None,
) -> Layer:
    """An affine map of the last axis, `y = activation(x @ w + b)`: [*b, d] -> [*b, features].

    Parameters: `w` [d, features] and, with `bias`, `b` [features].

    Args:
        features: the size of the last axis of the output, at least 1.
        activation: its name, one of `DENSE_ACTIVATIONS`, to run as one op with the product.
        bias: whether to add `b`.
        w_init, b_init: `(key, shape, dtype) -> array`.
        dtype: of the parameters; that of the input given to `init` by default.

    Raises:
        InputError: `features` or `activation` is none of these; x is not floating, has no
            axis, or its last axis does not fit `w`.
    """
    features = _check_features(features)
    _check_activation(activation)

    def init(key, *specs):
        x = _floating("x", specs, min_rank=1)
        w_key, b_key = jax.random.split(key)
        kind = x.dtype if dtype is None else dtype
        params = {"w": w_init(w_key, (x.shape[-1], features), kind)}
        if bias:
            params["b"] = b_init(b_key, (features,), kind)
        return params, {}

    def apply(params, state, *inputs, key=None, train=False):
        x = _floating("x", inputs, min_rank=1)
        w, b = params["w"], params["b"] if bias else None
        _check_weight(x, w)
        if activation is None:
            return ops.linear(x, w, b), state
        return ops.dense(x, w, b, activation=activation), state

    return make(init, apply, "dense")


def _check_features(features: int) -> int:
    try:
        size = operator.index(features)
    except TypeError:
        size = 0
    if size < 1:
        raise InputError(
            f"features must be a whole number from 1 up, got {features!r}; "
            "give the size of the output's last axis"
        ).within("dense")
    return size


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in DENSE_ACTIVATIONS:
        raise InputError(
            f"activation must be None or one of {', '.join(DENSE_ACTIVATIONS)}, "
            f"got {activation!r}; for another, put a layer behind: serial(dense(n), lift(f))"
        ).within("dense")


def _check_weight(x, w) -> None:
    if w.ndim != 2:
        raise InputError(
            f"w must have 2 axes (inputs, features), got shape {w.shape}; "
            "use jax.vmap over stacked parameters"
        )
    if x.shape[-1] != w.shape[0]:
        raise InputError(
            f"x must have {w.shape[0]} features on its last axis, got shape {x.shape}; "
            "give inputs shaped as at init, or call init again for this shape"
        )


def layer_norm(*, epsilon: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift: [*b, d] -> [*b, d].

    Parameters, in the dtype of the input given to `init`: `scale` [d], ones, and `bias` [d],
    zeros, each where asked for.

    Raises:
        InputError: x is not floating, has no axis, or its last axis does not fit the
            parameters.
    """

    def init(key, *specs):
        x = _floating("x", specs, min_rank=1)
        params = {}
        if scale:
            params["scale"] = jnp.ones(x.shape[-1:], x.dtype)
        if bias:
            params["bias"] = jnp.zeros(x.shape[-1:], x.dtype)
        return params, {}

    def apply(params, state, *inputs, key=None, train=False):
        x = _floating("x", inputs, min_rank=1)
        gain, shift = params["scale"] if scale else None, params["bias"] if bias else None
        for name, param in (("scale", gain), ("bias", shift)):
            if param is not None and param.shape != x.shape[-1:]:
                raise InputError(
                    f"x must fit {name} of shape {param.shape} with its last axis, got shape "
                    f"{x.shape}; give inputs shaped as at init, or call init again"
                )
        return ops.layer_norm(x, gain, shift, epsilon=epsilon), state

    return make(init, apply, "layer_norm")


def dropout(rate: float) -> Layer:
    """Set a share `rate` of the elements to 0 and divide the rest by 1 - rate, in training.

    With `train=False` it is the identity. `rate` is the probability of dropping an element.

    Raises:
        InputError: rate is not in [0, 1), or `train=True` came without a key.
    """
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise InputError(
            f"rate must be at least 0 and below 1, got {rate!r}; "
            "it is the probability of dropping an element"
        ).within("dropout")

    def init(key, *specs):
        _floating("x", specs)
        return {}, {}

    def apply(params, state, *inputs, key=None, train=False):
        x = _floating("x", inputs)
        if not train or rate == 0:
            return x, state
        if key is None:
            raise InputError(
                "key is needed to drop elements when train=True, got none; "
                "call model.apply(params, state, x, key=jax.random.key(0), train=True)"
            )
        return ops.dropout(key, x, rate=rate), state

    return make(init, apply, "dropout")


def _flatten(x):
    if x.ndim == 0:
        raise InputError("x must have at least 1 axis, got a scalar; add a batch axis: x[None]")
    # Not reshape(n, -1), which cannot tell the size when the batch is empty.
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _floating(name: str, inputs: tuple, min_rank: int = 0) -> Any:
    """The one input, checked to be a floating array of at least `min_rank` axes."""
    if len(inputs) != 1:
        raise InputError(f"{name} must be one array, got {len(inputs)} inputs; pass one")
    (x,) = inputs
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise InputError(
            f"{name} must be an array, got a {type(x).__name__}; convert it: jnp.asarray({name})"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"{name} must be floating, got {x.dtype} of shape {x.shape}; "
            f"convert it: {name}.astype(jnp.float32)"
        )
    if len(x.shape) < min_rank:
        raise InputError(
            f"{name} must have at least {min_rank} axis, got shape {x.shape}; add one: {name}[None]"
        )
    return x


# [n, *rest] -> [n, prod(rest)].
flatten = lift(_flatten, name="flatten")

# Elementwise, [*b] -> [*b].
gelu = lift(ops.gelu, name="gelu")
relu = lift(ops.relu, name="relu")
sigmoid = lift(ops.sigmoid, name="sigmoid")
silu = lift(ops.silu, name="silu")
tanh = lift(ops.tanh, name="tanh")

# Over the last axis, [*b, n] -> [*b, n].
log_softmax = lift(ops.log_softmax, name="log_softmax")
softmax = lift(ops.softmax, name="softmax")
