"""What rules share that run a given function in a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, tree
from jax.flatten_util import ravel_pytree

from funcbp.core import InputError
from funcbp.mesh import vary, varying
from funcbp.ops._numeric import loop_zeros


def steady(step: Callable, carry: Any, *examples: Any) -> Any:
    """carry in the mesh types in which `step(carry, *examples)` returns it, as a loop needs it.

    A function may close over arrays that vary over mesh axes, or are sharded, where its argument
    is not; then so is its result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.manual_axes or mesh.explicit_axes):
        return carry
    given, structure = tree.flatten(carry)
    returned = jax.make_jaxpr(step)(carry, *examples).out_avals
    axes = frozenset().union(*map(varying, (*map(jax.typeof, given), *returned)))
    leaves = [_typed(leaf, aval, axes) for leaf, aval in zip(given, returned, strict=True)]
    return tree.unflatten(structure, leaves)


def placed(x: Any, like: Any) -> Any:
    """x in the mesh types of `like`, leaf by leaf."""

    def one(x, like):
        aval = jax.typeof(like)
        return _typed(x, aval, varying(aval))

    return tree.map(one, x, like)


def _typed(leaf: Any, aval: Any, axes: frozenset) -> Any:
    leaf = vary(leaf, axes)
    if aval.sharding.mesh.explicit_axes and aval.sharding != jax.typeof(leaf).sharding:
        leaf = jax.sharding.reshard(leaf, aval.sharding)
    return leaf


def depth(params: Any) -> int:
    """The number of layers: the length of the leading axis, or 1 for no parameters.

    Raises InputError if the arrays do not share a leading axis.
    """
    shapes = [a.shape for a in tree.leaves(params)]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) > 1 or () in lengths:
        raise InputError(
            f"every array of params must have the same leading axis, the layers, got shapes "
            f"{shapes}; stack them, as in jax.tree.map(lambda *a: jnp.stack(a), *layers)"
        )
    return shapes[0][0] if shapes else 1


def first(params: Any) -> Any:
    """The first layer's parameters; their shapes and dtypes where there is no layer."""

    def one(a):
        return a[0] if len(a) else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)

    return tree.map(one, params)


def iterate(step: Callable, z: Any, tol: float | None, max_steps: int) -> Any:
    """z, replaced by step(z) until that changes it no more.

    Ends when no leaf changes by more than `tol` (None: 4 ulp) times its largest element, or after
    `max_steps`. nan where the last change was larger than that, and than the square root of the
    dtype's epsilon: the steps do not converge.
    """
    z = steady(step, z)

    def changed(new, old):
        """The largest change of a leaf, as a multiple of what ends the loop, and of sqrt(eps)."""
        most, loose = loop_zeros((), new), loop_zeros((), new)
        for a, b in zip(tree.leaves(new), tree.leaves(old), strict=True):
            eps = float(jnp.finfo(a.dtype).eps)
            size, change = (jnp.max(jnp.abs(v), initial=0.0) for v in (a, a - b))
            ratio = jnp.where(change == 0, 0, change / size).astype(most.dtype)
            end = 4 * eps if tol is None else tol
            most = jnp.maximum(most, ratio / end)
            loose = jnp.maximum(loose, ratio / max(end, eps**0.5))
        return most, loose

    def going(carry):
        count, _, (most, _) = carry
        return (count < max_steps) & (most > 1)

    def body(carry):
        count, z, _ = carry
        new = step(z)
        return count + 1, new, changed(new, z)

    start = loop_zeros((), z) + jnp.inf
    _, z, (_, loose) = lax.while_loop(going, body, (0, z, (start, start)))
    return tree.map(lambda v: jnp.where(loose <= 1, v, jnp.nan), z)


def solved(inverse: Callable, apply: Callable, b: Any) -> Any:
    """`inverse(apply, b)`, the solution z of apply(z) = b, differentiable as such.

    In one vector: `lax.custom_linear_solve` has no transpose where only some leaves of b are
    differentiated.
    """
    flat, back = ravel_pytree(b)

    def joined(v):
        return ravel_pytree(apply(back(v)))[0]

    def solve(joined, v):
        return ravel_pytree(inverse(lambda z: back(joined(ravel_pytree(z)[0])), back(v)))[0]

    return back(lax.custom_linear_solve(joined, flat, solve, solve))
