"""Reads HDF5 files, those of Keras by the names of its variables, without running any."""

import math
import zipfile
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._readers.contents import DEPTH, Contents
from jaxbn.convert._readers.keras_names import LayerConfigs, name_variables
from jaxbn.convert._readers.npz import members

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
# Deflate, shuffle, fletcher32, szip, nbit, scale-offset and lzf: those without a plugin.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}


def read_hdf5(file: BinaryIO, contents: Contents) -> None:
    """Adds the arrays of a file, or raises."""
    _read(file, contents, LayerConfigs())


def read_keras(file: BinaryIO, contents: Contents) -> None:
    """Adds the variables of a .keras file, whose config is read as text, or raises."""
    with zipfile.ZipFile(file) as archive:
        names = {member.filename for member in members(archive, contents)}
        configs = LayerConfigs()
        if _CONFIG in names:
            configs = LayerConfigs.of(archive.read(_CONFIG))
        with archive.open(_WEIGHTS) as weights:
            _read(weights, contents, configs)


def _read(file: Any, contents: Contents, configs: LayerConfigs) -> None:
    h5py = _package()
    with h5py.File(file, "r") as opened:
        text = opened.attrs.get("model_config")
        if isinstance(text, (str, bytes)):
            configs = LayerConfigs.of(text)
        arrays: dict[str, np.ndarray] = {}
        layers: dict[str, str] = {}
        _walk(opened, "", 0, contents, arrays, layers)
    contents.arrays |= name_variables(arrays, layers, configs, contents)


def _walk(
    group: Any,
    path: str,
    depth: int,
    contents: Contents,
    arrays: dict[str, np.ndarray],
    layers: dict[str, str],
) -> None:
    """Collects the arrays below a group by their paths, and the names of Keras' layers."""
    h5py = _package()
    if depth > DEPTH:
        raise ValueError(f"it is nested deeper than {DEPTH} levels")
    name = group.attrs.get("name")
    if isinstance(name, str):
        layers[path] = name
    for key in group:
        contents.count()
        inner = f"{path}/{key}" if path else key
        # The other kinds of links may lead into other files.
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            contents.left_out[inner] = "a link, which is not followed"
            continue
        node = group[key]
        if isinstance(node, h5py.Group):
            _walk(node, inner, depth + 1, contents, arrays, layers)
        elif isinstance(node, h5py.Dataset):
            array = _array(inner, node, contents)
            if array is not None:
                arrays[inner] = array
        else:
            contents.left_out[inner] = "a named type"


def _array(name: str, dataset: Any, contents: Contents) -> np.ndarray | None:
    if dataset.external or dataset.is_virtual:
        contents.left_out[name] = "an array whose values lie in other files"
        return None
    if dataset.shape is None:
        contents.left_out[name] = "an array without values"
        return None
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"{name!r} is packed by the filters {filters}, which need plugins")
    halves = dataset.dtype.kind == "V" and dataset.attrs.get("dtype") == "bfloat16"
    dtype = np.dtype(jnp.bfloat16) if halves else dataset.dtype
    if not contents.takes(name, dataset.shape, dtype):
        return None
    # A chunk may be far larger than the array, and is unpacked as a whole.
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if contents.limit is not None and chunk > contents.limit:
        raise ValueError(f"a chunk of {name!r} is larger than max_bytes={contents.limit}")
    array = np.asarray(dataset[()])
    return array.view(dtype) if halves else array.astype(dtype.newbyteorder("="))


def _package() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "a file of Keras is HDF5, and the package h5py that reads it is missing. "
            "Run pip install 'jaxbn[convert]'."
        ) from error
    return h5py
