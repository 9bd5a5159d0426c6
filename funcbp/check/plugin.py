"""Judges what the pytest plugin has noted.

The plugin itself is `_funcbp_pytest`, a package beside this one, because pytest loads it in every
run and importing this one imports JAX. It takes notes while the tests run; here, at the end, each
rule is judged at the arguments that the tests gave it.
"""

import collections
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcbp.check.audit import audited
from funcbp.check.finding import Finding
from funcbp.check.report import Report
from funcbp.check.watch import TRANSFORMATIONS, Sighting, _short, location, plain_name

__all__ = ["judged"]

# Settings of one rule that are explored; further ones are judged at the values seen.
EXPLORED = 3
RANK = ("right", "surrogate", "unchecked", "wrong")


def judged(rules: Sequence[Any], seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """One finding for each rule, as plain values.

    Args:
      rules: the plugin's notes, one a rule.
      seconds: for one rule at most.
      say: is told the rule at hand.

    Returns:
      `seconds` that it took, and `findings`: those of `Report.to_json()`, each with `first` (the
      test that called the rule first), `tests` (how many did), `calls`, `cut` (whether the time
      ended before all was tried) and `shown` (as text).
    """
    start = time.monotonic()
    findings: list[dict[str, Any]] = []
    for number, rule in enumerate(rules, 1):
        first = next(iter(rule.signatures.values()))
        name = plain_name(first.rule)
        say(f"{number}/{len(rules)} {name}")
        begun = time.monotonic()
        try:
            finding = _worst(rule, seconds)
        except Exception as error:
            finding = Finding(
                f"{name} ({location(first.rule)})",
                (),
                "unchecked",
                message=f"the auditor raised {type(error).__name__}: {str(error).strip()[:300]}",
            )
        places: collections.Counter[str] = collections.Counter()
        for signature in rule.signatures.values():
            for place, count in signature.places.items():
                places[_where(*place)] += count
        finding = finding._replace(where=tuple(places))
        report = Report(name, (finding,), 0.0)
        told = {"first": rule.test, "tests": rule.tests, "calls": rule.calls}
        told["cut"] = finding.verdict != "wrong" and time.monotonic() - begun > seconds
        # Under the line that sums up.
        shown = str(report).partition("\n")[2].strip()
        findings.append(report.to_json()["findings"][0] | told | {"shown": shown})
    return {"seconds": round(time.monotonic() - start, 1), "findings": findings}


def _worst(rule: Any, seconds: float) -> Finding:
    """The worst finding over the signatures, those with values first."""
    known = list(rule.signatures.values())
    chosen = [s for s in known if s.values] or known[:EXPLORED]
    notes = [] if chosen[0].values else [_unseen(rule)]
    skipped = len(rule.others)
    end = time.monotonic() + seconds
    explored: set[str] = set()
    worst: Finding | None = None
    for number, signature in enumerate(chosen):
        left = end - time.monotonic()
        if left <= 0:
            skipped += len(chosen) - number
            break
        settings = repr(signature.static)
        thorough = settings not in explored and len(explored) < EXPLORED
        explored.add(settings)
        with _calm(signature.x64):
            found = audited(_sightings(signature), thorough=thorough, seconds=left, progress=False)
        if worst is None or RANK.index(found[0].verdict) > RANK.index(worst.verdict):
            worst = found[0]
        if worst.verdict == "wrong":
            break
    assert worst is not None
    if skipped:
        notes.append(f"{skipped} further signatures were not examined")
    return worst._replace(notes=(*worst.notes, *notes))


def _unseen(rule: Any) -> str:
    if any(s.too_large for s in rule.signatures.values()):
        return "at random values: those of the tests are too large to be kept"
    return "at random values: those of the tests could not be seen"


@contextlib.contextmanager
def _calm(x64: bool) -> Iterator[None]:
    """JAX's defaults, whatever the suite has set, in the precision of its call."""
    with (
        warnings.catch_warnings(),
        jax.enable_x64(x64),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.check_tracer_leaks(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        warnings.simplefilter("ignore")
        yield


def _sightings(signature: Any) -> list[Sighting]:
    """A note in the auditor's terms, one for each set of values."""
    kinds = list(zip(signature.leaves, signature.avals, strict=True))
    unseen = [_zeros(a) for _, a in kinds if a is not None]
    sightings = []
    for values in signature.values or [unseen]:
        rest = iter(values)
        each = [x if a is None else next(rest) for x, a in kinds]
        dynamic = jax.tree.unflatten(signature.tree, [each[i] for i in signature.same])
        count, free = len(dynamic) + len(signature.static), iter(dynamic)
        args = [signature.static[i] if i in signature.static else next(free) for i in range(count)]
        sighting = Sighting(signature.rule, tuple(args), "")
        if signature.values:
            pairs = zip(sighting.leaves, sighting.avals, strict=True)
            sighting.see(*[x for x, a in pairs if a is not None])
        sightings.append(sighting)
    return sightings


def _zeros(aval: Any) -> Any:
    """An array of a type that was seen without a value."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), aval.shape)
    return jnp.zeros(aval.shape, aval.dtype)


def _where(own: tuple[str, int, str] | None, inside: Sequence[str]) -> str:
    """`model.py:31 in loss, inside jit, scan`."""
    place = f"{_short(own[0])}:{own[1]} in {own[2]}" if own else "unknown"
    kinds = list(dict.fromkeys(TRANSFORMATIONS[k] for k in inside if k in TRANSFORMATIONS))
    return place + (f", inside {', '.join(kinds)}" if kinds else "")
