"""The charts of speed and memory, and the ten rows of docs/performance.md.

    python -m tests.tools.charts            # fails where they are not as recorded
    python -m tests.tools.charts --write    # draws and writes them

All numbers are read from docs/performance_tables.md, where the benchmark has written them.
A chart is SVG as text: the same numbers give the same file everywhere.
"""

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from tests.benchmarks.report import write_section

DOCS = Path(__file__).parents[2] / "docs"
PAGE, TABLES, IMAGES = (
    DOCS / "performance.md",
    DOCS / "performance_tables.md",
    DOCS / "images",
)
COLORS = {"jaxbn": "#0072B2", "Flax": "#E69F00", "PyTorch": "#D55E00"}

INFERENCE = "Inference"
TRAINING = "Training forward: y and new statistics"
GRADIENT = "Training forward and backward: y, new statistics, all gradients"
RELU = f"{GRADIENT}, with ReLU"
ADDED = f"{GRADIENT}, added to and with ReLU"
SHORT = {
    INFERENCE: "inference",
    TRAINING: "training forward",
    GRADIENT: "forward, backward",
    RELU: "forward, backward, ReLU",
    ADDED: "forward, backward, residual, ReLU",
}
LARGE = "32x56x56x256"
ROWS = [
    (INFERENCE, LARGE, "float32"),
    (INFERENCE, "256x1024", "float32"),
    (TRAINING, LARGE, "float32"),
    (TRAINING, LARGE, "bfloat16"),
    (GRADIENT, LARGE, "float32"),
    (GRADIENT, LARGE, "bfloat16"),
    (GRADIENT, "32x64x56x56", "float32"),
    (RELU, LARGE, "float32"),
    (RELU, LARGE, "bfloat16"),
    (ADDED, LARGE, "float32"),
]


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Returns the rows of each table of a page, by the heading above it."""
    found: dict[str, list[dict[str, str]]] = {}
    title, header = "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("#"):
            title, header = line.strip("# "), []
        elif not line.startswith("|") or set(line) <= set("|- "):
            continue
        elif not header:
            header = cells
        else:
            found.setdefault(title, []).append(dict(zip(header, cells, strict=True)))
    return found


def median(cell: str) -> float:
    """Returns the number before the quartiles."""
    return float(cell.replace("*", "").split()[0])


def medians() -> list[tuple[str, str, str, dict[str, float]]]:
    """Returns ten rows: pass, x, dtype, and the times over the floor by library."""
    recorded, found = tables(TABLES.read_text()), []
    names = {"jaxbn": "jaxbn", "Flax": "linen", "PyTorch": "torch"}
    for title, x, dtype in ROWS:
        (row,) = (r for r in recorded[title] if (r["x"], r["dtype"]) == (x, dtype))
        times = {name: median(row[f"{peer} / floor"]) for name, peer in names.items()}
        found.append((SHORT[title], x, dtype, times))
    return found


def ten_rows() -> str:
    """Returns the table of docs/performance.md."""
    lines = ["| pass | x | dtype | jaxbn | Flax | PyTorch |", "|---|---|---|---|---|---|"]
    for what, x, dtype, times in medians():
        best = min(times.values())
        cells = (f"**{t:.2f}**" if t == best else f"{t:.2f}" for t in times.values())
        lines.append(f"| {what} | {x} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(title: str, groups: dict[str, dict[str, float]], left: int, width: int) -> str:
    """Returns the parts of an SVG: bars in groups, with their numbers."""
    room = left + 165
    largest = max(max(values.values()) for values in groups.values())
    parts, y = [f'<text x="{left}" y="16" class="title">{escape(title)}</text>'], 30
    for label, values in groups.items():
        middle = y + 6 * len(values) + 4
        parts.append(
            f'<text x="{room - 8}" y="{middle}" class="end">{escape(label)}</text>'
        )
        for name, value in values.items():
            length = (width - 205) * value / largest
            parts += [
                f'<rect x="{room}" y="{y}" width="{length:.1f}" height="10" '
                f'fill="{COLORS[name]}"/>',
                f'<text x="{room + length + 4:.1f}" y="{y + 9}" class="value">{value:.2f}'
                "</text>",
            ]
            y += 12
        y += 10
    return "\n".join(parts)


def svg(parts: list[str], width: int, height: int) -> str:
    """Returns a whole SVG, with the legend below; gray text, for light and dark pages."""
    legend, x = [], 165
    for name, color in COLORS.items():
        legend.append(
            f'<rect x="{x}" y="{height - 16}" width="10" height="10" fill="{color}"/>'
        )
        legend.append(f'<text x="{x + 15}" y="{height - 7}">{name}</text>')
        x += 90
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            "<style>text { font: 12px system-ui, sans-serif; fill: #808080 } "
            ".title { font-weight: bold } .end { text-anchor: end } "
            ".value { font-size: 10px }</style>",
            *parts,
            *legend,
            "</svg>\n",
        ]
    )


def page_chart() -> str:
    """Returns the chart of docs/performance.md: all ten rows."""
    groups = {}
    for what, x, dtype, times in medians():
        label = what.replace("forward, backward", "both").replace(
            "training forward", "forward"
        )
        groups[
            f"{label}, {'' if x == LARGE else x + ', '}{dtype.replace('float', 'f')}"
        ] = times
    title = "Time over the least time that memory permits: 1 is the floor"
    return svg([bars(title, groups, 60, 700)], 780, 36 + 46 * len(groups) + 20)


def readme_chart() -> str:
    """Returns the chart of the README: speed, and memory beside it."""
    speed = {
        f"{what.rsplit(', ')[-1]}, {dtype}": times
        for what, x, dtype, times in medians()
        if what == SHORT[RELU]
    }
    kept = tables(TABLES.read_text())["Kept for the backward pass, in units of x"]
    memory = {
        f"{row['what']}, {row['dtype']}": {
            "jaxbn": float(row["jaxbn"]),
            "Flax": float(row["linen"]),
        }
        for row in kept
        if row["what"] == "layer and ReLU"
    }
    times = bars("Time of both passes / memory traffic", speed, 0, 390)
    bytes_ = bars("Kept for the backward pass / size of x", memory, 400, 390)
    return svg([times, bytes_], 800, 150)


CHARTS = {"performance.svg": page_chart, "speed.svg": readme_chart}


def differences() -> list[str]:
    """Returns what is not as recorded."""
    wrong = [
        name
        for name, draw in CHARTS.items()
        if not (IMAGES / name).is_file() or (IMAGES / name).read_text() != draw()
    ]
    if ten_rows() not in PAGE.read_text():
        wrong.append("the ten rows of docs/performance.md")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.charts")
    parser.add_argument("--write", action="store_true", help="draw and write them")
    if parser.parse_args().write:
        for name, draw in CHARTS.items():
            (IMAGES / name).write_text(draw())
        write_section(PAGE, "medians", ten_rows())
    elif wrong := differences():
        sys.exit(f"not as recorded: {', '.join(wrong)}. Run it with --write.")


if __name__ == "__main__":
    main()
