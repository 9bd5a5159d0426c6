"""Where an equation of a traced program comes from: its source line, and its layer."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax._src import source_info_util

# Frames of funcbp are no user's, as those of JAX are not; those of this folder say nothing at all.
_HERE = str(Path(__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# What `jax.checkpoint` opens for itself.
_UNNAMED = ("checkpoint", "rematted_computation")


def source(*path: Any) -> str:
    """The user's line that made an equation, as `file.py:12`; "" where none is known.

    It is the innermost frame outside JAX and outside funcbp, else the innermost outside JAX. The
    file is relative to the working directory, or its last two names where it lies outside.

    Args:
      *path: the equation, after those that it is inside of, outermost first. They matter where
        `jax.jit` reuses what it traced for another caller.
    """
    fallback = ""
    for depth in range(len(path) - 1, -1, -1):
        outer = [e.params["name"] for e in path[:depth] if "jit" in e.primitive.name]
        frames = list(_frames(path[depth], outer[-1] if outer else None))
        for frame in frames:
            if not frame.file_name.startswith(_PACKAGE):
                return _shown(frame)
        if frames and not fallback:
            fallback = _shown(frames[0])
    return fallback


def layer(*name_stacks: Any) -> str:
    """The path of scopes that an equation was made in, as `serial/dense_0`; "" where there is none.

    Args:
      *name_stacks: `source_info.name_stack` of the equations that it is inside of, outermost
        first, then its own.
    """
    entries = itertools.chain.from_iterable(stack.stack for stack in name_stacks)
    scopes = (e.name for e in entries if isinstance(e, source_info_util.Scope))
    # jnp.einsum opens a scope named by its subscripts.
    return "/".join(name for name in scopes if name not in _UNNAMED and "->" not in name)


def human(size: float) -> str:
    """Bytes for a reader: `512 B`, `1.5 kB`, `20 MB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _frames(equation: Any, function: str | None) -> Iterator[Any]:
    """Frames outside JAX, innermost first, up to that of the jitted function, if it is there."""
    traceback = equation.source_info.traceback
    codes, offsets = traceback.raw_frames() if traceback else ((), ())
    for code, offset in zip(codes, offsets, strict=True):
        name = code.co_filename
        if source_info_util.is_user_filename(name) and not name.startswith(_HERE):
            yield source_info_util.raw_frame_to_frame(code, offset)
        if code.co_name == function:
            return


def _shown(frame: Any) -> str:
    path = Path(frame.file_name)
    try:
        path = path.relative_to(Path.cwd())
    except ValueError:
        path = Path(*path.parts[-2:])
    return f"{path}:{frame.start_line}"
