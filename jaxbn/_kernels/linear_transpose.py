"""Linear functions that say how they are transposed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._typing import Array


def add_linear(
    to: Array,
    function: Callable[[Any], Array],
    transposed: Callable[[Array], Any],
    arrays: Any,
    about: Array,
) -> Array:
    """Returns `to` plus a linear function of `arrays`, with its transpose in its own words.

    It can be batched and differentiated further, forward and in reverse. In matrices,
    [[1, 0], [-F, 1]] has the inverse [[1, 0], [F, 1]], and solving is all for which JAX
    takes a transpose: a `custom_vjp` has no forward mode, and a `linear_call` no batches.
    `about` is an array of the shape of `to` that `function` depends on.
    """

    def matrix(pair):
        arrays, to = pair
        scaled = [about.astype(a.dtype) * a for a in (to, *jax.tree.leaves(arrays))]
        arrays = jax.tree.map(_seeming(scaled[0]), arrays)
        return arrays, _seeming(*scaled[1:])(to - function(pair[0]))

    def solve(_, pair):
        return pair[0], pair[1] + function(pair[0])

    def solve_transposed(_, pair):
        return jax.tree.map(jnp.add, pair[0], transposed(pair[1])), pair[1]

    arrays, to = lax.custom_linear_solve(matrix, (arrays, to), solve, solve_transposed)
    return _seeming(*jax.tree.leaves(arrays))(to)


def _seeming(*others: Array) -> Callable[[Array], Array]:
    """Returns the identity, which seems to JAX, not to XLA, to depend on `others` too.

    JAX transposes a solution only where all that was solved for is differentiated.
    """
    nothing = [jnp.where(False, jnp.sum(other), 0) for other in others]
    return lambda array: array + sum(n.astype(array.dtype) for n in nothing)
