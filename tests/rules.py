"""The declared ops, their cases, and the transformations that a rule must stand.

A transformation takes a function of the floating arrays and gives value and cotangents by another
way: inside `scan`, under `vmap`, on a mesh. All of them go through the one yardstick. What they
must equal is the same without the transformation, one part after the other: XLA sees that most of
it is the same, and compiles it once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import funcbp
from funcbp import Case, Op
from funcbp.case import Draw
from funcbp.check.compare import Layout, split

OPS = {name: op for name, op in vars(funcbp.ops).items() if isinstance(op, Op)}


def cases() -> list[tuple[Op, Case]]:
    """Every op with every case that is not for the bench."""
    return [(op, case) for op in OPS.values() for case in op.cases if not case.bench]


def transformed() -> list[tuple[Op, Case]]:
    """Of each op the first case with such arguments and settings; values are for other tests."""
    first: dict[Any, tuple[Op, Case]] = {}
    for op, case in cases():
        if case.transformed:
            given = (*case.args, *case.kwargs.values())
            kinds = [v.kind if isinstance(v, Draw) else type(v) for v in given]
            drawn = {"normal": tuple, "uniform": tuple, "values": tuple}
            kinds = tuple(drawn.get(k, k) for k in kinds)
            first.setdefault((op.name, kinds, *sorted(case.kwargs)), (op, case))
    return list(first.values())


def label(value: Any) -> str:
    """The test's name for an op or a case."""
    return value.name.replace(" ", "-") if isinstance(value, Op | Case) else str(value)


class Cast(Case):
    """A case in another dtype, and with cotangents for the op's value drawn beside it."""

    def __init__(self, op: Op, case: Case, dtype: str):
        super().__init__(f"{case.name}, {dtype}", *case.args, **case.kwargs)
        self.op, self.seeded, self.dtype = op, case, dtype

    def build(self, seed: int = 0, dtype: Any = None) -> tuple[tuple, dict]:
        return self.seeded.build(seed, self.dtype)

    def layout(self) -> Layout:
        return split(*self.build())[0]


class WithCotangent(Cast):
    """Builds `((floating, fixed, dy), {})`: what `Way.run` takes."""

    def __init__(self, op: Op, case: Case, dtype: str):
        super().__init__(op, case, dtype)
        layout = self.layout()
        self.value = jax.jit(lambda fl, fixed: layout.call(op.plain, fl, fixed)).eval_shape

    def build(self, seed: int = 0, dtype: Any = None) -> tuple[tuple, dict]:
        _, floating, fixed = split(*super().build(seed))
        y = self.value(floating, fixed)
        rng = np.random.default_rng([seed, 23])
        dy = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), y)
        return (floating, fixed, dy), {}

    def layout(self) -> Layout:
        return split(*super().build())[0]


@dataclasses.dataclass(frozen=True)
class Call:
    """A function at its arrays: `value(floating)`, and the cotangent to pull back."""

    f: Callable
    layout: Layout
    fixed: list
    dy: Any

    def value(self, floating: dict) -> Any:
        return self.layout.call(self.f, floating, self.fixed)

    @property
    def bare(self) -> bool:
        """Whether this is what the op is compared with: without the transformations."""
        return not isinstance(self.f, Op)

    def pulled_back(self, value: Callable, floating: dict, dy: Any) -> dict:
        """Value and cotangents of `value`, which computes the same as `self.value`."""
        y, pullback = jax.vjp(value, floating)
        (cotangents,) = pullback(dy)
        for name, primal in floating.items():
            assert cotangents[name].dtype == primal.dtype, f"{name}: {cotangents[name].dtype}"
            assert cotangents[name].shape == primal.shape
        return {"value": y, **cotangents}

    def loss(self, floating: dict) -> jax.Array:
        """Curved in the op's value, so that second derivatives show."""
        terms = jax.tree.map(lambda y, d: jnp.sum(jnp.sin(y) * d), self.value(floating), self.dy)
        return sum(jax.tree.leaves(terms), jnp.zeros(()))


def checkpointed(call: Call, floating: dict) -> dict:
    value = call.value if call.bare else jax.checkpoint(call.value)
    return call.pulled_back(value, floating, call.dy)


def in_scan(call: Call, floating: dict) -> dict:
    """Two steps: residuals are stacked, and the arguments, loop constants, get a sum."""

    def value(floating):
        if call.bare:
            return _stacked([_times(call.value(floating), s) for s in STEPS])
        return jax.lax.scan(lambda c, s: (c, _times(call.value(floating), s)), 0.0, STEPS)[1]

    return call.pulled_back(value, floating, _pair(call.dy))


def in_cond(call: Call, floating: dict) -> dict:
    """One branch of a cond whose predicate is traced."""

    def value(floating):
        if call.bare:
            return call.value(floating)
        taken = sum((jnp.sum(v) for v in floating.values()), jnp.zeros(())) < jnp.inf
        zeros = jax.tree.map(jnp.zeros_like, call.dy)
        return jax.lax.cond(taken | True, call.value, lambda _: zeros, floating)

    return call.pulled_back(value, floating, call.dy)


def in_while(call: Call, floating: dict) -> dict:
    """Forward and backward pass together in the body of a while loop."""

    def both(floating):
        return call.pulled_back(call.value, floating, call.dy)

    if call.bare:
        return both(floating)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(both, floating))
    return jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (1, both(floating)), (0, zeros))[1]


def vmapped(call: Call, floating: dict, mapped: tuple[bool, ...] | None = None) -> dict:
    """A batch of two over some of the arguments (all: None); the others get a sum."""
    every = {**floating, **{i: v for i, v in enumerate(call.fixed)}}
    chosen = dict(zip(every, mapped or (True,) * len(every), strict=True))
    stacked = {n: _pair(v) if chosen[n] and isinstance(n, str) else v for n, v in floating.items()}
    fixed = {i: jnp.stack([v, v]) if chosen[i] else v for i, v in enumerate(call.fixed)}
    axes = (
        {n: 0 if chosen[n] else None for n in floating},
        {i: 0 if chosen[i] else None for i in fixed},
    )

    def one(floating, fixed):
        return call.layout.call(call.f, floating, [fixed[i] for i in range(len(fixed))])

    def value(floating):
        if call.bare:
            parts = [
                {n: v[k] if chosen[n] else v for n, v in floating.items()}
                for k in range(len(STEPS))
            ]
            return _stacked([call.value(part) for part in parts])
        return jax.vmap(one, in_axes=axes)(floating, fixed)

    return call.pulled_back(value, stacked, _pair(call.dy))


def vmapped_each(call: Call, floating: dict) -> dict:
    count = len(floating) + len(call.fixed)
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    return {str(i): vmapped(call, floating, m) for i, m in enumerate(alone)}


def reverse_over_reverse(call: Call, floating: dict) -> dict:
    """The cotangents' own cotangents: grad of a function of grad."""

    weights = _weights(floating)

    def of_gradient(floating):
        g = jax.grad(call.loss)(floating)
        # Squares, whose own derivative keeps the relative error of a large cotangent as it is.
        terms = jax.tree.map(lambda d, w: jnp.sum(d * d * w), g, weights)
        return sum(jax.tree.leaves(terms), jnp.zeros(()))

    return jax.grad(of_gradient)(floating)


def forward_over_reverse(call: Call, floating: dict) -> dict:
    """A Hessian-vector product."""
    return jax.jvp(jax.grad(call.loss), (floating,), (_weights(floating),))[1]


def _weights(tree: Any) -> Any:
    """Dense fixed numbers in [-1, 1], in the shapes and dtypes of the tree."""
    return jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape), tree)


def sharded(call: Call, floating: dict, varied: Callable[[int], bool]) -> dict:
    """`shard_map` over two devices, of which each has its own part of the varied arguments."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    names = list(floating)
    specs = {n: P("i") if varied(k) else P() for k, n in enumerate(names)}
    stacked = {n: _pair(v) if varied(k) else v for k, (n, v) in enumerate(floating.items())}

    def local(floating, fixed):
        mine = {n: v[0] if specs[n] else v for n, v in floating.items()}
        y = call.layout.call(call.f, mine, fixed)
        return jax.tree.map(lambda y: _varying(y)[None], y)

    def value(floating):
        if call.bare:
            parts = [{n: v[k] if specs[n] else v for n, v in floating.items()} for k in range(2)]
            return _stacked([call.value(part) for part in parts])
        f = jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=P("i"))
        return f(floating, call.fixed)

    return call.pulled_back(value, stacked, _pair(call.dy))


def _varying(y: jax.Array) -> jax.Array:
    """y as one that may differ between devices, as the output's sharding says."""
    varies = "i" in jax.typeof(y).manual_axis_type.varying
    return y if varies else jax.lax.pcast(y, "i", to="varying")


def sharded_all(call: Call, floating: dict) -> dict:
    return sharded(call, floating, lambda k: True)


def sharded_first(call: Call, floating: dict) -> dict:
    return sharded(call, floating, lambda k: k == 0)


FIRST_ORDER = (
    checkpointed,
    in_scan,
    in_cond,
    in_while,
    vmapped,
    vmapped_each,
    sharded_all,
    sharded_first,
)
SECOND_ORDER = (reverse_over_reverse, forward_over_reverse)

# Two steps, batch entries or devices have the value times these: exact in every dtype.
STEPS = np.array([1.0, -0.5], np.float32)


def _times(tree: Any, s: Any) -> Any:
    return jax.tree.map(lambda y: y * s.astype(y.dtype), tree)


def _stacked(values: list) -> Any:
    return jax.tree.map(lambda *ys: jnp.stack(ys), *values)


def _pair(tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.stack([v * float(s) for s in STEPS]), tree)


def every_way(ways: tuple, f: Callable, layout: Layout) -> Callable:
    """(floating, fixed, dy) -> the results of all ways, by name: one program to compile."""

    def run(floating, fixed, dy):
        call = Call(f, layout, fixed, dy)
        return {way.__name__: way(call, floating) for way in ways}

    return run
