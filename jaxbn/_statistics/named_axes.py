"""Names of mapped axes, and groups of their devices: checked, and made."""

import operator
from collections.abc import Hashable
from typing import Any

from jaxbn._typing import AxisGroups, AxisName


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
