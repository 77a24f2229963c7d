"""Gathers the arrays of a file while it is read, within limits of memory and time."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# Limits against hostile files; no real checkpoint comes near them.
DEPTH, ENTRIES = 64, 1_000_000
_SHOWN = 4
_PLAIN = (int, float, complex, str, bytes, type(None))


class RefusedError(ValueError):
    """A file that is understood and not read; the message tells what to do instead."""


@dataclasses.dataclass
class Contents:
    """What a reader found.

    Attributes:
        path: The file or folder.
        limit: How many bytes of arrays it may hold; None for any number.
        like: The values whose leaves were saved, of a format that stores no names.
        format: What kind of file or folder it is.
        arrays: The arrays by their names, or the tree of them that was saved.
        left_out: Why something is no array of numbers, by its name.
        notes: What else is worth knowing, in words.
        settings: The hyperparameters that the file tells, by the name of a layer.
    """

    path: Path
    limit: int | None
    like: Any = None
    format: str = ""
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _bytes: int = 0
    _entries: int = 0

    def reserve(self, size: int) -> None:
        """Raises if these bytes are more than may still be read."""
        self._bytes += size
        if self.limit is not None and self._bytes > self.limit:
            raise ValueError(
                f"it unpacks to {self._bytes} bytes or more, which is more than "
                f"max_bytes={self.limit}"
            )

    def count(self) -> None:
        """Raises if there are too many entries, empty ones included."""
        self._entries += 1
        if self._entries > ENTRIES:
            raise ValueError(f"it has more than {ENTRIES} entries")

    def takes(self, name: str, shape: Any, dtype: Any) -> bool:
        """Reserves an array, or leaves it out and returns False if it holds no numbers."""
        self.count()
        if name in self.arrays:
            raise ValueError(f"it holds two arrays of the name {name!r}")
        if min(shape, default=0) < 0:
            raise ValueError(f"{name!r} has the shape {shape}")
        if not is_numeric(dtype):
            self.left_out[name] = f"array of {_kind(np.dtype(dtype))}"
            return False
        self.reserve(math.prod(shape) * np.dtype(dtype).itemsize)
        return True

    def leave(self, name: str, value: Any, kind: str = "") -> None:
        """Lists something that is no array, unless it is a plain number or text."""
        self.count()
        if not isinstance(value, _PLAIN):
            self.left_out[name] = kind or type(value).__name__

    def leaves(
        self, tree: Any, name: str = "", depth: int = 0
    ) -> Iterator[tuple[str, Any]]:
        """Yields what nested dicts and lists hold, under names joined by dots."""
        self._descend(depth)
        children = _children(tree)
        if children is None:
            yield name, tree
            return
        for key, value in children:
            yield from self.leaves(value, f"{name}.{key}" if name else str(key), depth + 1)

    def numeric(self, tree: Any, name: str = "", depth: int = 0) -> Any:
        """Returns nested dicts and lists as dicts of their arrays, and leaves the rest."""
        self._descend(depth)
        result = {}
        for key, value in _children(tree):
            path = f"{name}/{key}" if name else str(key)
            if _children(value) is not None:
                inner = self.numeric(value, path, depth + 1)
                if inner:
                    result[key] = inner
            elif not isinstance(value, (np.ndarray, np.generic)):
                self.leave(path, value)
            elif self.takes(path, value.shape, value.dtype):
                result[key] = np.asarray(value)
        return result

    def _descend(self, depth: int) -> None:
        self.count()
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH} levels")

    def check_files(self, files: Iterable[Path]) -> None:
        """Raises unless all are files or folders: a pipe or a device never ends."""
        for file in files:
            self.count()
            if not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file} is neither a file nor a folder")

    def check(self) -> None:
        """Raises if nothing was found."""
        if self.arrays:
            return
        shown = [f"{name!r} ({why})" for name, why in self.left_out.items()][:_SHOWN]
        rest = f"; beside {', '.join(shown)}" if shown else ""
        raise ValueError(f"it holds no arrays of numbers{rest}")


def is_numeric(dtype: Any) -> bool:
    """Tells whether an array of this dtype holds numbers or flags."""
    dtype = np.dtype(dtype)
    return jnp.issubdtype(dtype, np.number) or dtype.kind == "b"


def _kind(dtype: np.dtype) -> str:
    if dtype.kind == "O":
        return "Python objects, which only a pickle could store"
    return {"S": "texts", "U": "texts"}.get(dtype.kind, f"{dtype}, which are no numbers")


def _children(tree: Any) -> Any:
    """Returns the keys and values of a container, or None."""
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if isinstance(tree, (list, tuple)) else None
