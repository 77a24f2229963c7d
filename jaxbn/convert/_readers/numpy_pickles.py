"""Stands in for harmless values in a pickle, so that none of their own code is run."""

import re
from typing import Any, Self

import numpy as np

_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_PLAIN = {
    "argparse.Namespace": "argparse.Namespace",
    "types.SimpleNamespace": "types.SimpleNamespace",
    "pathlib.PosixPath": "path",
    "pathlib.WindowsPath": "path",
    "pathlib.PurePosixPath": "path",
    "pathlib._local.PosixPath": "path",
    "datetime.datetime": "time",
    "datetime.timedelta": "time",
}
_NUMBERS = re.compile(r"[biufc]\d{1,2}|bool")


class StandIn:
    """A value of which only the kind is known; it takes what a pickle would do to it."""

    kind = "object"

    def __new__(cls, *_: Any) -> Self:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class StandInDtype(StandIn):
    """A dtype by its code and byte order."""

    kind = "dtype"

    def __init__(self, code: Any = "O", *_: Any) -> None:
        self._code = code if isinstance(code, str) else "O"
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            self._order = state[1]

    def dtype(self) -> np.dtype | None:
        """Returns the dtype, or None unless it is one of numbers."""
        if not _NUMBERS.fullmatch(self._code):
            return None
        return np.dtype(self._code if self._order == "|" else self._order + self._code)


class StandInArray(StandIn):
    """An array by what a pickle stores of it: version, shape, dtype, order and bytes."""

    kind = "numpy.ndarray"

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray | None:
        """Returns the array, or None unless it is one of numbers."""
        _, shape, given, fortran, content = self._state
        dtype = given.dtype()
        if dtype is None:
            return None
        flat = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(shape, order="F" if fortran else "C")


class StandInScalar(StandIn):
    """A single number of NumPy."""

    kind = "NumPy scalar"


def stand_ins() -> list[tuple[Any, str]]:
    """Returns what stands in for the values of these names."""
    named: dict[str, Any] = {name: _of_kind(kind) for name, kind in _PLAIN.items()}
    for module in _MODULES:
        named |= {f"{module}.scalar": StandInScalar, f"{module}._reconstruct": _new_array}
    named |= {"numpy.dtype": StandInDtype, "numpy.ndarray": StandInArray}
    kinds = "Bool Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64"
    named |= {f"numpy.dtypes.{kind}DType": StandInDtype for kind in kinds.split()}
    return [(value, name) for name, value in named.items()]


def _new_array(*_: Any) -> StandInArray:
    return StandInArray()


def _of_kind(kind: str) -> type[StandIn]:
    return type(f"StandInFor{kind.title()}", (StandIn,), {"kind": kind})
