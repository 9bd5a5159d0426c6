"""What the chain rule found, step by step, and how it prints."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from funcbp import page

# Equations show the numbers of matrices up to these sizes, and fold at this width; a table shows
# this many rows at either end, on a terminal and on a page.
ROWS, COLUMNS, WIDTH, ENDS, PAGE = 6, 8, 100, 20, 150
HEAD = ("n", "f_n", "h_n", "∂h_n/∂h_{n-1}", "∂h_n/∂θ_n")
TITLE = "The chain rule, step by step"


class Evaluations(NamedTuple):
    """Evaluations of the loss for all derivatives: by the chain rule, by finite differences."""

    chain_rule: int
    finite_differences: int


class Step(NamedTuple):
    """One function of the chain, h_n = f_n(h_{n-1}; θ_n).

    Attributes:
        name: the function's name, or the layer's path.
        output: h_n, as `jax.ShapeDtypeStruct`s.
        rows: how many numbers h_n holds.
        columns: how many h_{n-1} holds; 0 if it is whole numbers, which have no derivative.
        parts: the names of the parameters that θ_n is made of, in its order.
        parameters: how many numbers θ_n holds.
        flops_left: of this step's multiplications when the product is taken from the left.
        flops_right: the same from the right.
        factor: ∂h_n/∂h_{n-1}, or None where the Jacobians together are too large.
        parameter_factor: ∂h_n/∂θ_n, likewise.
        product: ∂L/∂h_{n-1}, the factors from the left up to this one.
        gradient: ∂L/∂θ_n.
    """

    name: str
    output: PyTree
    rows: int
    columns: int
    parts: tuple[str, ...]
    parameters: int
    flops_left: int
    flops_right: int
    factor: Float[Array, "rows columns"] | None = None
    parameter_factor: Float[Array, "rows parameters"] | None = None
    product: Float[Array, "m columns"] | None = None
    gradient: Float[Array, "m parameters"] | None = None


class ChainRule(NamedTuple):
    """What `chain_rule` found; prints as a table.

    Attributes:
        steps: one a function, the first to be called first.
        value: h_N, or None for abstract inputs.
        gradients: ∂L/∂θ in the structure of `params`, as `jax.grad` gives it (`jax.jacobian`, if
            L is more than one number); None if it was not computed.
        input_gradient: ∂L/∂x, likewise.
        error: the largest difference to `jax.grad` of the whole, in units of its largest element.
        flops_forward: of one evaluation, as XLA counts them (a loop's body once); None if it
            does not say.
        flops_backpropagation: of one evaluation and its backward pass, in which no Jacobian is
            built; likewise.
        seconds_left: to multiply the factors from the left, measured, or None.
        seconds_right: the same from the right.
    """

    steps: tuple[Step, ...]
    value: PyTree
    gradients: PyTree
    input_gradient: PyTree
    error: float | None
    flops_forward: int | None
    flops_backpropagation: int | None
    seconds_left: float | None
    seconds_right: float | None

    @property
    def factors(self) -> tuple[Float[Array, "rows columns"], ...]:
        """∂h_n/∂h_{n-1}, for n = 1 to N; () where they were not built."""
        return tuple(s.factor for s in self.steps if s.factor is not None)

    @property
    def parameter_factors(self) -> tuple[Float[Array, "rows parameters"], ...]:
        """∂h_n/∂θ_n, for n = 1 to N; () where they were not built."""
        return tuple(s.parameter_factor for s in self.steps if s.parameter_factor is not None)

    @property
    def products(self) -> tuple[Float[Array, "m columns"], ...]:
        """∂L/∂h_{n-1}, for n = 1 to N: the product of the factors N to n; () if not computed."""
        return tuple(s.product for s in self.steps if s.product is not None)

    @property
    def parameters(self) -> int:
        """P, how many numbers the parameters hold."""
        return sum(step.parameters for step in self.steps)

    @property
    def flops_left(self) -> int:
        """Of multiplying the factors from the left, a multiplication and an addition each 1."""
        return sum(step.flops_left for step in self.steps)

    @property
    def flops_right(self) -> int:
        """Of multiplying the factors from the right."""
        return sum(step.flops_right for step in self.steps)

    @property
    def evaluations(self) -> Evaluations:
        """Of L, for its derivatives by the parameters; by x where there are none."""
        return Evaluations(1, 1 + (self.parameters or self.steps[0].columns))

    def table(self) -> Table:
        """Shapes and costs of the steps, the last first: the order of the product from the left."""
        return _table(self)

    def equations(self) -> str:
        """The way back in numbers, for the steps whose matrices are small."""
        return "\n\n".join(_equations(self))

    def __rich__(self) -> RenderableType:
        words = "\n\n".join([*_shown_equations(self), "\n".join(_sentences(self))])
        return Group(self.table(), Text(words))

    def __str__(self) -> str:
        # Wide enough that no cell is folded; a plain file, so no colours.
        file = io.StringIO()
        Console(file=file, width=1000, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Shapes and costs as plain values; the matrices are in `.steps`.

        Args:
            path: a file to write them to as well.
        """
        whole = _plain(self)
        if path is not None:
            Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return whole

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page; also written to `path`. Steps amid many are left out."""
        whole = page.page(TITLE, *_sections(self))
        if path is not None:
            Path(path).write_text(whole, encoding="utf-8")
        return whole

    def _repr_html_(self) -> str:
        return page.fragment(page.text(TITLE, "h2"), *_sections(self))


def _table(result: ChainRule) -> Table:
    last = len(result.steps)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0), pad_edge=False)
    for name in HEAD:
        table.add_column(Text(name), "total" if name == "f_n" else "")
    for name, total in (("left", result.flops_left), ("right", result.flops_right)):
        table.add_column(f"flops, {name}", _short(total), justify="right", no_wrap=True)
    for n in _shown(last, ENDS):
        # As Text, since rich would read the brackets as markup.
        cells = _cells(result, n) if n else ("...", f"{last - 2 * ENDS:,} more")
        table.add_row(*(Text(c if isinstance(c, str) else _short(c)) for c in cells))
    return table


def _short(count: int) -> str:
    return f"{count:,}" if count < 10**8 else f"{count:.3g}"


def _shown(last: int, ends: int) -> Iterable[int]:
    """The numbers of the steps that a table has, the last first; 0 where others are left out."""
    if last <= 2 * ends:
        return range(last, 0, -1)
    return [*range(last, last - ends, -1), 0, *range(ends, 0, -1)]


def _cells(result: ChainRule, n: int) -> tuple[Any, ...]:
    step = result.steps[n - 1]
    sizes = (_size(step.rows, step.columns), _size(step.rows, step.parameters))
    return (n, step.name, shapes(step.output), *sizes, step.flops_left, step.flops_right)


def _sections(result: ChainRule) -> list[str]:
    """The parts of the page."""
    last = len(result.steps)
    columns = (*HEAD, "flops, left", "flops, right")
    rows = [_cells(result, n) for n in _shown(last, PAGE) if n]
    parts = [*map(page.text, _sentences(result)), page.table(columns, rows)]
    if len(rows) < last:
        parts.append(page.text(f"{last - len(rows):,} steps in the middle are left out."))
    return [*parts, *(page.text(equation, "pre") for equation in _shown_equations(result))]


def _plain(result: ChainRule) -> dict[str, Any]:
    of_step = ("name", "rows", "columns", "parameters", "flops_left", "flops_right")
    of_whole = ("parameters", "flops_left", "flops_right", "flops_forward",
                "flops_backpropagation", "seconds_left", "seconds_right", "error")  # fmt: skip
    return {
        "jax": jax.__version__,
        "steps": [
            {n: getattr(step, n) for n in of_step}
            | {"output": shapes(step.output), "parts": list(step.parts)}
            for step in result.steps
        ],
        "evaluations": result.evaluations._asdict(),
        **{n: getattr(result, n) for n in of_whole},
    }


def shapes(tree: PyTree) -> str:
    """`float32[3, 4]`, several joined by commas."""
    return ", ".join(f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tree))


def _size(rows: int, columns: int) -> str:
    return f"[{rows:,} x {columns:,}]" if columns else "-"


def _letter(result: ChainRule) -> str:
    return "L" if result.steps[-1].rows == 1 else f"h_{len(result.steps)}"


def _shown_equations(result: ChainRule) -> list[str]:
    return _equations(result) if len(result.steps) <= ENDS else []


def _equations(result: ChainRule) -> list[str]:
    """For each step ∂L/∂θ_n and ∂L/∂h_{n-1}, as a product of matrices that stand side by side."""
    goal, last = _letter(result), len(result.steps)
    equations = []
    for n in range(last, 0, -1):
        step = result.steps[n - 1]
        arriving = result.steps[n].product if n < last else None
        for of, factor, product in (
            (f"∂θ_{n}", step.parameter_factor, step.gradient),
            (f"∂h_{n - 1}", step.factor, step.product),
        ):
            matrices = [m for m in (arriving, factor, product) if m is not None]
            if factor is None or product is None or not all(map(_is_small, matrices)):
                continue
            if arriving is None:
                equations.append(_side_by_side(f"∂{goal}/{of} = ", product))
                continue
            left = f"∂{goal}/{of}"
            head = f"{left} = ∂{goal}/∂h_{n} · ∂h_{n}/{of}\n"
            equals = " " * len(left) + " = "
            body = _side_by_side(equals, arriving, " · ", factor, " = ", product)
            if max(map(len, body.splitlines())) > WIDTH:
                body = _side_by_side(equals, arriving, " · ", factor)
                body += "\n" + _side_by_side(equals, product)
            equations.append(head + body)
    return equations


def _is_small(matrix: Array) -> bool:
    return 0 < matrix.shape[0] <= ROWS and 0 < matrix.shape[1] <= COLUMNS


def _side_by_side(*parts: Any) -> str:
    """Words and matrices, from the top; the words stand on the first line alone."""
    blocks = [[part] if isinstance(part, str) else _lines(part) for part in parts]
    height = max(map(len, blocks))
    filled = [block + [" " * len(block[0])] * (height - len(block)) for block in blocks]
    return "\n".join("".join(line).rstrip() for line in zip(*filled, strict=True))


def _lines(matrix: Array) -> list[str]:
    # Adding 0 takes the sign from -0.
    numbers = [[f"{v:.3g}" for v in row] for row in np.asarray(matrix, np.float64) + 0.0]
    if matrix.shape == (1, 1):
        return numbers[0]
    widths = [max(map(len, column)) for column in zip(*numbers, strict=True)]
    return [
        "[" + "  ".join(v.rjust(w) for v, w in zip(row, widths, strict=True)) + "]"
        for row in numbers
    ]


def _sentences(result: ChainRule) -> list[str]:
    left, right = result.flops_left, result.flops_right
    lines = [f"the product of the factors: {left:,} flops from the left, {right:,} from the right"]
    if result.seconds_left is not None and result.seconds_right is not None:
        left, right = (f"{s * 1e6:,.0f} us" for s in (result.seconds_left, result.seconds_right))
        lines.append(f"measured: {left} from the left, {right} from the right")
    if result.flops_forward is not None and result.flops_backpropagation is not None:
        lines.append(
            f"without building a factor: {result.flops_backpropagation:,} flops forward and back, "
            f"{result.flops_forward:,} of them forward"
        )
    once, many = result.evaluations
    lines.append(f"evaluations of {_letter(result)}: {once}; by finite differences {many:,}")
    if result.error is not None:
        lines.append(f"largest difference to jax.grad, relative to its largest: {result.error:.1e}")
    return lines
