"""Cases: the shapes and values on which an op is tested, audited and timed.

A case describes its arguments without making an array, so that importing the library starts no
device. `Case.build` draws them:

    Case("odd", (3, 5), (5, 7), axis=-1)        tuples are shapes of standard normals
    Case("ties", values([[1.0, 1.0], [0.0, -0.0]]))
    Case("labels", (4, 10), integers(4, high=10))
    Case("a function", closing(step, (3, 3)), (5, 3))
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Case", "Draw", "booleans", "closing", "integers", "key", "normal", "uniform", "values"]


@dataclasses.dataclass(frozen=True)
class Draw:
    """How one array argument is drawn: `kind` with its shape and parameters."""

    kind: str
    shape: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 1.0
    data: Any = None

    def sample(self, rng: np.random.Generator, dtype: Any) -> jax.Array:
        """One array of this draw; only floating draws take `dtype`."""
        if self.kind == "normal":
            # low and high are the mean and the standard deviation of a normal draw.
            return jnp.asarray(self.low + self.high * rng.standard_normal(self.shape), dtype)
        if self.kind == "uniform":
            return jnp.asarray(rng.uniform(self.low, self.high, self.shape), dtype)
        if self.kind == "integers":
            return jnp.asarray(rng.integers(int(self.low), int(self.high), self.shape), jnp.int32)
        if self.kind == "booleans":
            return jnp.asarray(rng.random(self.shape) < self.high)
        if self.kind == "key":
            return jax.random.key(int(self.low))
        array = np.asarray(self.data)
        kinds = {"f": dtype, "i": jnp.int32, "b": jnp.bool_}
        return jnp.asarray(array, kinds[array.dtype.kind])


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Draw:
    """Normal values of the given mean and standard deviation."""
    return Draw("normal", shape, mean, std)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Draw:
    """Uniform values in [low, high)."""
    return Draw("uniform", shape, low, high)


def integers(*shape: int, low: int = 0, high: int) -> Draw:
    """int32 values in [low, high)."""
    return Draw("integers", shape, low, high)


def booleans(*shape: int, p: float = 0.5) -> Draw:
    """Booleans that are true with probability p."""
    return Draw("booleans", shape, 0.0, p)


def key(seed: int = 0) -> Draw:
    """A typed PRNG key."""
    return Draw("key", (), seed)


@dataclasses.dataclass(frozen=True)
class Closing:
    """A function that closes over arrays which are drawn."""

    function: Any
    args: tuple[Any, ...]


def closing(function: Any, *args: Any) -> Closing:
    """The function with arrays drawn for its first arguments, as in `functools.partial`."""
    return Closing(function, args)


def values(data: Any) -> Draw:
    """These very values; floats take the case's dtype, integers and booleans keep theirs."""
    return Draw("values", np.shape(data), data=data)


class Case:
    """One set of arguments for an op.

    Args:
      name: what it is for, in a word or two.
      *args: one per positional argument: a shape (a tuple, drawn from the standard normal), a
        `Draw`, a pytree (list or dict) of these, None, or a static value.
      bench: True for a size that users have; the bench times these, the tests leave them out.
      dtypes: the dtypes in which the tests run the case.
      transformed: False where the tests need not run it under every transformation, because
        another case of the same rule says as much there.
      **kwargs: keyword arguments: a `Draw` is drawn, anything else is passed as it is.
    """

    def __init__(
        self,
        name: str,
        *args: Any,
        bench: bool = False,
        dtypes: tuple[str, ...] = ("float32", "bfloat16"),
        transformed: bool = True,
        **kwargs: Any,
    ):
        self.name, self.args, self.kwargs = name, args, kwargs
        self.bench, self.dtypes, self.transformed = bench, dtypes, transformed

    def __repr__(self) -> str:
        return f"Case({self.name!r})"

    def build(self, seed: int = 0, dtype: Any = "float32") -> tuple[tuple, dict[str, Any]]:
        """Draws `(args, kwargs)`; the same seed gives the same values."""
        rng = np.random.default_rng([seed, len(self.name)])

        def drawn(spec: Any) -> Any:
            if isinstance(spec, Draw):
                return spec.sample(rng, dtype)
            if isinstance(spec, Closing):
                return jax.tree_util.Partial(spec.function, *map(positional, spec.args))
            if isinstance(spec, list):
                return [positional(item) for item in spec]
            if isinstance(spec, dict):
                return {name: positional(item) for name, item in spec.items()}
            return spec

        def positional(spec: Any) -> Any:
            return drawn(normal(*spec) if isinstance(spec, tuple) else spec)

        args = tuple(positional(spec) for spec in self.args)
        return args, {name: drawn(spec) for name, spec in self.kwargs.items()}
