"""Reads and writes .safetensors files, bfloat16 and float8 included."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._readers.contents import Contents

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


def read_safetensors(file: BinaryIO, contents: Contents) -> None:
    """Adds the arrays of a file, or raises."""
    contents.reserve(file.seek(0, 2))
    file.seek(0)
    content = file.read()
    tensors = dict(_package().deserialize(content))
    for name in _names(content):
        tensor = tensors[name]
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {tensor['dtype']}")
        dtype = np.dtype(_DTYPES[tensor["dtype"]])
        flat = np.frombuffer(tensor["data"], dtype.newbyteorder("<"))
        contents.count()
        contents.arrays[name] = flat.astype(dtype).reshape(tensor["shape"])


def write_safetensors(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays as the package does."""
    known = {np.dtype(dtype) for dtype in _DTYPES.values()}
    for name, array in arrays.items():
        if array.dtype.newbyteorder("=") not in known:
            raise ValueError(f"{name!r} has the dtype {array.dtype}, unknown to the format")
    _package()
    from safetensors.numpy import save

    plain = {
        name: np.asarray(array, array.dtype.newbyteorder("="), order="C")
        for name, array in arrays.items()
    }
    file.write(save(plain))


def _names(content: bytes) -> list[str]:
    """Returns the names of a header that the package found sound, or raises on a double."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it holds two entries of one name")
        return dict(pairs)

    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size], object_pairs_hook=once)
    return [name for name in header if name != "__metadata__"]


def _package() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors, which is not installed. "
            "Run pip install 'jaxbn[convert]'."
        ) from error
    return safetensors
