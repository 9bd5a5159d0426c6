"""What is judged: a rule, its function without the rule, and what is known of both."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbp.check.evaluate import Evaluator
from funcbp.check.hijax import RULES, Adapter, as_rule
from funcbp.check.watch import Sighting, completed, location, parameters, plain_name
from funcbp.core import Op

__all__ = ["Setting", "Subject", "renamed", "subject_at", "subject_of"]

# The author's own word, in a name or docstring, that the gradient is not the derivative on purpose.
_OF = r"[\s_-]+(?:(?:of|the|its|a|your)[\s_-]+)*"
_CHANGE = r"(?:clip|scal|revers|flip|stop|block|detach|shap|guid|pseudo|approximat)\w*"
_GRADIENT = r"(?:grad|gradient|cotangent|derivative|backward)s?"
MEANT = r"straight[\s_-]*through|surrogate"
_EIGHT_BITS = "fp8"
WORDS = re.compile(
    rf"{MEANT}|(?:^|[\s_-])ste(?:$|[\s_-])|pass[\s_-]*through|phantom|jacobian[\s_-]*free|"
    rf"{_CHANGE}{_OF}{_GRADIENT}|{_GRADIENT}[\s_-]+{_CHANGE}|score[\s_-]*function|reinforce|"
    rf"(?:gets?|has|takes?)[\s_-]+no[\s_-]+{_GRADIENT}|without[\s_-]+(?:a[\s_-]+)?{_GRADIENT}|"
    rf"implicit(?:ly)?[\s_-]+(?:grad|diff)\w*|differentiat\w+[\s_-]+implicitly|{_EIGHT_BITS}|"
    r"one[\s_-]*step[\s_-]+(?:grad|diff)\w*",
    re.IGNORECASE,
)


class Setting(NamedTuple):
    """The rule and its function with a static argument set otherwise, which `what` says."""

    what: str
    call: Callable
    primal: Callable
    static: dict[Any, Any]


class Subject(NamedTuple):
    """A rule to judge: its function with the rule, the same without, and what to call it.

    `call` and `primal` take the same positional arguments: arrays, pytrees of them, static values.
    """

    name: str
    source: str
    call: Callable
    primal: Callable
    parameters: tuple[str, ...] = ()
    # (arguments, cotangent of the value) -> what bwd itself returns; None where it is not at hand.
    backward: Callable | None = None
    forward: bool = False  # whether the rule says what becomes of tangents
    settings: tuple[Setting, ...] = ()
    word: str | None = None  # the author's or the caller's, that it is a surrogate
    # The rule itself, or the op, and its settings: by position for a rule, by name for an op.
    rule: Any = None
    static: dict[Any, Any] = {}

    def argument(self, name: str) -> str:
        """`argument 0['w']` as the reader knows it: `params['w']`."""
        return renamed(name, self.parameters)


def renamed(name: str, parameters: Sequence[str]) -> str:
    """`argument 0['w']` with the parameter's own name, where it is known."""
    number, bracket, rest = name.removeprefix("argument ").partition("[")
    if name.startswith("argument ") and int(number.split(".")[0]) < len(parameters):
        head, dot, attribute = number.partition(".")
        return parameters[int(head)] + dot + attribute + bracket + rest
    return name


def subject_at(sighting: Sighting, expected: str | None = None) -> Subject:
    rule = sighting.rule
    call = sighting.bound(rule)
    op = getattr(getattr(rule, "bwd", None), "op", None)
    names = [n for i, n in enumerate(parameters(rule.fun)) if i not in sighting.static]
    primal, name, source, doc = sighting.bound(rule.fun), plain_name(rule), location(rule), rule
    if isinstance(op, Op):
        static = _settings(rule)
        names, name, source, doc = list(op.arrays), op.name, location(op.plain), op.plain

        def plain(*arrays):
            return op.apply(op.function, op._named(arrays), static)

        primal = plain
    word = None
    if expected == "surrogate":
        word = "the caller expects a surrogate"
    elif getattr(rule, "declared_surrogate", False) or getattr(op, "declared_surrogate", False):
        word = "it is marked as one"
    else:
        word = declared(doc, name)
    forward = isinstance(rule, jax.custom_jvp) or getattr(rule, "forward", False)
    # JAX's own rules take settings that their callers do not choose.
    internal = isinstance(op, Op) or getattr(rule.fun, "__module__", "").startswith("jax.")
    settings = () if internal else tuple(_other_settings(sighting))
    own = isinstance(op, Op) or sighting.whole is not None
    names = [] if sighting.whole is not None else names
    backward = _backward(sighting) if not forward and not own else None
    if isinstance(op, Op):
        rule, static = op, _settings(rule)
    else:
        static = sighting.static
    return Subject(
        name, source, call, primal, tuple(names), backward, forward, settings, word, rule, static
    )


def _backward(sighting: Sighting) -> Callable | None:
    """fwd and bwd one after the other, without what JAX does around them."""
    rule = sighting.rule
    fwd, bwd = (getattr(rule, n, None) for n in ("fwd", "bwd"))
    if fwd is None or bwd is None or getattr(rule, "symbolic_zeros", False):
        return None
    static = [sighting.static[i] for i in sorted(sighting.static)]

    def backward(args, dy):
        return bwd(*static, sighting.bound(fwd)(*args)[1], dy)

    return backward


def _other_settings(sighting: Sighting) -> Iterator[Setting]:
    """Static arguments as another caller would set them: a flag turned, a number larger."""
    names = dict(enumerate(parameters(sighting.rule.fun)))
    for i, value in sighting.static.items():
        for other in _others(value):
            static = sighting.static | {i: other}
            yield Setting(
                f"{names.get(i, f'argument {i}')}={other!r}",
                sighting.bound(sighting.rule, static),
                sighting.bound(sighting.rule.fun, static),
                static,
            )


def _others(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, value + 2, *((1,) if 2 <= value <= 4 else ()))
    if isinstance(value, float) and np.isfinite(value):
        if 0 < abs(value) < 0.01:  # a tolerance: with a larger one a solver stops short
            return ()
        return (0.3 + 0.45 * value,) if 0 <= value < 1 else (1.5 * value,)
    return ()


def _settings(rule: Any) -> dict[str, Any]:
    return rule.fwd.static


def subject_of(
    f: Any, calls: Sequence[tuple], reference: Callable | None = None
) -> tuple[Subject, list[tuple]]:
    """A rule given as it is: its subject, and the dynamic arguments of each call."""
    f = as_rule(f)
    if isinstance(f, (*RULES, Adapter)):
        calls = [completed(f, args) for args in calls]
        sightings = [Sighting(f, args, "check_rule") for args in calls]
        subject = subject_at(sightings[0])
        if reference is not None:
            subject = subject._replace(primal=sightings[0].bound(reference))
        dynamic = [
            tuple(a for i, a in enumerate(s_args) if i not in s.static)
            for s, s_args in zip(sightings, calls, strict=True)
        ]
        return subject, [_arrays(d) for d in dynamic]
    word = "it is marked as one" if getattr(f, "declared_surrogate", False) else None
    if isinstance(f, Op):
        primal = reference or f.function
        names = tuple(f.__signature__.parameters)
        subject = Subject(f.name, location(f.plain), f, primal, names, word=word, rule=f)
        return subject, [_arrays(c) for c in calls]
    primal = reference or _without_rules(f)
    name = plain_name(f)
    subject = Subject(name, location(f), f, primal, tuple(parameters(f)), word=word, rule=f)
    return subject, [_arrays(c) for c in calls]


def _arrays(args: Sequence[Any]) -> tuple:
    """Python floats and numpy arrays as JAX arrays: what a rule sees."""

    def convert(a):
        if isinstance(a, bool | int | str) or a is None or callable(a):
            return a
        return jnp.asarray(a) if isinstance(a, float | complex | np.ndarray | np.generic) else a

    return tuple(jax.tree.map(convert, a) for a in args)


def _without_rules(f: Callable) -> Callable:
    """The function with every custom rule inside replaced by the function it belongs to."""

    def plain(*args):
        closed, out = jax.make_jaxpr(f, return_shape=True)(*args)
        return jax.tree.unflatten(
            jax.tree.structure(out), Evaluator(closed)(*jax.tree.leaves(args))
        )

    return plain


def declared(f: Any, name: str) -> str | None:
    """The author's word that a rule is a surrogate: in a name or docstring, or in bwd's source."""
    parts = [
        ("its name", name.rpartition(".")[2]),
        ("its docstring", getattr(f, "__doc__", None) or ""),
    ]
    for attribute in ("fwd", "bwd", "jvp", "vjp_fwd", "vjp_bwd_retval"):
        rule = getattr(f, attribute, None)
        said = getattr(rule, "__doc__", None) or ""
        parts.append((f"the name of {attribute}", getattr(rule, "__name__", "")))
        parts.append((f"the docstring of {attribute}", said if inspect.isfunction(rule) else ""))
    for what, text in parts:
        found = WORDS.search(text)
        if found:
            return f"{what} says {found.group(0).strip()!r}"
    found = re.search(_EIGHT_BITS, location(f), re.IGNORECASE)
    if found:
        return f"its file says {found.group(0)!r}"
    with contextlib.suppress(OSError, TypeError, AttributeError):
        found = re.search(MEANT, inspect.getsource(f.bwd), re.IGNORECASE)
        if found:
            return f"the source of bwd says {found.group(0)!r}"
    return None
