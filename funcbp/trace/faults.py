"""What is wrong with a pass, in words."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["Fault", "faults", "leaves"]

# The cotangent's RMS at the first layer over that at the last is healthy between these.
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
    """The rows with no row inside."""
    outer = {row.layer.rpartition("/")[0] for row in rows}
    outer |= {
        "/".join(path.split("/")[:k]) for path in outer for k in range(1, path.count("/") + 1)
    }
    return [row for row in rows if row.layer not in outer]


def _nonfinite(rows: Sequence[Any]) -> Iterable[Fault]:
    """Where numbers that are not finite come from: the first place forward, else backward."""
    born = [row for row in rows if row.bad[1] and not row.bad[0]]
    if born:
        row = _innermost(born)[0]
        yield Fault(
            row.name,
            "nonfinite",
            f"{row.bad[1]:,} numbers of the output of {row.name} are not finite, and all of its "
            "input is; funcbp.find_nonfinite names the operation",
        )
        return
    if any(row.bad[0] for row in rows):
        row = next(row for row in rows if row.bad[0])
        yield Fault(
            row.name,
            "nonfinite",
            f"the input of {row.name} holds {row.bad[0]:,} that are not finite",
        )
        return
    born = [row for row in rows if not row.bad[2] and (row.bad[3] or _broken_parameters(row))]
    if born:
        row = _innermost(born)[-1]
        of = ["its input"] if row.bad[3] else []
        of += [p.path for p in _broken_parameters(row)]
        yield Fault(
            row.name,
            "nonfinite",
            f"the cotangent that arrives at {row.name} is finite, and the cotangent of "
            f"{', '.join(of)} is not; funcbp.find_nonfinite names the operation",
        )
    elif any(row.bad[2] for row in rows):
        row = [row for row in rows if row.bad[2]][-1]
        yield Fault(
            row.name,
            "nonfinite",
            f"the cotangent that arrives at {row.name}, from the loss, is not finite",
        )


def _broken_parameters(row: Any) -> list[Any]:
    return [p for p in row.parameters if not math.isfinite(p.gradient)]


def _innermost(rows: Sequence[Any]) -> list[Any]:
    """Without rows that another of these lies inside of."""
    return [
        row
        for row in rows
        if not any(r.layer.startswith(row.layer + "/") and r.step == row.step for r in rows)
    ]


def _shares(rows: Iterable[Any]) -> Iterable[Fault]:
    for row in rows:
        if row.dead is not None and row.dead >= MANY:
            yield Fault(
                row.name,
                "dead",
                f"{row.dead:.0%} of the units of {row.name} are 0 for every example and get no "
                "gradient; lower the learning rate, start biases at 0, or use leaky_relu or gelu",
            )
        if row.saturated is not None and row.saturated >= MANY:
            yield Fault(
                row.name,
                "saturated",
                f"{row.saturated:.0%} of the outputs of {row.name} are where its derivative is "
                "below 1% of its largest; scale the weights down, or normalise before it",
            )


def _flow(rows: Sequence[Any]) -> Iterable[Fault]:
    """Whether the cotangent dies out or grows on its way back from the last layer."""
    # A cotangent of exactly 0 has been cut off, by a dead layer or on purpose: no matter of gain.
    carried = [row for row in rows if row.arriving > 0]
    if len(carried) < 2:
        return
    first, last = carried[0], carried[-1]
    ratio = first.arriving / last.arriving
    if VANISHING <= ratio <= EXPLODING:
        return
    vanishing = ratio < VANISHING
    passed = [
        row
        for row in carried
        if (row.arriving < VANISHING * last.arriving) == vanishing
        and (row.arriving > EXPLODING * last.arriving) != vanishing
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
        f"the RMS of the cotangent goes from {last.arriving:.2g} at {last.name} to "
        f"{first.arriving:.2g} at {first.name}: {ratio:.1g} times, {mean:.2g} a layer; {cures}",
    )
