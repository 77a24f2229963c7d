"""Reads files of torch.save with PyTorch's unpickler that loads only tensors."""

import contextlib
import pickle
import re
import warnings
import zipfile
from typing import Any, BinaryIO, NoReturn

from jaxbn.convert._arrays import from_tensor
from jaxbn.convert._readers.contents import Contents, RefusedError
from jaxbn.convert._readers.npz import members
from jaxbn.convert._readers.numpy_pickles import StandInArray, stand_ins

_GLOBAL = re.compile(r"(?:global|GLOBAL):? ?(?:GLOBAL )?([\w.]+)")


def read_torch(file: BinaryIO, contents: Contents) -> None:
    """Adds the tensors of a file, and the NumPy arrays beside them, or raises."""
    torch = _package()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members(archive, contents)
    file.seek(0)
    for name, leaf in contents.leaves(_unpickled(torch, file)):
        if isinstance(leaf, StandInArray):
            array = leaf.array()
            if array is None:
                contents.left_out[name] = "NumPy array that is not of numbers"
            elif contents.takes(name, array.shape, array.dtype):
                contents.arrays[name] = array
        elif isinstance(leaf, torch.Tensor):
            if name in contents.arrays:
                raise ValueError(f"it holds two arrays of the name {name!r}")
            # A tensor may repeat few stored numbers many times.
            contents.reserve(leaf.numel() * leaf.element_size())
            contents.arrays[name] = from_tensor(name, leaf)
        else:
            contents.leave(name, leaf, getattr(leaf, "kind", ""))


def refuse_torchscript(file: BinaryIO, contents: Contents) -> NoReturn:
    """Raises, since a script is a program."""
    raise RefusedError(
        "is TorchScript, which is a program, and no program of a file is run. Where you "
        'trust it, take the arrays: torch.save(torch.jit.load("model.pt", map_location='
        '"cpu").state_dict(), "state.pth").'
    )


def _unpickled(torch: Any, file: BinaryIO) -> Any:
    # An older PyTorch refuses what a newer one lets stand in for NumPy's values.
    allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    try:
        with warnings.catch_warnings(), allow(stand_ins()):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message is dropped, since it advises to unpickle the file anyway.
        found = _GLOBAL.search(str(error).replace("Unsupported ", ""))
        what = f" ({found[1]})" if found else ""
        reason = f"it holds more than tensors{what}, or is broken; running it is refused"
        raise ValueError(reason) from (None if "weights_only" in str(error) else error)


def _package() -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "a file of torch.save needs PyTorch. Install it (pip install torch), or "
            "convert the file where it is installed: safetensors.torch.save_file("
            'torch.load("model.pth", weights_only=True), "model.safetensors").'
        ) from error
    return torch
