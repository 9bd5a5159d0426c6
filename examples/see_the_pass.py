"""Why does this network not train? What its backward pass keeps and carries, layer by layer."""

import jax
import jax.numpy as jnp

import funcbp
from funcbp import data, layers, ops

digits = data.digits()
images, labels = jnp.asarray(digits.train_images[:128]), jnp.asarray(digits.train_labels[:128])


def loss(logits):
    return jnp.mean(ops.softmax_cross_entropy_with_integer_labels(logits, labels))


# Twenty sigmoids in series: each takes three quarters of the cotangent, or more.
deep = layers.serial(
    layers.flatten, *(layers.dense(64, activation="sigmoid") for _ in range(20)), layers.dense(10)
)
params, state = deep.init(jax.random.key(0), images)
seen = funcbp.trace(deep, params, state, images, loss=loss)
print(seen)
assert [fault.kind for fault in seen.faults] == ["vanishing"]


# With a path around each layer, the cotangent arrives.
def block():
    return layers.residual(layers.serial(layers.layer_norm(), layers.dense(64, activation="tanh")))


cured = layers.serial(
    layers.flatten, layers.dense(64), *(block() for _ in range(20)), layers.dense(10)
)
params, state = cured.init(jax.random.key(0), images)
assert not funcbp.trace(cured, params, state, images, loss=loss).faults


# What it keeps for the backward pass, and what autodiff would.
def whole(params):
    return loss(cured(params, images))


ledger = funcbp.saved(whole, params)
print(ledger)
assert ledger.comparison.hand_rules < ledger.comparison.autodiff / 2


# And where a NaN comes from: the gradient of the branch that jnp.where does not take.
def roots(params):
    y = cured(params, images)
    return jnp.sum(jnp.where(y > 0, jnp.sqrt(y), 0))


found = funcbp.find_nonfinite(roots, params)
print(found)
assert found is not None and found.trap == "untaken_where" and found.direction == "backward"
