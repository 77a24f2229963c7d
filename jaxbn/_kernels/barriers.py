"""What the compiler must not share, since reading twice is faster than keeping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._dtypes import upcast
from jaxbn._typing import Array

# Smaller arrays stay in the nearest cache, where a barrier costs more than it saves.
SMALL = 1 << 16


class Input(NamedTuple):
    """One array in three roles.

    Attributes:
        value: What the forward pass reads.
        kept: What is kept for the backward pass and read there.
        wide: Where alone tangents come in and gradients go out, in the dtype in which they
            are summed before they are rounded. Its values are never read.
    """

    value: Array
    kept: Array
    wide: Array


def as_input(x: Array, *, recomputes: bool = False) -> Input:
    """Returns `x` in its three roles.

    With `recomputes`, the backward pass computes again what the forward pass has computed:
    on a GPU the compiler would keep it instead if it saw that.
    """
    kept = x
    if recomputes and not is_small(x):
        barrier = lax.optimization_barrier
        kept = lax.platform_dependent(x, cuda=barrier, rocm=barrier, default=same)
    return Input(x, kept, upcast(x))


def hidden(x: Array, *others: Any) -> tuple[Any, ...]:
    """Returns the arguments as values that the compiler has not seen before.

    For code that runs on CPU. There XLA runs a sum fast only if it can fuse all that the
    sum reads, and gives that up when something else reads the same intermediate value.
    Other backends fuse such sums into one kernel, which a barrier would split. Two barriers
    of the same arrays count as one: give the second one something else to hold too.
    """
    if not is_isolable(x):
        return x, *others
    return tuple(lax.optimization_barrier((x, *others)))


def isolated(x: Array, *others: Any) -> tuple[Any, ...]:
    """Returns the arguments, `hidden` on CPU, for code that runs on every platform.

    Each for itself, since what passes a barrier together varies over the same devices.
    """
    if is_small(x):
        return x, *others
    return on_cpu_or_not(each_hidden, same, (x, *others))


def each_hidden(arrays: Any) -> Any:
    """Returns a tree of arrays, each hidden for itself, for code that runs on CPU."""
    # Twice, or it would count as the same as a value that `hidden` has hidden alone.
    barrier = lax.optimization_barrier
    return jax.tree.map(lambda array: barrier(barrier(array)), arrays)


def on_cpu_or_not(
    on_cpu: Callable[..., Any], elsewhere: Callable[..., Any], *args: Any
) -> Any:
    """Returns what the function for the platform of the program makes of `args`."""
    return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


def is_small(x: Array) -> bool:
    """Tells whether `x` is so small that only the number of operations counts."""
    return x.size * x.dtype.itemsize < SMALL


def is_isolable(x: Array) -> bool:
    """Tells whether `hidden` is of use: sums of float16 are not fused in any case."""
    return not is_small(x) and x.dtype != jnp.float16


def same(x: Any) -> Any:
    """Returns `x`."""
    return x
