"""What the examples that train share: errors about values of the command line."""

import argparse
from collections.abc import Iterable


def check(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    demands: Iterable[tuple[str, bool, str]],
) -> None:
    """Exits with a message about the first option that is not as demanded.

    A demand is the name of an option, whether its value is valid, and what it must be.
    """
    for option, valid, demand in demands:
        if not valid:
            value = getattr(args, option.replace("-", "_"))
            parser.error(f"argument --{option}: must be {demand}, got {value}")
