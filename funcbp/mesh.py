"""The mesh axes that an array varies over inside `shard_map`: part of its type."""

from typing import Any

import jax

__all__ = ["vary", "varying"]


def varying(aval: Any) -> frozenset:
    """The axes over which values of this type differ from device to device."""
    return aval.manual_axis_type.varying


def vary(leaf: Any, axes: frozenset) -> Any:
    """The same array, with a type that varies over at least these axes."""
    if leaf.dtype == jax.dtypes.float0:
        return leaf
    missing = axes - varying(jax.typeof(leaf))
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf
