"""Reads the initializers of ONNX models, and what its BatchNormalization nodes take."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np

from jaxbn._norm_names import TORCH, layer_of
from jaxbn.convert._readers.contents import DEPTH, Contents

_INPUTS = ("scale", "bias", "mean", "var")


def read_onnx(file: BinaryIO, contents: Contents) -> None:
    """Adds the initializers of a model, those of a batch norm by PyTorch's names."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "an .onnx file needs the package onnx, which is not installed. Run "
            "pip install 'jaxbn[convert]'."
        ) from error
    size = file.seek(0, 2)
    if contents.limit is not None and size > contents.limit:
        raise ValueError(f"its {size} bytes are more than max_bytes={contents.limit}")
    file.seek(0)
    model = onnx.load_model(file, format="protobuf", load_external_data=False)
    nodes, arrays = [], {}
    for graph in _graphs(model.graph, contents, 0):
        nodes += graph.node
        for tensor in graph.initializer:
            _add(tensor.name, tensor, arrays, contents)
        for node in graph.node:
            if node.op_type == "Constant":
                for value in node.attribute:
                    if value.name == "value" and node.output:
                        _add(node.output[0], value.t, arrays, contents)
    taken = _norms(nodes, arrays, contents)
    rest = {name: array for name, array in arrays.items() if name not in taken}
    twice = rest.keys() & contents.arrays.keys()
    if twice:
        raise ValueError(f"it holds two arrays of the name {min(twice)!r}")
    contents.arrays |= rest


def _graphs(graph: Any, contents: Contents, depth: int) -> Iterator[Any]:
    if depth > DEPTH:
        raise ValueError(f"it is nested deeper than {DEPTH} levels")
    yield graph
    for node in graph.node:
        contents.count()
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner, contents, depth + 1)


def _add(name: str, tensor: Any, arrays: dict[str, Any], contents: Contents) -> None:
    from onnx import TensorProto, helper, numpy_helper

    if name in arrays:
        raise ValueError(f"it holds two arrays of the name {name!r}")
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        contents.left_out[name] = "array of texts"
        return
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if not contents.takes(name, tuple(tensor.dims), dtype):
        return
    if tensor.data_location == TensorProto.EXTERNAL:
        _load_external(name, tensor, contents)
    arrays[name] = np.array(numpy_helper.to_array(tensor))


def _load_external(name: str, tensor: Any, contents: Contents) -> None:
    """Reads the values of a tensor from a file beside the model, and nowhere else."""
    from onnx import external_data_helper

    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = PurePath(entries.get("location", ""))
    beside = contents.path.parent / place
    if place.is_absolute() or ".." in place.parts or beside.is_symlink():
        raise ValueError(f"the values of {name!r} lie outside of its folder, at {place}")
    if not beside.is_file():
        raise ValueError(f"the values of {name!r} lie in {place}, which is not there")
    if contents.limit is not None:
        contents.reserve(min(beside.stat().st_size, int(entries.get("length", 0))))
    external_data_helper.load_external_data_for_tensor(tensor, str(contents.path.parent))
    # ONNX before 1.23 would look for the file again, in the working directory.
    tensor.ClearField("data_location")


def _norms(nodes: list[Any], arrays: dict[str, Any], contents: Contents) -> set[str]:
    """Adds the batch norms whose arrays are constants; returns the names of these."""
    # An array that several layers share goes through nodes that copy it.
    copies = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity" and n.input}
    taken: set[str] = set()
    for node in nodes:
        if node.op_type != "BatchNormalization" or len(node.input) != 5:
            continue
        names = [n if n in arrays else copies.get(n, n) for n in node.input[1:]]
        if any(name not in arrays for name in names):
            contents.left_out[node.name or node.output[0]] = "batch norm of computed arrays"
            continue
        layer = layer_of(names[2], "mean") or node.name or node.output[0]
        if layer in contents.settings:
            layer = f"{layer}.{len(contents.settings)}"
        for role, name in zip(_INPUTS, names, strict=True):
            contents.arrays[f"{layer}.{TORCH[role]}"] = arrays[name]
            taken.add(name)
        # As short as they were written, before they became float32.
        given = {a.name: float(str(np.float32(a.f))) for a in node.attribute}
        contents.settings[layer] = {
            "eps": given.get("epsilon", 1e-5),
            "momentum": round(1 - given.get("momentum", 0.9), 9),
        }
    return taken
