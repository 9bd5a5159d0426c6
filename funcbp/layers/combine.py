"""Layers composed of layers: `serial`, `parallel`, `concat`, `residual`.

A combinator names its children by kind and number (`dense_0`, `dense_1`, `layer_norm_0`),
keeps their parameters and state in dicts under those names, gives each its own key, and puts
the child's name in front of the errors that come out of it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcbp.core import InputError
from funcbp.layers.layer import Layer, has_leaves, make, run, scope


class Child(NamedTuple):
    """A layer in its place: its number among its siblings and its name in their dicts."""

    number: int
    name: str
    layer: Layer

    def init(self, key, specs: tuple, params: dict, state: dict) -> PyTree:
        """Put the child's entries into the parent's `params` and `state`; its output's specs."""
        with scope(self.name):
            mine, my_state = self.layer.init(jax.random.fold_in(key, self.number), *specs)
        _keep(params, self.name, mine)
        _keep(state, self.name, my_state)

        def forward(params, state, inputs):
            return self.apply(params, state, inputs, {}, key=None, train=False)

        return jax.eval_shape(forward, params, state, specs)

    def apply(self, params, state, inputs: tuple, new_state: dict, *, key, train) -> Any:
        """The child's output; its state goes into the parent's `new_state`."""
        _require_dict("params", params)
        _require_dict("state", state)
        mine, my_state = params.get(self.name, {}), state.get(self.name, {})
        # A child's key depends on its place alone, so that no two layers draw the same bits.
        key = None if key is None else jax.random.fold_in(key, self.number)
        output, my_state = run(self.name, self.layer, mine, my_state, inputs, key=key, train=train)
        _keep(new_state, self.name, my_state)
        return output


def _keep(tree: dict, name: str, entry: PyTree) -> None:
    """Enter what holds something: a layer without parameters has no entry."""
    if has_leaves(entry):
        tree[name] = entry


def _require_dict(what: str, tree: PyTree) -> None:
    if not isinstance(tree, dict):
        raise InputError(
            f"{what} must be the dict of this name from init, got {type(tree).__name__}; "
            "model.init returns the pair (params, state)"
        )


def _children(parent: str, layers: Sequence[Layer]) -> list[Child]:
    """Number the layers by kind, having checked that they are layers."""
    seen: Counter[str] = Counter()
    children = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            what = getattr(layer, "__name__", type(layer).__name__)
            raise InputError(
                f"argument {index} must be a Layer, got {what}; call what makes a layer, as in "
                "dense(64), or wrap a function of one's own: lift(f)"
            ).within(parent)
        children.append(Child(index, f"{layer.name}_{seen[layer.name]}", layer))
        seen[layer.name] += 1
    return children


def _as_inputs(output: Any) -> tuple:
    """What the next layer takes: a plain tuple is several inputs, all else is one."""
    return output if type(output) is tuple else (output,)


def serial(*layers: Layer) -> Layer:
    """Layers one after the other, `x -> f2(f1(x))`.

    A tuple that a layer returns, as `parallel` does, becomes the next layer's inputs.
    `serial()` is the identity.

    Raises:
        InputError: an argument is not a Layer.
    """
    children = _children("serial", layers)

    def init(key, *specs):
        params, state = {}, {}
        for child in children:
            specs = _as_inputs(child.init(key, specs, params, state))
        return params, state

    def apply(params, state, *inputs, key=None, train=False):
        new_state = {}
        output: Any = inputs[0] if len(inputs) == 1 else inputs
        for child in children:
            output = child.apply(params, state, inputs, new_state, key=key, train=train)
            inputs = _as_inputs(output)
        return output, new_state

    return make(init, apply, "serial")


def parallel(*layers: Layer) -> Layer:
    """The same inputs to each layer, `x -> (f1(x), f2(x))`; the outputs are a tuple.

    Raises:
        InputError: an argument is not a Layer.
    """
    children = _children("parallel", layers)

    def init(key, *specs):
        params, state = {}, {}
        for child in children:
            child.init(key, specs, params, state)
        return params, state

    def apply(params, state, *inputs, key=None, train=False):
        new_state = {}
        outputs = tuple(
            child.apply(params, state, inputs, new_state, key=key, train=train)
            for child in children
        )
        return outputs, new_state

    return make(init, apply, "parallel")


def concat(*layers: Layer, axis: int = -1) -> Layer:
    """The same inputs to each layer, their outputs joined along `axis`.

    Raises:
        InputError: no layer is given, an argument is not a Layer, or the outputs differ in
            rank or in the size of another axis.
    """
    children = _children("concat", layers)
    if not children:
        raise InputError("at least one layer is needed, got none").within("concat")

    def init(key, *specs):
        params, state = {}, {}
        _check_joinable([child.init(key, specs, params, state) for child in children], axis)
        return params, state

    def apply(params, state, *inputs, key=None, train=False):
        new_state = {}
        outputs = [
            child.apply(params, state, inputs, new_state, key=key, train=train)
            for child in children
        ]
        _check_joinable(outputs, axis)
        return jnp.concatenate(outputs, axis=axis), new_state

    return make(init, apply, "concat")


def _check_joinable(outputs: Sequence[Any], axis: int) -> None:
    shapes = [_shape(output) for output in outputs]
    rank = len(shapes[0])
    fits = all(len(shape) == rank for shape in shapes) and -rank <= axis < rank
    if not fits or len({_without(shape, axis % rank) for shape in shapes}) > 1:
        raise InputError(
            f"the layers' outputs must agree in every axis but {axis} to be joined there, "
            f"got shapes {', '.join(map(str, shapes))}; change a layer, or use parallel"
        )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _shape(output: Any) -> tuple[int, ...]:
    if not hasattr(output, "shape"):
        raise InputError(
            f"each layer inside must return one array, got a {type(output).__name__}; "
            "let it return an array, or use serial or parallel"
        )
    return output.shape


def residual(layer: Layer) -> Layer:
    """The input plus the layer's output, `x -> x + f(x)`.

    Raises:
        InputError: f(x) is not shaped as x is, the inputs are not one array, or the argument
            is not a Layer.
    """
    (child,) = _children("residual", [layer])

    def init(key, *specs):
        params, state = {}, {}
        _check_addable(specs, child.init(key, specs, params, state))
        return params, state

    def apply(params, state, *inputs, key=None, train=False):
        new_state = {}
        output = child.apply(params, state, inputs, new_state, key=key, train=train)
        _check_addable(inputs, output)
        return inputs[0] + output, new_state

    return make(init, apply, "residual")


def _check_addable(inputs: tuple, output: Any) -> None:
    if len(inputs) != 1:
        raise InputError(f"x must be one array, got {len(inputs)} inputs; pass one")
    x_shape, y_shape = _shape(inputs[0]), _shape(output)
    if x_shape != y_shape:
        raise InputError(
            f"the layer inside must keep the shape of x for x + f(x), got x {x_shape} and "
            f"f(x) {y_shape}; let its last layer give the shape of x"
        )
