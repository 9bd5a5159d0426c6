"""The chain rule, seen: the factors of a gradient, their product, and what its order costs.

    h_0 = x        h_n = f_n(h_{n-1}; θ_n)        L = h_N

    ∂L/∂h_{n-1} = ∂L/∂h_n ∂h_n/∂h_{n-1}        ∂L/∂θ_n = ∂L/∂h_n ∂h_n/∂θ_n

θ_n = [vec(W_n)ᵀ | b_nᵀ]ᵀ. For a dense layer's `w` [in, out], which multiplies rows, W is w
transposed, which multiplies columns; vec(W), its columns one below the other, is `w.ravel()`.

The product may be taken from either end. From the left each intermediate result has as many rows
as the loss has numbers: one. From the right it has as many columns as x and θ have numbers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from funcbp.core import InputError
from funcbp.layers.layer import specs_of
from funcbp.trace.costs import MEASURED, flops_of, from_left, from_right, seconds, times
from funcbp.trace.links import Chain, Link, as_array, chain_of, place
from funcbp.trace.steps import ChainRule, Step, shapes

# Jacobians are built up to this size in all.
LIMIT = 2**22


def chain_rule(
    functions: Any,
    x: PyTree,
    *,
    params: PyTree = None,
    state: PyTree = None,
    loss: Callable[[PyTree], Array] | None = None,
    limit: int = LIMIT,
    measure: bool = True,
) -> ChainRule:
    """The gradient of a composition as the product of its Jacobian factors.

    Args:
        functions: a `serial` model of `funcbp.layers`, at inference, or a list of functions, the
            first to be called first: `f(h)`, or `f(params_n, h)` with parameters.
        x: its input, floating or (for parameters alone) whole numbers. With
            `jax.ShapeDtypeStruct`s here or in `params`, nothing is computed: shapes and costs only.
        params: the model's, from `init`; or a list with one pytree, or None, for each function.
        state: the model's, if it keeps one.
        loss: a last function, of the output alone, to a scalar.
        limit: how many numbers all Jacobians together may hold. Above, none is built: the
            gradients of a scalar come from one pullback a step, other outputs get none.
        measure: time both orders of the product, where that from the right is small enough, and
            large enough to be told from the call itself.

    Returns:
        A `ChainRule`.

    Raises:
        InputError: functions, params or x do not fit one another, something that should have a
            derivative is not floating, or the loss is not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> result = chain_rule([jnp.sin, jnp.square], 0.5)
        >>> len(result.factors), result.evaluations.finite_differences
        (2, 2)
    """
    if not isinstance(limit, int) or limit < 0:
        raise InputError(f"limit must be a whole number from 0 up, got {limit!r}")
    x = jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_array(f"x{jax.tree_util.keystr(path)}", leaf), x
    )
    chain = chain_of(functions, x, params, state, loss)
    specs = _specs(chain, x, scalar=loss is not None)
    steps = _counted(chain, specs)
    forward, backward = _flops(chain, x)
    abstract = any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves((chain.leaves, x)))
    small = sum(s.rows * (s.columns + s.parameters) for s in steps) <= limit
    if abstract or not (small or steps[-1].rows == 1):
        return ChainRule(steps, None, None, None, None, forward, backward, None, None)
    value, steps = _numbers(chain, steps, x, small)
    matrices = [s.gradient for s in steps]
    gradient, input_gradient = jnp.concatenate(matrices, axis=1), steps[0].product
    return ChainRule(
        steps,
        value,
        None if params is None else _parameters_like(chain, gradient, value),
        None if not steps[0].columns else _like(x, input_gradient, value),
        _error(chain, x, jnp.concatenate([gradient, input_gradient], axis=1)),
        forward,
        backward,
        *(_measured(steps, limit) if measure and small else (None, None)),
    )


def _specs(chain: Chain, x: PyTree, scalar: bool) -> list[PyTree]:
    """h_0 to h_N as shapes; each checked."""
    specs = [specs_of(x)]
    for n, link in enumerate(chain.links, 1):
        with place(n, link):
            h = jax.eval_shape(link.apply, chain.theta(link), specs[-1])
            if not jax.tree.leaves(h) or not _floating(h):
                raise InputError(
                    f"the function must return floating arrays, got {shapes(h) or 'none'}; "
                    "only they have derivatives"
                )
            if scalar and n == len(chain.links) and shapes(h).partition("[")[2] != "]":
                raise InputError(
                    f"loss must return a scalar, got {shapes(h)}; take the mean or the sum"
                )
        specs.append(h)
    if not chain.leaves and not _floating(x):
        raise InputError(
            f"x must be floating where there are no parameters, got {shapes(x)}; "
            "convert it: x.astype(jnp.float32)"
        )
    return specs


def _floating(tree: PyTree) -> bool:
    return all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(tree))


def _size(tree: PyTree) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


def _counted(chain: Chain, specs: Sequence[PyTree]) -> tuple[Step, ...]:
    """The steps with their costs; a product of [a, b] and [b, c] takes 2 a b c flops."""
    m, last = _size(specs[-1]), len(chain.links) - 1
    steps, width = [], 0
    for n, link in enumerate(chain.links):
        rows, parameters = _size(specs[n + 1]), _size(chain.theta(link))
        columns = _size(specs[n]) if _floating(specs[n]) else 0
        # The last factor is the first from the left, the first is so from the right: no product.
        left = 2 * m * rows * (columns + parameters) if n < last else 0
        right = 2 * rows * columns * width if n else 0
        width += parameters + (0 if n else columns)
        steps.append(
            Step(link.name, specs[n + 1], rows, columns, link.parts, parameters, left, right)
        )
    return tuple(steps)


def _pullback(link: Link, theta: Sequence[Any], h: PyTree) -> tuple[Array, Callable, PyTree]:
    """Value (flat), its pullback `dh_n -> dθ, dh_{n-1}` on flat vectors, and value."""
    theta_flat, to_theta = ravel_pytree(theta)
    h_flat, to_h = ravel_pytree(h) if _floating(h) else (jnp.zeros(0), lambda _: h)

    def call(theta_flat, h_flat):
        value = link.apply(to_theta(theta_flat), to_h(h_flat))
        return ravel_pytree(value)[0], value

    return jax.vjp(call, theta_flat, h_flat, has_aux=True)


def _jacobians(flat: Array, pullback: Callable) -> tuple[Array, Array]:
    """∂h/∂θ and ∂h/∂h_{n-1}, row by row: the pullback of each unit vector. At least float32."""
    rows = jax.vmap(pullback)(jnp.eye(flat.size, dtype=flat.dtype))
    return jax.tree.map(lambda j: j.astype(jnp.promote_types(j.dtype, jnp.float32)), rows)


def _linearised(link: Link, theta: Sequence[Any], h: PyTree) -> tuple[PyTree, Array, Array]:
    """Value, ∂h/∂θ and ∂h/∂h_{n-1}."""
    flat, pullback, value = _pullback(link, theta, h)
    return value, *_jacobians(flat, pullback)


def _numbers(chain: Chain, steps: Sequence[Step], x: PyTree, small: bool):
    """One forward pass that keeps the pullbacks, and the product of the factors from the left."""
    tape, h = [], x
    for n, link in enumerate(chain.links, 1):
        with place(n, link):
            if small:
                h, *kept = jax.jit(partial(_linearised, link))(chain.theta(link), h)
            else:
                *kept, h = _pullback(link, chain.theta(link), h)
        tape.append(kept)
    result, arriving = [], None
    for step, kept in zip(reversed(steps), reversed(tape), strict=True):
        if small:
            of_theta, of_h = kept
            step = step._replace(factor=of_h, parameter_factor=of_theta)
            gradient = of_theta if arriving is None else times(arriving, of_theta)
            product = of_h if arriving is None else times(arriving, of_h)
        else:
            flat, pullback = kept
            row = jnp.ones(1) if arriving is None else arriving[0]
            gradient, product = (d[None] for d in pullback(row.astype(flat.dtype)))
        arriving = product
        result.append(step._replace(product=product, gradient=gradient))
    return h, tuple(reversed(result))


def _like(tree: PyTree, matrix: Array, value: PyTree) -> PyTree:
    """The columns of ∂L/∂tree in the shape of the tree, its rows in that of L."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [value] if hasattr(value, "shape") else None
    rows = arrays[0].shape if arrays else (len(matrix),)
    parts, start = [], 0
    for leaf in leaves:
        part = matrix[:, start : start + leaf.size]
        parts.append(part.reshape(*rows, *leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, parts)


def _parameters_like(chain: Chain, gradient: Array, value: PyTree) -> PyTree:
    parts = _like(chain.theta(chain.whole), gradient, value)
    ordered = dict(zip(chain.whole.indices, parts, strict=True))
    return jax.tree.unflatten(chain.tree, [ordered[i] for i in range(len(ordered))])


def _error(chain: Chain, x: PyTree, got: Array) -> float:
    """Against autodiff of the whole function, which knows nothing of the steps."""
    whole = jax.jit(partial(_linearised, chain.whole))
    truth = jnp.concatenate(whole(chain.theta(chain.whole), x)[1:], axis=1)
    largest = float(jnp.max(jnp.abs(truth), initial=0))
    return float(jnp.max(jnp.abs(got - truth), initial=0)) / (largest or 1.0)


def _flops(chain: Chain, x: PyTree) -> tuple[int | None, int | None]:
    """Of the forward pass alone and with one backward pass, from XLA without compiling."""

    def forward(theta, x):
        return chain.whole.apply(theta, x)

    def both(theta, x):
        flat, pullback, value = _pullback(chain.whole, theta, x)
        return value, pullback(jnp.ones_like(flat))

    theta = chain.theta(chain.whole)
    return flops_of(forward, theta, x), flops_of(both, theta, x)


def _measured(steps: Sequence[Step], limit: int) -> tuple[float | None, float | None]:
    width = steps[0].columns + sum(s.parameters for s in steps)
    if max(s.rows for s in steps) * width > limit:
        return None, None
    if not MEASURED[0] <= sum(s.flops_right for s in steps) <= MEASURED[1]:
        return None, None
    factors = [s.factor for s in steps], [s.parameter_factor for s in steps]
    return seconds(from_left, *factors), seconds(from_right, *factors)
