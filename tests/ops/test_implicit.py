"""Implicit differentiation: the gradients are those of the solution, whatever found it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp import InputError
from funcbp.check.compare import saved_bytes
from funcbp.ops import fixed_point, root

few = settings(derandomize=True, deadline=None, max_examples=6)
EPS = np.finfo(np.float32).eps


def close(got, truth, condition=1.0):
    """Within some ulp of the largest element, times what the problem makes of an error."""
    got, truth = np.asarray(got, np.float64), np.asarray(truth, np.float64)
    scale = np.max(np.abs(truth), initial=0.0)
    assert got.shape == truth.shape
    assert np.all(np.abs(got - truth) <= 32 * EPS * condition * scale), (got, truth)


def linear_problem(seed, n, norm):
    """A matrix of this norm, a vector, and a cotangent, in float64."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n))
    return a * norm / np.linalg.norm(a, 2), rng.standard_normal(n), rng.standard_normal(n)


@given(st.integers(0, 99), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.9]))
@few
def test_a_linear_fixed_point_has_its_analytic_gradient(seed, n, norm):
    """z = A z + b: with u = (1 - A^T)^-1 dz, db = u and dA = u z^T."""
    a, b, dz = linear_problem(seed, n, norm)
    z = np.linalg.solve(np.eye(n) - a, b)
    u = np.linalg.solve(np.eye(n) - a.T, dz)
    narrow = [jnp.asarray(v, jnp.float32) for v in (a, b, np.ones(n))]
    got, pullback = jax.vjp(lambda a, b, z0: fixed_point(lambda z: a @ z + b, z0), *narrow)
    da, db, dz0 = pullback(jnp.asarray(dz, jnp.float32))
    # The last step changed z by 4 ulp at most: the rest of the series is so much over 1 - norm.
    condition = 1 / (1 - norm) ** 2
    close(got, z, condition)
    close(db, u, condition)
    close(da, np.outer(u, z), condition)
    assert not jnp.any(dz0)


@given(st.integers(0, 99), st.integers(1, 5))
@few
def test_a_linear_root_has_its_analytic_gradient(seed, n):
    """(2 + A) z = b, in one Newton step."""
    a, b, dz = linear_problem(seed, n, 1.0)
    m = 2 * np.eye(n) + a
    z, u = np.linalg.solve(m, b), np.linalg.solve(m.T, dz)
    narrow = [jnp.asarray(v, jnp.float32) for v in (m, b, np.ones(n))]
    got, pullback = jax.vjp(lambda m, b, z0: root(lambda z: m @ z - b, z0), *narrow)
    dm, db, dz0 = pullback(jnp.asarray(dz, jnp.float32))
    close(got, z)
    close(db, u)
    close(dm, -np.outer(u, z))
    assert not jnp.any(dz0)


def babylonian(a):
    return fixed_point(lambda z: (z + a / z) / 2, jnp.ones_like(a))


def newton_root(a):
    return root(lambda z: z * z - a, jnp.ones_like(a))


@pytest.mark.parametrize("square_root", [babylonian, newton_root])
def test_three_derivatives_of_the_square_root(square_root):
    a = jnp.asarray([0.5, 1.0, 2.0, 9.0])
    ours, exact = square_root, jnp.sqrt
    for order in range(4):
        close(jax.jit(jax.vmap(ours))(a), jax.vmap(exact)(a), condition=4.0**order)
        ours, exact = jax.grad(ours), jax.grad(exact)


def layer(p, z):
    return {
        "a": jnp.tanh(p["w"] @ z["a"] + z["b"].sum(0) + p["x"]),
        "b": 0.1 * jnp.sin(z["b"] + z["a"]),
    }


def parameters(n=3):
    rng = np.random.default_rng(5)
    w, x = rng.standard_normal((n, n)), rng.standard_normal(n)
    return {"w": jnp.asarray(0.2 * w, jnp.float32), "x": jnp.asarray(x, jnp.float32)}


def start(n=3, rows=2):
    return {"a": jnp.zeros(n), "b": jnp.zeros((rows, n))}


def loss_of(z):
    return jnp.sum(jnp.cos(z["a"])) + jnp.sum(z["b"] ** 2)


def unrolled(p, steps=80):
    z, _ = jax.lax.scan(lambda z, _: (layer(p, z), None), start(), length=steps)
    return loss_of(z)


def implicit(p):
    return loss_of(fixed_point(lambda z: layer(p, z), start()))


def as_root(p):
    def f(z):
        return jax.tree.map(jnp.subtract, layer(p, z), z)

    return loss_of(root(f, start()))


def matrix_free(p):
    def f(z):
        return jax.tree.map(jnp.subtract, layer(p, z), z)

    return loss_of(root(f, start(), linear=gmres))


def gmres(apply, b):
    return jax.scipy.sparse.linalg.gmres(apply, b, tol=1e-7)[0]


def test_a_linear_solver_without_a_matrix():
    p = parameters()
    got, truth = jax.jit(jax.grad(matrix_free))(p), jax.jit(jax.grad(unrolled))(p)
    jax.tree.map(close, got, truth)


@pytest.mark.parametrize("function", [implicit, as_root])
def test_gradients_are_those_of_the_unrolled_steps(function):
    """Of a pytree; and Hessian-vector products, forward over reverse and reverse over reverse."""
    p = parameters()
    v = jax.tree.map(jnp.cos, p)

    def forward_over_reverse(f):
        return jax.jvp(jax.grad(f), (p,), (v,))[1]

    def reverse_over_reverse(f):
        def along(p):
            terms = jax.tree.map(lambda d, v: jnp.sum(d * v), jax.grad(f)(p), v)
            return sum(jax.tree.leaves(terms))

        return jax.grad(along)(p)

    close(function(p), unrolled(p))
    for derivative in (lambda f: jax.grad(f)(p), forward_over_reverse, reverse_over_reverse):
        got, truth = jax.jit(lambda d=derivative: (d(function), d(unrolled)))()
        jax.tree.map(lambda g, t: close(g, t, condition=8.0), got, truth)


def test_nothing_of_the_steps_is_saved():
    p, z0 = parameters(), start()
    size = sum(a.nbytes for a in jax.tree.leaves(z0))
    for steps in (10, 1000):
        kept = saved_bytes(
            lambda p, z0, n=steps: fixed_point(lambda z: layer(p, z), z0, max_steps=n), p, z0
        )
        assert kept == size
    kept = saved_bytes(lambda p, z0: root(lambda z: layer(p, z), z0), p, z0)
    assert kept == size
    assert saved_bytes(unrolled, p) > 80 * size


def test_a_caller_s_solver_finds_what_plain_steps_do_not():
    """f has slope -3: its own steps diverge, half steps of a solver converge, in both passes."""
    calls = []

    def averaged(f, z0):
        calls.append(f)
        return jax.lax.fori_loop(0, 60, lambda _, z: 0.7 * z + 0.3 * f(z), z0)

    def z(a, solver=None):
        return fixed_point(lambda z: a - 3 * z, jnp.zeros(()), solver=solver)

    value, slope = jax.value_and_grad(z)(2.0, averaged)
    close(value, 0.5)
    close(slope, 0.25)
    assert len(calls) == 2
    value, slope = jax.value_and_grad(z)(2.0)
    assert jnp.isnan(value)
    assert jnp.isnan(slope)


def test_a_caller_s_root_solver():
    def bisect(f, z0):
        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            below = f(middle) < 0
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        return jax.lax.fori_loop(0, 50, halve, (z0 - 4, z0 + 4))[0]

    def z(a):
        return root(lambda z: z**3 + z - a, jnp.zeros(()), solver=bisect)

    value, slope = jax.value_and_grad(z)(10.0)
    close(value, 2.0)
    close(slope, 1 / 13)


def test_what_does_not_converge_is_nan():
    """An orbit of two points, a slope beyond 1, too few steps, and a function without a root."""
    assert jnp.isnan(fixed_point(lambda z: 1 - z, jnp.zeros(())))
    assert jnp.isnan(fixed_point(lambda z: 2 * z + 1, jnp.ones(())))
    assert jnp.isnan(fixed_point(lambda z: 0.9 * z + 1, jnp.zeros(()), max_steps=5))
    assert jnp.isnan(root(lambda z: z * z + 1, jnp.ones(())))
    # Each entry of a batch for itself.
    both = jax.vmap(lambda a: fixed_point(lambda z: a * z + 1, jnp.zeros(())))(
        jnp.asarray([0.5, 3.0])
    )
    close(both[0], 2.0)
    assert jnp.isnan(both[1])


def test_a_tolerance_ends_early():
    def z(tol):
        return fixed_point(lambda z: 0.5 * z + 1, jnp.zeros(()), tol=tol)

    close(z(None), 2.0)
    assert 0.001 < abs(z(0.01) - 2.0) < 0.05


def test_solutions_of_zero_and_empty_arrays():
    close(fixed_point(lambda z: 0.5 * z, jnp.ones(3)), np.zeros(3))
    assert fixed_point(lambda z: 0.5 * z, jnp.ones((0, 3))).shape == (0, 3)
    assert root(lambda z: z - 1, jnp.ones((0, 3))).shape == (0, 3)


def test_inside_other_transformations():
    def z(a):
        return fixed_point(lambda z: jnp.cos(a * z), jnp.zeros(()))

    a = jnp.asarray([0.1, 0.5, 0.9])
    one_by_one = jnp.stack([jax.grad(z)(v) for v in a])
    close(jax.vmap(jax.grad(z))(a), one_by_one)
    close(jax.lax.map(jax.jit(jax.grad(z)), a), one_by_one)


@pytest.mark.parametrize("op", [fixed_point, root])
def test_what_does_not_fit_is_said(op):
    with pytest.raises(InputError, match="z0 must be a pytree of floating arrays"):
        op(lambda z: z, jnp.arange(3))
    with pytest.raises(InputError, match="z0 must be a pytree of floating arrays"):
        op(lambda z: z, {})
    with pytest.raises(InputError, match="f must return the structure"):
        op(lambda z: z[:2], jnp.ones(3))
    with pytest.raises(InputError, match="f must return the structure"):
        op(lambda z: (z, z), jnp.ones(3))
    with pytest.raises(InputError, match="f must be a function"):
        op(jnp.ones(3), jnp.ones(3))
