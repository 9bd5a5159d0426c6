"""One forward and one backward pass, seen layer by layer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from funcbp.core import InputError
from funcbp.layers.layer import Layer, run
from funcbp.trace import pass_views as views
from funcbp.trace.costs import flops_by_layer
from funcbp.trace.faults import Fault, faults
from funcbp.trace.ledger import saved
from funcbp.trace.marks import marking
from funcbp.trace.probe import Site, probed, rms, sites, slots
from funcbp.trace.rows import Parameter, Plan, Row, rows

__all__ = ["Pass", "of_model", "trace"]


class Pass(NamedTuple):
    """What `trace` saw; prints as a table.

    Attributes:
      loss: its value.
      rows: one a layer, in the order of the forward pass, each before those inside it.
      parameters: all of them.
      saved: bytes kept in all for the backward pass beyond the arguments.
      faults: what is wrong with it, in words; () if nothing is.
    """

    loss: float
    rows: tuple[Row, ...]
    parameters: tuple[Parameter, ...]
    saved: int
    faults: tuple[Fault, ...]

    table = views.table
    plot = views.plot
    to_json = views.to_json
    to_html = views.to_html
    _repr_html_ = views.fragment
    __rich__ = views.terminal

    def __str__(self) -> str:
        return views.text(self)


def trace(
    function: Layer | Callable[..., Array],
    *args: Any,
    loss: Callable[[PyTree], Array] | None = None,
    key: Array | None = None,
    train: bool = False,
) -> Pass:
    """Runs one forward and one backward pass, and records both layer by layer.

    Args:
      function: a model of `funcbp.layers`, then `args` are `params, state, *inputs`; or any
        function of `args` to a floating scalar, whose rows are the layers that it applies and the
        places marked with `funcbp.tap`.
      *args: the gradient is taken by the floating arrays of the first, the parameters. Leaves that
        are neither arrays nor Python floats are passed as they are.
      loss: of a model's output, to a floating scalar; not needed if the output is one.
      key: of a model that needs one.
      train: as in `Layer.apply`.

    Returns:
      A `Pass`. The pass is compiled, once for the same function, loss and shapes.

    Raises:
      InputError: there is no scalar to differentiate, nothing to differentiate by, or nothing to
        see; the arguments are shapes, or cannot be hashed where they are no arrays.
    """
    if not callable(function):
        raise InputError(f"trace takes a model or a function, got a {type(function).__name__}")
    if isinstance(function, Layer):
        if len(args) < 3:
            raise InputError(
                f"trace of a model takes params, state and its inputs, got {len(args)} of them; "
                "trace(model, *model.init(key, x), x, loss=loss)"
            )
        args = (*args, key)
        whole = of_model(function, loss, train)
    elif loss is not None or key is not None or train:
        raise InputError(
            "loss, key and train are for a model of funcbp.layers, got a "
            f"{type(function).__name__}; let the function itself return the loss"
        )
    else:
        whole = function
    leaves, tree = jax.tree.flatten(args)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise InputError("trace runs the function and needs arrays, got jax.ShapeDtypeStruct")
    fixed = tuple(None if _is_array(x) else (type(x), x) for x in leaves)
    try:
        program = _program(whole, tree, fixed)
    except TypeError as error:
        raise InputError(
            f"the function, and arguments that are no arrays, must be hashable: {error}; pass a "
            "module that holds arrays as the first argument of a function"
        ) from None
    value, norms, numbers, plan = program(*(x for x in leaves if _is_array(x)))
    return _pass(float(value), jax.device_get(norms), jax.device_get(numbers), plan)


@functools.lru_cache(maxsize=64)
def of_model(model: Layer, loss: Callable | None, train: bool = False) -> Callable:
    """The loss, or without one the output, as a function of params, state, *inputs and key."""

    def whole(params, state, *inputs_and_key):
        *inputs, key = inputs_and_key
        output, _ = run(model.name, model, params, state, tuple(inputs), key=key, train=train)
        return output if loss is None else loss(output)

    whole.__name__ = model.name
    return whole


def _is_array(x: Any) -> bool:
    return isinstance(x, float) or (hasattr(x, "shape") and hasattr(x, "dtype"))


@functools.lru_cache(maxsize=64)
def _program(function: Callable, tree: Any, fixed: tuple) -> Callable:
    """The compiled pass of the arrays among the arguments.

    It returns loss, RMS of parameters and gradients, numbers of the sites, and plan.
    """

    def arguments(arrays):
        rest = iter(arrays)
        return jax.tree.unflatten(tree, [next(rest) if f is None else f[1] for f in fixed])

    def call(*arrays):
        return function(*arguments(arrays))

    def program(*arrays):
        args = arguments(arrays)
        first = filter(_is_array, jax.tree.leaves(args[:1]))
        moving = [i for i, x in enumerate(first) if _floating(x)]
        _check(call, arrays, moving)
        with marking():
            closed = jax.make_jaxpr(call)(*arrays)
        found = tuple(sites(closed.jaxpr))
        if not found:
            raise InputError(
                "nothing to see: the function applies no layer of funcbp.layers and marks no "
                "place; mark one with x = funcbp.tap(x, 'name')"
            )

        def whole(moved, zeros):
            given = list(arrays)
            for i, x in zip(moving, moved, strict=True):
                given[i] = x
            (value,), seen = probed(closed, given, zeros)
            return value, seen

        params = [arrays[i] for i in moving]
        (value, seen), (gradients, arrived) = jax.value_and_grad(whole, (0, 1), has_aux=True)(
            params, slots(found)
        )
        norms = [(_norm(p), _norm(g)) for p, g in zip(params, gradients, strict=True)]
        return value, norms, (seen, arrived), _plan(function, args, closed, found)

    return jax.jit(program)


def _norm(x: Array) -> Array:
    """RMS; nan or inf where x holds such a number."""
    return jnp.where(jnp.all(jnp.isfinite(x)), rms(x), jnp.sum(x, dtype=jnp.float32))


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _check(function: Callable, arrays: tuple, moving: list[int]) -> None:
    if not moving:
        raise InputError(
            "the first argument is what the gradient is taken by and must hold floating arrays; "
            "pass the parameters there"
        )
    value = jax.eval_shape(function, *arrays)
    if not hasattr(value, "shape") or value.shape or not _floating(value):
        shown = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", value)
        raise InputError(
            f"a floating scalar is needed to go back from, got {shown}; for a model give "
            "loss=lambda output: ..., else let the function return its loss alone"
        )


def _plan(function: Callable, args: tuple, closed: Any, found: tuple[Site, ...]) -> Plan:
    def spec(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x

    specs = jax.tree.map(spec, args)
    floating = [
        (_path(keys), leaf.size)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(args[0])
        if _is_array(leaf) and _floating(leaf)
    ]
    flops = flops_by_layer(closed.jaxpr)
    kept = saved(function, *specs).by_layer()
    return Plan(found, tuple(floating), tuple(flops.items()), tuple(kept.items()))


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _pass(value: float, norms: Any, numbers: Any, plan: Plan) -> Pass:
    parameters = tuple(
        Parameter(path, size, float(p), float(g))
        for (path, size), (p, g) in zip(plan.paths, norms, strict=True)
    )
    found = tuple(rows(plan, numbers, parameters))
    return Pass(value, found, parameters, sum(n for _, n in plan.saved), faults(found))
