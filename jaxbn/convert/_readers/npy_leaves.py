"""Reads the leaves that Equinox wrote one after another, given the values they are of."""

from typing import Any, BinaryIO

import jax
import numpy as np

from jaxbn.convert._readers.contents import Contents, RefusedError
from jaxbn.convert._readers.npz import read_npy


def read_leaves(file: BinaryIO, contents: Contents) -> None:
    """Adds the arrays of `contents.like` with the values of a file, or raises."""
    if contents.like is None:
        raise RefusedError(
            "holds arrays in the order of the leaves of a model, as Equinox writes them, "
            "and no names. Pass values of the same structure: convert.load(path, "
            "like=(model, state))."
        )
    try:
        import equinox as eqx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "an .eqx file needs Equinox, which is not installed. Run pip install equinox."
        ) from error
    _check_leaves(file, contents)
    file.seek(0)
    saved = eqx.tree_deserialise_leaves(file, contents.like)
    contents.arrays |= contents.numeric(named(saved))


def _check_leaves(file: BinaryIO, contents: Contents) -> None:
    """Raises unless the file holds arrays of numbers, one after another, to its end."""
    size, number = file.seek(0, 2), 0
    sizes = Contents(contents.path, contents.limit)
    file.seek(0)
    while file.tell() < size:
        read_npy(f"leaf {number}", file, sizes, alone=False)
        number += 1


def named(like: Any) -> dict[str, Any]:
    """Returns the arrays of a model of Equinox and of its `State`, by their names.

    Those of a batch norm's state get the names that `find_equinox` reads.
    """
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    parts = like if isinstance(like, tuple) else (like,)
    states = [part for part in parts if isinstance(part, eqx.nn.State)]
    arrays: dict[str, Any] = {}
    for model in (part for part in parts if not isinstance(part, eqx.nn.State)):
        for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_norm):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            prefix = f"{name}." if name else ""
            if _is_norm(node):
                norm = _norm(node, states)
                arrays |= {prefix + key: np.asarray(value) for key, value in norm.items()}
            elif eqx.is_array(node):
                arrays[name] = np.asarray(node)
    return arrays


def _is_norm(node: Any) -> bool:
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    return isinstance(node, eqx.nn.BatchNorm)


def _norm(norm: Any, states: list[Any]) -> dict[str, Any]:
    """Returns the arrays of a batch norm, those of its state included."""
    arrays = {"weight": norm.weight, "bias": norm.bias}
    for state in states:
        if norm.mode == "batch":
            mean, var = state.get(norm.batch_state_index)
            arrays |= {"hidden_mean": mean, "hidden_var": var}
            arrays["counter"] = state.get(norm.batch_counter)
        else:
            mean, var = state.get(norm.ema_state_index)
            arrays |= {"running_mean": mean, "running_var": var}
            arrays["first_time"] = state.get(norm.ema_first_time_index)
    return {name: array for name, array in arrays.items() if array is not None}
