"""How a library names the arrays of a batch norm, and which of them belong together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn.convert._torch_file import from_tensor


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names of one library.

    Attributes:
        library: Its name, for messages.
        separator: What joins the parts of a name.
        spellings: For each role that an array plays, how it is named, `*` being the name
            of the layer; the first spelling that is there counts.
        marks: The roles that only a batch norm has.
    """

    library: str
    separator: str
    spellings: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...] = ("mean", "var")

    def name(self, spelling: str, layer: str) -> str:
        """Returns the name of an array of `layer`, which may be empty."""
        head, tail = spelling.split("*" + self.separator)
        return head + (layer + self.separator if layer else "") + tail

    def tail(self, spelling: str) -> str:
        """Returns the name of an array within its layer."""
        return spelling.split("*" + self.separator)[1]

    def layers(self, names: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Returns the spelling of each role that is there, for each possible layer."""
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
        }

    def _readings(self, name: str) -> Iterator[tuple[str, str, str]]:
        for role, spellings in self.spellings.items():
            for spelling in spellings:
                head, tail = spelling.split("*" + self.separator)
                inner = name[len(head) : len(name) - len(tail)]
                layer = inner.removesuffix(self.separator)
                if layer == inner and layer:
                    continue
                if self.name(spelling, layer) == name:
                    yield role, spelling, layer


class Part:
    """The arrays of one layer, by the roles that they play."""

    def __init__(self, dialect: Dialect, layer: str, spellings: dict[str, str], flat: Any):
        self.layer, self.spellings = layer, spellings
        self.names = {role: dialect.name(s, layer) for role, s in spellings.items()}
        self.arrays = {role: as_numpy(n, flat[n]) for role, n in self.names.items()}
        self._dialect = dialect

    def get(self, role: str) -> np.ndarray | None:
        """Returns the array of a role, or None."""
        return self.arrays.get(role)

    def need(self, role: str) -> np.ndarray:
        """Returns the array of a role, or raises."""
        if role not in self.arrays:
            missing = self._dialect.name(self._dialect.spellings[role][0], self.layer)
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
        return self._dialect.tail(self.spellings[role])

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


def as_numpy(name: str, leaf: Any) -> np.ndarray:
    """Returns a copy of an array, a tensor or a variable."""
    if type(leaf).__module__.split(".")[0] == "torch":
        return from_tensor(name, leaf)
    if not hasattr(leaf, "dtype"):
        raise TypeError(
            f"{name} must be an array, got {type(leaf).__name__}. Pass dicts of arrays."
        )
    return np.array(leaf)
