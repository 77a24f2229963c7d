"""Adds up what XLA estimates for a TPU v5e: `python -m tests.tools.cycles`.

Compiles, and never runs, one layer of jaxbn and of Flax for 4 and for 256 chips, and sums
the compiler's `estimated_cycles` of all that always runs. All-reduces are not in them;
`python -m tests.tools.topologies` counts those. Needs libtpu (pip install 'jax[tpu]') and
no TPU, and fails where jaxbn takes more than LIMITS; with --write it writes the table of
docs/scale.md.
"""

import argparse
import importlib.metadata
import itertools
import os
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.benchmarks import report, tpu
from tests.benchmarks.deviceless import DTYPES, PEERS, Programs
from tests.tools.hlo import Program
from tests.tools.topologies import PAGE

PLACES = ("v5e:2x2", "v5e:16x16")
# What a chip holds of x, and what jaxbn may take of Flax's cycles there, forward and with
# all gradients.
LIMITS = {
    (128, 56, 56, 256): (1.01, 1.01),
    (128, 14, 14, 256): (1.03, 1.02),
    (128, 7, 7, 512): (1.05, 1.03),
}
SECTION = "cycles"


def cycles(place: str, peer: str, shape: tuple[int, ...], dtype: str) -> list[int]:
    """Returns the estimated cycles of a chip, forward and with all gradients."""
    devices = np.array(
        topologies.get_topology_desc(platform="tpu", topology_name=place).devices
    )
    mesh = Mesh(devices.reshape(-1), ("batch",))
    programs = Programs(peer, (shape[0] * devices.size, *shape[1:]), dtype, relu=False)

    def placed(leaf):
        spec = PartitionSpec("batch" if leaf.shape == programs.x.shape else None)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    totals = []
    for function, arguments in (programs.training(), programs.squares()):
        jitted = jax.jit(function)
        program = jitted.lower(*jax.tree.map(placed, arguments)).compile()
        always = Program(program.as_text() or "").always()
        totals.append(sum(each.cycles for each in always))
    return totals


def rows(places=PLACES):
    """Yields the place, shape, dtype and the ratios to Flax's cycles."""
    for place, shape, dtype in itertools.product(places, LIMITS, DTYPES):
        ours, theirs = (cycles(place, peer, shape, dtype) for peer in PEERS)
        yield place, shape, dtype, ours, np.divide(ours, theirs)


def main():
    parser = argparse.ArgumentParser(description="Sums a TPU compiler's own estimates.")
    parser.add_argument("--write", action="store_true", help="the table of docs/scale.md")
    args = parser.parse_args()
    if args.write:
        report.check_section(PAGE, SECTION)
    lines = [
        "| place | x of a chip | dtype | thousand cycles forward | / flax "
        "| with gradients | / flax |",
        "|---|---|---|---|---|---|---|",
    ]
    wrong = []
    for place, shape, dtype, ours, ratios in rows():
        size = "x".join(map(str, shape))
        cells = (
            f"{total / 1e3:,.0f} | {ratio:.3f}"
            for total, ratio in zip(ours, ratios, strict=True)
        )
        lines.append(f"| {place} | {size} | {dtype} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if np.any(ratios > LIMITS[shape]):
            wrong.append(lines[-1])
    if args.write:
        versions = (
            f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "libtpu")
        )
        text = "\n".join([f"Compiled by {', '.join(versions)}.", "", *lines])
        report.write_section(PAGE, SECTION, text)
    if wrong:
        sys.exit("\n".join([f"More than {LIMITS} of Flax's cycles:", *wrong]))


if __name__ == "__main__":
    os.environ.update(tpu.environment())
    jax.config.update("jax_platforms", "cpu")
    main()
