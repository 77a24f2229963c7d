"""One run: all rows, then memory, compile times and imports."""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from tests.benchmarks import machine, startup
from tests.benchmarks.cases import NETS, Case
from tests.benchmarks.crew import PEERS, Crew, WorkerError, run_case

RESIDUAL_SHAPE = (32, 14, 14, 256)
BLOCK_SHAPE = (32, 56, 56, 64)
COMPILED = (
    Case("layer", (32, 14, 14, 256), "NHWC", "float32", "gradient"),
    Case("small net", NETS["small net"], "NHWC", "float32", "train step"),
)


def tell(text: str) -> None:
    """Says something between the lines of the progress bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, file=sys.stderr)
    else:
        tqdm.write(text, file=sys.stderr)


def progress(items: list[Any], unit: str) -> Iterable[Any]:
    """Shows how far the run is.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("The progress bar needs tqdm: pip install tqdm.") from error
    return tqdm(items, "benchmark", unit=unit, dynamic_ncols=True)


def measure(rows: list[Case], args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
    """Returns all that was found; writes it after each row, where a file is wanted."""
    found: dict[str, Any] = {
        **machine.describe(),
        "rounds": args.rounds,
        "skipped": [peer for peer in args.peers if peer not in peers],
        "flags": os.environ.get("XLA_FLAGS", ""),
        "rows": [],
        "not measured": [],
        "residuals": [],
        "compile": [],
        "import": {},
    }

    end = time.monotonic() + 60 * (args.minutes or math.inf)

    def save() -> None:
        found["load_after"] = machine.load()
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))

    environments = dict.fromkeys(["floor", *(PEERS[peer][0] for peer in peers)])
    with Crew(environments, args.torch_python or sys.executable) as crew:
        found["about"] = crew.about
        on_cpu = crew.floor == "floor"
        found["floor"] = crew.about["floor"]["how"] if on_cpu else "copies on the device"
        for case in progress(rows, "row"):
            if time.monotonic() > end:
                found["not measured"].append(f"{case.name} {case.dtype} {case.what}")
                continue
            found["rows"].append(run_case(crew, case, peers, args.rounds, tell))
            save()
        jax_peers = [peer for peer in peers if PEERS[peer][0] == "jax"]
        if not args.gpu:
            found["residuals"] = _residuals(crew, jax_peers, args.dtype)
            found["compile"] = _compile(crew, jax_peers, args.quick)
    if found["not measured"]:
        tell(f"After {args.minutes} minutes these were left: {found['not measured']}.")
    if not args.gpu:
        found["import"] = _imports(peers, repeats=1 if args.quick else 7)
    save()
    return found


def _residuals(crew, peers, dtypes):
    """Returns what is kept: of a layer, without and with ReLU, and of a block."""
    questions = [
        ("layer", RESIDUAL_SHAPE, {"relu": False}, "residuals"),
        ("layer and ReLU", RESIDUAL_SHAPE, {"relu": True}, "residuals"),
        ("convolution, layer and ReLU", BLOCK_SHAPE, {}, "block_residuals"),
    ]
    rows = []
    for dtype in dtypes:
        for what, shape, options, do in questions:
            for peer in peers:
                units = _ask(crew, do, peer=peer, shape=shape, dtype=dtype, **options)
                rows.append({"peer": peer, "dtype": dtype, "what": what, "units": units})
    return rows


def _compile(crew, peers, quick):
    rows = []
    repeats = 1 if quick else 5
    for case in COMPILED[:1] if quick else COMPILED:
        among = [p for p in peers if case.kind == "layer" or p in ("jaxbn", "linen")]
        rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in among}
        # The first round imports what is imported late.
        for number in range(repeats + 1):
            for peer in among:
                told = _ask(crew, "compile", peer=peer, case=dataclasses.asdict(case))
                if number and told is not None:
                    rounds[peer].append(told)
        medians = {peer: startup.medians(told) for peer, told in rounds.items() if told}
        linen = sum(medians["linen"].values()) if "linen" in medians else None
        rows += [
            {
                "name": f"{case.what} of {case.name}",
                "peer": peer,
                **times,
                "to_linen": linen and sum(times.values()) / linen,
            }
            for peer, times in medians.items()
        ]
    return rows


def _imports(peers, repeats):
    statements = ["import jax", "import jaxbn"]
    if "linen" in peers:
        statements += ["import flax.linen", "import jaxbn.linen"]
    seconds = startup.import_seconds(statements, repeats)
    return {statement: statistics.median(each) for statement, each in seconds.items()}


def _ask(crew, do, **request):
    """Returns the answer, or None where the peer has no such layer."""
    try:
        return crew.ask("jax", do, **request)
    except WorkerError as error:
        if not str(error).startswith("UnfitError"):
            tell(f"FAILED {do} of {request['peer']}: {error}")
        return None
