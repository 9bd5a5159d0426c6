"""Why is a cotangent wrong? Hypotheses, each a number that the wrong rule would have returned.

A hypothesis is the true cotangent of a changed problem: another cotangent, a transposed argument, a
term of the derivative left out, an activation's derivative dropped. The one that gives what the
rule gave is the cause.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.compare import split, widened
from funcbp.check.counterfactual import Place, counterfactuals
from funcbp.check.judge import Evidence, Judgement
from funcbp.check.noise import FLOOR
from funcbp.check.program import Program

__all__ = ["CAUSES", "explain", "of_regime"]

CAUSES = (
    "sign",
    "scale",
    "missing_term",
    "dropped_argument",
    "dropped_output",
    "transposed",
    "swapped_arguments",
    "missing_sum",
    "wrong_reduction",
    "missing_activation_derivative",
    "ignores_cotangent",
    "nonlinear_in_cotangent",
    "elements",
    "edge",
    "nonfinite",
    "cancellation",
    "underflow",
    "overflow",
    "low_precision",
    "value",
    "dtype",
    "structure",
    "conjugate",
    "vmap",
    "second_order",
    "stale_residual",
    "accumulation",
    "unknown",
)
# Length of an axis up to which a cotangent moved along it is tried.
MOVED = 16

Explanation = tuple[str, str]


class _Case:
    """One wrong cotangent and the means to ask what others would have been."""

    def __init__(self, program: Program, args: Sequence[Any], dys: list, wrong: Evidence):
        self.program, self.dys, self.wrong = program, dys, wrong
        _, self.floating, self.fixed = split(tuple(args), {})
        self.name = wrong.argument
        self.rule = wrong.rule
        with np.errstate(invalid="ignore"):
            self._measure(wrong.truth)

    def told(self, cotangent: str) -> str:
        return self.program.subject.argument(cotangent)

    def explains(self, other: Any) -> bool:
        """Whether the rule gave this."""
        other = np.asarray(other)
        if other.shape != self.rule.shape or not np.all(np.isfinite(other)):
            return False
        if np.max(np.abs(other - self.truth), initial=0.0) < 0.5 * self.off:
            return False
        return bool(np.max(np.abs(other - self.rule), initial=0.0) <= self.tolerance)

    @functools.cached_property
    def counterfactuals(self) -> list[tuple[Place, np.ndarray]]:
        """The cotangent with one place of the derivative changed, for each place."""
        wide = self.program.promoted(self.floating)
        return counterfactuals(self.program.closed, wide, self.fixed, self.name, self.dys)

    @functools.cached_property
    def misplaced(self) -> list[tuple[Place, np.ndarray]]:
        """The cotangent with another residual kept in one place, for each place."""
        wide = self.program.promoted(self.floating)
        return counterfactuals(self.program.closed, wide, self.fixed, self.name, self.dys, True)

    def again(self) -> "_Case":
        """The same argument under another cotangent."""
        dys = self.program.cotangents([971])
        rule = self.program.rule(self.floating, self.fixed, dys)[1][self.name]
        other = _Case.__new__(_Case)
        other.__dict__.update(
            program=self.program, dys=dys, wrong=self.wrong, floating=self.floating,
            fixed=self.fixed, name=self.name, rule=widened(rule),
        )  # fmt: skip
        other._measure(other.true()[self.name])
        return other

    def _measure(self, truth: np.ndarray) -> None:
        self.truth = truth
        self.off = float(np.max(np.abs(self.rule - self.truth), initial=0.0))
        size = float(np.max(np.abs(self.truth), initial=0.0))
        eps = float(jnp.finfo(self.program.types[self.name][1]).eps)
        # An explanation leaves little of the error, as far as the type can tell.
        self.tolerance = max(0.02 * self.off, 2 * eps**FLOOR * max(size, self.off))

    def true(
        self, dys: list | None = None, floating: dict | None = None, fixed: list | None = None
    ) -> dict[str, np.ndarray]:
        """All true cotangents of a changed problem."""
        found = self.program.truth(
            floating or self.floating, self.fixed if fixed is None else fixed, dys or self.dys
        )[1]
        return {n: np.asarray(v) for n, v in found.items()}


def explain(
    program: Program, args: Sequence[Any], dys: list, judgement: Judgement, wrong: Evidence
) -> Explanation:
    """The cause of one wrong cotangent, and the evidence for it in words."""
    if wrong.kind == "value":
        return "value", "the forward rule returns another value than the function itself"
    case = _Case(program, args, dys, wrong)
    lost = _digits(case)
    if lost is not None:
        return lost
    if not np.all(np.isfinite(case.rule)):
        return _unfinite(case)
    # A number or two can be explained in many ways: only those count that explain a second draw.
    twin = functools.cache(case.again)
    for hypothesis in HYPOTHESES:
        # A changed problem need not make sense.
        with contextlib.suppress(Exception):
            found = hypothesis(case, judgement)
            if found is None:
                continue
            again = found if case.truth.size > 2 else hypothesis(twin(), judgement)
            if again == found:
                return found
            if again is not None and {again[0], found[0]} == {"dropped_argument", "dropped_output"}:
                return DROPPED
    return "unknown", "no single change of the true derivative gives what the rule gives"


def _digits(case: _Case) -> Explanation | None:
    """A rule that is right in float64 is wrong in its arithmetic, not in its formula."""
    double = case.program.double(case.floating, case.fixed, case.dys)
    if double is None:
        return None
    exact, wrong = np.asarray(double[case.name]), ~np.isfinite(case.rule)
    size = float(np.max(np.abs(case.truth), initial=0.0))
    allowed = 1e-3 * (size if np.any(wrong) else case.off)
    if not np.all(np.abs(exact - case.truth) <= allowed):
        return None
    told = f"in float64 the same rule gives {exact[case.wrong.index]:.6g}"
    if np.any(wrong):
        return "overflow", f"a number on the way is too large for its type; {told}"
    narrow = jnp.finfo(case.program.types[case.name][1]).bits == 16
    if case.wrong.got == 0:
        # What is lost is itself small, or so are the arguments; else it was divided by infinity.
        largest = max(
            float(np.max(np.abs(widened(v)), initial=0.0)) for v in case.floating.values()
        )
        info = jnp.finfo(case.program.types[case.name][1])
        if largest > np.log(float(info.max)) and abs(case.wrong.expected) > float(info.eps):
            return "overflow", f"a number on the way is too large for its type; {told}"
        return "underflow", f"a number on the way is too small for its type; {told}"
    if narrow:
        return "low_precision", f"it is computed in too few digits; {told}"
    return "cancellation", f"its digits are lost in a difference of like numbers; {told}"


def _unfinite(case: _Case) -> Explanation:
    largest = max(
        (float(np.max(np.abs(np.where(np.isfinite(v), v, 0)), initial=0.0)))
        for v in (np.asarray(v, np.complex128) for v in case.floating.values())
    )
    infinite = any(not np.all(np.isfinite(np.asarray(v, complex))) for v in case.floating.values())
    if largest > 15 and not infinite:
        return "overflow", f"it is {case.wrong.got} where arguments reach {largest:.3g}"
    return "nonfinite", f"it is {case.wrong.got} where the derivative is finite"


DROPPED = ("dropped_argument", "the rule returns zeros for it")


def _dropped(case: _Case, judgement: Judgement) -> Explanation | None:
    if np.any(case.rule):
        return None
    only = _dropped_output(case, judgement)
    return only or DROPPED


def _dropped_output(case: _Case, judgement: Judgement) -> Explanation | None:
    """Only where it explains every wrong argument."""
    if len(case.dys) < 2:
        return None
    wrong = [e.argument for e in judgement.evidence if e.kind == "gradient"]
    for k in range(len(case.dys)):
        turned = [-d if i == k else d for i, d in enumerate(case.dys)]
        if case.explains(case.true(turned)[case.name]):
            return "sign", f"what output {k} brings has the wrong sign"
        dys = [np.zeros_like(d) if i == k else d for i, d in enumerate(case.dys)]
        other = case.true(dys)
        if case.explains(other[case.name]) and all(
            np.allclose(other[n], judgement.rule[n], rtol=0.02, atol=1e-5) for n in wrong
        ):
            return "dropped_output", f"the cotangent of output {k} is not used"
    return None


def _simple(case: _Case, judgement: Judgement) -> Explanation | None:
    if case.explains(-case.truth):
        return "sign", "it is the negative of the true one"
    if not np.iscomplexobj(case.truth):
        return None
    turned = case.true([np.conj(d) for d in case.dys])[case.name]
    for other, what in (
        (np.conj(case.truth), "it is the complex conjugate of the true one"),
        (turned, "it is the true one for the conjugate of the output's cotangent"),
        (np.conj(turned), "it is the true one with output and argument conjugated"),
    ):
        if case.explains(other):
            return "conjugate", what
    return None


def _swapped(case: _Case, judgement: Judgement) -> Explanation | None:
    for n, other in judgement.truth.items():
        if n != case.name and case.explains(other):
            return "swapped_arguments", f"it is the cotangent of {case.told(n)}"
    return None


def _scaled(case: _Case, judgement: Judgement) -> Explanation | None:
    """A constant; 1/n with n an axis that the argument's cotangent is summed over."""
    square = float(np.sum(np.abs(case.truth) ** 2))
    if not square:
        return None
    factor = float(np.real(np.sum(np.conj(case.truth) * case.rule)) / square)
    if not case.explains(factor * case.truth) or case.truth.size < 1:
        return None
    summed = _summed_axes(case)
    for n in summed:
        if n > 1 and np.isclose(factor * n, 1, rtol=5e-3):
            return "wrong_reduction", f"it is {factor:.4g} = 1/{n} times the true one: a mean"
    return "scale", f"it is {_ratio(factor)} times the true one"


def _ratio(factor: float) -> str:
    for q in range(1, 65):
        p = factor * q
        if abs(p - round(p)) < 2e-3 * q and round(p):
            return f"{factor:.4g}" + (f" = {round(p)}/{q}" if q > 1 else "")
    return f"{factor:.4g}"


def _summed_axes(case: _Case) -> set[int]:
    """Sizes of output axes that the argument does not have, and their product."""
    shapes = [d.shape for d in case.dys] + [np.shape(v) for v in case.floating.values()]
    own = list(case.truth.shape)
    found = set()
    for shape in shapes:
        left = list(shape)
        for s in own:
            if s in left:
                left.remove(s)
        found |= set(left) | {int(np.prod(left))}
    return found - {1, 0}


def _transposed(case: _Case, judgement: Judgement) -> Explanation | None:
    t = case.truth
    swapped = "transposed", "it is the true one with its axes swapped"
    if t.ndim >= 2 and t.shape[-1] == t.shape[-2] and case.explains(np.swapaxes(t, -1, -2)):
        return swapped
    if t.ndim >= 2 and t.T.shape == t.shape and case.explains(t.T):
        return swapped
    if len(case.dys) == 1 and case.dys[0].shape == t.shape:
        _, tangent = _forward(case)
        if case.explains(tangent):
            return "transposed", "the Jacobian is applied in place of its transpose"
    for k, d in enumerate(case.dys):
        for axis, n in enumerate(d.shape):
            for step in range(1, n if n <= MOVED else 1):
                moved = [np.roll(o, step, axis) if i == k else o for i, o in enumerate(case.dys)]
                if case.explains(case.true(moved)[case.name]):
                    return "transposed", f"the cotangent is moved by {step} along its axis {axis}"
    for n, v in case.floating.items():
        if np.ndim(v) >= 2 and v.shape[-1] == v.shape[-2]:
            other = case.true(floating=case.floating | {n: jnp.swapaxes(v, -1, -2)})
            if case.explains(other[case.name]):
                return "transposed", f"{case.told(n)} is used where its transpose belongs"
    for k, d in enumerate(case.dys):
        if d.ndim >= 2 and d.shape[-1] == d.shape[-2]:
            dys = [*case.dys]
            dys[k] = np.swapaxes(d, -1, -2)
            if case.explains(case.true(dys)[case.name]):
                if t.ndim < d.ndim:
                    return "wrong_reduction", "the cotangent is summed over another axis"
                return "transposed", "the cotangent is used with its axes swapped"
    return None


def _forward(case: _Case) -> tuple[Any, Any]:
    """The tangent of the output along the cotangent, as if it were the argument's tangent."""
    program = case.program
    wide = program.promoted(case.floating)
    with jax.enable_x64(True):

        def value(v):
            moved = wide | {case.name: v}
            y = program.evaluator(*[moved[n] for n in sorted(moved)], *case.fixed)
            return [o for o in y if jnp.issubdtype(o.dtype, jnp.inexact)][0]

        v = jnp.asarray(wide[case.name])
        y, tangent = jax.jvp(value, (v,), (jnp.asarray(case.dys[0], v.dtype),))
    return np.asarray(y), np.asarray(tangent)


def _ignored(case: _Case, judgement: Judgement) -> Explanation | None:
    ones = [np.ones_like(d) for d in case.dys]
    if case.explains(case.true(ones)[case.name]):
        return "ignores_cotangent", "it is the cotangent for dy = 1, whatever dy is"
    return None


def _reductions(case: _Case, judgement: Judgement) -> Explanation | None:
    """Sums over an output's axis that were not taken, or taken otherwise."""
    for k, d in enumerate(case.dys):
        for axis in range(d.ndim):
            n = d.shape[axis]
            if not 1 < n <= 64:
                continue
            parts = []
            for i in range(n):
                masked = np.zeros_like(d)
                at = (slice(None),) * axis + (i,)
                masked[at] = d[at]
                dys = [np.zeros_like(o) for o in case.dys]
                dys[k] = masked
                parts.append(case.true(dys)[case.name])
            stack = np.stack(parts)
            before = np.cumsum(stack, axis=0)
            for i in range(1, n - 1):
                for part, which in ((before[i], "first"), (before[-1] - before[-i - 2], "last")):
                    if case.explains(part):
                        what = f"only the {which} {i + 1} entries of axis {axis} of the output"
                        return "accumulation", f"{what} add to it"
            for i, part in enumerate(parts):
                if case.explains(part):
                    return (
                        "missing_sum",
                        f"it holds only entry {i} of axis {axis} of the output, not the sum",
                    )
            others = {
                "the mean": stack.mean(0),
                "the largest": stack.max(0) if not np.iscomplexobj(stack) else stack[0],
                "the product": stack.prod(0),
                "the sum of magnitudes": np.abs(stack).sum(0),
            }
            for what, other in others.items():
                if case.explains(other):
                    return "wrong_reduction", f"it is {what} over axis {axis} instead of the sum"
    t = case.truth
    for axis in range(t.ndim):
        if t.shape[axis] > 1:
            whole = np.broadcast_to(t.sum(axis, keepdims=True), t.shape)
            for what, other in {"summed": whole, "averaged": whole / t.shape[axis]}.items():
                if case.explains(other):
                    return "wrong_reduction", f"it is the true one {what} over its axis {axis}"
    return None


def _factor_of_argument(case: _Case, judgement: Judgement) -> Explanation | None:
    candidates = {case.told(n): np.asarray(v) for n, v in case.floating.items()}
    forms: dict[str, Callable] = {
        "{}": lambda a: a,
        "1/{}": lambda a: 1 / a,
        "{}^2": lambda a: a * a,
        "1/{}^2": lambda a: 1 / (a * a),
        "sqrt|{}|": lambda a: np.sqrt(np.abs(a)),
    }
    with np.errstate(all="ignore"):
        for n, a in candidates.items():
            wide = a.astype(case.truth.dtype if np.iscomplexobj(case.truth) else np.float64)
            for text, form in forms.items():
                factor = form(wide)
                what = text.format(n)
                if _fits(factor, case.truth.shape) and case.explains(case.truth * factor):
                    return "scale", f"it is {what} times the true one"
                dys = [d * factor if _fits(factor, d.shape) else None for d in case.dys]
                if any(d is None or not np.all(np.isfinite(d)) for d in dys):
                    continue
                if case.explains(case.true([d for d in dys if d is not None])[case.name]):
                    return "scale", f"it is the true one for a cotangent times {what}"
    return None


def _fits(factor: np.ndarray, shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(factor.shape, shape) == shape
    except ValueError:
        return False


# What a changed place in the derivative is called, the likeliest first.
KINDS = {
    "cut": "missing_term",
    "passed": "missing_activation_derivative",
    "transposed": "transposed",
    "first": "missing_sum",
    "mean": "wrong_reduction",
    "axis": "wrong_reduction",
    "repeated": "accumulation",
    "conjugate": "conjugate",
}


def _placed(case: _Case, judgement: Judgement) -> Explanation | None:
    explaining = [place for place, other in case.counterfactuals if case.explains(other)]
    for kind, cause in KINDS.items():
        for place in explaining:
            if place.kind == kind:
                return cause, f"{place.what} is left out" if kind == "cut" else place.what
    return _weighed(case)


def _stale(case: _Case, judgement: Judgement) -> Explanation | None:
    for _, other in case.misplaced:
        if case.explains(other):
            return "stale_residual", "a value that was kept is not the one that belongs there"
    return None


def _masks(case: _Case, judgement: Judgement) -> Explanation | None:
    """A mask that is not looked at, or the wrong way round."""
    sizes = sorted({n for v in case.floating.values() for n in np.shape(v)})
    for k, v in enumerate(case.fixed):
        changes: list[tuple[Any, str]] = []
        if getattr(v, "dtype", None) == jnp.bool_:
            changes = [
                (jnp.ones_like(v), "as if the mask were true everywhere"),
                (jnp.zeros_like(v), "as if the mask were false everywhere"),
                (~v, "as if the mask were the other way round"),
            ]
        elif hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.integer):
            changes = [(jnp.full_like(v, n), f"as if each length were {n}") for n in sizes]
        for changed, what in changes:
            fixed = [*case.fixed[:k], changed, *case.fixed[k + 1 :]]
            if case.explains(case.true(fixed=fixed)[case.name]):
                return "elements", f"it is the true one {what}"
    return None


def _weighed(case: _Case) -> Explanation | None:
    """One term of the derivative times a number, or reduced over other axes."""
    error = (case.rule - case.truth).ravel()
    if case.truth.size < 3:
        return None
    scaled = _rowwise(case)
    if scaled is not None:
        return scaled
    for place, other in case.counterfactuals:
        if place.kind == "cut" and _reduced_otherwise(case, other):
            return "wrong_reduction", f"the sum in {place.what} is taken over other axes"
    for place, other in case.counterfactuals:
        term = (other - case.truth).ravel()
        square = float(np.real(np.vdot(term, term)))
        if place.kind != "cut" or square <= 1e-20 * float(np.sum(np.abs(case.truth) ** 2)):
            continue
        factor = float(np.real(np.vdot(term, error)) / square)
        if case.explains(case.truth + factor * (other - case.truth)):
            if np.isclose(factor, 2, rtol=1e-2):
                return "sign", f"{place.what} has the wrong sign"
            return "scale", f"{place.what} is {_ratio(1 - factor)} times what it is"
    return None


def _reduced_otherwise(case: _Case, other: np.ndarray) -> bool:
    """Whether one term differs by a factor for each row, or for each row and each column.

    Such is a sum over one axis that is spread over another.
    """
    term, got = case.truth - other, case.rule - other
    size = float(np.max(np.abs(term)))
    if term.ndim != 2 or min(term.shape) < 3 or not np.all(np.abs(term) > 1e-6 * size):
        return False
    ratio = got / term
    if _often_one(case.rule / np.where(case.truth == 0, np.inf, case.truth)):
        return False  # right on some elements: that is no other sum
    u, s, v = np.linalg.svd(ratio)
    fitted = s[0] * np.outer(u[:, 0], v[0])
    return bool(
        np.ptp(ratio) > 1e-2 * np.max(np.abs(ratio)) and case.explains(other + fitted * term)
    )


def _often_one(ratio: np.ndarray) -> bool:
    return bool(np.mean(np.abs(ratio - 1) < 1e-3) > 0.1)


def _rowwise(case: _Case, judgement: Judgement | None = None) -> Explanation | None:
    """Each entry along one axis by a factor of its own."""
    t, r = case.truth, case.rule
    if t.size < 4 or np.iscomplexobj(t):
        return None
    for axis in range(t.ndim):
        others = tuple(a for a in range(t.ndim) if a != axis)
        square = np.sum(t * t, axis=others, keepdims=True)
        if t.size < 3 * t.shape[axis] or not np.all(square):
            continue
        factor = np.sum(t * r, axis=others, keepdims=True) / square
        if _often_one(factor) or np.any(np.abs(factor) <= 1e-3):
            continue
        if case.explains(factor * t):
            said = ", ".join(f"{f:.4g}" for f in factor.ravel()[:4])
            return "scale", f"along axis {axis} it is {said}{', ...' * (factor.size > 4)} times it"
    return None


def _elements(case: _Case, judgement: Judgement) -> Explanation | None:
    """Right on some elements, wrong on others: which ones."""
    eps = float(jnp.finfo(case.program.types[case.name][1]).eps)
    near = np.abs(case.rule - case.truth) <= 2 * eps**FLOOR * np.max(np.abs(case.truth))
    telling = (case.rule != 0) | (case.truth != 0)
    if case.truth.size < 2 or np.sum(near & telling) < 0.15 * np.sum(telling):
        return None
    if _at_repeats(case, ~near):
        return "accumulation", f"wrong at {_places(~near)}, where an index occurs more than once"
    return "elements", f"wrong at {_places(~near)}, right elsewhere"


def _few_elements(case: _Case, judgement: Judgement) -> Explanation | None:
    """Zero on some elements and right on the others: no sum does that."""
    found = _elements(case, judgement)
    eps = float(jnp.finfo(case.program.types[case.name][1]).eps)
    wrong = np.abs(case.rule - case.truth) > 2 * eps**FLOOR * np.max(np.abs(case.truth))
    return found if not np.any(case.rule[wrong]) else None


def _at_repeats(case: _Case, wrong: np.ndarray) -> bool:
    """Whether the wrong rows are just those that some integer argument names more than once."""
    for v in case.fixed:
        if not (hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.integer)):
            continue
        values, counts = np.unique(np.asarray(v), return_counts=True)
        for axis in range(wrong.ndim):
            rows = np.flatnonzero(wrong.any(axis=tuple(a for a in range(wrong.ndim) if a != axis)))
            n = wrong.shape[axis]
            if set(rows) == {int(r) % n for r in values[counts > 1]} and rows.size < n:
                return True
    return False


def _places(wrong: np.ndarray) -> str:
    """Indices in words, as short as they can be said."""
    where = np.argwhere(wrong)
    said = []
    for axis in range(wrong.ndim):
        seen = sorted({int(i) for i in where[:, axis]})
        n = wrong.shape[axis]
        if len(seen) < n:
            last = " (the last)" if seen == [n - 1] else " (the first)" if seen == [0] else ""
            said.append(f"axis {axis} = {', '.join(map(str, seen[:8]))}{last}")
    few = ", ".join(str(list(map(int, i))) for i in where[:6])
    return f"{len(where)} of {wrong.size} elements: " + ("; ".join(said) or few)


def _rounded(case: _Case, judgement: Judgement) -> Explanation | None:
    """Off by no more than a narrower type is, everywhere."""
    with np.errstate(all="ignore"):
        relative = case.off / float(np.max(np.abs(case.truth)))
        element = np.abs(case.rule - case.truth) / np.abs(case.truth)
    typical = float(np.median(element[np.isfinite(element)])) if element.size else 0.0
    if relative <= 0.02 and typical <= 0.01:
        return "low_precision", f"off by {relative:.1e} of the largest element, without a pattern"
    return None


HYPOTHESES: tuple[Callable[[_Case, Judgement], Explanation | None], ...] = (
    _dropped,
    _simple,
    _dropped_output,
    _swapped,
    _scaled,
    _transposed,
    _ignored,
    _placed,
    _masks,
    _few_elements,
    _reductions,
    _factor_of_argument,
    _stale,
    _rowwise,
    _rounded,
    _elements,
)


def of_regime(regime: str, wrong: Evidence, found: Explanation) -> Explanation:
    """The cause of a fault that shows only in a regime: what is particular about it says more.

    `found` is what the numbers alone suggest.
    """
    cause, words = found
    if wrong.kind in ("value", "dtype") or cause in ("cancellation", "underflow", "overflow"):
        return found
    finite = bool(np.all(np.isfinite(wrong.rule)))
    vague = cause in ("unknown", "elements", "low_precision", "missing_term", "scale")
    if not finite:
        return "nonfinite", words
    if regime == "repeated":
        return "accumulation", "wrong only where an index occurs more than once"
    if regime == "large":
        return ("edge" if cause in ("unknown", "elements", "low_precision") else cause), words
    if regime in ("tiny", "offset"):
        return "cancellation", "its digits are lost where values are large beside their spread"
    if regime in ("zero", "tie", "infinite", "index"):
        return "edge", words
    if regime == "mask":
        return ("elements" if vague else cause), words
    if regime in ("float16", "bfloat16", "long"):
        return ("low_precision" if vague or cause == "missing_sum" else cause), words
    if regime == "asymmetric" and cause == "unknown":
        return "transposed", words
    return found
