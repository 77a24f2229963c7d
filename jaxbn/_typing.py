"""The types that signatures share."""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
from jax.typing import ArrayLike as ArrayLike

Array: TypeAlias = jax.Array
Axes: TypeAlias = int | tuple[int, ...]
Shape: TypeAlias = tuple[int, ...]
DTypeLike: TypeAlias = Any  # what jnp.dtype accepts; jax.typing names no public alias
Key: TypeAlias = jax.Array
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
AxisGroups: TypeAlias = tuple[tuple[int, ...], ...]
PyTree: TypeAlias = Any
Pair: TypeAlias = tuple[jax.Array, jax.Array]
PairLike: TypeAlias = tuple[ArrayLike, ArrayLike]
Activation: TypeAlias = Callable[..., jax.Array]
Initializer: TypeAlias = Callable[[Any, Shape, Any], jax.Array]
