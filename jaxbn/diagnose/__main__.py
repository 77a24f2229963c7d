"""`python -m jaxbn.diagnose CHECKPOINT`: what the statistics of a checkpoint say.

Exits with 0 if nothing was found, 1 if something was, 2 if the file cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxbn.convert import read
from jaxbn.diagnose._diagnose import diagnose


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report of the checkpoint that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxbn.diagnose",
        description="Tells what is wrong with the batch norm statistics of a checkpoint.",
        epilog="Exit status: 0 nothing found, 1 something found, 2 unreadable.",
    )
    parser.add_argument(
        "checkpoint",
        help="a file or folder of any format that docs/convert.md lists",
    )
    parser.add_argument("--steps", type=int, help="training steps that the model took")
    parser.add_argument(
        "--momentum",
        type=float,
        help="that of its layers, as its framework counts: 0.1 for PyTorch's default",
    )
    parser.add_argument(
        "--epsilon", type=float, help="that of its layers; default: its framework's"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw the layers")
    options = parser.parse_args(arguments)
    try:
        checkpoint = read(options.checkpoint)
        report = diagnose(
            checkpoint.arrays,
            steps=options.steps,
            momentum=options.momentum,
            epsilon=options.epsilon,
        )
        print(checkpoint, report, sep="\n\n")
        if options.plot is not None:
            report.plot(options.plot)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
