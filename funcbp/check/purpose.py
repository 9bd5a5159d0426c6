"""Whether a gradient that is not the derivative is meant to be so, by evidence or by word."""

import re
from typing import TYPE_CHECKING

import jax
import numpy as np

from funcbp.check import explore
from funcbp.check.compare import split
from funcbp.check.counterfactual import straight_through
from funcbp.check.evaluate import Evaluator, compiled
from funcbp.check.explore import Variant
from funcbp.check.judge import Judgement
from funcbp.check.program import Program

if TYPE_CHECKING:
    from funcbp.check.examine import Search


def deliberate(
    search: "Search", program: Program, variant: Variant, dys: list, judgement: Judgement
) -> None:
    """Raises _Found with "surrogate" where there is evidence of purpose."""
    if search.subject.word:
        search.surrogate(reason(search, "is not the derivative"), variant)
    wrong = {e.argument for e in judgement.wrong}
    by_design = not _changes(search, variant)
    if by_design and all(identity(search, program, variant, n) for n in wrong):
        search.surrogate(
            "its forward pass hands an argument on unchanged: the gradient alone is shaped",
            variant,
        )
    if any(_flat(search, program, variant, dys, n) for n in wrong):
        search.surrogate(
            "the true derivative is 0 almost everywhere, and the rule stands in for it", variant
        )
    if _stepped(search, program, variant, dys, judgement):
        search.surrogate("it passes a rounding or another step as if it were none", variant)
    if _sampled(program):
        search.surrogate("it samples in a loop: the gradient is an estimator of its own", variant)
    if _limit(search, program, variant, dys, judgement):
        search.surrogate(
            "it is the derivative of what the loop converges to, not of its last step", variant
        )


def reason(search: "Search", does: str) -> str:
    return f"{does}, as declared: {search.subject.word}"


def has_value(program: Program, variant: Variant) -> bool:
    """Whether the function has a value there."""
    _, floating, fixed = split(variant.args, {})
    try:
        value, slopes = program.truth(floating, fixed, program.cotangents([0]))
        if not program.ends(floating, fixed):
            return False
    except Exception:
        return False
    # An infinity is meant to be taken where it drops out of value and gradient, as -inf does in a
    # softmax.
    checked = (*value, *(slopes.values() if variant.regime == "infinite" else ()))
    return all(np.all(np.isfinite(np.asarray(v))) for v in checked)


def identity(search: "Search", program: Program, variant: Variant, argument: str) -> bool:
    """Whether an output is an argument, at any values; `argument` is that, or shapes it."""
    matched: set[str] | None = None
    drawn = [explore.resampled(variant.args, search.seed + 11 + seed).args for seed in range(2)]
    # A relu hands on what is positive: so values of either sign too, where they have a value.
    free = Variant("values of either sign", "free", explore.unrestricted(variant.args, 13))
    if has_value(program, free):
        drawn.append(free.args)
    for k, args in enumerate(drawn):
        _, floating, fixed = split(args, {})
        value, cotangents = program.truth(floating, fixed, program.cotangents([search.seed, k]))
        wide = program.promoted(floating)
        same = {
            n
            for n, v in wide.items()
            for y in value
            if v.size and y.shape == v.shape and np.array_equal(np.asarray(y), v)
        }
        if same and argument not in same and not np.any(np.asarray(cotangents[argument])):
            same.add(argument)
        matched = same if matched is None else matched & same
    return bool(matched) and argument in (matched or ())


def _changes(search: "Search", variant: Variant) -> bool:
    """Whether with other settings the function hands no argument on: x**n is x for one n alone."""
    _, floating, fixed = split(variant.args, {})
    for setting in search.subject.settings:
        subject = search.subject._replace(call=setting.call, primal=setting.primal)
        try:
            program = Program(subject, variant.args)
            value = program.truth(floating, fixed, program.cotangents([0]))[0]
        except Exception:
            continue
        wide = program.promoted(floating).values()
        if not any(np.array_equal(np.asarray(y), v) for y in value for v in wide):
            return True
    return False


def _flat(search: "Search", program: Program, variant: Variant, dys: list, argument: str) -> bool:
    """Whether the output depends on the argument, and in steps."""
    values = []
    for seed in range(4):
        fresh = explore.resampled(variant.args, search.seed + 21 + seed).args
        _, new, fixed = split(fresh, {})
        _, old, _ = split(variant.args, {})
        moved = old | {argument: new[argument]}
        value, cotangents = program.truth(moved, fixed, dys)
        if np.any(np.asarray(cotangents[argument])):
            return False
        values.append(np.concatenate([np.ravel(np.asarray(v)) for v in value]))
    return any(not np.array_equal(values[0], v, equal_nan=True) for v in values[1:])


def _stepped(
    search: "Search", program: Program, variant: Variant, dys: list, judgement: Judgement
) -> bool:
    """Whether the rule is the derivative with round, floor, ceil and sign as identities."""
    if not re.search(r"\b(round|floor|ceil|sign)\b", str(program.closed)):
        return False
    _, floating, fixed = split(variant.args, {})
    wide = program.promoted(floating)
    for e in judgement.wrong:
        passed = straight_through(program.closed, wide, fixed, e.argument, dys)
        off = float(np.max(np.abs(passed - e.rule), initial=0.0))
        if off > 1e-3 * float(np.max(np.abs(passed - e.truth), initial=0.0)):
            return False
    return True


def _limit(
    search: "Search", program: Program, variant: Variant, dys: list, judgement: Judgement
) -> bool:
    """Whether the rule is right for the loop's fixed point: an implicit derivative."""
    if not re.search(r"\b(while|scan)\[", str(program.closed)):
        return False
    _, floating, fixed = split(variant.args, {})
    longer = Evaluator(program.closed, promote=True, further=400)
    try:
        with jax.enable_x64(True):
            run = compiled(program._derived(longer))
            value, found = run(program.promoted(floating), fixed, dys)
    except Exception:
        return False
    for e in judgement.wrong:
        exact = np.asarray(found[e.argument])
        scale = float(np.max(np.abs(exact), initial=0.0))
        if not np.all(np.isfinite(exact)) or not scale:
            return False
        # Near the limit's derivative, and much nearer to it than to that of the last step.
        off = float(np.max(np.abs(exact - e.rule)))
        if off > 2e-3 * scale or off > 0.1 * np.max(np.abs(exact - e.truth)):
            return False
    return True


def _sampled(program: Program) -> bool:
    """Whether values are drawn by rejection, whose loop has no derivative that is of use."""
    text = str(program.closed)
    return bool(re.search(r"random_bits|threefry", text) and re.search(r"\bwhile\[", text))
