"""The auditor: every custom gradient in a function, judged where it is called.

report = funcbp.audit(loss, params, batch)
report.ok; print(report); report.raise_if_wrong()
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from funcbp.check.compare import named, split
from funcbp.check.evaluate import Evaluator
from funcbp.check.examine import examine
from funcbp.check.finding import Finding
from funcbp.check.hijax import Primitive
from funcbp.check.report import Origin, Report
from funcbp.check.subject import renamed, subject_at, subject_of
from funcbp.check.watch import Sighting, parameters, plain_name, telling, watching
from funcbp.core import InputError

__all__ = ["audit", "audited", "check_rule", "surrogate"]

# Signatures (shapes, types, settings) of one rule that are examined; others are like them.
SIGNATURES = 3
# Random directions along which a whole function's derivative is compared.
DIRECTIONS = 4
IN_CONTEXT = "right where it is called: the gradient of the whole is that without the rule"
NOT_ASKED = "right where it is called: JAX tells the rule that {} is not differentiated"


def surrogate(f: Any) -> Any:
    """Declares that a rule's gradient is deliberately not the derivative of its function.

    Put on a `jax.custom_vjp`, a `jax.custom_jvp` or an op; the auditor then says "surrogate" where
    it would say "wrong". A wrong value, dtype or structure is still wrong.

    >>> @funcbp.surrogate
    ... @jax.custom_vjp
    ... def spike(x): ...
    """
    f.declared_surrogate = True
    return f


def audit(
    f: Callable,
    *args: Any,
    expect: Mapping[str, str] | None = None,
    thorough: bool = True,
    seed: int = 0,
    seconds: float = 45.0,
    progress: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Finds every custom rule that `f(*args)` calls and says which are wrong, where and why.

    `f` is run as it is, once, with copies of its arguments; it may be jitted, and may differentiate
    inside. Its rules are then judged one by one at the values that reached them, and at others.

    Args:
      f: any function of JAX arrays.
      *args: its arguments.
      expect: verdicts by rule name for what is deliberate: `{"spike": "surrogate"}`.
      thorough: False judges the values seen and nothing else.
      seed: of everything random.
      seconds: for the inputs that the auditor chooses, shared by the rules; the values seen are
        always judged.
      progress: a progress bar on standard error; by default where that is a terminal.
      **kwargs: its keyword arguments.

    Returns:
      A `Report`: `.ok`, `.findings`, `.raise_if_wrong()`, `.to_json()`, `.to_html(path)`,
      `.write_test(path)`; prints as text.

    Raises:
      InputError: `f` itself raises, or an expected verdict is none.
    """
    _require_verdicts(expect)
    copies = jax.tree.map(lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a, (args, kwargs))
    start = time.monotonic()
    with watching() as seen:
        try:
            jax.block_until_ready(f(*copies[0], **copies[1]))
        except Exception as error:
            raise InputError(
                f"audit needs a function that runs, and {plain_name(f)} raised "
                f"{type(error).__name__}: {str(error).strip()[:300]}; call it with the same "
                "arguments first"
            ) from error
    findings = audited(
        seen,
        context=Context(f, args, kwargs),
        expect=expect,
        thorough=thorough,
        seed=seed,
        seconds=seconds,
        progress=progress,
    )
    origin = Origin("audit", f, args, kwargs, seed=seed)
    return Report(plain_name(f), findings, time.monotonic() - start, origin)


def _require_verdicts(expect: Mapping[str, str] | None) -> None:
    for name, verdict in (expect or {}).items():
        if verdict not in ("surrogate", "right", "wrong", "unchecked"):
            raise InputError(
                f"expect[{name!r}] must be one of right, wrong, surrogate, unchecked, got "
                f"{verdict!r}; say 'surrogate' for what is not meant to be the derivative"
            )


def audited(
    seen: Sequence[Sighting],
    *,
    context: "Context | None" = None,
    expect: Mapping[str, str] | None = None,
    thorough: bool = True,
    seed: int = 0,
    seconds: float = 60.0,
    progress: bool | None = None,
) -> list[Finding]:
    """One finding for each rule among the sightings."""
    groups: dict[Any, list[Sighting]] = {}
    for s in seen:
        groups.setdefault(_identity(s.rule), []).append(s)
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    findings = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not shown,
    ) as bar:
        task = bar.add_task("audit", total=len(groups))
        end = time.monotonic() + seconds
        for left, group in zip(range(len(groups), 0, -1), groups.values(), strict=True):
            bar.update(task, description=_name(group[0].rule))
            share = max(end - time.monotonic(), 0.0) / left
            findings.append(_rule(group, expect or {}, thorough, seed, share))
            bar.advance(task)
    if context is not None:
        findings = [context.vindicated(finding) for finding in findings]
    order = {"wrong": 0, "unchecked": 1, "surrogate": 2, "right": 3}
    return sorted(findings, key=lambda f: order[f.verdict])


class Context:
    """The whole function around its rules: what is wrong for some caller may be right for this one.

    A rule that hands an argument no cotangent may be right where it is called: a solver's is none
    of its first guess, and a decomposition may come beside the matrix that it was made from. A rule
    that is told which arguments are differentiated owes the others nothing.
    """

    def __init__(self, f: Callable, args: tuple, kwargs: dict[str, Any]):
        self.layout, self.floating, self.fixed = split(args, kwargs)
        self.f = f

    def vindicated(self, finding: Finding) -> Finding:
        """The finding, or that its rule is right here."""
        if finding.verdict != "wrong" or not self.floating:
            return finding
        said = None
        with contextlib.suppress(Exception):  # a gradient that cannot be had vindicates nothing
            if finding.cause == "dropped_argument" and self.right:
                said = IN_CONTEXT
            elif _owes_nothing(finding, self.asked):
                said = NOT_ASKED.format(finding.argument)
        if said is None:
            return finding
        return finding._replace(verdict="right", cause=None, argument=None, message=said)

    def value(self, floating: dict[str, Any]) -> list[Any]:
        leaves = jax.tree.leaves(self.layout.call(self.f, floating, self.fixed))
        return [y for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact)]

    @functools.cached_property
    def right(self) -> bool:
        """Whether the gradient of the whole function is that without any rule."""
        y, pullback = jax.vjp(self.value, self.floating)
        dys = [jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape) for v in y]
        got = pullback(dys)[0]
        plain = Evaluator(jax.make_jaxpr(self.value)(self.floating))
        names = sorted(self.floating)
        # Forward mode, which a solver's loop has too, along random directions.
        along = jax.jit(
            lambda v: jax.jvp(lambda fl: plain(*[fl[n] for n in names]), (self.floating,), (v,))[1]
        )
        rng = np.random.default_rng(17)
        for _ in range(DIRECTIONS):
            v = {
                n: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
                for n, x in self.floating.items()
            }
            ours = [np.vdot(np.conj(got[n]), v[n]) for n in names]
            terms = [np.vdot(np.conj(d), t) for d, t in zip(dys, along(v), strict=True)]
            size = max(map(abs, [*ours, *terms]))
            if not abs(sum(ours) - sum(terms)) <= 1e-3 * size:
                return False
        return True

    @functools.cached_property
    def asked(self) -> dict[Any, set[str]]:
        """By rule, the arguments that it is told are differentiated; of those that are told."""
        asked: dict[Any, set[str]] = {}

        def told(rule, arguments):
            names = asked.setdefault(_identity(rule), set())
            dynamic = [a for i, a in enumerate(arguments) if i not in rule.nondiff_argnums]
            paths = jax.tree_util.tree_flatten_with_path(
                (tuple(dynamic), {}), is_leaf=lambda x: hasattr(x, "perturbed")
            )[0]
            names.update(named(p) for p, pair in paths if getattr(pair, "perturbed", True))

        with telling(told):
            jax.eval_shape(lambda floating: jax.vjp(self.value, floating)[1], self.floating)
        return asked


def _owes_nothing(finding: Finding, asked: dict[Any, set[str]]) -> bool:
    rule = finding.source
    if not getattr(rule, "symbolic_zeros", False) or _identity(rule) not in asked:
        return False
    known = [n for i, n in enumerate(parameters(rule.fun)) if i not in rule.nondiff_argnums]
    return finding.argument not in {renamed(name, known) for name in asked[_identity(rule)]}


def _identity(rule: Any) -> Any:
    """Rules made anew at each call, by a factory, are one when their code is."""
    op = getattr(getattr(rule, "bwd", None), "op", None)
    if op is not None:
        return id(op)
    if isinstance(rule, Primitive):
        return rule.kind
    codes = [
        getattr(getattr(rule, n, None), "__code__", None) or id(getattr(rule, n, None))
        for n in ("fun", "fwd", "bwd", "jvp")
    ]
    return tuple(codes)


def _closure(rule: Any) -> tuple:
    """What a factory has put into its rule: settings, as far as they can be told apart."""
    if isinstance(rule, Primitive):
        return (repr(rule.made.params),)
    cells = []
    for n in ("fun", "fwd", "bwd", "jvp"):
        for cell in getattr(getattr(rule, n, None), "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                held = cell.cell_contents
                plain = isinstance(held, bool | int | float | complex | str | bytes | tuple | None)
                code = getattr(held, "__code__", None)
                cells.append(repr(held) if plain else code or type(held))
    return tuple(cells)


def _name(rule: Any) -> str:
    op = getattr(getattr(rule, "bwd", None), "op", None)
    return op.name if op is not None else plain_name(rule)


def _rule(
    group: list[Sighting], expect: Mapping[str, str], thorough: bool, seed: int, seconds: float
) -> Finding:
    where = tuple(dict.fromkeys(f"{s.where} ({s.count} times)" for s in group))
    signatures: dict[Any, list[Sighting]] = {}
    # A place that no value reached, as in a branch that was never taken, is judged on values drawn
    # at random only if there is no other.
    for s in [s for s in group if s.count] or group:
        signatures.setdefault((s.key()[2:], _closure(s.rule)), []).append(s)
    worst: Finding | None = None
    rank = {"right": 0, "surrogate": 1, "unchecked": 2, "wrong": 3}
    for sightings in list(signatures.values())[:SIGNATURES]:
        first = sightings[0]
        calls = [c for s in sightings for c in s.arguments()][:2] or [first.drawn()]
        first_of_all = worst is None
        name = _name(first.rule)
        word = expect.get(name, expect.get(name.rpartition(".")[2]))
        finding = examine(
            subject_at(first, word),
            calls,
            where,
            seed=seed,
            thorough=thorough and first_of_all,
            seconds=seconds,
        )
        if word in ("right", "unchecked", "wrong") and finding.verdict != word:
            finding = finding._replace(
                message=f"{finding.message}; expected: {word}", verdict=finding.verdict
            )
        if worst is None or rank[finding.verdict] > rank[worst.verdict]:
            worst = finding
        if finding.verdict == "wrong":
            break
    assert worst is not None
    return worst


def check_rule(
    f: Any,
    *args: Any,
    reference: Callable | None = None,
    thorough: bool = True,
    seed: int = 0,
    seconds: float = 120.0,
) -> Report:
    """Checks one rule, or one function against a reference.

    Args:
      f: a `jax.custom_vjp`, a `jax.custom_jvp`, a primitive of hijax, an op, or any function.
      *args: its arguments, positional.
      reference: the same function without the rule. By default the function that the rule belongs
        to, or `f` itself with every custom rule inside taken out.
      thorough: False judges these arguments and nothing else.
      seed: of everything random.
      seconds: to take at most.

    Returns:
      A `Report` with one finding.

    Raises:
      InputError: no floating array among the arguments.
    """
    subject, calls = subject_of(f, [args], reference)
    floating = [
        a
        for a in jax.tree.leaves(calls[0])
        if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.inexact)
    ]
    if not floating:
        raise InputError(
            f"check_rule({subject.name}): one argument at least must be a floating point array, "
            "got none; there is no cotangent to check"
        )
    start = time.monotonic()
    finding = examine(
        subject, calls, ("check_rule",), seed=seed, thorough=thorough, seconds=seconds
    )
    origin = Origin("check_rule", f, args, reference=reference, seed=seed)
    return Report(subject.name, (finding,), time.monotonic() - start, origin)
