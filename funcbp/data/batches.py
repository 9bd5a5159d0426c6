"""Shuffled batches that are a pure function of the seed and the step number."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from funcbp.core import InputError


def batches(
    arrays: Any,
    size: int,
    *,
    seed: int = 0,
    step: int = 0,
    epochs: int | None = None,
    drop_remainder: bool = True,
) -> Iterator[Any]:
    """Batches of a pytree of arrays, shuffled anew in each epoch.

    Batch number i depends on (seed, i) alone: start at `step` to go on where a run stopped.

    Args:
      arrays: a pytree of arrays [n, ...] with one n.
      size: examples in a batch, from 1 to n.
      seed: of the shuffling.
      step: the number of the first batch.
      epochs: the number of passes in all, counted from step 0; None goes on for ever.
      drop_remainder: leave out what an epoch has over; otherwise its last batch is smaller.

    Yields:
      Pytrees like `arrays`, of NumPy arrays [size, ...].

    Raises:
      InputError: no arrays, unequal lengths, or a size, step or number of epochs out of range.
    """
    arrays = jax.tree.map(np.asarray, arrays)
    count = _length(arrays)
    if not 1 <= size <= count:
        raise InputError(f"size must be from 1 to the number of examples {count}, got {size}")
    if step < 0 or (epochs is not None and epochs < 0):
        raise InputError(f"step and epochs must not be negative, got {step} and {epochs}")
    per_epoch = count // size if drop_remainder else -(-count // size)
    return _generate(arrays, count, size, seed, step, epochs, per_epoch)


def _length(arrays: Any) -> int:
    lengths = {len(a) if a.ndim else 0 for a in jax.tree.leaves(arrays)}
    if len(lengths) != 1:
        raise InputError(
            f"arrays must have one common length on their first axis, got {sorted(lengths)}; "
            "slice them to the same examples"
        )
    return lengths.pop()


def _generate(arrays, count, size, seed, step, epochs, per_epoch):
    """The generator itself, so that bad arguments raise at the call and not at the first batch."""
    last = None if epochs is None else epochs * per_epoch
    shuffled, order = -1, np.arange(0)
    for i in itertools.count(step) if last is None else range(step, last):
        epoch, place = divmod(i, per_epoch)
        if epoch != shuffled:
            shuffled, order = epoch, np.random.default_rng([seed, epoch]).permutation(count)
        chosen = order[place * size : (place + 1) * size]
        yield jax.tree.map(lambda a, chosen=chosen: a[chosen], arrays)
