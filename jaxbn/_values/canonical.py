"""Numbers and flags, wherever they come from: examined without staging an operation."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat import is_traced


def known(value: Any) -> np.ndarray | None:
    """Returns the values of what is concrete, inside a trace too; None of what is not.

    Comparing a concrete array with `jnp` inside a trace would stage the comparison, and
    its result would no longer be known.
    """
    if value is None or is_traced(value):
        return None
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        return None
    return np.asarray(value)


def as_number(name: str, value: Any, remedy: str) -> float:
    """Returns a number of Python, NumPy or JAX as a float, or raises with its `name`."""
    scalar = _scalar(value)
    if scalar is None or isinstance(scalar, bool):
        raise _refused(name, "a number", value, remedy)
    try:
        return float(scalar)
    except OverflowError:
        return math.copysign(math.inf, scalar)


def as_whole(name: str, value: Any, remedy: str) -> int:
    """Returns an integer of Python, NumPy or JAX as an int, or raises with its `name`."""
    scalar = _scalar(value)
    if isinstance(scalar, bool):
        scalar = None
    try:
        return operator.index(scalar)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise _refused(name, "an int", value, remedy) from None


def as_flag(name: str, value: Any, remedy: str = "Write True or False.") -> bool:
    """Returns a bool of Python, NumPy or JAX as Python's, or raises with its `name`."""
    scalar = _scalar(value)
    if not isinstance(scalar, bool):
        raise _refused(name, "a bool", value, remedy)
    return scalar


def as_settled(name: str, value: Any, remedy: str) -> Any:
    """Returns a known number as a float, and a traced scalar as it is."""
    if is_traced(value) and jnp.ndim(value) == 0:
        return value
    scalar = _scalar(value)
    if scalar is None or isinstance(scalar, bool):
        raise _refused(name, "a number or a scalar array", value, remedy)
    return as_number(name, scalar, remedy)


def _scalar(value: Any) -> bool | int | float | None:
    """Returns a real scalar of Python, NumPy or JAX as Python's own, or None."""
    if isinstance(value, (bool, int, float)):
        return value if type(value) in (bool, int) else _as_float(value)
    if not isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return None
    array = known(value)
    if array is None or array.ndim:
        return None
    if array.dtype == bool:
        return bool(array)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return int(array)
    return float(array) if jnp.issubdtype(array.dtype, jnp.floating) else None


def _as_float(value: int | float) -> float | int:
    # A subclass, such as np.float64 or an IntEnum.
    return int(value) if isinstance(value, int) else float(value)


def _refused(name: str, wanted: str, value: Any, remedy: str) -> TypeError:
    got = repr(value)
    if is_traced(value):
        got = f"a traced array of dtype {value.dtype} and shape {value.shape}"
    elif isinstance(value, (np.ndarray, jax.Array)):
        got = f"an array of dtype {value.dtype} and shape {value.shape}"
    return TypeError(f"{name} must be {wanted}, got {got}. {remedy}")
