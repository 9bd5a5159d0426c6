"""Step 6: the derivative of the sigmoid, and where its usual form fails.

    s(x) = 1 / (1 + e⁻ˣ)        s'(x) = s(x) (1 - s(x))

The derivation, a line at a time; each line is evaluated. The last is the shortest, and the one
that a computer should not use.
"""

import jax
import jax.numpy as jnp
import numpy as np

from funcbp import ops


def s(x):
    return 1 / (1 + jnp.exp(-x))


x = jnp.linspace(-3, 3, 7)
e = jnp.exp(-x)
truth = jax.vmap(jax.grad(s))(x)

LINES = {
    "s' = d/dx (1 + e⁻ˣ)⁻¹": truth,
    "   = -(1 + e⁻ˣ)⁻² · d/dx (1 + e⁻ˣ)": -((1 + e) ** -2) * (-e),
    "   = e⁻ˣ / (1 + e⁻ˣ)²": e / (1 + e) ** 2,
    "   = 1/(1 + e⁻ˣ) · e⁻ˣ/(1 + e⁻ˣ)": 1 / (1 + e) * (e / (1 + e)),
    "   = 1/(1 + e⁻ˣ) · (1 + e⁻ˣ - 1)/(1 + e⁻ˣ)": 1 / (1 + e) * ((1 + e - 1) / (1 + e)),
    "   = 1/(1 + e⁻ˣ) · (1 - 1/(1 + e⁻ˣ))": 1 / (1 + e) * (1 - 1 / (1 + e)),
    "   = s (1 - s)": s(x) * (1 - s(x)),
}
print(f"{'at x =':42}" + "".join(f"{v:9.0f}" for v in x) + "\n")
for line, numbers in LINES.items():
    print(f"{line:42}" + "".join(f"{v:9.6f}" for v in numbers))
    assert jnp.allclose(numbers, truth, rtol=1e-5), line

print("\nTrue on paper. In float32, 24 bits, on the right of 0:\n")
# s is close to 1, where float32 numbers are 6e-8 apart, so 1 - s keeps few digits and then none:
# from x = 17 on s rounds to 1 and the neuron seems to have stopped learning. jax.nn.sigmoid
# differentiates itself in this form. e⁻ˣ itself is small and exact to 7 digits, so the third line
# above has them all; with |x| for x, s' being even, it cannot overflow on the left either.
print(f"{'x':>4} {'s (1 - s)':>14} {'jax.nn.sigmoid':>16} {'funcbp.ops':>14} {'float64':>14}")
for v in (1.0, 5.0, 10.0, 14.0, 16.0, 17.0, 30.0, 80.0):
    point = jnp.float32(v)
    textbook = s(point) * (1 - s(point))
    builtin = jax.grad(jax.nn.sigmoid)(point)
    ours = jax.grad(ops.sigmoid)(point)
    exact = np.exp(-v) / (1 + np.exp(-v)) ** 2
    print(f"{v:4.0f} {textbook:14.6e} {builtin:16.6e} {ours:14.6e} {exact:14.6e}")
    np.testing.assert_allclose(ours, exact, rtol=1e-6)

at_17 = jnp.float32(17)
assert s(at_17) * (1 - s(at_17)) == 0
assert 4.1e-8 < jax.grad(ops.sigmoid)(at_17) < 4.2e-8

print("\nWhat to do: take the slope from x, e^-|x| / (1 + e^-|x|)², as funcbp.ops.sigmoid does.")
