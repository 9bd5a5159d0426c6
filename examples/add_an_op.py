"""An op of one's own: the squared relu, declared, checked, used in a model and trained.

    y_i = max(x_i, 0)^2        dx_i = 2 max(x_i, 0) dy_i

It saves x, its argument. At the kink value and slope are 0.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from funcbp import Case, data, layers, op, ops, train
from funcbp.check import compare


def plain(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0) squared: the yardstick, which JAX differentiates."""
    return jnp.square(jnp.maximum(x, 0))


def fwd(x):
    return plain(x), x


def bwd(x, dy):
    return (2 * jnp.maximum(x, 0) * dy,)


CASES = [Case("odd", (3, 5)), Case("one", ())]
squared_relu = op(plain, fwd, bwd, name="squared_relu", cases=CASES)


def forgets_the_factor(x, dy):
    """The same rule with a mistake, to see it found."""
    return (jnp.maximum(x, 0) * dy,)


def main() -> float:
    """Checks the rule and a broken one, then trains with it; returns the last loss."""
    for case in squared_relu.cases:
        result = compare(squared_relu, case)
        print(result)
        result.raise_if_wrong()
    broken = op(plain, fwd, forgets_the_factor, name="broken")
    found = compare(broken, squared_relu.cases[0])
    print(found)
    assert not found.ok

    digits = data.digits()
    model = layers.serial(
        layers.flatten, layers.dense(64), layers.lift(squared_relu), layers.dense(10)
    )
    optimizer = optax.adam(3e-3)
    loss = train.supervised(model, ops.softmax_cross_entropy_with_integer_labels)
    state = train.init_state(model, optimizer, jax.random.key(0), digits.train_images[:1])
    batches = data.batches((digits.train_images, digits.train_labels), 128, seed=0)
    state, history = train.fit(train.make_step(loss, optimizer), state, batches, steps=200)
    print(f"loss {history.metrics['loss'][0]:.3f} -> {history.metrics['loss'][-1]:.3f}")
    return float(history.metrics["loss"][-1])


if __name__ == "__main__":
    assert main() < 0.3
