"""Convolutions against PyTorch's, in float64: value and gradients, any geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcbp.ops import conv, conv_transpose, depthwise_conv

# Relative to the largest number: what float64 loses in sums of other order.
CLOSE = 1e-12


@st.composite
def geometries(draw, groups=(1, 2)):
    """Sizes, of inputs that the kernel fits into, and settings as torch has them."""
    axes = draw(st.integers(1, 3))

    def each(values):
        return tuple(draw(st.sampled_from(values)) for _ in range(axes))

    kernel, strides, dilation, pads = each([1, 2, 3]), each([1, 2]), each([1, 2]), each([0, 1])
    spatial = tuple(
        (k - 1) * d + 1 + extra
        for k, d, extra in zip(kernel, dilation, each([0, 1, 4]), strict=True)
    )
    return spatial, kernel, strides, dilation, pads, draw(st.sampled_from(groups))


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def pulled_back(f, *args):
    with jax.enable_x64(True):
        args = [jnp.asarray(a) for a in args]
        y, pullback = jax.vjp(jax.jit(f), *args)
        return [np.asarray(a) for a in (y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape)))]


def torch_pulled_back(f, *args):
    """The same of a function of torch's, whose features come first."""
    torch = pytest.importorskip("torch")
    args = [torch.tensor(a, requires_grad=True) for a in args]
    y = torch.movedim(f(torch, *args), 1, -1)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    return [a.detach().numpy() for a in (y, *(a.grad for a in args))]


def assert_same(ours, theirs):
    for got, expected in zip(ours, theirs, strict=True):
        scale = np.max(np.abs(expected), initial=1.0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE * scale)


def features_first(torch, x, w, turned=False):
    """x as [batch, features, ...] and w as [out, in, ...]."""
    spatial = tuple(range(w.ndim - 2))
    w = torch.flip(w, spatial) if turned else w
    return torch.movedim(x, -1, 1), w.permute(-1, -2, *spatial)


drawn = settings(derandomize=True, deadline=None, max_examples=6)


@drawn
@given(geometries(), st.integers(0, 99))
def test_conv(geometry, seed):
    spatial, kernel, strides, dilation, pads, groups = geometry
    x, w, b = arrays(seed, (2, *spatial, 2 * groups), (*kernel, 2, 3 * groups), (3 * groups,))

    def ours(x, w, b):
        return conv(
            x,
            w,
            b,
            strides=strides,
            padding=tuple((p, p) for p in pads),
            dilation=dilation,
            groups=groups,
        )

    def theirs(torch, x, w, b):
        f = getattr(torch.nn.functional, f"conv{len(kernel)}d")
        return f(*features_first(torch, x, w), b, strides, pads, dilation, groups)

    assert_same(pulled_back(ours, x, w, b), torch_pulled_back(theirs, x, w, b))


@drawn
@given(geometries(groups=(1, 3)), st.integers(0, 99))
def test_depthwise_conv(geometry, seed):
    spatial, kernel, strides, dilation, pads, features = geometry
    x, w, b = arrays(seed, (2, *spatial, features), (*kernel, 1, 2 * features), (2 * features,))

    def ours(x, w, b):
        padding = tuple((p, p) for p in pads)
        return depthwise_conv(x, w, b, strides=strides, padding=padding, dilation=dilation)

    def theirs(torch, x, w, b):
        f = getattr(torch.nn.functional, f"conv{len(kernel)}d")
        return f(*features_first(torch, x, w), b, strides, pads, dilation, features)

    assert_same(pulled_back(ours, x, w, b), torch_pulled_back(theirs, x, w, b))


@drawn
@given(geometries(groups=(1,)), st.integers(0, 99))
def test_conv_transpose(geometry, seed):
    """Torch's kernel is turned round, and its padding is what ours lacks to the kernel's reach."""
    spatial, kernel, strides, dilation, _, _ = geometry
    x, w, b = arrays(seed, (2, *spatial, 2), (*kernel, 2, 3), (3,))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    cut = [min(r, 1) for r in reach]

    def ours(x, w, b):
        padding = tuple((r - c, r - c) for r, c in zip(reach, cut, strict=True))
        return conv_transpose(x, w, b, strides=strides, padding=padding, dilation=dilation)

    def theirs(torch, x, w, b):
        x, w = features_first(torch, x, w, turned=True)
        f = getattr(torch.nn.functional, f"conv_transpose{len(kernel)}d")
        return f(x, w.transpose(0, 1), b, strides, cut, 0, 1, dilation)

    assert_same(pulled_back(ours, x, w, b), torch_pulled_back(theirs, x, w, b))
