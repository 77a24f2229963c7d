"""A picture of the bytes that each peer moves in a second, beside those of the floor."""

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

SHOWN = {"floor": "black", "jaxbn": "tab:red", "linen": "tab:blue", "torch": "tab:orange"}


def check() -> None:
    """Checks that pictures can be drawn.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs Matplotlib: pip install matplotlib.")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture: one field for each pass and dtype, bytes of x along it.

    Raises:
        ValueError: There is no row of a layer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["kind"] == "layer"]
    fields = list(dict.fromkeys((row["what"], row["dtype"]) for row in rows))
    if not fields:
        raise ValueError("There is no row of a layer to draw. Give a --shape.")
    columns = min(len(fields), 4)
    lines = math.ceil(len(fields) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for number, field in enumerate(fields):
        axes = figure.add_subplot(lines, columns, number + 1)
        chosen = [row for row in rows if (row["what"], row["dtype"]) == field]
        _draw_field(axes, chosen)
        axes.set_title(" ".join(field), fontsize=10)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _draw_field(axes, rows):
    for layouts, line in ((("NHWC", "NC"), "-"), (("NCHW",), ":")):
        for peer, color in SHOWN.items():
            points = sorted(
                (row["bytes"] / 1e6, _speed(row, peer))
                for row in rows
                if row["layout"] in layouts and row["seconds"].get(peer)
            )
            if points:
                label = peer if line == "-" else f"{peer}, NCHW"
                axes.plot(
                    *zip(*points, strict=True), line, color=color, label=label, marker="."
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("x in MB", fontsize=8)
    axes.set_ylabel("least traffic / time, GB/s", fontsize=8)
    axes.grid(alpha=0.3)


def _speed(row, peer):
    """Returns GB/s of the least traffic, at the median time."""
    return row["units"] * row["bytes"] / statistics.median(row["seconds"][peer]) / 1e9
