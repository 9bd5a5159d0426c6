"""A layer is a pure pair: `init` makes parameters and state, `apply` uses them.

    params, state = layer.init(key, x)
    y, state = layer.apply(params, state, x, key=key, train=True)
    y = layer(params, x)                     # inference of a layer without state

This file holds the pair, what gives it a name in errors and in profiles, and `lift`, which
makes a layer from one's own functions. The layers themselves stand in `basic.py`, and what
composes them in `combine.py`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import jax
from jaxtyping import PRNGKeyArray, PyTree

from funcbp.core import InputError

# The names of the layers being run, outermost first: () outside any layer.
_path: ContextVar[tuple[str, ...]] = ContextVar("funcbp_layer_path", default=())


class Recorder(Protocol):
    """What is told of each layer that is applied; the values that it returns are used on."""

    def enter(self, path: str, layer: "Layer", params: PyTree, inputs: tuple) -> tuple: ...
    def leave(self, path: str, layer: "Layer", output: PyTree) -> PyTree: ...


_recorder: ContextVar[Recorder | None] = ContextVar("funcbp_recorder", default=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A pure layer: `init(key, *specs)` and `apply(params, state, *inputs, key, train)`.

    Args:
        init: `init(key, *specs) -> (params, state)`. It reads the shape and dtype of each
            spec, an array or a `jax.ShapeDtypeStruct`, and nothing else.
        apply: `apply(params, state, *inputs, key=None, train=False) -> (output, state)`.
        name: the kind, as it stands in parameter paths (`dense` gives `dense_0`).

    A layer that needs state, a key or `train` is written as a `Layer`; for one that does not,
    `lift` is shorter. A layer without parameters, or without state, has `{}` for it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from funcbp.layers import dense, gelu, serial
        >>> model = serial(dense(8), gelu, dense(2))
        >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 4), "float32"))
        >>> model(params, jnp.ones((3, 4))).shape
        (3, 2)
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Any, PyTree]]
    name: str = "layer"

    def __call__(self, params: PyTree, *inputs: Any) -> Any:
        """The output at inference, of a layer without state; `jax.jit(model)` compiles it.

        Raises:
            InputError: the layer keeps state.
        """
        call = _call if _path.get() else functools.partial(run, self.name)
        output, state = call(self, params, {}, inputs, key=None, train=False)
        with _outermost(self.name):
            if has_leaves(state):
                raise InputError(_KEEPS_STATE)
        return output


_KEEPS_STATE = (
    "state is needed: this layer, or one inside it, keeps state, and none was given; call "
    "model.apply(params, state, x) with the state from model.init, and keep the state it returns"
)
_HAS_PARAMS = (
    "params must hold an entry for this layer, got none; pass the params that init of this same "
    "model returned (model.init returns the pair (params, state))"
)


@jax.tree_util.register_pytree_node_class
class Missing(dict):
    """An empty dict that explains itself when a layer looks up what was not given.

    It is a pytree without leaves, as `{}` is, so that it passes through jit and eval_shape.
    """

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def __missing__(self, name):
        raise InputError(self.reason)

    def tree_flatten(self):
        return (), self.reason

    @classmethod
    def tree_unflatten(cls, reason, children):
        return cls(reason)


def has_leaves(tree: PyTree) -> bool:
    """Whether a tree of parameters or state holds anything."""
    return bool(jax.tree.leaves(tree))


def _or_missing(tree: PyTree, reason: str) -> PyTree:
    """The tree, or where it is an empty dict one that says why it should not be."""
    return Missing(reason) if isinstance(tree, dict) and not tree else tree


def _call(layer: Layer, params, state, inputs: tuple, **options):
    """`layer.apply`, where a look-up in empty params or state says what was to be given."""
    params, state = _or_missing(params, _HAS_PARAMS), _or_missing(state, _KEEPS_STATE)
    return layer.apply(params, state, *inputs, **options)


def run(name: str, layer: Layer, params, state, inputs: tuple, *, key=None, train=False):
    """Apply a child under its name: what every combinator calls. Returns (output, state)."""
    with scope(name):
        recorder = _recorder.get()
        if recorder is None:
            return _call(layer, params, state, inputs, key=key, train=train)
        inputs = recorder.enter(path(), layer, params, inputs)
        output, state = _call(layer, params, state, inputs, key=key, train=train)
        return recorder.leave(path(), layer, output), state


def path() -> str:
    """The names of the layers being run, `serial/dense_0`; empty outside any."""
    return "/".join(_path.get())


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of every layer applied inside the block."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Name what runs inside: in profiles and HLO, and in the errors that leave it."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name):
            yield
    except InputError as error:
        raise error.within(name).with_traceback(error.__traceback__) from error.__cause__
    except Exception as error:
        _note(error, path())
        raise
    finally:
        _path.reset(token)


def _note(error: Exception, path: str) -> None:
    """Add the innermost layer's path to an error that is not ours, once."""
    notes = getattr(error, "__notes__", ())
    if not any(note.startswith("in layer ") for note in notes):
        error.add_note(f"in layer {path}")


def _outermost(name: str) -> contextlib.AbstractContextManager[None]:
    """The scope of a layer that nothing encloses; a child's was opened by its combinator."""
    return contextlib.nullcontext() if _path.get() else scope(name)


def make(init: Callable, apply: Callable, name: str) -> Layer:
    """A Layer whose errors carry its name when it is used alone, at the root of a path.

    `init` and `apply` are as in `Layer`. At the root, too, specs become `ShapeDtypeStruct`s.
    """
    inner = Layer(init, apply, name)

    def named_init(key, *specs):
        with _outermost(name):
            return init(key, *specs_of(specs))

    def named_apply(params, state, *inputs, key=None, train=False):
        if _path.get():
            return apply(params, state, *inputs, key=key, train=train)
        output, state = run(name, inner, params, state, inputs, key=key, train=train)
        return output, state if has_leaves(state) else {}

    return Layer(named_init, named_apply, name)


def specs_of(inputs: tuple) -> tuple:
    """The shape and dtype of each array, dtypes as JAX would hold them (no float64 by chance)."""
    return jax.eval_shape(_same, inputs)


def _same(tree):
    return tree


def lift(apply: Callable, init: Callable | None = None, *, name: str | None = None) -> Layer:
    """A layer from one's own pure functions.

    Args:
        apply: `apply(*inputs) -> output`, or `apply(params, *inputs) -> output` when `init`
            is given.
        init: `init(key, *specs) -> params`; specs have `.shape` and `.dtype`.
        name: the name in paths; the function's own by default.

    Raises:
        InputError: the name is not an identifier (a lambda has none: give `name=`).

    A layer that needs state, a key or `train` is a `Layer(init, apply, name)`.

    Example:
        >>> import jax.numpy as jnp
        >>> lift(jnp.square)({}, jnp.arange(3.0))
        Array([0., 1., 4.], dtype=float32)
    """
    kind: str = getattr(apply, "__name__", "") if name is None else name
    if not kind.isidentifier():
        raise InputError(f"name must be an identifier, got {kind!r}; give one: lift(f, name='f')")

    def lifted_init(key: PRNGKeyArray, *specs):
        return ({} if init is None else init(key, *specs)), {}

    def lifted_apply(params, state, *inputs, key=None, train=False):
        output = apply(*inputs) if init is None else apply(params, *inputs)
        return output, state

    return make(lifted_init, lifted_apply, kind)
