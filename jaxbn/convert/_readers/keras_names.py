"""Names the variables that Keras 3 stores by numbers, from the config it stores as JSON."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn._norm_names import TENSORFLOW
from jaxbn.convert._readers.contents import Contents

_VARIABLE = re.compile(r"(?:(.+)/)?vars/(\d+)")
_NORM = re.compile(r"(sync_?)?batch_?norm(alization)?(_\d+)?", re.IGNORECASE)
_SETTINGS = ("axis", "momentum", "epsilon", "renorm_momentum", "renorm_clipping")
_STATS, _RENORM = ("mean", "var"), ("std", "renorm_mean", "renorm_std")
_ROOTS = ("model_weights/",)


@dataclasses.dataclass(frozen=True)
class LayerConfigs:
    """The configs of the batch norms of a model, by the names of the layers."""

    norms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    known: bool = False

    @classmethod
    def of(cls, text: str | bytes) -> "LayerConfigs":
        """Returns those in a JSON text, of which nothing is made or run."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            return cls()
        norms = {}
        for node in _dicts(tree):
            config = node.get("config")
            if node.get("class_name") == "BatchNormalization" and isinstance(config, dict):
                norms[str(config.get("name"))] = config
        return cls(norms, True)


def name_variables(
    arrays: Mapping[str, np.ndarray],
    layers: Mapping[str, str],
    configs: LayerConfigs,
    contents: Contents,
) -> dict[str, np.ndarray]:
    """Returns arrays by the names that variables of Keras have, `vars/0` replaced.

    Args:
        arrays: The arrays by their paths in the file.
        layers: The names of layers by the paths of the groups of their variables.
        configs: What the file tells of batch norms.
        contents: Takes the settings of layers, and notes.
    """
    sizes: dict[str, int] = {}
    for path in arrays:
        if match := _VARIABLE.fullmatch(path):
            sizes[match[1] or ""] = sizes.get(match[1] or "", 0) + 1
    roles: dict[str, tuple[str, ...]] = {}
    for group, number in sizes.items():
        vars_path = f"{group}/vars" if group else "vars"
        name = layers.get(vars_path, group.rpartition("/")[2])
        config = configs.norms.get(name)
        if config is None and (configs.known or not _is_norm(name, group)):
            continue
        found = _roles(config, number)
        if found is None:
            contents.notes.append(
                f"{group} holds {number} arrays, of which nothing tells which is what: "
                "load the .keras file, whose config does"
            )
            continue
        roles[group] = found
    renamed = {}
    for path, array in arrays.items():
        renamed[_renamed(path, roles)] = array
    _add_settings(arrays, layers, configs, roles, contents)
    return renamed


def _renamed(path: str, roles: Mapping[str, tuple[str, ...]]) -> str:
    match = _VARIABLE.fullmatch(path)
    if match and (match[1] or "") in roles:
        role = roles[match[1] or ""][int(match[2])]
        return f"{match[1]}/{TENSORFLOW[role]}" if match[1] else TENSORFLOW[role]
    for root in _ROOTS:
        path = path.removeprefix(root)
    return path


def _is_norm(name: str, group: str) -> bool:
    return any(_NORM.fullmatch(part) for part in (name, group.rpartition("/")[2]))


def _roles(config: Mapping[str, Any] | None, number: int) -> tuple[str, ...] | None:
    """Returns the roles of the variables of a batch norm in the order of Keras."""
    if config is None:
        # Of three, the first is a scale or a bias.
        return {2: _STATS, 4: ("scale", "bias", *_STATS)}.get(number)
    roles = _STATS
    if config.get("center", True):
        roles = ("bias", *roles)
    if config.get("scale", True):
        roles = ("scale", *roles)
    if config.get("renorm"):
        roles += _RENORM
    return roles if len(roles) == number else None


def _add_settings(
    arrays: Mapping[str, np.ndarray],
    layers: Mapping[str, str],
    configs: LayerConfigs,
    roles: Mapping[str, tuple[str, ...]],
    contents: Contents,
) -> None:
    names = {group: layers.get(f"{group}/vars", "") for group in roles}
    for path in arrays:
        if path.startswith(_ROOTS) and path.removesuffix(":0").endswith("/moving_mean"):
            group = path.removeprefix(_ROOTS[0]).rpartition("/")[0]
            names[group] = group.rpartition("/")[2]
    for group, name in names.items():
        config = configs.norms.get(name, {})
        given = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        if not config.get("renorm"):
            given = {key: value for key, value in given.items() if "renorm" not in key}
        if given:
            contents.settings[group] = given


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
