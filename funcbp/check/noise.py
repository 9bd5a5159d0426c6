"""How far a rule may be from the truth for reasons that are not its own."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check import explore
from funcbp.check.compare import allowed as allowed_error
from funcbp.check.compare import distance, split, widened
from funcbp.check.program import Program

__all__ = ["FLOOR", "MARGIN", "allowance", "faintest", "floor", "largest", "negligible", "rounding"]

# A rule that a user wrote for other reasons than digits may lose a few more than autodiff does: so
# many times the yardstick's allowance, plus eps**FLOOR of the largest element.
MARGIN, FLOOR = 16, 0.75
# So many roundings of the last digit may come together; an error below this share of an ordinary
# slope is no finding where the auditor chose the values.
ROUNDINGS, MATTERS = 8, 3e-3


def allowance(autodiff: np.ndarray, truth: np.ndarray, dtype: Any, noise: Any = 0.0) -> np.ndarray:
    """How far each element of a rule's result may be from the truth."""
    error = distance(autodiff.ravel()[None], truth.ravel()[None])
    allowed = allowed_error(error, truth.ravel()[None], dtype)[0].reshape(truth.shape)
    return MARGIN * allowed + float(jnp.finfo(dtype).eps) ** FLOOR * largest(truth) + noise


def largest(v: np.ndarray) -> float:
    size = np.abs(v)
    return float(np.max(size, initial=0.0, where=np.isfinite(size)))


def rounding(
    program: Program, point: tuple[dict, list, list], truth: dict, name: str
) -> np.ndarray:
    """The rounding of a cotangent, element by element, that has nothing to do with the rule.

    What the last digits of arguments and cotangents make of it; and that of the terms which cancel
    in it: as large as the same argument's cotangent is when other numbers are pulled back, and,
    where that is 0 too, as the products of value and cotangent of the other arguments.
    """
    floating, fixed, dys = point
    eps = float(jnp.finfo(program.types[name][1]).eps)
    sizes = [largest(d) for d in dys]
    others = [
        s * np.asarray(d) for s, d in zip(sizes, program.cotangents([len(dys), 83]), strict=True)
    ]
    pulled = largest(np.asarray(program.truth(floating, fixed, others)[1][name]))
    terms = max(largest(t) * largest(widened(floating[n])) for n, t in truth.items())
    own = largest(widened(floating[name]))
    cancelling = eps**FLOOR * pulled + (8 * eps * terms / own if own else 0.0)
    faint = faintest(program, floating, fixed, dys, name)
    if largest(truth[name]) <= 1e-6 * faint:  # nothing but what cancels
        cancelling += faint
    if not program.derivable:
        return np.full(np.shape(truth[name]), cancelling)
    return cancelling + _moved(program, point, truth[name], name)


def faintest(program: Program, floating: dict, fixed: list, dys: list, name: str) -> float:
    """The rounding of a cotangent whose terms are of the size of cotangent times value."""
    eps = float(jnp.finfo(program.types[name][1]).eps)
    value = program.truth(floating, fixed, dys)[0]
    with np.errstate(invalid="ignore"):
        products = [largest(np.asarray(y) * d) for y, d in zip(value, dys, strict=True)]
    size = largest(widened(floating[name]))
    return ROUNDINGS * eps * max(products, default=0.0) / (size or 1.0)


def _moved(program: Program, point: tuple, truth: np.ndarray, name: str) -> np.ndarray:
    """How far the truth moves when arguments and cotangents move by their last digits."""
    floating, fixed, dys = point
    eps = max(float(jnp.finfo(d).eps) for _, d in program.types.values())

    def nudged(v, rng, sign):
        return v * (1 + sign * eps * rng.standard_normal(np.shape(v)))

    furthest = np.zeros(truth.shape)
    # Each nudge and its opposite: of two equal numbers each is once the larger.
    for draw, sign in itertools.product(range(3), (1, -1)):
        rng = np.random.default_rng([7, draw])
        near = {n: nudged(v, rng, sign) for n, v in program.promoted(floating).items()}
        with jax.enable_x64(True):
            moved = np.asarray(
                program.truth(near, fixed, [nudged(d, rng, sign) for d in dys])[1][name]
            )
        with np.errstate(invalid="ignore"):
            change = np.abs(moved - truth)
        furthest = np.maximum(furthest, np.where(np.isfinite(change), change, 0.0))
    return ROUNDINGS * furthest


def negligible(program: Program, args: Sequence[Any], floating: dict, name: str) -> float:
    """An error that does not matter at values that nobody asked for.

    A sigmoid's slope at 20 may lose its digits: it is 1e-9 of what a training step adds up. So
    errors count from a share of the slope at ordinary values on, as the relative change of the
    argument that they stand for.
    """
    slope, size = _ordinary(program, args, name)
    now = largest(widened(floating[name]))
    return MATTERS * slope * (min(1.0, size / now) if now else 1.0)


def floor(program: Program, args: Sequence[Any], name: str) -> float:
    """The rounding that an ordinary slope has: where the auditor chose values with a smaller one,
    as those of a softmax that is sure, the terms that cancel may still be of that size."""
    eps = float(jnp.finfo(program.types[name][1]).eps)
    return eps**FLOOR * _ordinary(program, args, name)[0]


def _ordinary(program: Program, args: Sequence[Any], name: str) -> tuple[float, float]:
    """The largest cotangent and value of an argument at ordinary values."""
    if program.typical is None:
        _, ordinary, fixed = split(explore.resampled(args, 3, 1.0).args, {})
        truth = program.truth(ordinary, fixed, program.cotangents([83]))[1]
        program.typical = {
            n: (largest(np.asarray(t)), largest(widened(ordinary[n]))) for n, t in truth.items()
        }
    return program.typical[name]
