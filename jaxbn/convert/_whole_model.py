"""Finds all batch norms of a model by their names, and puts changed ones back."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np

from jaxbn.convert._array_names import Naming, as_mapping, flatten
from jaxbn.convert._converted import Layer, Read, Write, read_layer, write_one
from jaxbn.convert._suspicious import find_suspicious

Options = ParamSpec("Options")
Result = TypeVar("Result")
_SHOWN = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Found(Generic[Layer]):
    """The batch norms of a model. Prints as a table.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> arrays = {"fc.weight": np.ones((2, 3), np.float32)}
        >>> for name in ("weight", "bias", "running_mean", "running_var"):
        ...     arrays[f"bn1.{name}"] = np.ones(2, np.float32)
        >>> found = convert.find_torch(arrays)
        >>> print(found)
        batch norm  features  dtype    arrays                                notes
        bn1         2         float32  weight bias running_mean running_var
        left        shape     dtype
        fc.weight   2x3       float32
        batch norms: 1, of 4 arrays; left: 1

    Attributes:
        layers: A `Converted` for each name of a layer, in the order of the arrays.
        left: The names of the arrays that belong to none of them.
        suspicious: What to look at by hand, and why: arrays that are left though they look
            like running statistics or a batch norm, and layers without params among others
            that have them.
    """

    layers: Mapping[str, Layer]
    left: tuple[str, ...]
    suspicious: Mapping[str, str]
    _tree: Any = dataclasses.field(repr=False)
    _naming: Naming = dataclasses.field(repr=False)
    _write: Write = dataclasses.field(repr=False)

    def put_back(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        """Returns the model that was searched, with the arrays of `layers` replaced.

        Args:
            layers: Those that changed, by their names, e.g.
                `{name: dataclasses.replace(layer, params=..., state=...)}`.

        Returns:
            Dicts, nested as they were; what did not change as it was.

        Raises:
            ValueError: There is no such layer, or it has other arrays than it had.
        """
        new: dict[str, np.ndarray] = {}
        for name, layer in layers.items():
            if name not in self.layers:
                known = ", ".join(map(repr, list(self.layers)[:8]))
                raise ValueError(
                    f"there was no batch norm {name!r} in the model. There were "
                    f"{len(self.layers)}: {known}."
                )
            arrays = write_one(self._naming, layer, name, self._write)
            source = self.layers[name].source
            assert source is not None
            had = {self._naming.name(s, name) for s in source.read.spellings.values()}
            if arrays.keys() != had:
                raise ValueError(
                    f"the batch norm {name!r} has the arrays {sorted(had)}, but would get "
                    f"{sorted(arrays)}. Replace only values of what was found."
                )
            new |= arrays
        return _replaced(self._tree, (), self._naming.separator, new.get)

    def __str__(self) -> str:
        flat = flatten(self._tree, self._naming.separator)
        rows = [("batch norm", "features", "dtype", "arrays", "notes")]
        count = 0
        for name, layer in self.layers.items():
            assert layer.source is not None
            tails = list(map(self._naming.tail, layer.source.read.spellings.values()))
            count += len(tails)
            row = (*_shape(layer.state.mean), " ".join(tails), "; ".join(layer.notes))
            rows.append((name or "(itself)", *row))
        rows.append(("left", "shape", "dtype", "", ""))
        rows += [(name, *_shape(flat[name]), "", "") for name in self.left[:_SHOWN]]
        if len(self.left) > _SHOWN:
            rows.append((f"... {len(self.left) - _SHOWN} more", "", "", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        last = f"batch norms: {len(self.layers)}, of {count} arrays; left: {len(self.left)}"
        if self.suspicious:
            last += f"; suspicious: {len(self.suspicious)}"
            lines += [
                "suspicious",
                *_few(f"{n}: {why}" for n, why in self.suspicious.items()),
            ]
        return "\n".join([*lines, last])


def find(
    naming: Naming, tree: Mapping[str, Any], read: Read[Layer], write: Write
) -> Found[Layer]:
    """Returns all batch norms of a model, or raises with all that is wrong with them."""
    tree = as_mapping(tree)
    flat = flatten(tree, naming.separator)
    layers, wrong, taken = {}, [], set()
    for name, spellings in naming.layers(flat).items():
        try:
            layer = read_layer(naming, flat, (name, spellings), read, write)
        except ValueError as error:
            wrong.append(f"{name or '(itself)'}: {error}")
            continue
        layers[name] = layer
        taken |= {naming.name(spelling, name) for spelling in spellings.values()}
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(wrong) + len(layers)} batch norms cannot be converted:\n"
            + "\n".join(wrong)
        )
    left = tuple(name for name in flat if name not in taken)
    roles = {name: layer.source.read.spellings.keys() for name, layer in layers.items()}
    suspicious = find_suspicious(roles, left, flat)
    return Found(layers, left, suspicious, tree, naming, write)


def with_options_of(
    one: Callable[Concatenate[Mapping[str, Any], str, Options], Any],
) -> Callable[
    [Callable[..., Result]], Callable[Concatenate[Mapping[str, Any], Options], Result]
]:
    """Gives a function of a whole model the keywords of `one`, which reads a layer."""
    signature = inspect.signature(one)
    arrays, _, *options = signature.parameters.values()

    def declare(function: Callable[..., Any]) -> Any:
        function.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
            parameters=[arrays, *options],
            return_annotation=function.__annotations__["return"],
        )
        return function

    return declare


def with_defaults(one: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of `one`, which reads a layer, and their defaults."""
    bound = inspect.signature(one).bind({}, "", **given)
    bound.apply_defaults()
    return bound.kwargs


def _shape(array: Any) -> tuple[str, str]:
    if not hasattr(array, "dtype"):
        return "", type(array).__name__
    dtype = str(array.dtype).removeprefix("torch.")
    return "x".join(map(str, array.shape)) or "()", dtype


def _few(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    more = [f"... {len(every) - _SHOWN} more"] if len(every) > _SHOWN else []
    return every[:_SHOWN] + more


def _replaced(tree: Any, path: tuple[str, ...], separator: str, new: Callable) -> Any:
    if isinstance(tree, Mapping):
        return {
            key: _replaced(value, (*path, str(key)), separator, new)
            for key, value in tree.items()
        }
    array = new(separator.join(path))
    return tree if array is None else array
