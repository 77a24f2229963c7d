"""Runs another library's own tests with our layers in the place of its, and compares.

    git clone --branch v0.13.8 https://github.com/patrick-kidger/equinox /tmp/equinox
    python -m tests.tools.peer_suite equinox /tmp/equinox

Their code is not ours to carry: this script is given a checkout of it, of the release that
is installed. The tests that may concern batch normalization are run as they are, which
tells those that build a layer and pass; these are run again with the library's class
replaced wherever it is, and must pass again. `.flax_suite` does so for Flax, and more.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MADE = set()
# Our modules, and those that define what they replace.
PLACES = {
    "flax": {
        "jaxbn.linen": "flax.linen.normalization",
        "jaxbn.nnx": "flax.nnx.nn.normalization",
    },
    "haiku": {"jaxbn.haiku": "haiku._src.batch_norm"},
    "equinox": {"jaxbn.equinox": "equinox.nn._batch_norm"},
}
# Which files may build a layer, by their text, and which of their tests, by their names.
FILES = {
    "flax": "BatchNorm",
    "haiku": "BatchNorm|descriptors|resnet|mobilenet",
    "equinox": "BatchNorm",
}
TESTS = {
    "haiku": "BatchNorm or NetV1 or ResNet or resnet or mobilenet",
    "equinox": "batch_norm or sequential or state",
}


def substitute(library):
    """Puts our classes in the place of theirs, in every module that has them."""
    importlib.import_module(library)
    for ours, theirs in PLACES[library].items():
        original = importlib.import_module(theirs).BatchNorm
        replacement = importlib.import_module(ours).BatchNorm
        assert original.__module__.startswith(f"{library}."), original
        modules = [m for n, m in sys.modules.items() if n.split(".")[0] == library]
        # Haiku's modules keep what they use of it in a class called hk.
        classes = [m.hk for m in modules if isinstance(vars(m).get("hk"), type)]
        for place in (*modules, *classes):
            for name in [n for n, value in vars(place).items() if value is original]:
                setattr(place, name, replacement)


def watch(library):
    """Notes the tests in which a BatchNorm is made, to tell how many there are."""
    for theirs in PLACES[library].values():
        cls = importlib.import_module(theirs).BatchNorm
        original = cls.__init__

        def init(self, *args, _original=original, **kwargs):
            MADE.add(os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0])
            _original(self, *args, **kwargs)

        cls.__init__ = init


def pytest_configure():
    if os.environ.get("JAXBN_SUBSTITUTE"):
        substitute(os.environ["JAXBN_SUBSTITUTE"])
    if os.environ.get("JAXBN_WATCH"):
        watch(os.environ["JAXBN_WATCH"])


def pytest_sessionfinish():
    if os.environ.get("JAXBN_MADE"):
        Path(os.environ["JAXBN_MADE"]).write_text("\n".join(sorted(MADE)))


def run(checkout, tests, folder, name, *options, **environment):
    """Returns the outcome of every test, and prints the last line of pytest."""
    report = folder / f"{name}.xml"
    listed = folder / "tests"
    listed.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_suite"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-W", "default", "--continue-on-collection-errors", *options, f"@{listed}"]
    here = Path(__file__).resolve()
    # By its bare name, since some checkouts have a package called tests, too.
    paths = [str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    if not report.exists():
        raise SystemExit(done.stdout + done.stderr)
    (folder / f"{name}.txt").write_text(done.stdout)
    return outcomes(report)


def outcomes(report):
    """Returns what became of every test, under the name that pytest calls it by."""
    result = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        *modules, last = case.get("classname").split(".")
        is_file = last.endswith("_test") or last.startswith("test_")
        file = "/".join([*modules, last] if is_file else modules) + ".py"
        owner = "" if is_file else f"{last}::"
        result[f"{file}::{owner}{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return result


def compare(library, checkout, folder):
    """Returns the tests that pass with the library's layers, and break with ours."""
    files = sorted({*checkout.rglob("*_test.py"), *checkout.rglob("test_*.py")})
    files = [file for file in files if re.search(FILES[library], file.read_text())]
    files = [str(file.relative_to(checkout)) for file in files]
    chosen = ("-k", TESTS[library]) if library in TESTS else ()
    made = folder / "made"
    note = {"JAXBN_WATCH": library, "JAXBN_MADE": str(made)}
    theirs = run(checkout, files, folder, library, *chosen, **note)
    tests = [name for name in made.read_text().split("\n") if theirs.get(name) == "passed"]
    print(f"{len(tests)} tests build a BatchNorm and pass with {library}'s", flush=True)
    if not tests:
        raise SystemExit((folder / f"{library}.txt").read_text())
    ours = run(checkout, tests, folder, "jaxbn", JAXBN_SUBSTITUTE=library)
    broken = [name for name in tests if ours.get(name) != "passed"]
    print(f"{len(tests) - len(broken)} of {len(tests)} pass with ours")
    for name in broken:
        print(f"BROKEN {name}: {ours.get(name, 'absent')}")
    if broken:
        print((folder / "jaxbn.txt").read_text())
    return broken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=PLACES)
    parser.add_argument("checkout", type=Path, help="a checkout of its repository")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(bool(compare(args.library, args.checkout.resolve(), Path(folder))))


if __name__ == "__main__":
    main()
