"""The command: times jaxbn, its peers and the floor in turns, and reports.

    python -m tests.benchmarks --quick
    python -m tests.benchmarks --json run.json --plot roofline.png
    python -m tests.benchmarks --gpu --minutes 8 --json gpu.json
    python -m tests.benchmarks --read run.json --markdown docs/performance_tables.md

docs/performance.md tells how the times are taken and what they mean.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import accelerators, cases, machine, report, roofline
from tests.benchmarks.crew import PEERS, installed
from tests.benchmarks.session import measure, tell


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    counted = [name for name in accelerators.MODULES if getattr(args, f"bytes_{name}")]
    section = "gpu" if args.gpu else "times"
    _check_files(parser, args, [f"bytes {name}" for name in counted] or [section])
    if counted:
        _count_bytes(args, counted)
        return
    if args.read is not None:
        found = json.loads(args.read.read_text())
    else:
        if "jaxbn" not in args.peers:
            parser.error("the peers are compared with jaxbn, so --peers must name it too.")
        _apply_quick(args)
        rows = _rows(args)
        if not rows:
            parser.error(
                f"no row has layout {args.layout} with these options. Give a --shape."
            )
        variables = " ".join(f"{k}={v}" for k, v in machine.ALLOCATOR.items())
        tell(f"The workers run with {variables}, so that no result is mapped anew.")
        if machine.load() > 0.5:
            tell(
                f"WARNING other programs are running, load {machine.load()}: wait for them."
            )
        elsewhere = ["torch"] if args.torch_python else []
        found = measure(rows, args, installed(args.peers, tell, elsewhere))
    _deliver(args, section, report.times(found))
    if args.plot:
        roofline.draw(found["rows"], args.plot)
        tell(f"Wrote {args.plot}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Times jaxbn beside its peers."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few rows and rounds, for a first look")
    add(
        "--shape",
        type=cases.as_shape,
        nargs="+",
        metavar="32x56x56x64",
        help="shapes of x, in the layout; without nets",
    )
    add("--layout", choices=("NHWC", "NCHW"))
    add(
        "--dtype",
        nargs="+",
        choices=tuple(cases.ITEMSIZES),
        default=["float32", "bfloat16"],
    )
    add("--passes", nargs="+", choices=cases.PASSES)
    add("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    add("--nets", nargs="*", choices=tuple(cases.NETS), help="none, or which nets")
    add(
        "--torch-python",
        metavar="PYTHON",
        help="an interpreter that has torch, if this one does not",
    )
    add("--gpu", action="store_true", help="chains of layers of a size for a GPU")
    add("--minutes", type=_positive, help="begin no further row after so many")
    add("--rounds", type=_positive, help="how often each peer takes a turn")
    add("--json", type=Path, metavar="FILE", help="write all that was found, row by row")
    add("--read", type=Path, metavar="FILE", help="report a run of --json, not a new one")
    add("--plot", type=Path, metavar="FILE.png", help="draw a roofline")
    add(
        "--markdown",
        type=Path,
        metavar="PAGE",
        help="put the tables into their place in this page",
    )
    add(
        "--bytes-h200",
        action="store_true",
        help="for developers: count bytes on an H200, without one; installs a plugin",
    )
    add(
        "--bytes-tpu",
        action="store_true",
        help="for developers: count bytes on a TPU v5e, without one; needs libtpu",
    )
    return parser


def _check_files(parser, args, sections: list[str]) -> None:
    """Ends with a message before the run, rather than after it, on unfit files."""
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"there is no folder {path.parent} for {path}. Make it first.")
    if args.read is not None and not args.read.is_file():
        parser.error(f"--read needs a file, got {args.read}. Write one with --json.")
    try:
        for name in sections if args.markdown else ():
            report.check_section(args.markdown, name)
        if args.plot:
            roofline.check()
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, which is not a positive number. Give 1 or more."
        )
    return int(text)


def _rows(args: argparse.Namespace) -> list[cases.Case]:
    if args.gpu:
        rows = cases.gpu_cases(args.shape, args.layout, args.dtype, args.passes)
        return rows + cases.net_cases(args.nets, args.dtype[-1:], cases.IMAGES_ON_A_GPU)
    rows = cases.layer_cases(args.shape, args.layout, args.dtype, args.passes, args.quick)
    return rows + cases.net_cases(args.nets, args.dtype)


def _apply_quick(args: argparse.Namespace) -> None:
    """Fills in what was not asked for."""
    if args.rounds is None:
        args.rounds = 2 if args.quick else 5 if args.gpu else 9
    if args.passes is None and args.gpu:
        args.passes = cases.PASSES[1:3] + cases.PASSES[5:]
    if args.passes is None:
        args.passes = cases.PASSES[:3] if args.quick else cases.PASSES
    if args.nets is None:
        chosen = args.shape is not None or args.layout is not None
        args.nets = [] if chosen or args.quick else list(cases.NETS)
        if args.gpu and args.nets:
            args.nets = ["ResNet-50"]


def _deliver(args: argparse.Namespace, name: str, text: str) -> None:
    print(text)
    if args.markdown:
        report.write_section(args.markdown, name, text)
        tell(f"Wrote the section {name} of {args.markdown}.")


def _count_bytes(args: argparse.Namespace, names: list[str]) -> None:
    counted = {name: found for name in names if (found := accelerators.count(name, tell))}
    if args.json:
        args.json.write_text(json.dumps(counted, indent=1))
    for name, found in counted.items():
        _deliver(args, f"bytes {name}", report.counts(found))


if __name__ == "__main__":
    main()
