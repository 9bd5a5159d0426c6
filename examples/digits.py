"""A model of pure layers, trained on handwritten digits with a jitted optax step."""

import jax
import optax

from funcbp import data, layers, ops, train


def main(steps: int = 400) -> float:
    """Trains, prints the model and returns the accuracy on the held-out digits."""
    digits = data.digits()
    model = layers.serial(
        layers.flatten,
        layers.dense(64, activation="gelu"),
        layers.residual(layers.serial(layers.layer_norm(), layers.dense(64, activation="tanh"))),
        layers.dropout(0.1),
        layers.dense(10),
    )
    print(layers.summary(model, digits.train_images[:1]))

    optimizer = optax.adam(3e-3)
    loss = train.supervised(model, ops.softmax_cross_entropy_with_integer_labels)
    step = train.make_step(loss, optimizer)
    state = train.init_state(model, optimizer, jax.random.key(0), digits.train_images[:1])
    batches = data.batches((digits.train_images, digits.train_labels), 128, seed=0)
    state, history = train.fit(step, state, batches, steps=steps)

    test = digits.test_images, digits.test_labels
    accuracy = train.evaluate(model, state.params, state.model_state, *test)
    print(f"loss {history.metrics['loss'][-1]:.4f}, accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    assert main() > 0.95
