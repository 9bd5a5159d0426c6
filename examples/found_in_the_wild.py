"""Wrong gradients in published packages, each beside what is right.

The auditor was run on the custom rules of a dozen packages. What follows is wrong by mathematics:
for each, the shortest call that shows it, what the package's rule returns there, and the slope of
the function itself, by finite differences in float64 (from one side at the end of a domain).

Seen with JAX 0.10.2 and 0.12.0 (expn with 0.10.2 alone), numpyro 0.22.0, ott-jax 0.6.0 and jaxopt
0.8.5. A package that is not installed is left out, and nothing here fails once a rule is repaired:
the line then says so.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats


class Found(NamedTuple):
    """What a rule returned, and what is right."""

    call: str
    got: Any
    right: Any

    @property
    def wrong(self) -> bool:
        return not np.allclose(self.got, self.right, rtol=1e-3, atol=1e-6)


def slope(f: Callable, x: float, h: float = 1e-5, side: int = 0) -> float:
    """The slope of f at x in float64: central, or from one side, where a domain ends."""
    with jax.enable_x64(True):
        low, high = (x - h if side <= 0 else x), (x + h if side >= 0 else x)
        ends = [f(jnp.float64(v)) for v in (low, high)]
        return float(ends[1] - ends[0]) / (high - low)


def package(name: str, module: str | None = None) -> Any:
    """A package that may be missing, or too old for this JAX: then None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module or name)
    except (ImportError, AttributeError):
        return None


# jax


def determinant() -> Found:
    """The rule solves with the LU factors, and takes for granted that the last pivot is the 0."""
    diagonal = [1.0, 0.0, 2.0, 3.0, 4.0]
    got = jax.grad(jnp.linalg.det)(jnp.diag(jnp.array(diagonal)))[1, 1]

    def det(t):
        return jnp.linalg.det(jnp.diag(jnp.array(diagonal)).at[1, 1].set(t))

    return Found("grad(jnp.linalg.det)(diag([1, 0, 2, 3, 4]))[1, 1]", got, slope(det, 0.0))


def log_normal_cdf() -> Found:
    """exp(-x²/2 - log_ndtr(x)): two numbers of size x²/2, of which nothing is left in float32."""
    got = jax.grad(stats.norm.logcdf)(-1e4)
    return Found("grad(norm.logcdf)(-1e4)", got, slope(special.log_ndtr, -1e4, h=1.0))


def log_of_sum() -> Found:
    """The rule writes exp(x2 - out), and puts 0 for out where that is infinite."""
    got = jax.grad(jnp.logaddexp, 1)(jnp.inf, 3.0)
    return Found(
        "grad(jnp.logaddexp, 1)(inf, 3), beside that at (1e3, 3)",
        got,
        slope(lambda x2: jnp.logaddexp(jnp.float64(1e3), x2), 3.0),
    )


def no_events() -> Found:
    """xlogy(0, y) is 0 for all y; its rule divides 0 by 0 at y = 0."""
    got = jax.grad(lambda mu: stats.poisson.logpmf(0, mu))(0.0)
    right = slope(lambda mu: stats.poisson.logpmf(0, mu), 0.0, side=1)
    return Found("grad of poisson.logpmf(0, mu) at mu = 0", got, right)


def confluent() -> Found:
    """The derivative in a is a series with a factor a in front."""
    got = jax.grad(special.hyp1f1)(0.0, 1.3, 0.7)
    return Found(
        "grad(hyp1f1)(a=0, 1.3, 0.7)", got, slope(lambda a: special.hyp1f1(a, 1.3, 0.7), 0.0)
    )


def gauss() -> Found:
    """The same in hyp2f1."""
    got = jax.grad(special.hyp2f1)(0.0, 1.3, 2.1, 0.4)
    return Found(
        "grad(hyp2f1)(a=0, 1.3, 2.1, 0.4)",
        got,
        slope(lambda a: special.hyp2f1(a, 1.3, 2.1, 0.4), 0.0),
    )


def exponential_integral() -> Found:
    """The rule is -expn(n - 1, x), and expn has no order -1."""
    got = jax.grad(special.expn, 1)(0, 0.3)
    return Found("grad(expn, 1)(0, 0.3)", got, slope(lambda x: special.expn(0, x), 0.3))


def rising_factorial() -> Found:
    """poch(z, 1) is z; the rule is a difference of two infinite digammas."""
    got = jax.grad(special.poch)(0.0, 1.0)
    return Found("grad(poch)(0, 1)", got, slope(lambda z: special.poch(z, 1.0), 0.0))


def decay() -> Found:
    """The rule runs the equation backwards, where a decay grows: rounding errors do."""
    ode = importlib.import_module("jax.experimental.ode")

    def end(a):
        t = jnp.array([0.0, 100.0], a.dtype)
        return ode.odeint(lambda y, _, a: -a * y, jnp.ones((), a.dtype), t, a)[-1]

    return Found(
        "grad in a of y(100), y' = -a y, at a = 1.3 (odeint)",
        jax.grad(end)(jnp.float32(1.3)),
        slope(end, 1.3, h=1e-2),
    )


# numpyro


def _power_law(method: str, what: str, at: float, value: float, arguments: dict) -> Found | None:
    distributions = package("numpyro", "numpyro.distributions")
    if distributions is None:
        return None

    def f(t):
        x = t if what == "value" else value
        law = distributions.DoublyTruncatedPowerLaw(**(arguments | {what: t}), validate_args=False)
        return getattr(law, method)(x)

    if what == "value":
        law = distributions.DoublyTruncatedPowerLaw(**arguments)
        f = getattr(law, method)
    call = f"grad of DoublyTruncatedPowerLaw.{method} in {what}"
    return Found(call, jax.grad(f)(at), slope(f, at))


def power_law_low() -> Found | None:
    """The rule has the derivative of the density in place of that of its logarithm."""
    return _power_law("log_prob", "low", 0.2, 1.1, {"alpha": -2.0, "high": 3.0})


def power_law_high() -> Found | None:
    """The same, and with the wrong sign."""
    return _power_law("log_prob", "high", 3.0, 1.1, {"alpha": -2.0, "low": 0.2})


def power_law_outside() -> Found | None:
    """Above the upper end the distribution function is 1; the rule forgets that it is clipped."""
    arguments = {"alpha": -2.0, "low": 0.2, "high": 3.0}
    return _power_law("cdf", "value", 3.5, 3.5, arguments)


# ott


def norm_of_zero() -> Found | None:
    """To be safe at 0 the rule puts ones in its place, and then returns the norm of the ones."""
    utils = package("ott", "ott.math.utils")
    if utils is None:
        return None
    zero = jnp.zeros(3)
    got = jax.value_and_grad(lambda x: utils.norm(x))(zero)[0]
    return Found("the value of ott norm(zeros(3)) under value_and_grad", got, utils.norm(zero))


def norm_of_a_zero_row() -> Found | None:
    """It is safe only where the whole array is 0. Any number in [-1, 1] would be right here."""
    utils = package("ott", "ott.math.utils")
    if utils is None:
        return None
    rows = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    got = jax.grad(lambda x: utils.norm(x, axis=-1).sum())(rows)[0, 0]
    right = got if abs(got) <= 1 else 0.0
    return Found("grad of ott norm over rows, in a row of zeros", got, right)


def nothing_to_add() -> Found | None:
    """The value is -inf; the rule returns what it put in its place."""
    utils = package("ott", "ott.math.utils")
    if utils is None:
        return None
    x = jnp.full(3, -jnp.inf)
    got = jax.value_and_grad(lambda x: utils.logsumexp(x))(x)[0]
    return Found(
        "the value of ott logsumexp([-inf] * 3) under value_and_grad", got, utils.logsumexp(x)
    )


def smoothing() -> Found | None:
    """The rule returns nothing for gamma, which reads as 0."""
    utils = package("ott", "ott.math.utils")
    if utils is None:
        return None

    def softmin(gamma):
        return utils.softmin(jnp.array([0.3, 2.0, 1.0], gamma.dtype), gamma, None)

    return Found(
        "grad of ott softmin in gamma", jax.grad(softmin)(jnp.float32(0.5)), slope(softmin, 0.5)
    )


# jaxopt


def isotonic() -> Found | None:
    """The rule takes values less than 1e-8 apart for one block, whatever their size."""
    jaxopt = package("jaxopt")
    if jaxopt is None:
        return None

    def first(t):
        y = jnp.stack([t, t * 0 + 5e-9, t * 0 + 9e-9])
        return jaxopt.isotonic.isotonic_l2_pav(y)[0]

    return Found(
        "grad of isotonic_l2_pav at [1e-9, 5e-9, 9e-9]",
        jax.grad(first)(jnp.float32(1e-9)),
        slope(first, 1e-9, h=1e-12),
    )


CASES: dict[str, tuple[Callable[[], Found | None], ...]] = {
    "jax": (
        determinant,
        log_normal_cdf,
        log_of_sum,
        no_events,
        confluent,
        gauss,
        exponential_integral,
        rising_factorial,
        decay,
    ),
    "numpyro": (power_law_low, power_law_high, power_law_outside),
    "ott-jax": (norm_of_zero, norm_of_a_zero_row, nothing_to_add, smoothing),
    "jaxopt": (isotonic,),
}


def main() -> None:
    """Prints each, with the version that is installed."""
    for name, cases in CASES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
            continue
        print(f"{name} {version}")
        for case in cases:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = case()
            if found is None:
                print(f"  {case.__name__}: the package does not run with this JAX")
                continue
            verdict = "wrong" if found.wrong else "repaired"
            print(f"  {verdict}: {found.call} gives {found.got:.6g}, right is {found.right:.6g}")
            print(f"    {' '.join((case.__doc__ or '').split())}")


if __name__ == "__main__":
    main()
