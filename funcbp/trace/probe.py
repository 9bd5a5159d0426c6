"""Probes: a marked program, with each mark replaced by what measures it.

A probe is the identity with one more argument, zeros. Its rule returns the cotangent that arrives
as it is, and as the zeros' own "gradient" a few numbers about it: so the statistics of cotangents
come out of `jax.grad` itself, whatever stands around the mark. In a `scan` the zeros are scanned
over, and the numbers come out for each step.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcbp.jaxprs import CALLS, bind, opened, scanned, variable
from funcbp.trace.marks import INPUT, mark_p
from funcbp.trace.residuals import written

__all__ = ["ACTIVATION", "COTANGENT", "Site", "probed", "rms", "sites", "slots"]

# What is measured of an activation, and of a cotangent. `ran` is 0 in a branch not taken; the RMS
# is that of the finite elements, `bad` counts the others.
ACTIVATION: tuple[str, ...] = ("ran", "bad", "mean", "rms", "low", "high", "dead", "saturated")
COTANGENT: tuple[str, ...] = ("bad", "rms")

# Equations that are entered: with a rule of its own, a function stays as it is.
ENTERED = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("checkpoint", "remat", "remat2")

# The largest derivative of an activation, in terms of its value: saturated is below 1% of it.
SLOPES: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda y: 4 * y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}
NAMES = {"logistic": "sigmoid", "hard_tanh": "tanh"}
RELU = ("relu", "relu6")


class Loop(NamedTuple):
    """A `scan` around a mark: its place in the program, and its steps."""

    number: int
    length: int
    reverse: bool


class Site(NamedTuple):
    """A mark in a program.

    Attributes:
        path, kind, side, part: as it was marked.
        number: its place in the program, among those of all marks and loops.
        activation: the name of the activation whose output it is, or "".
        size: how many numbers the array holds.
        loops: those around it, outermost first.
    """

    path: str
    kind: str
    side: str
    part: int
    number: int
    activation: str
    size: int
    loops: tuple[Loop, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The lengths of the loops."""
        return tuple(loop.length for loop in self.loops)


def sites(
    jaxpr: Any, loops: tuple[Loop, ...] = (), numbers: Iterator[int] | None = None
) -> Iterator[Site]:
    """The marks of a program, in the order in which `probed` takes their slots."""
    numbers = itertools.count() if numbers is None else numbers
    makers = _makers(jaxpr)
    for eqn in jaxpr.eqns:
        number = next(numbers)
        if eqn.primitive is mark_p:
            x = eqn.invars[0]
            name, size = _activation(x, makers), x.aval.size
            yield Site(**eqn.params, number=number, activation=name, size=size, loops=loops)
        own = (Loop(number, eqn.params["length"], eqn.params["reverse"]),) if _is_loop(eqn) else ()
        for inside in _inside(eqn):
            yield from sites(inside, loops + own, numbers)


def slots(marked: Sequence[Site]) -> list[Float[Array, "*steps n"]]:
    """Zeros, whose gradients are the numbers about each site's cotangent."""
    return [jnp.zeros((*s.steps, len(COTANGENT))) for s in marked]


def probed(closed: Any, args: Sequence[Any], zeros: Sequence[Array]) -> tuple[list, list]:
    """The results of a marked program, and for each mark the numbers about its activation."""
    return _run(closed.jaxpr, closed.consts, args, list(zeros))


def _is_loop(eqn: Any) -> bool:
    return eqn.primitive.name == "scan"


def _inside(eqn: Any) -> list[Any]:
    """The programs that are entered with an equation."""
    name, params = eqn.primitive.name, eqn.params
    if name in (*ENTERED, *CHECKPOINTS):
        return [opened(params[CALLS[name]])]
    if _is_loop(eqn):
        return [opened(params["jaxpr"])]
    if name == "cond":
        return [opened(branch) for branch in params["branches"]]
    return []


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], zeros: list) -> tuple[list, list]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    makers = _makers(jaxpr)
    seen: list[Any] = []

    def read(atom):
        return values[atom] if variable(atom) else atom.val

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        counts = [len(list(sites(inside))) for inside in _inside(eqn)]
        if eqn.primitive is mark_p:
            results = [_probe(operands[0], zeros.pop(0))]
            name, whole = _activation(eqn.invars[0], makers), eqn.params["side"] != INPUT
            seen.append(_of_activation(operands[0], name, whole))
        elif any(counts):
            mine = [[zeros.pop(0) for _ in range(n)] for n in counts]
            results, new = _STRUCTURED[eqn.primitive.name](eqn, operands, mine)
            seen += new
        else:
            results = bind(eqn, operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars], seen


def _call(eqn: Any, operands: list, zeros: list) -> tuple[list, list]:
    inside = eqn.params[CALLS[eqn.primitive.name]]
    return _run(opened(inside), getattr(inside, "consts", ()), operands, zeros[0])


def _checkpoint(eqn: Any, operands: list, zeros: list) -> tuple[list, list]:
    def run(operands, zeros):
        return _run(eqn.params["jaxpr"], (), operands, list(zeros))

    settings = {n: eqn.params[n] for n in ("policy", "prevent_cse")}
    return jax.checkpoint(run, **settings)(operands, zeros[0])


def _scan(eqn: Any, operands: list, zeros: list) -> tuple[list, list]:
    params = eqn.params
    n, m = scanned(params)
    fixed, init, xs = operands[:n], operands[n : n + m], operands[n + m :]
    body = params["jaxpr"]

    def step(carry, x):
        xs, zeros = x
        results, seen = _run(body.jaxpr, body.consts, [*fixed, *carry, *xs], list(zeros))
        return results[:m], (results[m:], seen)

    settings = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, (ys, seen) = jax.lax.scan(step, init, (xs, zeros[0]), **settings)
    return [*carry, *ys], seen


def _cond(eqn: Any, operands: list, zeros: list) -> tuple[list, list]:
    index, *operands = operands
    branches = eqn.params["branches"]

    def unseen(group):
        return [jnp.zeros((*z.shape[:-1], len(ACTIVATION))) for z in group]

    def taken(k):
        def run(operands, zeros):
            seen = [unseen(group) for group in zeros]
            results, seen[k] = _run(branches[k].jaxpr, branches[k].consts, operands, list(zeros[k]))
            return results, [s for group in seen for s in group]

        return run

    return jax.lax.switch(index, [taken(k) for k in range(len(branches))], operands, zeros)


_STRUCTURED = {**dict.fromkeys(ENTERED, _call), **dict.fromkeys(CHECKPOINTS, _checkpoint)}
_STRUCTURED |= {"scan": _scan, "cond": _cond}


@jax.custom_vjp
def _probe(x, zeros):
    return x


def _probe_fwd(x, zeros):
    return x, None


def _probe_bwd(_, dy):
    return dy, _of_cotangent(dy)


_probe.defvjp(_probe_fwd, _probe_bwd)
setattr(_probe, "unaudited", True)  # noqa: B010 (its second cotangent is no derivative)


def _bad(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)


def rms(x: Array) -> Array:
    """Of the finite elements; scaled, so that squares of small numbers do not vanish."""
    x = x.astype(jnp.float32)
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    largest = jnp.max(size, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(size / scale)) / max(x.size, 1))


# Jitted, so that arrays of the same shape are traced once.
@jax.jit
def _of_cotangent(dy: Array) -> Array:
    return jnp.stack([_bad(dy), rms(dy)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _of_activation(y: Array, activation: str, whole: bool) -> Array:
    """The numbers about an activation; unless `whole`, only how many are not finite."""
    x = jax.lax.stop_gradient(y).astype(jnp.float32)
    finite = jnp.isfinite(x)
    numbers = dict.fromkeys(ACTIVATION, jnp.nan) | {"ran": 1.0, "bad": _bad(x)}
    if not whole:
        return jnp.stack([jnp.asarray(numbers[n], jnp.float32) for n in ACTIVATION])
    numbers |= {
        "mean": jnp.sum(jnp.where(finite, x, 0)) / max(x.size, 1),
        "rms": rms(x),
        "low": jnp.min(x, initial=jnp.inf, where=finite),
        "high": jnp.max(x, initial=-jnp.inf, where=finite),
    }
    if activation in RELU and x.size > x.shape[-1]:
        # A unit is dead that no example of the batch wakes; one example cannot tell.
        units = jnp.all(x <= 0, axis=tuple(range(x.ndim - 1)))
        numbers["dead"] = jnp.mean(units, dtype=jnp.float32)
    if activation in SLOPES:
        numbers["saturated"] = jnp.mean(SLOPES[activation](x) < 0.01, dtype=jnp.float32)
    return jnp.stack([jnp.asarray(numbers[n], jnp.float32) for n in ACTIVATION])


def _makers(jaxpr: Any) -> dict[Any, tuple[Any, int]]:
    return {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}


def _activation(atom: Any, makers: dict[Any, tuple[Any, int]]) -> str:
    """The name of the activation that makes a variable; "" if none does."""
    if not variable(atom) or atom not in makers:
        return ""
    eqn, index = makers[atom]
    name = _called(eqn)
    if name in SLOPES or name in RELU:
        return name
    inside = eqn.params.get(CALLS.get(eqn.primitive.name, "call_jaxpr"))
    if inside is None:
        return ""
    return _activation(opened(inside).outvars[index], _makers(opened(inside)))


def _called(eqn: Any) -> str:
    """What an equation does, by the name of the op or of the function that it calls."""
    name = eqn.primitive.name
    if name == "custom_vjp_call":
        rule = written(eqn.params["bwd"])
        if hasattr(rule, "op"):
            name = rule.static.get("activation") or rule.op.name
    elif name in ENTERED:
        name = eqn.params.get("name", "")
    elif name == "max" and any(not variable(v) and v.val == 0 for v in eqn.invars):
        name = "relu"
    return NAMES.get(name, name)
