"""A loop that carries a state and stacks what each step gives, with any body.

    (c_{t+1}, y_t) = f(c_t, x_t)

Backward. Where a step has a product u_t = a_t w with an array w that f closes over,
    dw = sum_t a_t^T du_t
which needs no loop: du_t is stacked over the steps, a_t too, and dw is one large product. If a_t is
x_t, then so is dx_t = du_t w^T. What is left in the loop is what the chain of the steps needs, and
the sums over the steps of other gradients of captured arrays. An array that is added, as a bias,
has the gradient sum_t du_t, from the stack if that is there.

What a step keeps is a smallest set of values that gives the rest by cheap arithmetic; what is the
carry of the next step, a y or an x is not kept twice. Where there is no such product and every step
is stored, JAX's own transposition of the loop runs: `scan_plan` says what is done.

Saves: the arguments, and for each step what `scan_plan` tells; with `store` = k the carry at each
       k-th step, and the backward pass computes k steps again at a time.
Edge:  no steps give init. A carry that never changes counts as captured.
Dtype: that of each product in f; gradients of captured arrays are summed in float32 or wider.
Ref:   Appleyard et al., 2016 (Optimizing performance of recurrent networks on GPUs), section 3;
       Griewank and Walther, 2008, chapter 12, for `store`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcbp.case import Case, closing
from funcbp.closed import Closed, Program
from funcbp.core import InputError, op
from funcbp.ops._chunk import Steps
from funcbp.ops._loop import Loop, loop_of
from funcbp.ops._scan_call import Called, carried, keeps_its_type, lasting


def plain(
    f: Callable,
    init: PyTree,
    xs: PyTree | None = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    store: int | str = "all",
) -> tuple[Any, Any]:
    """A loop over the leading axis of xs, as jax.lax.scan, with a cheaper reverse rule.

    Args:
      f: `(carry, x) -> (carry, y)`; it may close over arrays, which get their gradients.
      init: the first carry, a pytree.
      xs: a pytree of arrays with a leading axis of one length; None if f takes no x.
      length: the number of steps; needed if there are no xs.
      reverse: run from the end of xs.
      unroll: how many steps one turn of the compiled loop does; True for all.
      _split_transpose: of jax.lax.scan's own reverse rule.
      store: "all" keeps what each step needs for the backward pass; a number k keeps the carry at
        each k-th step, and the rest is computed again; "sqrt" is the square root of the length,
        or somewhat more where that divides it.

    Returns:
      `(carry, ys)`: the last carry, and what the steps gave, stacked.

    Raises:
      InputError: the lengths do not agree, or `store` is none of these.
      TypeError: the carry that f gives is not of the type of init.
    """
    if isinstance(f, Closed):
        init = carried(f, init)
    return jax.lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)


def check(f, init, xs, length, *, store, **settings):
    """Raises if the lengths do not agree, or `store` is out of range."""
    if any(x.ndim == 0 for x in jax.tree.leaves(xs)):
        raise InputError(
            "each array of xs must have a leading axis, that of the steps; got a scalar: close "
            "over what is the same at each step"
        )
    lengths = {len(x) for x in jax.tree.leaves(xs)}
    if len(lengths | {length} - {None}) != 1:
        raise InputError(
            f"the arrays of xs must have leading axes of one length, that of length= if given; got "
            f"{sorted(lengths)} and length={length}"
        )
    number = isinstance(store, int) and not isinstance(store, bool)
    if store not in ("all", "sqrt") and not (number and store >= 1):
        raise InputError(f'store must be "all", "sqrt" or a number of steps from 1, got {store!r}')


def examples(f, init, xs, length, **settings):
    """Of what f will be called with: its carry, in the type that it keeps, and one x."""
    init, x = jax.tree.map(jax.typeof, (init, xs))
    x = jax.tree.map(lambda a: a.update(shape=a.shape[1:]), x)
    return (init if isinstance(f, Closed) else lasting(f, init, x)), x


class _Saved(NamedTuple):
    f: Closed
    init: Any
    xs: Any
    stored: list  # of all steps, or the carry that each chunk begins with, and the last of these


class _Fallen(NamedTuple):
    f: Closed
    init: Any
    xs: Any
    pullback: Any


def fwd(f, init, xs, length, reverse, unroll, _split_transpose, *, store):
    if _why_not(f.program, store):

        def again(f, init, xs):
            return plain(f, init, xs, length, reverse, unroll, _split_transpose)

        y, pullback = jax.vjp(again, f, init, xs)
        return y, _Fallen(f, init, xs, pullback)
    call = Called(f, init, xs)
    steps = Steps(steps_of(xs, length), reverse, unroll)
    y, stored = call.forward(steps, chunk_of(store, steps.length))
    return y, _Saved(f, init, xs, stored)


def bwd(saved, dy, *, length, reverse, unroll, _split_transpose, store):
    if isinstance(saved, _Fallen):
        return saved.pullback(dy)
    call = Called(saved.f, saved.init, saved.xs)
    steps = Steps(steps_of(saved.xs, length), reverse, unroll)
    back = call.backward(saved.stored, dy, steps, chunk_of(store, steps.length))
    trees = map(jax.tree.structure, (saved.f, saved.init, saved.xs))
    return tuple(t.unflatten(d) for t, d in zip(trees, back, strict=True))


def _why_not(program: Program, store: Any) -> str:
    """Why JAX's own rule runs instead; empty if it does not."""
    if not keeps_its_type(program):
        return "f does not give a carry of the type that it takes"
    if store == "all" and not loop_of(program).gains:
        return "f has no product with a captured array, and every step is stored"
    return ""


def steps_of(xs: Any, length: int | None) -> int:
    """The number of steps."""
    return next((len(x) for x in jax.tree.leaves(xs)), length or 0)


def chunk_of(store: Any, length: int) -> int | None:
    """After how many steps the carry is kept; None to keep what each step needs."""
    if store == "all" or length == 0:
        return None
    if store == "sqrt":
        root = math.ceil(math.sqrt(length))
        # Steps left over cost copies of the stacks.
        store = next((k for k in range(root, 2 * root) if length % k == 0), root)
    return min(length, store)


class Plan(NamedTuple):
    """How `scan` takes the gradient of a loop; prints as a few lines.

    Attributes:
      steps: how many there are.
      outside: the products and sums taken out of the loop, with the shapes of their operands.
      summed: the shapes of what is summed over the steps in the loop.
      kept: of each step, what is kept for the backward pass: "y", "carry" or "value", and a shape.
      chunk: the steps that are computed again at a time; None if none are.
      why: the reason why JAX's own transposition runs; empty if it does not.
    """

    steps: int
    outside: tuple[str, ...]
    summed: tuple[str, ...]
    kept: tuple[str, ...]
    chunk: int | None
    why: str

    def __str__(self) -> str:
        head = f"scan of {self.steps} steps"
        if self.why:
            return f"{head}: jax.lax.scan's own transposition, since {self.why}"
        kept = f"of each step {_listed(self.kept)}"
        if self.chunk is not None:
            kept = f"the carry each {self.chunk} steps, and while these are computed again {kept}"
        return "\n".join(
            (
                head,
                f"  out of the loop: {_listed(self.outside)}",
                f"  summed in the loop: {_listed(self.summed)}",
                f"  kept: {kept}",
            )
        )


def _listed(items: tuple[str, ...]) -> str:
    return ", ".join(items) or "nothing"


def scan_plan(
    f: Callable,
    init: PyTree,
    xs: PyTree | None = None,
    length: int | None = None,
    *,
    store: int | str = "all",
    **settings: Any,
) -> Plan:
    """How `scan`, called with these arguments, takes the gradient; runs nothing.

    Args:
      f, init, xs, length, store: as for `scan`.
      **settings: its others, without influence.

    Returns:
      A `Plan`, which prints as a few lines.

    Raises:
      InputError: as `scan`.
    """
    init, xs = jax.tree.map(jnp.asarray, (init, xs))
    check(f, init, xs, length, store=store)
    program = Closed.of(f, *examples(f, init, xs, length)).program
    steps = steps_of(xs, length)
    why = _why_not(program, store)
    if why:
        return Plan(steps, (), (), (), None, why)
    loop = loop_of(program)
    return Plan(
        steps,
        tuple(str(o.cut) for o in loop.outside),
        tuple(_shape(v) for _, v, _ in loop.sums),
        tuple(f"{_kind_of(loop, v)} {_shape(v)}" for v in loop.stored),
        chunk_of(store, steps),
        "",
    )


def _kind_of(loop: Loop, v: Any) -> str:
    return "y" if v in loop.y else "carry" if v in loop.carry or v in loop.new else "value"


def _shape(v: Any) -> str:
    return f"{v.aval.dtype}{list(v.aval.shape)}"


def _cell(w, u, b, h, x):
    h = jnp.tanh(x @ w + h @ u + b)
    return h, h


def _decay(rate, h, x):
    h = jnp.tanh(rate * h)
    return h, h * x


scan = op(
    plain,
    fwd,
    bwd,
    check=check,
    like=jax.lax.scan,
    functions={"f": examples},
    cases=(
        Case("odd", closing(_cell, (3, 5), (5, 5), (5,)), (3, 5), (3, 3, 3)),
        Case("chunks", closing(_cell, (3, 5), (5, 5), (5,)), (3, 5), (5, 3, 3), store=2),
        Case("no product", closing(_decay, (5,)), (5,), (3, 2, 5)),
        Case(
            "recurrent",
            closing(_cell, (128, 256), (256, 256), (256,)),
            (32, 256),
            (128, 32, 128),
            bench=True,
        ),
        Case(
            "recurrent, recomputed",
            closing(_cell, (128, 256), (256, 256), (256,)),
            (32, 256),
            (128, 32, 128),
            store="sqrt",
            bench=True,
        ),
    ),
)
