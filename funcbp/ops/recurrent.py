"""Layers of a recurrent cell, one on top of the other, each in one direction or in both.

    y^0 = x        y^l = cell_l(y^(l-1))        or, in both directions,
    y^l = [forward_l(y^(l-1)), backward_l(y^(l-1))]        side by side

Composed of the ops `rnn`, `gru` and `lstm`, whose rules make the gradients; no rule of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from funcbp.core import InputError


def recurrent(
    cell: Callable,
    x: Float[Array, "batch time n"],
    params: Sequence[Any],
    states: Sequence[Any] | None = None,
    lengths: Int[Array, " batch"] | None = None,
    *,
    bidirectional: bool = False,
    **settings: Any,
) -> tuple[Float[Array, "batch time m"], list[Any]]:
    """y, states = the outputs of the last layer and the last state of every layer.

    >>> y, states = recurrent(lstm, x, [(w, u, b), (w2, u2, b2)], lengths=lengths)
    >>> y, states = recurrent(gru, x, [(forward, backward)], bidirectional=True)

    Args:
      cell: `rnn`, `gru` or `lstm`.
      x: the sequences, [batch, time, n]; [time, batch, n] with `time_major=True`.
      params: for each layer the cell's weights (w, u, ...), as it takes them after x; with
        `bidirectional` a pair of these, for the forward and for the backward direction. From the
        second layer on w has m rows, with `bidirectional` 2 m.
      states: for each layer the initial state as the cell takes it, with `bidirectional` a pair;
        None for 0.
      lengths: how many steps of each row count, from the first; the backward direction starts at
        the last that counts. None for all.
      bidirectional: each layer runs in both directions, and gives [batch, time, 2 m].
      **settings: of the cell, such as `time_major`, `remat_every`, `activation`.

    Returns:
      y [batch, time, m], with `bidirectional` 2 m, forward first; and a list with each layer's last
      state, with `bidirectional` a pair.

    Raises:
      InputError: there are not as many states as layers, or a layer's shapes do not fit.
    """
    starts = [None] * len(params) if states is None else states
    if len(starts) != len(params):
        raise InputError(
            f"states must have one entry for each of the {len(params)} layers, got {len(starts)}"
        )
    last = []
    for number, (weights, start) in enumerate(zip(params, starts, strict=True)):
        run = both_ways if bidirectional else one_way
        try:
            x, state = run(cell, x, weights, start, lengths, **settings)
        except InputError as error:
            raise error.within(f"layer {number}") from None
        last.append(state)
    return x, last


def one_way(cell, x, weights, start, lengths, **settings):
    """One layer in one direction."""
    return cell(x, *weights, state=start, lengths=lengths, **settings)


def both_ways(cell, x, weights, start, lengths, **settings):
    """One layer in both directions, their outputs side by side."""
    if len(weights) != 2:
        raise InputError(
            f"weights must be a pair (forward, backward), got {len(weights)} entries; "
            "leave out bidirectional=True for one direction"
        )
    forward, backward = (None, None) if start is None else start
    there, last = one_way(cell, x, weights[0], forward, lengths, **settings)
    back, first = one_way(cell, x, weights[1], backward, lengths, reverse=True, **settings)
    return jnp.concatenate([there, back], axis=-1), (last, first)
