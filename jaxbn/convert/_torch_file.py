"""Reads files of torch.save with PyTorch's unpickler that loads only tensors."""

import pickle
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxbn.convert._arrays import from_tensor

# Limits against hostile files; no real checkpoint comes near them.
_DEPTH, _ENTRIES = 16, 1_000_000


def read_torch(file: BinaryIO, limit: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of at most `limit` bytes of them, or raises."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "a file of torch.save needs PyTorch. Install it (pip install torch), or "
            "convert the file where it is installed: safetensors.torch.save_file("
            'torch.load("model.pth", weights_only=True), "model.safetensors").'
        ) from error
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message is dropped, since it advises to unpickle the file anyway.
        reason = "it holds more than tensors, or is broken, and running it is refused"
        raise ValueError(reason) from (None if "weights_only" in str(error) else error)
    arrays, total = {}, 0
    for count, (name, leaf) in enumerate(_leaves(tree, "", 0)):
        if count > _ENTRIES:
            raise ValueError(f"it has more than {_ENTRIES} entries")
        if not isinstance(leaf, torch.Tensor):
            continue
        if name in arrays:
            raise ValueError(f"it holds two tensors of the name {name!r}")
        total += leaf.numel() * leaf.element_size()
        if total > limit:
            raise ValueError(f"its tensors are larger than max_bytes={limit}")
        arrays[name] = from_tensor(name, leaf)
    if not arrays:
        raise ValueError("it holds no tensors")
    return arrays


def _leaves(tree: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEPTH:
        raise ValueError(f"it is nested deeper than {_DEPTH} levels")
    if isinstance(tree, Mapping):
        entries = tree.items()
    elif isinstance(tree, (list, tuple)):
        entries = enumerate(tree)
    else:
        yield name, tree
        return
    for key, value in entries:
        yield from _leaves(value, f"{name}.{key}" if name else str(key), depth + 1)
