"""The first operation, forward or backward, that made a NaN or an infinity."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util
from jax._src.interpreters.partial_eval import TracebackScope
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, PyTree

from funcbp.core import InputError
from funcbp.jaxprs import CALLS, QUICKLY, equations, opened
from funcbp.trace.eager import LOOPS, Origin, Run, Step, Trouble, Value, trouble_of
from funcbp.trace.origin import layer, source
from funcbp.trace.traps import MOVES, Scene, Trap, element, is_transposed, trap_of

__all__ = ["NonFinite", "find_nonfinite"]

# The parts of a hand rule among the parameters of its call.
PARTS = ("bwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun")
MARK = re.compile(r"(?:^|/)hand_rule_(\d+)(?=/|$)")
# What is no operation of its own: the line is that of what they hold, or stand beside.
OUTER = MOVES | {*LOOPS, *CALLS} - {"custom_jvp_call"}
SHOWN = 4  # operands in a message
REMAT = ("checkpoint", "remat", "remat2")
# Overflow is what the program as written does, not what one fused in a wider dtype does.
AS_WRITTEN = {"xla_allow_excess_precision": False}


class NonFinite(NamedTuple):
    """The operation that made a NaN or an infinity; prints as its message.

    Attributes:
        source: the line that called it, as `model.py:12`.
        operation: the primitive's name; of a derivative, the function's that it is of. "argument"
            or "constant" where no operation made it.
        direction: "forward" if the value is not finite, "backward" if only the gradient is not, or
            if it was born in a gradient that the function takes itself.
        layer: the path of scopes, as `serial/dense_0`; "" outside of any.
        operands: the values that went in.
        trap: the name of the known mistake, or None.
        message: what, where, the operands at the first bad element, the trap and its cure.
    """

    source: str
    operation: str
    direction: str
    layer: str
    operands: tuple[Array, ...]
    trap: str | None
    message: str

    def __str__(self) -> str:
        return self.message


def find_nonfinite(fn: Callable, *args: PyTree) -> NonFinite | None:
    """Finds the first operation that made a NaN or an infinity, in the value or in the gradient.

    The function is run, then its gradient by all floating arguments; if a result is not finite,
    the program runs again, operation by operation. An infinity that does no harm, like a mask of
    -inf, is no finding.

    Args:
        fn: any JAX function. Of an output that is no scalar, the sum is differentiated.
        *args: what to call it with. Arrays and floats are traced; integers, strings, functions and
            the like are passed as they are.

    Returns:
        What was found, or None if the value and the gradient are finite.

    Raises:
        InputError: `fn` is no function, an argument has no values, or no output is floating.

    >>> found = funcbp.find_nonfinite(loss, params, batch)
    >>> print(found)
    """
    if not callable(fn):
        raise InputError(f"fn must be a function, got {type(fn).__name__} {fn!r}")
    names, leaves, call = _flat(fn, args)
    forward = jax.make_jaxpr(call)(*leaves)
    if not forward.out_avals:
        raise InputError("fn must return at least one floating array; return what should be finite")
    if not _is_finite(forward, leaves):
        return _search(forward, names, leaves, forward, _Rules(), "forward")
    if not any(map(_inexact, leaves)):
        return None
    rules = _Rules()
    call = jaxpr_as_fun(rules.marked(forward))
    backward = jax.make_jaxpr(_with_cotangents(call))(*leaves)
    if _is_finite(backward, leaves):
        return None
    return _search(backward, names, leaves, forward, rules, "backward")


def _flat(fn: Callable, args: tuple) -> tuple[list[str], list[Any], Callable]:
    """The names and values of what is traced, and fn of those alone, to what is floating."""
    paths, tree = jax.tree_util.tree_flatten_with_path(args)
    for path, leaf in paths:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InputError(
                f"{_name(path)} must hold values, got {leaf}; make them, as in jnp.zeros(shape)"
            )
    traced = [i for i, (_, leaf) in enumerate(paths) if _is_traced(leaf)]

    def call(*leaves):
        every = [leaf for _, leaf in paths]
        for i, leaf in zip(traced, leaves, strict=True):
            every[i] = leaf
        out = jax.tree.leaves(fn(*jax.tree.unflatten(tree, every)))
        return [jnp.asarray(y) for y in out if _is_traced(y) and _inexact(y)]

    return [_name(paths[i][0]) for i in traced], [jnp.asarray(paths[i][1]) for i in traced], call


def _name(path: tuple) -> str:
    return f"argument {path[0].idx}{jax.tree_util.keystr(path[1:])}"


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, float | complex | jax.Array | np.ndarray | np.generic)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _with_cotangents(call: Callable) -> Callable:
    """The value and the cotangents of the floating arguments, for a cotangent of ones."""

    def run(*leaves):
        numbers = [i for i, leaf in enumerate(leaves) if _inexact(leaf)]

        def of_floating(*floating):
            every = list(leaves)
            for i, leaf in zip(numbers, floating, strict=True):
                every[i] = leaf
            return call(*every)

        value, pullback = jax.vjp(of_floating, *(leaves[i] for i in numbers))
        return [*value, *pullback([jnp.ones_like(y) for y in value])]

    return run


def _is_finite(program: ClosedJaxpr, leaves: Sequence[Any]) -> bool:
    options = AS_WRITTEN | (QUICKLY if jax.default_backend() == "cpu" else {})
    compiled = jax.jit(jaxpr_as_fun(program), compiler_options=options)
    return not any(map(trouble_of, compiled(*leaves)))


class _Rules:
    """The calls of hand rules in a program, and which equations are of which.

    JAX gives the equations of a rule the line of its call. The program that `marked` returns gives
    them the lines they are written on; the call is kept by number in `calls`.
    """

    def __init__(self):
        self.calls: list[Any] = []
        self._known: dict[int, Any] = {}
        # By the identity of the traceback, which stays the same through JAX's transformations.
        self._lines: dict[int, tuple[Any, int]] = {}

    def of(self, eqn: Any, scopes: str) -> Any:
        """The call of the hand rule that an equation is in, or None."""
        _, number = self._lines.get(id(eqn.source_info.traceback), (None, None))
        if number is None:
            number = next(map(int, reversed(MARK.findall(scopes))), None)
        return None if number is None else self.calls[number]

    def learn(self, jaxpr: Any, number: int) -> None:
        """The equations of a rule that JAX traced into a program of its own."""
        for eqn in equations(jaxpr):
            traceback = eqn.source_info.traceback
            if traceback is not None:
                self._lines[id(traceback)] = traceback, number

    def marked(self, value: Any) -> Any:
        """A jaxpr, or a tuple of them, so rewritten; the same object if it holds no hand rule."""
        if isinstance(value, tuple):
            new = [self.marked(v) for v in value]
            same = all(a is b for a, b in zip(new, value, strict=True))
            return value if same else tuple(new)
        if not hasattr(value, "eqns"):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = self._jaxpr(value)
        return self._known[id(value)]

    def _jaxpr(self, jaxpr: Any) -> Any:
        if opened(jaxpr) is not jaxpr:  # closed, until JAX 0.11 another type
            inner = self.marked(jaxpr.jaxpr)
            return jaxpr if inner is jaxpr.jaxpr else ClosedJaxpr(inner, jaxpr.consts)
        eqns = [self._equation(eqn) for eqn in jaxpr.eqns]
        same = all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return jaxpr if same else jaxpr.replace(eqns=eqns)

    def _equation(self, eqn: Any) -> Any:
        new = {n: self.marked(v) for n, v in eqn.params.items() if n not in PARTS}
        parts = {n: eqn.params[n] for n in PARTS if n in eqn.params}
        if parts:
            self.calls.append(eqn)
            number = len(self.calls) - 1
            parts = {n: _own_lines(part, self, number) for n, part in parts.items()}
        elif all(v is eqn.params[n] for n, v in new.items()):
            return eqn
        return eqn.replace(params=new | parts)


@lu.transformation2
def _own_lines(part: Callable, rules: _Rules, number: int, *args: Any) -> Any:
    """A part of a hand rule, whose equations get their own lines."""
    # There is no public way: JAX's user_context keeps the line of the call.
    store = source_info_util._source_info_context
    before = store.context
    store.context = source_info_util.SourceInfo(None, before.name_stack)
    try:
        with TracebackScope(), jax.named_scope(f"hand_rule_{number}"):
            out = part(*args)
    finally:
        store.context = before
    if isinstance(out, tuple) and hasattr(out[0], "eqns"):
        rules.learn(out[0], number)
    return out


def _search(
    program: ClosedJaxpr,
    names: Sequence[str],
    leaves: Sequence[Any],
    forward: ClosedJaxpr,
    rules: _Rules,
    direction: str,
) -> NonFinite:
    run = Run()
    arguments = [
        Value.of(leaf, Origin("argument", name=name))
        for name, leaf in zip(names, leaves, strict=True)
    ]
    results = run(program, arguments)
    bad = [v for v in results if v.trouble and v.origin]
    if not bad:
        return _of_the_whole(direction)
    origin = min(bad, key=_order).origin
    assert origin is not None
    if origin.kind != "event":
        return _given(origin, direction, rules)
    assert origin.step is not None
    primal = _primal(origin.step, forward)
    dropped = origin.number in run.dropped
    if _of_gradient(origin, primal, dropped):
        direction = "backward"
    scene = Scene(origin, primal.primitive.name, direction == "backward", dropped)
    return _born(scene, trap_of(scene), direction, rules)


def _of_gradient(origin: Origin, primal: Any, dropped: bool) -> bool:
    """Whether fn takes a gradient, and it was born in that one, or reached only that."""
    step, turned = origin.step, origin.turned
    assert step is not None
    differentiated = any("jvp(" in str(e.source_info.name_stack) for e in step.path)
    return (
        differentiated
        and (primal is not step.eqn or dropped)
        or any(s is not None and is_transposed(*s.path) for s in (step, turned))
    )


def _order(value: Value) -> tuple[bool, int]:
    """The first in the program; a given infinity, which may be meant, last."""
    assert value.origin is not None
    given = value.origin.kind != "event" and value.trouble is not Trouble.NAN
    return given, value.origin.number


def _primal(step: Step, forward: ClosedJaxpr) -> Any:
    """The equation of the forward program that a step is, or is part of the derivative of."""
    traceback = step.eqn.source_info.traceback
    if traceback is None:
        return step.eqn
    same = (e for e in equations(forward) if e.source_info.traceback is traceback)
    return next((e for e in same if e.primitive.name not in OUTER), step.eqn)


def _where(step: Step, rules: _Rules) -> tuple[str, str, str]:
    """The source, the layer, and the hand rule that a step is in."""
    scopes = _scopes(step.path)
    call = rules.of(step.eqn, scopes)
    path, rule = step.path, ""
    if call is not None:
        path = (*step.frame.path, call, step.eqn)
        jaxpr = call.params["call_jaxpr"]
        rule = str(opened(jaxpr).debug_info.func_name)
    return source(*path), MARK.sub("", scopes).removeprefix("/"), rule


def _scopes(path: Sequence[Any]) -> str:
    """The scopes of an equation, whose path of equations is given."""
    scopes, again = "", False
    for eqn in path:
        own = layer(eqn.source_info.name_stack)
        # In the backward pass a checkpoint has its scopes twice, and what it holds has them all.
        whole = again and own.startswith(scopes)
        again = eqn.primitive.name in REMAT
        if again and own[: len(own) // 2] == own[len(own) // 2 + 1 :]:
            own = own[: len(own) // 2]
        scopes = own if whole else "/".join(filter(None, (scopes, own)))
    return scopes


def _born(scene: Scene, trap: Trap | None, direction: str, rules: _Rules) -> NonFinite:
    step = scene.step
    line, path, rule = _where(step, rules)
    what = "a NaN" if scene.made_nan else "an infinity"
    words = [f"{scene.operation} at {line} made {what} in the {direction} pass"]
    words += [f" in layer {path}"] if path else []
    words += [f" in the rule of {rule}"] if rule else []
    sentences = ["".join(words) + f": {_shown(step)}."]
    turned = scene.origin.turned
    if turned is not None:
        sentences.append(f"It became NaN at {_where(turned, rules)[0]}: {_shown(turned)}.")
    if trap is not None and trap.name == "overflow":
        dtype = step.result.dtype
        sentences.append(f"{dtype} ends at {float(jnp.finfo(dtype).max):.3g}.")
    if trap is not None:
        sentences += [f"Known trap {trap.name}: {trap.says}", f"Usual cure: {trap.cure}"]
    name = trap.name if trap else None
    operands = tuple(map(_array, step.operands))
    return NonFinite(line, scene.operation, direction, path, operands, name, " ".join(sentences))


def _given(origin: Origin, direction: str, rules: _Rules) -> NonFinite:
    step = origin.step
    line, path, _ = _where(step, rules) if step else ("", "", "")
    operands = tuple(map(_array, step.operands)) if step else ()
    of = origin.name if origin.kind == "argument" else "a constant of fn"
    read = f"; it is first read at {line} by {_shown(step)}" if step else ""
    message = f"{of} holds a NaN or an infinity, which reaches the result{read}."
    return NonFinite(line, origin.kind, direction, path, operands, None, message)


def _of_the_whole(direction: str) -> NonFinite:
    message = (
        "The compiled program makes a NaN or an infinity that its operations, run one by one, do "
        "not make."
    )
    return NonFinite("", "jit", direction, "", (), None, message)


def _array(operand: Any) -> Array:
    return operand if isinstance(operand, jax.Array) else jnp.asarray(operand)


def _shown(step: Step) -> str:
    """`div(0.5, 0.0) = inf at [2] of float32[3]`."""
    index, values = element(step)
    operands = ", ".join([*map(_number, values[:SHOWN]), *["..."] * (len(values) > SHOWN)])
    result = np.asarray(step.result)
    place = f" at {list(index)} of {result.dtype}{list(result.shape)}" if index else ""
    return f"{step.eqn.primitive.name}({operands}) = {_number(result[index])}{place}"


def _number(value: Any) -> str:
    """A number, or an array by its type and extremes."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, np.number):
        return str(value)
    array = np.asarray(value)
    if array.ndim == 0:
        return f"{array[()]:.6g}"
    if not array.size or np.iscomplexobj(array):
        return f"{array.dtype}{list(array.shape)}"
    low, high = (float(f(array.astype(np.float64))) for f in (np.min, np.max))
    return f"{array.dtype}{list(array.shape)} from {low:.6g} to {high:.6g}"
