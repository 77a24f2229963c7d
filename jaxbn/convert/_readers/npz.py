"""Reads and writes .npz files: zips of .npy arrays of numbers, and never a pickle."""

import io
import math
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from jaxbn.convert._readers.contents import Contents

_SUFFIX = ".npy"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(file: BinaryIO, contents: Contents) -> None:
    """Adds the arrays of a file, or raises."""
    with zipfile.ZipFile(file) as archive:
        for member in members(archive, contents):
            name = member.filename.removesuffix(_SUFFIX)
            if name == member.filename:
                raise ValueError(f"its member {name!r} is not an array (.npy)")
            with archive.open(member) as content:
                array = read_npy(name, io.BytesIO(content.read()), contents, alone=True)
            if array is not None:
                contents.arrays[name] = array


def members(archive: zipfile.ZipFile, contents: Contents) -> list[zipfile.ZipInfo]:
    """Returns the members of a zip that unpacks to what its limit allows, or raises."""
    infos = archive.infolist()
    total = sum(info.file_size for info in infos)
    if contents.limit is not None and total > contents.limit:
        raise ValueError(
            f"it unpacks to {total} bytes, which is more than max_bytes={contents.limit}"
        )
    if len({info.filename for info in infos}) < len(infos):
        names = [info.filename for info in infos]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it holds two arrays of the name {twice.removesuffix(_SUFFIX)!r}")
    return infos


def read_npy(
    name: str, file: BinaryIO, contents: Contents, *, alone: bool
) -> np.ndarray | None:
    """Returns the array that comes next, or None if it is left out.

    An array that is `alone` is all that its file holds.
    """
    begin = file.tell()
    try:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"format version {version} is that of structured arrays")
        shape, _, dtype = _HEADERS[version](file)
    except Exception as error:
        raise ValueError(f"the header of {name!r} is broken ({error})") from error
    if dtype.kind == "V":
        check_numbers(name, dtype)
    takes = contents.takes(name, shape, dtype)
    if not takes and alone:
        return None
    if dtype.hasobject:
        check_numbers(name, dtype)
    # Checked first, since NumPy allocates as much memory as the header asks for.
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    rest = file.seek(0, 2) - start
    if size > rest or (alone and size < rest):
        raise ValueError(
            f"{name!r} of shape {shape} and dtype {dtype} does not fit its {rest} bytes"
        )
    file.seek(begin)
    array = npy.read_array(file, allow_pickle=False)
    return array.astype(dtype.newbyteorder("="), copy=False) if takes else None


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
