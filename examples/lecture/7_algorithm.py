"""Step 7: the algorithm.

    forward     for n = 1 … N:  h_n = f_n(h_{n-1}; θ_n), and keep what the way back needs
    backward    for n = N … 1:  ∂L/∂θ_n = ∂L/∂h_n · ∂h_n/∂θ_n
                                ∂L/∂h_{n-1} = ∂L/∂h_n · ∂h_n/∂h_{n-1}

One evaluation of the loss gives every derivative. The price is memory: all that was kept, the
tape, until the way back has used it. Here it is written by hand for a network that reads digits.
"""

import jax
import jax.numpy as jnp

from funcbp import data

SIZES = (64, 48, 32, 10)
BATCH, STEPS, RATE = 64, 400, 0.5


def init(key):
    """For each layer a pair (w, b)."""
    keys = jax.random.split(key, len(SIZES) - 1)
    shapes = zip(SIZES[:-1], SIZES[1:], strict=True)
    return [
        (jax.random.normal(k, (n, m)) / jnp.sqrt(n), jnp.zeros(m))
        for k, (n, m) in zip(keys, shapes, strict=True)
    ]


def forward(params, h):
    """The output, and the tape: for each layer what came in and what went out."""
    tape = []
    for n, (w, b) in enumerate(params, 1):
        h_hat = h @ w + b
        out = h_hat if n == len(params) else jnp.tanh(h_hat)
        tape.append((h, out))
        h = out
    return h, tape


def backward(params, tape, dh):
    """Every ∂L/∂θ_n, from dh = ∂L/∂h_N."""
    gradients = []
    for n in range(len(params), 0, -1):
        (w, _), (h, out) = params[n - 1], tape[n - 1]
        d_hat = dh if n == len(params) else dh * (1 - out**2)  # step 5, summed over the batch
        gradients.append((h.T @ d_hat, jnp.sum(d_hat, axis=0)))
        dh = d_hat @ w.T
    return gradients[::-1]


def loss(logits, labels):
    """Mean cross-entropy."""
    return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 10) * jax.nn.log_softmax(logits), axis=1))


def loss_and_gradient(params, images, labels):
    logits, tape = forward(params, images)
    # Softmax and logarithm together: the share given to each digit, less the truth.
    dlogits = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)) / len(labels)
    return loss(logits, labels), backward(params, tape, dlogits)


digits = data.digits()
images, labels = (jnp.asarray(a[:BATCH]) for a in (digits.train_images, digits.train_labels))
images = images.reshape(BATCH, -1)
params = init(jax.random.key(0))

print("The gradient by hand, against jax.grad\n")
L, gradients = loss_and_gradient(params, images, labels)
truth = jax.grad(lambda params: loss(forward(params, images)[0], labels))(params)
for n, (mine, theirs) in enumerate(zip(gradients, truth, strict=True), 1):
    apart = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(mine, theirs, strict=True))
    size = float(jnp.max(jnp.abs(theirs[0])))
    print(f"∂L/∂θ_{n}: largest {size:.3f}, apart by at most {apart:.0e}")
    assert apart < 1e-5 * size

print("\nThe memory: what the tape holds, next to what a prediction needs\n")
tape = forward(params, images)[1]
# Each h is one layer's output and the next one's input: the same array, counted once.
kept = {id(h): h for pair in tape for h in pair}
total = sum(h.nbytes for h in kept.values())
largest = max(h.nbytes + out.nbytes for h, out in tape)
for n, h in enumerate(kept.values()):
    print(f"h_{n}  {BATCH} x {SIZES[n]:2} numbers  {h.nbytes:6,} bytes")
print(f"tape, for the way back    {total:6,} bytes: the sum over the layers, for each example")
print(f"prediction alone          {largest:6,} bytes: no more than one layer's two ends")
assert total == 4 * BATCH * sum(SIZES)

print("\nTraining: θ ← θ - rate · ∂L/∂θ\n")


@jax.jit
def train_step(params, images, labels):
    value, gradients = loss_and_gradient(params, images, labels)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value


history = []
batches = data.batches((digits.train_images, digits.train_labels), BATCH, seed=0)
for _, (images, labels) in zip(range(STEPS), batches, strict=False):
    params, value = train_step(params, images.reshape(BATCH, -1), labels)
    history.append(value)

curve = jnp.array(history).reshape(-1, STEPS // 16).mean(axis=1)
for i, value in enumerate(curve):
    print(f"step {(i + 1) * STEPS // 16:4}  loss {value:.3f}  {'█' * round(float(value) * 30)}")

logits = forward(params, digits.test_images.reshape(-1, 64))[0]
accuracy = float(jnp.mean(jnp.argmax(logits, axis=1) == digits.test_labels))
print(f"\nof {len(logits)} digits that it has not seen, {accuracy:.1%} are read right")
assert accuracy > 0.93
