"""The smallest set of values from which others can be computed again."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["smallest"]

INFINITE = float("inf")


def smallest(
    costs: Mapping[Any, float], parents: Mapping[Any, Iterable[Any]], wanted: Iterable[Any]
) -> list[Any]:
    """The cheapest set of values that gives all that are wanted: a minimum cut.

    Args:
      costs: of keeping each value.
      parents: for a value that may be computed again, what it is computed from; a parent without
        a cost is at hand. A value that is not among them has to be kept, or one made of it.
      wanted: the values that must be kept or computed again.

    Returns:
      The values to keep, in the order of `costs`; of two sets that cost the same, the one nearer
      to what is wanted.
    """
    # A value is two nodes with an edge of its cost between them; of "in" and "out", by their order.
    room: dict[Any, dict[Any, float]] = {"source": {}, "sink": {}}

    def edge(a, b, capacity):
        room.setdefault(a, {})[b] = capacity
        room.setdefault(b, {}).setdefault(a, 0.0)

    seen, todo = set(), [v for v in wanted if v in costs]
    for v in todo:
        edge((v, 1), "sink", INFINITE)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        edge((v, 0), (v, 1), costs[v])
        if v not in parents:
            edge("source", (v, 0), INFINITE)
        for p in parents.get(v, ()):
            if p in costs:
                edge((p, 1), (v, 0), INFINITE)
                todo.append(p)
    while path := _path(room, "source", "sink"):
        most = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= most
            room[b][a] += most
    late = _reaching(room, "sink")
    return [v for v in costs if v in seen and (v, 0) not in late and (v, 1) in late]


def _path(room, start, end):
    """The edges of a shortest way with room, or none."""
    came, todo = {start: None}, deque([start])
    while todo and end not in came:
        a = todo.popleft()
        for b, left in room[a].items():
            if left > 0 and b not in came:
                came[b] = a
                todo.append(b)
    path, b = [], end
    while came.get(b) is not None:
        path.append((came[b], b))
        b = came[b]
    return path


def _reaching(room, end):
    """The nodes from which there is a way with room to this one."""
    found, todo = {end}, [end]
    while todo:
        b = todo.pop()
        for a in room[b]:
            if a not in found and room[a].get(b, 0) > 0:
                found.add(a)
                todo.append(a)
    return found
