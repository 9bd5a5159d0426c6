"""A rule beside autodiff and its public counterparts: time, memory and digits, in one run.

All of one op's contenders are compiled first and then run in turn, A B C A B C, on the same
arguments; what is quoted is the median of the ratios within a round, with its quartiles. The rule
runs twice in each round: the ratio of the two is the noise of this machine.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.bench.peers import Unavailable, counterpart, takes
from funcbp.bench.roofline import Roofline
from funcbp.case import Case
from funcbp.check.compare import saved_bytes, split, widened
from funcbp.core import Op
from funcbp.jaxprs import equations

__all__ = ["Row", "measure"]

# A sample is of as many calls as take so long, in seconds.
SAMPLE = 0.01
# Draws of each test case on which digits are counted.
DRAWS = 16
# Primitives whose results depend on many numbers of an argument, by their beginnings.
ACROSS = ("reduce", "dot", "conv_", "cum", "gather", "scatter", "sort", "arg", "scan", "while",
          "select_and", "random", "ragged")  # fmt: skip
# Float64 is no truth where `plain` and the rule differ in it by more than the first, relatively,
# and by less than the second, which its own rounding explains.
SURE, ROUNDING = 1e-9, 1e-12


class Row(NamedTuple):
    """One op against one contender; the ratios are the rule's figure over the contender's.

    Attributes:
        op: its name.
        kind: pointwise, if each number of the result depends on one of each argument; else other.
        case: the name of its bench case.
        title: the op's name, and the case's where the op has several for the bench.
        dtype: of the floating arguments.
        against: autodiff (of the op's plain function), jax, flax or torch.
        seconds: median time of the rule's value and gradient.
        time, low, high: median ratio of the times, and its quartiles.
        noise: the larger quartile of the rule against itself, as a ratio of at least 1.
        saved: bytes kept for the backward pass; 1 if both keep nothing, None if unknown.
        temporary: bytes of scratch memory of the compiled program; None if unknown.
        error: mean relative error against float64, over the op's test cases.
        share: of the time that this machine's matmul rate and copy bandwidth allow.
    """

    op: str
    kind: str
    case: str
    title: str
    dtype: str
    against: str
    seconds: float
    time: float
    low: float
    high: float
    noise: float
    saved: float | None
    temporary: float | None
    error: float | None
    share: float


class _Contender(NamedTuple):
    """One way to value and gradient of the bench case; `run` blocks until it is there."""

    run: Callable[[], Any]
    saved: int | None
    temporary: int | None
    errors: list[np.ndarray | None] | None
    flops: float = 0.0
    bytes: float = 0.0


class _Draw(NamedTuple):
    """One draw of a test case, with value and cotangents of `plain` in float64.

    `known` is False where `plain` loses its digits in float64 too.
    """

    layout: Any
    floating: dict[str, Any]
    fixed: list[Any]
    dy: Any
    truth: list[np.ndarray]
    known: list[np.ndarray]


def measure(
    op: Op,
    case: Case,
    dtype: str,
    against: Sequence[str],
    roofline: Roofline,
    rounds: int = 9,
    digits: bool = True,
) -> Iterable[Row]:
    """One row for each contender that exists for this op.

    Args:
      op: the op.
      case: one of its bench cases.
      dtype: of the floating arguments.
      against: of "autodiff", "jax", "flax", "torch".
      roofline: what the machine can do.
      rounds: of the contenders in turn.
      digits: whether errors are measured too.
    """
    draws = tuple(_draws(op, dtype)) if digits else ()
    rule = _ours(op, case, dtype, draws)
    others: dict[str, Any] = {}
    for name in against:
        try:
            others[name] = (
                _ours(op.plain, case, dtype, draws)
                if name == "autodiff"
                else counterpart(name, op, case, dtype, lambda f: _ours(f, case, dtype, draws))
            )
        except Unavailable:
            continue
    runs = [rule.run, *(other.run for other in others.values()), rule.run]
    calls = [_calls(run) for run in runs]
    samples = [
        [_seconds(run, n) for run, n in zip(runs, calls, strict=True)] for _ in range(rounds)
    ]
    noise = statistics.quantiles([max(s[0] / s[-1], s[-1] / s[0]) for s in samples], n=4)[2]
    seconds = statistics.median(min(s[0], s[-1]) for s in samples)
    share = roofline.seconds(dtype, rule.flops, rule.bytes) / seconds
    for k, (name, other) in enumerate(others.items(), 1):
        ratios = statistics.quantiles([(s[0] + s[-1]) / 2 / s[k] for s in samples], n=4)
        yield Row(
            op.name,
            _kind(op, case, dtype),
            case.name,
            f"{op.name}, {case.name}" if sum(c.bench for c in op.cases) > 1 else op.name,
            dtype,
            name,
            seconds,
            ratios[1],
            ratios[0],
            ratios[2],
            noise,
            _ratio(rule.saved, other.saved),
            _ratio(rule.temporary, other.temporary),
            _of_errors(rule.errors, other.errors),
            share,
        )


def _kind(op: Op, case: Case, dtype: str) -> str:
    layout, floating, fixed = split(*case.build(0, dtype))
    program = jax.make_jaxpr(lambda given: layout.call(op.plain, given, fixed))(floating)
    names = {eqn.primitive.name for eqn in equations(program.jaxpr)}
    return "other" if any(name.startswith(ACROSS) for name in names) else "pointwise"


def _ours(f: Callable, case: Case, dtype: str, draws: Sequence[_Draw]) -> _Contender:
    """A JAX function of the op's arguments, compiled with its pullback."""
    args, kwargs = case.build(0, dtype)
    layout, floating, fixed = split(args, kwargs)
    y = jax.eval_shape(lambda floating: layout.call(f, floating, fixed), floating)
    dy = _cotangent(y, 1)
    compiled = jax.jit(_pulled(f, layout)).lower(floating, fixed, dy).compile()
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    # Read once: arguments and cotangent; written once: value and cotangents, of the same sizes.
    moved = 2 * _bytes((floating, dy)) + _bytes(fixed)
    return _Contender(
        lambda: jax.block_until_ready(compiled(floating, fixed, dy)),
        saved_bytes(f, *args, **kwargs),
        memory.temp_size_in_bytes if memory is not None else None,
        _errors(f, draws) if draws else None,
        float(cost.get("flops", 0.0)),
        moved,
    )


def _bytes(tree: Any) -> float:
    leaves = [a for a in jax.tree.leaves(tree) if isinstance(a.dtype, np.dtype)]  # no keys
    return float(sum(a.size * a.dtype.itemsize for a in leaves))


def _pulled(f: Callable, layout: Any) -> Callable:
    """(floating, fixed, dy) -> (value, cotangents); the value alone if dy is None."""

    def run(floating, fixed, dy):
        if dy is None:
            return layout.call(f, floating, fixed), None
        y, pullback = jax.vjp(lambda floating: layout.call(f, floating, fixed), floating)
        # A counterpart may return a wider dtype than the op, and its own kind of tuple.
        leaves, tree = jax.tree.flatten(y)
        d = [d.astype(y.dtype) for d, y in zip(jax.tree.leaves(dy), leaves, strict=True)]
        return y, pullback(jax.tree.unflatten(tree, d))[0]

    return run


def _cotangent(y: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), y)


def _draws(op: Op, dtype: str) -> Iterable[_Draw]:
    """The op's test cases, which hold its tails, ties and offsets."""
    for case in op.cases:
        if case.bench or dtype not in case.dtypes:
            continue
        programs: list[Callable] = []
        for seed in range(DRAWS):
            layout, floating, fixed = split(*case.build(seed, dtype))
            programs = programs or [jax.jit(_pulled(f, layout)) for f in (op.plain, op)]
            dy = _cotangent(programs[0].eval_shape(floating, fixed, None)[0], seed)
            with jax.enable_x64(True):
                wide = jax.tree.map(lambda v: np.asarray(v).astype(np.float64), (floating, dy))
                truth, ours = (
                    list(map(np.asarray, jax.tree.leaves(run(wide[0], fixed, wide[1]))))
                    for run in programs
                )
            known = [_is_known(g, t) for g, t in zip(ours, truth, strict=True)]
            yield _Draw(layout, floating, fixed, dy, truth, known)


def _is_known(rule: np.ndarray, plain: np.ndarray) -> np.ndarray:
    scale = np.max(np.abs(plain[np.isfinite(plain)]), initial=1.0)
    with np.errstate(all="ignore"):
        return (_relative(rule, plain) < SURE) | (np.abs(rule - plain) > ROUNDING * scale)


def _errors(f: Callable, draws: Sequence[_Draw]) -> list[np.ndarray | None]:
    """For each draw the relative errors of value and cotangents; None if f has no such settings."""
    errors: list[np.ndarray | None] = []
    programs: dict[Any, Callable] = {}
    for layout, floating, fixed, dy, truth, known in draws:
        if not takes(f, layout.settings):
            errors.append(None)
            continue
        run = programs.setdefault(layout, jax.jit(_pulled(f, layout)))
        got = map(widened, jax.tree.leaves(run(floating, fixed, dy)))
        found = [_relative(g, t)[k] for g, t, k in zip(got, truth, known, strict=True)]
        errors.append(np.concatenate(found))
    return errors


def _of_errors(ours: Sequence | None, theirs: Sequence | None) -> float | None:
    """The ratio of the mean errors, each at most 1, on the draws that both take."""
    if ours is None or theirs is None:
        return None
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    if not both:
        return None
    return _ratio(*(float(np.mean(np.concatenate(errors))) for errors in zip(*both, strict=True)))


def _relative(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        error = np.abs(got - truth) / np.abs(truth)
    same = (got == truth) | (np.isnan(got) & np.isnan(truth))
    return np.where(same, 0.0, np.where(np.isfinite(error), np.minimum(error, 1.0), 1.0))


def _calls(run: Callable[[], Any]) -> int:
    """How many calls make one sample; the first call, which may allocate, is not timed."""
    run()
    return max(1, round(SAMPLE / max(_seconds(run, 1), 1e-6)))


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    if ours is None or theirs is None:
        return None
    if not theirs:
        return 1.0 if not ours else float("inf")
    return ours / theirs
