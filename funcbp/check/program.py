"""A rule at arguments of given shapes and types, beside autodiff and the truth in float64."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.compare import split
from funcbp.check.differences import Slope, differentiate
from funcbp.check.evaluate import Evaluator, compiled, double
from funcbp.check.subject import Subject

__all__ = ["Broken", "Program"]

# Above this many elements, forward mode and differences take too long.
FORWARD, DIFFERENCES = 512, 256
# Elements that forward mode takes at once.
BATCH = 64


class Broken(Exception):
    """The rule raised where the primal did not."""


class Program:
    """A subject at arguments of given shapes and types: everything is compiled once."""

    def __init__(self, subject: Subject, args: Sequence[Any]):
        self.subject = subject
        self.layout, floating, fixed = split(tuple(args), {})
        self.types = {n: (v.shape, v.dtype) for n, v in floating.items()}
        self.names = list(floating)
        with self.precision():
            self.closed, out = jax.make_jaxpr(self._primal, return_shape=True)(floating, fixed)
        self.outputs = jax.tree.leaves(out)
        self.evaluator = Evaluator(self.closed, promote=True)
        self.size = sum(v.size for v in floating.values())
        self._fixed = fixed
        # The largest cotangent and value of each argument at ordinary values, once known.
        self.typical: dict[str, tuple[float, float]] | None = None

    def precision(self) -> Any:
        """The context in which these types exist."""
        wide = any(d in (np.float64, np.complex128) for _, d in self.types.values())
        return jax.enable_x64(True) if wide else contextlib.nullcontext()

    def _primal(self, floating: dict[str, Any], fixed: list[Any]) -> Any:
        return self.layout.call(self.subject.primal, floating, fixed)

    def cotangents(self, seed: Sequence[int], kind: str = "normal") -> list[np.ndarray]:
        """One float64 cotangent for each floating output."""
        rng = np.random.default_rng([*seed, 29])
        real = [a for a in self.outputs if jnp.issubdtype(a.dtype, jnp.inexact)]
        drawn = []
        for aval in real:
            if kind == "ones":
                dy = np.ones(aval.shape)
            else:
                dy = rng.standard_normal(aval.shape)
                if jnp.issubdtype(aval.dtype, jnp.complexfloating):
                    dy = dy + 1j * rng.standard_normal(aval.shape)
            # Rounded to the output's type, so that all precisions get the same numbers.
            drawn.append(np.asarray(dy).astype(aval.dtype).astype(double(aval.dtype)))
        return drawn

    def _pulled(self, value: Callable, floating: dict, dys: list) -> tuple[list, dict]:
        """(floating outputs, cotangents) of a function of the floating arguments."""

        def real(floating):
            leaves = jax.tree.leaves(value(floating))
            return [y for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact)]

        y, pullback = jax.vjp(real, floating)
        dys = [jnp.asarray(d, v.dtype) for d, v in zip(dys, y, strict=True)]
        return y, pullback(dys)[0]

    def rule(self, floating: dict, fixed: list, dys: list) -> tuple[list, dict]:
        """Values and cotangents as the rule gives them. Raises Broken."""
        try:
            with self.precision():
                return self._rule(floating, fixed, dys)
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {_first_line(error)}") from error

    @functools.cached_property
    def _rule(self) -> Callable:
        return compiled(self.eager)

    def eager(self, floating: dict, fixed: list, dys: list) -> tuple[list, dict]:
        """The rule without jit."""
        call = functools.partial(self.layout.call, self.subject.call)
        return self._pulled(lambda floating: call(floating, fixed), floating, dys)

    def double(self, floating: dict, fixed: list, dys: list) -> dict | None:
        """Cotangents as the rule gives them in float64; None where it does not take that."""
        try:
            with jax.enable_x64(True):
                return compiled(self.eager)(self.promoted(floating), fixed, dys)[1]
        except Exception:
            return None

    def autodiff(self, floating: dict, fixed: list, dys: list) -> tuple[list, dict]:
        """The same by autodiff of the primal, without any custom rule, in its own precision."""
        with self.precision():
            return self._autodiff(floating, fixed, dys)

    @functools.cached_property
    def _autodiff(self) -> Callable:
        return compiled(self._derived(Evaluator(self.closed)))

    def truth(self, floating: dict, fixed: list, dys: list) -> tuple[list, dict]:
        """The same in float64; by finite differences where the primal has no derivative in JAX."""
        if self.derivable:
            with jax.enable_x64(True):
                return self._truth(self.promoted(floating), fixed, dys)
        with jax.enable_x64(True):
            y = self._value(self.promoted(floating), fixed)
        if self.size > DIFFERENCES:
            raise ValueError(
                f"its function has no derivative in JAX, and {self.size} elements are too many for "
                "finite differences; call it with smaller arguments"
            )
        return y, {n: self._differences(floating, fixed, dys, n) for n in self.names}

    @functools.cached_property
    def derivable(self) -> bool:
        """Whether JAX can differentiate the primal: not a callback, nor some scatters."""
        avals = {n: jax.ShapeDtypeStruct(*t) for n, t in self.types.items()}
        try:
            with jax.enable_x64(True):
                wide = {n: jax.ShapeDtypeStruct(a.shape, double(a.dtype)) for n, a in avals.items()}
                jax.eval_shape(self._truth, wide, self._fixed, self.cotangents([0]))
        except (NotImplementedError, ValueError, TypeError):
            return False
        return True

    @functools.cached_property
    def _value(self) -> Callable:
        def run(floating, fixed):
            y = self.evaluator(*[floating[n] for n in sorted(floating)], *fixed)
            return [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]

        return compiled(run)

    def ends(self, floating: dict, fixed: list) -> bool:
        """Whether its loops end in its own precision too, so that the rule can be run."""
        if not self._loops:
            return True
        with self.precision():
            y = self._bounded(floating, fixed)
        return all(bool(jnp.all(jnp.isfinite(v))) for v in y)

    @functools.cached_property
    def _loops(self) -> bool:
        return "while[" in str(self.closed)

    @functools.cached_property
    def _bounded(self) -> Callable:
        evaluator = Evaluator(self.closed)

        def run(floating, fixed):
            y = evaluator(*[floating[n] for n in sorted(floating)], *fixed)
            return [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]

        return compiled(run)

    def _differences(self, floating: dict, fixed: list, dys: list, name: str) -> np.ndarray:
        """The cotangent of one argument; nan where the differences do not converge."""
        shape, dtype = self.types[name]
        found = np.zeros(shape, double(dtype))
        units = (1, 1j) if np.iscomplexobj(found) else (1,)
        for index in np.ndindex(shape):
            for unit in units:
                slope = self.slope(floating, fixed, dys, (name, index), unit)
                sure = slope.kinked or slope.sure(max(abs(slope.central), 1e-3))
                # The pullback of a complex argument has minus the imaginary direction.
                found[index] += np.conj(unit) * (slope.central if sure else np.nan)
        return found

    @functools.cached_property
    def _truth(self) -> Callable:
        return compiled(self._derived(self.evaluator))

    def promoted(self, floating: dict) -> dict:
        """Floating arguments in double."""
        return {n: np.asarray(v).astype(double(v.dtype)) for n, v in floating.items()}

    def _derived(self, evaluator: Evaluator) -> Callable:
        def run(floating, fixed, dys):
            def value(floating):
                return evaluator(*[floating[n] for n in sorted(floating)], *fixed)

            try:
                return self._pulled(value, floating, dys)
            except ValueError as error:
                if "everse-mode" not in str(error) or self.size > FORWARD:
                    raise
                return self._forward(value, floating, dys)

        return run

    def _forward(self, value: Callable, floating: dict, dys: list) -> tuple[list, dict]:
        """By forward mode, an element at a time: for loops that reverse mode cannot take back."""

        def real(floating):
            return [y for y in value(floating) if jnp.issubdtype(y.dtype, jnp.inexact)]

        y = real(floating)
        zeros = {n: jnp.zeros_like(v) for n, v in floating.items()}

        def cotangent(n, v):
            def along(direction):
                tangent = zeros | {n: direction.reshape(v.shape).astype(v.dtype)}
                dy = jax.jvp(real, (floating,), (tangent,))[1]
                terms = [jnp.sum(d * t.astype(d.dtype)) for d, t in zip(dys, dy, strict=True)]
                return jnp.real(sum(terms, jnp.zeros(())))

            d = jax.lax.map(along, jnp.eye(v.size), batch_size=BATCH)
            if jnp.issubdtype(v.dtype, jnp.complexfloating):
                d = d - 1j * jax.lax.map(along, 1j * jnp.eye(v.size), batch_size=BATCH)
            return d.reshape(v.shape).astype(v.dtype)

        return y, {n: cotangent(n, v) for n, v in floating.items()}

    @functools.cached_property
    def _along(self) -> Callable:
        def phi(floating, fixed, dys, direction, ts):
            def at(t):
                moved = {n: v + (t * direction[n]).astype(v.dtype) for n, v in floating.items()}
                y = self.evaluator(*[moved[n] for n in sorted(moved)], *fixed)
                real = [v for v in y if jnp.issubdtype(v.dtype, jnp.inexact)]
                terms = [d * v.astype(d.dtype) for d, v in zip(dys, real, strict=True)]
                # A value that does not move says nothing, though it be infinite.
                return [jnp.real(t) for t in terms]

            base = at(jnp.zeros(()))
            size = sum((jnp.sum(jnp.where(jnp.isfinite(b), jnp.abs(b), 0)) for b in base), 0.0)

            def difference(t):
                moves = [
                    jnp.sum(jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0, a - b))
                    for a, b in zip(at(t), base, strict=True)
                ]
                return sum(moves, jnp.zeros(()))

            return jax.lax.map(difference, ts), size

        return compiled(phi)

    def slope(self, floating: dict, fixed: list, dys: list, at: tuple, unit: complex = 1) -> Slope:
        """The slope of the sum of cotangent times output, along one element of one argument."""
        name, index = at
        wide = self.promoted(floating)
        along = np.zeros(wide[name].shape, wide[name].dtype)
        along[index] = unit
        scale = float(np.abs(wide[name][index]))
        if not np.isfinite(scale):
            return Slope(*[np.nan, np.inf] * 3)
        return self.slope_along(floating, fixed, dys, {name: along}, scale)

    def slope_along(
        self, floating: dict, fixed: list, dys: list, along: dict, scale: float = 0.0
    ) -> Slope:
        """The slope along a direction in one argument, whose step is of this scale or more."""
        wide = self.promoted(floating)
        direction = {n: along.get(n, np.zeros(v.shape, v.dtype)) for n, v in wide.items()}
        for name in along:
            typical = np.abs(wide[name][np.isfinite(wide[name])])
            scale = max(scale, float(np.median(typical)) if typical.size else 0.0) or 1.0
        eps = max(float(jnp.finfo(d).eps) for _, d in self.types.values())
        eps = eps if self.evaluator.limited else float(np.finfo(np.float64).eps)
        with jax.enable_x64(True):
            return differentiate(
                lambda ts: self._along(wide, fixed, dys, direction, ts), scale, eps
            )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return inspect.cleandoc(text.split("\n--------------------")[0])[:500]
