"""Reads the folders that Orbax writes, as NumPy arrays."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn.convert._readers.contents import Contents

_STEP = re.compile(r"(.*?)[_\-.]?(\d+)")
_ITEM, _CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"
# Orbax before 0.2 wrote all arrays into one file of msgpack.
LEGACY = "checkpoint"


def read_orbax(path: Path, contents: Contents) -> None:
    """Adds the tree of a checkpoint, or of several items a dict of them, or raises."""
    items = items_of(path)
    contents.check_files(path.rglob("*"))
    for item in items:
        tree = contents.numeric(_read(item, contents), "" if item == path else item.name)
        if len(items) == 1:
            contents.arrays |= {str(name): part for name, part in tree.items()}
        elif tree:
            contents.arrays[item.name] = tree
    if len(contents.arrays) == 1 and len(items) > 1:
        # One item alone holds arrays: Keras keeps its config beside it.
        (only,) = contents.arrays.values()
        contents.arrays = dict(only)


def is_one_step(path: Path) -> bool:
    """Tells whether a folder says of itself that it is a checkpoint."""
    return (path / _CHECKPOINT).is_file() or (path / _ITEM).is_file()


def is_checkpoint(path: Path) -> bool:
    """Tells whether a folder is a checkpoint of one step, or holds items of one."""
    return is_one_step(path) or bool(items_of(path))


def items_of(path: Path) -> list[Path]:
    """Returns the folders of arrays in that of a checkpoint, which may be itself."""
    if (path / _ITEM).is_file():
        return [path]
    return sorted(inner for inner in _folders(path) if (inner / _ITEM).is_file())


def newest_step(path: Path) -> tuple[Path, int] | None:
    """Returns the newest checkpoint by number in a folder of several, and of how many."""
    steps: dict[Path, int] = {}
    for inner in _folders(path):
        number = _STEP.fullmatch(inner.name)
        if number and (is_checkpoint(inner) or (inner / LEGACY).is_file()):
            steps[inner] = int(number[2])
    if not steps:
        return None
    newest = [step for step, number in steps.items() if number == max(steps.values())]
    if len(newest) > 1:
        names = ", ".join(sorted(step.name for step in newest))
        raise ValueError(f"it holds several newest steps: {names}. Name one of them")
    return newest[0], len(steps)


def _folders(path: Path) -> list[Path]:
    return [
        inner for inner in path.iterdir() if inner.is_dir() and "tmp" not in inner.suffix
    ]


def _read(item: Path, contents: Contents) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"{item} is a folder, which Orbax reads, and Orbax is not installed. Run "
            "pip install 'jaxbn[diagnose]', or pip install orbax-checkpoint."
        ) from error
    level = logging.getLogger("absl").level
    # Orbax logs that an item alone is not a whole checkpoint, and reads it all the same.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(item.resolve()).item_metadata
            _check_size(saved, contents)
            # NumPy arrays, since the devices they were saved from may not be here.
            kinds = jax.tree.map(_restored_as(ocp), saved)
            return checkpointer.restore(item.resolve(), restore_args=kinds)
    finally:
        logging.getLogger("absl").setLevel(level)


def _restored_as(ocp: Any) -> Any:
    def kind(leaf: Any) -> Any:
        is_array = hasattr(leaf, "shape")
        return ocp.RestoreArgs(restore_type=np.ndarray) if is_array else ocp.RestoreArgs()

    return kind


def _check_size(saved: Any, contents: Contents) -> None:
    """Raises before anything is read if it is more than the limit allows."""
    arrays = [leaf for leaf in jax.tree.leaves(saved) if hasattr(leaf, "shape")]
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays)
    if contents.limit is not None and size > contents.limit:
        raise ValueError(
            f"it holds {size} bytes of arrays, more than max_bytes={contents.limit}"
        )
