"""Reads and writes .npz files: zips of .npy arrays of numbers, and never a pickle."""

import io
import math
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

_SUFFIX = ".npy"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(file: BinaryIO, limit: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a file of at most `limit` bytes of arrays, or raises."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > limit:
            raise ValueError(
                f"it unpacks to {total} bytes, which is more than max_bytes={limit}"
            )
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(_SUFFIX)
            if name == member.filename:
                raise ValueError(f"its member {name!r} is not an array (.npy)")
            if name in arrays:
                raise ValueError(f"it holds two arrays of the name {name!r}")
            with archive.open(member) as content:
                arrays[name] = _array(name, content.read())
        return arrays


def _array(name: str, content: bytes) -> np.ndarray:
    buffer = io.BytesIO(content)
    try:
        version = npy.read_magic(buffer)
        if version not in _HEADERS:
            raise ValueError(f"format version {version} is that of structured arrays")
        shape, _, dtype = _HEADERS[version](buffer)
    except Exception as error:
        raise ValueError(f"the header of {name!r} is broken ({error})") from error
    check_numbers(name, dtype)
    # Checked first, since NumPy allocates as much memory as the header asks for.
    size = len(content) - buffer.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(
            f"{name!r} of shape {shape} and dtype {dtype} does not fit its {size} bytes"
        )
    buffer.seek(0)
    array = npy.read_array(buffer, allow_pickle=False)
    return array.astype(dtype.newbyteorder("="), copy=False)


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, uncompressed and with no time of their own."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            check_numbers(name, array.dtype)
            member = zipfile.ZipInfo(name + _SUFFIX)
            with archive.open(member, "w", force_zip64=True) as content:
                npy.write_array(content, array, allow_pickle=False)


def check_numbers(name: str, dtype: np.dtype) -> None:
    """Raises unless an array of `dtype` is one of numbers that .npy has a name for."""
    if dtype.kind in "biufc" and issubclass(dtype.type, (np.number, np.bool_)):
        return
    why = "has no name in .npz, as bfloat16 has none; .safetensors names it"
    if dtype.kind == "O":
        why = "holds Python objects, which only a pickle could store"
    elif dtype.kind in "SUmM":
        why = "is not of numbers"
    raise ValueError(f"{name!r} of dtype {dtype} {why}")
