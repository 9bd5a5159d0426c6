"""A table of a model's layers: output shapes, parameter counts, bytes. No array is made.

The rows are what the combinators report while the model is traced, so a layer of one's own
stands in the table as the built-in ones do.
"""

import io
import math
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from funcbp.layers.layer import Layer, recording, run, specs_of


class Row(NamedTuple):
    """One layer, with all that is inside it.

    Attributes:
        path: the names from the model down, `serial/residual_0/dense_0`.
        kind: the layer's own name, `dense`.
        output: a `jax.ShapeDtypeStruct`, or a pytree of them.
        parameters: how many numbers its parameters hold, its children's included.
        bytes: of those parameters.
    """

    path: str
    kind: str
    output: PyTree
    parameters: int
    bytes: int

    @property
    def depth(self) -> int:
        return self.path.count("/")


class Summary(NamedTuple):
    """The rows, outermost layer first, each before its children. `str` gives the table."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the model's parameters hold."""
        return self.rows[0].parameters

    @property
    def bytes(self) -> int:
        """Bytes of the model's parameters."""
        return self.rows[0].bytes

    def __str__(self) -> str:
        return _render(self)


class _Rows:
    """The recorder. Keyed by path: a layer that is traced twice, in a scan, is one row."""

    def __init__(self):
        self.by_path: dict[str, Row] = {}

    def enter(self, path: str, layer: Layer, params: PyTree, inputs: tuple) -> tuple:
        # The row is entered before the children run, to stand above theirs.
        self.by_path[path] = Row(path, layer.name, None, *_size(params))
        return inputs

    def leave(self, path: str, layer: Layer, output: PyTree) -> PyTree:
        self.by_path[path] = self.by_path[path]._replace(output=jax.tree.map(_spec, output))
        return output


def _size(params: PyTree) -> tuple[int, int]:
    """(count, bytes) of all arrays in a tree."""
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return count, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def summary(model: Layer, *inputs: Any) -> Summary:
    """What each layer of a model gives and holds, at inference on such inputs.

    Args:
        model: any Layer.
        inputs: its inputs, arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        InputError: the model does not take such inputs; the message names the layer.

    Example:
        >>> import jax
        >>> from funcbp.layers import dense, relu, serial, summary
        >>> table = summary(serial(dense(3), relu), jax.ShapeDtypeStruct((1, 2), "float32"))
        >>> [(row.path, row.parameters) for row in table.rows]
        [('serial', 9), ('serial/dense_0', 9), ('serial/relu_0', 0)]
    """
    specs = specs_of(inputs)
    rows = _Rows()

    def init(key):
        return model.init(key, *specs)

    def forward(params, state, *inputs):
        with recording(rows):
            return run(model.name, model, params, state, inputs)[0]

    params, state = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    jax.eval_shape(forward, params, state, *specs)
    return Summary(tuple(rows.by_path.values()))


def _render(summary: Summary) -> str:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("layer", "total")
    table.add_column("kind")
    table.add_column("output")
    table.add_column("parameters", f"{summary.parameters:,}", justify="right")
    table.add_column("bytes", f"{summary.bytes:,}", justify="right")
    for row in summary.rows:
        name = "  " * row.depth + row.path.rpartition("/")[2]
        # As Text, since rich would read the brackets of a shape as markup.
        output = Text(_shapes(row.output))
        table.add_row(name, row.kind, output, f"{row.parameters:,}", f"{row.bytes:,}")
    # Wide enough that no cell is folded; a plain file, so no colours.
    file = io.StringIO()
    Console(file=file, width=1000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def _shapes(output: PyTree) -> str:
    """`float32[3, 4]`, several joined by commas."""
    leaves = jax.tree.leaves(output)
    return ", ".join(f"{x.dtype}[{', '.join(map(str, x.shape))}]" for x in leaves)
