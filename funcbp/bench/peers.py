"""The same functions from other libraries: what an op is measured against.

JAX's own is the op's `like`; those of flax and torch are named here. The arguments are the op's,
in its layouts: a counterpart that wants others is given them outside of what is timed.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.case import Case
from funcbp.core import InputError, Op

__all__ = ["AGAINST", "Unavailable", "counterpart", "require", "takes"]

AGAINST = ("autodiff", "jax", "flax", "torch")


class Unavailable(Exception):
    """The other library has no such function, or not with these arguments."""


def require(against: list[str]) -> None:
    """Raises InputError if a name is none of `AGAINST` or its library is not installed."""
    for name in against:
        if name not in AGAINST:
            raise InputError(f"--against takes {', '.join(AGAINST)}, got {name!r}")
        if name in ("flax", "torch"):
            # Else its threads go on spinning, on the cores that whoever comes next is timed on.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            try:
                importlib.import_module(name)
            except ImportError:
                raise InputError(
                    f"--against {name} needs {name}, which is not installed; install funcbp[bench]"
                ) from None


def counterpart(name: str, op: Op, case: Case, dtype: str, compiled: Callable) -> Any:
    """The contender of a library. Raises Unavailable.

    Args:
      name: jax, flax or torch.
      op: the op.
      case: its bench case.
      dtype: of the floating arguments.
      compiled: makes the contender of a JAX function.
    """
    if name == "jax":
        function = op.like or JAX.get(op.name)
        if function is None or not takes(function, case.kwargs):
            raise Unavailable
        try:
            return compiled(function)
        except NotImplementedError:  # of a dtype
            raise Unavailable from None
    if name == "flax":
        if op.name not in FLAX:
            raise Unavailable
        return compiled(FLAX[op.name])
    if op.name not in TORCH or (case.kwargs and op.name not in WITH_SETTINGS):
        raise Unavailable
    return _torch(op, case, dtype)


def takes(f: Callable, settings: Iterable[str]) -> bool:
    """Whether f has arguments of all these names."""
    known = inspect.signature(f).parameters
    return any(p.kind is p.VAR_KEYWORD for p in known.values()) or set(settings) <= set(known)


class _Torch:
    """Value and gradient by torch's autograd, on the CPU."""

    temporary = errors = None

    def __init__(self, f: Callable, inputs: list[Any]):
        self.f, self.inputs = f, inputs
        self.floating = [v for v in inputs if v is not None and v.requires_grad]
        torch = importlib.import_module("torch")
        kept: dict[int, int] = {}
        own = {v.data_ptr() for v in inputs if v is not None}

        def pack(v):
            if v.data_ptr() not in own:
                kept[v.data_ptr()] = v.untyped_storage().nbytes()
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            y = f(*inputs)
        self.saved = sum(kept.values())
        self.dy = torch.randn_like(y)

    def run(self) -> None:
        torch = importlib.import_module("torch")
        y = self.f(*self.inputs)
        torch.autograd.grad(y, self.floating, self.dy)


def _torch(op: Op, case: Case, dtype: str) -> _Torch:
    torch = importlib.import_module("torch")
    args, _ = case.build(0, dtype)
    if not all(a is None or isinstance(a, jax.Array) for a in args):
        raise Unavailable

    def tensor(a):
        if a is None:
            return None
        real = jnp.issubdtype(a.dtype, jnp.inexact)
        v = torch.from_numpy(np.array(a.astype(jnp.float32) if real else a))
        return v.to(getattr(torch, dtype) if real else torch.int64).requires_grad_(real)

    function = functools.partial(TORCH[op.name](torch.nn.functional), **case.kwargs)
    return _Torch(function, [tensor(a) for a in args])


def _of_features(norm: Callable) -> Callable:
    return lambda x, *parameters: norm(x, x.shape[-1:], *parameters)


def _attention(f: Any) -> Callable:
    def heads_first(q, k, v, is_causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return f.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    return heads_first


def _lstm(f: Any) -> Callable:
    torch = importlib.import_module("torch")

    def one_layer(x, w, u, b):
        zeros = x.new_zeros(1, len(x), len(u))
        weights = [w.T.contiguous(), u.T.contiguous(), b, torch.zeros_like(b)]
        return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, True)[0]

    return one_layer


# Torch's functions that take the settings of the case by the op's names.
WITH_SETTINGS = {"dot_product_attention"}
# How to have each op from torch.nn.functional; most go by the same arguments.
TORCH: dict[str, Callable[[Any], Callable]] = {
    "celu": lambda f: f.celu,
    "dot_product_attention": _attention,
    "elu": lambda f: f.elu,
    "gelu": lambda f: functools.partial(f.gelu, approximate="tanh"),
    "glu": lambda f: f.glu,
    "hard_sigmoid": lambda f: f.hardsigmoid,
    "hard_silu": lambda f: f.hardswish,
    "hard_tanh": lambda f: f.hardtanh,
    "layer_norm": lambda f: _of_features(f.layer_norm),
    "leaky_relu": lambda f: f.leaky_relu,
    "linear": lambda f: lambda x, w, *b: f.linear(x, w.T, *b),
    "log_sigmoid": lambda f: f.logsigmoid,
    "log_softmax": lambda f: functools.partial(f.log_softmax, dim=-1),
    "lstm": _lstm,
    "mish": lambda f: f.mish,
    "relu": lambda f: f.relu,
    "relu6": lambda f: f.relu6,
    "rms_norm": lambda f: _of_features(f.rms_norm),
    "selu": lambda f: f.selu,
    "sigmoid": lambda f: f.sigmoid,
    "silu": lambda f: f.silu,
    "soft_sign": lambda f: f.softsign,
    "softmax": lambda f: functools.partial(f.softmax, dim=-1),
    "softmax_cross_entropy_with_integer_labels": lambda f: functools.partial(
        f.cross_entropy, reduction="none"
    ),
    "softplus": lambda f: f.softplus,
    "tanh": lambda f: f.tanh,
}


def _joined_recurrence(a, b, h0=None, *, axis=-2, reverse=False):
    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    axis %= b.ndim
    steps = (jnp.broadcast_to(a, b.shape), b)
    factor, h = jax.lax.associative_scan(then, steps, axis=axis, reverse=reverse)
    return h if h0 is None else h + factor * jnp.expand_dims(h0, axis)


# JAX's own ways to what it has no function for.
JAX: dict[str, Callable] = {"linear_recurrence": _joined_recurrence}


def _linen() -> Any:
    return importlib.import_module("flax.linen")


def _layer_norm(x, scale=None, bias=None, *, epsilon=1e-6):
    module = _linen().LayerNorm(epsilon, use_scale=scale is not None, use_bias=bias is not None)
    given = {"scale": scale, "bias": bias}
    return module.apply({"params": {n: v for n, v in given.items() if v is not None}}, x)


def _rms_norm(x, scale=None, *, epsilon=1e-6):
    module = _linen().RMSNorm(epsilon, use_scale=scale is not None)
    return module.apply({"params": {} if scale is None else {"scale": scale}}, x)


# The ops that flax has code of its own for; its activations are those of jax.nn.
FLAX: dict[str, Callable] = {
    "avg_pool": lambda *args, **settings: _linen().avg_pool(*args, **settings),
    "layer_norm": _layer_norm,
    "max_pool": lambda *args, **settings: _linen().max_pool(*args, **settings),
    "rms_norm": _rms_norm,
}
