"""Finite differences with an error estimate.

The derivative of phi(t) at 0 by Ridders' extrapolation from several base steps, of which the one
with the least uncertainty is kept; and the slopes from either side, which differ at a kink.

Ref: Ridders, Accurate computation of F'(x) and F'(x)F''(x), 1982; Press et al., Numerical Recipes,
section 5.7.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["STEPS", "Slope", "differentiate"]

# Steps from 2**-1 down to 2**-40 of the scale; the tableau takes at most so many of them.
STEPS, COLUMNS = 40, 9


class Slope(NamedTuple):
    """A derivative: central, from the left and from the right, each with its uncertainty.

    Infinite uncertainty says that the differences did not converge, or met a value that is not
    finite on that side.
    """

    central: float
    uncertainty: float
    left: float
    left_uncertainty: float
    right: float
    right_uncertainty: float

    @property
    def kinked(self) -> bool:
        """Whether both sides have a slope, and not the same."""
        apart = abs(self.left - self.right)
        unsure = self.left_uncertainty + self.right_uncertainty
        return bool(np.isfinite(unsure) and apart > 4 * unsure)

    def sure(self, of: float) -> bool:
        """Whether the central slope is known to a tenth of `of`."""
        return bool(np.isfinite(self.central) and self.uncertainty <= 0.1 * abs(of))

    def admits(self, value: float, margin: float) -> bool:
        """Whether the value is the derivative, or lies between the slopes of a kink."""
        if not np.isfinite(value):
            return False
        if self.kinked:
            low, high = sorted((self.left, self.right))
            slack = margin + self.left_uncertainty + self.right_uncertainty
            return low - slack <= value <= high + slack
        return bool(abs(value - self.central) <= margin + 2 * self.uncertainty)


def differentiate(phi: Callable[[np.ndarray], tuple[Any, Any]], scale: float, eps: float) -> Slope:
    """The slope of phi at 0.

    Args:
      phi: takes an array of t; returns the values in the same shape, and the size of the terms
        that they were added up from, for their rounding error.
      scale: a length over which phi is expected to change.
      eps: the relative rounding error of phi.
    """
    steps = scale * 2.0 ** -np.arange(1, STEPS + 1)
    found, size = phi(np.concatenate([[0.0], steps, -steps]))
    values = np.asarray(found, np.float64)
    middle, ahead, behind = values[0], values[1 : STEPS + 1], values[STEPS + 1 :]
    noise = 8 * eps * float(size) / steps
    with np.errstate(all="ignore"):
        central = _extrapolated((ahead - behind) / (2 * steps), noise / 2, order=2)
        right = _extrapolated((ahead - middle) / steps, noise, order=1)
        left = _extrapolated((middle - behind) / steps, noise, order=1)
    # Differences over both sides cancel at a pole or over whole periods, and look converged; a
    # derivative is the slope of each side.
    apart = max(abs(central[0] - left[0]), abs(central[0] - right[0]))
    return Slope(central[0], max(central[1], apart), *left, *right)


def _extrapolated(quotients: np.ndarray, noise: np.ndarray, order: int) -> tuple[float, float]:
    """The limit of difference quotients at steps halved each time, and its uncertainty."""
    best, unsure = np.nan, np.inf
    for start in range(0, len(quotients) - 3, 2):
        row = [quotients[start]]
        for k in range(1, min(COLUMNS, len(quotients) - start)):
            new = [quotients[start + k]]
            factor = 2.0**order
            for previous in row:
                new.append(new[-1] + (new[-1] - previous) / (factor - 1))
                factor *= 2.0**order
            # The error of an entry is how far it moved from both of its parents, and at least
            # the rounding of its finest quotient.
            change = max(abs(new[-1] - new[-2]), abs(new[-1] - row[-1]))
            error = change + noise[start + k] if k > 1 else np.inf
            if np.isfinite(new[-1]) and error < unsure:
                best, unsure = new[-1], error
            if abs(new[-1] - row[-1]) > 4 * unsure:
                break
            row = new
    return float(best), float(unsure)
