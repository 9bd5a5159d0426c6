"""Step 1: two functions in series.

    h = f(x)        y = g(h)        dy/dx = dy/dh · dh/dx

Move x a little, and h moves dh/dx times as far; then y moves dy/dh times as far as h did. So the
slopes are multiplied, each taken at the place where its function was evaluated.
"""

import jax
import jax.numpy as jnp


def f(x):
    return x**2


def g(h):
    return jnp.sin(h)


print("One number in, one number out: h = x², y = sin h\n")
x = 0.8
h = f(x)  # kept: the slope of g is taken here, at h and not at x
y = g(h)
dh_dx = 2 * x
dy_dh = jnp.cos(h)
dy_dx = dy_dh * dh_dx
truth = jax.grad(lambda x: g(f(x)))(x)

print(f"h     = x²            = {h:.6f}")
print(f"y     = sin h         = {y:.6f}")
print(f"dh/dx = 2x            = {dh_dx:.6f}")
print(f"dy/dh = cos h         = {dy_dh:.6f}")
print(f"dy/dx = dy/dh · dh/dx = {dy_dx:.6f}")
print(f"jax.grad              = {truth:.6f}")
assert jnp.allclose(dy_dx, truth)


print("\nSeveral numbers: h = (x₁x₂, x₁ + x₂, x₂²), y = h₁ + h₂h₃\n")


def F(x):
    return jnp.array([x[0] * x[1], x[0] + x[1], x[1] ** 2])


def G(h):
    return h[0] + h[1] * h[2]


# A slope is now a matrix, the Jacobian: a row for each output, a column for each input. A change
# of x₁ reaches y through h₁, h₂ and h₃; summing over these ways is what a matrix product does:
#     ∂y/∂x_i = Σ_k ∂y/∂h_k ∂h_k/∂x_i
x = jnp.array([2.0, 3.0])
h = F(x)
dh_dx = jnp.array([[x[1], x[0]], [1.0, 1.0], [0.0, 2 * x[1]]])
dy_dh = jnp.array([[1.0, h[2], h[1]]])
dy_dx = dy_dh @ dh_dx
truth = jax.grad(lambda x: G(F(x)))(x)

print(f"∂h/∂x =\n{dh_dx}")
print(f"∂y/∂h =\n{dy_dh}")
print(f"∂y/∂x = ∂y/∂h · ∂h/∂x = {dy_dx[0]}")
print(f"jax.grad              = {truth}")
assert jnp.allclose(dy_dx[0], truth)
