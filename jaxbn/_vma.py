"""Which mesh axes a value varies over inside `shard_map`, where JAX keeps track of it."""

from typing import Any

import jax
from jax import lax

from jaxbn._typing import Array


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the manual axes over which an array, or its type, differs between devices."""
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    # JAX moved the attribute in 0.10.
    tracked = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if tracked is None else tracked.varying
    return frozenset(axes or ())


def vary_over(x: Array, axes: frozenset[str]) -> Array:
    """Returns `x` typed as varying over `axes` too; the transpose is one sum over them."""
    missing = tuple(axes - varying_axes(x))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]


def vary_alike(x: Array, other: Any) -> Array:
    """Returns `x` typed as varying over what `other`, or its type, varies over too."""
    return vary_over(x, varying_axes(other))
