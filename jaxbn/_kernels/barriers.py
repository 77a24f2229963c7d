"""Optimization barriers that stop XLA from keeping what is cheaper to compute again."""

from typing import Any

from jax import lax

from jaxbn._kernels.accelerator import is_small
from jaxbn._kernels.operation import Operation
from jaxbn._typing import Array


def _same(_: Any, operands: tuple[Array], whole: bool) -> tuple[Array]:
    return operands


def _barrier(_: Any, operands: tuple[Array], whole: bool) -> tuple[Array]:
    # Nested twice, so that CSE does not merge it with a barrier of the formulations.
    return lax.optimization_barrier(lax.optimization_barrier(operands))


def _barrier_operation(name: str, platforms: tuple[str, ...]) -> Operation:
    operation = Operation(
        name, lambda _, operands: operands, _same, dict.fromkeys(platforms, _barrier)
    )
    operation.def_tangent(
        lambda _, of, moving: (operation(None, of), operation(None, moving))
    )
    operation.def_transpose(
        lambda _, of, wanted, gradients: operation(None, tuple(gradients))
    )
    return operation


_ON_CPU = _barrier_operation("barrier_on_cpu", ("cpu",))
# A GPU too: there XLA would keep a ReLU's mask, an array of x's shape, instead of computing
# it again from x (9.1 instead of 7 units of traffic, docs/performance.md).
_OFF_TPU = _barrier_operation("barrier_off_tpu", ("cpu", "cuda", "rocm"))


def computed_apart(
    x: Array, *vectors: Array | None, recomputes: bool = False
) -> tuple[Any, ...]:
    """Returns the arguments as values that XLA has not seen before, on CPU.

    Without it, the loop over x would compute vectors again for each element, and what a
    forward pass has made of x would be stored for the backward pass. With `recomputes`, x
    is hidden on GPUs too.
    """
    if is_small(x):
        return x, *vectors
    (x,) = (_OFF_TPU if recomputes else _ON_CPU)(None, (x,))
    return x, *(None if v is None else _ON_CPU(None, (v,))[0] for v in vectors)
