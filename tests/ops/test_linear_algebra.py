"""The ops of linear algebra against jnp.linalg in float64 and torch.linalg, and at ties."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp.core import InputError
from funcbp.ops import cholesky, eigh, inv, logdet, solve, svd

OURS = types.SimpleNamespace(eigh=eigh, svd=svd)
EPS = 2.0**-52
FEW = settings(derandomize=True, deadline=None, max_examples=5)
BATCHES = st.sampled_from([(), (2,), (1, 2)])
SIZES = st.sampled_from([0, 1, 3])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def well(seed, *batch, n):
    """Matrices of condition at most about 10."""
    return draw(seed, *batch, n, n) / (2 * max(n, 1)) + 2 * jnp.eye(n)


def rotation(seed, n):
    return jnp.linalg.qr(draw(seed, n, n))[0]


def same(got, expected, condition=1e3):
    """Equal but for rounding in float64, which the problem enlarges by less than `condition`."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = np.asarray(g), np.asarray(e)
        assert g.shape == e.shape
        scale = max(1.0, np.max(np.abs(e), initial=0.0))
        np.testing.assert_allclose(g, e, rtol=0, atol=condition * EPS * scale)


def pulled_back(f, *args):
    """The value, and the cotangents for one that is fixed and dense."""

    @jax.jit
    def run(*args):
        y, pullback = jax.vjp(f, *args)
        dy = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size) + 1.0).reshape(a.shape), y)
        return y, pullback(dy)

    return run(*args)


def torch_pulled_back(f, *args):
    torch = pytest.importorskip("torch")
    args = [torch.tensor(np.asarray(a), requires_grad=True) for a in args]
    y = f(torch.linalg, *args)
    dy = np.cos(np.arange(y.numel()) + 1.0).reshape(tuple(y.shape))
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), tuple(a.grad.numpy() for a in args)


@FEW
@given(st.integers(0, 9), BATCHES, BATCHES, SIZES, st.sampled_from([0, 1, 3]))
def test_solve(seed, left, right, n, k):
    a, b = well(seed, *left, n=n), draw(seed + 1, *right, n, k)
    ours = pulled_back(solve, a, b)
    same(ours, pulled_back(jnp.linalg.solve, a, b))

    def with_as_many_axes(linalg, a, b):  # torch may take fewer for vectors
        return linalg.solve(a, b[(None,) * (a.ndim - b.ndim)])

    same(ours, torch_pulled_back(with_as_many_axes, a, b))


@FEW
@given(st.integers(0, 9), BATCHES, SIZES)
def test_solve_for_a_vector(seed, batch, n):
    a, b = well(seed, *batch, n=n), draw(seed + 1, n)
    same(pulled_back(solve, a, b), pulled_back(jnp.linalg.solve, a, b))


@FEW
@given(st.integers(0, 9), BATCHES, SIZES)
def test_inv_and_logdet(seed, batch, n):
    a = well(seed, *batch, n=n)
    a = a.at[..., ::-1, :].set(a)  # rows in the other order: pivots, and a negative determinant
    ours = pulled_back(inv, a)
    same(ours, pulled_back(jnp.linalg.inv, a))
    same(ours, torch_pulled_back(lambda linalg, a: linalg.inv(a), a))
    ours = pulled_back(logdet, a)
    same(ours, pulled_back(lambda a: jnp.linalg.slogdet(a)[1], a))
    same(ours, torch_pulled_back(lambda linalg, a: linalg.slogdet(a)[1], a))
    same(jax.grad(lambda a: logdet(a).sum())(a), jnp.linalg.inv(a).mT)


def read(a, symmetrize, uplo="L"):
    """The symmetric matrix that is meant by a, or by one triangle of it."""
    if symmetrize:
        return a
    t = jnp.triu(a, 1) if uplo == "U" else jnp.tril(a, -1)
    return t + t.mT + a * jnp.eye(a.shape[-1])


@FEW
@given(st.integers(0, 9), BATCHES, SIZES, st.booleans(), st.booleans())
def test_cholesky(seed, batch, n, upper, symmetrize):
    a = well(seed, *batch, n=n)
    a = a @ a.mT + 0.01 * draw(seed + 1, *batch, n, n)
    settings = {"upper": upper, "symmetrize_input": symmetrize}
    ours = pulled_back(lambda a: cholesky(a, **settings), a)
    same(ours, pulled_back(lambda a: jnp.linalg.cholesky(read(a, symmetrize), upper=upper), a))
    if symmetrize:
        torch = torch_pulled_back(lambda linalg, a: linalg.cholesky((a + a.mT) / 2, upper=upper), a)
        same(ours, torch)


def separated(seed, *batch, n):
    """Symmetric matrices of which no two eigenvalues are nearer than 1."""
    q = jnp.linalg.qr(draw(seed, *batch, n, n))[0]
    return q * jnp.arange(1.0, n + 1) @ q.mT


@FEW
@given(st.integers(0, 9), BATCHES, SIZES, st.sampled_from([None, "L", "U"]), st.booleans())
def test_eigh(seed, batch, n, uplo, symmetrize):
    a = separated(seed, *batch, n=n) + 0.01 * draw(seed + 1, *batch, n, n)
    ours = pulled_back(lambda a: tuple(eigh(a, uplo, symmetrize)), a)
    whole = pulled_back(lambda a: tuple(jnp.linalg.eigh(read(a, symmetrize, uplo), uplo)), a)
    same(ours, whole)

    def spread(linalg, a):  # what it makes of v does not depend on signs
        w, v = linalg.eigh((a + a.mT) / 2)
        return v * w[..., None, :] ** 3 @ v.mT

    ours = pulled_back(lambda a: spread(OURS, a), a)
    same(ours, torch_pulled_back(spread, a))


@FEW
@given(st.integers(0, 9), BATCHES, SIZES, st.sampled_from([1, 2, 4]))
def test_svd(seed, batch, m, n):
    k = min(m, n)
    u, v = (jnp.linalg.qr(draw(seed + i, *batch, j, j))[0] for i, j in enumerate((m, n)))
    a = u[..., :k] * jnp.arange(k, 0.0, -1) @ v[..., :k].mT
    ours = pulled_back(lambda a: tuple(svd(a, full_matrices=False)), a)
    same(ours, pulled_back(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)), a))
    ours = pulled_back(lambda a: svd(a, compute_uv=False), a)
    same(ours, pulled_back(lambda a: jnp.linalg.svd(a, compute_uv=False), a))

    def spread(linalg, a):
        u, s, vh = linalg.svd(a, full_matrices=False)
        return u * s[..., None, :] ** 3 @ vh

    ours = pulled_back(lambda a: spread(OURS, a), a)
    same(ours, torch_pulled_back(spread, a))


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (3, 3)])
def test_svd_of_all_columns_has_the_derivative_of_its_projections(shape):
    """The columns that are added span what the others do not: 1 - u u^T."""
    m, n = shape
    a, g = draw(3, m, n), draw(4, max(shape), max(shape))

    def full(a):
        u, _, vh = svd(a)
        b = u[:, n:] if m > n else vh[m:].T
        return jnp.vdot(g, b @ b.T) if m != n else jnp.vdot(g, u @ vh)

    def thin(a):
        u, _, vh = jnp.linalg.svd(a, full_matrices=False)
        b = u if m > n else vh.T
        return -jnp.vdot(g, b @ b.T) if m != n else jnp.vdot(g, u @ vh)

    same(jax.grad(full)(a), jax.grad(thin)(a))


TIED = (1.0, 1.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize("values", [TIED, (0.0,) * 5, (2.0,) * 5])
def test_eigh_at_ties_has_the_gradient_of_sums(values):
    q = rotation(0, 5)
    a = q * jnp.array(values) @ q.T
    got = jax.grad(lambda a: jnp.sum(jnp.sin(eigh(a).eigenvalues)))(a)
    same(got, q * jnp.cos(jnp.array(values)) @ q.T)
    _, (da,) = pulled_back(lambda a: tuple(eigh(a)), a)
    assert np.all(np.isfinite(da))


def test_eigh_at_ties_has_the_gradient_of_a_projector():
    """p = sum of v v^T over one value: dp = sum v_k m_kl v_l / (w_k - w_l), k in it and l not."""
    q, g = rotation(1, 5), draw(2, 5, 5)
    a = q * jnp.array(TIED) @ q.T

    def projected(a):
        v = eigh(a).eigenvectors[:, :2]
        return jnp.vdot(g, v @ v.T)

    m = q.T @ (g + g.T) @ q
    w = jnp.array(TIED)
    first = w == 1.0
    between = jnp.where(first[:, None] != first[None, :], -0.25 * m, 0)
    same(jax.grad(projected)(a), q @ between @ q.T)


@pytest.mark.parametrize("values", [(2.0, 2.0, 1.0), (2.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize(("shape", "full"), [((3, 3), True), ((5, 3), True), ((3, 4), False)])
def test_svd_at_ties_and_zeros_has_the_gradient_of_sums(values, shape, full):
    m, n = shape
    u, v = rotation(5, m)[:, :3], rotation(6, n)[:, :3]
    s = jnp.array(values)
    a = u * s @ v.T
    # An odd function of s has no kink at 0, so that any basis there gives its one gradient.
    expected = u * (3 * s**2) @ v.T
    got = jax.grad(lambda a: jnp.sum(svd(a, full).S ** 3))(a)
    same(got, expected)
    _, (da,) = pulled_back(lambda a: tuple(svd(a, full)), a)
    assert np.all(np.isfinite(da))
    same(jax.grad(lambda a: jnp.sum(svd(a, compute_uv=False) ** 3))(a), expected)


def test_svd_at_zero_has_a_subgradient_of_the_nuclear_norm():
    a = jnp.zeros((3, 2))
    da = jax.grad(lambda a: svd(a, compute_uv=False).sum())(a)
    assert np.linalg.norm(da, 2) <= 1 + 4 * EPS


def test_second_derivatives_are_those_of_the_traces():
    """sum w^3 = trace a^3 and sum s^4 = trace (a^T a)^2; at ties they are finite."""
    q, da = rotation(7, 3), draw(8, 3, 3)
    a, tied = (q * jnp.array(w) @ q.T for w in ([1.0, 1.5, 2.0], [1.0, 1.0, 2.0]))
    da += da.T

    def cubes(a):
        return jnp.sum(eigh(a).eigenvalues ** 3)

    def fourths(a):
        return jnp.sum(svd(a, compute_uv=False) ** 4)

    def along(f, a):
        return jax.jvp(jax.grad(f), (a,), (da,))[1]

    same(along(cubes, a), 3 * (a @ da + da @ a))
    same(along(fourths, a), along(lambda a: jnp.sum((a.T @ a) ** 2), a))
    assert np.all(np.isfinite(along(cubes, tied))) and np.all(np.isfinite(along(fourths, tied)))


@pytest.mark.parametrize("singular", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 4.0]]])
def test_singular_matrices(singular):
    a = jnp.array(singular)
    assert logdet(a) == -jnp.inf
    assert not np.any(np.isfinite(inv(a)))
    assert not np.any(np.isfinite(solve(a, jnp.ones(2))))
    assert np.all(np.isnan(cholesky(-jnp.eye(2))[jnp.tril_indices(2)]))


BAD = [
    (lambda: solve(jnp.ones((2, 3)), jnp.ones(2)), r"\[\.\.\., n, n\]"),
    (lambda: solve(jnp.eye(2), jnp.ones(3)), "b must be"),
    (lambda: solve(jnp.ones((2, 2, 2)), jnp.ones((3, 2, 1))), "broadcast"),
    (lambda: inv(jnp.ones((2, 3))), r"\[\.\.\., n, n\]"),
    (lambda: logdet(jnp.ones(3)), r"\[\.\.\., n, n\]"),
    (lambda: cholesky(jnp.ones((2, 3))), r"\[\.\.\., n, n\]"),
    (lambda: eigh(jnp.ones((2, 3))), r"\[\.\.\., n, n\]"),
    (lambda: eigh(jnp.eye(2), "lower"), "UPLO"),
    (lambda: svd(jnp.ones(3)), r"\[\.\.\., m, n\]"),
    (lambda: svd(jnp.eye(2), hermitian=True), "eigh"),
    (lambda: svd(jnp.eye(2), subset_by_index=(0, 1)), "subset_by_index"),
]


@pytest.mark.parametrize(("call", "said"), BAD)
def test_bad_arguments(call, said):
    with pytest.raises(InputError, match=said):
        call()
