"""One table of the formats of files: what tells them by content, and who reads them."""

import contextlib
import zipfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeAlias

from jaxbn.convert._readers.contents import Contents, RefusedError
from jaxbn.convert._readers.hdf5 import read_hdf5, read_keras
from jaxbn.convert._readers.msgpack import read_msgpack
from jaxbn.convert._readers.npy_leaves import read_leaves
from jaxbn.convert._readers.npz import read_npz
from jaxbn.convert._readers.onnx import read_onnx
from jaxbn.convert._readers.safetensors import read_safetensors
from jaxbn.convert._readers.tensorflow import refuse_graph, refuse_index
from jaxbn.convert._readers.torch import read_torch, refuse_torchscript

Read: TypeAlias = Callable[[BinaryIO, Contents], None]


class Probe(NamedTuple):
    """What a file shows of itself: how it begins and ends, and what a zip holds."""

    head: bytes
    tail: bytes
    size: int
    members: frozenset[str]


class Format(NamedTuple):
    """A format of files."""

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[Probe], bool]
    read: Read


def _begins(*magics: bytes) -> Callable[[Probe], bool]:
    return lambda probe: probe.head.startswith(magics)


def _holds(*tails: str) -> Callable[[Probe], bool]:
    return lambda probe: any(name.endswith(tails) for name in probe.members)


def _is_npz(probe: Probe) -> bool:
    return bool(probe.members) and all(name.endswith(".npy") for name in probe.members)


def _is_torch_zip(probe: Probe) -> bool:
    return any(name.endswith("data.pkl") for name in probe.members)


def _is_torch_pickle(probe: Probe) -> bool:
    # The magic number of torch.save before 1.6, as a long, behind any protocol's frame.
    return (
        probe.head[:1] == b"\x80" and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in probe.head[:24]
    )


def _is_safetensors(probe: Probe) -> bool:
    length = int.from_bytes(probe.head[:8], "little")
    return probe.head[8:9] == b"{" and 2 <= length <= probe.size - 8


def _is_msgpack(probe: Probe) -> bool:
    first = probe.head[:1]
    begin = {b"\xde": 3, b"\xdf": 5}.get(first, 1 if b"\x81" <= first <= b"\x8f" else 0)
    key = probe.head[begin : begin + 1]
    return begin > 0 and (b"\xa0" <= key <= b"\xbf" or key in (b"\xd9", b"\xda", b"\xdb"))


def _is_onnx(probe: Probe) -> bool:
    # The version, from 3 on, then the producer, the graph or another field of the model.
    head = probe.head
    return (
        len(head) > 2
        and head[0] == 8
        and 2 < head[1] < 64
        and head[2] in b"\x12\x1a\x22\x28\x32:B"
    )


def _is_tf_index(probe: Probe) -> bool:
    return probe.tail.endswith(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")


def _refuse(words: str) -> Read:
    def refuse(file: BinaryIO, contents: Contents) -> None:
        raise RefusedError(words)

    return refuse


def _none(probe: Probe) -> bool:
    return False


# The first that matches by content counts, then the first by suffix.
FORMATS = (
    Format("TorchScript", (), _holds("/constants.pkl"), refuse_torchscript),
    Format(
        "PyTorch",
        (".pth", ".pt", ".bin", ".th", ".tar", ".ckpt"),
        lambda probe: _is_torch_zip(probe) or _is_torch_pickle(probe),
        read_torch,
    ),
    Format("Keras", (".keras",), _holds("model.weights.h5"), read_keras),
    Format("npz", (".npz",), _is_npz, read_npz),
    Format("safetensors", (".safetensors",), _is_safetensors, read_safetensors),
    Format("HDF5", (".h5", ".hdf5"), _begins(b"\x89HDF\r\n\x1a\n"), read_hdf5),
    Format("npy leaves", (".eqx", ".npy"), _begins(b"\x93NUMPY"), read_leaves),
    Format(
        "pickle",
        (".pkl", ".pickle"),
        _begins(*(b"\x80" + bytes([version]) for version in range(2, 6))),
        _refuse(
            "is a pickle, which may run anything, and it is refused. Where you trust it, "
            'save its arrays: convert.save("model.safetensors", arrays).'
        ),
    ),
    Format("TensorFlow", (), _is_tf_index, refuse_index),
    Format(
        "Git LFS",
        (),
        _begins(b"version https://git-lfs"),
        _refuse("is a pointer of Git LFS and not the file itself. Run git lfs pull."),
    ),
    Format(
        "web page",
        (),
        _begins(b"<!DOCTYPE", b"<!doctype", b"<html"),
        _refuse("is a web page: the download failed. Get the file again."),
    ),
    Format(
        "packed",
        (".gz", ".xz", ".bz2", ".zst"),
        _begins(b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"),
        _refuse("is packed. Unpack it first, e.g. with gunzip, unxz or unzstd."),
    ),
    Format("ONNX", (".onnx",), _is_onnx, read_onnx),
    Format("Flax msgpack", (".msgpack", ".flax"), _is_msgpack, read_msgpack),
    Format("TensorFlow graph", (".pb",), _none, refuse_graph),
)
NAMED = sorted({s for format in FORMATS[:7] + FORMATS[-3:-1] for s in format.suffixes})


def format_of(file: BinaryIO, suffix: str) -> Format | None:
    """Returns the format of a file by its content, or else by its suffix, or None."""
    probe = _probe(file)
    for format in FORMATS:
        if format.matches(probe):
            return format
    for format in FORMATS:
        if suffix.lower() in format.suffixes:
            return format
    return None


def _probe(file: BinaryIO) -> Probe:
    size = file.seek(0, 2)
    file.seek(max(0, size - 64))
    tail = file.read(64)
    file.seek(0)
    head = file.read(64)
    names: frozenset[str] = frozenset()
    if head.startswith(b"PK"):
        # What is broken is told by the reader that the suffix names.
        with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:
            names = frozenset(archive.namelist())
    file.seek(0)
    return Probe(head, tail, size, names)
