"""Wrong gradients that the auditor found in published packages, each beside what is right.

Run it with those of the packages that are installed; it prints what their rules return today. The
values that are right come from float64 and from limits that can be taken by hand.

    JAX        0.10.2  jax.scipy.special.log_ndtr    loses its digits below -100
    numpyro    0.22.0  DoublyTruncatedPowerLaw       slope of the density, not of its logarithm
    ott-jax    0.6.0   ott.math.utils.norm           another value at 0 once it is differentiated
"""

import contextlib
import importlib

import jax
import jax.numpy as jnp

# What could be tried here: (package, what, returned, right).
FOUND: list[tuple[str, str, float, float]] = []


def log_ndtr() -> None:
    """d/dx log Phi(x) tends to -x: the rule takes exp of a difference of numbers near x^2 / 2."""
    slope = jax.grad(jax.scipy.special.log_ndtr)
    for x in (-1e3, -1e4):
        right = -x - 1 / x  # the first two terms of its expansion, the next below 1e-8
        FOUND.append(("jax", f"d/dx log_ndtr({x:g})", float(slope(jnp.float32(x))), right))


def power_law() -> None:
    """log p(x) = a log x + log(1 + a) - log(high^(1 + a) - low^(1 + a)), by its parameters."""
    a = 0.5
    distributions = importlib.import_module("numpyro.distributions")

    def log_prob(low, high):
        return distributions.DoublyTruncatedPowerLaw(a, low, high).log_prob(jnp.array(1.5))

    low, high = 1.0, 2.0
    total = high ** (1 + a) - low ** (1 + a)
    for argument, right in ((0, (1 + a) * low**a / total), (1, -(1 + a) * high**a / total)):
        got = float(jax.grad(log_prob, argument)(low, high))
        FOUND.append(("numpyro", f"power law, d/d{('low', 'high')[argument]} log p", got, right))


def norm() -> None:
    """|0| is 0, and stays 0 when a gradient is asked for as well."""
    utils = importlib.import_module("ott.math.utils")
    value, _ = jax.value_and_grad(utils.norm)(jnp.zeros(4))
    FOUND.append(("ott", "norm(0) under value_and_grad", float(value), 0.0))


def main() -> None:
    """Tries each; a package that is not installed, or does not import, is left out."""
    for example in (log_ndtr, power_law, norm):
        with contextlib.suppress(ImportError, AttributeError):
            example()
    for package, what, got, right in FOUND:
        said = "repaired" if abs(got - right) <= 1e-3 * max(1.0, abs(right)) else "wrong"
        print(f"{package:8s} {what:34s} returns {got:<12.7g} right {right:<12.7g} {said}")


if __name__ == "__main__":
    main()
