"""A batch norm that came from another library, and its way back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from jaxbn._layers.batch_renorm import RenormStats
from jaxbn._layers.normalizer import Normalizer
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn.convert._array_names import Dialect, Part, flatten
from jaxbn.convert._arrays import Values

Read: TypeAlias = Callable[[Part], Values]
# From a layer and the arrays that it came from, which may be none, to arrays.
Write: TypeAlias = Callable[["Converted", Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a layer was read from: arrays and spellings by role, and what they became."""

    dialect: Dialect
    spellings: Mapping[str, str]
    arrays: Mapping[str, np.ndarray]
    written: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A batch norm as jaxbn has it, and where it came from.

    Training goes on with `bn.apply(params, state, x, training)`. To write a trained layer
    back, put the new values in: `dataclasses.replace(layer, params=..., state=...)`. One
    that never was elsewhere is written as `Converted(bn, params, state)`.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(feature_axes=1, use_bias=False)
        >>> list(convert.to_torch(convert.Converted(bn, *bn.init(3)), "bn1"))
        ['bn1.weight', 'bn1.running_mean', 'bn1.running_var', 'bn1.num_batches_tracked']

    Attributes:
        bn: The layer whose training goes on as it would have in the source: a
            `BatchNorm`, a `BatchRenorm` where there are renorm statistics, or an
            `EmaBatchNorm`.
        params: Its scale and bias.
        state: Its running statistics.
        notes: What was adapted, or looks odd, in words.
        source: The arrays it came from. What did not change goes back as it came, bit for
            bit; what did, in the same shapes and dtypes.
    """

    bn: Normalizer
    params: BatchNormParams
    state: BatchStats | RenormStats
    notes: tuple[str, ...] = ()
    source: Source | None = dataclasses.field(default=None, repr=False)


def read_layer(dialect: Dialect, part: Part, read: Read, write: Write) -> Converted:
    """Returns the layer of a part, remembering what it came from."""
    layer = Converted(*read(part))
    written = write(layer, part.arrays)
    source = Source(dialect, part.spellings, part.arrays, written)
    return dataclasses.replace(layer, source=source)


def read_one(
    dialect: Dialect, arrays: Mapping[str, Any], layer: str, read: Read, write: Write
) -> Converted:
    """Returns the layer of that name, or raises."""
    flat = flatten(arrays, dialect.separator)
    layers = dialect.layers(flat)
    layer = layer.removesuffix(dialect.separator)
    if not set(dialect.marks) & layers.get(layer, {}).keys():
        known = [
            name for name, roles in layers.items() if set(dialect.marks) & roles.keys()
        ]
        marks = (dialect.name(dialect.spellings[m][0], layer) for m in dialect.marks)
        raise ValueError(
            f"there is no batch norm {layer!r} with running statistics "
            f"({', '.join(marks)}). There are {len(known)} others: "
            f"{', '.join(map(repr, known[:8]))}."
        )
    return read_layer(dialect, Part(dialect, layer, layers[layer], flat), read, write)


def write_one(
    dialect: Dialect, layer: Converted, name: str, write: Write
) -> dict[str, np.ndarray]:
    """Returns the arrays of a layer under the names that they have in the library."""
    name = name.removesuffix(dialect.separator)
    source = layer.source
    if source is None or source.dialect.library != dialect.library:
        arrays = write(dataclasses.replace(layer, source=None), {})
        first = {role: dialect.spellings[role][0] for role in arrays}
        return {dialect.name(first[role], name): a for role, a in arrays.items()}
    arrays: Mapping[str, np.ndarray] = write(layer, source.arrays)
    if _same(arrays, source.written):
        arrays = source.arrays
    first = {role: dialect.spellings[role][0] for role in arrays}
    names = {
        role: dialect.name(source.spellings.get(role, first[role]), name) for role in arrays
    }
    return {
        names[role]: _like(names[role], array, source.arrays.get(role))
        for role, array in arrays.items()
    }


def _same(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    return arrays.keys() == others.keys() and all(
        np.array_equal(array, others[role]) for role, array in arrays.items()
    )


def _like(name: str, array: np.ndarray, source: np.ndarray | None) -> np.ndarray:
    """Returns the array in the shape and dtype of the one that it replaces."""
    if source is None:
        return array
    if array.size != source.size:
        raise ValueError(
            f"{name} has the shape {source.shape} in the source, got {array.shape} now. "
            "Write a layer of other features as a new one: Converted(bn, params, state)."
        )
    with np.errstate(over="ignore"):
        cast = array.reshape(source.shape).astype(source.dtype)
    if not np.array_equal(np.isfinite(cast), np.isfinite(array.reshape(source.shape))):
        raise ValueError(
            f"{name} grew beyond what its dtype {source.dtype} holds. Write it anew: "
            "Converted(bn, params, state)."
        )
    return cast


def nested(flat: Mapping[str, np.ndarray], separator: str) -> dict[str, Any]:
    """Returns arrays in dicts of dicts, by the parts of their names."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *path, leaf = name.split(separator)
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = array
    return tree
