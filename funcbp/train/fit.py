"""The loop: steps with a progress bar, and the evaluation of a model."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from funcbp.core import InputError
from funcbp.train.step import TrainState

# Metrics are read from the device this many steps late, so that the next steps are already queued.
LAG = 2


class History(NamedTuple):
    """The metrics of a run: one number a step, by name; `skipped` steps were not finite."""

    steps: int
    metrics: dict[str, np.ndarray]
    skipped: int
    seconds: float


def fit(
    step: Callable,
    state: TrainState,
    batches: Iterable[Any],
    *,
    steps: int,
    quiet: bool | None = None,
    description: str = "train",
) -> tuple[TrainState, History]:
    """Runs `step` on `steps` batches, or on as many as there are.

    Args:
      step: from `make_step`.
      state: where to start; with a donating step it is gone afterwards.
      batches: for instance `funcbp.data.batches`.
      steps: how many to take.
      quiet: True shows no progress bar; by default it is shown on a terminal alone.
      description: stands before the bar.

    Returns:
      The last state and the `History`; `History.steps` is smaller than `steps` if the batches
      ended before.

    Warns:
      RuntimeWarning: a step's loss or gradient was not finite; its batch changed no parameter.
    """
    quiet = not sys.stdout.isatty() if quiet is None else quiet
    start, pending, rows = time.perf_counter(), [], []
    with _bar(quiet) as progress:
        task = progress.add_task(description, total=steps, rate=0.0, loss=float("nan"))
        for _, batch in zip(range(steps), batches, strict=False):
            state, metrics = step(state, batch)
            pending.append(metrics)
            if len(pending) > LAG:
                rows.append(_read(pending.pop(0), len(rows)))
                rate = len(rows) / (time.perf_counter() - start)
                progress.update(task, advance=1, rate=rate, loss=rows[-1]["loss"])
        for metrics in pending:
            rows.append(_read(metrics, len(rows)))
            progress.update(task, advance=1, loss=rows[-1]["loss"])
    names = rows[0] if rows else ()
    skipped = sum(not row["finite"] for row in rows)
    metrics = {n: np.array([row[n] for row in rows]) for n in names}
    return state, History(len(rows), metrics, skipped, time.perf_counter() - start)


def _bar(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} steps/s  loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=Console(),
        disable=quiet,
    )


def _read(metrics: dict[str, Any], number: int) -> dict[str, float]:
    row = {n: np.asarray(v).item() for n, v in metrics.items()}
    if not row["finite"]:
        warnings.warn(
            f"step {number} of this run: loss {row['loss']} and gradient norm {row['grad_norm']} "
            "must be finite; the parameters stay as they were",
            RuntimeWarning,
            stacklevel=3,
        )
    return row


def evaluate(
    model: Any, params: Any, model_state: Any, images: Any, labels: Any, *, batch: int = 256
) -> float:
    """The accuracy of a classifier: the share of labels that its largest output names.

    Args:
      model: a layer from inputs [n, ...] to [n, classes].
      params: its parameters.
      model_state: its state.
      images: inputs [n, ...].
      labels: integers [n].
      batch: examples a call; each counts once.

    Raises:
      InputError: there are no examples, or not one label for each.
    """
    if not len(images) or len(images) != len(labels):
        raise InputError(
            f"images and labels must be as many, and some, got {len(images)} and {len(labels)}"
        )

    @jax.jit
    def correct(inputs, targets):
        outputs, _ = model.apply(params, model_state, inputs, train=False)
        return jnp.sum(jnp.argmax(outputs, axis=-1) == targets)

    def parts() -> Iterator[slice]:
        return (slice(i, i + batch) for i in range(0, len(images), batch))

    return sum(int(correct(images[s], labels[s])) for s in parts()) / len(images)
