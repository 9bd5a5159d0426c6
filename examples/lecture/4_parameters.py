"""Step 4: only the parameters matter.

    ∂L/∂θ_n = ∂L/∂h_N · ∂h_N/∂h_{N-1} · … · ∂h_{n+1}/∂h_n · ∂h_n/∂θ_n

Training moves the parameters and not the input, so these are the derivatives that it needs. θ_n
acts on L through h_n alone: its derivative begins with ∂L/∂h_n, which the product from the left
passes on its way. The layers share it, so one way back gives all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from funcbp import layers
from funcbp.trace import chain_rule

model = layers.serial(layers.dense(3, activation="tanh"), layers.dense(2), layers.tanh)
x = jnp.array([1.0, -0.5])
params, _ = model.init(jax.random.key(1), x)


def loss(h):
    return jnp.sum(h**2)


def L(params):
    return loss(model(params, x))


def text(row):
    return np.array2string(np.asarray(row), precision=4, suppress_small=True, max_line_width=100)


result = chain_rule(model, x, params=params, loss=loss)
print(result)

print("\nThe way back: ∂L/∂h_n is passed on, ∂L/∂θ_n branches off\n")
steps = list(zip(result.factors, result.parameter_factors, strict=True))
row, rows = jnp.ones((1, 1)), []
for n in range(len(steps), 0, -1):
    factor, parameter_factor = steps[n - 1]
    if parameter_factor.size:
        rows.append(row @ parameter_factor)  # ∂L/∂θ_n = ∂L/∂h_n · ∂h_n/∂θ_n
        print(f"∂L/∂θ_{n} = {text(rows[-1][0])}")
    row = row @ factor  # ∂L/∂h_{n-1} = ∂L/∂h_n · ∂h_n/∂h_{n-1}

# θ_n = [vec(W_n)ᵀ | b_nᵀ]ᵀ: the weights and then the biases, in one column.
gradient = jax.grad(L)(params)
print("\njax.grad, arranged as θ_n")
for n, name, row in zip((2, 1), ("dense_1", "dense_0"), rows, strict=True):
    theta = jnp.concatenate([gradient[name]["w"].ravel(), gradient[name]["b"]])
    print(f"∂L/∂θ_{n} = {text(theta)}")
    assert jnp.allclose(row[0], theta, rtol=1e-5, atol=1e-7)

print("\nWithout the chain rule: move each parameter a little, and evaluate L anew\n")
flat, to_params = ravel_pytree(params)
evaluations = 0


def counted(flat):
    global evaluations
    evaluations += 1
    return L(to_params(flat))


eps = 1e-3
start = counted(flat)
differences = jnp.array([(counted(flat.at[i].add(eps)) - start) / eps for i in range(flat.size)])
truth = ravel_pytree(gradient)[0]
apart = jnp.max(jnp.abs(differences - truth)) / jnp.max(jnp.abs(truth))
print(f"finite differences: {evaluations:2} evaluations, P + 1 for P = {flat.size} parameters;")
print(f"                    off by {apart:.0e} of the largest derivative")
print(f"the chain rule:     {result.evaluations.chain_rule:2} evaluation, and one way back;")
print(f"                    off by {result.error:.0e} from jax.grad")
assert evaluations == result.evaluations.finite_differences == flat.size + 1
assert apart < 1e-2
