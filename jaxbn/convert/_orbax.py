"""Reads the arrays of a checkpoint, whichever of the formats it is in."""

from os import PathLike
from pathlib import Path

import jax
import numpy as np

from jaxbn._typing import PyTree


def read_checkpoint(path: str | PathLike[str]) -> PyTree:
    """Returns the arrays of a file, or of a folder that Orbax wrote.

    Of a folder with the checkpoints of several steps, the last is read.

    Raises:
        ImportError: The package of the format is not installed.
        OSError: There is no such file, or it cannot be read.
        ValueError: The content is not that of a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Name a file or an Orbax folder.")
    if path.is_dir():
        return _read_orbax(path)
    # Here, since a checkpoint of Orbax needs nothing of it.
    from jaxbn.convert._files import load

    return load(path)


def _read_orbax(path: Path) -> PyTree:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, which Orbax reads, and Orbax is not installed. Run "
            "pip install orbax-checkpoint."
        ) from error
    steps = [child for child in path.iterdir() if child.is_dir() and child.name.isdecimal()]
    if steps:
        path = max(steps, key=lambda child: int(child.name))
    # What a manager saved together lies in folders of its own.
    items = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    item = next((each for each in items if (each / "_METADATA").exists()), None)
    if item is None:
        raise ValueError(
            f"{path} holds no checkpoint of Orbax: there is no _METADATA. Name the folder "
            "that the checkpointer was given."
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(item.resolve()).item_metadata
            # As NumPy arrays, whatever devices they were saved from.
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
            )
            return checkpointer.restore(item.resolve(), restore_args=as_numpy)
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(
            f"{item} cannot be read by Orbax: {_first_line(error)}. It is damaged or not "
            "complete; take an older checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
