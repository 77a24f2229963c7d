"""What a checkpoint on disk held, where it lay, and what of it is no array."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

_SHOWN = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `read` found. Prints as a summary.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from jaxbn import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.npz")
        ...     np.savez(path, scale=np.ones(3), author=np.array("me"))
        ...     print(convert.read(path))
        /...model.npz: npz, 1 array
        left out: author (array of texts)

    Attributes:
        arrays: The arrays by their names, or nested dicts of them, as they were saved.
        format: What kind of file or folder it is.
        path: What was read: of a folder with several steps the newest one.
        left_out: Why something in it is no array of numbers, by its name.
        notes: What else is worth knowing, in words.
        settings: The hyperparameters of layers that the file tells, as the keywords of
            `from_keras` or `from_torch`, by the name of the layer, of Keras and ONNX.
    """

    arrays: dict[str, Any]
    format: str
    path: Path
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        number = len(jax.tree.leaves(self.arrays))
        lines = [f"{self.path}: {self.format}, {number} array{'s' * (number != 1)}"]
        if self.left_out:
            shown = [f"{n} ({why})" for n, why in list(self.left_out.items())[:_SHOWN]]
            more = len(self.left_out) - len(shown)
            lines.append(f"left out: {', '.join(shown)}{f', {more} more' if more else ''}")
        lines += self.notes
        lines += self._told()
        return "\n".join(lines)

    def _told(self) -> list[str]:
        """Returns lines with the settings that layers share."""
        groups: dict[str, int] = {}
        for settings in self.settings.values():
            text = ", ".join(f"{key}={value!r}" for key, value in settings.items())
            groups[text] = groups.get(text, 0) + 1
        return [f"{text} in {number} batch norms" for text, number in groups.items()]
