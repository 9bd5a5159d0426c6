"""A point that a function maps to itself, without the steps that found it.

    z* = f(z*)        f may close over parameters p

Backward. Differentiating both sides, dz*/dp = (1 - df/dz)^-1 df/dp at z*, so
    dp = (df/dp)^T u        u = dz + (df/dz)^T u

u is a fixed point too, of a linear map with the derivative that f has at z*: the same solver finds
it, at the same rate. f is linearised once, at z*.

Saves: z*, the output, and z0 and what f closes over, arguments. Nothing of the solver's steps, and
       nothing that grows with their number.
Edge:  z0 gets gradient 0: z* does not depend on it. Where the steps do not converge, value and
       gradient are nan: f must be a contraction near z* (all eigenvalues of df/dz within the unit
       circle), or a `solver` be given that does with less.
Dtype: iterates in the dtypes of z0, which f must return.
Ref:   Bai et al., 2019 (deep equilibrium models), theorem 1; Christianson, 1994.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax, tree
from jaxtyping import PyTree

from funcbp.case import Case, closing, uniform
from funcbp.core import InputError, op
from funcbp.ops._loops import iterate, solved, steady


def plain(
    f: Callable,
    z0: PyTree,
    *,
    solver: Callable | None = None,
    tol: float | None = None,
    max_steps: int = 1000,
) -> PyTree:
    """The fixed point z = f(z) that is reached from z0.

    Args:
      f: `f(z)` with the structure, shapes and dtypes of z. What it closes over gets gradients.
      z0: where to start, an array or a pytree of floating arrays.
      solver: `solver(f, z0)` returns the fixed point, for f and for the linear map of the backward
        pass. It is not differentiated, and must not close over traced arrays. By default f is
        applied until it changes nothing more.
      tol: end when no leaf changes by more than this times its largest element; by default 4 ulp.
        Only without `solver`.
      max_steps: end after so many steps. Only without `solver`. Where the last one still changed a
        leaf by more than `tol`, and than the square root of its dtype's epsilon, z is nan.

    Returns:
      z, in the structure, shapes and dtypes of z0.

    Raises:
      InputError: f returns another structure, shape or dtype, or z0 is not floating.
    """

    def solve(step, z):
        return _solve(step, z, solver, tol, max_steps)

    def inverse(apply, b):  # of apply: z -> z - df/dz z
        return solve(lambda u: _plus(_minus(u, apply(u)), b), b)

    def tangent(apply, b):
        return solved(inverse, apply, b)

    z0 = steady(f, lax.stop_gradient(z0))
    return lax.custom_root(lambda z: _minus(z, f(z)), z0, lambda _, z: solve(f, z), tangent)


def _solve(step, z, solver, tol, max_steps):
    return iterate(step, z, tol, max_steps) if solver is None else solver(step, z)


def _plus(a, b):
    return tree.map(jnp.add, a, b)


def _minus(a, b):
    return tree.map(jnp.subtract, a, b)


def check(f, z0, **settings):
    """Raises if f does not return what it takes, or z0 is not floating."""
    maps_to_itself(f, z0)


def maps_to_itself(f, z0):
    """Raises InputError if `f(z0)` has not the floating arrays of z0."""
    leaves = tree.leaves(z0)
    if not leaves or not all(jnp.issubdtype(a.dtype, jnp.floating) for a in leaves):
        raise InputError(
            f"z0 must be a pytree of floating arrays, got {jax.eval_shape(lambda: z0)}; convert it "
            "first, as in z0.astype(jnp.float32)"
        )
    given, returned = jax.eval_shape(lambda: z0), jax.eval_shape(f, z0)
    if tree.structure(given) != tree.structure(returned) or any(
        (a.shape, a.dtype) != (b.shape, b.dtype)
        for a, b in zip(tree.leaves(given), tree.leaves(returned), strict=True)
    ):
        raise InputError(
            f"f must return the structure, shapes and dtypes of z0, {given}, got {returned}; start "
            "from a z0 like what f returns"
        )


def fwd(f, z0, *, solver, tol, max_steps):
    z = _solve(f, z0, solver, tol, max_steps)
    return z, (f, z0, z)


def bwd(saved, dz, *, solver, tol, max_steps):
    f, _, z = saved
    to_z = jax.vjp(f, z)[1]
    u = _solve(lambda u: _plus(dz, to_z(u)[0]), dz, solver, tol, max_steps)
    df = jax.vjp(lambda f: f(z), f)[1](u)[0]
    return df, None


def examples(f, z0, **settings):
    return (steady(f, z0),)


def _layer(w, b, z):
    return jnp.tanh(0.2 * z @ w + b)


def _coupled(w, z):
    a, b = z["a"], z["b"]
    return {"a": jnp.cos(0.3 * a + w.sum() * b.sum() / 8), "b": 0.2 * jnp.sin(b + a[:2])}


def _babylonian(a, z):
    return (z + a / z) / 2


def _damped(f, z0):
    """A solver of a caller's own: half a step, a fixed number of times."""
    return lax.fori_loop(0, 90, lambda _, z: tree.map(lambda z, new: (z + new) / 2, z, f(z)), z0)


def _equilibrium(w, x, z):
    return jnp.tanh(z @ w + x)


fixed_point = op(
    plain,
    fwd,
    bwd,
    check=check,
    functions={"f": examples},
    cases=(
        Case("odd", closing(_layer, (3, 3), (3,)), (4, 3)),
        Case("tree", closing(_coupled, (2, 3)), {"a": (3,), "b": (2,)}, transformed=False),
        Case("square root", closing(_babylonian, uniform(1, low=0.5, high=4.0)),
             uniform(1, low=1.0, high=2.0), dtypes=("float32",), transformed=False),
        Case("a caller's solver", closing(_layer, (2, 2), (3, 2)), (3, 2), solver=_damped,
             transformed=False),
        Case("equilibrium layer", closing(_equilibrium, uniform(256, 256, low=-0.05, high=0.05),
             (1024, 256)), (1024, 256), bench=True),
    ),
)  # fmt: skip
