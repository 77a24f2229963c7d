"""Operations on arrays of x's size, with a formulation of their own for each platform.

JAX sees an operation as one equation, with the derivative that is given for it. Which
formulation runs is decided when a program is lowered: then the platform is known, and
whether arrays are whole or parts of sharded ones; only the one that runs is traced.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._compat import Primitive, ad, batching, is_for_one_device, mlir
from jaxbn._dtypes import upcast
from jaxbn._sharding import vary_together
from jaxbn._typing import Array

# Bytes of a small array. It stays in the nearest cache of a CPU, where a barrier costs more
# than it saves, and on an accelerator a sample of it costs as much as all of it.
SMALL = 1 << 16

# A formulation takes the static part, the operands (a NamedTuple of arrays, with None for
# an absent one), and whether the arrays are whole.
Formulation = Callable[[Any, Any, bool], tuple[Array, ...]]


class Operation:
    """A function `(static, operands) -> arrays` that JAX traces as one equation.

    Args:
        name: What programs printed by JAX call it.
        types: The types of the results, given the static part and those of the operands.
        default: The formulation for every platform that has none of its own.
        platforms: Further formulations by platform.
        batched: Returns the static part for operands with one more axis in front. None
            for an operation that takes each operand by itself.
    """

    def __init__(
        self,
        name: str,
        types: Callable[[Any, Any], tuple[Any, ...]],
        default: Formulation,
        platforms: Mapping[str, Formulation],
        batched: Callable[[Any], Any] | None = lambda static: static,
    ):
        self._default = default
        self._batched = batched
        self._primitive = primitive = Primitive(f"jaxbn_{name}")
        primitive.multiple_results = True

        @primitive.def_impl  # only under jax.disable_jit
        def _(*leaves, tree, static):
            return default(static, tree.unflatten(leaves), True)

        @primitive.def_abstract_eval
        def _(*leaves, tree, static):
            return types(static, tree.unflatten(leaves))

        mlir.register_lowering(primitive, _lowering(default))
        for platform, formulation in platforms.items():
            mlir.register_lowering(primitive, _lowering(formulation), platform=platform)
        batching.primitive_batchers[primitive] = self._batch

    def __call__(self, static: Any, operands: Any) -> Any:
        """Returns the results; `static` must be hashable."""
        if jax.sharding.get_abstract_mesh().manual_axes:
            operands = vary_together(operands)
        leaves, tree = jax.tree.flatten(operands)
        return tuple(self._primitive.bind(*leaves, tree=tree, static=static))

    def def_tangent(self, rule: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
        """Sets the derivative: `rule(static, operands, tangents) -> (results, tangents)`.

        Tangents of operands that do not move are None.
        """

        def jvp(leaves, tangents, *, tree, static):
            moving = [None if isinstance(t, ad.Zero) else t for t in tangents]
            return rule(static, tree.unflatten(leaves), tree.unflatten(moving))

        ad.primitive_jvps[self._primitive] = jvp

    def def_linear_in(self, names: Sequence[str]) -> None:
        """Sets the derivative of an operation that is linear in the operands `names`.

        What moves of the other operands is left to JAX and to the default formulation.
        """

        def rule(static, operands, tangents):
            parts, moving = [], tangents._asdict()
            linear = {name: moving.pop(name) for name in names}
            if jax.tree.leaves(linear):
                parts.append(self(static, operands._replace(**linear)))
            moving = {name: t for name, t in moving.items() if jax.tree.leaves(t)}
            if moving:

                def of(values):
                    return self._default(static, operands._replace(**values), False)

                values = {name: getattr(operands, name) for name in moving}
                parts.append(jax.jvp(of, (values,), (moving,))[1])
            totals = [
                functools.reduce(operator.add, part) for part in zip(*parts, strict=True)
            ]
            return self(static, operands), totals

        self.def_tangent(rule)

    def def_transpose(self, rule: Callable[[Any, Any, Any, Any], Any]) -> None:
        """Sets the transpose: `rule(static, operands, wanted, gradients) -> operands`.

        Both `operands` and `wanted` are like the operands: the latter has the type of each
        of which the gradient is wanted, where the former has None.
        """

        def transpose(gradients, *leaves, tree, static):
            wanted = [
                leaf.aval if ad.is_undefined_primal(leaf) else None for leaf in leaves
            ]
            known = [
                None if kind is not None else leaf
                for leaf, kind in zip(leaves, wanted, strict=True)
            ]
            given = [None if isinstance(g, ad.Zero) else g for g in gradients]
            found = rule(static, tree.unflatten(known), tree.unflatten(wanted), given)
            return tree.flatten_up_to(found)

        ad.primitive_transposes[self._primitive] = transpose

    def _batch(self, leaves, dims, *, tree, static):
        if self._batched is None:
            return self(static, tree.unflatten(leaves)), dims
        pairs = list(zip(leaves, dims, strict=True))
        size = next(leaf.shape[dim] for leaf, dim in pairs if dim is not None)
        moved = [
            jnp.broadcast_to(leaf[None], (size, *leaf.shape))
            if dim is None
            else jnp.moveaxis(leaf, dim, 0)
            for leaf, dim in pairs
        ]
        results = self(self._batched(static), tree.unflatten(moved))
        return results, [0] * len(results)


def _lowering(formulation: Formulation) -> Any:
    def lower(context, *leaves, tree, static):
        whole = is_for_one_device(context)

        def run(*leaves):
            return formulation(static, tree.unflatten(leaves), whole)

        return mlir.lower_fun(run, multiple_results=True)(context, *leaves)

    return lower


def is_small(x: Any) -> bool:
    """Tells whether `x` is known to be small; a symbolic size is not."""
    return has_known_size(x) and x.size * x.dtype.itemsize < SMALL


def has_known_size(x: Any) -> bool:
    """Tells whether all sizes of `x` are numbers."""
    return all(isinstance(size, int) for size in x.shape)


def number_of_elements(x: Array, axes: tuple[int, ...]) -> Array | int:
    """Returns how many elements are summed over `axes`; an array if that is symbolic."""
    size = math.prod(x.shape[axis] for axis in axes)
    return size if isinstance(size, int) else jnp.asarray(size, upcast(x).real.dtype)


# Optimization barriers that stop XLA from keeping what is cheaper to compute again.


def _same(recomputes: bool, operands: tuple[Array, ...], whole: bool) -> tuple[Array, ...]:
    return operands


def _hidden_on_cpu(
    recomputes: bool, operands: tuple[Array, ...], whole: bool
) -> tuple[Array, ...]:
    return lax.optimization_barrier(operands)


def _hidden_on_gpu(
    recomputes: bool, operands: tuple[Array, ...], whole: bool
) -> tuple[Array, ...]:
    # XLA would keep a ReLU's mask, an array of x's shape, instead of computing it again
    # from x (9.1 instead of 7 units of traffic, docs/performance.md).
    x, *vectors = operands
    return (lax.optimization_barrier(x) if recomputes else x), *vectors


_HIDDEN = Operation(
    "hidden",
    lambda _, operands: operands,
    _same,
    {"cpu": _hidden_on_cpu, "cuda": _hidden_on_gpu, "rocm": _hidden_on_gpu},
    None,
)


def _hide(recomputes: bool, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
    """Hides all arrays behind one barrier, where None stands for an absent one.

    XLA merges barriers of equal operands (CSE), and no formulation has one of these.
    """
    leaves, tree = jax.tree.flatten(tuple(arrays))
    return tree.unflatten(_HIDDEN(recomputes, tuple(leaves)))


@_HIDDEN.def_tangent
def _(recomputes, of, moving):
    moved = _hide(recomputes, moving)
    moved = (jnp.zeros_like(a) if t is None else t for a, t in zip(of, moved, strict=True))
    return _HIDDEN(recomputes, of), tuple(moved)


@_HIDDEN.def_transpose
def _(recomputes, of, wanted, gradients):
    return _hide(recomputes, gradients)


def computed_apart(
    x: Array, *vectors: Array | None, recomputes: bool = False
) -> tuple[Any, ...]:
    """Returns the arguments as values that XLA has not seen before, on CPU.

    Without it, the loop over x would compute vectors again for each element, and what a
    forward pass has made of x would be stored for the backward pass. With `recomputes`, x
    is hidden on GPUs too.
    """
    return (x, *vectors) if is_small(x) else _hide(recomputes, (x, *vectors))
