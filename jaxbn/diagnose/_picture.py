"""Draws the layers of a report: a column for each number, its limit, and what is beyond."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from jaxbn.diagnose import _limits
from jaxbn.diagnose._layer_report import NUMBERS, LayerReport

# Where the bars of a number start, and where a finding begins.
_START = {"stretch": 1.0}
_LIMITS = {
    "momentum": _limits.MOMENTUM,
    "shift": _limits.SHIFT,
    "stretch": _limits.STRETCH,
    "noise": _limits.NOISE,
    "gap": _limits.GAP,
    "dead": 0.0,
}
_WITHIN, _BEYOND = "tab:blue", "tab:red"


def draw(
    path: str | PathLike[str], layers: Sequence[LayerReport], found: set[str], title: str
) -> None:
    """Writes the picture, with the names of the layers in `found` in red."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Report.plot draws with matplotlib, which is not installed. Run "
            "pip install 'jaxbn[diagnose]'."
        ) from error
    columns = [name for name in NUMBERS if any(map(_is_told(name), layers))]
    columns = columns or ["features"]
    figure = Figure(
        figsize=(3 + 2.5 * len(columns), 1.5 + 0.22 * len(layers)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, columns, strict=True):
        _column(axis, name, layers)
    axes[0].set_yticks(range(len(layers)), [row.name for row in layers])
    axes[0].invert_yaxis()
    for label, row in zip(axes[0].get_yticklabels(), layers, strict=True):
        label.set_color(_BEYOND if row.name in found else "black")
    figure.suptitle(title)
    figure.savefig(path)


def _column(axis: Any, name: str, layers: Sequence[LayerReport]) -> None:
    """Draws one number of all layers."""
    start, limit = _START.get(name, 0.0), _LIMITS.get(name, math.inf)
    values = [getattr(row, name) for row in layers]
    # Matplotlib cannot draw bars of a length that is not finite.
    lengths = [value - start if math.isfinite(value) else 0.0 for value in values]
    low = name == "momentum"
    colors = [_BEYOND if (v < limit if low else v > limit) else _WITHIN for v in values]
    axis.barh(range(len(layers)), lengths, left=start, color=colors)
    if math.isfinite(limit):
        axis.axvline(limit, color=_BEYOND, linestyle="--", linewidth=1)
    axis.set_xlim(left=start)
    axis.set_title(name)


def _is_told(name: str) -> Callable[[LayerReport], bool]:
    # No dead features at all are told by the absence of their column.
    return lambda row: abs(getattr(row, name)) >= (1 if name == "dead" else 0)
