"""Step 3: a network is a composite function.

    h_0 = x        h_n = f_n(h_{n-1}; θ_n)        L = loss(h_N, label)

Each layer is one function of what arrives and of its parameters θ_n. So a network is a chain of
functions, and nothing new is needed: the chain rule of step 2 differentiates it.
"""

import jax
import jax.numpy as jnp

from funcbp import layers, ops
from funcbp.trace import chain_rule

model = layers.serial(
    layers.dense(4, activation="tanh"),
    layers.dense(3, activation="sigmoid"),
    layers.dense(2),
)
x = jnp.array([0.5, -1.0, 2.0])
label = jnp.array(1)
params, _ = model.init(jax.random.key(0), x)


def loss(output):
    return ops.softmax_cross_entropy_with_integer_labels(output, label)


print("The network is the composition of its layers\n")
h = x
for n, activation in enumerate([jnp.tanh, jax.nn.sigmoid, lambda z: z]):
    theta = params[f"dense_{n}"]
    h = activation(h @ theta["w"] + theta["b"])
    print(f"h_{n + 1} = f_{n + 1}(h_{n}; θ_{n + 1}) = {h}")
L = loss(h)
print(f"L   = loss(h_3)       = {L:.6f}")
print(f"the same, by model    = {loss(model(params, x)):.6f}")
assert jnp.allclose(L, loss(model(params, x)))

print("\nIts derivative by x is the product of the layers' Jacobians\n")
result = chain_rule(model, x, params=params, loss=loss)
print(result)

product = jnp.eye(1)
for factor in reversed(result.factors):
    product = product @ factor
truth = jax.grad(lambda x: loss(model(params, x)))(x)
print(f"\n∂L/∂x, the product of the factors = {product[0]}")
print(f"jax.grad                          = {truth}")
assert jnp.allclose(product[0], truth, rtol=1e-5)
