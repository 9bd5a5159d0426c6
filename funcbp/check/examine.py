"""Everything that is tried on one rule, from the caller's own values to the far corners."""

import contextlib
import os
import re
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check import explore
from funcbp.check.compare import named, split, widened
from funcbp.check.diagnose import Explanation, explain, of_regime
from funcbp.check.explore import Variant
from funcbp.check.finding import Finding
from funcbp.check.judge import Evidence, Judgement, judge
from funcbp.check.program import Broken, Program
from funcbp.check.purpose import deliberate, has_value
from funcbp.check.subject import Subject
from funcbp.check.trials import (
    again,
    linear,
    mapped,
    nonlinear,
    off,
    precisions,
    second,
    settings,
    shapes,
    shown,
    tangent,
    values,
)

__all__ = ["Search", "examine"]

# Elements above which a call is judged at smaller shapes, if the function takes them.
LARGE = 4_000_000
# Elements that a reader takes in; a fault that shows on more is looked for on fewer.
READABLE = 24
# Values at which a rule may lose a few digits.
EXTREME = ("large", "tiny", "offset", "infinite")
# How an error begins that a rule of the wrong structure makes.
FAULTY = ("TypeError", "ValueError", "AttributeError", "IndexError", "KeyError")


class _Found(Exception):
    """Ends the search."""

    def __init__(self, finding: Finding):
        self.finding = finding


class Search:
    """What is known of one rule so far; `wrong` and `surrogate` end the search."""

    def __init__(self, subject: Subject, where: Sequence[str], seed: int, deadline: float):
        self.subject, self.where, self.seed, self.deadline = subject, tuple(where), seed, deadline
        self.programs: dict[Any, Program] = {}
        self.notes: list[str] = []
        self.errors: dict[str, dict[str, float]] = {}
        self.undecided: list[str] = []
        self.judged = 0

    def program(self, args: Sequence[Any]) -> Program:
        layout, floating, fixed = split(tuple(args), {})
        types = tuple((n, v.shape, str(v.dtype)) for n, v in floating.items())
        others = tuple((np.shape(v), str(getattr(v, "dtype", ""))) for v in fixed)
        key = (layout, types, others)
        with contextlib.suppress(TypeError):
            hash(key)
            if key not in self.programs:
                self.programs[key] = Program(self.subject, args)
            return self.programs[key]
        return Program(self.subject, args)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wrong(
        self,
        cause: str,
        argument: str | None,
        message: str,
        variant: Variant,
        errors: dict | None = None,
    ) -> None:
        named = self.subject.argument(argument) if argument else None
        raise _Found(
            self.finding(
                "wrong", message, cause, named, errors or self.errors, variant.what, variant.args
            )
        )

    def surrogate(self, reason: str, variant: Variant) -> None:
        raise _Found(self.finding("surrogate", reason, input=variant.what, args=variant.args))

    def finding(
        self,
        verdict: str,
        message: str,
        cause: str | None = None,
        argument: str | None = None,
        errors: dict | None = None,
        input: str = "",
        args: tuple = (),
    ) -> Finding:
        """What is said of the rule."""
        subject = self.subject
        return Finding(
            f"{subject.name} ({subject.source})",
            self.where,
            verdict,
            cause,
            argument,
            message,
            self.errors if errors is None else errors,
            re.sub(r"argument [\d.]+(\[[^\]]*\])*", lambda m: subject.argument(m.group(0)), input),
            args,
            tuple(self.notes),
            subject.rule,
            subject.static,
        )

    def own(self, calls: Sequence[tuple]) -> None:
        """The caller's own arguments."""
        for k, args in enumerate(calls):
            variant = Variant("the values seen", "own", tuple(args))
            program = self.program(args)
            self.types(program, variant)
            for kind in ("normal", "ones"):
                self.judge(program, variant, program.cotangents([self.seed, k], kind), own=True)
                if not self.errors:
                    self.errors = self._measured(program, args, program.cotangents([self.seed, k]))
            outputs = program.cotangents([self.seed, k, 1])
            for i in range(len(outputs) if 1 < len(outputs) <= 8 else 0):
                alone = [d if j == i else np.zeros_like(d) for j, d in enumerate(outputs)]
                self.judge(program, variant, alone, own=True)

    def _measured(
        self, program: Program, args: Sequence[Any], dys: list
    ) -> dict[str, dict[str, float]]:
        """How far rule, autodiff and differences are from float64, for the report."""
        _, floating, fixed = split(tuple(args), {})
        errors = {}
        with contextlib.suppress(Exception):  # no derivative in its own precision
            truth = program.truth(floating, fixed, dys)[1]
            rule, autodiff = (f(floating, fixed, dys)[1] for f in (program.rule, program.autodiff))
            for n, t in truth.items():
                t = np.asarray(t)
                if not t.size:
                    continue
                at = np.unravel_index(np.nanargmax(np.abs(t)), t.shape)
                slope = program.slope(floating, fixed, dys, (n, at))
                errors[self.subject.argument(n)] = {
                    "rule": off(widened(rule[n]), t),
                    "autodiff": off(widened(autodiff[n]), t),
                    "finite_differences": off(np.asarray(slope.central), np.real(t[at])),
                }
        return errors

    def types(self, program: Program, variant: Variant) -> None:
        """The dtypes that bwd itself returns: JAX passes a wrong one on."""
        backward = self.subject.backward
        if backward is None:
            return

        def returned(args):
            y = self.subject.primal(*args)
            dy = jax.tree.map(
                lambda v: jnp.zeros(jnp.shape(v), jax.typeof(v).to_tangent_aval().dtype), y
            )
            return backward(args, dy)

        _, floating, fixed = split(variant.args, {})
        try:
            with program.precision():
                cotangents = jax.eval_shape(
                    lambda fl, fx: returned(program.layout.call(lambda *a: a, fl, fx)),
                    floating,
                    fixed,
                )
            paths = jax.tree_util.tree_flatten_with_path((tuple(cotangents), {}))[0]
        except Exception:  # said elsewhere, with JAX's own words
            return
        for path, leaf in paths:
            name = named(path)
            wanted = program.types.get(name, (None, leaf.dtype))[1]
            if leaf.dtype != wanted and leaf.dtype != jax.dtypes.float0:
                message = (
                    f"the rule's cotangent of {self.subject.argument(name)} has dtype {leaf.dtype} "
                    f"where it must have that of the argument, {wanted}: JAX passes it on unseen"
                )
                self.wrong("dtype", name, message, variant)

    def judge(self, program: Program, variant: Variant, dys: list, own: bool = False) -> None:
        """One point; raises _Found where the rule is wrong."""
        try:
            extreme, wider = variant.regime in EXTREME, variant.regime == "float64"
            judgement = judge(program, variant.args, dys, own, extreme, wider)
        except Broken as broken:
            self._broken(program, variant, dys, broken, own)
            return
        self.judged += 1
        for e in judgement.evidence:
            if not e.decided:
                said = (
                    f"{self.subject.argument(e.argument)}{list(e.index)}: the rule gives "
                    f"{shown(e.got)}, autodiff in float64 {shown(e.truth[e.index])}, and finite "
                    f"differences do not converge ({variant.what})"
                )
                if own:
                    self.undecided.append(said)
                else:
                    self.note(f"could not be decided: {said}")
        if judgement.wrong:
            self._explained(program, variant, dys, judgement)

    def _broken(
        self, program: Program, variant: Variant, dys: list, broken: Broken, own: bool
    ) -> None:
        """The rule raised: loud, so no fault elsewhere than on the caller's own call."""
        if not own:
            return
        _, floating, fixed = split(variant.args, {})
        try:
            program.autodiff(floating, fixed, dys)
        except Exception as error:
            raise broken from error
        text = str(broken)
        if text.startswith(FAULTY) and not _refuses(broken.__cause__):
            self.wrong(
                "structure", self._output(text), f"differentiating it raises {text}", variant
            )
        raise broken

    def _output(self, text: str) -> str | None:
        """Which argument JAX's message about a rule's result is of."""
        found = re.search(r"at output((?:\[[^\]]+\])+)", text)
        if found is not None:
            number, _, rest = found.group(1)[1:].partition("]")
            return f"argument {number}{rest}"
        return "argument 0" if len(self.subject.parameters) == 1 else None

    def _explained(
        self, program: Program, variant: Variant, dys: list, judgement: Judgement
    ) -> None:
        """Names the cause of what was found wrong, or that it is deliberate."""
        if all(e.kind == "gradient" for e in judgement.wrong):
            deliberate(self, program, variant, dys, judgement)
        regime = variant.regime
        if regime == "own":
            regime = self._own_regime(program, variant, dys, judgement)
        best: tuple[Evidence, Explanation] | None = None
        order = sorted(judgement.wrong, key=lambda e: e.kind != "value")
        for e in order[:4]:
            found = self._cause(program, variant, dys, judgement, e, regime)
            if best is None or _weakness(found) < _weakness(best[1]):
                best = (e, found)
            if e.kind == "value":
                break
        assert best is not None
        e, (cause, words) = best
        if cause == "unknown":
            again(self, variant)  # a rule that remembers another call explains anything
        what = self.subject.argument(e.argument)
        got = f"{shown(e.got)} at {list(e.index)}" if e.rule.ndim else shown(e.got)
        kind = "value" if e.kind == "value" else f"cotangent of {what}"
        message = (
            f"the rule's {kind} is {got} where it should be {shown(e.expected)}: {words} "
            f"(with {variant.what})"
        )
        errors = {self.subject.argument(n): v for n, v in judgement.errors.items()}
        self.wrong(cause, None if e.kind == "value" else e.argument, message, variant, errors)

    def _cause(
        self,
        program: Program,
        variant: Variant,
        dys: list,
        judgement: Judgement,
        e: Evidence,
        regime: str,
    ) -> Explanation:
        if e.kind == "gradient" and np.all(np.isfinite(e.rule)):
            odd = nonlinear(self, program, variant, dys, e.argument)
            if odd is not None:
                return odd
        found = explain(program, variant.args, dys, judgement, e)
        if regime in ("generic", "own"):
            return found
        return of_regime(regime, e, found)

    def _own_regime(
        self, program: Program, variant: Variant, dys: list, judgement: Judgement
    ) -> str:
        """What is particular about the caller's values, when generic ones of these types pass."""
        _, floating, fixed = split(variant.args, {})
        for seed in range(2):
            generic = explore.resampled(variant.args, self.seed + seed)
            try:
                again = judge(program, generic.args, dys, own=False)
            except Exception:
                return "own"
            if any(e.kind in ("gradient", "nonfinite", "value") for e in again.wrong):
                return "own"
        real = [np.asarray(widened(v)) for v in floating.values() if np.size(v)]
        flat = [np.abs(v[np.isfinite(v)]) for v in real]
        largest = max((float(v.max(initial=0.0)) for v in flat), default=0.0)
        if any(not np.all(np.isfinite(v)) for v in real):
            return "infinite"
        if any(v.size > 3 and abs(v.mean()) > 25 * v.std() > 0 for v in real):
            return "offset"
        if largest > 12:
            return "large"
        if largest < 2e-3 and largest > 0:
            return "tiny"
        for e in judgement.wrong:
            at = floating.get(e.argument)
            where = None if at is None else np.asarray(at)[e.index]
            if where is not None and where == 0:
                return "zero"
        if any(np.any(v == 0) for v in real):
            return "zero"
        if any(v.size > 1 and np.unique(v).size < v.size for v in real):
            return "tie"
        return self._index_regime(program, variant, dys, fixed)

    def _index_regime(self, program: Program, variant: Variant, dys: list, fixed: list) -> str:
        for v in fixed:
            v = np.asarray(v) if hasattr(v, "dtype") else None
            if v is not None and v.dtype.kind in "iu" and np.unique(v).size < v.size:
                return "repeated"
        return "own"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _refuses(error: BaseException | None) -> bool:
    """Whether an error was raised on purpose, by a line outside of JAX that says `raise`."""
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    last = frames[-1] if frames else None
    if last is None or last.filename.startswith(os.path.dirname(jax.__file__)):
        return False
    return (last.line or "").startswith("raise")


def _weakness(found: Explanation) -> int:
    """How little an explanation says, to choose among those of several arguments."""
    cause, words = found
    if cause == "unknown":
        return 2
    return int(cause in ("elements", "low_precision", "stale_residual") or "along axis" in words)


def examine(
    subject: Subject,
    calls: Sequence[tuple],
    where: Sequence[str] = (),
    *,
    seed: int = 0,
    thorough: bool = True,
    seconds: float = 60.0,
) -> Finding:
    """Tries everything on one rule, starting from the calls that were seen."""
    search = Search(subject, where, seed, time.monotonic() + seconds)
    try:
        if not calls:
            raise ValueError("it was called, but with no values that could be seen")
        with warnings.catch_warnings():
            # Of values that the auditor chose, nobody wants to be warned.
            warnings.simplefilter("ignore")
            _run(search, calls, thorough)
    except _Found as found:
        return _smallest(search, found.finding) if thorough else found.finding
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        kind = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
        return search.finding("unchecked", f"could not be judged: {kind}{reason}")
    if search.undecided:
        return search.finding("unchecked", f"could not be decided: {search.undecided[0]}")
    return search.finding("right", f"right at {search.judged} points")


def _smallest(search: Search, finding: Finding) -> Finding:
    """The same finding on an input that can be read, if the fault shows there."""
    count = sum(np.size(v) for v in jax.tree.leaves(finding.args))
    if finding.verdict != "wrong" or count <= READABLE:
        return finding
    for k, variant in enumerate(explore.smaller(finding.args, search.subject.primal)):
        if search.late():
            break
        try:
            program = search.program(variant.args)
            search.judge(program, variant, program.cotangents([search.seed, 500 + k]))
        except _Found as found:
            if (found.finding.cause, found.finding.argument) == (finding.cause, finding.argument):
                return found.finding
        except Exception:  # it is only a matter of size
            continue
    return finding


def _run(search: Search, calls: Sequence[tuple], thorough: bool) -> None:
    subject = search.subject
    small = [explore.shrunk(args, subject.primal) for args in calls[:1]]
    count = sum(np.size(v) for v in jax.tree.leaves(calls[0]))
    if count > LARGE and small[0] is not calls[0]:
        search.note(f"judged at smaller shapes than the call's {count:,} elements")
    else:
        search.own(calls)
    if not thorough:
        return
    base = small[0]
    generic = explore.resampled(base, search.seed)
    program = search.program(base)
    if not has_value(program, generic):
        generic = Variant("the values seen", "generic", tuple(base))
    if not program.derivable:
        search.judge(program, generic, program.cotangents([search.seed, 400]))
        search.note("its function has no derivative in JAX: judged by finite differences alone")
        return
    long = generic._replace(args=explore.lengthened(generic.args, subject.primal))
    for step in (
        lambda: linear(search, generic),
        lambda: values(search, base),
        lambda: again(search, generic),
        lambda: tangent(search, generic) if subject.forward else None,
        lambda: mapped(search, generic),
        lambda: second(search, long),
        lambda: precisions(search, generic.args, calls[0]),
        lambda: shapes(search, base),
        lambda: settings(search, base),
    ):
        if search.late():
            search.note("the time given ended before all was tried")
            return
        try:
            step()
        except _Found:
            raise
        except Exception as error:  # what cannot be tried is no fault of the rule
            search.note(f"not tried: {type(error).__name__}: {str(error)[:200]}")
