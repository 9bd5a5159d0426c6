"""What is wrong with a pass, in words."""

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any, NamedTuple

__all__ = ["Fault", "faults", "leaves"]

# The cotangent's norm at the first layer over that at the last is healthy between these.
VANISHING, EXPLODING = 1e-3, 1e3
# The share of dead units, or of saturated outputs, from which a layer is named.
MANY = 0.5


class Fault(NamedTuple):
    """A fault of a pass.

    Attributes:
      layer: where it is, or begins.
      kind: vanishing, exploding, dead, saturated or nonfinite.
      message: what was seen, and the usual cures.
    """

    layer: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def faults(rows: Sequence[Any]) -> tuple[Fault, ...]:
    """The faults that rows of `trace` show; where numbers are not finite, only these."""
    broken = tuple(_nonfinite(rows))
    if broken:
        return broken
    innermost = leaves(rows)
    return (*_shares(innermost), *_flow(innermost))


def leaves(rows: Sequence[Any]) -> list[Any]:
    """The taps, and the layers with no layer inside."""
    inner = {row.layer for row in rows if row.kind != "tap"}
    outer = {str(path) for layer in inner for path in PurePosixPath(layer).parents}
    return [row for row in rows if row.layer not in outer]


def _nonfinite(rows: Sequence[Any]) -> Iterable[Fault]:
    """Where numbers that are not finite come from: the first place forward, else backward."""
    seek = "; funcbp.find_nonfinite names the operation"
    if any(row.bad[0] or row.bad[1] for row in rows):
        born = _innermost([row for row in rows if row.bad[1] and not row.bad[0]])
        row = born[0] if born else next(row for row in rows if row.bad[0])
        yield Fault(row.name, "nonfinite", (_forward(row) if born else _entered(row)) + seek)
        return
    broken = [row for row in rows if row.bad[2]]
    born = [row for row in rows if not row.bad[2] and row.bad[3]]
    # The parameters of a loop's layer are those of each step: they tell no step.
    born = born or [row for row in rows if not row.bad[2] and _broken_parameters(row)]
    if born:
        row = _innermost(born)[-1]
        yield Fault(row.name, "nonfinite", _backward(row) + seek)
    elif broken:
        row = broken[-1]
        yield Fault(
            row.name,
            "nonfinite",
            f"the cotangent that arrives at {row.name} is not finite; it comes from what stands "
            f"between it and {'the loss' if row is rows[-1] else 'the next row'}{seek}",
        )


def _forward(row: Any) -> str:
    culprits = [p.path for p in row.parameters if not math.isfinite(p.rms)]
    if culprits:
        return f"the parameters {', '.join(culprits)} of {row.name} are not finite"
    where = "of the output of" if row.leaving is not None else "at"
    clean = ", and all of its input is" if row.leaving is not None else ""
    return f"{row.bad[1]:,} of {row.size:,} numbers {where} {row.name} are not finite{clean}"


def _entered(row: Any) -> str:
    return f"the input of {row.name} holds {row.bad[0]:,} numbers that are not finite"


def _backward(row: Any) -> str:
    of = (["its input"] if row.bad[3] else []) + [p.path for p in _broken_parameters(row)]
    return (
        f"the cotangent that arrives at {row.name} is finite, and the cotangent of "
        f"{', '.join(of)} is not"
    )


def _broken_parameters(row: Any) -> list[Any]:
    return [p for p in row.parameters if not math.isfinite(p.gradient)]


def _innermost(rows: Sequence[Any]) -> list[Any]:
    """Without rows that another of these lies inside of."""
    return [
        row
        for row in rows
        if not any(
            r.layer.startswith(row.layer + "/") and r.step[: len(row.step)] == row.step
            for r in rows
        )
    ]


def _shares(rows: Iterable[Any]) -> Iterable[Fault]:
    for share, cause in (
        ("dead", "of the units of {} are 0 for every example and get no gradient; lower the "
                 "learning rate, start biases at 0, or use leaky_relu or gelu"),
        ("saturated", "of the outputs of {} are where its derivative is below 1% of its largest; "
                      "scale the weights down, or normalise before it"),
    ):  # fmt: skip
        worst: dict[str, Any] = {}  # of the steps of a layer
        for row in rows:
            value = getattr(row, share)
            if value is not None and value >= MANY:
                worst[row.layer] = max(worst.get(row.layer, row), row, key=attrgetter(share))
        for row in worst.values():
            message = f"{getattr(row, share):.0%} {cause.format(row.name)}"
            yield Fault(row.name, share, message)


def _flow(rows: Sequence[Any]) -> Iterable[Fault]:
    """Whether the cotangent dies out or grows on its way back from the last layer."""
    # A cotangent of exactly 0 has been cut off, by a dead layer or on purpose: no matter of gain.
    carried = [row for row in rows if row.norm > 0]
    if len(carried) < 2:
        return
    first, last = carried[0], carried[-1]
    ratio = first.norm / last.norm
    if VANISHING <= ratio <= EXPLODING:
        return
    vanishing = ratio < VANISHING
    passed = [
        row
        for row in carried
        if (row.norm < VANISHING * last.norm if vanishing else row.norm > EXPLODING * last.norm)
    ]
    mean = ratio ** (1 / (len(carried) - 1))
    cures = (
        "start from weights scaled to their inputs (lecun_normal, he_normal), normalise between "
        "layers, add residual connections"
    )
    cures += ", or use relu or gelu for sigmoid or tanh" if vanishing else ", or clip the gradient"
    yield Fault(
        passed[-1].name,
        "vanishing" if vanishing else "exploding",
        f"the norm of the cotangent goes from {last.norm:.2g} at {last.name} to {first.norm:.2g} "
        f"at {first.name}: {ratio:.1g} times, {mean:.2g} a layer; {cures}",
    )
