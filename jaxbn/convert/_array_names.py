"""Finds which arrays belong to one layer by the names that a library gives them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Naming:
    """How one library names the arrays of a batch norm.

    Attributes:
        library: Its name, for messages.
        separator: What joins the parts of a name.
        spellings: For each role that an array plays, how it is named, `*` being the name
            of the layer; the first spelling that is there counts.
        required_roles: A layer is a batch norm if it has an array of one of these roles.
    """

    library: str
    separator: str
    spellings: Mapping[str, tuple[str, ...]]
    required_roles: tuple[str, ...] = ("mean", "var")

    def name(self, spelling: str, layer: str) -> str:
        """Returns the name of an array of `layer`, which may be empty."""
        head, tail = spelling.split("*" + self.separator)
        return head + (layer + self.separator if layer else "") + tail

    def tail(self, spelling: str) -> str:
        """Returns the name of an array within its layer."""
        return spelling.split("*" + self.separator)[1]

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

    def _readings(self, name: str) -> Iterator[tuple[str, str, str]]:
        separator = re.escape(self.separator)
        for role, spellings in self.spellings.items():
            for spelling in spellings:
                head, tail = map(re.escape, spelling.split("*" + self.separator))
                if match := re.fullmatch(f"{head}(?:(.+){separator})?{tail}", name):
                    yield role, spelling, match[1] or ""


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

    def get(self, role: str) -> np.ndarray | None:
        """Returns the array of a role, or None."""
        return self.arrays.get(role)

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
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"the arrays must come in a mapping by their names, got {type(tree).__name__}. "
            "Pass a dict, such as convert.load(path) returns."
        )
    flat = {}
    for path, leaf in walk(tree):
        name = separator.join(path)
        if name in flat:
            raise ValueError(f"two arrays have the name {name!r}. Rename one of them.")
        flat[name] = leaf
    return flat


def walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the leaves of nested mappings with the keys that lead to them."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from walk(value, (*path, str(key)))
