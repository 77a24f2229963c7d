"""Reads checkpoints of every format without executing them, and writes named arrays."""

import contextlib
import functools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxbn.convert._checkpoint import Checkpoint
from jaxbn.convert._readers import tensorflow
from jaxbn.convert._readers.contents import Contents, RefusedError
from jaxbn.convert._readers.folders import read_folder
from jaxbn.convert._readers.formats import NAMED, format_of
from jaxbn.convert._readers.npz import write_npz
from jaxbn.convert._readers.safetensors import write_safetensors

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


def load(
    path: str | os.PathLike[str], *, like: Any = None, max_bytes: int | None = None
) -> dict[str, Any]:
    """Returns the arrays of a checkpoint by their names: `read(path).arrays`.

    Args:
        path: As `read`.
        like: As `read`.
        max_bytes: As `read`.

    Returns:
        A dict from name to array, or nested dicts as they were saved.

    Raises:
        CheckpointError: As `read`.
        ImportError: As `read`.
        OSError: As `read`.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from jaxbn import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.npz")
        ...     convert.save(path, {"bn/scale": np.ones(3)})
        ...     convert.load(path)
        {'bn/scale': array([1., 1., 1.])}
    """
    return read(path, like=like, max_bytes=max_bytes).arrays


def read(
    path: str | os.PathLike[str], *, like: Any = None, max_bytes: int | None = None
) -> Checkpoint:
    """Reads a checkpoint of any format, and executes nothing of it.

    The format is told by the content, and only where that is broken by the suffix. Each is
    read by the package made for it: safetensors, h5py (`.keras`, `.h5`, `.weights.h5`),
    onnx, Flax (msgpack), Orbax, PyTorch with `weights_only=True`, TensorFlow, Equinox.
    docs/convert.md lists them. What is no array of numbers is left out and listed.

    Args:
        path: The file; or the folder that Orbax, Flax or TensorFlow wrote, of several
            checkpoints in it the newest by number; or the prefix of the files of a
            TensorFlow checkpoint.
        like: For a file of Equinox, which stores no names: what was saved, or values of
            the same structure, such as (model, state).
        max_bytes: How many bytes of arrays it may hold, so that a small file cannot ask
            for all memory; None for 1 GiB, or 20 times the size of the file if that is
            more, and for no limit on a folder.

    Returns:
        A `Checkpoint`: the arrays, in the dtypes of the file, and what else was found.

    Raises:
        CheckpointError: A `ValueError`, with the file and the reason: an unknown format;
            truncated, corrupted or pickled content; a program; two arrays of one name;
            more than `max_bytes`.
        ImportError: The package that reads the format is not installed.
        OSError: There is no such file, or it may not be read.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from jaxbn import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.npz")
        ...     convert.save(path, {"bn/scale": np.ones(3)})
        ...     convert.read(path).format
        'npz'
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        kind, read_into = _reader(path, stack)
        limit = max_bytes
        if limit is None and path.is_file():
            limit = max(_GIB, 20 * path.stat().st_size)
        contents = Contents(path, limit, like, kind)
        try:
            read_into(contents)
            contents.check()
        except ImportError:
            raise
        except RefusedError as error:
            raise CheckpointError(f"{contents.path} {error}") from error
        # A parser may raise any exception on a hostile file.
        except Exception as error:
            raise CheckpointError(
                f"{contents.path} cannot be read as {contents.format}: {_reason(error)}. "
                "Nothing of it was loaded; get the file again, or save it anew as "
                ".safetensors."
            ) from error
    return Checkpoint(
        contents.arrays,
        contents.format,
        contents.path,
        contents.left_out,
        tuple(contents.notes),
        contents.settings,
    )


def _reader(
    path: Path, stack: contextlib.ExitStack
) -> tuple[str, Callable[[Contents], None]]:
    """Returns the format of what is there, and what reads it; `stack` closes the file."""
    prefix = tensorflow.prefix_of(path)
    if prefix is not None:
        return "TensorFlow", functools.partial(tensorflow.read_tensorflow, prefix)
    if path.is_dir():
        return "a folder", functools.partial(read_folder, path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Name a file, a folder, or the prefix of a checkpoint."
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder. Name one of them.")
    file = stack.enter_context(path.open("rb"))
    found = format_of(file, path.suffix)
    if found is None:
        raise CheckpointError(
            f"{path} has no known format, expected one of {', '.join(NAMED)}, or a folder. "
            "Rename the file to what it is, or save it as .safetensors."
        )
    return found.name, functools.partial(found.read, file)


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
    if path.suffix.lower() not in _WRITERS:
        raise CheckpointError(
            f"{path} has no known format, expected one of {', '.join(_WRITERS)}. Rename "
            "the file to what it is, or save it as .safetensors."
        )
    write = _WRITERS[path.suffix.lower()]
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


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
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
