"""Which of its many gradients a rule may return where its function is not smooth."""

import jax
import numpy as np

from funcbp.check.compare import widened
from funcbp.check.noise import largest
from funcbp.check.program import Program

__all__ = ["between", "shared"]

# Points nearby whose gradients are compared where the rule may have chosen one of many.
NEARBY = 300
# Elements of a value up to which each is pulled back alone.
SHARED = 64


def shared(program: Program, point: tuple, name: str) -> bool:
    """Whether what one output hands to equal entries adds up to what moving all of them does.

    Each entry alone may have any part of the cotangent; together they have it once.
    """
    floating, fixed, dys = point
    if len(dys) != 1 or not 1 < dys[0].size <= SHARED or np.iscomplexobj(dys[0]):
        return True
    for k in range(dys[0].size):
        alone = np.zeros_like(dys[0])
        alone.flat[k] = 1.0
        g = widened(program.rule(floating, fixed, [alone])[1][name])
        slope = program.slope_along(floating, fixed, [alone], {name: np.ones(g.shape)})
        total, unsure = float(np.sum(g)), slope.left_uncertainty + slope.right_uncertainty
        margin = 1e-3 * max(1e-30, float(np.sum(np.abs(g))))
        if unsure <= margin and np.all(np.isfinite(g)) and not slope.admits(total, margin):
            return False
    return True


def between(
    program: Program, point: tuple[dict, list, list], name: str, g: np.ndarray, allowed: np.ndarray
) -> bool:
    """Whether a cotangent lies between those at points nearby, where ties and kinks are resolved.

    A function that is not smooth at a point has many gradients there: the limits of those nearby
    and what lies between them, as where a maximum's cotangent is shared by equal entries. Moving
    one element at a time does not see that. Their sum must be the slope that moving all elements
    together has: a cotangent handed whole to each of several equal entries is none of them.
    """
    if np.iscomplexobj(g) or not program.derivable:
        return False
    floating, fixed, dys = point
    if not _within(program, point, g, allowed, name, list(floating)):
        return False
    if not _within(program, point, g, allowed, name, [name]):
        return True  # equal to another argument: then nothing is known of sums
    together = program.slope_along(floating, fixed, dys, {name: np.ones(g.shape)})
    unsure = together.left_uncertainty + together.right_uncertainty
    total = float(np.sum(g))
    sure = unsure < 0.1 * max(abs(together.left), abs(together.right), abs(total))
    return not sure or together.admits(total, float(np.sum(allowed)))


def _within(
    program: Program, point: tuple, g: np.ndarray, allowed: np.ndarray, name: str, moved: list[str]
) -> bool:
    """Whether each element lies between those at points nearby in these arguments."""
    floating, fixed, dys = point
    wide = program.promoted(floating)
    rng = np.random.default_rng(11)
    low, high = np.full(g.shape, np.inf), np.full(g.shape, -np.inf)
    for _ in range(NEARBY):
        near = wide | {n: wide[n] + _nudge(wide[n], rng) for n in moved}
        with jax.enable_x64(True):
            found = np.asarray(program.truth(near, fixed, dys)[1][name])
        low, high = np.minimum(low, found), np.maximum(high, found)
    if not np.all(np.isfinite(low) & np.isfinite(high)):
        return False
    # The outermost of them need not be among those drawn.
    slack = allowed + 1e-4 * max(largest(low), largest(high)) + 0.1 * (high - low)
    return bool(np.all((g >= low - slack) & (g <= high + slack)))


def _nudge(v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A step that is small beside the values, in any direction; none from an infinity."""
    size = np.abs(v[np.isfinite(v)])
    scale = float(np.median(size[size > 0])) if np.any(size > 0) else 1.0
    step = rng.standard_normal(v.shape)
    return np.where(np.isfinite(v), 1e-6 * scale * step, 0.0)
