"""What the auditor says of one rule."""

from typing import Any, NamedTuple

__all__ = ["Finding"]


class Finding(NamedTuple):
    """What the auditor says of one rule.

    Attributes:
      rule: its name, and the file and line where it is written.
      where: the places it was called from, and inside which transformations.
      verdict: "right", "wrong", "surrogate" or "unchecked".
      cause: one word for what is wrong, or None; the words are `funcbp.check.CAUSES`.
      argument: path of the argument whose cotangent is wrong, or None.
      message: what the rule returns, what it should return, and the evidence.
      errors: for each argument the errors of the rule, of autodiff and of finite differences
        against float64, in units of the largest true element.
      input: what is particular about the input that shows it.
      args: that input.
      notes: what could not be tried, and why.
      source: the rule itself: a `jax.custom_vjp`, a `jax.custom_jvp`, an op or a function.
      static: its settings: by position for a custom rule, by name for an op.
    """

    rule: str
    where: tuple[str, ...]
    verdict: str
    cause: str | None = None
    argument: str | None = None
    message: str = ""
    errors: dict[str, dict[str, float]] = {}
    input: str = ""
    args: tuple = ()
    notes: tuple[str, ...] = ()
    source: Any = None
    static: dict[Any, Any] = {}

    def __str__(self) -> str:
        head = f"{self.verdict.upper() if self.verdict == 'wrong' else self.verdict}  {self.rule}"
        if self.cause:
            head += f"  {self.cause}" + (f" of {self.argument}" if self.argument else "")
        lines = [head]
        if self.message:
            lines.append(f"  {self.message}")
        lines += [f"  called at {w}" for w in self.where[:3]]
        return "\n".join(lines)
