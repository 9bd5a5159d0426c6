"""The rows of a pass: what was measured at both ends of each layer, put together."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funcbp.trace.marks import INPUT, OUTPUT
from funcbp.trace.probe import ACTIVATION, COTANGENT, Site

__all__ = ["Parameter", "Plan", "Row", "rows"]


class Parameter(NamedTuple):
    """An array of parameters and its gradient.

    Attributes:
      path: its keys, as `dense_0/w`.
      size: how many numbers it holds.
      rms: root of the mean square of its numbers.
      gradient: the same of its gradient; nan or inf if the gradient holds one.
    """

    path: str
    size: int
    rms: float
    gradient: float

    @property
    def ratio(self) -> float:
        """RMS of the gradient over that of the parameter; nan where both are 0."""
        if self.rms:
            return self.gradient / self.rms
        return math.inf if self.gradient else math.nan


class Row(NamedTuple):
    """One layer, with all that is inside it, or one tap; in a loop, one step of it.

    RMS is of the finite numbers. What does not exist is None: a tap has no input, an input of whole
    numbers no cotangent, a layer that is no activation has no dead or saturated units.

    Attributes:
      layer: the path, as `serial/residual_0/dense_0`.
      kind: the layer's own name, or "tap".
      step: its place in the loops around it, outermost first; () outside loops.
      size: how many numbers the output holds.
      mean, rms, low, high: of the output.
      dead: share of the units (last axis) of a relu that are 0 for every example; None if there
        is one example alone.
      saturated: share of the outputs of a sigmoid or tanh whose derivative is below 1% of its
        largest.
      saved: bytes kept for the backward pass beyond the arguments; those of a layer that runs more
        than once, in a loop or by several calls, are shared out evenly.
      flops: of the forward pass; counted on the traced program, and shared out likewise.
      arriving: RMS of the output's cotangent.
      leaving: RMS of the cotangents of the inputs, by way of this layer.
      bad: how many numbers are not finite in the inputs, the output, the arriving and the leaving
        cotangent.
      parameters: the layer's own.
    """

    layer: str
    kind: str
    step: tuple[int, ...]
    size: int
    mean: float
    rms: float
    low: float
    high: float
    dead: float | None
    saturated: float | None
    saved: int
    flops: int
    arriving: float
    leaving: float | None
    bad: tuple[int, int, int, int]
    parameters: tuple[Parameter, ...]

    @property
    def gain(self) -> float | None:
        """leaving / arriving: what the layer does to the cotangent on its way back."""
        if self.leaving is None or not self.arriving:
            return None
        return self.leaving / self.arriving

    @property
    def norm(self) -> float:
        """Of the output's cotangent: unlike its RMS, a sum or a mean over an axis keeps it."""
        return self.arriving * math.sqrt(self.size)

    @property
    def name(self) -> str:
        """The path, with the step in brackets."""
        return self.layer + "".join(f"[{k}]" for k in self.step)


@jax.tree_util.register_static
class Plan(NamedTuple):
    """What is known of a pass before it runs."""

    sites: tuple[Site, ...]
    paths: tuple[tuple[str, int], ...]  # of the parameters, with their sizes
    flops: tuple[tuple[str, int], ...]
    saved: tuple[tuple[str, int], ...]


class _Place(NamedTuple):
    """One end of a layer, or a tap: the marks of its arrays as one."""

    site: Site  # of the last
    size: int
    activation: dict[str, np.ndarray]  # [*steps] each
    cotangent: dict[str, np.ndarray]


class _Ends(NamedTuple):
    """Both ends of a layer that was applied, or a tap."""

    number: int
    input: _Place | None
    output: _Place


def _places(sites: Sequence[Site], numbers: Any) -> Iterable[_Place]:
    firsts = itertools.accumulate(site.part == 0 for site in sites)
    marks = zip(firsts, sites, *numbers, strict=True)
    for _, group in itertools.groupby(marks, lambda m: m[0]):
        _, found, activations, cotangents = zip(*group, strict=True)
        sizes = [site.size for site in found]
        activation = [
            dict(zip(ACTIVATION, np.moveaxis(a, -1, 0), strict=True)) for a in activations
        ]
        cotangent = [dict(zip(COTANGENT, np.moveaxis(c, -1, 0), strict=True)) for c in cotangents]
        yield _Place(found[-1], sum(sizes), _as_one(activation, sizes), _as_one(cotangent, sizes))


_JOINED = {"ran": np.max, "bad": np.sum, "low": np.min, "high": np.max}


def _as_one(parts: Sequence[dict[str, np.ndarray]], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """The numbers of several arrays together."""
    weights = np.asarray(sizes) / max(sum(sizes), 1)
    joined = {}
    for name in parts[0]:
        column = np.stack([p[name] for p in parts]).astype(np.float64)
        if name in _JOINED:
            joined[name] = _JOINED[name](column, axis=0)
        elif name == "rms":
            joined[name] = np.sqrt(np.tensordot(weights, np.square(column), 1))
        else:
            joined[name] = np.tensordot(weights, column, 1)
    return joined


def _applied(places: Iterable[_Place]) -> Iterable[_Ends]:
    """The layers and the taps."""
    entered: dict[str, list[_Place]] = {}
    for place in places:
        waiting = entered.setdefault(place.site.path, [])
        if place.site.side == INPUT:
            waiting.append(place)
        else:
            start = waiting.pop() if waiting and place.site.side == OUTPUT else None
            yield _Ends((start or place).site.number, start, place)


def rows(plan: Plan, numbers: Any, parameters: Sequence[Parameter]) -> Iterable[Row]:
    """One for each layer that ran and each of its steps, in the order of the forward pass.

    Args:
      plan: of the pass.
      numbers: (of the activations, of the cotangents), each an array [*steps, n] for each site.
      parameters: all of them.
    """
    applied = list(_applied(_places(plan.sites, numbers)))
    runs: Counter[str] = Counter()
    for ends in applied:
        runs[ends.output.site.path] += math.prod(ends.output.site.steps)
    own = _owned(parameters, {e.output.site.path for e in applied if e.output.site.side == OUTPUT})
    ran = [
        (ends, step)
        for ends in applied
        for step in np.ndindex(ends.output.site.steps)
        if ends.output.activation["ran"][step]
    ]
    for ends, step in sorted(ran, key=lambda pair: _when(*pair)):
        path = ends.output.site.path
        yield _row(ends, step, plan, runs[path], own.get(path, ()))


def _when(ends: _Ends, step: tuple[int, ...]) -> tuple[int, ...]:
    """Sorts as the forward pass runs: by place in the program, in a loop by step, then by place."""
    loops = zip(ends.output.site.loops, step, strict=True)
    taken = [(loop.number, -k if loop.reverse else k) for loop, k in loops]
    return (*itertools.chain.from_iterable(taken), ends.number)


def _row(
    ends: _Ends, step: tuple[int, ...], plan: Plan, runs: int, own: Sequence[Parameter]
) -> Row:
    site = ends.output.site
    seen = {n: float(v[step]) for n, v in ends.output.activation.items()}
    places = (ends.input, ends.output)
    bad_forward = [int(p.activation["bad"][step]) if p else 0 for p in places]
    bad_backward = [int(p.cotangent["bad"][step]) if p else 0 for p in places[::-1]]
    return Row(
        layer=site.path,
        kind=site.kind,
        step=tuple(map(int, step)),
        size=ends.output.size,
        mean=seen["mean"],
        rms=seen["rms"],
        low=seen["low"],
        high=seen["high"],
        dead=None if math.isnan(seen["dead"]) else seen["dead"],
        saturated=None if math.isnan(seen["saturated"]) else seen["saturated"],
        saved=_inside(plan.saved, site.path) // runs,
        flops=_inside(plan.flops, site.path) // runs,
        arriving=float(ends.output.cotangent["rms"][step]),
        leaving=None if ends.input is None else float(ends.input.cotangent["rms"][step]),
        bad=(bad_forward[0], bad_forward[1], bad_backward[0], bad_backward[1]),
        parameters=tuple(own),
    )


def _inside(totals: Iterable[tuple[str, int]], path: str) -> int:
    return sum(n for name, n in totals if name == path or name.startswith(path + "/"))


def _owned(parameters: Sequence[Parameter], paths: set[str]) -> dict[str, list[Parameter]]:
    """Each layer's own parameters, whose path is that of the layer below the model."""
    below = {path.partition("/")[2]: path for path in sorted(paths)}
    owned: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        inside = parameter.path.rpartition("/")[0]
        while inside not in below and inside:
            inside = inside.rpartition("/")[0]
        if inside in below:
            owned.setdefault(below[inside], []).append(parameter)
    return owned
