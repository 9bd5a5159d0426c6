"""The findings of all workers as one result, and as a section of pytest's summary."""

import itertools
from typing import Any

__all__ = ["merged", "write"]

# From the best verdict to the worst.
RANK = ("right", "surrogate", "unchecked", "wrong")
COLOURS = {"wrong": "red", "unchecked": "yellow", "surrogate": "cyan", "right": "green"}


def merged(results: list[dict]) -> dict:
    """One result of those of several workers: for each rule the worst finding."""
    findings: dict[tuple, dict] = {}
    for found in itertools.chain.from_iterable(r["findings"] for r in results):
        key = found["rule"], found["written_at"]
        other = findings.setdefault(key, found)
        if other is found:
            continue
        worse = max(other, found, key=lambda f: RANK.index(f["verdict"]))
        where = list(dict.fromkeys(other["where"] + found["where"]))
        sums = {k: other[k] + found[k] for k in ("tests", "calls")}
        findings[key] = worse | {"where": where} | sums
    ordered = sorted(findings.values(), key=lambda f: -RANK.index(f["verdict"]))
    lists = {k: [t for r in results for t in r[k]] for k in ("again", "unwatched", "leak_checked")}
    return {
        "ok": all(f["verdict"] != "wrong" for f in ordered),
        "seconds": round(max((r["seconds"] for r in results), default=0.0), 1),
        "findings": ordered,
        **lists,
    }


def write(out: Any, result: dict, verbosity: int) -> None:
    """The section in pytest's summary."""
    findings = result["findings"]
    out.write_sep("=", "custom gradients")
    if not findings and not result["problems"]:
        out.write_line("these tests called no custom_vjp or custom_jvp rule that was asked for")
    for f in findings:
        verdict = f["verdict"]
        if verdict == "right" and verbosity < 1:
            continue
        if verdict == "wrong":
            head, *lines = f["shown"].split("\n")
        else:
            head = f"{verdict}  {f['rule']}  {f['written_at']}"
            lines = [f"  {text}" for text in (f["message"], *f["notes"])]
        out.write_line(head, **{COLOURS[verdict]: True})
        for line in lines:
            out.write_line(line)
        if verdict in ("wrong", "unchecked"):
            first = f["first"] or "the import of a module"
            out.write_line(f"  first called by {first}; {_times(f)}")
    if result["again"]:
        number = len(result["again"])
        tests = "1 test was" if number == 1 else f"{number} tests were"
        out.write_line(f"{tests} run again after the others, for the values inside jit")
    for test in result["unwatched"]:
        out.write_line(f"  not watched: {test} passed, and failed when run again with callbacks")
    for test in result["leak_checked"]:
        out.write_line(f"  not noted: calls on traced values in {test}, which checks for leaks")
    cut = sum(f["cut"] for f in findings)
    if cut:
        out.write_line(f"the time ended for {cut} before all was tried: see --audit-seconds")
    for problem in result["problems"]:
        out.write_line(problem, yellow=True)
    counts = [
        f"{sum(f['verdict'] == v for f in findings)} {v}"
        for v in ("wrong", "unchecked", "surrogate", "right")
    ]
    rules = "1 rule" if len(findings) == 1 else f"{len(findings)} rules"
    colour = "green" if result["ok"] else "red"
    out.write_line(f"{rules}: {', '.join(counts)} ({result['seconds']} s)", **{colour: True})


def _times(f: dict) -> str:
    tests, calls = f["tests"], f["calls"]
    return f"{tests} test{'s' * (tests != 1)}, {calls} call{'s' * (calls != 1)}"
