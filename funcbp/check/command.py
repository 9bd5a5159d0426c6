"""What the command `funcbp audit` does: loads a function and its arguments, and audits it."""

from collections.abc import Callable, Sequence
from typing import Any

from funcbp.check.audit import audit
from funcbp.check.named import named
from funcbp.check.report import Report
from funcbp.core import InputError

__all__ = ["call_of", "run"]


def call_of(function: str, arguments: str) -> tuple[Callable, tuple, dict[str, Any], Any]:
    """The function and its arguments, named `MODULE:FUNCTION` and `MODULE:NAME`.

    Args:
      function: what to call.
      arguments: a tuple of arguments, a dict of arguments by name, or a function without arguments
        that returns one of these.

    Returns:
      (function, positional arguments, keyword arguments, what `arguments` names).

    Raises:
      InputError: no such name, the first is not callable, or the second gives no arguments.
    """
    f, made = named(function), named(arguments)
    if not callable(f):
        raise InputError(f"{function} must be a function, got {type(f).__name__}; name a function")
    given = made
    if callable(made):
        try:
            given = made()
        except Exception as error:
            raise InputError(
                f"{arguments} must return the arguments when it is called without any, and raised "
                f"{type(error).__name__}: {error}; call it by hand first"
            ) from error
    if isinstance(given, dict):
        return f, (), given, made
    if type(given) is tuple:
        return f, given, {}, made
    raise InputError(
        f"{arguments} must give a tuple of arguments, or a dict of them by name, got "
        f"{type(given).__name__}; for one argument return (argument,)"
    )


def verdicts(expected: Sequence[str]) -> dict[str, str]:
    """`["spike=surrogate"]` as a dict."""
    for pair in expected:
        if "=" not in pair:
            raise InputError(f"--expect takes RULE=VERDICT, as in spike=surrogate, got {pair!r}")
    return dict(pair.split("=", 1) for pair in expected)


def run(
    function: str, arguments: str, *, expect: Sequence[str], thorough: bool, seed: int
) -> Report:
    """Audits a function named on a command line."""
    expected = verdicts(expect)
    f, args, kwargs, made = call_of(function, arguments)
    options = {"expect": expected, "thorough": thorough, "seed": seed}
    report = audit(f, *args, **options, **kwargs)
    if report.origin is not None:
        report.origin = report.origin._replace(arguments=made)
    return report
