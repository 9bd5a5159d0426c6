"""The demonstration: a model trained on handwritten digits, and each rule it used, checked."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from funcbp import data, layers, ops, page, train
from funcbp.check import compare, saved_bytes
from funcbp.core import Call, recorded

BATCH = 128


class RuleRow(NamedTuple):
    """One hand-written rule at one place of the model; errors are against float64."""

    rule: str
    shape: str
    calls: int
    error_of_rule: float
    error_of_autodiff: float
    saved_by_rule: int
    saved_by_autodiff: int
    verdict: str


COLUMNS = ("rule", "argument shapes", "calls", "error, rule", "error, autodiff",
           "saved bytes, rule", "saved bytes, autodiff", "verdict")  # fmt: skip


class Result(NamedTuple):
    """What the demonstration found."""

    accuracy: float
    seconds: float
    seed: int
    losses: list[float]
    rules: list[RuleRow]

    @property
    def ok(self) -> bool:
        return all(row.verdict == "right" for row in self.rules)

    def to_json(self) -> dict[str, Any]:
        rules = [row._asdict() for row in self.rules]
        return {"accuracy": self.accuracy, "seconds": self.seconds, "seed": self.seed,
                "jax": jax.__version__, "rules": rules}  # fmt: skip

    def to_html(self) -> str:
        return page.page(
            "funcbp: a model and its gradients",
            page.text(
                f"Accuracy on the 360 held-out digits: {self.accuracy:.2%} (seed {self.seed})."
            ),
            page.line_plot(self.losses, "training loss"),
            page.text("The hand-written rules that the model used", "h2"),
            page.text(
                "Each rule's value and cotangents, and those of jax.grad, against float64: largest "
                "error in units of the largest element. A rule may be at most twice as far off as "
                "jax.grad, plus 2 ulp. Saved bytes: what the forward pass keeps for the backward "
                "pass beyond the arguments."
            ),
            page.table(COLUMNS, self.rules),
        )

    def table(self) -> Table:
        table = Table(
            title="Every hand-written rule that the model used, beside jax.grad",
            caption="error: largest against float64, in units of the largest element; saved: bytes",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("rule, and its arguments", overflow="fold")
        for column in ("calls", "error", "jax.grad's", "saved", "jax.grad's"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in self.rules:
            style = "green" if row.verdict == "right" else "bold red"
            name = Text(row.rule, "bold").append(f"\n{row.shape}", "not bold dim")
            numbers = [page.number(v) for v in row if not isinstance(v, str)]
            table.add_row(name, *numbers, Text(row.verdict, style))
        return table


def model() -> layers.Layer:
    """A small residual network of the layers that come with the library."""
    block = layers.serial(
        layers.layer_norm(),
        layers.dense(128, activation="silu"),
        layers.dropout(0.1),
        layers.dense(128),
    )
    return layers.serial(
        layers.flatten,
        layers.dense(128, activation="gelu"),
        layers.residual(block),
        layers.layer_norm(),
        layers.dense(10),
    )


def run(*, seed: int = 0, steps: int = 800, console: Console) -> Result:
    """Trains, evaluates and compares; prints the progress bar on a terminal."""
    start = time.perf_counter()
    digits, net = data.digits(), model()
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, max(steps, 1)), weight_decay=1e-3)
    loss = train.supervised(net, ops.softmax_cross_entropy_with_integer_labels)
    state = train.init_state(net, optimizer, jax.random.key(seed), digits.train_images[:1])
    batches = data.batches((digits.train_images, digits.train_labels), BATCH, seed=seed)
    state, history = train.fit(
        train.make_step(loss, optimizer), state, batches, steps=steps,
        quiet=not console.is_terminal, description="digits",
    )  # fmt: skip
    accuracy = train.evaluate(
        net, state.params, state.model_state, digits.test_images, digits.test_labels
    )
    batch = jax.tree.map(jnp.asarray, (digits.train_images[:BATCH], digits.train_labels[:BATCH]))
    rules = used_rules(lambda: loss(state.params, state.model_state, batch, key=state.key))
    losses = [float(v) for v in history.metrics.get("loss", ())]
    return Result(accuracy, time.perf_counter() - start, seed, losses, rules)


def used_rules(function: Callable[[], Any]) -> list[RuleRow]:
    """Runs a function eagerly and compares each op that it called, with the arguments it had."""
    with recorded() as calls:
        function()
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        shapes = tuple(
            (n, tuple((v.shape, str(v.dtype)) for v in jax.tree.leaves(tree)))
            for n, tree in call.arrays.items()
        )
        settings = tuple((n, repr(v)) for n, v in call.static.items())
        groups.setdefault((call.op, shapes, settings), []).append(call)
    return [_row(group[0], len(group)) for group in groups.values()]


def _row(call: Call, count: int) -> RuleRow:
    def rule(**arrays):
        return call.op.apply(call.op, arrays, call.static)

    def plain(**arrays):
        return call.op.apply(call.op.plain, arrays, call.static)

    result = compare(rule, reference=plain, **call.arrays)
    shapes = ", ".join(
        "x".join(map(str, v.shape)) or "scalar"
        for tree in call.arrays.values()
        for v in jax.tree.leaves(tree)
    )
    settings = [f"{n}={v!r}" for n, v in call.static.items() if v is not None]
    return RuleRow(
        f"{call.op.name}({', '.join(settings)})" if settings else call.op.name,
        shapes,
        count,
        max(row.rule for row in result.rows),
        max(row.autodiff for row in result.rows),
        saved_bytes(rule, **call.arrays),
        saved_bytes(plain, **call.arrays),
        "right" if result.ok else "WRONG",
    )
