"""Step 5: the fully connected layer, element by element.

    ĥ_j = Σ_i w_ij h_i + b_j        h'_j = a(ĥ_j)

    ∂ĥ_j/∂h_i = w_ij        ∂ĥ_j/∂w_ij = h_i        ∂ĥ_j/∂b_j = 1        ∂h'_j/∂ĥ_j = a'(ĥ_j)

w_ij leads from input i to output j. In one line: h' = a(W h + b), with W the table of the w_ij
whose row is j and whose column is i.
"""

import jax
import jax.numpy as jnp
import numpy as np

from funcbp import ops

w = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])  # w[i, j]: 2 inputs, 3 outputs
b = jnp.array([0.1, 0.2, -0.3])
h = jnp.array([0.5, -0.25])


def affine(h, w, b):
    return h @ w + b


def text(matrix):
    return np.array2string(np.asarray(matrix) + 0.0, precision=4, suppress_small=True)


print("Before the activation: each derivative, and what JAX finds in its place\n")
by_h, by_w, by_b = jax.jacobian(affine, argnums=(0, 1, 2))(h, w, b)
for j in range(3):
    for i in range(2):
        print(
            f"∂ĥ_{j}/∂h_{i} = w_{i}{j} = {w[i, j]:5.2f}  ({by_h[j, i]:5.2f})     "
            f"∂ĥ_{j}/∂w_{i}{j} = h_{i} = {h[i]:5.2f}  ({by_w[j, i, j]:5.2f})"
        )
        assert by_h[j, i] == w[i, j]
        assert by_w[j, i, j] == h[i]
    print(f"∂ĥ_{j}/∂b_{j} = 1   =  1.00  ({by_b[j, j]:5.2f})")
    assert by_b[j, j] == 1

# The weights of one output do not touch another: ∂ĥ_j/∂w_ik = 0 for k ≠ j.
other = 1 - jnp.eye(3)
assert not jnp.any(by_w * other[:, None, :]) and not jnp.any(by_b * other)

print("\nAs the matrices of step 4: ∂ĥ/∂h, and ∂ĥ/∂θ with θ = [vec(W)ᵀ | bᵀ]ᵀ\n")
# vec(W) puts the columns of W, one below the other: first all weights of h_0, then those of h_1.
# Each such block is h_i times the identity, as each output has weights of its own.
eye = jnp.eye(3)
by_theta = jnp.concatenate([jnp.kron(h, eye), eye], axis=1)
print(f"∂ĥ/∂h = W =\n{text(w.T)}")
print(f"∂ĥ/∂θ = [hᵀ ⊗ I | I] =\n{text(by_theta)}")
assert jnp.array_equal(by_theta, jnp.concatenate([by_w.reshape(3, 6), by_b], axis=1))

print("\nThe way back, with the activation: no such matrix is built\n")
#     ∂L/∂ĥ_j  = ∂L/∂h'_j a'(ĥ_j)              each output alone
#     ∂L/∂h_i  = Σ_j ∂L/∂ĥ_j w_ij              the weights, walked back
#     ∂L/∂w_ij = h_i ∂L/∂ĥ_j                   what came in times what arrives
#     ∂L/∂b_j  = ∂L/∂ĥ_j
arriving = jnp.array([1.0, -2.0, 0.5])  # ∂L/∂h', from the layer above


def L(h, w, b):
    return jnp.sum(arriving * jnp.tanh(affine(h, w, b)))


d_hat = arriving * (1 - jnp.tanh(affine(h, w, b)) ** 2)
dh, dw, db = w @ d_hat, jnp.outer(h, d_hat), d_hat
print(f"∂L/∂ĥ = ∂L/∂h' a'(ĥ) = {text(d_hat)}")
print(f"∂L/∂h = Wᵀ ∂L/∂ĥ     = {text(dh)}")
print(f"∂L/∂w = h ⊗ ∂L/∂ĥ    =\n{text(dw)}")
print(f"∂L/∂b = ∂L/∂ĥ        = {text(db)}")


def by_the_library(h, w, b):
    return jnp.sum(arriving * ops.dense(h, w, b, activation="tanh"))


for mine, truth, library in zip(
    (dh, dw, db),
    jax.grad(L, argnums=(0, 1, 2))(h, w, b),
    jax.grad(by_the_library, argnums=(0, 1, 2))(h, w, b),
    strict=True,
):
    assert jnp.allclose(mine, truth, rtol=1e-5)
    assert jnp.allclose(library, truth, rtol=1e-5)
print("\njax.grad and funcbp.ops.dense agree")
