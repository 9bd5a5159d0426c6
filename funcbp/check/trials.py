"""What is tried on a rule beyond the caller's call: values, shapes, types, transformations."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check import explore
from funcbp.check.branches import branches
from funcbp.check.compare import split, widened
from funcbp.check.diagnose import Explanation
from funcbp.check.evaluate import compiled
from funcbp.check.explore import Variant
from funcbp.check.hijax import Primitive
from funcbp.check.noise import FLOOR, faintest
from funcbp.check.program import Broken, Program
from funcbp.check.purpose import has_value, identity, reason

if TYPE_CHECKING:
    from funcbp.check.examine import Search

# How far two runs of the same rule may differ, in units of eps**FLOOR.
AGREE = 32
# Elements up to which the caller's own values are judged in other types.
OWN = 50_000
NOT_LINEAR = "the pullback is not linear"


def pulled(
    search: "Search", program: Program, variant: Variant, dys: list
) -> dict[str, np.ndarray]:
    _, floating, fixed = split(variant.args, {})
    return {n: widened(v) for n, v in program.rule(floating, fixed, dys)[1].items()}


def nonlinear(
    search: "Search", program: Program, variant: Variant, dys: list, argument: str
) -> Explanation | None:
    """Additivity and scaling in the cotangent."""
    other = program.cotangents([search.seed, 77])
    pull = {
        "a": dys,
        "b": other,
        "a+b": [a + b for a, b in zip(dys, other, strict=True)],
        "64a": [64 * a for a in dys],
        "a/64": [a / 64 for a in dys],
        "-a": [-a for a in dys],
        "0": [0 * a for a in dys],
    }
    got = {k: pulled(search, program, variant, v)[argument] for k, v in pull.items()}
    if np.all(np.isfinite(got["a"])) and not np.all(np.isfinite(got["0"])):
        return "nonfinite", "a cotangent of zeros gives nan"
    if any(not np.all(np.isfinite(v)) for v in got.values()):
        return None
    a, b = got["a"], got["b"]
    scale = float(max(np.max(np.abs(a), initial=0.0), np.max(np.abs(b), initial=0.0)))
    _, floating, fixed = split(variant.args, {})
    if scale <= AGREE * faintest(program, floating, fixed, dys, argument):
        return None  # nothing but rounding
    eps = float(jnp.finfo(program.types[argument][1]).eps) ** FLOOR * AGREE * (scale + 1e-30)
    if scale and np.max(np.abs(a - b)) <= eps and np.max(np.abs(a + got["-a"])) > eps:
        return "ignores_cotangent", "it is the same whatever the cotangent of the output is"
    # A factor of 2 is exact in every type; a sum is rounded as the rule rounds.
    if np.max(np.abs(got["a+b"] - a - b), initial=0.0) > max(eps, 0.03 * scale):
        return "nonlinear_in_cotangent", f"{NOT_LINEAR}: the sum of two cotangents shows it"
    off = {
        "a cotangent times 64": np.abs(got["64a"] / 64 - a),
        "a cotangent divided by 64": np.abs(got["a/64"] * 64 - a),
        "minus a cotangent": np.abs(got["-a"] + a),
        "a cotangent of zeros": np.abs(got["0"]),
    }
    for what, error in off.items():
        if np.max(error, initial=0.0) > max(eps, 1e-3 * scale):
            return "nonlinear_in_cotangent", f"{NOT_LINEAR}: {what} shows it"
    return None


def linear(search: "Search", variant: Variant) -> None:
    """The pullback as a linear map, for each argument."""
    program = search.program(variant.args)
    dys = program.cotangents([search.seed, 5])
    _, floating, fixed = split(variant.args, {})
    for n in program.names:
        if not floating[n].size:
            continue
        odd = nonlinear(search, program, variant, dys, n)
        if odd is not None:
            truth = {k: np.asarray(v) for k, v in program.truth(floating, fixed, dys)[1].items()}
            if search.subject.word or identity(search, program, variant, n):
                search.surrogate(reason(search, "changes the cotangent in passing"), variant)
            got = pulled(search, program, variant, dys)
            errors = {search.subject.argument(k): {"rule": off(got[k], truth[k])} for k in got}
            message = f"cotangent of {search.subject.argument(n)}: {odd[1]} ({variant.what})"
            search.wrong(odd[0], n, message, variant, errors)


def values(search: "Search", base: tuple) -> None:
    """Other values at the same shapes."""
    program = search.program(base)
    chosen = itertools.chain(
        explore.revalued(base, search.seed), branches(program, base, search.seed)
    )
    for k, variant in enumerate(chosen):
        if search.late():
            return
        if has_value(program, variant):
            search.judge(program, variant, program.cotangents([search.seed, 100 + k]))


def again(search: "Search", variant: Variant) -> None:
    """Eagerly, a second time, and with another call in between."""
    program = search.program(variant.args)
    _, floating, fixed = split(variant.args, {})
    dys = program.cotangents([search.seed, 6])
    jitted = pulled(search, program, variant, dys)
    other = explore.resampled(variant.args, search.seed + 3).args
    _, floating_other, fixed_other = split(other, {})

    def pullback(floating, fixed):
        call = search.subject.call

        def real(floating):
            y = jax.tree.leaves(program.layout.call(call, floating, fixed))
            return [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]

        y, pull = jax.vjp(real, floating)
        typed = [jnp.asarray(d, v.dtype) for d, v in zip(dys, y, strict=True)]
        return lambda: {n: widened(v) for n, v in pull(typed)[0].items()}

    with program.precision():
        first = pullback(floating, fixed)
        once = first()
        pullback(floating_other, fixed_other)()
        later = first()
    _same(search, program, once, later, variant, "a pullback changes after another call")
    _same(search, program, once, jitted, variant, "jit changes the cotangent")


def _same(
    search: "Search", program: Program, a: dict, b: dict, variant: Variant, what: str
) -> None:
    _, floating, fixed = split(variant.args, {})
    dys = program.cotangents([search.seed, 6])
    for n in a:
        faint = AGREE * faintest(program, floating, fixed, dys, n)
        if not _close(a[n], b[n], program.types[n][1], faint):
            if search.subject.word:
                return
            at = np.unravel_index(np.argmax(np.abs(a[n] - b[n])), a[n].shape)
            message = f"{what}: cotangent of {search.subject.argument(n)} is {shown(a[n][at])}, "
            search.wrong("stale_residual", n, message + f"then {shown(b[n][at])}", variant)


def mapped(search: "Search", variant: Variant) -> None:
    """Under vmap: all arguments mapped, and each alone."""
    program = search.program(variant.args)
    copies = [
        explore.resampled(variant.args, search.seed + 31 + k).args if k else variant.args
        for k in range(3)
    ]
    parts = [split(c, {}) for c in copies]
    floatings, fixeds = [p.floating for p in parts], [p.fixed for p in parts]
    dys = [program.cotangents([search.seed, 50 + k]) for k in range(3)]
    names = [n for n in program.names if floatings[0][n].size]
    choices = [tuple(program.names)] + ([(n,) for n in names] if len(names) > 1 else [])
    for chosen in choices:
        if search.late():
            return
        points = [
            {n: (floatings[k] if n in chosen else floatings[0])[n] for n in program.names}
            for k in range(3)
        ]
        try:
            alone = [program.rule(points[k], fixeds[0], dys[k])[1] for k in range(3)]
            together = _vmapped(search, program, chosen, points, fixeds[0], dys)
        except Exception as error:
            search.note(f"not under vmap: {type(error).__name__}: {str(error)[:120]}")
            return
        for n in names:
            stack = np.stack([widened(a[n]) for a in alone])
            expected = stack if n in chosen else stack.sum(0)
            got = widened(together[n])
            faint = AGREE * faintest(program, points[0], fixeds[0], dys[0], n)
            close = _close(got, expected, program.types[n][1], faint)
            if close or not np.all(np.isfinite(expected)):
                continue
            if search.subject.word:
                return
            at = np.unravel_index(np.argmax(np.abs(got - expected)), got.shape)
            over = "all arguments" if len(chosen) > 1 else search.subject.argument(*chosen)
            message = (
                f"under vmap over {over}, the cotangent of {search.subject.argument(n)} is "
                f"{shown(got[at])} at {list(map(int, at))} where one call at a time gives "
                f"{shown(expected[at])}"
            )
            search.wrong("vmap", n, message, variant)


def _vmapped(
    search: "Search", program: Program, chosen: tuple, points: list, fixed: list, dys: list
) -> dict:
    axes = {n: 0 if n in chosen else None for n in program.names}
    stacked = {
        n: jnp.stack([p[n] for p in points]) if n in chosen else v for n, v in points[0].items()
    }

    def run(stacked, dys):
        def real(stacked):
            def one(floating):
                y = jax.tree.leaves(program.layout.call(search.subject.call, floating, fixed))
                return [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]

            return jax.vmap(one, in_axes=(axes,))(stacked)

        y, pull = jax.vjp(real, stacked)
        return pull([jnp.asarray(d, v.dtype) for d, v in zip(dys, y, strict=True)])[0]

    with program.precision():
        return compiled(run)(stacked, [np.stack(d) for d in zip(*dys, strict=True)])


def second(search: "Search", variant: Variant) -> None:
    """The derivative of the pullback along a direction."""
    program = search.program(variant.args)
    _, floating, fixed = split(variant.args, {})
    dys = program.cotangents([search.seed, 8])
    rng = np.random.default_rng([search.seed, 9])
    along = {n: rng.standard_normal(v.shape) for n, v in floating.items()}
    wide = program.promoted(floating)

    def derivative(run, floating):
        typed = {n: jnp.asarray(along[n], v.dtype) for n, v in floating.items()}
        return jax.jvp(lambda fl: run(fl, fixed, dys)[1], (floating,), (typed,))[1]

    try:
        with program.precision():
            got = compiled(lambda fl: derivative(program.eager, fl))(floating)
        with jax.enable_x64(True):
            run = program._derived(program.evaluator)
            exact = compiled(lambda fl: derivative(run, fl))(wide)
            h = 1e-5
            ahead, behind = (
                program._truth({n: v + s * h * along[n] for n, v in wide.items()}, fixed, dys)
                for s in (1, -1)
            )
    except Exception as error:
        search.note(f"no second derivative: {type(error).__name__}: {str(error)[:120]}")
        return
    for n, g in got.items():
        t, g = np.asarray(exact[n]), widened(g)
        slope = (np.asarray(ahead[1][n]) - np.asarray(behind[1][n])) / (2 * h)
        scale = float(np.max(np.abs(t), initial=0.0))
        first = float(np.max(np.abs(np.asarray(ahead[1][n])), initial=0.0))
        scale = max(scale, 1e-3 * first)
        eps = float(jnp.finfo(program.types[n][1]).eps)
        bound = max(0.02, 30 * eps**FLOOR) * scale
        if not scale or not np.all(np.abs(slope - t) < 0.1 * bound):
            continue
        off = np.where(np.isfinite(g), np.abs(g - t), np.inf)
        if not np.any(off > bound):
            continue
        if search.subject.word:
            return
        at = np.unravel_index(np.argmax(off), g.shape)
        message = (
            f"the first derivative is right, the second is not: along a random direction the "
            f"cotangent of {search.subject.argument(n)} changes by {shown(g[at])} at "
            f"{list(map(int, at))} where it should by {shown(t[at])}"
        )
        search.wrong("second_order", n, message, variant)


def tangent(search: "Search", variant: Variant) -> None:
    """The rule for tangents: nan where its transpose is not, or another than the pullback's."""
    program = search.program(variant.args)
    _, floating, fixed = split(variant.args, {})
    rng = np.random.default_rng([search.seed, 10])
    along = {n: jnp.asarray(rng.standard_normal(v.shape), v.dtype) for n, v in floating.items()}
    wide = program.promoted(floating)

    def value(call):
        def real(floating):
            y = jax.tree.leaves(call(floating))
            return [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]

        return real

    rule = value(lambda fl: program.layout.call(search.subject.call, fl, fixed))
    plain = value(lambda fl: program.evaluator(*[fl[n] for n in sorted(fl)], *fixed))
    try:
        with program.precision():
            value_there, got = compiled(lambda fl, v: jax.jvp(rule, (fl,), (v,)))(floating, along)
        with jax.enable_x64(True):
            exact = compiled(lambda fl, v: jax.jvp(plain, (fl,), (v,))[1])(
                wide, {n: np.asarray(v).astype(wide[n].dtype) for n, v in along.items()}
            )
    except Exception as error:
        search.note(f"no tangent: {type(error).__name__}: {str(error)[:120]}")
        return
    for y, g, t in zip(value_there, got, exact, strict=True):
        y, g, t = widened(y), widened(g), np.asarray(t)
        if np.any(np.isfinite(y) & ~np.isfinite(g) & np.isfinite(t)):
            message = "the tangent is not finite where the derivative is"
            search.wrong("nonfinite", program.names[0], message, variant)
        # A custom_jvp's pullback is its tangent transposed, and was judged; these have one of each.
        if not isinstance(search.subject.rule, Primitive) or not np.all(np.isfinite(g)):
            continue
        if not _close(g, t, program.types[program.names[0]][1], 0.0):
            ratio = float(np.real(np.vdot(t, g) / np.vdot(t, t))) if np.any(t) else 0.0
            scaled = _close(g, ratio * t, program.types[program.names[0]][1], 0.0)
            cause = ("sign" if abs(ratio + 1) < 1e-3 else "scale") if scaled else "unknown"
            at = np.unravel_index(np.argmax(np.abs(g - t)), g.shape)
            message = (
                f"the pullback is right, the rule for tangents is not: along a random direction it "
                f"gives {shown(g[at])} at {list(map(int, at))} where it should {shown(t[at])}"
            )
            search.wrong(cause, None, message, variant)


def precisions(search: "Search", base: tuple, own: Sequence[Any]) -> None:
    """The same values in narrower and wider types; the caller's own too, if others were drawn."""
    count = sum(np.size(v) for v in jax.tree.leaves(own))
    drawn = _shapes(own) == _shapes(base) and explore.usual(own)
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        wide = dtype == "float64"
        chosen = (base,) if drawn or wide or count > OWN else (base, tuple(own))
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            for args in chosen:
                variant = explore.recast(args, dtype)
                if search.late() or variant is None:
                    continue
                try:
                    _recast(search, args, variant)
                except Broken as broken:
                    search.note(f"{variant.what}: {broken}")


def _shapes(args: Sequence[Any]) -> list[tuple[int, ...]]:
    return [np.shape(v) for v in jax.tree.leaves(args)]


def _recast(search: "Search", args: tuple, variant: Variant) -> None:
    program = search.program(variant.args)
    if not has_value(program, variant):
        return
    before = {v.dtype for v in split(args, {}).floating.values()}
    after = {dtype for _, dtype in program.types.values()}
    given = {y.dtype for y in program.outputs if jnp.issubdtype(y.dtype, jnp.inexact)}
    # A function that keeps a type is written for any; one that mixes them may have its reasons.
    if len(before) == 1 and given == after:
        search.types(program, variant)
    search.judge(program, variant, program.cotangents([search.seed, 200]))


def shapes(search: "Search", base: tuple) -> None:
    """Other shapes, where the function takes them."""
    for k, variant in enumerate(explore.reshaped(base, search.subject.primal)):
        if search.late():
            return
        try:
            program = search.program(variant.args)
            if has_value(program, variant):
                for kind in ("normal", "ones")[: 2 if variant.regime == "long" else 1]:
                    dys = program.cotangents([search.seed, 300 + k], kind)
                    search.judge(program, variant, dys)
                half = explore.recast(variant.args, "bfloat16")
                if variant.regime == "long" and half is not None:
                    half = half._replace(what=f"{variant.what}, in bfloat16")
                    _recast(search, variant.args, half)
        except Broken:
            continue


def settings(search: "Search", base: tuple) -> None:
    """Other static arguments, where the function takes them."""
    for setting in search.subject.settings:
        subject = search.subject._replace(
            call=setting.call, primal=setting.primal, static=setting.static, settings=()
        )
        other = type(search)(subject, search.where, search.seed, search.deadline)
        for seed in (61, 62):
            variant = explore.resampled(base, search.seed + seed)
            variant = variant._replace(what=setting.what)
            try:
                program = other.program(variant.args)
                if has_value(program, variant):
                    other.judge(program, variant, program.cotangents([search.seed, seed]))
            except Broken:
                continue
            except (TypeError, ValueError, IndexError, ArithmeticError):
                break  # no setting that the function takes
        search.judged += other.judged


def off(got: np.ndarray, truth: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        scale = float(np.max(np.abs(truth), initial=0.0)) or 1.0
        return float(np.max(np.abs(got - truth), initial=0.0) / scale)


def _close(a: np.ndarray, b: np.ndarray, dtype: Any, faint: float) -> bool:
    if a.shape != b.shape:
        return False
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    size = np.abs(b[np.isfinite(b)])
    scale = float(size.max(initial=0.0))
    bound = AGREE * float(jnp.finfo(dtype).eps) ** FLOOR * scale + faint
    with np.errstate(invalid="ignore"):
        return bool(np.all(same | (np.abs(a - b) <= bound)))


def shown(value: Any) -> str:
    value = np.asarray(value)
    if np.iscomplexobj(value):
        return f"{complex(value):.6g}"
    return f"{float(value):.6g}"
