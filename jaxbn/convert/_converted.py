"""Reads one layer of another library, and writes it back bit for bit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from jaxbn._layers.normalizer import Normalizer
from jaxbn._state import BatchNormParams
from jaxbn.convert._array_names import LayerArrays, Naming, flatten
from jaxbn.convert._arrays import as_numpy

Bn = TypeVar("Bn", bound=Normalizer, covariant=True)
Stats = TypeVar("Stats", covariant=True)
Layer = TypeVar("Layer", bound="Converted[Any, Any]")
Read: TypeAlias = Callable[[LayerArrays], Layer]
# Returns arrays by role, given a layer and the arrays that it was read from, if any.
Write: TypeAlias = Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a layer was read from, and the arrays as which it would be written unchanged."""

    read: LayerArrays
    written: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Converted(Generic[Bn, Stats]):
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

    bn: Bn
    params: BatchNormParams
    state: Stats
    notes: tuple[str, ...] = ()
    source: Source | None = dataclasses.field(default=None, repr=False)


def read_layer(
    naming: Naming,
    flat: Mapping[str, Any],
    found: tuple[str, Mapping[str, str]],
    read: Read[Layer],
    write: Write,
) -> Layer:
    """Returns a layer that `naming` found in `flat`, and remembers what it came from."""
    name, spellings = found
    names = {role: naming.name(spelling, name) for role, spelling in spellings.items()}
    arrays = {role: as_numpy(name, flat[name]) for role, name in names.items()}
    given = LayerArrays(naming, name, spellings, arrays)
    layer = read(given)
    return dataclasses.replace(layer, source=Source(given, write(layer, arrays)))


def read_one(
    naming: Naming, arrays: Mapping[str, Any], name: str, read: Read[Layer], write: Write
) -> Layer:
    """Returns the layer of that name, or raises."""
    flat = flatten(arrays, naming.separator)
    layers = naming.layers(flat)
    name = naming.unwrapped(name.removesuffix(naming.separator), layers)
    if name not in layers:
        required = [naming.spellings[role][0] for role in naming.required_roles]
        raise ValueError(
            f"there is no batch norm {name!r} with running statistics "
            f"({', '.join(naming.name(spelling, name) for spelling in required)}). There "
            f"are {len(layers)} others: {', '.join(map(repr, list(layers)[:8]))}."
        )
    return read_layer(naming, flat, (name, layers[name]), read, write)


def write_one(
    naming: Naming, layer: Converted[Any, Any], name: str, write: Write
) -> dict[str, np.ndarray]:
    """Returns the arrays of a layer under the names that they have in the library."""
    name = name.removesuffix(naming.separator)
    source, old, spellings = layer.source, {}, {}
    if source is None or source.read.naming.library != naming.library:
        arrays = write(dataclasses.replace(layer, source=None), {})
    else:
        old, spellings = source.read.arrays, source.read.spellings
        arrays = write(layer, old)
        if _same(arrays, source.written):
            arrays = old
    names = {
        role: naming.name(spellings.get(role, naming.spellings[role][0]), name)
        for role in arrays
    }
    return {
        names[role]: _replacing(names[role], old.get(role), array)
        for role, array in arrays.items()
    }


def _same(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    return arrays.keys() == others.keys() and all(
        np.array_equal(array, others[role]) for role, array in arrays.items()
    )


def _replacing(name: str, source: np.ndarray | None, array: np.ndarray) -> np.ndarray:
    """Returns `array` in the shape and dtype of `source`, which it replaces."""
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
