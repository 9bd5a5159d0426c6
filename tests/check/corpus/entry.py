"""What an entry of the corpus is: a rule, calls of it, and what the auditor must say."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Wrong(NamedTuple):
    """A rule with one fault.

    `calls` are argument tuples on which the fault shows; `innocent`, where there is one, is a call
    on which it does not. `causes` are the names that describe the fault, the best first;
    `arguments` the parameters (`w`, or `params['w']`) of which one must be named, empty where the
    fault is in no argument.
    """

    name: str
    f: Callable
    calls: tuple[tuple[Any, ...], ...]
    causes: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    innocent: tuple[Any, ...] | None = None


class Fine(NamedTuple):
    """A rule that is right though it looks suspicious, or that is a surrogate; and why."""

    name: str
    f: Callable
    calls: tuple[tuple[Any, ...], ...]
    why: str
    verdict: str = "right"
