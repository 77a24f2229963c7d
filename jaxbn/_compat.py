"""Every difference between versions of JAX and XLA that the package has to know about."""

from typing import Any

import jax
import jax.experimental
from jax import lax
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

# XLA before that of JAX 0.11 widens all of a bfloat16 array before it takes a tile of it.
TILES_OF_BFLOAT16 = jax.__version_info__ >= (0, 11)


def is_traced(value: object) -> bool:
    """Tells whether the values of an array are unknown because it is being traced."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the manual axes over which an array, or its type, differs between devices."""
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    # JAX moved the attribute in 0.10.
    tracked = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if tracked is None else tracked.varying
    return frozenset(axes or ())


def cast_to_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns `x` typed as varying over `axes` too; JAX renamed `pvary` to `pcast`."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]


def enable_x64() -> Any:
    """Returns the context manager in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()  # before JAX 0.8  # pyright: ignore


def concrete_mesh() -> jax.sharding.Mesh | None:
    """Returns the mesh that `jax.set_mesh` has set, or None."""
    if hasattr(jax.sharding, "get_mesh"):
        mesh = jax.sharding.get_mesh()
    else:  # before JAX 0.8
        mesh = jax._src.mesh.get_concrete_mesh()  # pyright: ignore
    return None if mesh is None or mesh.empty else mesh


def set_value(variable: Any, value: jax.Array) -> None:
    """Gives a variable of Flax NNX another array, also one of another dtype."""
    if hasattr(type(variable), "set_value"):
        variable.set_value(value)
    else:  # before Flax 0.12
        variable.value = value


def is_for_one_device(context: Any) -> bool:
    """Tells whether the program being lowered sees whole arrays, not parts of sharded ones.

    That is a program for one device, or the body of a `shard_map` or `pmap`.
    """
    axes = getattr(context.module_context, "axis_context", None)
    count = getattr(axes, "num_devices", None)
    if count is not None:
        return count == 1
    mesh = getattr(axes, "mesh", None)
    if mesh is None:
        return False
    return set(mesh.axis_names) <= set(getattr(axes, "manual_axes", ()))
