"""The same block many times over, and a choice of what its layers keep for the backward pass.

    x_l = f(p_l, x_{l-1})        l = 1 .. L

Not a rule: `lax.scan` and `jax.checkpoint`, put together so that each choice keeps what it says.
Backward, a layer whose intermediates are not kept runs again, from the nearest input that is.

Saves: `store="all"`      every layer's intermediates: what JAX keeps by itself
       `store="none"`     every layer's input, and computes one layer again at a time
       `store=k`          the input of each k-th layer, and computes k layers again at a time
       `store="sqrt"`     the same for a divisor k of L near its square root
       `store=(True, ..)` for each layer, its intermediates (True) or its input (False)
       In any case x and params, arguments.
Edge:  no layers: the result is x.
Dtype: that of x, which f must return.
Ref:   Chen et al., 2016 (sublinear memory cost), section 3.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
from jax import lax, tree
from jaxtyping import Array, Float, PyTree

from funcbp.core import InputError
from funcbp.ops._loops import depth, first, steady

Store = str | int | tuple[bool, ...]


def repeat(
    f: Callable, params: PyTree, x: Float[Array, "..."], *, store: Store = "all"
) -> Float[Array, "..."]:
    """f applied once for each layer of params, each time to the last result.

    Args:
      f: `f(p, x)` with the shape and dtype of x, where p is one layer's part of params.
      params: a pytree of arrays whose leading axis is the layers.
      x: any shape.
      store: what is kept for the backward pass. "all": every layer's intermediates. "none": every
        layer's input only. A number k: the input of each k-th layer only. "sqrt": the same with k
        near the square root of the depth. A tuple of a bool for each layer: its intermediates
        (True) or its input (False). What is not kept is computed again: one more forward pass.

    Returns:
      The shape and dtype of x.

    Raises:
      InputError: the leading axes of params differ, f returns another shape or dtype, or there is
        no such `store`.
    """

    def layer(x, p):
        return f(p, x), None

    runs = list(_runs(store, depth(params)))
    got = jax.eval_shape(f, first(params), x)
    if [(a.shape, a.dtype) for a in tree.leaves(got)] != [(x.shape, x.dtype)]:
        raise InputError(f"f must return x's shape and dtype, {x.dtype}{list(x.shape)}, got {got}")
    x = steady(lambda x, p: f(p, x), x, first(params))
    for start, stop, chunk in runs:
        cut = functools.partial(lax.slice_in_dim, start_index=start, limit_index=stop)
        x = _run(layer, tree.map(cut, params) if len(runs) > 1 else params, x, chunk)
    return x


def _run(layer: Callable, params: PyTree, x: Array, chunk: int) -> Array:
    """All layers, of which `chunk` together keep one input; 0 keeps every intermediate."""
    if not chunk:
        return lax.scan(layer, x, params)[0]

    def layers(x, p):
        return lax.scan(layer, x, p)[0], None

    count = depth(params) // chunk
    if chunk > 1:
        params = tree.map(lambda a: a.reshape(count, chunk, *a.shape[1:]), params)
    # In a loop nothing can be shared between the passes; XLA removes a loop of one step.
    again = jax.checkpoint(layer if chunk == 1 else layers, prevent_cse=count == 1)
    return lax.scan(again, x, params)[0]


def _runs(store: Store, layers: int) -> Iterator[tuple[int, int, int]]:
    """Layers `start` to `stop` with the `chunk` of `_run`."""
    if isinstance(store, tuple) and len(store) == layers:
        ends = 0
        for kept, run in itertools.groupby(store):
            start, ends = ends, ends + len(list(run))
            yield start, ends, 0 if kept else 1
        return
    chunks = {"all": 0, "none": 1, "sqrt": _near_root(layers)}
    chunk = chunks.get(store) if isinstance(store, str) else store
    if isinstance(chunk, bool) or not isinstance(chunk, int) or (chunk < 1 and store != "all"):
        raise InputError(
            f'store must be "all", "none", "sqrt", a number of layers from 1 on, or a tuple of '
            f"{layers} bools, one for each layer, got {store!r}"
        )
    if not chunk:
        yield 0, layers, 0
        return
    whole = layers // chunk * chunk
    if whole:
        yield 0, whole, chunk
    if whole < layers:
        yield whole, layers, layers - whole


def _near_root(layers: int) -> int:
    """A divisor of the number of layers near its root, or where none is, the root, rounded up.

    Layers left over are cut off params, which copies them.
    """
    root = math.sqrt(layers)
    near = [k for k in range(1, layers + 1) if layers % k == 0 and root / 2 <= k <= 2 * root]
    return min(near, key=lambda k: abs(k - root), default=max(1, math.ceil(root)))
