"""What the rules over segments share: arguments, their checks, and a row for each entry."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from funcbp.core import InputError


def check_segments(data: Array, segment_ids: Array, num_segments: Any = None, **settings) -> None:
    """Raises if there is not one integer id for each row of data, or a negative number of them."""
    integers = jnp.issubdtype(segment_ids.dtype, jnp.integer)
    if data.ndim < 1 or segment_ids.shape != data.shape[:1] or not integers:
        raise InputError(
            f"segment_ids must be integers, one for each row of data {data.shape}, got "
            f"{segment_ids.dtype} {segment_ids.shape}; merge the leading axes of both first"
        )
    if isinstance(num_segments, Tracer) or (num_segments is not None and num_segments < 0):
        raise InputError(
            f"num_segments must be an integer from 0, known when tracing, got {num_segments}; "
            "it is the size of the result: under jit make it a static argument"
        )


def number_of_segments(data, segment_ids, num_segments=None, **settings) -> dict[str, int]:
    """`num_segments` as an int: one more than the largest id where it is None."""
    if num_segments is not None:
        return {"num_segments": int(num_segments)}
    if isinstance(segment_ids, Tracer) or segment_ids.size == 0:
        what = "traced" if segment_ids.size else "empty"
        raise InputError(
            f"num_segments must be given where segment_ids is {what}; without it the number is "
            "max(segment_ids) + 1, which needs their values"
        )
    return {"num_segments": max(int(np.max(np.asarray(segment_ids))) + 1, 0)}


def per_row(
    per_segment: Array, segment_ids: Array, mode=None, indices_are_sorted=False, fill: float = 0
) -> Array:
    """The row of its segment for each id; `fill` where there is no such segment."""
    return (
        jnp.asarray(per_segment)
        .at[segment_ids]
        .get(
            mode="fill" if mode is None else mode,
            fill_value=fill,
            indices_are_sorted=indices_are_sorted,
            wrap_negative_indices=False,
        )
    )
