"""The known ways in which a NaN or an infinity is born, and the usual cures."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from funcbp.trace.eager import ELEMENTWISE, Frame, Origin, Step

__all__ = ["TRAPS", "Scene", "Trap", "element", "is_transposed", "trap_of"]

# What moves numbers about and leaves them as they are; and what lies between the largest of a row,
# or its sum, and where that is used.
MOVES = {
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "stop_gradient"),
    *("convert_element_type", "slice", "dynamic_slice", "rev", "pvary", "copy"),
}
PASSES = MOVES | {"max", "abs"}
LOGS = ("log", "log1p", "log2")
ROOTS = ("sqrt", "cbrt")
SQUARES = ("square", "integer_pow", "mul")
PARTIAL = (*LOGS, *ROOTS, "rsqrt", "asin", "acos", "acosh", "atanh", "pow", "erf_inv")
# Where these make an infinity of finite operands, the true value is finite.
GROWING = ELEMENTWISE - {*PARTIAL, "tan"} | {
    *("dot_general", "ragged_dot_general", "conv_general_dilated", "reduce_sum", "reduce_prod"),
    *("cumsum", "cumprod", "reduce_window_sum", "scatter-add", "psum", "reduce_precision"),
}


class Scene(NamedTuple):
    """What is known of an origin.

    Attributes:
        origin: where it was born.
        operation: the forward operation that the step is, or is part of the derivative of.
        backward: whether it was born in a backward pass, or reached only that.
        dropped: whether a select of the forward pass did not take it.
    """

    origin: Origin
    operation: str
    backward: bool
    dropped: bool

    @property
    def step(self) -> Step:
        """The step in which it was born."""
        step = self.origin.step
        assert step is not None
        return step

    @property
    def primitive(self) -> str:
        """Of that step."""
        return self.step.eqn.primitive.name

    def values(self) -> list[Any]:
        """The operands, at the first bad element where they have one."""
        return element(self.step)[1]

    def zero(self, number: int) -> bool:
        """Whether an operand is 0 there."""
        values = self.values()
        return number < len(values) and bool(np.any(np.asarray(values[number]) == 0))

    @property
    def made_nan(self) -> bool:
        """Whether the step's result holds a NaN, not an infinity."""
        return bool(np.isnan(np.asarray(self.step.result)).any())

    @property
    def of_finite(self) -> bool:
        """Whether each operand is finite there."""
        return all(_finite(v) for v in self.values())


class Trap(NamedTuple):
    """A known way; `holds` says whether it is this one."""

    name: str
    holds: Callable[[Scene], bool]
    says: str
    cure: str


def trap_of(scene: Scene) -> Trap | None:
    """The first trap of the table that holds."""
    return next((t for t in TRAPS if t.holds(scene)), None)


def element(step: Step) -> tuple[tuple[int, ...], list[Any]]:
    """The index of the first bad element, and each operand there.

    An operand of another shape than the result, which has no such element, is given whole.
    """
    result = np.asarray(step.result)
    bad = np.isnan(result) if np.isnan(result).any() else ~np.isfinite(result)
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return index, [_at(x, index, result.shape) for x in step.operands]


def _at(operand: Any, index: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    if not jnp.issubdtype(operand.dtype, np.number):
        return operand
    values = np.asarray(operand)
    same = values.ndim == len(shape) and all(
        m in (1, n) for m, n in zip(values.shape, shape, strict=True)
    )
    return np.broadcast_to(values, shape)[index] if same else values


def _finite(value: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(value)).all())
    except TypeError:  # a key
        return True


def _through(frame: Frame, atom: Any) -> tuple[Frame, Any] | None:
    """What made a value, past the equations that only move numbers."""
    made = frame.maker(atom)
    while made is not None and made[1].primitive.name in PASSES:
        frame, eqn = made
        made = next(filter(None, map(frame.maker, eqn.invars)), None)
    return made


def _is(made: tuple[Frame, Any] | None, *names: str) -> bool:
    return made is not None and made[1].primitive.name in names


def _chain(frame: Frame, atom: Any, *links: tuple[str, ...]) -> bool:
    """Whether a value was made by one of the first names, of what the next made, and so on."""
    for names in links:
        made = _through(frame, atom)
        if made is None or made[1].primitive.name not in names:
            return False
        frame, atom = made[0], made[1].invars[0]
    return True


def is_transposed(*path: Any) -> bool:
    """Whether an equation, whose path of equations is given, is of a backward pass."""
    return any("transpose(" in str(e.source_info.name_stack) for e in path)


def _from_select(frame: Frame, atom: Any) -> bool:
    """Whether a value is a cotangent that came through a select."""
    waiting, seen = [(frame, atom)], 0
    while waiting and seen < 100:
        seen += 1
        made = waiting[0][0].maker(waiting.pop(0)[1])
        if made is None or not is_transposed(*made[0].path, made[1]):
            continue
        if _is(made, "select_n"):
            return True
        waiting += [(made[0], v) for v in made[1].invars]
    return False


def _steps(scene: Scene) -> Iterator[Step]:
    yield scene.step
    if scene.origin.turned is not None:
        yield scene.origin.turned


def _is_untaken(scene: Scene) -> bool:
    if not scene.backward:
        return False
    return scene.dropped or any(
        bool(np.any(np.asarray(value) == 0)) and _from_select(step.frame, atom)
        for step in _steps(scene)
        if step.eqn.primitive.name in ("mul", "div")
        for atom, value in zip(step.eqn.invars, element(step)[1], strict=True)
    )


def _is_masked_row(scene: Scene) -> bool:
    frame, eqn = scene.step.frame, scene.step.eqn
    sum_of_exp = (("reduce_sum",), ("exp", "select_n", "mul"))
    if scene.primitive == "sub":
        return scene.made_nan and any(_is(_through(frame, v), "reduce_max") for v in eqn.invars)
    if scene.primitive in LOGS:
        return scene.zero(0) and _chain(frame, eqn.invars[0], *sum_of_exp[:1], ("exp",))
    if scene.primitive == "div":
        top = _through(frame, eqn.invars[0])
        return scene.zero(1) and _is(top, "exp") and _chain(frame, eqn.invars[1], *sum_of_exp)
    return False


def _is_root(scene: Scene) -> bool:
    return scene.operation in ROOTS and scene.primitive not in ROOTS and not scene.dropped


def _is_norm(scene: Scene) -> bool:
    links = (("sqrt",), ("reduce_sum",), SQUARES)
    return _is_root(scene) and any(
        _chain(scene.step.frame, v, *links) for v in scene.step.eqn.invars
    )


def _is_log(scene: Scene) -> bool:
    if scene.operation not in LOGS:
        return False
    return (scene.primitive in LOGS and not scene.made_nan) or scene.zero(1)


def _is_power(scene: Scene) -> bool:
    return scene.operation == "pow" and scene.zero(0)


def _is_division(scene: Scene) -> bool:
    if scene.primitive in ("rsqrt", "integer_pow"):
        return scene.zero(0)
    return scene.primitive == "div" and scene.zero(1)


def _is_zero_times(scene: Scene) -> bool:
    """0 times an infinity, where no operation made the infinity."""
    if not scene.made_nan or scene.primitive not in ("mul", "dot_general"):
        return False
    return not scene.of_finite


def _is_difference(scene: Scene) -> bool:
    return scene.primitive in ("sub", "add", "add_any", "reduce_sum", "cumsum") and scene.made_nan


def _is_outside(scene: Scene) -> bool:
    return scene.made_nan and scene.of_finite and scene.primitive in PARTIAL


def _is_overflow(scene: Scene) -> bool:
    return not scene.made_nan and scene.of_finite and scene.primitive in GROWING


TRAPS = (
    Trap(
        "untaken_where",
        _is_untaken,
        "The branch that jnp.where (or maximum, clip) does not take is computed too, and its "
        "cotangent of 0 times an infinite or undefined derivative is NaN.",
        "Make the argument harmless before the function sees it: "
        "jnp.where(ok, f(jnp.where(ok, x, 1.0)), 0.0).",
    ),
    Trap(
        "all_masked_softmax",
        _is_masked_row,
        "A row of the softmax is masked whole, so that it has no largest element and no sum.",
        "Mask with a large finite number (jnp.finfo(x.dtype).min) in place of -inf, or let each "
        "row keep one element, and discard such rows after.",
    ),
    Trap(
        "norm_at_zero",
        _is_norm,
        "The norm of a vector has no derivative at 0: that of its square root is infinite there.",
        "Keep it from 0: jnp.sqrt(jnp.sum(x**2) + eps), or use the square of the norm.",
    ),
    Trap(
        "sqrt_at_zero",
        _is_root,
        "The derivative of a root is infinite at 0.",
        "Keep its argument from 0: jnp.sqrt(x + eps), or jnp.sqrt(jnp.maximum(x, eps)).",
    ),
    Trap(
        "log_of_zero",
        _is_log,
        "The logarithm of 0 is -inf and has no derivative.",
        "Keep its argument from 0 (jnp.log(x + eps)), or stay in logarithms: jax.nn.log_softmax, "
        "jax.nn.log_sigmoid, jax.scipy.special.xlogy.",
    ),
    Trap(
        "power_of_zero",
        _is_power,
        "A power of 0 with an exponent below 0 is infinite, as is the derivative with one below 1.",
        "Keep the base from 0: (x + eps) ** p.",
    ),
    Trap(
        "division_by_zero",
        _is_division,
        "The denominator is 0.",
        "Keep it from 0: x / (y + eps), or x / jnp.where(y == 0, 1.0, y) inside a jnp.where.",
    ),
    Trap(
        "zero_times_infinity",
        _is_zero_times,
        "0 times an infinity is NaN.",
        "Choose with jnp.where in place of multiplying by a mask of 0 and 1.",
    ),
    Trap(
        "infinity_minus_infinity",
        _is_difference,
        "Infinities that cancel make NaN.",
        "Use a large finite number (jnp.finfo(x.dtype).min) in place of the infinity.",
    ),
    Trap(
        "outside_domain",
        _is_outside,
        "The function has no real value there.",
        "Clip its argument: jnp.clip(x, lower, upper).",
    ),
    Trap(
        "overflow",
        _is_overflow,
        "The result is too large for its dtype.",
        "Do this in float32 or wider, scale before it, or take exponentials of differences from "
        "the largest (jax.nn.softmax, jax.nn.logsumexp).",
    ),
)
