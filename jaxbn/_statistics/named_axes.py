"""Names of mapped axes, and groups of their devices: checked, and made."""

import operator
from collections.abc import Hashable
from typing import Any

import jax
from jax import lax

from jaxbn._compat import varying_axes
from jaxbn._typing import Array, AxisGroups, AxisName


def axis_groups(num_devices: int, group_size: int) -> AxisGroups:
    """Returns groups of neighbouring devices, for `axis_index_groups`.

    Args:
        num_devices: The size of the axis.
        group_size: How many devices share their statistics.

    Returns:
        A tuple of tuples of device indices.

    Raises:
        ValueError: group_size does not divide num_devices, or is not positive.

    Example:
        >>> import jaxbn
        >>> jaxbn.axis_groups(4, 2)
        ((0, 1), (2, 3))
    """
    if group_size < 1 or num_devices < 1 or num_devices % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide num_devices={num_devices}. Choose a "
            "divisor, or write unequal groups out."
        )
    starts = range(0, num_devices, group_size)
    return tuple(tuple(range(start, start + group_size)) for start in starts)


def as_groups(axis_name: AxisName | None, groups: Any) -> AxisGroups | None:
    """Returns groups as tuples, after the checks that need no mapped axis."""
    if axis_name is not None:
        _check_name(axis_name)
    if groups is None:
        return None
    try:
        groups = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError:
        raise TypeError(
            f"axis_index_groups must be tuples of device indices, got {groups!r}. Write "
            "((0, 1), (2, 3)) or the like, or see jaxbn.axis_groups."
        ) from None
    if axis_name is None or isinstance(axis_name, (tuple, list)):
        raise ValueError(
            f"axis_index_groups needs one axis_name, got {axis_name!r}. Name the axis "
            "whose devices are grouped; over several axes, sync over one of them."
        )
    members = [device for group in groups for device in group]
    if not groups or not all(groups) or sorted(members) != list(range(len(members))):
        raise ValueError(
            f"axis_index_groups {groups} are no partition of devices: name each of 0, 1, "
            "... in exactly one group. See jaxbn.axis_groups."
        )
    return groups


def _check_name(axis_name: Any) -> None:
    """Raises unless the name can be one of a mapped axis, or is a tuple of such."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    known = all(isinstance(n, Hashable) and not isinstance(n, (int, tuple)) for n in names)
    if not known or len(set(names)) < len(names):
        raise TypeError(
            "axis_name must be the name of a mapped axis or a tuple of different ones, got "
            f'{axis_name!r}. Write "data" or ("data", "replica").'
        )


def check_nesting(x: Array, axis_name: AxisName) -> None:
    """Raises for an axis of vmap that JAX cannot sum over, where types tell of varying."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mapped = tuple(name for name in names if name not in manual)
    if mapped and varying_axes(x):
        raise NotImplementedError(
            f"JAX cannot sum over the axes {mapped} of vmap inside a shard_map that checks "
            "varying axes. Pass check_vma=False to jax.shard_map, or make them mesh axes."
        )


def check_axis(axis_name: AxisName, groups: AxisGroups | None) -> None:
    """Raises unless the axis is bound here, and the groups partition it."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f"there is no mapped axis {axis_name!r} here. Call this under jax.pmap or "
            f"jax.vmap with axis_name={axis_name!r}, or under a jax.shard_map that is "
            "manual over it. Under plain jax.jit, statistics are those of the whole batch "
            "already: leave axis_name out."
        ) from None
    if groups is not None and sum(map(len, groups)) != size:
        raise ValueError(
            f"axis_index_groups {groups} do not cover the {size} devices of the axis "
            f"{axis_name!r}. Name each of 0 to {size - 1} in exactly one group, or see "
            "jaxbn.axis_groups."
        )
