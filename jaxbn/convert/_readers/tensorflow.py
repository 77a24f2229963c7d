"""Reads checkpoints of TensorFlow 1 and 2 where TensorFlow is installed."""

import glob
import re
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from jaxbn.convert._readers.contents import Contents, RefusedError

_INDEX = ".index"
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_NUMBERED = re.compile(r"(^|/)\d+/\.ATTRIBUTES/VARIABLE_VALUE$")
_RECIPE = (
    "Where it is installed, write the arrays once: "
    'r = tf.train.load_checkpoint("model.ckpt"); np.savez("model.npz", '
    "**{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)


def read_tensorflow(prefix: str, contents: Contents) -> None:
    """Adds the variables of the checkpoint whose files begin with `prefix`, or raises."""
    place = Path(prefix + _INDEX)
    contents.check_files(
        place.parent.glob(glob.escape(place.name.removesuffix(_INDEX)) + ".*")
    )
    try:
        import tensorflow as tf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{prefix} is a checkpoint of TensorFlow, which is not installed. {_RECIPE}."
        ) from error
    # load_checkpoint takes a prefix without a name, as `folder/`, for the folder.
    reader = tf.compat.v1.train.NewCheckpointReader(prefix)
    dtypes = reader.get_variable_to_dtype_map()
    shapes = reader.get_variable_to_shape_map()
    names = _full_names(reader.get_tensor(_GRAPH)) if _GRAPH in shapes else {}
    for key, shape in sorted(shapes.items()):
        dtype, name = dtypes[key], names.get(key, key)
        if name in contents.arrays:
            name = key
        if dtype in (tf.string, tf.resource, tf.variant):
            contents.left_out[name] = "array of texts"
        elif contents.takes(name, tuple(shape), dtype.as_numpy_dtype):
            contents.arrays[name] = np.asarray(reader.get_tensor(key))


def _full_names(graph: bytes) -> dict[str, str]:
    """Returns what variables are called whose place in the object graph is a number."""
    from tensorflow.core.protobuf import (  # pyright: ignore[reportMissingImports]
        trackable_object_graph_pb2,
    )

    nodes = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph).nodes
    return {
        value.checkpoint_key: value.full_name
        for node in nodes
        for value in node.attributes
        if value.full_name and _NUMBERED.search(value.checkpoint_key)
    }


def refuse_index(file: BinaryIO, contents: Contents) -> NoReturn:
    """Raises, since an old checkpoint without an index of its own is read by its folder."""
    raise RefusedError(
        "is a checkpoint of TensorFlow in its oldest format, one file without .index. "
        f"{_RECIPE}."
    )


def refuse_graph(file: BinaryIO, contents: Contents) -> NoReturn:
    """Raises, since a graph is a program."""
    raise RefusedError(
        "is a graph of TensorFlow, a program, and no program of a file is run. Name the "
        "checkpoint: a folder with variables/variables.index, or the prefix of an .index."
    )


def prefix_of(path: Path) -> str | None:
    """Returns the prefix of the checkpoint that a path names, if it names one."""
    text = str(path)
    for prefix in (
        text,
        text.removesuffix(_INDEX),
        text.split(".data-")[0],
        text.removesuffix(".meta"),
    ):
        index = Path(prefix + _INDEX)
        if index.is_file() and (prefix != text or not path.is_file()):
            return prefix
    return None


def newest_prefix(folder: Path) -> tuple[str, int] | None:
    """Returns the prefix of the newest checkpoint in a folder, and of how many."""
    saved = folder / "variables"
    if (folder / "saved_model.pb").is_file() and (saved / "variables.index").is_file():
        return str(saved / "variables"), 1
    found = sorted(folder.glob("*" + _INDEX), key=_order)
    if not found:
        return None
    return str(found[-1]).removesuffix(_INDEX), len(found)


def _order(index: Path) -> Any:
    number = index.name.removesuffix(_INDEX).rpartition("-")[2]
    return (int(number) if number.isdecimal() else -1, index.stat().st_mtime_ns)
