"""Reads checkpoints of every format without executing them, and writes named arrays."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxbn.convert._npz import read_npz, write_npz
from jaxbn.convert._orbax import read_orbax
from jaxbn.convert._safetensors import read_safetensors, write_safetensors
from jaxbn.convert._torch_file import read_torch

_READERS = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
}
_WRITERS = {".safetensors": write_safetensors, ".npz": write_npz}
_GIB = 2**30


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one that can be read safely.

    Example:
        >>> from jaxbn import convert
        >>> convert.save("model.pickle", {})
        Traceback (most recent call last):
        jaxbn.convert.CheckpointError: model.pickle has no known format, ...
    """


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Any]:
    """Returns the arrays of a checkpoint by their names.

    A `.safetensors` file is read by the package safetensors, bfloat16 and float8 included;
    an `.npz` file without pickle; a `.pth`, `.pt` or `.bin` file by
    `torch.load(weights_only=True)` where PyTorch is installed, the dicts and lists in it
    flattened into names with dots and what is not a tensor left out. A folder is read by
    Orbax, of several steps the last. Nothing in a file is ever executed.

    Args:
        path: The file, or the folder that Orbax wrote.
        max_bytes: How many bytes of arrays the file may hold, so that a small file cannot
            ask for all memory; None for 1 GiB, or 20 times the size of the file if that
            is more, and for no limit on a folder.

    Returns:
        A dict from name to array, in the dtypes of the file; of a folder, dicts nested as
        they were saved, which the functions of this package take as well.

    Raises:
        CheckpointError: A `ValueError`, with the file and the reason: an unknown format;
            truncated, corrupted or pickled content; two arrays of one name; more than
            `max_bytes`.
        ImportError: The package that reads the format is not installed.
        OSError: There is no such file, or it may not be read.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from jaxbn import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.npz")
        ...     convert.save(path, {"bn/scale": np.ones(3)})
        ...     convert.load(path)
        {'bn/scale': array([1., 1., 1.])}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Name a file or an Orbax folder.")
    if path.is_dir():
        try:
            return read_orbax(path, max_bytes)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    read = _of_format(path, _READERS)
    with path.open("rb") as file:
        limit = max_bytes
        if limit is None:
            limit = max(_GIB, 20 * os.fstat(file.fileno()).st_size)
        try:
            return read(file, limit)
        except (ImportError, MemoryError):
            raise
        # A parser may raise any exception on a hostile file.
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read as {path.suffix}: {_reason(error)}. Nothing of it "
                "was loaded; get the file again, or save it anew as .safetensors."
            ) from error


def save(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays under their names to a `.safetensors` or an `.npz` file.

    All or nothing: the file is written beside `path` and then takes its place, so that a
    crash leaves what was there before.

    Args:
        path: The file; its suffix tells the format.
        arrays: The arrays, of numbers, by their names. An `.npz` has no name for bfloat16
            and float8; a `.safetensors` none for complex128.

    Raises:
        CheckpointError: A `ValueError`: the suffix is unknown; an array has a dtype or a
            name that the format cannot hold.
        ImportError: safetensors is not installed.
        OSError: The file cannot be written.

    Example:
        >>> import jax.numpy as jnp, tempfile, pathlib
        >>> from jaxbn import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     convert.save(path, {"weight": jnp.ones(3, jnp.bfloat16)})
        ...     convert.load(path)["weight"].dtype
        dtype(bfloat16)
    """
    path = Path(path)
    write = _of_format(path, _WRITERS)
    for name in arrays:
        if not isinstance(name, str) or not name or "\0" in name:
            raise CheckpointError(
                f"{path} cannot hold an array of the name {name!r}. Names are texts, not "
                "empty and without NUL."
            )
    held = {name: np.asarray(array) for name, array in arrays.items()}
    with _taking_the_place_of(path) as file:
        try:
            write(file, held)
        except (ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be written as {path.suffix}: {_reason(error)}. Nothing was "
                "written; convert that array first."
            ) from error


def _of_format(path: Path, formats: Mapping[str, Any]) -> Any:
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        raise CheckpointError(
            f"{path} has no known format, expected one of {', '.join(formats)}. Rename the "
            "file to what it is, or save it as .safetensors."
        ) from None


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n", 1)[0].rstrip(".")
    return first[:300] or type(error).__name__


@contextlib.contextmanager
def _taking_the_place_of(path: Path) -> Iterator[BinaryIO]:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
