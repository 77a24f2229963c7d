"""Tells what kind of checkpoint a folder holds, and which of several is the newest."""

import re
from pathlib import Path

from jaxbn.convert._readers import orbax, tensorflow
from jaxbn.convert._readers.contents import Contents
from jaxbn.convert._readers.msgpack import read_msgpack

_FLAX = re.compile(r".*?(\d+)")
_KNOWN = (
    "Known are those of Orbax (_METADATA), of TensorFlow (.index) and of Flax "
    "(checkpoint_N). Name the file, or the folder that the checkpointer was given"
)


def read_folder(path: Path, contents: Contents) -> None:
    """Adds what a folder holds, of several checkpoints the newest."""
    if orbax.is_one_step(path):
        _orbax(path, contents)
    elif found := tensorflow.newest_prefix(path):
        prefix, number = found
        _note(contents, Path(prefix), number)
        contents.format = "TensorFlow"
        tensorflow.read_tensorflow(prefix, contents)
    elif (path / orbax.LEGACY).is_file():
        _msgpack(path / orbax.LEGACY, contents)
    elif found := orbax.newest_step(path):
        step, number = found
        _note(contents, step, number)
        if orbax.is_checkpoint(step):
            _orbax(step, contents)
        else:
            _msgpack(step / orbax.LEGACY, contents)
    elif orbax.is_checkpoint(path):
        _orbax(path, contents)
    elif found := _newest_file(path):
        file, number = found
        _note(contents, file, number)
        _msgpack(file, contents)
    else:
        raise ValueError(f"it holds no checkpoint. {_KNOWN}")


def _orbax(path: Path, contents: Contents) -> None:
    contents.format = "Orbax"
    orbax.read_orbax(path, contents)


def _msgpack(path: Path, contents: Contents) -> None:
    contents.format = "Flax msgpack"
    with path.open("rb") as file:
        read_msgpack(file, contents)


def _newest_file(path: Path) -> tuple[Path, int] | None:
    """Returns the newest of files such as checkpoint_100, which flax.training writes."""
    files = {
        file: int(match[1])
        for file in path.iterdir()
        if (match := _FLAX.fullmatch(file.name)) and file.is_file()
    }
    return (max(files, key=files.__getitem__), len(files)) if files else None


def _note(contents: Contents, path: Path, number: int) -> None:
    contents.path = path
    if number > 1:
        contents.notes.append(f"{path.name} is the newest of {number} checkpoints")
