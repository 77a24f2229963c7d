"""Counts what batch normalization sends: `python -m tests.tools.topologies`.

Compiles, and never runs, a training step of LAYERS layers (matrix product, normalization,
ReLU) for 8 and 64 CPU devices and, where libtpu is installed, for the TPU topologies v5e
2x2 (4 chips) and 16x16 (256 chips). No TPU is needed:

    python3 -m venv tpu && tpu/bin/pip install -e . 'jax[tpu]' flax
    tpu/bin/python -m tests.tools.topologies

takes 4 minutes on two cores (jax 0.10.2, libtpu 0.0.42.1) and fails where docs/scale.md
says another number than the programs; with --write it writes the tables of that page.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._kernels.compensated import two_product, two_sum
from tests.tools.hlo import Program

LAYERS, CHANNELS, GROUP = 4, 256, 4
IMAGE = (32, 56, 56, CHANNELS)  # the shard of a device, in bfloat16
PLACES = {"cpu:8": 8, "cpu:64": 64, "v5e:2x2": 4, "v5e:16x16": 256}

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MARKS = "<!-- written by tests/tools/topologies.py -->\n", "<!-- until here -->\n"
ROWS = [(lib, style) for style in ("jit", "shard_map") for lib in ("jaxbn", "flax")]
# A layer that names its axis sends as much wherever it is compiled for: all-reduces and
# vectors of CHANNELS floats, forward, and forward and backward.
SENT = (1, 2), (11, 13)
# Vectors forward where GROUP neighbours share statistics, by how the groups are named.
GROUPED = {
    "two mesh axes": ({"groups": "mesh"}, lambda devices: 11),
    "axis_index_groups, check_vma=False": (
        {"groups": "index", "check_vma": False},
        lambda devices: 11,
    ),
    "axis_index_groups": ({"groups": "index"}, lambda devices: 11 * devices // GROUP),
}
# Operations on floats that sums and products of twice the precision consist of.
OPERATIONS = ("add", "subtract", "multiply", "and", "bitcast_convert")


def devices(place):
    """Returns the devices of a place, which need not exist."""
    if place.startswith("cpu"):
        return jax.devices()
    return topologies.get_topology_desc(platform="tpu", topology_name=place).devices


def normalize_by_jaxbn(axis_name=None, groups=None):
    """Returns `(variables, x) -> (y, new state)`, and the variables."""
    bn = jaxbn.BatchNorm(axis_name=axis_name, axis_index_groups=groups)

    def normalize(variables, x):
        return bn.apply(*variables, x, True)

    return normalize, jax.eval_shape(lambda: bn.init(CHANNELS))


def normalize_by_flax(axis_name=None, groups=None):
    bn = linen.BatchNorm(
        use_running_average=False,
        axis_name=axis_name,
        axis_index_groups=groups,
        dtype=jnp.bfloat16,
    )

    def normalize(variables, x):
        params, stats = variables
        both = {"params": params, "batch_stats": stats}
        y, new = bn.apply(both, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    x = jnp.zeros((1, CHANNELS), jnp.bfloat16)
    # init wants no mapped axis.
    shapes = jax.eval_shape(lambda: bn.clone(axis_name=None).init(jax.random.key(0), x))
    return normalize, (shapes["params"], shapes["batch_stats"])


LIBRARIES = {"jaxbn": normalize_by_jaxbn, "flax": normalize_by_flax}


def forward(normalize, layers, kernels, x):
    new = []
    for (params, state), kernel in zip(layers, kernels, strict=True):
        x, state = normalize((params, state), x @ kernel)
        new.append(state)
        x = jax.nn.relu(x)
    return jnp.square(x.astype(jnp.float32)).sum(), new


def step(normalize, layers, kernels, x):
    """Returns the new states, and the gradients by the layers' params and by x.

    None by the kernels, so that whatever is summed over devices is of the normalization.
    """
    params, states = zip(*layers, strict=True)

    def loss(params, x):
        return forward(normalize, zip(params, states, strict=True), kernels, x)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def compiled(place, library, style, *, backward, groups=None, check_vma=True):
    """Returns the program of one device, compiled for a place."""
    kinds = np.array(devices(place))
    mesh, axes, names = Mesh(kinds, ("d",)), "d", ("d",)
    if groups == "mesh":
        mesh, names = Mesh(kinds.reshape(-1, GROUP), ("g", "d")), ("g", "d")
    members = jaxbn.axis_groups(kinds.size, GROUP) if groups == "index" else None
    spread, whole = P(names), P()
    normalize, variables = LIBRARIES[library](
        axes if style == "shard_map" else None, members
    )
    run = functools.partial(step if backward else only_states, normalize)
    if style == "shard_map":
        # States of groups differ between devices; the tables ask for what is sent only.
        outputs = whole if groups is None else spread
        run = jax.shard_map(
            functools.partial(_ranked, run) if groups else run,
            mesh=mesh,
            in_specs=(whole, whole, spread),
            out_specs=((whole, spread), outputs) if backward and not groups else outputs,
            check_vma=check_vma,
        )

    def shaped(leaf, spec):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    layers = [jax.tree.map(lambda leaf: shaped(leaf, whole), variables)] * LAYERS
    kernel = shaped(jax.ShapeDtypeStruct((CHANNELS, CHANNELS), jnp.bfloat16), whole)
    image = jax.ShapeDtypeStruct((IMAGE[0] * kinds.size, *IMAGE[1:]), jnp.bfloat16)
    arguments = layers, [kernel] * LAYERS, shaped(image, spread)
    return jax.jit(run).lower(*arguments).compile()


def _ranked(run, *arguments):
    return jax.tree.map(lambda leaf: leaf[None], run(*arguments))


def only_states(normalize, layers, kernels, x):
    return forward(normalize, layers, kernels, x)[1]


def all_reduces(program):
    """Returns the all-reduces that always run, their bytes, and those in branches."""
    parsed = Program(program.as_text())
    always, sometimes = (
        [each.bytes for each in found if each.op in ("all-reduce", "all-reduce-start")]
        for found in (parsed.always(), parsed.sometimes())
    )
    return len(always), sum(always), len(sometimes)


def measure(place):
    """Returns what a place's programs send, as {row: numbers}."""
    plain = {}
    for library, style in ROWS:
        programs = [
            compiled(place, library, style, backward=backward) for backward in (False, True)
        ]
        counts, sizes, more = zip(*map(all_reduces, programs), strict=True)
        memory = programs[1].memory_analysis().temp_size_in_bytes
        plain[f"{library} {style}"] = [counts, sizes, more, memory]
    grouped = {}
    for name, (options, _) in GROUPED.items():
        program = compiled(place, "jaxbn", "shard_map", backward=False, **options)
        grouped[name] = all_reduces(program)[:2]
    return {"plain": plain, "grouped": grouped, "exact": operations(place)}


def operations(place):
    """Returns the floating operations of exact sums and products, written and compiled."""
    mesh = Mesh(np.array(devices(place)), ("d",))
    array = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=NamedSharding(mesh, P()))
    counts = {}
    for function in (two_sum, two_product):
        written = jax.jit(function).lower(array, array)
        texts = written.as_text(), written.compile().as_text()
        counts[function.__name__] = [
            [
                len(re.findall(pattern.format(name), text))
                for name in (OPERATIONS if text is texts[0] else _hyphens(OPERATIONS))
            ]
            for text, pattern in zip(texts, (r"stablehlo\.{} ", r" {}\("), strict=True)
        ]
    return counts


def _hyphens(names):
    return [name.replace("_", "-") for name in names]


def check(place, got):
    """Fails where a program does other than docs/scale.md says in words."""
    vector = LAYERS * CHANNELS * 4
    counts, sizes, more, _ = got["plain"]["jaxbn shard_map"]
    want = [LAYERS * count for count in SENT[0]], [vector * size for size in SENT[1]]
    assert (counts, sizes, more) == (*want, [0, 0]), (place, got)
    # Under jit as many, and one for the second reading, where digits were lost.
    counts, _, more, _ = got["plain"]["jaxbn jit"]
    assert (counts, more) == (want[0], [LAYERS, LAYERS]), (place, got)
    for name, (_, vectors) in GROUPED.items():
        want = [LAYERS, vector * vectors(PLACES[place])]
        assert got["grouped"][name] == want, (place, name, got)
    if not place.startswith("cpu"):
        # A compiler for the CPU fuses and repeats some; a TPU's keeps every single one.
        for name, (written, kept) in got["exact"].items():
            assert written == kept, (place, name, written, kept)


def tables(results):
    """Returns the lines of docs/scale.md."""
    yield (
        "| place | | all-reduces of a layer | where digits were lost | bytes of a layer "
        "| temporary memory |"
    )
    yield "|---|---|---|---|---|---|"
    for place, got in results.items():
        for name, (counts, sizes, more, memory) in got["plain"].items():
            cells = (
                " + ".join(f"{n / LAYERS:,.10g}" for n in (pair[0], pair[1] - pair[0]))
                for pair in (counts, sizes)
            )
            all_, bytes_ = cells
            lost = f"{more[1] // LAYERS} more" if more[1] else "-"
            mib = f"{memory / 2**20:.0f} MiB"
            yield f"| {place} | {name} | {all_} | {lost} | {bytes_} | {mib} |"
    yield ""
    yield f"| place | groups of {GROUP} by | all-reduces of a layer forward | bytes |"
    yield "|---|---|---|---|"
    for place, got in results.items():
        for name, (count, size) in got["grouped"].items():
            yield f"| {place} | {name} | {count // LAYERS} | {size // LAYERS:,} |"


def write(lines):
    """Puts the lines into docs/scale.md."""
    libraries = ("jax", "flax", "libtpu")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    body = "\n".join([f"Compiled by {versions}.", "", *lines, ""])
    PAGE.write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}")


def compare(lines):
    """Fails where docs/scale.md lacks a line of the tables."""
    written = PAGE.read_text().splitlines()
    missing = [line for line in lines if line not in written]
    assert not missing, "\n".join([f"{PAGE} lacks, see --write:", *missing])


def run(place):
    """Returns `measure(place)` from a process of its own, with as many devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # What a machine without a TPU must say to have programs compiled for one.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    if place.startswith("cpu"):
        environment["JAX_NUM_CPU_DEVICES"] = str(PLACES[place])
    command = [sys.executable, "-m", "tests.tools.topologies", place]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1200,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description="Counts what programs of a mesh send.")
    parser.add_argument("place", nargs="?", choices=PLACES, help="print its numbers only")
    parser.add_argument("--write", action="store_true", help="the tables of docs/scale.md")
    args = parser.parse_args()
    if args.place:
        print(json.dumps(measure(args.place)))
        return
    places, skipped = list(PLACES), []
    if importlib.util.find_spec("libtpu") is None:
        skipped = [place for place in places if not place.startswith("cpu")]
        places = [place for place in places if place not in skipped]
    missing = (
        f"SKIPPED {', '.join(skipped)}: there is no libtpu here. "
        "Run pip install 'jax[tpu]' in a virtual environment of its own."
    )
    if skipped and args.write:
        parser.error(missing)
    results = {place: run(place) for place in places}
    lines = list(tables(results))
    print("\n".join(lines))
    if skipped:
        print("", missing, sep="\n")
    for place, got in results.items():
        check(place, got)
    if args.write:
        write(lines)
    compare(lines)


if __name__ == "__main__":
    main()
