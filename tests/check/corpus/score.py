"""What the auditor says of the corpus: `python -m check.corpus.score MODULE [NAME...]`."""

import argparse
import importlib
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from funcbp.check.audit import check_rule
from funcbp.check.finding import Finding

from .entry import Wrong


class Score(NamedTuple):
    """One call of one entry: what the auditor said, and whether it should have."""

    name: str
    call: str
    finding: Finding
    seconds: float
    verdict: bool
    cause: bool
    argument: bool


def judged(entry: Any, call: tuple, kind: str) -> Score:
    """The auditor's word on one call."""
    start = time.perf_counter()
    f = check_rule(entry.f, *call).findings[0]
    seconds = time.perf_counter() - start
    if not isinstance(entry, Wrong):
        return Score(entry.name, kind, f, seconds, f.verdict == entry.verdict, True, True)
    wrong = f.verdict == "wrong"
    argument = not entry.arguments or f.argument in entry.arguments
    return Score(
        entry.name, kind, f, seconds, wrong, wrong and f.cause in entry.causes, wrong and argument
    )


def shown(entries: Iterable[Any]) -> Iterator[Score]:
    """The calls on which a fault shows, or none does."""
    for entry in entries:
        for call in entry.calls:
            yield judged(entry, call, "shown")


def innocent(entries: Iterable[Any]) -> Iterator[Score]:
    """The calls of wrong rules on which the fault does not show."""
    for entry in entries:
        if getattr(entry, "innocent", None) is not None:
            yield judged(entry, entry.innocent, "innocent")


def main() -> None:
    """Prints what is not as it should be, and the shares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--part", default="0/1", help="k/n: only every n-th entry, from the k-th")
    options = parser.parse_args()
    corpus = importlib.import_module(f".{options.module}", __package__)
    k, n = map(int, options.part.split("/"))
    entries = [e for e in corpus.ENTRIES if not options.names or e.name in options.names][k::n]
    causes = {e.name: "|".join(getattr(e, "causes", ())) for e in entries}
    arguments = {e.name: "|".join(getattr(e, "arguments", ())) for e in entries}
    done: list[Score] = []
    for s in itertools.chain(shown(entries), innocent(entries)):
        done.append(s)
        if options.names or not (s.verdict and s.cause and s.argument):
            f = s.finding
            print(
                f"{s.name} [{s.call}] {s.seconds:.1f}s: {f.verdict} {f.cause} of {f.argument}; "
                f"meant {causes[s.name]} of {arguments[s.name]}\n    {f.message}",
                flush=True,
            )
    for kind in ("shown", "innocent"):
        part = [s for s in done if s.call == kind]
        if part:
            said = [s for s in part if s.verdict]
            share = [
                f"{what} {sum(getattr(s, what) for s in of)}/{len(of)}"
                for what, of in (("verdict", part), ("cause", said), ("argument", said))
            ]
            mean = sum(s.seconds for s in part) / len(part)
            print(kind, *share, f"{mean:.1f} s each, {max(s.seconds for s in part):.1f} at most")


if __name__ == "__main__":
    main()
