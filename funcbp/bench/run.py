"""The command's work: every op's bench cases, one after the other."""

import contextlib
import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from funcbp.bench.measure import Row, measure
from funcbp.bench.peers import require
from funcbp.bench.results import Machine, Results
from funcbp.bench.roofline import roofline
from funcbp.core import InputError, Op

__all__ = ["run"]

DTYPES = ("float32", "bfloat16")
# Settings of glibc's malloc: how many blocks may be mapped apart, and when memory is given back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
# How long a quick run may begin with another op, in seconds.
QUICK = 50.0


def run(
    ops: Mapping[str, Op],
    against: Sequence[str] = ("autodiff", "jax"),
    *,
    device: str | None = None,
    quick: bool = False,
) -> Results:
    """Measures ops against other ways to the same value and gradient.

    Args:
      ops: by name.
      against: of "autodiff", "jax", "flax", "torch"; what has no counterpart is left out.
      device: "cpu" or "gpu"; JAX's default otherwise.
      quick: float32 and times and memory only, in fewer rounds, for under a minute; ops that were
        not reached are named in the result's `left_out`.

    Raises:
      InputError: no such contender or device, or its library is not installed.
    """
    require(list(against))
    _keep_freed_memory()
    dtypes = DTYPES[:1] if quick else DTYPES
    with _on(device):
        limits = roofline(dtypes)
        start = time.monotonic()
        rows: list[Row] = []
        left_out: list[str] = []
        console = Console(stderr=True)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task("bench", total=len(ops))
            for name, op in ops.items():
                bar.update(task, description=name)
                if quick and time.monotonic() - start > QUICK:
                    left_out.append(name)
                    continue
                for case in (c for c in op.cases if c.bench):
                    for dtype in dtypes:
                        rounds = 3 if quick else 9
                        rows += measure(op, case, dtype, against, limits, rounds, digits=not quick)
                bar.advance(task)
        return Results(Machine.here(limits.flops, limits.bandwidth), tuple(rows), tuple(left_out))


def _keep_freed_memory() -> None:
    """Lets this process keep what it frees, where the C library is glibc.

    Else arrays of many megabytes are fresh pages in each call, and three quarters of the time of a
    loss over [1024, 8192] logits is the kernel's, which clears them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _on(device: str | None) -> Any:
    if device is None:
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.devices(device)[0])
    except RuntimeError:
        have = sorted({d.platform for d in jax.devices()})
        raise InputError(
            f"--device {device} needs such a device, this machine has {', '.join(have)}; leave "
            "--device out to take the default"
        ) from None
