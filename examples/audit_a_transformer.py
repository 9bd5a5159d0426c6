"""A Flax transformer with a fault planted in one hand-written rule, and the auditor that finds it.

The scale's gradient of `fused_rms_norm` is averaged over the batch where it should be summed. With
a batch of one, as in a unit test, nothing shows; in training the scales learn too slowly, and
nobody is told. The other rules are right, or differ from the derivative on purpose.

Needs Flax: `pip install flax`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import funcbp

VOCABULARY, WIDTH, HEADS, BLOCKS = 61, 32, 4, 3
BATCH, LENGTH = 4, 12


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused_rms_norm(x, scale, eps):
    """x / sqrt(mean(x^2) + eps) * scale."""
    return fused_rms_norm_fwd(x, scale, eps)[0]


def fused_rms_norm_fwd(x, scale, eps):
    inverse = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    normed = x * inverse
    return normed * scale, (normed, inverse, scale)


def fused_rms_norm_bwd(eps, saved, dy):
    normed, inverse, scale = saved
    d = dy * scale
    dx = inverse * (d - normed * jnp.mean(d * normed, -1, keepdims=True))
    dscale = jnp.mean(dy * normed, axis=0).sum(axis=0)  # the planted fault: jnp.sum belongs here
    return dx, dscale


fused_rms_norm.defvjp(fused_rms_norm_fwd, fused_rms_norm_bwd)


@jax.custom_vjp
def fused_gelu(x):
    """x * Phi(x); the backward pass makes Phi again instead of keeping it."""
    return x * jax.scipy.stats.norm.cdf(x)


def fused_gelu_fwd(x):
    return fused_gelu(x), x


def fused_gelu_bwd(x, dy):
    return (dy * (jax.scipy.stats.norm.cdf(x) + x * jax.scipy.stats.norm.pdf(x)),)


fused_gelu.defvjp(fused_gelu_fwd, fused_gelu_bwd)


@jax.custom_vjp
def clip_gradient(x):
    """x; its cotangent is clipped to [-1, 1]."""
    return x


def clip_gradient_fwd(x):
    return x, None


def clip_gradient_bwd(_, dy):
    return (jnp.clip(dy, -1, 1),)


clip_gradient.defvjp(clip_gradient_fwd, clip_gradient_bwd)


@jax.custom_vjp
def token_loss(logits, labels):
    """The mean of logsumexp(logits) - logits[label]."""
    return token_loss_fwd(logits, labels)[0]


def token_loss_fwd(logits, labels):
    top = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - top), (logits, labels)


def token_loss_bwd(saved, dy):
    logits, labels = saved
    d = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return dy * d / (logits.size / logits.shape[-1]), None


token_loss.defvjp(token_loss_fwd, token_loss_bwd)


class RMSNorm(nn.Module):
    """The norm as a layer."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return fused_rms_norm(x, scale, 1e-6)


class Block(nn.Module):
    """Attention and a perceptron, each on the normed residual stream."""

    @nn.compact
    def __call__(self, x):
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(HEADS)(RMSNorm()(x), mask=causal)
        h = fused_gelu(nn.Dense(4 * WIDTH)(RMSNorm()(x)))
        return x + nn.Dense(WIDTH)(h)


class Transformer(nn.Module):
    """Tokens [b, t] to logits [b, t, vocabulary]."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(BLOCKS):
            x = Block()(x)
        return nn.Dense(VOCABULARY)(clip_gradient(RMSNorm()(x)))


@jax.jit
def loss(params, tokens):
    """Of the next token, averaged."""
    return token_loss(Transformer().apply(params, tokens[:, :-1]), tokens[:, 1:])


def arguments():
    """Fresh parameters, and a batch of random tokens."""
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    return Transformer().init(jax.random.key(0), tokens[:, :-1]), tokens


def main() -> funcbp.check.Report:
    """Audits the loss and prints what was found."""
    report = funcbp.audit(loss, *arguments(), seconds=5)  # for each rule
    Console().print(report)
    return report


if __name__ == "__main__":
    (found,) = main().wrong
    assert found.rule.startswith("fused_rms_norm (")
    assert found.argument == "scale"
