"""The residuals of a traced VJP: which equation makes each, and which keep it."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from funcbp.jaxprs import opened, variable

# These hand on their operands.
_HANDED_ON = (
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "stop_gradient",
)


class Keeper(NamedTuple):
    """One equation of the backward program that reads a residual, after those it is inside of."""

    path: tuple[Any, ...]

    @property
    def rule(self) -> str | None:
        """The hand rule's name: an op's own, `module.function` of another; None for autodiff."""
        equation = self.path[-1]
        if equation.primitive.name != "custom_lin":
            return None
        function = written(equation.params["bwd"])
        if hasattr(function, "op"):
            return function.op.name
        module = getattr(function, "__module__", None) or ""
        return f"{module.rpartition('.')[2]}.{getattr(function, '__name__', 'bwd')}".lstrip(".")


class Residual(NamedTuple):
    """One array that the pullback holds.

    Attributes:
      aval: its shape and dtype.
      maker: the equation that made it, after those it is inside of; () if none did.
      argument: its number, if it is an argument of the function.
      keepers: who reads it.
    """

    aval: Any
    maker: tuple[Any, ...]
    argument: int | None
    keepers: tuple[Keeper, ...]


def residuals(fn: Callable, leaves: Sequence[Any]) -> list[Residual]:
    """The residuals of `fn(*leaves)`: the leaves of its pullback, each array once.

    Nothing is computed: the leaves may be `jax.ShapeDtypeStruct`s.
    """
    linear: list[Any] = []

    def forward(*leaves):
        pullback: Any = jax.vjp(fn, *leaves)[1]
        kept = jax.tree.leaves(pullback)
        linear.extend((pullback.jaxpr, _places(pullback, kept)))
        return kept

    program: Any = jax.make_jaxpr(forward)(*leaves).jaxpr
    backward, places = linear
    keepers: dict[int, list[Keeper]] = {}
    inputs = (*backward.constvars, *backward.invars)
    _follow(backward, dict(zip(inputs, places, strict=False)), (), keepers)
    makers = _Makers(program)
    arrays: dict[Any, tuple[Any, list[Keeper]]] = {}
    for i, atom in enumerate(map(makers.original, program.outvars)):
        # A literal is an array of its own.
        _, kept_by = arrays.setdefault(atom if variable(atom) else i, (atom, []))
        kept_by += keepers.get(i, ())
    return [Residual(v.aval, *makers.of(v), tuple(k)) for v, k in arrays.values()]


def _places(pullback: Any, kept: list[Any]) -> list[int]:
    """For each residual that the backward program takes, its number among the leaves."""
    number = {id(leaf): i for i, leaf in enumerate(kept)}
    arguments, others = pullback.args_res, pullback.opaque_residuals
    taken = ((arguments if s.primal else others)[s.idx] for s in pullback.fun.args[0])
    return [number[id(leaf)] for leaf in taken]


def _follow(jaxpr: Any, known: dict[Any, int], path: tuple, keepers: dict) -> set[int]:
    """Notes who reads the known variables, by the number of each; returns the numbers read."""
    read = set()
    for equation in jaxpr.eqns:
        at = {i: known[v] for i, v in enumerate(equation.invars) if variable(v) and v in known}
        if not at:
            continue
        inside = set()
        for sub in _inner(equation):
            # A cond's predicate goes to no branch.
            skipped = max(len(equation.invars) - len(sub.invars), 0)
            operands = {sub.invars[i - skipped]: n for i, n in at.items() if i >= skipped}
            inside |= _follow(sub, operands, (*path, equation), keepers)
        if equation.primitive.name == "custom_lin":
            at = {i: n for i, n in at.items() if i < equation.params["num_res"]}
        for n in dict.fromkeys(at.values()):
            if n not in inside:
                keepers.setdefault(n, []).append(Keeper((*path, equation)))
        read |= set(at.values())
    return read


class _Makers:
    """Finds the equation that makes a variable, inside the equations that have programs."""

    def __init__(self, program: Any):
        self.program = program
        self.numbers = {v: i for i, v in enumerate(program.invars)}
        self.tables: dict[int, dict[Any, tuple[Any, int]]] = {}

    def of(self, atom: Any) -> tuple[tuple[Any, ...], int | None]:
        """The maker's path and the number of the argument, one of which is empty or None."""
        path, at = self._find(self.program, atom, ())
        return path, None if path else self.numbers.get(at) if variable(at) else None

    def original(self, atom: Any) -> Any:
        """The variable of which this one is another name; literals are themselves."""
        made = self._table(self.program).get(atom) if variable(atom) else None
        if made is None:
            return atom
        equation, index = made
        if equation.primitive.name == "stop_gradient":
            return self.original(equation.invars[0])
        if equation.primitive.name == "custom_jvp_call":
            sub = next(_inner(equation))
            if sub.outvars[index] in sub.invars:
                return self.original(equation.invars[sub.invars.index(sub.outvars[index])])
        return atom

    def _find(self, jaxpr: Any, atom: Any, path: tuple) -> tuple[tuple, Any]:
        """The maker's path, or () and the variable of `jaxpr` that comes from outside it."""
        made = self._table(jaxpr).get(atom) if variable(atom) else None
        if made is None:
            return (), atom
        equation, index = made
        if equation.primitive.name in _HANDED_ON:
            return self._find(jaxpr, equation.invars[index], path)[0] or (*path, equation), atom
        found = []
        for sub in _inner(equation):
            if len(sub.outvars) != len(equation.outvars):
                continue
            inner, at = self._inside(equation, sub, index, (*path, equation))
            if inner:
                found.append(inner)
            elif equation.primitive.name not in ("scan", "while", "cond") and at in sub.invars:
                return self._find(jaxpr, equation.invars[sub.invars.index(at)], path)
        # The branch of a cond that does not make a residual fills it with zeros.
        found.sort(key=lambda p: p[-1].primitive.name == "broadcast_in_dim")
        return (found[0] if found else (*path, equation)), atom

    def _inside(self, equation: Any, sub: Any, index: int, path: tuple) -> tuple[tuple, Any]:
        """The maker of an output within a program; for a carry that of the step before."""
        inner, at = self._find(sub, sub.outvars[index], path)
        if inner or equation.primitive.name != "scan":
            return inner, at
        carried = [
            i
            for i, (o, v) in enumerate(zip(equation.outvars, sub.outvars, strict=True))
            if o.aval.ndim == v.aval.ndim
        ]
        whole = [
            v
            for o, v in zip(equation.invars, sub.invars, strict=True)
            if o.aval.ndim == v.aval.ndim
        ]
        carries = whole[len(whole) - len(carried) :]
        if variable(at) and at in carries:
            return self._find(sub, sub.outvars[carries.index(at)], path)
        return (), at

    def _table(self, jaxpr: Any) -> dict[Any, tuple[Any, int]]:
        if id(jaxpr) not in self.tables:
            self.tables[id(jaxpr)] = {
                v: (e, i) for e in jaxpr.eqns for i, v in enumerate(e.outvars)
            }
        return self.tables[id(jaxpr)]


def _inner(equation: Any) -> Iterator[Any]:
    """The programs that an equation holds, less the test of a while loop, which keeps nothing."""
    for name, value in equation.params.items():
        for item in value if isinstance(value, tuple) else (value,):
            program = opened(item)
            if hasattr(program, "eqns") and name != "cond_jaxpr":
                yield program


def written(bwd: Any) -> Any:
    """The reverse rule as its author wrote it, without what `vmap` and `partial` wrap it in."""
    function = bwd.f
    while getattr(function, "__module__", None) == "jax._src.interpreters.batching":
        function = inspect.getclosurevars(function).nonlocals["bwd"].f
    return getattr(function, "func", function)
