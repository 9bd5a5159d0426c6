"""Step 2: N functions in series, and the product of their Jacobians.

    h_0 = x        h_n = f_n(h_{n-1})        L = h_N

    ∂L/∂x = ∂h_N/∂h_{N-1} · ∂h_{N-1}/∂h_{N-2} · … · ∂h_1/∂h_0

The product may be taken from either end; the result is the same, the work is not. L is one number,
so from the left every intermediate result is one row. From the right it is a whole matrix.
"""

import jax
import jax.numpy as jnp

from funcbp.trace import chain_rule


def stretch(h):
    return jnp.array([[1.0, -2.0], [0.5, 1.0], [0.0, 3.0]]) @ h


def squash(h):
    return jnp.tanh(h)


def length(h):
    return jnp.sum(h**2)


functions = [stretch, squash, length]
x = jnp.array([0.3, -0.2])


def composed(x):
    for f in functions:
        x = f(x)
    return x


print("Forward, keeping each h_n; then the product from the left, by hand\n")
h_0 = x
h_1 = stretch(h_0)
h_2 = squash(h_1)

row = 2 * h_2  # ∂L/∂h_2, one row
print(f"∂L/∂h_2                       = {row}")
row = row @ jnp.diag(1 - h_2**2)  # squash works on each number alone: a diagonal
print(f"∂L/∂h_1 = ∂L/∂h_2 · ∂h_2/∂h_1 = {row}")
row = row @ jnp.array([[1.0, -2.0], [0.5, 1.0], [0.0, 3.0]])
print(f"∂L/∂h_0 = ∂L/∂h_1 · ∂h_1/∂h_0 = {row}")
print(f"jax.grad                      = {jax.grad(composed)(x)}")
assert jnp.allclose(row, jax.grad(composed)(x), rtol=1e-5)

print("\nThe same, shown by funcbp: the last function first\n")
result = chain_rule(functions, x)
print(result)
assert jnp.allclose(result.input_gradient, row, rtol=1e-5)

print("\nWide functions, where the order counts: 8 of 256 numbers, then the length\n")
matrices = jax.random.normal(jax.random.key(0), (8, 256, 256)) / 16
wide = [lambda h, m=m: jnp.tanh(m @ h) for m in matrices] + [length]
result = chain_rule(wide, jnp.ones(256))
print(result)
assert result.flops_right == sum(2 * 256**3 for _ in range(7)) + 2 * 256**2
assert result.flops_left == sum(2 * 256**2 for _ in range(8))
assert result.error is not None and result.error < 1e-5
