"""Marks: places in a traced program whose activation and cotangent are to be seen.

A mark is an identity that only stands in programs traced by `marking`; elsewhere `tap` returns its
argument as it is. `marking` is part of the key of JAX's caches, so what was traced without marks is
traced again, and marked programs are not used afterwards.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from funcbp.core import InputError
from funcbp.layers.layer import Layer, path, recording

__all__ = ["INPUT", "OUTPUT", "TAP", "marking", "mark_p", "tap"]

INPUT, OUTPUT, TAP = "input", "output", "tap"

_marking = jax.make_user_context(default_value=False)


def _same(x, **_):
    return x


def _differentiated(primals, tangents, **where):
    return mark_p.bind(*primals, **where), tangents[0]


def _batched(arrays, axes, **where):
    return mark_p.bind(*arrays, **where), axes[0]


mark_p = Primitive("funcbp_mark")
mark_p.def_impl(_same)
mark_p.def_abstract_eval(_same)
mlir.register_lowering(mark_p, mlir.lower_fun(_same, multiple_results=False))
ad.primitive_jvps[mark_p] = _differentiated
batching.primitive_batchers[mark_p] = _batched


def tap(x: PyTree, name: str) -> PyTree:
    """Marks a value to be seen by `funcbp.trace`: x itself, and free, when nothing is traced.

    A mark inside a `while_loop`, or a function with a derivative rule of its own, is not seen.

    Args:
        x: an array or a pytree; its floating arrays are seen.
        name: of the row; inside a layer it stands behind the layer's path.

    Raises:
        InputError: the name is not a text that says something.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"tap needs a name for its row, got {name!r}; tap(x, 'after attention')")
    if not _marking.value:
        return x
    inside = path()
    return _marked(x, f"{inside}/{name}" if inside else name, TAP, TAP)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Taps are marked, and the inputs and outputs of each layer, in what is traced inside."""
    with _marking(True), recording(_Layers()):
        yield


class _Layers:
    """The recorder: a layer is marked at both ends."""

    def enter(self, path: str, layer: Layer, params: PyTree, inputs: tuple) -> tuple:
        return _marked(inputs, path, layer.name, INPUT)

    def leave(self, path: str, layer: Layer, output: PyTree) -> PyTree:
        return _marked(output, path, layer.name, OUTPUT)


def _marked(tree: PyTree, path: str, kind: str, side: str) -> PyTree:
    parts = itertools.count()

    def one(x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        return mark_p.bind(jnp.asarray(x), path=path, kind=kind, side=side, part=next(parts))

    return jax.tree.map(one, tree)
