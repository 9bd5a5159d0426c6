"""Custom rules of installed packages, as their users call them: none is called wrong that is right.

What the auditor found wrong there stands in `examples/found_in_the_wild.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import funcbp

RNG = np.random.default_rng(2)
X = jnp.asarray(RNG.standard_normal((4, 5)), jnp.float32)
P = jnp.exp(0.3 * X)
U = jax.nn.sigmoid(X)
A = X[:, :4]
S = A @ A.T + jnp.eye(4)


def attention(q):
    return jax.nn.dot_product_attention(*[q.reshape(1, 4, 1, 5)] * 3)


def cube_root(a):
    def solve(f, x):
        return jax.lax.fori_loop(0, 40, lambda i, x: x - f(x) / (3 * x * x), x)

    return jax.lax.custom_root(lambda x: x**3 - a, a, solve, lambda g, y: y / g(1.0))


def conjugate_gradients(b):
    return jax.scipy.sparse.linalg.cg(lambda v: S @ v, b)[0]


def ctc(logits):
    labels = jnp.array([[1, 2]])
    return optax.ctc_loss(logits[None], jnp.zeros((1, 4)), labels, jnp.zeros((1, 2)))


def layer(x):
    module = linen.LayerNorm()
    return module.apply(module.init(jax.random.key(0), x), x)


def mlp(x):
    model = eqx.nn.MLP(5, 3, 8, 1, jax.nn.gelu, key=jax.random.key(0))
    return jax.vmap(model)(x)


def linear_solve(a, b):
    import lineax

    return lineax.linear_solve(lineax.MatrixLinearOperator(a), b, lineax.QR()).value


def root_find(a):
    import optimistix

    newton = optimistix.Newton(1e-6, 1e-6)
    return optimistix.root_find(lambda y, a: y**3 + y - a, newton, jnp.float32(0.5), args=a).value


def fixed_point(a):
    import optimistix

    solver = optimistix.FixedPointIteration(1e-6, 1e-6)
    start = jnp.float32(0.5)
    return optimistix.fixed_point(lambda y, a: 0.5 * jnp.cos(y * a), solver, start, args=a).value


def differential_equation(y, a):
    import diffrax

    field = diffrax.ODETerm(lambda t, y, a: -a * y + jnp.sin(t))
    return diffrax.diffeqsolve(field, diffrax.Heun(), 0, 1, 0.25, y, args=a, max_steps=8).ys


def binomial(logits):
    from numpyro import distributions

    return distributions.Binomial(5, logits=logits).log_prob(jnp.array([0, 1, 3, 5]))


def sinkhorn(x, y):
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

    problem = linear_problem.LinearProblem(pointcloud.PointCloud(x, y, epsilon=0.5))
    solver = sinkhorn.Sinkhorn(implicit_diff=implicit_differentiation.ImplicitDiff())
    return solver(problem).reg_ot_cost


def simplex(x):
    from jaxopt import projection

    return projection.projection_simplex(x)


def spherical_harmonics(x):
    import e3nn_jax

    algorithm = ("recursive", "dense", "custom_jvp")
    return e3nn_jax.sh((1, 2, 3), x, normalize=False, algorithm=algorithm)


CALLS = {
    "jax.nn.relu": (jax.nn.relu, X),
    "jax.nn.silu": (jax.nn.silu, X),
    "jax.nn.gelu": (jax.nn.gelu, X),
    "jax.nn.softmax": (jax.nn.softmax, X),
    "jax.nn.logsumexp": (jax.nn.logsumexp, X),
    "jax.nn.softplus": (jax.nn.softplus, X),
    "jax.nn.dot_product_attention": (attention, X),
    "jnp.logaddexp": (jnp.logaddexp, X, X[::-1]),
    "jnp.sinc": (jnp.sinc, X),
    "jnp.linalg.slogdet": (jnp.linalg.slogdet, S),
    "jax.scipy.special.xlogy": (jax.scipy.special.xlogy, P, P[::-1]),
    "jax.scipy.special.xlog1py": (jax.scipy.special.xlog1py, P, P[::-1]),
    "jax.scipy.special.i0e": (jax.scipy.special.i0e, X),
    "jax.scipy.special.zeta": (jax.scipy.special.zeta, P[0] + 1, P[1]),
    "jax.lax.custom_root": (cube_root, 2.0),
    "jax.scipy.sparse.linalg.cg": (conjugate_gradients, X[:, 0]),
    "optax.sigmoid_binary_cross_entropy": (optax.sigmoid_binary_cross_entropy, X, U),
    "optax.safe_softmax_cross_entropy": (optax.safe_softmax_cross_entropy, X, jax.nn.softmax(X)),
    "optax.ctc_loss": (ctc, X),
    "optax.projections.projection_simplex": (optax.projections.projection_simplex, X[0]),
    "flax LayerNorm": (layer, X),
    "equinox MLP": (mlp, X),
    "lineax.linear_solve": (linear_solve, S, X[:, 0]),
    "optimistix.root_find": (root_find, jnp.float32(1.3)),
    "optimistix.fixed_point": (fixed_point, jnp.float32(1.3)),
    "diffrax.diffeqsolve": (differential_equation, X[0, :2], jnp.float32(1.3)),
    "numpyro Binomial": (binomial, X[:, 0]),
    "ott Sinkhorn": (sinkhorn, X[:, :2], X[::-1, 2:4]),
    "jaxopt.projection_simplex": (simplex, X[0]),
    "e3nn_jax.sh": (spherical_harmonics, X[:2, :3]),
}


# What these packages warn of when they are imported is theirs.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_no_alarm_and_no_crash(name):
    f, *args = CALLS[name]
    report = funcbp.audit(f, *args, seconds=4)
    assert report.ok, report
    # equinox has functions that refuse to be differentiated.
    judged = [g for g in report.findings if "cannot be autodifferentiated" not in g.message]
    assert all(g.verdict in ("right", "surrogate") for g in judged), report
