"""How a Haiku layer keeps running statistics in Haiku's state."""

from collections.abc import Callable

import haiku as hk
import jax.numpy as jnp

from jaxbn._dtypes import widened
from jaxbn._typing import Array, DTypeLike, Shape


class Average(hk.ExponentialMovingAverage):
    """The state of Haiku's average, which a layer reads and writes as a whole."""

    def read(
        self, shape: Shape, dtype: DTypeLike, start: Callable[..., Array]
    ) -> tuple[Array, Array]:
        """Returns the average and the number of its updates, both made if need be."""
        counter = hk.get_state("counter", (), jnp.int32, init=jnp.zeros)
        hk.get_state("hidden", shape, dtype, init=jnp.zeros)
        return widened(hk.get_state("average", shape, dtype, init=start)), counter

    @property
    def counter(self) -> Array:
        """How often the average has been updated."""
        return hk.get_state("counter")

    def exists(self) -> bool:
        """Tells whether the state holds this average."""
        return has_state("average")

    def write(self, average: Array, hidden: Array, counter: Array) -> None:
        """Sets all that Haiku keeps of an average."""
        hk.set_state("counter", counter)
        hk.set_state("hidden", hidden)
        hk.set_state("average", average)


def has_state(name: str) -> bool:
    """Tells whether the state holds `name` for the module whose method runs."""
    try:
        hk.get_state(name)
    except ValueError:
        return False
    return True


def missing_stats(module: hk.Module) -> ValueError:
    """Returns the error of inference without running statistics."""
    return ValueError(
        f"the layer {module.module_name} found no statistics: the state holds none for "
        "it. Pass the state that init returned, of hk.transform_with_state: "
        "y, state = model.apply(params, state, rng, x)."
    )


def check_stats(module: hk.Module, got: Shape, want: Shape, shape: Shape) -> None:
    """Raises unless statistics of the shape `got` are those of x, of `shape`."""
    if got != want:
        raise ValueError(
            f"the layer {module.module_name} has statistics of shape {got}, but x of "
            f"shape {shape} needs {want}. Pass the state that init returned for such an "
            "x, or write data_format for the layout of x: channels_last, channels_first."
        )
