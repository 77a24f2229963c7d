"""Shows that the default tests catch every mutant: `python -m tests.mutants`."""

import argparse
import queue
import sys
import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.workshop import Outcome, Workshop


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", default="", help="text in the name or file of a mutant")
    parser.add_argument(
        "--likely", action="store_true", help="run the likely tests alone, never the suite"
    )
    parser.add_argument("--most-seconds", type=float, default=1500.0, help="of one run")
    return parser.parse_args(arguments)


def outcomes(mutants: list[Mutant], options: argparse.Namespace) -> Iterator[Outcome]:
    """Yields what becomes of each mutant, in the order in which they end."""
    with tempfile.TemporaryDirectory() as folder:
        idle: queue.Queue[Workshop] = queue.Queue()
        for job in range(options.jobs):
            idle.put(Workshop(Path(folder, str(job)), options.most_seconds))

        def meet(mutant: Mutant) -> Outcome:
            workshop = idle.get()
            try:
                return workshop.meet(mutant, whole=not options.likely)
            finally:
                idle.put(workshop)

        found = []
        with futures.ThreadPoolExecutor(options.jobs) as pool:
            for done in futures.as_completed([pool.submit(meet, m) for m in mutants]):
                found.append(done.result())
                yield found[-1]
        # A test that fails on the package as it is has caught nothing.
        tests = sorted({outcome.by for outcome in found if "::" in outcome.by})
        failure = idle.get().failure(tests) if tests else ""
        if failure:
            raise RuntimeError(
                f"{failure} fails without any mutant. Mend it first: what it caught counts "
                "for nothing."
            )


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    mutants = [m for m in MUTANTS if options.only in f"{m.file} {m.name}"]
    if not mutants:
        raise SystemExit(f"no mutant has {options.only!r} in its name. Give another text.")
    survived = []
    print("| file | defect | caught by | seconds |\n|---|---|---|---|")
    for mutant, by, seconds in outcomes(mutants, options):
        caught = f"`{by}`" if by else "**nothing**"
        print(f"| {mutant.file} | {mutant.name} | {caught} | {seconds:.0f} |", flush=True)
        if not by:
            survived.append(mutant)
    print(f"\n{len(mutants) - len(survived)} of {len(mutants)} mutants caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
