"""Finds which arrays belong to one layer by the names that a library gives them."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn._norm_names import without_wrappers


@dataclasses.dataclass(frozen=True)
class Naming:
    """How one library names the arrays of a batch norm.

    Attributes:
        library: Its name, for messages.
        separator: What joins the parts of a name.
        spellings: For each role that an array plays, how it is named, `*` being the name
            of the layer, and the next character what joins it to the rest; the first
            spelling that is there counts.
        required_roles: A layer is a batch norm if it has an array of one of these roles.
    """

    library: str
    separator: str
    spellings: Mapping[str, tuple[str, ...]]
    required_roles: tuple[str, ...] = ("mean", "var")

    def name(self, spelling: str, layer: str) -> str:
        """Returns the name of an array of `layer`, which may be empty."""
        head, tail = spelling.split("*")
        return head + (layer + tail if layer else tail[1:])

    def tail(self, spelling: str) -> str:
        """Returns the name of an array within its layer."""
        return spelling.split("*")[1][1:]

    def layers(self, names: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Returns the batch norms: the spelling of each role that is there, by layer."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            for role, spelling, layer in self._readings(name):
                roles = found.setdefault(layer, {})
                order = self.spellings[role].index
                if role not in roles or order(spelling) < order(roles[role]):
                    roles[role] = spelling
        return {
            layer: {role: roles[role] for role in self.spellings if role in roles}
            for layer, roles in found.items()
            if roles.keys() & set(self.required_roles)
        }

    def unwrapped(self, name: str, layers: Mapping[str, Any]) -> str:
        """Returns the one of the layers that is named so but for wrappers around it."""
        if name in layers:
            return name
        same = [
            layer for layer in layers if without_wrappers(layer, self.separator) == name
        ]
        return same[0] if len(same) == 1 else name

    @functools.cached_property
    def _tails(self) -> tuple[str, ...]:
        return tuple({self.tail(s) for texts in self.spellings.values() for s in texts})

    def _readings(self, name: str) -> Iterator[tuple[str, str, str]]:
        # Most arrays of a model are none of a norm.
        if not name.endswith(self._tails):
            return
        found = []
        for role, texts in self.spellings.items():
            for spelling in texts:
                head, tail = spelling.split("*")
                if name == head + tail[1:]:
                    found.append((head, role, spelling, ""))
                elif name.startswith(head) and name.endswith(tail):
                    layer = name[len(head) : len(name) - len(tail)]
                    found += [(head, role, spelling, layer)] if layer else []
        # What one spelling takes for a collection, another takes for a part of the name.
        longest = max((len(head) for head, *_ in found), default=0)
        for head, *reading in found:
            if len(head) == longest:
                role, spelling, layer = reading
                yield role, spelling, layer


@dataclasses.dataclass(frozen=True, eq=False)
class LayerArrays:
    """The arrays of one layer, and the spellings of their names, by role."""

    naming: Naming
    layer: str
    spellings: Mapping[str, str]
    arrays: Mapping[str, np.ndarray]

    @property
    def names(self) -> dict[str, str]:
        """The names of the arrays by role."""
        return {role: self.naming.name(s, self.layer) for role, s in self.spellings.items()}

    def need(self, role: str) -> np.ndarray:
        """Returns the array of a role, or raises."""
        if role not in self.arrays:
            missing = self.naming.name(self.naming.spellings[role][0], self.layer)
            raise ValueError(
                f"there is no {missing!r} beside {', '.join(self.names.values())}. A batch "
                "norm is converted with its running statistics; take them from a "
                "checkpoint that has them."
            )
        return self.arrays[role]

    def require(self, *roles: str) -> None:
        """Raises unless there is an array for each of the roles."""
        for role in roles:
            self.need(role)

    def tail(self, role: str) -> str:
        """Returns the name of an array within its layer."""
        return self.naming.tail(self.spellings[role])

    def count(self, role: str) -> int:
        """Returns a number of steps, or raises."""
        array = self.need(role)
        number = array.dtype.kind in "iufb" and array.size == 1
        if not (number and 0 <= float(array.reshape(())) < 2**31):
            raise ValueError(
                f"{self.names[role]} must be one number of steps, got {array!r}. Take it "
                "from the checkpoint as it is."
            )
        return int(array.reshape(()))


def flatten(tree: Any, separator: str) -> dict[str, Any]:
    """Returns the leaves of nested mappings by their joined names."""
    tree = as_mapping(tree)
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"the arrays must come in a mapping by their names, got {type(tree).__name__}. "
            "Pass a dict, such as convert.load(path) returns."
        )
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        leaves = flatten(value, separator) if inner else {"": value}
        for tail, leaf in leaves.items():
            name = f"{key}{separator}{tail}" if inner else str(key)
            if name in flat:
                raise ValueError(f"two arrays have the name {name!r}. Rename one of them.")
            flat[name] = leaf
    return flat


def as_mapping(arrays: Any) -> Any:
    """Returns the variables of a framework by their paths, and anything else as it is.

    Keras and TensorFlow list variables, which have a path or at least a name.
    """
    if isinstance(arrays, (Mapping, str)) or not isinstance(arrays, Iterable):
        return arrays
    variables = list(arrays)
    named: dict[str, Any] = {}
    for variable in variables:
        path = getattr(variable, "path", None) or getattr(variable, "name", None)
        if not isinstance(path, str):
            return arrays
        if path in named:
            raise ValueError(
                f"two variables have the path {path!r}, and a dict would lose one. Pass "
                "the variables of one part of the model after the other, or name layers "
                "apart."
            )
        named[path] = variable
    return named
