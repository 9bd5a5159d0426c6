"""Is one rule right at one point? Its value and cotangents beside autodiff's, both against float64.

Autodiff of the primal is not the truth either: it is nan or wrong for safe norms, for x log x at 0
and the like. So an element on which both differ goes to finite differences of the primal in
float64. The rule is wrong where they reject it; it is right where they agree with it, and at a kink
anywhere between the slopes of the two sides; where they do not converge, that is said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from funcbp.check.compare import distance, split, widened
from funcbp.check.differences import Slope
from funcbp.check.kinks import between, shared
from funcbp.check.noise import FLOOR, MARGIN, allowance, floor, largest, negligible, rounding
from funcbp.check.program import Program

__all__ = ["Evidence", "Judgement", "judge"]

# Elements on which finite differences are taken, for each argument that is in doubt.
EXAMINED = 6
# What a rule made for float32, with constants of so many digits, may lose in float64.
DIGITS = 1e-6


class Evidence(NamedTuple):
    """One array on which the rule was found wrong, or could not be judged."""

    kind: str  # gradient, value, dtype, nonfinite, tangent
    argument: str
    index: tuple[int, ...]
    rule: np.ndarray
    truth: np.ndarray
    autodiff: np.ndarray
    slope: Slope | None
    excess: float
    decided: bool = True

    @property
    def got(self) -> Any:
        return self.rule[self.index]

    @property
    def expected(self) -> Any:
        if self.slope is not None and self.slope.sure(self.slope.central or 1.0):
            return self.slope.central
        return self.truth[self.index]


class Judgement(NamedTuple):
    """What was found at one point; `errors` has those of rule and autodiff by argument."""

    evidence: tuple[Evidence, ...]
    errors: dict[str, dict[str, float]]
    rule: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]

    @property
    def wrong(self) -> tuple[Evidence, ...]:
        return tuple(e for e in self.evidence if e.decided)


def judge(
    program: Program,
    args: Sequence[Any],
    dys: list,
    own: bool = True,
    extreme: bool = False,
    wider: bool = False,
) -> Judgement:
    """Judges the rule at a point.

    Args:
      program: of the rule and these shapes.
      args: the arguments.
      dys: one cotangent for each floating output.
      own: the caller's own arguments, at which a nan is wrong even where autodiff has one too.
      extreme: values far from ordinary ones, at which a few digits do not matter.
      wider: types wider than the caller's, in which the caller's own digits are enough.

    Raises:
      Broken: the rule raised and the primal did not.
    """
    _, floating, fixed = split(tuple(args), {})
    value, cotangents = program.truth(floating, fixed, dys)
    got_value, got = program.rule(floating, fixed, dys)
    finite = [
        np.isfinite(np.asarray(v)) & np.isfinite(widened(g))
        for v, g in zip(value, got_value, strict=True)
    ]
    whole = all(map(np.all, finite))
    if not whole and not own:
        return Judgement((), {}, {}, {})  # beyond what the type can hold
    if not whole:
        # What is not finite has no derivative: nothing is pulled back from there.
        dys = [np.where(f, d, 0) for f, d in zip(finite, dys, strict=True)]
        cotangents = program.truth(floating, fixed, dys)[1]
        got = program.rule(floating, fixed, dys)[1]
    truth = {n: np.asarray(v) for n, v in cotangents.items()}
    rule = {n: widened(v) for n, v in got.items()}
    evidence: list[Evidence] = []
    errors: dict[str, dict[str, float]] = {}
    lazy: list[Any] = []

    def autodiff() -> tuple[list, dict]:
        if not lazy:
            try:
                lazy.append(program.autodiff(floating, fixed, dys))
            except Exception:  # no derivative in its own precision: then no measure of its error
                lazy.append((value, cotangents))
        return lazy[0]

    for k, (v, t) in enumerate(zip(got_value, value, strict=True)):
        ours, exact = widened(v), np.asarray(t)
        if not ours.size or ours.shape != exact.shape or _near(ours, exact, v.dtype):
            continue
        plain = widened(autodiff()[0][k])
        allowed = allowance(plain, exact, v.dtype)
        # The plain value may overflow or be nan where a careful forward rule is not.
        error = np.where(np.isfinite(plain), distance(ours, exact), 0.0)
        excess = error / allowed
        at = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        if excess[at] > 1:
            where = "" if len(value) == 1 else f"[{k}]"
            evidence.append(
                Evidence("value", f"output{where}", at, ours, exact, plain, None, float(excess[at]))
            )
    for n, g in rule.items():
        dtype = program.types[n][1]
        errors[n] = {"rule": _relative(g, truth[n])}
        if not whole:
            known = np.isfinite(g) & np.isfinite(truth[n])
            g, truth[n] = np.where(known, g, 0), np.where(known, truth[n], 0)
            rule[n] = g
        unfinite = own and not np.all(np.isfinite(g))
        if not g.size or (_near(g, truth[n], dtype) and not unfinite):
            continue
        if _symmetric(floating[n]) and _near(_mirrored(g), _mirrored(truth[n]), dtype):
            continue  # right along the symmetric matrices, where the argument lies
        plain = widened(autodiff()[1][n])
        errors[n]["autodiff"] = _relative(plain, truth[n])
        point = (floating, fixed, dys)
        noise = rounding(program, point, truth, n)
        if extreme:
            noise = noise + negligible(program, args, floating, n) + 1e-3 * largest(truth[n])
        elif not own:
            noise = noise + floor(program, args, n)
        if wider:
            noise = noise + DIGITS * largest(truth[n])
        found = _examine(program, point, n, (g, truth[n], plain), noise, own)
        if found is not None:
            evidence.append(found)
            if found.slope is not None:
                scale = float(np.max(np.abs(truth[n]))) or 1.0
                off = abs(found.slope.central - float(np.real(truth[n][found.index])))
                errors[n]["finite_differences"] = off / scale
    return Judgement(tuple(evidence), errors, rule, truth)


def _symmetric(v: Any) -> bool:
    v = widened(v)
    square = v.ndim >= 2 and v.shape[-1] == v.shape[-2] > 1
    return bool(square and np.array_equal(v, np.swapaxes(v, -1, -2)) and np.any(v != v.flat[0]))


def _mirrored(v: np.ndarray) -> np.ndarray:
    return (v + np.swapaxes(v, -1, -2)) / 2


def _near(got: np.ndarray, truth: np.ndarray, dtype: Any) -> bool:
    """Whether all elements are within the floor: most rules at most points."""
    bound = float(jnp.finfo(dtype).eps) ** FLOOR * largest(truth) + float(jnp.finfo(dtype).tiny)
    return bool(np.all(distance(got, truth) <= bound))


def _relative(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.max(distance(got, truth), initial=0.0) / (largest(truth) or 1.0))


def _examine(
    program: Program,
    point: tuple[dict, list, list],
    name: str,
    results: tuple[np.ndarray, np.ndarray, np.ndarray],
    noise: np.ndarray,
    own: bool,
) -> Evidence | None:
    """Finite differences on the elements in doubt: evidence against the rule, or None."""
    g, truth, plain = results
    info = jnp.finfo(program.types[name][1])
    allowed = allowance(plain, truth, program.types[name][1], noise)
    error = distance(g, truth)
    excess = np.where(error > 0, error / allowed, 0.0)
    # Beyond the type's range nobody can be right.
    with np.errstate(invalid="ignore"):
        excess = np.where(np.abs(truth) > 0.5 * float(info.max), 0.0, excess)
    excess = np.where(np.isnan(excess), np.inf, excess)
    # Where autodiff has no number in this type: of the caller's own values differences may tell; of
    # others nothing is asked.
    excess = (
        np.where(np.isfinite(g), excess, np.inf) if own else np.where(np.isfinite(plain), excess, 0)
    )
    doubts = np.flatnonzero(excess.ravel() > 1)
    if not doubts.size:
        return None
    worst = doubts[np.argsort(-excess.ravel()[doubts], kind="stable")]
    rng = np.random.default_rng(len(worst))
    picked = list(dict.fromkeys([*worst[: EXAMINED // 2], *rng.permutation(worst)]))[:EXAMINED]
    undecided, kinked = None, False
    for flat in picked:
        at = tuple(int(i) for i in np.unravel_index(flat, g.shape))
        verdict, slope = _element(program, point, (name, at), results, allowed[at], own)
        if verdict is None:
            kinked = kinked or (slope is not None and slope.kinked)
            continue
        kind = "gradient" if np.isfinite(g[at]) else "nonfinite"
        found = Evidence(
            kind, name, at, g, truth, plain, slope, float(min(excess[at], 1e30)), verdict
        )
        if verdict:
            smooth = np.isfinite(g).all() and not between(program, point, name, g, allowed)
            return found if smooth or not np.isfinite(g[at]) else None
        undecided = undecided or found
    if kinked and undecided is None and np.all(np.isfinite(g)) and not shared(program, point, name):
        at = tuple(int(i) for i in np.unravel_index(np.argmax(np.abs(g - truth)), g.shape))
        return Evidence("gradient", name, at, g, truth, plain, None, np.inf)
    return undecided


def _element(
    program: Program,
    point: tuple[dict, list, list],
    at: tuple[str, tuple[int, ...]],
    results: tuple[np.ndarray, np.ndarray, np.ndarray],
    allowed: float,
    own: bool,
) -> tuple[bool | None, Slope | None]:
    """(True wrong, False undecided, None right; the slope)."""
    g, truth, plain = (complex(v[at[1]]) for v in results)
    margin = allowed if np.isfinite(allowed) else 0.0
    eps, scale = float(jnp.finfo(program.types[at[0]][1]).eps), largest(results[1])
    units = (1, 1j) if np.iscomplexobj(results[0]) else (1,)
    verdicts: list[tuple[bool | None, Slope]] = []
    if np.isfinite(g) and not np.isfinite(complex(widened(point[0][at[0]])[at[1]])):
        return None, None  # no difference can be taken at an infinity
    for unit in units:
        slope = program.slope(*point, at, unit)
        got, expected = ((unit * v).real for v in (g, truth))
        # Differences may overrule the truth: then they are what the allowance is a share of.
        size = abs(slope.central) if np.isfinite(slope.central) else 0.0
        slack = max(margin, 2 * MARGIN * eps * size + eps**FLOOR * max(scale, size))
        verdicts.append((_verdict(slope, got, expected, (unit * plain).real, slack, own), slope))
    for wanted in (True, False):
        for verdict, slope in verdicts:
            if verdict is wanted:
                return wanted, slope
    return None, verdicts[0][1]


def _verdict(
    slope: Slope, got: float, truth: float, plain: float, margin: float, own: bool
) -> bool | None:
    if slope.admits(got, margin):
        return None
    finite = np.isfinite(truth) and np.isfinite(plain)
    if not np.isfinite(got):
        smooth = slope.sure(slope.central or 1.0) and np.isfinite(slope.central)
        return True if finite or (own and (smooth or slope.kinked)) else None
    # Outside of both slopes of a kink, or off from differences that are sure: and off from autodiff
    # in float64, or they would not have been asked.
    return bool(slope.kinked or slope.sure(got - slope.central))
