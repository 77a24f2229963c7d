"""Finds the normalization layers of a model by the names and shapes of its arrays."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._norm_names import names_of_role, split_name
from jaxbn._param_roles import names_of
from jaxbn._typing import PyTree
from jaxbn.diagnose._collections import Collections
from jaxbn.diagnose._frameworks import JAX, Framework, framework_of

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NormArrays:
    """A normalization layer: its arrays in float64 without axes, and where they are.

    `leaves` holds the number of each array among the leaves of the whole tree, `dtypes`
    the dtype that it has there. `observes` tells a normalizer of observations, which counts
    its examples: its features have units, and a constant one is no fault.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    leaves: Mapping[str, int]
    dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    framework: Framework = JAX
    observes: bool = False

    def get(self, field: str) -> np.ndarray | None:
        """Returns an array, or None if the layer lacks it."""
        return self.arrays.get(field)

    @property
    def counted(self) -> float | None:
        """The steps that the layer counted, or None where it counts none."""
        count = self.arrays.get("count")
        return None if count is None or not count.size else float(count.max())

    @property
    def is_trained(self) -> bool | None:
        """Whether scale or bias left their initial values, None where it has neither."""
        scale, bias = self.get("scale"), self.get("bias")
        if scale is None and bias is None:
            return None
        moved = scale is not None and bool((scale != 1).any())
        return moved or (bias is not None and bool(bias.any()))

    @property
    def mean(self) -> np.ndarray:
        """The running means."""
        return self.arrays["mean"]

    @property
    def var(self) -> np.ndarray:
        """The running variances."""
        return self.arrays["var"]


def find_norms(tree: PyTree) -> list[NormArrays]:
    """Returns the layers with running statistics, in the natural order of their names.

    Raises:
        TypeError: A leaf of a layer is not an array of numbers.
        ValueError: There is no layer with a mean and a variance of one shape.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    index = {_split(names_of(path)): i for i, (path, _) in enumerate(pairs)}
    index = {path: i for path, i in index.items() if path}
    arrays = [leaf for _, leaf in pairs]
    collections = Collections(tree, index)
    parents = dict.fromkeys(
        base
        for path in index
        if (base := _without(path, names_of_role("mean"))) is not None
    )
    layers = []
    for base in parents:
        leaves = _statistics(base, index)
        if leaves is None:
            continue
        shape = np.shape(arrays[leaves["mean"]])
        if shape != np.shape(arrays[leaves["var"]]):
            continue
        trunk, params = _params(base, index, arrays, shape, collections)
        leaves |= params
        found = {field: _as_float64(arrays[i], base) for field, i in leaves.items()}
        dtypes = {field: getattr(arrays[i], "dtype", None) for field, i in leaves.items()}
        spelling = next(n for n in names_of_role("mean") if _join(base, n) in index)
        layer = NormArrays(
            _name(base, trunk),
            found,
            leaves,
            dtypes,
            framework_of(tree, spelling, base),
            (*base, "count") in index and not params,
        )
        layers.append((base, layer))
    if not layers:
        raise ValueError(
            f"found no running mean and variance among {len(index)} arrays"
            f"{_some('/'.join(path) for path in index)}. Pass params and statistics "
            "together: linen variables, nnx.state(model), or (params, state)."
        )
    return sorted(_told_apart(layers), key=lambda layer: _natural(layer.name))


def _told_apart(layers: list[tuple[Names, NormArrays]]) -> list[NormArrays]:
    """Returns layers of which no two share a name: live and averaged ones do at first."""
    names = [layer.name for _, layer in layers]
    return [
        layer
        if names.count(layer.name) == 1
        else dataclasses.replace(layer, name="/".join(base) or "model")
        for base, layer in layers
    ]


def _statistics(base: Names, index: Mapping[Names, int]) -> dict[str, int] | None:
    """Returns what lies beside a running mean, or None without a variance."""
    leaves = {}
    for field in ("mean", "var", "std", "count"):
        number = _lookup(base, names_of_role(field), index)
        if number is not None:
            leaves[field] = number
    # Beside `mean`, `weight` is that of BatchStats; beside `running_mean`, PyTorch's scale.
    if (*base, "mean") in index and (*base, "weight") in index:
        leaves["weight"] = index[*base, "weight"]
    return leaves if leaves.keys() >= {"mean", "var"} else None


def _params(
    base: Names,
    index: Mapping[Names, int],
    arrays: list[Any],
    shape: tuple[int, ...],
    collections: Collections,
) -> tuple[Names, dict[str, int]]:
    """Returns scale and bias, beside the statistics or in the collection of params."""
    own = base[:-1] if base[-1:] == ("~",) else base
    scales = ("scale",) if (*base, "mean") in index else names_of_role("scale")
    # What counts its examples normalizes observations, and has no params anywhere.
    elsewhere = () if (*base, "count") in index else collections.trunks(own)
    for trunk in (own, *elsewhere):
        found = {
            "scale": _lookup(trunk, scales, index),
            "bias": _lookup(trunk, names_of_role("bias"), index),
        }
        leaves = {field: i for field, i in found.items() if i is not None}
        if leaves and all(np.size(arrays[i]) == np.prod(shape) for i in leaves.values()):
            return trunk, leaves
    return own, {}


def _name(base: Names, trunk: Names) -> str:
    """Returns the path of a layer without the node that says params or statistics."""
    common = [a for a, b in zip(base, trunk, strict=False) if a == b and a != "batch_stats"]
    return "/".join(common) or "model"


def _lookup(
    base: Names, endings: tuple[str, ...], index: Mapping[Names, int]
) -> int | None:
    for ending in endings:
        if (number := index.get(_join(base, ending))) is not None:
            return number
    return None


def _join(base: Names, ending: str) -> Names:
    return (*base, *ending.split("/"))


def _without(path: Names, endings: tuple[str, ...]) -> Names | None:
    for ending in endings:
        tail = tuple(ending.split("/"))
        if path[-len(tail) :] == tail:
            return path[: -len(tail)]
    return None


def _split(names: Names) -> Names:
    """Returns the nodes of a path, those within a flat name included."""
    return tuple(node for name in names for node in split_name(name))


def _as_float64(array: Any, base: Names) -> np.ndarray:
    kind = type(array).__name__
    try:
        array = np.asarray(array)
        wide = np.complex128 if np.iscomplexobj(array) else np.float64
        return array.astype(wide).ravel()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the layer {'/'.join(base) or 'model'} holds {kind} where an array of numbers "
            "was expected. Pass the arrays of params and statistics."
        ) from error


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Returns a key that sorts BatchNorm_10 behind BatchNorm_9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def _some(names: Iterable[str]) -> str:
    first = list(names)[:4]
    return f" ({', '.join(first)}, ...)" if first else ""
