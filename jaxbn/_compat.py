"""Every difference between versions of JAX and XLA that the package has to know about."""

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.experimental
from jax import export, lax
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

if TYPE_CHECKING:
    from jax.extend.core import Primitive as Primitive
else:
    # `jax.extend` imports Pallas, which takes as long as all of jaxbn, 40 ms.
    Primitive = type(lax.add_p)

# XLA before that of JAX 0.11 widens all of a bfloat16 array before it takes a tile of it.
TILES_OF_BFLOAT16 = jax.__version_info__ >= (0, 11)


Kind = TypeVar("Kind", bound=type)
_exported: list[str] = []


def exported(kind: Kind) -> Kind:
    """Lets programs that `jax.export` serializes take and return a NamedTuple of `kind`."""
    # By the name that its users write, which no move of the file changes.
    name = f"{kind.__module__.partition('._')[0]}.{kind.__qualname__}"
    # A notebook may define a kind again; the first one keeps the name.
    times = _exported.count(name)
    _exported.append(name)
    with contextlib.suppress(ValueError):  # its author has done so
        export.register_namedtuple_serialization(
            kind, serialized_name=f"{name}~{times}" if times else name
        )
    return kind


def is_traced(value: object) -> bool:
    """Tells whether the values of an array are unknown because it is being traced."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the manual axes over which an array, or its type, differs between devices."""
    return varying_axes_of(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x))


def varying_axes_of(kind: Any) -> frozenset[str]:
    """Returns those of an array of the type `kind`."""
    # JAX moved the attribute in 0.10.
    tracked = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if tracked is None else tracked.varying
    return frozenset(axes or ())


def cast_to_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns `x` typed as varying over `axes` too; JAX renamed `pvary` to `pcast`."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]


def traced_kind(x: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of an array like `x` of another dtype, to trace a function for."""
    kind = jax.typeof(x)
    options: Any = {}
    if varying_axes(x) and hasattr(kind, "manual_axis_type"):
        options = {"manual_axis_type": kind.manual_axis_type, "sharding": kind.sharding}
    elif varying_axes(x):  # before JAX 0.10
        options = {"vma": varying_axes(x)}
    return jax.ShapeDtypeStruct(x.shape, dtype, **options)


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
