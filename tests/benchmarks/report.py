"""Tables of what was measured, in Markdown, and their places in a page."""

import re
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import PASSES

_PASS_TITLES = {
    "inference": "Inference",
    "training": "Training forward: y and new statistics",
    "gradient": "Training forward and backward: y, new statistics, all gradients",
    "train step": "Nets: one step of SGD",
}

# The others stand beside jaxbn only, or the tables would be too wide to read.
BESIDE_FLOOR = ("jaxbn", "linen", "torch")


def times(found: dict[str, Any]) -> str:
    """Returns the tables of one run."""
    parts = [_machine(found), _verdict(found["rows"])]
    for what in (*PASSES, "train step"):
        rows = [row for row in found["rows"] if row["what"] == what]
        if rows:
            parts.append(f"### {_title(what)}\n\n{_times_table(rows)}")
    parts += [_memory(found), _startup(found)]
    return "\n\n".join(part for part in parts if part)


def _title(what):
    mode, _, rest = what.partition("+")
    ending = {"": "", "relu": ", with ReLU", "add+relu": ", added to and with ReLU"}[rest]
    return _PASS_TITLES[mode] + ending


def _machine(found):
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    loads = f"{machine['load']} before, {found.get('load_after', '?')} after"
    about = found["about"]
    lines = [
        f"* {found['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}; load {loads}",
        f"* JAX runs on {about['jax']['device']}; {versions}",
        f"* {found['rounds']} rounds; the floor is {found['floor']}",
        "* " + " ".join(f"`{k}={v}`" for k, v in found["allocator"].items()),
    ]
    if found["skipped"]:
        lines.append("* not installed: " + ", ".join(found["skipped"]))
    return "\n".join(lines)


def _verdict(rows):
    ratios = [
        ratio
        for row in rows
        for name, ratio in row["ratios"].items()
        if name.startswith("jaxbn/") and name != "jaxbn/floor"
    ]
    slower = [(low, median) for low, median, _ in ratios if median > 1]
    surely = sum(low > 1 for low, _ in slower)
    much = sum(median > 1.15 for _, median in slower)
    return (
        f"jaxbn takes longer than a peer in **{len(slower)} of {len(ratios)}** "
        f"comparisons, in {surely} with both quartiles above 1, in "
        f"{much} by more than 15 %; they are in bold below. Ratios are medians over the "
        "rounds, with quartiles; below 1 jaxbn is faster."
        if ratios
        else ""
    )


def _times_table(rows):
    names = dict.fromkeys(name for row in rows for name in row["ratios"])
    floors = [f"{peer}/floor" for peer in BESIDE_FLOOR if f"{peer}/floor" in names]
    peers = [name for name in names if not name.endswith("/floor")]
    header = ["x", "layout", "dtype"]
    header += ["floor ms", *(f"{n[:-6]} / floor" for n in floors)] if floors else []
    header += ["jaxbn ms", *(n.replace("/", " / ") for n in peers)]
    nets = rows[0]["kind"] != "layer"
    header += [f"temp {p}{', MB' if nets else ''}" for p in ("jaxbn", "linen")]
    counted = any(row["depth"] > 1 for row in rows)
    header += [f"kernels {p}" for p in ("jaxbn", "linen")] if counted else []
    table = []
    for row in rows:
        seconds = row["seconds"]
        cells = [row["name"], row["layout"], row["dtype"]]
        if floors:
            cells += [_ms(seconds.get("floor"))]
            cells += [_quartiles(row["ratios"].get(name)) for name in floors]
        cells += [_ms(seconds.get("jaxbn"))]
        cells += [_quartiles(row["ratios"].get(name), bold_above=1) for name in peers]
        for peer in ("jaxbn", "linen"):
            temp = row["temp"].get(peer)
            megabytes = nets and temp is not None
            cells.append(f"{temp * row['bytes'] / 1e6:.0f}" if megabytes else _number(temp))
        for peer in ("jaxbn", "linen") if counted else ():
            cells.append(_number(row["kernels"].get(peer)))
        table.append(cells)
    return _table(header, table)


def _memory(found):
    parts = []
    if found["residuals"]:
        peers = list(dict.fromkeys(row["peer"] for row in found["residuals"]))
        kinds = dict.fromkeys((row["dtype"], row["what"]) for row in found["residuals"])
        table = [
            [
                dtype,
                what,
                *(
                    _number(row["units"])
                    for row in found["residuals"]
                    if (row["dtype"], row["what"]) == (dtype, what)
                ),
            ]
            for dtype, what in kinds
        ]
        parts.append("### Kept for the backward pass, in units of x")
        parts.append(_table(["dtype", "what", *peers], table))
    return "\n\n".join(parts)


def _startup(found):
    parts = []
    if found["compile"]:
        parts.append("### Trace and compile, seconds, with empty caches")
        table = [
            [
                row["name"],
                row["peer"],
                f"{row['trace']:.3f}",
                f"{row['compile']:.3f}",
                _number(row["to_linen"]),
            ]
            for row in found["compile"]
        ]
        parts.append(_table(["what", "peer", "trace", "compile", "sum / linen"], table))
    if found["import"]:
        parts.append("### Import, in a fresh process")
        base = found["import"]["import jax"]
        table = [
            [f"`{name}`", f"{median:.3f}", f"{median / base:.2f}"]
            for name, median in found["import"].items()
        ]
        parts.append(_table(["", "seconds", "/ `import jax`"], table))
    return "\n\n".join(parts)


def counts(found: dict[str, Any]) -> str:
    """Returns the table of bytes on an accelerator, in units of x."""
    names = dict.fromkeys(name for row in found["rows"] for name in row)
    for name in ("peer", "dtype", "relu"):
        del names[name]
    table = [
        [
            row["peer"],
            row["dtype"],
            "ReLU" if row["relu"] else "-",
            *(_number(row.get(name)) for name in names),
        ]
        for row in found["rows"]
    ]
    used = ("jaxbn", "jax", "flax", "libtpu")
    versions = ", ".join(f"{p} {v}" for p, v in found["versions"].items() if p in used)
    shape = "x".join(map(str, found["shape"]))
    heading = f"* {found['date']}; x is {shape}; {versions}"
    return f"{heading}\n\n{_table(['layer', 'dtype', 'activation', *names], table)}"


def _ms(seconds):
    return "-" if not seconds else f"{1e3 * sorted(seconds)[len(seconds) // 2]:.3g}"


def _number(value):
    return "-" if value is None else f"{value:.2f}"


def _quartiles(ratio, bold_above=float("inf")):
    if ratio is None:
        return "-"
    low, middle, high = ratio
    text = f"**{middle:.2f}**" if middle > bold_above else f"{middle:.2f}"
    return f"{text} [{low:.2f}, {high:.2f}]"


def _table(header, rows):
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def check_section(page: Path, name: str) -> None:
    """Checks that a page has a place for a section.

    Raises:
        ValueError: It has no such marks, or is no file.
    """
    begin, end = _marks(name)
    if not _section(name).search(page.read_text() if page.is_file() else ""):
        raise ValueError(
            f"{page} has no place for the tables, two lines with {begin} and {end}. Write "
            "them where the tables should stand."
        )


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marks of a section of a page."""
    begin, end = _marks(name)
    new = f"{begin}\n\n{text}\n\n{end}"
    page.write_text(_section(name).sub(lambda _: new, page.read_text()))


def _marks(name):
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def _section(name):
    begin, end = map(re.escape, _marks(name))
    return re.compile(f"{begin}.*?{end}", re.DOTALL)
