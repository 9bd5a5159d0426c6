"""A root of a function, without the steps that found it.

    f(z*) = 0        f may close over parameters p

Backward. Differentiating both sides, dz*/dp = -(df/dz)^-1 df/dp at z*, so
    dp = -(df/dp)^T u        (df/dz)^T u = dz

f is linearised once, at z*, and one linear system is solved.

Saves: z*, the output, and z0 and what f closes over, arguments. Nothing of the solver's steps.
Edge:  z0 gets gradient 0: z* does not depend on it while it leads to the same root. Where Newton's
       steps do not converge, value and gradient are nan. At a multiple root df/dz is singular: z*
       has few digits, and the gradient is inf or nan, as its limit is.
Dtype: iterates in the dtypes of z0, which f must return. The dense solve is in float32 or wider.
Ref:   Blondel et al., 2022 (implicit differentiation), section 2.1; jax.lax.custom_root.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax, tree
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from funcbp.case import Case, closing, uniform
from funcbp.core import op
from funcbp.ops._loops import iterate, placed, solved, steady
from funcbp.ops._numeric import wide
from funcbp.ops.fixed_point import maps_to_itself


def dense(apply: Callable, b: PyTree) -> PyTree:
    """z with apply(z) = b, from the whole matrix of the linear map: n^2 numbers for n in z."""
    flat, unflatten = ravel_pytree(b)

    def column(unit):
        return ravel_pytree(apply(placed(unflatten(unit), b)))[0]

    matrix = jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
    return unflatten(jnp.linalg.solve(wide(matrix), wide(flat)).astype(flat.dtype))


def plain(
    f: Callable,
    z0: PyTree,
    *,
    solver: Callable | None = None,
    linear: Callable = dense,
    tol: float | None = None,
    max_steps: int = 100,
) -> PyTree:
    """The root f(z) = 0 that is reached from z0.

    Args:
      f: `f(z)` with the structure, shapes and dtypes of z. What it closes over gets gradients.
      z0: where to start, an array or a pytree of floating arrays.
      solver: `solver(f, z0)` returns the root. It is not differentiated, and must not close over
        traced arrays. By default Newton's method.
      linear: `linear(apply, b)` returns z with apply(z) = b for a linear function `apply`, in the
        backward pass and in each step of Newton's method. By default from the whole matrix, which
        has n^2 elements for n in z; for large z a solver that needs no matrix, as
        `lambda apply, b: jax.scipy.sparse.linalg.gmres(apply, b)[0]`.
      tol: Newton's method ends when no leaf changes by more than this times its largest element;
        by default 4 ulp.
      max_steps: or after so many steps. Where the last one still changed a leaf by more than `tol`,
        and than the square root of its dtype's epsilon, z is nan.

    Returns:
      z, in the structure, shapes and dtypes of z0.

    Raises:
      InputError: f returns another structure, shape or dtype, or z0 is not floating.
    """

    def tangent(apply, b):
        return solved(linear, apply, b)

    def solve(_, z):
        return _solve(f, z, solver, linear, tol, max_steps)

    return lax.custom_root(f, steady(f, lax.stop_gradient(z0)), solve, tangent)


def _solve(f, z0, solver, linear, tol, max_steps):
    if solver is not None:
        return solver(f, z0)

    def newton(z):
        residual, apply = jax.linearize(f, z)
        return tree.map(jnp.subtract, z, linear(apply, residual))

    return iterate(newton, steady(f, z0), tol, max_steps)


def check(f, z0, **settings):
    """Raises if f does not return what it takes, or z0 is not floating."""
    maps_to_itself(f, z0)


def fwd(f, z0, *, solver, linear, tol, max_steps):
    z = _solve(f, z0, solver, linear, tol, max_steps)
    return z, (f, z0, z)


def bwd(saved, dz, *, solver, linear, tol, max_steps):
    f, _, z = saved
    to_z = jax.vjp(f, z)[1]
    u = linear(lambda u: to_z(u)[0], dz)
    df = jax.vjp(lambda f: f(z), f)[1](tree.map(jnp.negative, u))[0]
    return df, None


def examples(f, z0, **settings):
    return (steady(f, z0),)


def _implicit_step(a, k, z):
    """An implicit Euler step of two coupled equations, which has a root for any a and k."""
    return z + 0.5 * jnp.tanh(z + z[::-1] * jnp.tanh((k * k).sum())) - a


def _square(a, z):
    return z * z - a


def _coupled(a, z):
    u, v = z["u"], z["v"]
    return {"u": u + 0.2 * jnp.sin(v.sum()) - a, "v": v + jnp.tanh(v) + 0.1 * u[:1]}


def _bisect(f, z0):
    """A solver of a caller's own, for elementwise f that rises and is 0 between -8 and 8."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = f(middle) < 0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    return lax.fori_loop(0, 60, halve, (z0 * 0 - 8, z0 * 0 + 8))[0]


def _cubic(a, z):
    return z * z * z + z - a


def _reaction(w, a, z):
    return z + 0.1 * jnp.tanh(w @ z) - a


root = op(
    plain,
    fwd,
    bwd,
    check=check,
    functions={"f": examples},
    cases=(
        Case("pair", closing(_implicit_step, (2,), (4,)), (2,)),
        Case("tree", closing(_coupled, (3,)), {"u": (3,), "v": (2, 1)}, transformed=False),
        Case("square root", closing(_square, uniform(low=0.5, high=4.0)),
             uniform(low=1.0, high=2.0), dtypes=("float32",), transformed=False),
        Case("a caller's solver", closing(_cubic, (3,)), (3,), solver=_bisect, transformed=False),
        Case("steady state", closing(_reaction, (256, 256), (256,)), (256,), bench=True),
    ),
)  # fmt: skip
