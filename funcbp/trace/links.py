"""What a chain is made of: its functions in the order of their calls, each with its parameters."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcbp.core import InputError
from funcbp.layers.layer import Layer, recording, run


class Link(NamedTuple):
    """One function of a chain, `h = call(params, h)`, with the place of its parameters.

    Attributes:
        name: the function's, or the layer's path below the model.
        call: `(params, h) -> h`.
        tree: the structure of `params`.
        order: for each part of theta, its number among the leaves of `params`.
        indices: for each part of theta, its number among the leaves of all parameters.
        parts: the path of each part of theta in `params`: `w`, `b`.
    """

    name: str
    call: Callable[[PyTree, PyTree], PyTree]
    tree: Any
    order: tuple[int, ...]
    indices: tuple[int, ...]
    parts: tuple[str, ...]

    def apply(self, theta: Sequence[Any], h: PyTree) -> PyTree:
        """The function's value; theta is the list of its parameters, weights before biases."""
        leaves = [value for _, value in sorted(zip(self.order, theta, strict=True), key=_first)]
        return self.call(jax.tree.unflatten(self.tree, leaves), h)


class Chain(NamedTuple):
    """The links, all of them as one function, and the leaves of the parameters."""

    links: tuple[Link, ...]
    whole: Link
    leaves: list[Any]
    tree: Any

    def theta(self, link: Link) -> list[Any]:
        """The arrays that make up a link's θ."""
        return [self.leaves[i] for i in link.indices]


def chain_of(
    functions: Any, x: PyTree, params: PyTree, state: PyTree, loss: Callable | None
) -> Chain:
    """Takes a model or functions apart into links."""
    if isinstance(functions, Layer):
        params, state = {} if params is None else params, {} if state is None else state
    else:
        functions = _checked_functions(functions)
        params = _checked_params(functions, params, state)
    leaves, tree = jax.tree.flatten(_arrays("params", params))
    # The same tree with the leaves' numbers in their places: a part of it tells which are whose.
    numbers = jax.tree.unflatten(tree, range(len(leaves)))
    if isinstance(functions, Layer):
        links = list(_layers(functions, params, state, numbers, x))
        total = _of_layer(functions, state)
    else:
        links = [_function(n, f, numbers[n]) for n, f in enumerate(functions)]
        total = _composed(links)
    links = [_weights_first(link, leaves) for link in links]
    if loss is not None:
        if not callable(loss):
            raise InputError(
                f"loss must be a function of the output, got {loss!r}; close over the labels: "
                "lambda y: criterion(y, labels).mean()"
            )
        links.append(_function(len(links), loss, None, name="loss"))
        total = _then(total, loss)
    # theta of the whole is that of its links, one after the other; so it needs no order of its own.
    indices = tuple(i for link in links for i in link.indices)
    whole = Link("whole", total, tree, indices, indices, ())
    if len(indices) != len(leaves):
        raise InputError(
            f"params must hold the layers' parameters alone, got {len(leaves)} arrays where the "
            f"layers take {len(indices)}; pass what init of this same model returned"
        )
    return Chain(tuple(links), whole, leaves, tree)


def _first(pair):
    return pair[0]


def _then(f: Callable, g: Callable) -> Callable:
    def composed(params, h):
        return g(f(params, h))

    return composed


def _composed(links: Sequence[Link]) -> Callable:
    links = tuple(links)

    def composed(params, h):
        leaves = jax.tree.leaves(params)
        for link in links:
            h = link.apply([leaves[i] for i in link.indices], h)
        return h

    return composed


def _checked_functions(functions: Any) -> list[Callable]:
    functions = [functions] if callable(functions) else functions
    if not isinstance(functions, Sequence) or not functions:
        raise InputError(
            "functions must be a model, or a list of at least one function, the first to be called "
            f"first, got {functions!r}"
        )
    for n, f in enumerate(functions):
        if not callable(f):
            raise InputError(f"functions[{n}] must be a function, got {type(f).__name__} {f!r}")
    return list(functions)


def _checked_params(functions: list[Callable], params: Any, state: Any) -> Sequence[Any]:
    if state is not None:
        raise InputError("state must be None for functions, got one; close over it")
    if params is None:
        return [None] * len(functions)
    if not isinstance(params, list | tuple) or len(params) != len(functions):
        got = f"{len(params)}" if isinstance(params, list | tuple) else type(params).__name__
        raise InputError(
            f"params must be a list with one entry for each of the {len(functions)} functions, got "
            f"{got}; put None for a function without parameters"
        )
    return params


def _arrays(what: str, tree: PyTree) -> PyTree:
    """The tree, its numbers made arrays; each must be floating."""

    def convert(path, leaf):
        where = f"{what}{jax.tree_util.keystr(path)}"
        array = as_array(where, leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(
                f"{where} must be floating, got {array.dtype}; keep what has no derivative in the "
                "state, or close over it"
            )
        return array

    return jax.tree_util.tree_map_with_path(convert, tree)


def as_array(what: str, leaf: Any) -> Any:
    """An array, or a `jax.ShapeDtypeStruct` as it is."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise InputError(
            f"{what} must be an array or a jax.ShapeDtypeStruct, got {type(leaf).__name__} {leaf!r}"
        ) from None


def _function(n: int, f: Callable, numbers: PyTree, name: str | None = None) -> Link:
    def call(params, h):
        if isinstance(f, Layer):
            return f({} if params is None else params, *_as_inputs(h))
        return f(h) if params is None else f(params, h)

    known = name or str(getattr(f, "__name__", getattr(f, "name", "")))
    return _link(known if known.isidentifier() else f"f{n + 1}", call, numbers)


def _link(name: str, call: Callable, numbers: PyTree) -> Link:
    leaves, tree = jax.tree_util.tree_flatten_with_path(numbers)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return Link(name, call, tree, tuple(range(len(leaves))), tuple(i for _, i in leaves),
                tuple(paths))  # fmt: skip


def _weights_first(link: Link, leaves: Sequence[Any]) -> Link:
    """The link with theta = [vec(W), b]: within one dict, arrays of more axes come first."""
    keys = [(part.rpartition("/")[0], -len(leaves[i].shape)) for part, i in
            zip(link.parts, link.indices, strict=True)]  # fmt: skip
    new = sorted(range(len(keys)), key=keys.__getitem__)
    return link._replace(
        order=tuple(link.order[i] for i in new),
        indices=tuple(link.indices[i] for i in new),
        parts=tuple(link.parts[i] for i in new),
    )


class _Seen:
    """Notes which layers a model applies, by path, in order."""

    def __init__(self):
        self.layers: dict[str, Layer] = {}

    def enter(self, path: str, layer: Layer, params: PyTree, inputs: tuple) -> tuple:
        self.layers[path] = layer
        return inputs

    def leave(self, path: str, layer: Layer, output: PyTree) -> PyTree:
        return output


def _layers(model: Layer, params, state, numbers, x) -> Iterator[Link]:
    """The layers of a `serial` model, those of a `serial` inside it too; else the model itself."""
    seen = _Seen()

    def forward(params, state, x):
        with recording(seen):
            return run(model.name, model, params, state, _as_inputs(x))[0]

    jax.eval_shape(forward, params, state, x)

    def walk(path: str, state: PyTree, numbers: PyTree) -> Iterator[Link]:
        layer = seen.layers[path]
        inside = [p for p in seen.layers if p.rpartition("/")[0] == path]
        if layer.name != "serial" or not inside:
            yield _link(path.partition("/")[2] or path, _of_layer(layer, state), numbers)
            return
        for child in inside:
            name = child.rpartition("/")[2]
            yield from walk(child, state.get(name, {}), numbers.get(name, {}))

    return walk(model.name, state, numbers)


def _of_layer(layer: Layer, state: PyTree) -> Callable:
    def call(params, h):
        return layer.apply(params, state, *_as_inputs(h))[0]

    return call


def _as_inputs(h: PyTree) -> tuple:
    return h if type(h) is tuple else (h,)


@contextlib.contextmanager
def place(n: int, link: Link) -> Iterator[None]:
    """Says which function of the chain an error came from."""
    try:
        yield
    except InputError as error:
        raise error.within(f"step {n}, {link.name}") from error.__cause__
    except Exception as error:
        error.add_note(f"in step {n} of the chain, {link.name}")
        raise
