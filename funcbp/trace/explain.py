"""All that can be seen of one function: its ledger, its pass, and the chain rule between them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from funcbp import page
from funcbp.core import InputError
from funcbp.layers.layer import Layer
from funcbp.trace.ledger import Ledger, saved
from funcbp.trace.passes import Pass, of_model, trace
from funcbp.trace.steps import ChainRule

__all__ = ["Explanation", "explain"]


class Explanation(NamedTuple):
    """What `explain` found; prints as tables.

    Attributes:
      ledger: what the forward pass keeps.
      seen: the pass, or None.
      unseen: why there is no pass; "" if there is one.
      chain: the chain rule, if it was asked for.
    """

    ledger: Ledger
    seen: Pass | None
    unseen: str
    chain: ChainRule | None = None

    def __rich__(self) -> RenderableType:
        return Group(*(Group(part, Text()) for part in self._parts()))

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def _parts(self) -> list[Any]:
        parts = (self.ledger, self.seen or Text(self.unseen), self.chain)
        return [part for part in parts if part is not None]

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """All parts as plain values: ledger, pass, chain_rule, of which the last two may be None.

        Args:
          path: a file to write them to as well.
        """
        whole = {
            "ledger": self.ledger.to_json(),
            "pass": self.seen and self.seen.to_json(),
            "chain_rule": self.chain and self.chain.to_json(),
        }
        if path is not None:
            Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return whole

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page; also written to `path`."""
        found = (self.ledger, self.seen, self.chain)
        parts = [part._repr_html_() + "<hr>" for part in found if part is not None]
        whole = page.page(f"Backpropagation in {self.ledger.name}", *parts, page.text(self.unseen))
        if path is not None:
            Path(path).write_text(whole, encoding="utf-8")
        return whole


def explain(
    function: Layer | Callable,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss: Callable | None = None,
) -> Explanation:
    """The ledger of a function, and its pass where it has layers or taps.

    Args:
      function: any function of arrays, or a model of `funcbp.layers`, at inference.
      args: its arguments; `(params, state, *inputs)` of a model.
      kwargs: arguments by name, instead.
      loss: of the output, to a floating scalar; not needed if the output is one.

    Raises:
      InputError: the function raises, or has nothing to be differentiated by.
    """
    kwargs = kwargs or {}
    if isinstance(function, Layer):
        if kwargs or len(args) < 3:
            raise InputError(
                "the arguments of a model must be a tuple (params, state, *inputs), got "
                f"{f'a dict of {sorted(kwargs)}' if kwargs else f'a tuple of {len(args)}'}"
            )
        whole, args = of_model(function, loss), (*args, None)
    else:
        whole = function if loss is None else _followed(function, loss)
    ledger = _ledger(whole, args, kwargs)
    try:
        seen = trace(_by_name(whole), kwargs) if kwargs else trace(whole, *args)
    except InputError as error:
        return Explanation(ledger, None, f"no pass to show: {error}")
    return Explanation(ledger, seen, "")


def _ledger(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Ledger:
    try:
        return saved(function, *args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"explain needs a function that runs, and {getattr(function, '__name__', 'it')} raised "
            f"{type(error).__name__}: {error}; call it by hand first"
        ) from error


def _followed(function: Callable, loss: Callable) -> Callable:
    @functools.wraps(function)
    def whole(*args, **kwargs):
        return loss(function(*args, **kwargs))

    return whole


def _by_name(function: Callable) -> Callable:
    def called(named):
        return function(**named)

    return called
