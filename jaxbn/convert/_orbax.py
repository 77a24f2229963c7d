"""Reads the folders that Orbax writes, as NumPy arrays."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np


def read_orbax(path: Path, max_bytes: int | None) -> Any:
    """Returns the arrays of a folder in the tree that was saved, or raises.

    Of a folder with the checkpoints of several steps, the last is read.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, which Orbax reads, and Orbax is not installed. Run "
            "pip install 'jaxbn[diagnose]', or pip install orbax-checkpoint."
        ) from error
    item = _item(path)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(item.resolve()).item_metadata
            size = _size(saved)
            if max_bytes is None or size <= max_bytes:
                # NumPy arrays, since the devices they were saved from may not be here.
                as_numpy = jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
                )
                return checkpointer.restore(item.resolve(), restore_args=as_numpy)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(
            f"{item} cannot be read by Orbax: {_first_line(error)}. It is damaged or not "
            "complete; take an older checkpoint."
        ) from error
    raise ValueError(
        f"{item} holds {size} bytes of arrays, more than max_bytes={max_bytes}. Raise the "
        "limit if you trust it."
    )


def _item(path: Path) -> Path:
    """Returns the folder of the arrays in that of a checkpoint or of several steps."""
    steps = [child for child in path.iterdir() if child.is_dir() and child.name.isdecimal()]
    if steps:
        path = max(steps, key=lambda child: int(child.name))
    # A CheckpointManager saves each item in a folder below that of the step.
    for item in [path, *sorted(child for child in path.iterdir() if child.is_dir())]:
        if (item / "_METADATA").exists():
            return item
    raise ValueError(
        f"{path} holds no checkpoint of Orbax: there is no _METADATA. Name the folder "
        "that the checkpointer was given."
    )


def _size(saved: Any) -> int:
    arrays = [leaf for leaf in jax.tree.leaves(saved) if hasattr(leaf, "shape")]
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
